package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os/signal"
	"syscall"

	"github.com/docker/go-units"
	"github.com/spf13/cobra"

	"scoria/alba/asd"
	"scoria/alba/asd/disk"
	"scoria/alba/vfs"
)

// errBad is the outcome of a verify that found damage.
var errBad = errors.New("damaged data was found")

func verifyCommand() *cobra.Command {
	var f flags
	var rate, output string
	cmd := &cobra.Command{
		Use:   "verify --data-dir DIR",
		Short: "Read and check everything on a disk whose daemon does not run",
		Long: `verify reads every value and the key-value store of an ASD and reports what fails
its checksum. It changes nothing but the key-value store's log. The exit status is 0
if all is sound, 1 otherwise. A running daemon is verified by the object store.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if output != "text" && output != "json" {
				return fmt.Errorf("--output %q: want text or json", output)
			}
			return verify(cmd, &f, rate, output == "json")
		},
	}
	f.disk(cmd)
	cmd.Flags().StringVar(&rate, "rate", "", "bytes per second at most, such as 100M; as fast as it goes if not given")
	cmd.Flags().StringVarP(&output, "output", "o", "text", "text or json")
	return cmd
}

// openThere opens the ASD that the flags name, and makes none.
func openThere(f *flags, salvage bool) (*disk.Disk, error) {
	log, err := f.logger()
	if err != nil {
		return nil, err
	}
	opts, err := f.options(log)
	if err != nil {
		return nil, err
	}
	if _, err := vfs.OS().Stat(f.dataDir + "/identity"); err != nil {
		return nil, fmt.Errorf("no ASD there: %w", err)
	}
	opts.Salvage = salvage
	return disk.Open(vfs.OS(), f.dataDir, opts)
}

func verify(cmd *cobra.Command, f *flags, rate string, asJSON bool) error {
	perSecond, err := size("rate", rate)
	if err != nil {
		return err
	}
	d, err := openThere(f, false)
	if err != nil {
		return err
	}
	ctx, stop := signal.NotifyContext(cmd.Context(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	stats, err := d.Stats(ctx)
	if err != nil {
		return errors.Join(err, d.Close())
	}
	progress := func(r asd.VerifyResult) {
		if !asJSON {
			fmt.Fprintf(cmd.ErrOrStderr(), "\r%d of %d values, %s of %s", r.Keys, stats.Keys, units.BytesSize(float64(r.Bytes)), units.BytesSize(float64(stats.Bytes)))
		}
	}
	res, err := asd.VerifyAll(ctx, d, asd.VerifyOptions{BytesPerSecond: perSecond, Progress: progress})
	if err = errors.Join(err, d.Close()); err != nil {
		return err
	}
	if err := report(cmd.OutOrStdout(), cmd.ErrOrStderr(), &res, asJSON); err != nil {
		return err
	}
	if len(res.Bad) > 0 {
		return errBad
	}
	return nil
}

// verifyReport is the output of verify -o json.
type verifyReport struct {
	Keys  int64       `json:"keys"`
	Bytes int64       `json:"bytes"`
	Bad   []badReport `json:"bad"`
}

type badReport struct {
	Key    string `json:"key"` // empty: a file of the key-value store
	Offset int64  `json:"offset"`
	Size   int64  `json:"size"` // 0: nothing of it can be read
	Reason string `json:"reason"`
}

func report(out, progress io.Writer, res *asd.VerifyResult, asJSON bool) error {
	r := verifyReport{Keys: res.Keys, Bytes: res.Bytes, Bad: []badReport{}}
	for _, b := range res.Bad {
		r.Bad = append(r.Bad, badReport{b.Key, b.Off, b.Size, b.Reason})
	}
	if asJSON {
		e := json.NewEncoder(out)
		e.SetIndent("", "  ")
		return e.Encode(r)
	}
	fmt.Fprintln(progress)
	for _, b := range r.Bad {
		if b.Key == "" {
			fmt.Fprintf(out, "key-value store: %s\n", b.Reason)
		} else {
			fmt.Fprintf(out, "%q: %d bytes at %d: %s\n", b.Key, b.Size, b.Offset, b.Reason)
		}
	}
	_, err := fmt.Fprintf(out, "%d values of %s checked, %d damaged\n", r.Keys, units.BytesSize(float64(r.Bytes)), len(r.Bad))
	return err
}
