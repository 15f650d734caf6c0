package main

import (
	"fmt"

	"github.com/spf13/cobra"
)

func salvageCommand() *cobra.Command {
	var f flags
	cmd := &cobra.Command{
		Use:   "salvage --data-dir DIR",
		Short: "Open a disk whose key-value store's log is damaged, without what is behind the damage",
		Long: `An ASD whose key-value store's log is damaged does not start: what was written last
is lost, and nothing tells what that was. If the objects have enough fragments on other
ASDs, remove this one from the object store and have it rebuilt there. Only if they have
not, salvage cuts the log where the damage begins, so that the ASD starts with what is
left, and keeps the whole log in DIR/kv as *.damaged. An ASD that is sound is not
changed. Start 'scoria backend verify' afterwards: it finds the objects that miss
something.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return salvage(cmd, &f) },
	}
	f.disk(cmd)
	return cmd
}

func salvage(cmd *cobra.Command, f *flags) error {
	d, err := openThere(f, true)
	if err != nil {
		return err
	}
	if err := d.Close(); err != nil {
		return err
	}
	_, err = fmt.Fprintln(cmd.OutOrStdout(), "it starts again")
	return err
}
