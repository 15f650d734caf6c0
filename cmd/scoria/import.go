package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"scoria/driver/control"
	"scoria/driver/stream"
)

// clusterSize is what a volume's size is a multiple of.
const clusterSize = 4096

// importFlags is what `scoria volume import` can be told.
type importFlags struct {
	format  string
	backing bool
	req     control.CreateVolume
	sco     size
}

func (a *app) volumeImport() *cobra.Command {
	f := importFlags{}
	cmd := &cobra.Command{
		Use:   "import FILE|URI [POOL/]NAME",
		Short: "Make a volume from an image",
		Long: `Make a volume from an image file in any format that qemu-img knows (raw, qcow2, vmdk,
vdi, vhdx, …), or from an NBD server (nbd://… or nbd+unix://…). What is empty or
zeroes in the image takes no space. The volume is there when it is complete; if this
command is interrupted or killed, nothing is left of it. qemu-img has to be installed (package qemu-utils).

The format is guessed from the image unless --format names it: name it for a raw image
that a guest could write to. An image that builds on another file is refused without
--backing, as it could make any file of this host part of the volume.`,
		Example: "  scoria volume import debian-12.qcow2 debian\n  scoria volume import nbd://other/disk vm1 --format raw",
		Args:    args("FILE|URI", "[POOL/]NAME"),
		RunE:    func(cmd *cobra.Command, got []string) error { return a.importImage(cmd.Context(), got[0], got[1], f) },
	}
	fl := cmd.Flags()
	fl.StringVar(&f.format, "format", "", "the image's format (default: guessed)")
	fl.BoolVar(&f.backing, "backing", false, "allow an image that builds on another one")
	fl.Uint32Var(&f.req.BlockSize, "block-size", 0, "logical block in bytes, 512 or 4096 (default: the pool's)")
	fl.Var(&f.sco, "sco-size", "size of the objects that the volume is stored in, 1M to 1G (default: the pool's)")
	fl.StringVar(&f.req.Serial, "serial", "", "serial number that the guest sees, at most 20 characters (default: made up)")
	fl.SortFlags = false
	return cmd
}

// imageInfo is what qemu-img says of an image.
type imageInfo struct {
	Format  string `json:"format"`
	Size    uint64 `json:"virtual-size"`
	Backing string `json:"backing-filename"`
}

func (a *app) importImage(ctx context.Context, from, to string, f importFlags) error {
	name, err := fullName(to)
	if err != nil {
		return err
	}
	info, err := inspect(ctx, from, f)
	if err != nil {
		return err
	}
	c := a.client()
	owner, release, err := c.Hold(ctx)
	if err != nil {
		return err
	}
	defer release()
	f.req.Owner = owner
	f.req.Name, f.req.SCOSize, f.req.Import = name, int64(f.sco), true
	f.req.Size = (info.Size + clusterSize - 1) / clusterSize * clusterSize
	// An interrupt comes before or after: whoever does not hear of what it has made
	// can't undo it.
	soon, cancel := brief(ctx)
	v, err := c.CreateVolume(soon, f.req)
	cancel()
	if err != nil {
		return err
	}
	if v.NBD == "" {
		err = errors.New("import goes through the helper socket, which this daemon does not serve: set nbd.enabled")
	} else {
		m := a.meter("import " + to)
		err = a.convert(ctx, m, info.Size, "-n", "--target-is-zero", "-W", "-f", info.Format, "-O", "raw", from, v.NBD)
		m.stop()
	}
	if err == nil {
		v, err = c.Complete(ctx, name)
	}
	if err != nil {
		return errors.Join(err, undoImport(ctx, c, name))
	}
	return a.print(v, func(w *tabwriter.Writer) { showVolume(w, &v) })
}

// brief is for what takes a moment and has to end one way or the other, whatever
// becomes of ctx.
func brief(ctx context.Context) (context.Context, context.CancelFunc) {
	return context.WithTimeout(context.WithoutCancel(ctx), time.Minute)
}

