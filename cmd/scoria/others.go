package main

import (
	"fmt"
	"os"
	"path/filepath"
	"text/tabwriter"

	"github.com/spf13/cobra"
	"github.com/spf13/cobra/doc"

	"scoria/driver/control"
)

func (a *app) poolCommand() *cobra.Command {
	return group("pool", "Create, list and delete pools of volumes", a.poolCreate(), a.poolList(), a.poolShow(), a.poolDelete(), a.poolLimit())
}

func (a *app) poolCreate() *cobra.Command {
	var req control.CreatePool
	var sco size
	cmd := &cobra.Command{
		Use: "create POOL", Short: "Create a pool: a named set of defaults for volumes", Args: args("POOL"),
		RunE: func(cmd *cobra.Command, got []string) error {
			req.Name, req.SCOSize = got[0], int64(sco)
			p, err := a.client().CreatePool(cmd.Context(), req)
			if err != nil {
				return err
			}
			return a.print(p, func(w *tabwriter.Writer) { showPool(w, &p) })
		},
	}
	cmd.Flags().Uint32Var(&req.BlockSize, "block-size", 0, "logical block of its volumes in bytes, 512 or 4096 (default: the daemon's)")
	cmd.Flags().Var(&sco, "sco-size", "size of the objects that its volumes are stored in, 1M to 1G (default: the daemon's)")
	cmd.Flags().StringVar(&req.Store, "store", "", "where its volumes are kept: \"objects\", on storage daemons, or \"directory\" (default: pool.store of\nthe daemon's configuration); for good")
	cmd.Flags().StringVar(&req.Preset, "preset", "", "preset of the object store that its volumes are kept with; for good (default: \"default\", which is built in)")
	return cmd
}

func (a *app) poolList() *cobra.Command {
	return &cobra.Command{
		Use: "list", Aliases: []string{"ls"}, Short: "List pools", Args: args(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			pools, err := a.client().Pools(cmd.Context())
			if err != nil {
				return err
			}
			return a.print(pools, func(w *tabwriter.Writer) {
				row(w, "NAME", "VOLUMES", "STORE", "PRESET", "BLOCK SIZE", "SCO SIZE")
				for _, p := range pools {
					row(w, p.Name, p.Volumes, p.Store, p.Preset, p.BlockSize, formatSize(uint64(p.SCOSize)))
				}
			})
		},
	}
}

func (a *app) poolShow() *cobra.Command {
	return &cobra.Command{
		Use: "show POOL", Short: "Show a pool", Args: args("POOL"), ValidArgsFunction: a.completePools,
		RunE: func(cmd *cobra.Command, got []string) error {
			p, err := a.client().Pool(cmd.Context(), got[0])
			if err != nil {
				return err
			}
			return a.print(p, func(w *tabwriter.Writer) { showPool(w, &p) })
		},
	}
}

func showPool(w *tabwriter.Writer, p *control.Pool) {
	row(w, "name", p.Name)
	row(w, "volumes", p.Volumes)
	row(w, "block size", p.BlockSize)
	row(w, "SCO size", formatSize(uint64(p.SCOSize)))
	store := p.Store
	if p.Preset != "" {
		store += ", preset " + p.Preset
	}
	row(w, "store", store)
	row(w, "created", printTime(p.Created))
}

func (a *app) poolDelete() *cobra.Command {
	return &cobra.Command{
		Use: "delete POOL", Aliases: []string{"rm"}, Short: "Delete a pool that has no volumes", Args: args("POOL"), ValidArgsFunction: a.completePools,
		RunE: func(cmd *cobra.Command, got []string) error {
			if err := a.client().DeletePool(cmd.Context(), got[0]); err != nil {
				return err
			}
			return a.print(map[string]string{"deleted": got[0]}, func(w *tabwriter.Writer) { row(w, "deleted", got[0]) })
		},
	}
}

func (a *app) statusCommand() *cobra.Command {
	return &cobra.Command{
		Use: "status", Short: "Show the daemon, and whatever is wrong with it", Args: args(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			st, err := a.client().Status(cmd.Context())
			if err != nil {
				return err
			}
			return a.print(st, func(w *tabwriter.Writer) { showStatus(w, &st) })
		},
	}
}

func showStatus(w *tabwriter.Writer, st *control.Status) {
	running := "running"
	if st.Stopping {
		running = "stopping"
	}
	row(w, "scoriad", fmt.Sprintf("%s, version %s, pid %d, since %s", running, st.Version, st.PID, printTime(st.Started)))
	row(w, "host", st.Host)
	row(w, "instance", st.Instance)
	row(w, "data directory", fmt.Sprintf("%s (%s free)", st.DataDir, formatSize(st.DataFree)))
	row(w, "run directory", st.RunDir)
	row(w, "write buffer", fmt.Sprintf("%s in %s", formatSize(uint64(st.WriteBuffer)), st.PoolFile))
	row(w, "volumes", fmt.Sprintf("%d, %d open, %d in use", st.Volumes, st.Open, st.InUse))
	printConditions(w, st.Conditions)
}

// docsCommand writes the manual pages at build time.
func (a *app) docsCommand() *cobra.Command {
	return &cobra.Command{
		Use: "docs DIRECTORY", Short: "Write the manual pages", Hidden: true, Args: args("DIRECTORY"),
		RunE: func(cmd *cobra.Command, got []string) error {
			dir, err := filepath.Abs(got[0])
			if err != nil {
				return err
			}
			if err := os.MkdirAll(dir, 0o755); err != nil {
				return err
			}
			cmd.Root().DisableAutoGenTag = true
			return doc.GenManTree(cmd.Root(), &doc.GenManHeader{Title: "SCORIA", Section: "1", Source: "Scoria " + version, Manual: "Scoria"}, dir)
		},
	}
}
