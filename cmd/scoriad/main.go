// Command scoriad is the per-host daemon: it serves volumes to QEMU over
// vhost-user-blk sockets and to other tools over NBD.
//
// SIGTERM and SIGINT stop it in order: front ends drained, everything flushed and
// checkpointed, exit status 0; a second one stops waiting and leaves the rest to
// the next start. SIGHUP is ignored: the configuration is read at the start.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/signal"
	"syscall"

	"github.com/rs/zerolog"
	"github.com/spf13/cobra"
	"github.com/spf13/cobra/doc"
	"golang.org/x/sys/unix"

	"scoria/driver/host"
)

// version is set by the linker.
var version = "devel"

func main() {
	if err := command().Execute(); err != nil {
		fmt.Fprintln(os.Stderr, "scoriad:", err)
		os.Exit(1)
	}
}

type flags struct {
	config, dataDir, runDir string
	print                   bool
}

func command() *cobra.Command {
	var f flags
	cmd := &cobra.Command{
		Use:   "scoriad",
		Short: "Serve Scoria volumes to virtual machines on this host",
		Long: `scoriad gives virtual machines their disks: each volume is served to QEMU on
RUN/vhost/POOL/VOLUME.sock (vhost-user-blk) and to other tools on RUN/nbd.sock
(NBD). The command scoria makes and manages volumes through RUN/control.sock.

With both --data-dir and --run-dir no file is needed, and none is read unless
--config names it; what they say goes before what a file says. Otherwise
` + host.DefaultConfigFile + ` is read if it is there.

SIGTERM stops the daemon in order; a second SIGTERM stops waiting, and the next
start recovers the rest. Guests wait while no daemon runs, and go on with the next.`,
		Example: `  scoriad --data-dir /var/lib/scoria --run-dir /run/scoria
  scoriad --config /etc/scoria/scoria.toml
  scoriad --print-config > /etc/scoria/scoria.toml`,
		Version: version, Args: cobra.NoArgs, SilenceUsage: true, SilenceErrors: true,
		RunE: func(cmd *cobra.Command, _ []string) error { return run(cmd, f) },
	}
	cmd.Flags().StringVar(&f.config, "config", "", "configuration file")
	cmd.Flags().StringVar(&f.dataDir, "data-dir", "", "where volumes and the registry lie")
	cmd.Flags().StringVar(&f.runDir, "run-dir", "", "where sockets are made")
	cmd.AddCommand(docsCommand())
	cmd.CompletionOptions.DisableDefaultCmd = true
	cmd.Flags().BoolVar(&f.print, "print-config", false, "print the configuration with all keys and comments, and exit")
	return cmd
}

// docsCommand writes the manual page at build time.
func docsCommand() *cobra.Command {
	return &cobra.Command{
		Use: "docs DIRECTORY", Short: "Write the manual page", Hidden: true, Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := os.MkdirAll(args[0], 0o755); err != nil {
				return err
			}
			root := cmd.Root()
			root.DisableAutoGenTag = true
			return doc.GenManTree(root, &doc.GenManHeader{Title: "SCORIAD", Section: "8", Source: "Scoria " + version, Manual: "Scoria"}, args[0])
		},
	}
}

func (f *flags) load() (host.Config, error) {
	c, err := host.DefaultConfig(), error(nil)
	switch {
	case f.config != "":
		c, err = host.LoadConfig(f.config)
	case f.dataDir == "" || f.runDir == "":
		if c, err = host.LoadConfig(host.DefaultConfigFile); errors.Is(err, fs.ErrNotExist) {
			c, err = host.DefaultConfig(), nil
		}
	}
	if f.dataDir != "" {
		c.DataDir = f.dataDir
	}
	if f.runDir != "" {
		c.RunDir = f.runDir
	}
	if err != nil {
		return c, err
	}
	return c, c.Resolve()
}

func run(cmd *cobra.Command, f flags) error {
	c, err := f.load()
	if err != nil {
		return err
	}
	if f.print {
		return printConfig(cmd.OutOrStdout(), c)
	}
	log := newLogger(&c)
	host.TuneRuntime(&c)
	terminate := make(chan os.Signal, 2)
	signal.Notify(terminate, syscall.SIGTERM, syscall.SIGINT)
	signal.Ignore(syscall.SIGHUP)
	log.Info().Str("version", version).Int("pid", os.Getpid()).Str("data_dir", c.DataDir).Str("run_dir", c.RunDir).Msg("scoriad starts")
	return serve(c, log, terminate)
}

// serve runs the daemon until a signal or a failure ends it.
func serve(c host.Config, log zerolog.Logger, terminate <-chan os.Signal) error {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	hurry, ended := make(chan struct{}), make(chan struct{})
	defer close(ended)
	stopping := make(chan struct{})
	go func() {
		for _, ask := range []chan struct{}{stopping, hurry} {
			select {
			case s := <-terminate:
				log.Info().Stringer("signal", s).Msg("asked to stop")
				close(ask)
				cancel() // of the start, if it is still under way
			case <-ended:
				return
			}
		}
	}()
	h, err := host.Start(ctx, c, version, log)
	if errors.Is(err, context.Canceled) && ctx.Err() != nil {
		log.Info().Msg("scoriad has stopped before it was ready")
		return nil
	}
	if err != nil {
		return err
	}
	notify(log, "READY=1")
	log.Info().Msg("scoriad is ready")
	var failure error
	select {
	case <-stopping:
	case failure = <-h.Failed():
		log.Error().Err(failure).Msg("scoriad can't go on")
	}
	notify(log, "STOPPING=1")
	err = errors.Join(failure, h.Stop(hurry))
	if err == nil {
		log.Info().Msg("scoriad has stopped")
	}
	return err
}

func notify(log zerolog.Logger, state string) {
	if err := host.Notify(state); err != nil {
		log.Warn().Err(err).Msg("systemd was not told")
	}
}

func printConfig(w io.Writer, c host.Config) error {
	b, err := host.PrintConfig(c)
	if err != nil {
		return err
	}
	_, err = w.Write(b)
	return err
}

func newLogger(c *host.Config) zerolog.Logger {
	level, err := zerolog.ParseLevel(c.Log.Level)
	if err != nil {
		level = zerolog.InfoLevel // Config.Validate has refused it
	}
	zerolog.TimeFieldFormat = "2006-01-02T15:04:05.000Z07:00"
	zerolog.DurationFieldUnit = 1e6 // milliseconds
	var w io.Writer = os.Stderr
	_, notTerminal := unix.IoctlGetTermios(int(os.Stderr.Fd()), unix.TCGETS)
	if c.Log.Format == "console" || c.Log.Format == "auto" && notTerminal == nil {
		w = zerolog.ConsoleWriter{Out: os.Stderr, TimeFormat: "15:04:05.000", NoColor: notTerminal != nil}
	}
	return zerolog.New(zerolog.SyncWriter(w)).Level(level).With().Timestamp().Logger()
}
