package client_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"path/filepath"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/rs/zerolog"

	"scoria/driver/block"
	"scoria/driver/block/blocktest"
	"scoria/vhost"
	"scoria/vhost/client"
	"scoria/vhost/client/load"
)

// These tests run the client against the project's own server with a disk in
// RAM. They test both, and that the client's calls for tests do what they say.

func deadline(t testing.TB, d time.Duration) {
	t.Helper()
	timer := time.AfterFunc(d, func() {
		buf := make([]byte, 1<<20)
		panic(fmt.Sprintf("%s hangs\n%s", t.Name(), buf[:runtime.Stack(buf, true)]))
	})
	t.Cleanup(func() { timer.Stop() })
}

// bench is a server with one volume, which can be replaced by another server.
type bench struct {
	t      testing.TB
	dev    *blocktest.RAM
	socket string
	srv    *vhost.Server
}

func serve(t testing.TB, size uint64, opts blocktest.Options) *bench {
	t.Helper()
	b := &bench{t: t, dev: blocktest.NewRAM(size, opts), socket: filepath.Join(t.TempDir(), "s")}
	b.start()
	t.Cleanup(func() {
		b.srv.Close()
		b.dev.Close()
	})
	return b
}

func (b *bench) start() {
	b.t.Helper()
	var err error
	if b.srv, err = vhost.NewServer(vhost.Config{Log: zerolog.Nop()}); err != nil {
		b.t.Fatal(err)
	}
	open := func(context.Context) (block.Device, error) { return b.dev, nil }
	if _, err := b.srv.Listen("default/test", b.socket, open); err != nil {
		b.t.Fatal(err)
	}
}

func (b *bench) connect(opts client.Options) *client.Client {
	b.t.Helper()
	c, err := client.Connect(b.socket, opts)
	if err != nil {
		b.t.Fatal(err)
	}
	b.t.Cleanup(func() { c.Close() })
	return c
}

