package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"scoria/driver/control"
	"scoria/driver/stream"
)

// exportFlags is what `scoria volume export` can be told.
type exportFlags struct {
	format    string
	since     string
	start     uint64
	overwrite bool
}

func (a *app) volumeExport() *cobra.Command {
	f := exportFlags{}
	cmd := &cobra.Command{
		Use:   "export [POOL/]VOLUME[@SNAPSHOT] FILE|-",
		Short: "Copy a volume, a snapshot, or what changed between two, to a file or standard output",
		Long: `Copy a volume or a snapshot to FILE, or to standard output if that is -. A volume
without a snapshot is copied as it is now: a snapshot is made and deleted afterwards.
What was never written takes no space in FILE. FILE appears when it is complete.

Formats are raw (the default), qcow2 (to a file; needs qemu-img), and stream: what
"scoria volume receive" reads, with checksums, for another host or a backup; it needs
a snapshot. With --since a stream has only what changed since an earlier snapshot. An
interrupted transfer to a receiver that was told --resumable goes on with --start and
the number that the receiver named.`,
		Example: `  scoria volume export vm1 vm1.raw
  scoria volume export vm1@monday monday.qcow2 --format qcow2
  scoria volume export vm1@monday - --format stream | ssh other scoria volume receive vm1
  scoria volume export --since monday vm1@tuesday - | ssh other scoria volume receive vm1`,
		Args: args("[POOL/]VOLUME[@SNAPSHOT]", "FILE|-"), ValidArgsFunction: a.completeSnapshots,
		RunE: func(cmd *cobra.Command, got []string) error { return a.export(cmd.Context(), got[0], got[1], f) },
	}
	fl := cmd.Flags()
	fl.StringVar(&f.format, "format", "", "raw, qcow2 or stream (default raw, with --since stream)")
	fl.StringVar(&f.since, "since", "", "only what changed since this earlier snapshot of the volume")
	fl.Uint64Var(&f.start, "start", 0, "go on with an interrupted transfer at this byte of the volume")
	fl.BoolVar(&f.overwrite, "overwrite", false, "replace FILE if it exists")
	fl.SortFlags = false
	must(cmd.RegisterFlagCompletionFunc("format", cobra.FixedCompletions([]string{"raw", "qcow2", "stream"}, cobra.ShellCompDirectiveNoFileComp)))
	return cmd
}

// check completes the flags and says what does not fit together.
func (f *exportFlags) check(source, file string, out io.Writer) error {
	if f.format == "" {
		f.format = "raw"
		if f.since != "" || f.start > 0 {
			f.format = "stream"
		}
	}
	switch {
	case f.format != "raw" && f.format != "qcow2" && f.format != "stream":
		return usagef("--format %q: must be raw, qcow2 or stream", f.format)
	case f.format != "stream" && (f.since != "" || f.start > 0):
		return usagef("--since and --start: are for --format stream, not %s", f.format)
	case f.format == "stream" && !strings.Contains(source, "@"):
		return usagef("a stream needs a snapshot that stays, as in %s@SNAPSHOT: later streams build on it", source)
	case f.format == "qcow2" && file == "-":
		return usagef("qcow2 can't be written to standard output: name a file")
	case file == "-" && isTerminal(out):
		return usagef("standard output is a terminal: send it into a file or pipe")
	}
	if _, err := os.Lstat(file); err == nil && file != "-" && !f.overwrite {
		return usagef("file %s exists: --overwrite replaces it", file)
	}
	return nil
}

func isTerminal(f any) bool {
	file, ok := f.(*os.File)
	if !ok {
		return false
	}
	_, err := unix.IoctlGetTermios(int(file.Fd()), unix.TCGETS)
	return err == nil
}

func (a *app) export(ctx context.Context, source, file string, f exportFlags) (err error) {
	if err := f.check(source, file, a.out); err != nil {
		return err
	}
	volume, _, named := strings.Cut(source, "@")
	c := a.client()
	var snap control.Snapshot
	if named {
		var name string
		if volume, name, err = splitSnapshot(source); err == nil {
			snap, err = c.Snapshot(ctx, volume, name)
		}
	} else if volume, err = fullName(volume); err == nil {
		var drop func() error
		if snap, drop, err = a.temporarySnapshot(ctx, c, volume); err == nil {
			defer func() { err = errors.Join(err, drop()) }()
		}
	}
	if err != nil {
		return err
	}
	m := a.meter("export " + source)
	defer m.stop()
	req := control.Export{Volume: volume, Snapshot: snap.Name, Since: f.since, Start: f.start}
	if file == "-" {
		return a.exportTo(ctx, c, req, f.format, sequential{a.out}, m)
	}
	if err := a.exportFile(ctx, c, req, &snap, file, f.format, m); err != nil {
		return err
	}
	m.stop()
	return a.print(map[string]string{"exported": source, "file": file, "format": f.format}, func(w *tabwriter.Writer) {
		row(w, "exported", fmt.Sprintf("%s to %s", source, file))
	})
}

