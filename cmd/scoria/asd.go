package main

import (
	"context"
	"fmt"
	"path/filepath"
	"strings"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"scoria/driver/control"
)

func (a *app) asdCommand() *cobra.Command {
	return group("asd", "Manage the storage daemons (disks) of the object store",
		a.asdAdd(), a.asdList(), a.asdShow(), a.asdDrain(), a.asdRemove())
}

func (a *app) asdAdd() *cobra.Command {
	var req control.AddASD
	cmd := &cobra.Command{
		Use: "add DIRECTORY|HOST:PORT", Short: "Add a storage daemon to the object store", Args: args("DIRECTORY|HOST:PORT"),
		Long: `Add a storage daemon. A DIRECTORY, which is made if need be and must be empty or
a storage daemon's that was there before, is served by scoriad itself: give it a
file system of its own, one per disk. HOST:PORT is a scoria-asd. One that was
draining becomes active again, also one that was removed while objects still refer to
what it has. Later a removed one is refused; --wipe empties its directory and makes
another storage daemon there.`,
		Example: "  scoria asd add /srv/disk1\n  scoria asd add 10.0.0.5:9711 --host node5 --rack r2",
		RunE: func(cmd *cobra.Command, got []string) error {
			if req.Address = got[0]; !strings.Contains(got[0], ":") || strings.HasPrefix(got[0], "/") {
				dir, err := filepath.Abs(got[0])
				if err != nil {
					return err
				}
				req.Address = dir
			}
			d, err := a.client().AddASD(cmd.Context(), req)
			if err != nil {
				return err
			}
			return a.printASD(&d)
		},
	}
	cmd.Flags().BoolVar(&req.Wipe, "wipe", false, "empty the directory of a storage daemon that was removed")
	cmd.Flags().StringVar(&req.Host, "host", "", "host it is on (default: this one for a directory, else that of the address)")
	cmd.Flags().StringVar(&req.Rack, "rack", "", "rack it is in")
	cmd.Flags().StringVar(&req.Datacentre, "datacentre", "", "datacentre it is in")
	return cmd
}

func (a *app) asdList() *cobra.Command {
	return &cobra.Command{
		Use: "list", Aliases: []string{"ls"}, Short: "List storage daemons", Args: args(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			list, err := a.client().ASDs(cmd.Context())
			if err != nil {
				return err
			}
			return a.print(list, func(w *tabwriter.Writer) { asdTable(w, list) })
		},
	}
}

func asdTable(w *tabwriter.Writer, list []control.ASD) {
	row(w, "ID", "ADDRESS", "HOST", "STATE", "UP", "USED", "CAPACITY", "PARTS")
	for i := range list {
		d := &list[i]
		row(w, d.ID, d.Address, d.Host, d.State, upText(d), formatSize(uint64(d.Used)), formatSize(uint64(d.Capacity)), d.Shards)
	}
}

func upText(d *control.ASD) string {
	switch {
	case d.Up && d.Full:
		return "full"
	case d.State == "removed":
		return ""
	}
	return yesNo(d.Up)
}

func (a *app) asdShow() *cobra.Command {
	return &cobra.Command{
		Use: "show ID|ADDRESS", Short: "Show a storage daemon", Args: args("ID|ADDRESS"), ValidArgsFunction: a.completeASDs,
		RunE: func(cmd *cobra.Command, got []string) error {
			d, err := a.findASD(cmd.Context(), got[0])
			if err != nil {
				return err
			}
			return a.printASD(&d)
		},
	}
}

func (a *app) asdDrain() *cobra.Command {
	return &cobra.Command{
		Use: "drain ID|ADDRESS", Short: "Empty a storage daemon, so that it can be removed", Args: args("ID|ADDRESS"), ValidArgsFunction: a.completeASDs,
		Long: `Give a storage daemon nothing new, and move what it holds to others, in the
background. When "scoria asd show" says that it holds no parts it can be removed. To
use it again, add it again.`,
		RunE: func(cmd *cobra.Command, got []string) error {
			d, err := a.findASD(cmd.Context(), got[0])
			if err == nil {
				d, err = a.client().DrainASD(cmd.Context(), d.ID)
			}
			if err != nil {
				return err
			}
			return a.printASD(&d)
		},
	}
}

func (a *app) asdRemove() *cobra.Command {
	var force bool
	cmd := &cobra.Command{
		Use: "remove ID|ADDRESS", Aliases: []string{"rm"}, Short: "Give a storage daemon up, for good", Args: args("ID|ADDRESS"), ValidArgsFunction: a.completeASDs,
		Long: `Give a storage daemon up. It is listed as removed until no object refers to it any
more; its ID is never used again. One that still holds parts of objects, or is to hold those
of uploads under way, is only given up with --force, as when its disk is dead: the parts
are rebuilt from others, at once. "scoria backend status" says how safe the objects are.`,
		RunE: func(cmd *cobra.Command, got []string) error {
			d, err := a.findASD(cmd.Context(), got[0])
			if err == nil {
				d, err = a.client().RemoveASD(cmd.Context(), d.ID, force)
			}
			if err != nil {
				return err
			}
			return a.printASD(&d)
		},
	}
	cmd.Flags().BoolVar(&force, "force", false, "although it holds parts of objects")
	return cmd
}

// findASD finds a storage daemon by its ID, the begin of it, or its address.
func (a *app) findASD(ctx context.Context, name string) (control.ASD, error) {
	list, err := a.client().ASDs(ctx)
	if err != nil {
		return control.ASD{}, err
	}
	var found []control.ASD
	for i := range list {
		d := &list[i]
		if d.ID == name {
			return *d, nil
		}
		if d.Address == name && d.State != "removed" || len(name) >= 4 && strings.HasPrefix(d.ID, name) {
			found = append(found, *d)
		}
	}
	switch len(found) {
	case 1:
		return found[0], nil
	case 0:
		return control.ASD{}, control.Errorf(control.CodeNotFound, "no storage daemon %q: name its ID, the first 4 or more characters of it, or its address", name)
	}
	return control.ASD{}, usagef("storage daemon %q: %d have that: name the whole ID", name, len(found))
}

func (a *app) printASD(d *control.ASD) error {
	return a.print(d, func(w *tabwriter.Writer) {
		row(w, "id", d.ID)
		row(w, "address", d.Address)
		row(w, "host", d.Host)
		row(w, "rack", d.Rack)
		row(w, "datacentre", d.Datacentre)
		row(w, "state", d.State)
		row(w, "up", upText(d))
		if d.Reason != "" {
			row(w, "down since", printTime(d.DownSince))
			row(w, "because", d.Reason)
		}
		if d.Reopened > 0 {
			row(w, "opened anew", fmt.Sprintf("%d times, last after: %s", d.Reopened, d.LastFailure))
		}
		if d.Damaged != "" {
			row(w, "damaged", d.Damaged)
		}
		row(w, "used", fmt.Sprintf("%s of %s", formatSize(uint64(d.Used)), formatSize(uint64(d.Capacity))))
		row(w, "parts of objects", d.Shards)
		row(w, "added", printTime(d.Added))
	})
}

func (a *app) completeASDs(cmd *cobra.Command, got []string, _ string) ([]string, cobra.ShellCompDirective) {
	if len(got) > 0 {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	list, err := a.client().ASDs(cmd.Context())
	if err != nil {
		return nil, cobra.ShellCompDirectiveError
	}
	ids := make([]string, len(list))
	for i := range list {
		ids[i] = list[i].ID
	}
	return ids, cobra.ShellCompDirectiveNoFileComp
}
