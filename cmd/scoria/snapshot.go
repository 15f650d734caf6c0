package main

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"slices"
	"strings"
	"syscall"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"scoria/driver/control"
)

func (a *app) snapshotCommand() *cobra.Command {
	cmd := group("snapshot", "Create, list, delete and go back to snapshots",
		a.snapshotCreate(), a.snapshotList(), a.snapshotShow(), a.snapshotRename(), a.snapshotDelete(), a.snapshotRollback())
	cmd.Aliases = []string{"snap"}
	return cmd
}

// splitSnapshot splits [POOL/]VOLUME@SNAPSHOT. The daemon says what is wrong with
// a name.
func splitSnapshot(text string) (volume, snapshot string, err error) {
	volume, snapshot, found := strings.Cut(text, "@")
	if !found || snapshot == "" || strings.Contains(snapshot, "@") {
		return "", "", usagef("snapshot %q: must be VOLUME@SNAPSHOT or POOL/VOLUME@SNAPSHOT", text)
	}
	volume, err = fullName(volume)
	return volume, snapshot, err
}

// completeSnapshots completes the first argument with the names of volumes, and
// behind an @ with those of a volume's snapshots.
func (a *app) completeSnapshots(cmd *cobra.Command, got []string, typed string) ([]string, cobra.ShellCompDirective) {
	volume, _, found := strings.Cut(typed, "@")
	if len(got) > 0 || !found {
		names, directive := a.completeVolumes(cmd, got, typed)
		for i := range names {
			names[i] += "@"
		}
		return names, directive | cobra.ShellCompDirectiveNoSpace
	}
	full, err := fullName(volume)
	if err != nil {
		return nil, cobra.ShellCompDirectiveError
	}
	list, err := a.client().Snapshots(cmd.Context(), full)
	if err != nil {
		return nil, cobra.ShellCompDirectiveError
	}
	var names []string
	for _, s := range list {
		names = append(names, volume+"@"+s.Name)
	}
	return names, cobra.ShellCompDirectiveNoFileComp
}

func (a *app) snapshotCreate() *cobra.Command {
	var meta map[string]string
	q := quiesce{}
	cmd := &cobra.Command{
		Use:   "create [POOL/]VOLUME@SNAPSHOT",
		Short: "Keep the state that a volume has now",
		Long: `Keep the state that a volume has now, with every write that has completed. It takes
no longer for a large volume or a busy one; a running guest is not stopped.

A guest's file systems are then as after a loss of power, which they recover from.
For more, --quiesce names a command that brings the guest to rest. The shell runs it
twice: with the argument freeze before the snapshot, and with the argument thaw after
it, in any case, also if freezing failed or the snapshot did. The environment has
SCORIA_VOLUME, SCORIA_SNAPSHOT and SCORIA_PHASE (freeze or thaw). If freezing fails or
takes longer than --quiesce-timeout, there is no snapshot.`,
		Example: "  scoria snapshot create vm1@before-upgrade --meta reason=upgrade\n  scoria snapshot create db@nightly --quiesce /usr/local/sbin/db-quiesce",
		Args:    args("[POOL/]VOLUME@SNAPSHOT"), ValidArgsFunction: a.completeSnapshots,
		RunE: func(cmd *cobra.Command, got []string) error {
			volume, name, err := splitSnapshot(got[0])
			if err != nil {
				return err
			}
			if q.timeout <= 0 {
				return usagef("--quiesce-timeout %v: must be positive", q.timeout)
			}
			var s control.Snapshot
			q.volume, q.snapshot, q.app = volume, name, a
			if err := q.around(cmd.Context(), func(ctx context.Context) (err error) {
				s, err = a.client().CreateSnapshot(ctx, volume, control.CreateSnapshot{Name: name, Metadata: meta})
				return err
			}); err != nil {
				return err
			}
			return a.print(s, func(w *tabwriter.Writer) { showSnapshot(w, &s) })
		},
	}
	f := cmd.Flags()
	f.StringToStringVar(&meta, "meta", nil, "something to remember with it, KEY=VALUE; may be repeated")
	f.StringVar(&q.command, "quiesce", "", "shell command that brings the guest to rest")
	f.DurationVar(&q.timeout, "quiesce-timeout", 30*time.Second, "how long each of its two runs may take")
	f.SortFlags = false
	return cmd
}