// temporarySnapshot keeps a volume's present state until drop is called. Should
// this process die, the daemon drops it.
func (a *app) temporarySnapshot(ctx context.Context, c *control.Client, volume string) (s control.Snapshot, drop func() error, err error) {
	owner, release, err := c.Hold(ctx)
	if err != nil {
		return s, nil, err
	}
	name := fmt.Sprintf("export-%d-%d", os.Getpid(), time.Now().UnixMilli())
	soon, cancel := brief(ctx) // what an interrupt hides could not be dropped
	defer cancel()
	if s, err = c.CreateSnapshot(soon, volume, control.CreateSnapshot{Name: name, Temporary: true, Owner: owner}); err != nil {
		release()
		return s, nil, err
	}
	return s, func() error {
		defer release()
		late, cancel := brief(ctx)
		defer cancel()
		return dropSnapshot(late, c, volume, name)
	}, nil
}

// dropSnapshot deletes a snapshot whose reader is just ending.
func dropSnapshot(ctx context.Context, c *control.Client, volume, name string) error {
	const pause, attempts = 100 * time.Millisecond, 100
	for i := 0; ; i++ {
		err := c.DeleteSnapshot(ctx, volume, name)
		if control.CodeOf(err) != control.CodeInUse || i == attempts {
			return err
		}
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// exportFile writes a file that appears under its name when it is complete.
func (a *app) exportFile(ctx context.Context, c *control.Client, req control.Export, snap *control.Snapshot, file, format string, m *meter) (err error) {
	tmp, err := os.CreateTemp(filepath.Dir(file), "."+filepath.Base(file)+".*")
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			os.Remove(tmp.Name())
		}
	}()
	defer func() { err = errors.Join(err, closeOnce(tmp)) }()
	if err := tmp.Chmod(0o644); err != nil {
		return err
	}
	if format == "qcow2" {
		err = a.convert(ctx, m, snap.Size, "-f", "raw", "-O", "qcow2", snap.NBD, tmp.Name())
	} else {
		err = a.exportTo(ctx, c, req, format, tmp, m)
	}
	if err == nil {
		err = tmp.Sync()
	}
	if err == nil {
		err = closeOnce(tmp)
	}
	if err == nil {
		err = os.Rename(tmp.Name(), file)
	}
	return err
}

func closeOnce(f *os.File) error {
	if err := f.Close(); !errors.Is(err, os.ErrClosed) {
		return err
	}
	return nil
}

// image is what a raw export is written to.
type image interface {
	io.Writer
	io.WriterAt
	Truncate(size int64) error
}

// sequential is an image that can't go back: what is left out is written as
// zeroes.
type sequential struct{ io.Writer }

func (sequential) WriteAt([]byte, int64) (int, error) { return 0, errors.ErrUnsupported }
func (sequential) Truncate(int64) error               { return errors.ErrUnsupported }

// exportTo copies a stream to out, or the volume that it describes.
func (a *app) exportTo(ctx context.Context, c *control.Client, req control.Export, format string, out image, m *meter) error {
	r, w := io.Pipe()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	sent := make(chan error, 1)
	go func() {
		err := c.Export(ctx, req, w)
		w.CloseWithError(err)
		sent <- err
	}()
	var err error
	if format == "stream" {
		err = copyStream(out, r, m)
	} else {
		err = writeRaw(out, r, m)
	}
	r.CloseWithError(err)
	cancel()
	// The daemon's reason comes first: the stream only says that it ended early.
	if cause := <-sent; cause != nil && !errors.Is(cause, context.Canceled) && (err == nil || errors.Is(err, stream.ErrTruncated)) {
		return cause
	}
	return err
}

// copyStream verifies a stream on its way to w.
func copyStream(w io.Writer, r io.Reader, m *meter) error {
	b := bufio.NewWriterSize(w, 1<<20)
	s, err := stream.NewReader(io.TeeReader(r, b))
	if err != nil {
		return err
	}
	m.total.Store(s.Header().DataBytes)
	for {
		if _, err := s.Next(); errors.Is(err, io.EOF) {
			return b.Flush()
		} else if err != nil {
			return err
		}
		m.done.Store(s.Totals().DataBytes)
	}
}

// writeRaw makes the raw image of a volume from its stream.
func writeRaw(out image, r io.Reader, m *meter) error {
	s, err := stream.NewReader(bufio.NewReaderSize(r, 1<<20))
	if err != nil {
		return err
	}
	h := s.Header()
	m.total.Store(h.DataBytes)
	_, seq := out.(sequential)
	if !seq {
		if err := out.Truncate(int64(h.Size)); err != nil {
			return err
		}
	}
	at := uint64(0)
	for {
		e, err := s.Next()
		switch {
		case errors.Is(err, io.EOF) && seq:
			return writeZeroes(out, h.Size-at)
		case errors.Is(err, io.EOF):
			return nil
		case err != nil:
			return err
		case e.Data == nil:
			continue
		case seq:
			if err = writeZeroes(out, e.Offset-at); err == nil {
				_, err = out.Write(e.Data)
			}
		default:
			_, err = out.WriteAt(e.Data, int64(e.Offset))
		}
		if err != nil {
			return err
		}
		at = e.Offset + e.Length
		m.done.Store(s.Totals().DataBytes)
	}
}

func writeZeroes(w io.Writer, n uint64) error {
	zeroes := make([]byte, 1<<20)
	for n > 0 {
		k := min(n, uint64(len(zeroes)))
		if _, err := w.Write(zeroes[:k]); err != nil {
			return err
		}
		n -= k
	}
	return nil
}