// undoImport deletes what a failed import has made.
func undoImport(ctx context.Context, c *control.Client, name string) error {
	late, cancel := brief(ctx)
	defer cancel()
	j, err := c.StartDelete(late, name, true)
	if err == nil {
		_, err = c.Await(late, j, nil)
	}
	if err != nil {
		return fmt.Errorf("the half-made volume %s is left to the daemon, which removes it: %w", name, err)
	}
	return nil
}

// inspect asks qemu-img what an image is.
func inspect(ctx context.Context, from string, f importFlags) (info imageInfo, err error) {
	arguments := []string{"info", "--output=json"}
	if f.format != "" {
		arguments = append(arguments, "-f", f.format)
	}
	cmd := qemuImg(ctx, append(arguments, from)...)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return info, explainTool(ctx, err, &stderr)
	}
	if err := json.Unmarshal(out, &info); err != nil {
		return info, fmt.Errorf("qemu-img info %s: %w", from, err)
	}
	switch {
	case info.Size == 0:
		return info, fmt.Errorf("image %s is empty", from)
	case info.Backing != "" && !f.backing:
		return info, usagef("image %s builds on %s: --backing allows that", from, info.Backing)
	}
	return info, nil
}

// qemuImg is a call in a process group of its own: an interrupt from the terminal
// comes to it through ctx only.
func qemuImg(ctx context.Context, arguments ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, "qemu-img", arguments...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGTERM}
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.WaitDelay = 5 * time.Second
	return cmd
}

func explainTool(ctx context.Context, err error, stderr *bytes.Buffer) error {
	switch {
	case errors.Is(err, exec.ErrNotFound):
		return errors.New("qemu-img is not installed (Debian and Ubuntu: apt install qemu-utils)")
	case ctx.Err() != nil:
		return ctx.Err()
	}
	if text := strings.TrimSpace(stderr.String()); text != "" {
		return fmt.Errorf("%s", text)
	}
	return fmt.Errorf("qemu-img: %w", err)
}

var percentRE = regexp.MustCompile(`\(([0-9.]+)/100%\)`)

// convert runs `qemu-img convert` and shows its progress.
func (a *app) convert(ctx context.Context, m *meter, total uint64, arguments ...string) error {
	m.total.Store(total)
	cmd := qemuImg(ctx, append([]string{"convert", "-p"}, arguments...)...)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return explainTool(ctx, err, &stderr)
	}
	lines := bufio.NewScanner(out)
	lines.Split(splitReturns)
	for lines.Scan() {
		if got := percentRE.FindSubmatch(lines.Bytes()); got != nil {
			if p, err := strconv.ParseFloat(string(got[1]), 64); err == nil {
				m.done.Store(uint64(p / 100 * float64(total)))
			}
		}
	}
	if err := cmd.Wait(); err != nil {
		return explainTool(ctx, err, &stderr)
	}
	return nil
}

// splitReturns splits at carriage returns, with which qemu-img overwrites its line.
func splitReturns(data []byte, atEOF bool) (advance int, token []byte, err error) {
	if i := bytes.IndexAny(data, "\r\n"); i >= 0 {
		return i + 1, data[:i], nil
	}
	if atEOF && len(data) > 0 {
		return len(data), data, nil
	}
	return 0, nil, nil
}

