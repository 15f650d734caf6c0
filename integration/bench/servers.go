package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"syscall"
	"time"

	"scoria/vhost/client"
)

// server is one side of the comparison: a running process that serves one disk
// over vhost-user-blk, and the client that is connected to it.
type server struct {
	name   string
	proc   *process
	socket string
	client *client.Client
	// metrics is the control socket that has the process's metrics; "": none.
	metrics string
}

func (s *server) connect(opts client.Options) (err error) {
	// A socket is there a moment before its server listens on it.
	for end := time.Now().Add(10 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		s.client, err = client.Connect(s.socket, opts)
		if !errors.Is(err, syscall.ECONNREFUSED) || time.Now().After(end) {
			break
		}
	}
	if err != nil {
		return fmt.Errorf("%s: %w", s.name, err)
	}
	s.client.FillArena(1)
	return nil
}

func (s *server) close() {
	if s == nil {
		return
	}
	if s.client != nil {
		s.client.Close()
	}
	s.proc.stop()
}

const (
	peerName   = "qsd"
	scoriaName = "scoria"
)

// startPeer starts qemu-storage-daemon in its best setting: a raw file on tmpfs
// through the page cache, io_uring, one iothread, which polls for at most pollNs
// nanoseconds.
func startPeer(ctx context.Context, dir string, size uint64, cpu, pollNs int) (*server, error) {
	file := filepath.Join(dir, "peer.raw")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		return nil, err
	}
	if err := os.Truncate(file, int64(size)); err != nil {
		return nil, err
	}
	return startQSD(ctx, filepath.Join(dir, "peer.sock"), cpu, pollNs,
		"--blockdev", "driver=file,node-name=f,aio=io_uring,cache.direct=off,filename="+file)
}

// startQSD starts qemu-storage-daemon with one iothread, and exports the node f of
// the given arguments.
func startQSD(ctx context.Context, socket string, cpu, pollNs int, node ...string) (*server, error) {
	s := &server{name: peerName, socket: socket}
	os.Remove(s.socket)
	args := append([]string{"--object", "iothread,id=io,poll-max-ns=" + strconv.Itoa(pollNs)}, node...)
	args = append(args, "--export", "vhost-user-blk,id=e,node-name=f,writable=on,iothread=io,addr.type=unix,addr.path="+s.socket)
	var err error
	if s.proc, err = startPinned(cpu, "qemu-storage-daemon", args...); err != nil {
		return nil, fmt.Errorf("%w (Debian and Ubuntu: apt install qemu-system-common)", err)
	}
	if err := s.proc.waitFor(ctx, "socket", func() bool { return client.Listening(s.socket) }); err != nil {
		s.proc.stop()
		return nil, err
	}
	return s, nil
}

// scoriad is a daemon with its directories.
type scoriad struct {
	bin       string // directory of the programs
	data, run string
	config    string // file
	args      []string
	proc      *process
}

// scoriadCalm: the daemon looks once a second for what it has to do in the
// background, which may be nothing but to begin.
const scoriadCalm = 12

// start starts the daemon and waits for its control socket.
func (d *scoriad) start(ctx context.Context, cpu int) error {
	os.Remove(d.control())
	args := append([]string{"--config", d.config}, d.args...)
	proc, err := startPinned(cpu, filepath.Join(d.bin, "scoriad"), args...)
	if err != nil {
		return fmt.Errorf("%w (make build makes it)", err)
	}
	d.proc = proc
	proc.calm = scoriadCalm
	if err := proc.waitFor(ctx, "control socket", exists(d.control())); err != nil {
		proc.stop()
		return err
	}
	return nil
}

func (d *scoriad) control() string { return filepath.Join(d.run, "control.sock") }

// cli runs the operator's program.
func (d *scoriad) cli(ctx context.Context, args ...string) error {
	cmd := exec.CommandContext(ctx, filepath.Join(d.bin, "scoria"), append([]string{"--socket", d.control()}, args...)...)
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("scoria %v: %w: %s", args, err, out)
	}
	return nil
}

// create makes a volume and returns its vhost socket.
func (d *scoriad) create(ctx context.Context, name string, size uint64) (string, error) {
	if err := d.cli(ctx, "volume", "create", name, "--size", strconv.FormatUint(size, 10)); err != nil {
		return "", err
	}
	socket := d.socket(name)
	return socket, d.proc.waitFor(ctx, "socket of volume "+name, exists(socket))
}

func (d *scoriad) socket(name string) string {
	return filepath.Join(d.run, "vhost", "default", name+".sock")
}

// startVolume starts the daemon and makes one volume.
func (d *scoriad) startVolume(ctx context.Context, size uint64, cpu int) (*server, error) {
	if err := d.start(ctx, cpu); err != nil {
		return nil, err
	}
	socket, err := d.create(ctx, "bench", size)
	if err != nil {
		d.proc.stop()
		return nil, err
	}
	return &server{name: scoriaName, proc: d.proc, socket: socket, metrics: d.control()}, nil
}
