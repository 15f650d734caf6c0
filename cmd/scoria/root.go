package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/docker/go-units"
	"github.com/rs/zerolog"
	"github.com/spf13/cobra"

	"scoria/driver/control"
	"scoria/driver/host"
)

const defaultSocket = "/run/scoria/control.sock"

// app is one call of the command line.
type app struct {
	out, errOut io.Writer
	socket      string
	output      string // table or json
	quiet       bool

	rebuild func(context.Context, host.Config, host.RebuildRequest, zerolog.Logger) (host.RebuildReport, error) // host.RebuildRegistry
}

func (a *app) client() *control.Client { return control.NewClient(a.socket) }

func (a *app) command() *cobra.Command {
	root := &cobra.Command{
		Use:   "scoria",
		Short: "Manage Scoria volumes on this host",
		Long: `scoria manages the volumes that the daemon scoriad serves to virtual machines.

Volumes are named POOL/VOLUME; VOLUME alone means default/VOLUME; VOLUME@SNAPSHOT is a
snapshot. Names have 1 to 63 of a-z, 0-9, '.', '_' and '-', and begin with a letter or digit. Sizes are in
bytes or take K, M, G and T, which are powers of 1024.

Exit status: 0 success, 1 failure, 2 wrong usage or value, 3 not found, 4 in use,
5 a check found problems, 6 something would be lost, which --force allows.`,
		Version: version, SilenceUsage: true, SilenceErrors: true,
		Args: cobra.ArbitraryArgs, RunE: groupRun,
		PersistentPreRunE: func(*cobra.Command, []string) error {
			if a.output != "table" && a.output != "json" {
				return usagef("--output %q: must be table or json", a.output)
			}
			return nil
		},
	}
	root.SetOut(a.out)
	root.SetErr(a.errOut)
	root.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return usageError{err} })
	root.PersistentFlags().StringVar(&a.socket, "socket", defaultSocket, "the daemon's control socket")
	root.PersistentFlags().StringVarP(&a.output, "output", "o", "table", "output format: table or json")
	root.PersistentFlags().BoolVarP(&a.quiet, "quiet", "q", false, "show no progress")
	must(root.RegisterFlagCompletionFunc("output", cobra.FixedCompletions([]string{"table", "json"}, cobra.ShellCompDirectiveNoFileComp)))
	root.AddCommand(a.volumeCommand(), a.snapshotCommand(), a.scheduleCommand(), a.poolCommand(), a.presetCommand(), a.asdCommand(), a.backendCommand(), a.jobCommand(), a.statusCommand(), a.benchCommand(), a.docsCommand())
	return root
}

// must panics on an error that only a mistake in this program can cause.
func must(err error) {
	if err != nil {
		panic(err)
	}
}

func usagef(format string, args ...any) error { return usageError{fmt.Errorf(format, args...)} }

// args says what the arguments of a command are and refuses another number.
func args(names ...string) cobra.PositionalArgs {
	return func(cmd *cobra.Command, got []string) error {
		if len(got) != len(names) {
			return usagef("%q takes %s; got %d arguments (see %s --help)", cmd.CommandPath(), describe(names), len(got), cmd.CommandPath())
		}
		return nil
	}
}

func describe(names []string) string {
	if len(names) == 0 {
		return "no argument"
	}
	return strings.Join(names, " ")
}

// group is a command that only has subcommands.
func group(use, short string, subs ...*cobra.Command) *cobra.Command {
	cmd := &cobra.Command{Use: use, Short: short, RunE: groupRun}
	cmd.AddCommand(subs...)
	return cmd
}

func groupRun(cmd *cobra.Command, got []string) error {
	if len(got) > 0 {
		return usagef("unknown command %q for %q (see %s --help)", got[0], cmd.CommandPath(), cmd.CommandPath())
	}
	return cmd.Help()
}

// size is a flag or argument in bytes with a unit.
type size uint64

func (s *size) String() string { return formatSize(uint64(*s)) }

func (s *size) Set(text string) error {
	n, err := parseSize(text)
	*s = size(n)
	return err
}

func (s *size) Type() string { return "size" }

func parseSize(text string) (uint64, error) {
	const tooLarge = 1 << 62 // where the parser's arithmetic ends
	n, err := units.RAMInBytes(text)
	if err != nil || n < 0 || n >= tooLarge {
		return 0, fmt.Errorf("size %q: must be a number of bytes, or one with K, M, G or T (powers of 1024), such as 512M or 10G", text)
	}
	return uint64(n), nil
}

// formatSize writes bytes with the largest unit in which the number is at least
// 1, exactly where it can.
func formatSize(n uint64) string {
	return strings.Replace(units.CustomSize("%.4g %s", float64(n), 1024, []string{"B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"}), " B", " B", 1)
}

// completeVolumes completes the first argument with the names of volumes.
func (a *app) completeVolumes(cmd *cobra.Command, got []string, _ string) ([]string, cobra.ShellCompDirective) {
	if len(got) > 0 {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	volumes, err := a.client().Volumes(cmd.Context(), "")
	if err != nil {
		return nil, cobra.ShellCompDirectiveError
	}
	names := make([]string, len(volumes))
	for i := range volumes {
		names[i] = strings.TrimPrefix(volumes[i].Name, "default/")
	}
	return names, cobra.ShellCompDirectiveNoFileComp
}

func (a *app) completePools(cmd *cobra.Command, got []string, _ string) ([]string, cobra.ShellCompDirective) {
	if len(got) > 0 {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	pools, err := a.client().Pools(cmd.Context())
	if err != nil {
		return nil, cobra.ShellCompDirectiveError
	}
	names := make([]string, len(pools))
	for i := range pools {
		names[i] = pools[i].Name
	}
	return names, cobra.ShellCompDirectiveNoFileComp
}

// fullName adds the default pool. The daemon says what is wrong with a name.
func fullName(name string) (string, error) {
	switch strings.Count(name, "/") {
	case 0:
		return "default/" + name, nil
	case 1:
		return name, nil
	}
	return "", usageError{errors.New("volume " + name + ": must be VOLUME or POOL/VOLUME")}
}
