package main

import (
	"errors"
	"fmt"
	"io/fs"
	"text/tabwriter"

	"github.com/rs/zerolog"
	"github.com/spf13/cobra"

	"scoria/driver/host"
)

// rebuildRegistry does its work within this process: there is no daemon without a
// registry.
func (a *app) rebuildRegistry() *cobra.Command {
	var dataDir, config, masterKeys string
	var req host.RebuildRequest
	cmd := &cobra.Command{
		Use: "rebuild-registry --data-dir DIR [--asd DIR|HOST:PORT ...]", Short: "Make a lost registry anew from the storage daemons", Args: args(),
		Long: `Make DIR/registry.db, in which it stands which volumes there are, anew from what the
storage daemons have. It runs while scoriad is stopped. Volumes come back with their
names, sizes, limits, schedules and what they are clones of, as the object store last
heard of them, and with their contents as far as they were uploaded or lie in DIR.
Snapshots come back, with the names that they were made with, when the next start
opens the volumes. Pools without volumes, volumes in the directory store and, of
storage daemons at HOST:PORT, racks and datacentres do not.

On the storage daemons nothing is changed but the volumes' epochs, and the command may
be repeated. All storage daemons have to be named. If one is missing or objects are
lost, it is refused, as it is if there is a registry that has volumes or can't be
read; --force does it all the same, and keeps a registry that was there under a
name with the date.

Certificates for storage daemons at HOST:PORT and the master keys of presets that encrypt
come from the daemon's configuration, section [backend]. Without the master keys of
all volumes it is refused as well, or leaves, with --force, those out that it can't read.
A credential that systemd passes to the daemon alone is not there: name its file
with --master-keys.`,
		Example: `  scoria backend rebuild-registry --data-dir /var/lib/scoria
  scoria backend rebuild-registry --config /etc/scoria/scoria.toml --asd 10.0.0.1:9711 --asd 10.0.0.2:9711
  scoria backend rebuild-registry --data-dir /var/lib/scoria --master-keys /etc/scoria/master-keys`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := rebuildConfig(config, dataDir)
			if err != nil {
				return err
			}
			if masterKeys != "" {
				c.Backend.MasterKeys = masterKeys
			}
			if !a.quiet {
				req.Progress = func(text string) { fmt.Fprintln(a.errOut, text) }
			}
			report, err := a.rebuild(cmd.Context(), c, req, zerolog.Nop())
			if err != nil {
				return err
			}
			return a.print(&report, func(w *tabwriter.Writer) { showRebuilt(w, &report) })
		},
	}
	fl := cmd.Flags()
	fl.StringVar(&dataDir, "data-dir", "", "the daemon's data directory (default: as in the configuration)")
	fl.StringVar(&config, "config", "", "the daemon's configuration (default "+host.DefaultConfigFile+", if it is there)")
	fl.StringArrayVar(&req.ASDs, "asd", nil, "address of a storage daemon, a directory or HOST:PORT; repeated for all\n(default: asd in the data directory)")
	fl.StringVar(&masterKeys, "master-keys", "", "file with the master keys of presets that encrypt, in place of the configuration's")
	fl.BoolVar(&req.Force, "force", false, "replace a registry that has volumes and is not older than the storage daemons, or can't be read;\ndo without what is lost or missing")
	return cmd
}

func rebuildConfig(file, dataDir string) (host.Config, error) {
	name := file
	if name == "" {
		name = host.DefaultConfigFile
	}
	c, err := host.LoadConfig(name)
	if file == "" && errors.Is(err, fs.ErrNotExist) {
		if dataDir == "" {
			return c, usagef("--data-dir is needed: there is no %s", name)
		}
		c, err = host.DefaultConfig(), nil
	}
	if err != nil {
		return c, err
	}
	if dataDir != "" {
		c.DataDir = dataDir
	}
	return c, c.Resolve()
}

func showRebuilt(w *tabwriter.Writer, r *host.RebuildReport) {
	row(w, "VOLUME", "SIZE", "ID", "NOTE")
	for i := range r.Volumes {
		v := &r.Volumes[i]
		row(w, v.Name, formatSize(v.Size), v.ID, v.Note)
	}
	fmt.Fprintln(w)
	row(w, "storage daemons", r.ASDs)
	row(w, "presets", r.Presets)
	row(w, "pools", len(r.Pools))
	row(w, "objects", r.Objects)
	row(w, "registry of before", r.Previous)
	for _, list := range []struct {
		what string
		text []string
	}{{"missing storage daemon", r.Missing}, {"lost object", r.Lost}, {"superseded object", r.Superseded}, {"problem", r.Problems}} {
		for _, text := range list.text {
			row(w, list.what, text)
		}
	}
}
