package main

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strings"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"scoria/driver/control"
)

func (a *app) volumeCommand() *cobra.Command {
	cmd := group("volume", "Create, clone, list, resize, check, move and delete volumes",
		a.volumeCreate(), a.volumeList(), a.volumeShow(), a.volumeStats(), a.volumeResize(), a.volumeDelete(), a.volumeCheck(),
		a.volumeClone(), a.volumeTemplate(), a.volumeFlatten(), a.volumeImport(), a.volumeExport(), a.volumeReceive(), a.volumeSet(), a.volumeRename(), a.volumeLimit())
	cmd.Aliases = []string{"vol"}
	return cmd
}

func (a *app) volumeCreate() *cobra.Command {
	var req control.CreateVolume
	var bytes, sco size
	cmd := &cobra.Command{
		Use:   "create [POOL/]VOLUME --size SIZE",
		Short: "Create a volume",
		Long: `Create a volume. It is served at once on RUN/vhost/POOL/VOLUME.sock and needs no
space until it is written to.`,
		Example: "  scoria volume create vm1 --size 10G\n  scoria volume create fast/db --size 1T --block-size 4096 --serial DB0001",
		Args:    args("[POOL/]VOLUME"),
		RunE: func(cmd *cobra.Command, got []string) error {
			name, err := fullName(got[0])
			if err != nil {
				return err
			}
			req.Name, req.Size, req.SCOSize = name, uint64(bytes), int64(sco)
			v, err := a.client().CreateVolume(cmd.Context(), req)
			if err != nil {
				return err
			}
			return a.print(v, func(w *tabwriter.Writer) { showVolume(w, &v) })
		},
	}
	f := cmd.Flags()
	f.Var(&bytes, "size", "size, a multiple of 4K up to 64T (required)")
	f.Uint32Var(&req.BlockSize, "block-size", 0, "logical block in bytes, 512 or 4096 (default: the pool's)")
	f.Var(&sco, "sco-size", "size of the objects that the volume is stored in, 1M to 1G (default: the pool's)")
	f.StringVar(&req.Serial, "serial", "", "serial number that the guest sees, at most 20 characters (default: made up)")
	f.BoolVar(&req.ReadOnly, "read-only", false, "refuse all writes")
	f.SortFlags = false
	cmd.PreRunE = func(cmd *cobra.Command, _ []string) error {
		if !cmd.Flags().Changed("size") {
			return usagef("--size is missing: say how large the volume is to be, such as --size 10G")
		}
		return nil
	}
	return cmd
}

func (a *app) volumeList() *cobra.Command {
	var pool string
	cmd := &cobra.Command{
		Use: "list", Aliases: []string{"ls"}, Short: "List volumes", Args: args(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			volumes, err := a.client().Volumes(cmd.Context(), pool)
			if err != nil {
				return err
			}
			return a.print(volumes, func(w *tabwriter.Writer) {
				row(w, "NAME", "SIZE", "STATE", "USED BY", "CONDITIONS")
				for i := range volumes {
					v := &volumes[i]
					codes := ""
					for j, c := range v.Conditions {
						if j > 0 {
							codes += ","
						}
						codes += c.Code
					}
					row(w, v.Name, formatSize(v.Size), state(v), v.UsedBy, codes)
				}
			})
		},
	}
	cmd.Flags().StringVar(&pool, "pool", "", "only this pool's")
	must(cmd.RegisterFlagCompletionFunc("pool", a.completePools))
	return cmd
}

// state adds whether the daemon has a ready volume in memory.
func state(v *control.Volume) string {
	switch {
	case v.Incomplete != nil:
		return "incomplete"
	case v.State == "ready" && v.Open:
		return "open"
	}
	return v.State
}

func (a *app) volumeShow() *cobra.Command {
	return &cobra.Command{
		Use: "show [POOL/]VOLUME", Short: "Show a volume, and whatever slows or degrades it now",
		Args: args("[POOL/]VOLUME"), ValidArgsFunction: a.completeVolumes,
		RunE: func(cmd *cobra.Command, got []string) error {
			name, err := fullName(got[0])
			if err != nil {
				return err
			}
			v, err := a.client().Volume(cmd.Context(), name)
			if err != nil {
				return err
			}
			if v.Space == nil && v.State == "ready" && v.Incomplete == nil {
				// The daemon opens it for that; why it can't is among the conditions.
				if st, err := a.client().Stats(cmd.Context(), name); err == nil {
					v.Space = &st.Space
				}
			}
			return a.print(v, func(w *tabwriter.Writer) { showVolume(w, &v) })
		},
	}
}

