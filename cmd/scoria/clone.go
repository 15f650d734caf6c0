package main

import (
	"fmt"
	"strings"
	"text/tabwriter"

	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"

	"scoria/driver/control"
)

// parallelClones bounds the requests under way of one call.
const parallelClones = 8

func (a *app) volumeClone() *cobra.Command {
	var req control.CloneVolume
	var bytes, sco size
	cmd := &cobra.Command{
		Use:   "clone [POOL/]VOLUME@SNAPSHOT [POOL/]NAME…",
		Short: "Make volumes that begin as a snapshot",
		Long: `Make volumes that begin as a snapshot. That takes no longer for a large one, and
clones need no space until they are written to; clones of clones are read as fast as
any volume. The snapshot and its volume can't be deleted while a clone reads them;
"scoria volume flatten" makes a clone independent. Of a template the volume's name is
enough.`,
		Example: "  scoria volume clone debian@v12 vm1 vm2 vm3\n  scoria volume clone golden fast/vm4 --size 40G",
		Args: func(cmd *cobra.Command, got []string) error {
			if len(got) < 2 {
				return usagef("%q takes [POOL/]VOLUME@SNAPSHOT and at least one name; got %d arguments (see %s --help)", cmd.CommandPath(), len(got), cmd.CommandPath())
			}
			return nil
		},
		ValidArgsFunction: a.completeSnapshots,
		RunE: func(cmd *cobra.Command, got []string) error {
			if req.Serial != "" && len(got) > 2 {
				return usagef("--serial: is for one clone, %d are asked for", len(got)-1)
			}
			volume, snapshot, found := strings.Cut(got[0], "@")
			from, err := fullName(volume)
			if err != nil {
				return err
			}
			if found {
				from += "@" + snapshot
			}
			req.From, req.Size, req.SCOSize = from, uint64(bytes), int64(sco)
			return a.clone(cmd, req, got[1:])
		},
	}
	f := cmd.Flags()
	f.Var(&bytes, "size", "size, at least the snapshot's (default: the snapshot's)")
	f.Var(&sco, "sco-size", "size of the objects that the clone is stored in, 1M to 1G (default: the parent's)")
	f.StringVar(&req.Serial, "serial", "", "serial number that the guest sees, at most 20 characters (default: made up)")
	f.SortFlags = false
	return cmd
}

// clone makes the clones side by side and prints those that were made, also if
// others failed.
func (a *app) clone(cmd *cobra.Command, req control.CloneVolume, names []string) error {
	c := a.client()
	var g errgroup.Group
	g.SetLimit(parallelClones)
	made := make([]*control.Volume, len(names))
	for i, name := range names {
		full, err := fullName(name)
		if err != nil {
			return err
		}
		g.Go(func() error {
			one := req
			one.Name = full
			v, err := c.CloneVolume(cmd.Context(), one)
			if err == nil {
				made[i] = &v
			}
			return err
		})
	}
	failed := g.Wait()
	list := []control.Volume{}
	for _, v := range made {
		if v != nil {
			list = append(list, *v)
		}
	}
	if len(names) == 1 && len(list) == 1 {
		return a.print(list[0], func(w *tabwriter.Writer) { showVolume(w, &list[0]) })
	}
	if len(list) > 0 {
		if err := a.print(list, func(w *tabwriter.Writer) {
			row(w, "NAME", "SIZE", "PARENT", "SOCKET")
			for i := range list {
				row(w, list[i].Name, formatSize(list[i].Size), list[i].Parent, list[i].Socket)
			}
		}); err != nil {
			return err
		}
	}
	return failed
}

func (a *app) volumeTemplate() *cobra.Command {
	var undo bool
	cmd := &cobra.Command{
		Use:   "template [POOL/]VOLUME",
		Short: "Make a volume a template: it refuses writes and is there to be cloned",
		Long: `Make a volume that nobody uses a template: it refuses writes, and
"scoria volume clone VOLUME NAME" makes volumes of it. A snapshot of it is made for
that. Clones share what they read in memory and on disk.`,
		Args: args("[POOL/]VOLUME"), ValidArgsFunction: a.completeVolumes,
		RunE: func(cmd *cobra.Command, got []string) error {
			name, err := fullName(got[0])
			if err != nil {
				return err
			}
			v, err := a.client().SetTemplate(cmd.Context(), name, !undo)
			if err != nil {
				return err
			}
			return a.print(v, func(w *tabwriter.Writer) { showVolume(w, &v) })
		},
	}
	cmd.Flags().BoolVar(&undo, "undo", false, "make it an ordinary volume again; its snapshots and clones stay")
	return cmd
}

func (a *app) volumeFlatten() *cobra.Command {
	return &cobra.Command{
		Use:   "flatten [POOL/]VOLUME",
		Short: "Make a clone independent of its parent",
		Long: `Copy what a clone shares with its ancestors into the clone itself, in the background
of a running guest's I/O. Then the parent and its snapshot can be deleted, unless
snapshots of the clone that are older than this still read from them. Interrupting the
command stops the copying; it can be begun again.`,
		Args: args("[POOL/]VOLUME"), ValidArgsFunction: a.completeVolumes,
		RunE: func(cmd *cobra.Command, got []string) error {
			j, err := a.runJob(cmd.Context(), got[0], func(c *control.Client, name string) (control.Job, error) {
				return c.StartFlatten(cmd.Context(), name)
			})
			if err != nil {
				return err
			}
			return a.print(j, func(w *tabwriter.Writer) {
				row(w, "flattened", fmt.Sprintf("%s, %s copied", j.Volume, formatSize(uint64(max(j.Total, 0)))))
			})
		},
	}
}
