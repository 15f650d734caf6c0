// Command scoria-asd is an ALBA Storage Daemon: it serves one disk, a directory
// that should be a file system of its own, to the object stores of other hosts.
//
// SIGTERM and SIGINT stop it in order: requests under way are finished, nobody is
// told about them any more, exit status 0. Being killed loses nothing that it
// acknowledged.
package main

import (
	"fmt"
	"os"

	"github.com/spf13/cobra"
	"github.com/spf13/cobra/doc"

	"scoria/alba/asd/remote"
)

// version is set by the linker.
var version = "devel"

func main() {
	if err := command().Execute(); err != nil {
		fmt.Fprintln(os.Stderr, "scoria-asd:", err)
		os.Exit(1)
	}
}

func command() *cobra.Command {
	var f flags
	cmd := &cobra.Command{
		Use:   "scoria-asd --data-dir DIR",
		Short: "Serve one disk to Scoria's object store",
		Long: `scoria-asd is an ALBA Storage Daemon: it keeps fragments of objects on one disk
and serves them over TCP. Run one per disk, on a file system that holds nothing
else. The first start on an empty directory makes a new ASD with an id of its own,
which the log and the file DIR/identity tell; with --id another ASD, or an empty
directory because the disk isn't mounted, is refused.

Connections are mutually authenticated with TLS when --tls-cert, --tls-key and
--tls-ca are given. Without them it listens on loopback only, unless
--allow-plaintext says '` + remote.PlaintextWords + `'.

SIGTERM stops it in order. What was acknowledged survives SIGKILL and loss of
power. When a sync of the disk fails no write is taken until the next start.`,
		Example: `  scoria-asd --data-dir /srv/disk1
  scoria-asd --data-dir /srv/disk1 --listen 10.0.0.5:9711 \
      --tls-cert asd.pem --tls-key asd.key --tls-ca ca.pem --metrics-listen 127.0.0.1:9712
  scoria-asd verify --data-dir /srv/disk1 --rate 100M`,
		Version: version, Args: cobra.NoArgs, SilenceUsage: true, SilenceErrors: true,
		RunE: func(*cobra.Command, []string) error { return run(&f) },
	}
	f.disk(cmd)
	f.serve(cmd)
	cmd.AddCommand(verifyCommand(), salvageCommand(), docsCommand())
	cmd.CompletionOptions.DisableDefaultCmd = true
	return cmd
}

// docsCommand writes the manual pages at build time.
func docsCommand() *cobra.Command {
	return &cobra.Command{
		Use: "docs DIRECTORY", Short: "Write the manual pages", Hidden: true, Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := os.MkdirAll(args[0], 0o755); err != nil {
				return err
			}
			root := cmd.Root()
			root.DisableAutoGenTag = true
			return doc.GenManTree(root, &doc.GenManHeader{Title: "SCORIA-ASD", Section: "8", Source: "Scoria " + version, Manual: "Scoria"}, args[0])
		},
	}
}