// quiesce runs a command around something that needs a guest at rest.
type quiesce struct {
	app              *app
	command          string
	timeout          time.Duration
	volume, snapshot string
}

// around freezes, calls fn, and thaws, which nothing prevents but the death of
// this process.
func (q *quiesce) around(ctx context.Context, fn func(context.Context) error) (err error) {
	if q.command == "" {
		return fn(ctx)
	}
	defer func() { err = errors.Join(err, q.run(context.WithoutCancel(ctx), "thaw")) }()
	if err := q.run(ctx, "freeze"); err != nil {
		return err
	}
	return fn(ctx)
}

// run runs the command in a process group of its own, so that an interrupt from the
// terminal does not reach it, and its children end with it.
func (q *quiesce) run(ctx context.Context, phase string) error {
	ctx, cancel := context.WithTimeout(ctx, q.timeout)
	defer cancel()
	cmd := exec.CommandContext(ctx, "/bin/sh", "-c", q.command+` "$@"`, "sh", phase)
	cmd.Env = append(os.Environ(), "SCORIA_VOLUME="+q.volume, "SCORIA_SNAPSHOT="+q.snapshot, "SCORIA_PHASE="+phase)
	cmd.Stdout, cmd.Stderr = q.app.errOut, q.app.errOut
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	cmd.WaitDelay = time.Second
	err := cmd.Run()
	if errors.Is(ctx.Err(), context.DeadlineExceeded) {
		err = fmt.Errorf("took longer than %v", q.timeout)
	}
	if err != nil {
		return fmt.Errorf("--quiesce: %s: %w", phase, err)
	}
	return nil
}

func (a *app) snapshotList() *cobra.Command {
	return &cobra.Command{
		Use: "list [POOL/]VOLUME", Aliases: []string{"ls"}, Short: "List a volume's snapshots, oldest first",
		Long: `List a volume's snapshots, oldest first. ALONE is what a snapshot holds that neither
the volume nor another snapshot has: what its deletion gives back. What several share
shows when all but one of them are gone.`,
		Args: args("[POOL/]VOLUME"), ValidArgsFunction: a.completeVolumes,
		RunE: func(cmd *cobra.Command, got []string) error {
			name, err := fullName(got[0])
			if err != nil {
				return err
			}
			list, err := a.client().Snapshots(cmd.Context(), name)
			if err != nil {
				return err
			}
			return a.print(list, func(w *tabwriter.Writer) {
				row(w, "NAME", "CREATED", "SIZE", "ALONE", "STATE", "CLONES", "METADATA")
				for i := range list {
					s := &list[i]
					row(w, s.Name, printTime(s.Created), formatSize(s.Size), alone(s), stateOf(s), strings.Join(s.Clones, ","), metadata(s))
				}
			})
		},
	}
}

func stateOf(s *control.Snapshot) string {
	if s.Adopted {
		return s.State + ",adopted"
	}
	return s.State
}

func alone(s *control.Snapshot) string {
	if s.Alone == nil {
		return ""
	}
	return formatSize(*s.Alone)
}

func metadata(s *control.Snapshot) string {
	var list []string
	for _, k := range slices.Sorted(maps.Keys(s.Metadata)) {
		list = append(list, k+"="+s.Metadata[k])
	}
	return strings.Join(list, " ")
}