func diskOf(t testing.TB, c *client.Client) *client.Disk {
	t.Helper()
	d, err := c.Disk()
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// scribble writes, reads, zeroes and flushes in [base, base+size) and compares
// with a model until stop is set, at least for rounds steps.
func scribble(d *client.Disk, seed uint64, base, size int64, rounds int, stop *atomic.Bool) error {
	rng := rand.New(rand.NewPCG(seed, uint64(base)))
	model := make([]byte, size)
	for i := 0; i < rounds || stop != nil && !stop.Load(); i++ {
		n := 512 * (1 + rng.Int64N(min(600, size/512)))
		off := 512 * rng.Int64N((size-n)/512+1)
		part := model[off : off+n]
		var err error
		switch rng.IntN(8) {
		case 0:
			clear(part)
			err = d.WriteZeroes(base+off, n, true)
		case 1:
			clear(part)
			err = d.Discard(base+off, n)
		case 2:
			err = d.Flush()
		case 3, 4:
			got := make([]byte, n)
			if _, err = d.ReadAt(got, base+off); err == nil && !bytes.Equal(got, part) {
				return fmt.Errorf("step %d: %d bytes at %d differ", i, n, base+off)
			}
		default:
			for j := range part {
				part[j] = byte(rng.Uint32())
			}
			_, err = d.WriteAt(part, base+off)
		}
		if err != nil {
			return fmt.Errorf("step %d: %w", i, err)
		}
	}
	got := make([]byte, size)
	if _, err := d.ReadAt(got, base); err != nil {
		return err
	}
	if !bytes.Equal(got, model) {
		return errors.New("the end differs")
	}
	return nil
}

// everywhere runs scribble in eight parts of the disk at once.
func everywhere(t *testing.T, d *client.Disk, rounds int, stop *atomic.Bool) *sync.WaitGroup {
	t.Helper()
	const workers = 8
	part := d.Size() / workers
	var wg sync.WaitGroup
	for w := range int64(workers) {
		wg.Go(func() {
			if err := scribble(d, 1, w*part, part, rounds, stop); err != nil {
				t.Errorf("worker %d: %v", w, err)
			}
		})
	}
	return &wg
}

func TestServerDisk(t *testing.T) {
	for name, opts := range map[string]client.Options{
		"default":   {Queues: 2},
		"direct":    {Queues: 2, NoIndirect: true, NoEventIdx: true},
		"mem table": {MemTable: true, Unsealed: true, NoInflight: true},
		"small":     {QueueSize: 4, NoIndirect: true},
	} {
		t.Run(name, func(t *testing.T) {
			deadline(t, 2*time.Minute)
			b := serve(t, 16<<20, blocktest.Options{Serial: "S3R1AL"})
			d := diskOf(t, b.connect(opts))
			everywhere(t, d, 40, nil).Wait()
			if id, err := d.ID(); err != nil || id != "S3R1AL" {
				t.Errorf("id %q, %v", id, err)
			}
		})
	}
}

// TestServerDiskAsync completes late and out of order.
func TestServerDiskAsync(t *testing.T) {
	deadline(t, 2*time.Minute)
	b := serve(t, 16<<20, blocktest.Options{Mode: blocktest.Async})
	everywhere(t, diskOf(t, b.connect(client.Options{Queues: 2})), 40, nil).Wait()
}

// TestP3ServerRestarts replaces the server again and again under load: the
// client sees no error and no wrong byte.
func TestP3ServerRestarts(t *testing.T) {
	for name, mode := range map[string]blocktest.Mode{"in order": blocktest.Sync, "out of order": blocktest.Async} {
		t.Run(name, func(t *testing.T) {
			deadline(t, 2*time.Minute)
			b := serve(t, 16<<20, blocktest.Options{Mode: mode})
			d := diskOf(t, b.connect(client.Options{Queues: 2, Reconnect: time.Millisecond}))
			var stop atomic.Bool
			wg := everywhere(t, d, 1, &stop)
			for range 10 {
				time.Sleep(20 * time.Millisecond)
				b.srv.Close()
				b.start()
			}
			stop.Store(true)
			wg.Wait()
		})
	}
}

// TestP3RestartWithoutCompletion: nothing was completed when the server went.
func TestP3RestartWithoutCompletion(t *testing.T) {
	deadline(t, 2*time.Minute)
	b := serve(t, 16<<20, blocktest.Options{})
	resume := b.dev.Stall()
	c := b.connect(client.Options{})
	c.FillArena(1)
	q := c.Queue(0)
	const n = 100
	for i := range uint64(n) {
		if !q.Write(i*4096, c.Buffer(i*4096, 4096), i) {
			t.Fatal("full")
		}
	}
	q.Kick()
	for b.dev.Waiting() < n {
		time.Sleep(time.Millisecond)
	}
	b.srv.Close()
	for {
		if err := q.Wait(2 * time.Minute); errors.Is(err, client.ErrDisconnected) {
			break
		} else if err != nil {
			t.Fatal(err)
		}
	}
	resume()
	b.start()
	if err := c.Reconnect(); err != nil {
		t.Fatal(err)
	}
	seen := map[uint64]bool{}
	out := make([]client.Completion, n)
	for len(seen) < n {
		if err := q.Wait(2 * time.Minute); err != nil {
			t.Fatal(err)
		}
		k, err := q.Poll(out)
		if err != nil {
			t.Fatal(err)
		}
		for _, done := range out[:k] {
			if done.Status != client.StatusOK || seen[done.Tag] {
				t.Fatalf("%+v, seen %v", done, seen[done.Tag])
			}
			seen[done.Tag] = true
		}
	}
	want := bytes.Clone(c.Arena()[:n*4096])
	clear(c.Arena())
	got := make([]byte, len(want))
	if _, err := diskOf(t, c).ReadAt(got, 0); err != nil || !bytes.Equal(got, want) {
		t.Errorf("data differs: %v", err)
	}
}

func TestServerResize(t *testing.T) {
	deadline(t, 2*time.Minute)
	b := serve(t, 16<<20, blocktest.Options{})
	changed := make(chan client.Config, 1)
	c := b.connect(client.Options{OnConfigChange: func(cfg client.Config) { changed <- cfg }})
	if err := b.dev.Resize(32 << 20); err != nil {
		t.Fatal(err)
	}
	if cfg := <-changed; cfg.Capacity != 32<<20/512 || c.Size() != 32<<20 {
		t.Errorf("capacity %d sectors", cfg.Capacity)
	}
}

func TestServerMemorySlots(t *testing.T) {
	deadline(t, 2*time.Minute)
	b := serve(t, 16<<20, blocktest.Options{})
	c := b.connect(client.Options{})
	if c.MaxMemSlots() < 32 {
		t.Fatalf("%d memory slots", c.MaxMemSlots())
	}
	var regions []*client.Region
	for i := range 20 {
		r, err := c.AddMemory(1 << 20)
		if err != nil {
			t.Fatal(err)
		}
		regions = append(regions, r)
		r.Bytes()[0] = byte(i + 1)
		run(t, c, func(tag uint64) bool { return c.Queue(0).Write(uint64(i)*4096, r.Buffer(0, 4096), tag) })
	}
	for i, r := range regions {
		other := regions[len(regions)-1-i]
		if r == other {
			continue
		}
		run(t, c, func(tag uint64) bool { return c.Queue(0).Read(uint64(i)*4096, other.Buffer(8192, 4096), tag) })
		if got := other.Bytes()[8192]; got != byte(i+1) {
			t.Errorf("block %d reads %d", i, got)
		}
	}
	for _, r := range regions {
		if err := c.RemoveMemory(r); err != nil {
			t.Fatal(err)
		}
	}
}

// run runs one request on queue 0.
func run(t *testing.T, c *client.Client, add func(tag uint64) bool) {
	t.Helper()
	q := c.Queue(0)
	if !add(1) {
		t.Fatal("full")
	}
	q.Kick()
	out := make([]client.Completion, 1)
	for {
		n, err := q.Poll(out)
		if err != nil {
			t.Fatal(err)
		}
		if n == 1 {
			if err := client.StatusErr(out[0].Status); err != nil {
				t.Fatal(err)
			}
			return
		}
		if err := q.Wait(2 * time.Minute); err != nil {
			t.Fatal(err)
		}
	}
}

func TestServerDirtyLog(t *testing.T) {
	deadline(t, 2*time.Minute)
	b := serve(t, 16<<20, blocktest.Options{})
	c := b.connect(client.Options{})
	log, err := c.StartLog()
	if err != nil {
		t.Fatal(err)
	}
	buf := c.Buffer(64<<10, 8192)
	run(t, c, func(tag uint64) bool { return c.Queue(0).Read(0, buf, tag) })
	if !log.Dirty(buf.Addr) || !log.Dirty(buf.Addr+4096) || log.Dirty(buf.Addr+8192) {
		t.Error("the pages read into are not those that are marked")
	}
	var pages []uint64
	log.Take(func(addr uint64) { pages = append(pages, addr) })
	if len(pages) < 4 {
		t.Errorf("marked pages %#x: the used ring's and the status byte's must be there too", pages)
	}
	if log.Dirty(buf.Addr) {
		t.Error("still marked")
	}
	if err := c.StopLog(); err != nil {
		t.Fatal(err)
	}
	run(t, c, func(tag uint64) bool { return c.Queue(0).Read(0, buf, tag) })
}

func TestServerStopStartReset(t *testing.T) {
	deadline(t, 2*time.Minute)
	b := serve(t, 16<<20, blocktest.Options{})
	c := b.connect(client.Options{NoStart: true})
	for i := range 3 {
		if err := c.Start(); err != nil {
			t.Fatal(err)
		}
		for range 300 {
			run(t, c, c.Queue(0).Flush)
		}
		if i == 1 {
			if err := c.Reset(); err != nil {
				t.Fatal(err)
			}
			continue
		}
		if base, err := c.StopQueue(0); err != nil || base != c.Queue(0).Ring().AvailIndex() {
			t.Fatalf("base %d, want %d: %v", base, c.Queue(0).Ring().AvailIndex(), err)
		}
		if err := c.Stop(); err != nil {
			t.Fatal(err)
		}
	}
}

func TestServerWriteCache(t *testing.T) {
	deadline(t, 2*time.Minute)
	var fua atomic.Int64
	b := serve(t, 16<<20, blocktest.Options{Trace: func(r *block.Request) {
		if r.Op == block.OpWrite && r.Flags&block.FUA != 0 {
			fua.Add(1)
		}
	}})
	c := b.connect(client.Options{})
	write := func() { run(t, c, func(tag uint64) bool { return c.Queue(0).Write(0, c.Buffer(0, 512), tag) }) }
	write()
	if err := c.SetWriteCache(false); err != nil {
		t.Fatal(err)
	}
	write()
	if cfg, err := c.ReadConfig(client.ConfigOffsetWriteback, 1); err != nil || cfg[0] != 0 {
		t.Errorf("write cache %v, %v", cfg, err)
	}
	if n := fua.Load(); n != 1 {
		t.Errorf("%d durable writes, want the one without write cache", n)
	}
}

func TestServerLoad(t *testing.T) {
	deadline(t, 2*time.Minute)
	b := serve(t, 64<<20, blocktest.Options{})
	c := b.connect(client.Options{Queues: 2})
	for name, spec := range map[string]load.Spec{
		"mixed": {Random: true, Depth: 32, ReadPercent: 70},
		"flush": {Random: true, Depth: 4, FlushEach: true},
		"poll":  {Depth: 1, Poll: true},
	} {
		spec.Duration = 50 * time.Millisecond
		if res, err := load.Run(t.Context(), c, spec); err != nil || res.Ops == 0 {
			t.Errorf("%s: %d operations: %v", name, res.Ops, err)
		}
	}
}