func showVolume(w *tabwriter.Writer, v *control.Volume) {
	row(w, "name", v.Name)
	row(w, "size", fmt.Sprintf("%s (%d bytes)", formatSize(v.Size), v.Size))
	row(w, "state", state(v))
	row(w, "used by", v.UsedBy)
	row(w, "read-only", yesNo(v.ReadOnly))
	row(w, "block size", v.BlockSize)
	row(w, "SCO size", formatSize(uint64(v.SCOSize)))
	row(w, "serial", v.Serial)
	row(w, "id", v.ID)
	row(w, "owner", fmt.Sprintf("%s (epoch %d)", cmp.Or(v.Owner, "nobody"), v.Epoch))
	row(w, "created", printTime(v.Created))
	row(w, "vhost socket", v.Socket)
	row(w, "nbd", v.NBD)
	showFamily(w, v)
	if v.LastDisconnect != "" {
		row(w, "disconnected", fmt.Sprintf("%s, for: %s", printTime(v.LastDisconnectTime), v.LastDisconnect))
	}
	printConditions(w, v.Conditions)
}

// showFamily shows what a volume has to do with others, and its space.
func showFamily(w *tabwriter.Writer, v *control.Volume) {
	row(w, "template", yesNo(v.Template))
	row(w, "snapshots", v.Snapshots)
	row(w, "parent", v.Parent)
	row(w, "clones", strings.Join(v.Clones, " "))
	if i := v.Incomplete; i != nil {
		row(w, "incomplete", fmt.Sprintf("%s, at byte %d", i.Kind, i.Position))
	}
	if s := v.Space; s != nil {
		row(w, "space", fmt.Sprintf("%s live, %s snapshots, %s garbage, %s overhead",
			formatSize(s.Live), formatSize(s.Snapshots), formatSize(s.Garbage), formatSize(s.Overhead)))
		if s.Inherited > 0 {
			row(w, "inherited", formatSize(s.Inherited)+" of the live space, from its ancestors")
		}
	}
}

func (a *app) volumeStats() *cobra.Command {
	return &cobra.Command{
		Use: "stats [POOL/]VOLUME", Short: "Show a volume's counters and space",
		Long: "Show what a volume occupies now, and what it has done since the daemon started.",
		Args: args("[POOL/]VOLUME"), ValidArgsFunction: a.completeVolumes,
		RunE: func(cmd *cobra.Command, got []string) error {
			name, err := fullName(got[0])
			if err != nil {
				return err
			}
			st, err := a.client().Stats(cmd.Context(), name)
			if err != nil {
				return err
			}
			return a.print(st, func(w *tabwriter.Writer) { showStats(w, &st) })
		},
	}
}

func showStats(w *tabwriter.Writer, st *control.VolumeStats) {
	row(w, "OPERATION", "COUNT", "BYTES", "ERRORS")
	for _, op := range slices.Sorted(maps.Keys(st.Ops)) {
		o := st.Ops[op]
		row(w, op, o.Count, formatSize(o.Bytes), o.Errors)
	}
	fmt.Fprintln(w)
	row(w, "SPACE", "BYTES")
	row(w, "live", formatSize(st.Space.Live))
	row(w, "snapshots", formatSize(st.Space.Snapshots))
	row(w, "garbage", formatSize(st.Space.Garbage))
	row(w, "overhead", formatSize(st.Space.Overhead))
	row(w, "inherited", formatSize(st.Space.Inherited))
	row(w, "on local disk", formatSize(st.Space.Local))
	row(w, "in store", formatSize(st.Space.Store))
	fmt.Fprintln(w)
	row(w, "COUNTER", "VALUE")
	for _, name := range slices.Sorted(maps.Keys(st.Counters)) {
		row(w, name, st.Counters[name])
	}
	fmt.Fprintln(w)
	printConditions(w, st.Conditions)
}