func showSnapshot(w *tabwriter.Writer, s *control.Snapshot) {
	row(w, "name", s.Volume+"@"+s.Name)
	row(w, "created", printTime(s.Created))
	row(w, "size", fmt.Sprintf("%s (%d bytes)", formatSize(s.Size), s.Size))
	row(w, "state", stateOf(s))
	row(w, "alone", alone(s))
	row(w, "clones", strings.Join(s.Clones, " "))
	row(w, "id", s.ID)
	row(w, "nbd", s.NBD)
	for _, k := range slices.Sorted(maps.Keys(s.Metadata)) {
		row(w, "meta", k+"="+s.Metadata[k])
	}
}

func (a *app) snapshotShow() *cobra.Command {
	return &cobra.Command{
		Use: "show [POOL/]VOLUME@SNAPSHOT", Short: "Show a snapshot, the space that it holds alone, and its clones",
		Args: args("[POOL/]VOLUME@SNAPSHOT"), ValidArgsFunction: a.completeSnapshots,
		RunE: func(cmd *cobra.Command, got []string) error {
			volume, name, err := splitSnapshot(got[0])
			if err != nil {
				return err
			}
			s, err := a.client().Snapshot(cmd.Context(), volume, name)
			if err != nil {
				return err
			}
			return a.print(s, func(w *tabwriter.Writer) { showSnapshot(w, &s) })
		},
	}
}

func (a *app) snapshotRename() *cobra.Command {
	return &cobra.Command{
		Use: "rename [POOL/]VOLUME@SNAPSHOT NEWNAME", Short: "Give a snapshot another name",
		Args: args("[POOL/]VOLUME@SNAPSHOT", "NEWNAME"), ValidArgsFunction: a.completeSnapshots,
		RunE: func(cmd *cobra.Command, got []string) error {
			volume, name, err := splitSnapshot(got[0])
			if err != nil {
				return err
			}
			s, err := a.client().RenameSnapshot(cmd.Context(), volume, name, got[1])
			if err != nil {
				return err
			}
			return a.print(s, func(w *tabwriter.Writer) { showSnapshot(w, &s) })
		},
	}
}

func (a *app) snapshotDelete() *cobra.Command {
	return &cobra.Command{
		Use: "delete [POOL/]VOLUME@SNAPSHOT", Aliases: []string{"rm"}, Short: "Delete a snapshot",
		Long: `Delete a snapshot. The volume, the other snapshots and their contents stay as they
are. One that is read or has clones is refused. The space comes back in the background.`,
		Args: args("[POOL/]VOLUME@SNAPSHOT"), ValidArgsFunction: a.completeSnapshots,
		RunE: func(cmd *cobra.Command, got []string) error {
			volume, name, err := splitSnapshot(got[0])
			if err != nil {
				return err
			}
			if err := a.client().DeleteSnapshot(cmd.Context(), volume, name); err != nil {
				return err
			}
			return a.print(map[string]string{"deleted": volume + "@" + name}, func(w *tabwriter.Writer) { row(w, "deleted", volume+"@"+name) })
		},
	}
}

func (a *app) snapshotRollback() *cobra.Command {
	var force bool
	cmd := &cobra.Command{
		Use: "rollback [POOL/]VOLUME@SNAPSHOT", Short: "Make a volume what it was at a snapshot",
		Long: `Make a volume what it was at a snapshot, size included. What was written since is
lost. The volume must not be in use. If there are later snapshots, they would go too:
the command names them and exits with status 6, unless --force says that this is meant.
It takes no longer for a large volume.`,
		Args: args("[POOL/]VOLUME@SNAPSHOT"), ValidArgsFunction: a.completeSnapshots,
		RunE: func(cmd *cobra.Command, got []string) error {
			volume, name, err := splitSnapshot(got[0])
			if err != nil {
				return err
			}
			v, err := a.client().Rollback(cmd.Context(), volume, name, force)
			if err != nil {
				return err
			}
			return a.print(v, func(w *tabwriter.Writer) { showVolume(w, &v) })
		},
	}
	cmd.Flags().BoolVar(&force, "force", false, "drop later snapshots")
	return cmd
}