func (a *app) volumeReceive() *cobra.Command {
	var resumable, abort, position bool
	cmd := &cobra.Command{
		Use:   "receive [POOL/]NAME [FILE|-]",
		Short: "Make or update a volume from a stream",
		Long: `Read a stream that "scoria volume export" wrote, from FILE or standard input. A whole
volume is received under a new name; changes are applied to a volume whose newest
snapshot is the one that they build on and which was not written to since. In the end
the volume has the sender's snapshot, so that later changes can follow.

The volume is taken from its users meanwhile. If the stream ends early, is damaged, or
the command is interrupted, the volume is what it was before. With --resumable it keeps
what has come, stays out of reach, and goes on with "scoria volume export --start" and
the number that --position prints; --abort undoes it.`,
		Example: `  ssh other scoria volume export vm1@monday - --format stream | scoria volume receive vm1
  scoria volume receive vm1 tuesday.stream`,
		Args: func(cmd *cobra.Command, got []string) error {
			if len(got) < 1 || len(got) > 2 {
				return usagef("%q takes [POOL/]NAME and perhaps FILE; got %d arguments (see %s --help)", cmd.CommandPath(), len(got), cmd.CommandPath())
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, got []string) error {
			name, err := fullName(got[0])
			switch {
			case err != nil:
				return err
			case abort && position:
				return usagef("--abort and --position: only one of them")
			case abort:
				return a.abortReceive(cmd.Context(), name)
			case position:
				return a.receivePosition(cmd.Context(), name)
			}
			file := "-"
			if len(got) > 1 {
				file = got[1]
			}
			return a.receive(cmd.Context(), name, file, resumable)
		},
	}
	f := cmd.Flags()
	f.BoolVar(&resumable, "resumable", false, "keep what has come if the stream ends early")
	f.BoolVar(&position, "position", false, "print where an interrupted receive has to go on, in bytes")
	f.BoolVar(&abort, "abort", false, "undo an interrupted receive")
	f.SortFlags = false
	return cmd
}

func (a *app) abortReceive(ctx context.Context, name string) error {
	if err := a.client().AbortReceive(ctx, name); err != nil {
		return err
	}
	return a.print(map[string]string{"undone": name}, func(w *tabwriter.Writer) { row(w, "undone", "receive of "+name) })
}

func (a *app) receivePosition(ctx context.Context, name string) error {
	v, err := a.client().Volume(ctx, name)
	if err != nil {
		return err
	}
	if v.Incomplete == nil || v.Incomplete.Kind != "receive" {
		return control.Errorf(control.CodeInvalid, "volume %s is not being received", name)
	}
	return a.print(v.Incomplete, func(w *tabwriter.Writer) { fmt.Fprintln(w, v.Incomplete.Position) })
}

func (a *app) receive(ctx context.Context, name, file string, resumable bool) error {
	in := os.Stdin
	if file != "-" {
		f, err := os.Open(file)
		if err != nil {
			return err
		}
		defer f.Close()
		in = f
	} else if isTerminal(in) {
		return usagef("standard input is a terminal: give a FILE, or pipe a stream in")
	}
	// The header says how much comes; the daemon gets it all the same.
	var head bytes.Buffer
	s, err := stream.NewReader(io.TeeReader(in, &head))
	if err != nil {
		return fmt.Errorf("%s: %w", file, err)
	}
	m := a.meter("receive " + name)
	defer m.stop()
	m.total.Store(s.Header().DataBytes)
	got, err := a.client().Receive(ctx, name, resumable, io.MultiReader(&head, untilCanceled(ctx, countingReader{in, m})))
	m.stop()
	if err != nil {
		return err
	}
	return a.print(got, func(w *tabwriter.Writer) {
		row(w, "received", got.Volume+"@"+got.Snapshot.Name)
		row(w, "data", formatSize(got.Data))
		row(w, "zeroes", formatSize(got.Zeroes))
	})
}

// untilCanceled fails reads once ctx ends, which a pipe that brings nothing would
// keep waiting.
func untilCanceled(ctx context.Context, r io.Reader) io.Reader {
	pr, pw := io.Pipe()
	go func() {
		_, err := io.CopyBuffer(pw, struct{ io.Reader }{r}, make([]byte, 1<<20))
		pw.CloseWithError(err)
	}()
	context.AfterFunc(ctx, func() { pr.CloseWithError(context.Canceled) })
	return pr
}
