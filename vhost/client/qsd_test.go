package client

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"sync"
	"testing"
	"time"

	"scoria/vhost/virtq"
)

// deadline fails a test that hangs, with every goroutine's stack.
func deadline(t testing.TB, d time.Duration) {
	t.Helper()
	timer := time.AfterFunc(d, func() {
		buf := make([]byte, 1<<20)
		panic(fmt.Sprintf("%s hangs\n%s", t.Name(), buf[:runtime.Stack(buf, true)]))
	})
	t.Cleanup(func() { timer.Stop() })
}

// qsd is a running qemu-storage-daemon.
type qsd struct {
	t      testing.TB
	cmd    *exec.Cmd
	socket string
	args   []string
}

// startQSD serves a fresh raw file of size bytes, or skips the test.
func startQSD(t testing.TB, size int64, queues int) *qsd {
	t.Helper()
	path, err := exec.LookPath("qemu-storage-daemon")
	if err != nil {
		if os.Getenv("CI") != "" {
			t.Fatal(err)
		}
		t.Skip("qemu-storage-daemon is not installed (make test installs it)")
	}
	dir := t.TempDir()
	file := filepath.Join(dir, "disk.raw")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(file, size); err != nil {
		t.Fatal(err)
	}
	s := &qsd{t: t, socket: filepath.Join(dir, "s")}
	s.args = []string{path,
		"--blockdev", "driver=file,node-name=f,discard=unmap,filename=" + file,
		"--export", fmt.Sprintf("vhost-user-blk,id=e,node-name=f,writable=on,addr.type=unix,addr.path=%s,num-queues=%d", s.socket, queues),
	}
	t.Cleanup(s.kill)
	s.start()
	return s
}

func (s *qsd) start() {
	s.t.Helper()
	os.Remove(s.socket)
	s.cmd = exec.Command(s.args[0], s.args[1:]...)
	s.cmd.Stderr = os.Stderr
	if err := s.cmd.Start(); err != nil {
		s.t.Fatal(err)
	}
	for end := time.Now().Add(2 * time.Minute); ; time.Sleep(5 * time.Millisecond) {
		if Listening(s.socket) {
			return
		}
		if time.Now().After(end) {
			s.t.Fatal("qemu-storage-daemon does not listen")
		}
	}
}

func (s *qsd) kill() {
	if s.cmd != nil {
		s.cmd.Process.Kill()
		s.cmd.Wait()
		s.cmd = nil
	}
}