func (a *app) volumeResize() *cobra.Command {
	var force bool
	cmd := &cobra.Command{
		Use: "resize [POOL/]VOLUME SIZE", Short: "Change a volume's size, also under a running guest",
		Long: `Grow a volume to SIZE (or by it, as in +10G). A running guest sees the new size at
once. Making a volume smaller loses what lies behind the new end, for which the command
needs --force; without, it says what would be lost and exits with status 6. Snapshots
keep their size and contents.`,
		Example: "  scoria volume resize vm1 20G\n  scoria volume resize vm1 +10G",
		Args:    args("[POOL/]VOLUME", "SIZE"), ValidArgsFunction: a.completeVolumes,
		RunE: func(cmd *cobra.Command, got []string) error {
			name, err := fullName(got[0])
			if err != nil {
				return err
			}
			text, by := got[1], uint64(0)
			if text != "" && text[0] == '+' {
				v, err := a.client().Volume(cmd.Context(), name)
				if err != nil {
					return err
				}
				text, by = text[1:], v.Size
			}
			n, err := parseSize(text)
			if err != nil {
				return usageError{err}
			}
			v, err := a.client().ResizeVolume(cmd.Context(), name, by+n, force)
			if err != nil {
				return err
			}
			return a.print(v, func(w *tabwriter.Writer) { showVolume(w, &v) })
		},
	}
	cmd.Flags().BoolVar(&force, "force", false, "make it smaller and lose what lies behind the new end")
	return cmd
}

func (a *app) volumeRename() *cobra.Command {
	return &cobra.Command{
		Use: "rename [POOL/]VOLUME NEWNAME", Short: "Give a volume another name",
		Long: `Give a volume another name in its pool. Snapshots, clones, schedules and limits stay
with it. As the paths of its sockets change, a volume that a guest or tool uses is
refused, and so is one with open clones.`,
		Example: "  scoria volume rename vm1 web1\n  scoria volume rename fast/db olddb",
		Args:    args("[POOL/]VOLUME", "NEWNAME"), ValidArgsFunction: a.completeVolumes,
		RunE: func(cmd *cobra.Command, got []string) error {
			name, err := fullName(got[0])
			if err != nil {
				return err
			}
			v, err := a.client().RenameVolume(cmd.Context(), name, control.RenameVolume{Name: got[1]})
			if err != nil {
				return err
			}
			return a.print(v, func(w *tabwriter.Writer) { showVolume(w, &v) })
		},
	}
}

func (a *app) volumeDelete() *cobra.Command {
	var force bool
	cmd := &cobra.Command{
		Use: "delete [POOL/]VOLUME", Aliases: []string{"rm"}, Short: "Delete a volume and its data",
		Long: `Delete a volume and its data, for good. One that a guest or tool uses is refused, and
so is one that clones read from. One that has snapshots needs --force, which deletes
those with it.`,
		Args: args("[POOL/]VOLUME"), ValidArgsFunction: a.completeVolumes,
		RunE: func(cmd *cobra.Command, got []string) error {
			j, err := a.runJob(cmd.Context(), got[0], func(c *control.Client, name string) (control.Job, error) {
				return c.StartDelete(cmd.Context(), name, force)
			})
			if err != nil {
				return err
			}
			return a.print(j, func(w *tabwriter.Writer) { row(w, "deleted", j.Volume) })
		},
	}
	cmd.Flags().BoolVar(&force, "force", false, "delete its snapshots with it")
	return cmd
}

func (a *app) volumeCheck() *cobra.Command {
	return &cobra.Command{
		Use: "check [POOL/]VOLUME", Short: "Verify a volume's map, checksums and space accounting",
		Long: `Read everything that belongs to a volume and verify its map against the stored
objects, all checksums and the space accounting. The volume may be in use. The
exit status is 5 if problems were found. Interrupting the command stops the check.`,
		Args: args("[POOL/]VOLUME"), ValidArgsFunction: a.completeVolumes,
		RunE: func(cmd *cobra.Command, got []string) error {
			j, err := a.runJob(cmd.Context(), got[0], func(c *control.Client, name string) (control.Job, error) {
				return c.StartCheck(cmd.Context(), name)
			})
			if err != nil {
				return err
			}
			if j.Report == nil {
				return fmt.Errorf("check of %s ended without a report", j.Volume)
			}
			if err := a.print(j.Report, func(w *tabwriter.Writer) { showReport(w, j.Report) }); err != nil {
				return err
			}
			if n := len(j.Report.Problems); n > 0 {
				return fmt.Errorf("volume %s: %w (%d)", j.Volume, errProblems, n)
			}
			return nil
		},
	}
}

func showReport(w *tabwriter.Writer, r *control.CheckReport) {
	row(w, "objects", r.SCOs)
	row(w, "clusters", r.Clusters)
	row(w, "bytes", formatSize(r.Bytes))
	for _, p := range r.Problems {
		row(w, "problem", p)
	}
	if len(r.Problems) == 0 {
		row(w, "problems", "none")
	}
}