func connect(t testing.TB, path string, opts Options) *Client {
	t.Helper()
	c, err := Connect(path, opts)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

func diskOf(t testing.TB, c *Client) *Disk {
	t.Helper()
	d, err := c.Disk()
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// one runs a single request and returns its completion.
func one(t testing.TB, q *Queue, add func(tag uint64) bool) Completion {
	t.Helper()
	if !add(7) {
		t.Fatal("queue full")
	}
	q.Kick()
	var out [1]Completion
	for {
		n, err := q.Poll(out[:])
		if err != nil {
			t.Fatal(err)
		}
		if n == 1 {
			if out[0].Tag != 7 {
				t.Fatalf("tag %d", out[0].Tag)
			}
			return out[0]
		}
		if err := q.Wait(2 * time.Minute); err != nil {
			t.Fatal(err)
		}
	}
}

func TestQSDHandshake(t *testing.T) {
	deadline(t, 2*time.Minute)
	s := startQSD(t, 64<<20, 2)
	c := connect(t, s.socket, Options{Queues: 2})
	if c.Size() != 64<<20 {
		t.Errorf("size %d", c.Size())
	}
	cfg := c.Config()
	if cfg.NumQueues != 2 || cfg.BlkSize != 512 || cfg.SegMax == 0 {
		t.Errorf("config %+v", cfg)
	}
	if c.Features()&(FeatureVersion1|FeatureFlush|FeatureDiscard) != FeatureVersion1|FeatureFlush|FeatureDiscard {
		t.Errorf("features %#x of %#x", c.Features(), c.Offered())
	}
	if b, err := c.ReadConfig(0, 8); err != nil || len(b) != 8 {
		t.Errorf("prefix of the config space: %v, %v", b, err)
	}
	if _, err := Connect(s.socket+"x", Options{}); err == nil {
		t.Error("connected to nothing")
	}
}

func TestQSDTooManyQueues(t *testing.T) {
	deadline(t, 2*time.Minute)
	s := startQSD(t, 1<<20, 1)
	if _, err := Connect(s.socket, Options{Queues: 2}); !errors.Is(err, ErrQueues) {
		t.Errorf("two queues of one: %v", err)
	}
}

func TestQSDDisk(t *testing.T) {
	for name, opts := range map[string]Options{
		"default":     {Queues: 2},
		"direct":      {Queues: 2, NoIndirect: true},
		"flags":       {Queues: 1, NoEventIdx: true},
		"plain":       {Queues: 1, NoEventIdx: true, NoIndirect: true, QueueSize: 8},
		"mem table":   {Queues: 2, MemTable: true},
		"no protocol": {Queues: 1, MaskProtocol: ^uint64(1 << 9)},
	} {
		t.Run(name, func(t *testing.T) {
			deadline(t, 2*time.Minute)
			s := startQSD(t, 16<<20, 2)
			d := diskOf(t, connect(t, s.socket, opts))
			checkDisk(t, d)
		})
	}
}

// checkDisk writes, reads and verifies from many goroutines, each in its own part.
func checkDisk(t *testing.T, d *Disk) {
	t.Helper()
	const workers = 8
	part := d.Size() / workers
	var wg sync.WaitGroup
	for w := range int64(workers) {
		wg.Go(func() {
			rng := rand.New(rand.NewPCG(1, uint64(w)))
			model := make([]byte, part)
			for range 15 {
				n := 512 * (1 + rng.Int64N(600))
				off := 512 * rng.Int64N((part-n)/512)
				if err := step(rng, d, w*part, off, n, model); err != nil {
					t.Error(err)
					return
				}
			}
			got := make([]byte, part)
			if _, err := d.ReadAt(got, w*part); err != nil || !bytes.Equal(got, model) {
				t.Errorf("worker %d reads %x, want %x: %v", w, sha256.Sum256(got), sha256.Sum256(model), err)
			}
		})
	}
	wg.Wait()
	if _, err := d.ID(); err != nil {
		t.Errorf("id: %v", err)
	}
	if _, err := d.ReadAt(make([]byte, 512), d.Size()); !errors.Is(err, ErrRange) {
		t.Errorf("read behind the end: %v", err)
	}
	if _, err := d.WriteAt(make([]byte, 100), 0); !errors.Is(err, ErrRange) {
		t.Errorf("write of 100 bytes: %v", err)
	}
}

func step(rng *rand.Rand, d *Disk, base, off, n int64, model []byte) error {
	part := model[off : off+n]
	switch rng.IntN(6) {
	case 0:
		clear(part)
		return d.WriteZeroes(base+off, n, rng.IntN(2) == 0)
	case 1:
		clear(part)
		// What a discarded range reads as is not promised by virtio.
		if err := d.Discard(base+off, n); err != nil {
			return err
		}
		return d.WriteZeroes(base+off, n, false)
	case 2:
		return d.Flush()
	case 3:
		got := make([]byte, n)
		if _, err := d.ReadAt(got, base+off); err != nil {
			return err
		}
		if !bytes.Equal(got, part) {
			return fmt.Errorf("%d bytes at %d differ", n, base+off)
		}
		return nil
	}
	for i := range part {
		part[i] = byte(rng.Uint32())
	}
	_, err := d.WriteAt(part, base+off)
	return err
}

func TestQSDQueue(t *testing.T) {
	deadline(t, 2*time.Minute)
	s := startQSD(t, 16<<20, 1)
	c := connect(t, s.socket, Options{})
	q := c.Queue(0)
	c.FillArena(1)
	bufs := []Buffer{c.Buffer(0, 512), c.Buffer(8192, 4096), c.Buffer(100<<10, 1536)}
	if got := one(t, q, func(tag uint64) bool { return q.WriteV(4096, bufs, tag) }); got.Status != StatusOK {
		t.Fatalf("write: %v", StatusErr(got.Status))
	}
	back := c.Buffer(1<<20, 6144)
	got := one(t, q, func(tag uint64) bool { return q.Read(4096, back, tag) })
	if got.Status != StatusOK {
		t.Fatalf("read: %v", StatusErr(got.Status))
	}
	a := c.Arena()
	want := append(append(bytes.Clone(a[:512]), a[8192:8192+4096]...), a[100<<10:100<<10+1536]...)
	if !bytes.Equal(a[1<<20:1<<20+6144], want) {
		t.Error("data differs")
	}
	if got := one(t, q, func(tag uint64) bool { return q.AddRaw(99, 0, nil, tag) }); got.Status != StatusUnsupp {
		t.Errorf("request of type 99: %v", StatusErr(got.Status))
	}
	behind := virtq.DriverSegment{Addr: c.Addr(0), Len: 512, Write: true}
	if got := one(t, q, func(tag uint64) bool {
		return q.AddRaw(TypeIn, c.Size()/512, []virtq.DriverSegment{behind}, tag)
	}); got.Status != StatusIOErr {
		t.Errorf("read behind the end: %v", StatusErr(got.Status))
	}
	// The first may find the call for a completion that Poll has seen already.
	q.Wait(time.Millisecond)
	if err := q.Wait(time.Millisecond); !errors.Is(err, ErrTimeout) {
		t.Errorf("wait for nothing: %v", err)
	}
}

func TestQSDMemorySlots(t *testing.T) {
	deadline(t, 2*time.Minute)
	s := startQSD(t, 16<<20, 1)
	c := connect(t, s.socket, Options{})
	q := c.Queue(0)
	r, err := c.AddMemory(1 << 20)
	if err != nil {
		t.Fatal(err)
	}
	for i := range r.Bytes()[:4096] {
		r.Bytes()[i] = byte(i * 7)
	}
	if got := one(t, q, func(tag uint64) bool { return q.Write(0, r.Buffer(0, 4096), tag) }); got.Status != StatusOK {
		t.Fatalf("write: %v", StatusErr(got.Status))
	}
	if got := one(t, q, func(tag uint64) bool { return q.Read(0, r.Buffer(8192, 4096), tag) }); got.Status != StatusOK {
		t.Fatalf("read: %v", StatusErr(got.Status))
	}
	if !bytes.Equal(r.Bytes()[:4096], r.Bytes()[8192:8192+4096]) {
		t.Error("data differs")
	}
	if err := c.RemoveMemory(r); err != nil {
		t.Fatal(err)
	}
}

func TestQSDStopStart(t *testing.T) {
	deadline(t, 2*time.Minute)
	s := startQSD(t, 16<<20, 1)
	c := connect(t, s.socket, Options{})
	q := c.Queue(0)
	for range 3 {
		for range 10 {
			one(t, q, func(tag uint64) bool { return q.Write(0, c.Buffer(0, 4096), tag) })
		}
		base, err := c.StopQueue(0)
		if err != nil || base != q.Ring().AvailIndex() {
			t.Fatalf("base %d, want %d: %v", base, q.Ring().AvailIndex(), err)
		}
		if err := c.Stop(); err != nil {
			t.Fatal(err)
		}
		if err := c.Start(); err != nil {
			t.Fatal(err)
		}
	}
}

// TestQSDDies kills the server. It has no in-flight region, so nothing is in
// flight then; what is added while it is dead is served when it is back.
func TestQSDDies(t *testing.T) {
	deadline(t, 2*time.Minute)
	s := startQSD(t, 16<<20, 1)
	c := connect(t, s.socket, Options{})
	q := c.Queue(0)
	one(t, q, func(tag uint64) bool { return q.Write(0, c.Buffer(0, 4096), tag) })
	s.kill()
	for {
		// A wait may end early, on a call for what was polled before.
		if err := q.Wait(2 * time.Minute); errors.Is(err, ErrDisconnected) {
			break
		} else if err != nil {
			t.Fatal(err)
		}
	}
	if err := c.Reconnect(); err == nil {
		t.Fatal("reconnected to nothing")
	}
	q.Read(0, c.Buffer(8192, 4096), 7)
	q.Kick()
	s.start()
	if err := c.Reconnect(); err != nil {
		t.Fatal(err)
	}
	var out [2]Completion
	for n := 0; n == 0; {
		if err := q.Wait(2 * time.Minute); err != nil {
			t.Fatal(err)
		}
		var err error
		if n, err = q.Poll(out[:]); err != nil {
			t.Fatal(err)
		}
	}
	if out[0].Status != StatusOK {
		t.Errorf("read: %v", StatusErr(out[0].Status))
	}
}

func TestQSDDiskReconnects(t *testing.T) {
	deadline(t, 2*time.Minute)
	s := startQSD(t, 16<<20, 1)
	d := diskOf(t, connect(t, s.socket, Options{Reconnect: 20 * time.Millisecond}))
	data := bytes.Repeat([]byte("scoria!."), 512)
	if _, err := d.WriteAt(data, 0); err != nil {
		t.Fatal(err)
	}
	s.kill()
	got := make([]byte, len(data))
	done := make(chan error, 1)
	go func() {
		_, err := d.ReadAt(got, 0)
		done <- err
	}()
	s.start()
	if err := <-done; err != nil || !bytes.Equal(got, data) {
		t.Errorf("read across a restart: %v", err)
	}
}

func TestQSDDiskFails(t *testing.T) {
	deadline(t, 2*time.Minute)
	s := startQSD(t, 16<<20, 1)
	d := diskOf(t, connect(t, s.socket, Options{}))
	s.kill()
	for {
		// The first may be in flight before the end is noticed; all end.
		if _, err := d.ReadAt(make([]byte, 512), 0); errors.Is(err, ErrDisconnected) {
			break
		} else if err == nil {
			t.Fatal("read from a dead server")
		}
	}
	d.c.Close()
	if err := d.Flush(); !errors.Is(err, ErrClosed) {
		t.Errorf("flush after close: %v", err)
	}
}
