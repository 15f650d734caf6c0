package shm

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"testing"

	"scoria/driver/block"
	"scoria/driver/block/blocktest"
	"scoria/shm/client"
	"scoria/shm/ring"
	"scoria/shm/wire"
)

func TestReadsWhatWasWritten(t *testing.T) {
	for _, mode := range []blocktest.Mode{blocktest.Sync, blocktest.Async, blocktest.Mixed} {
		for _, poll := range []bool{true, false} {
			t.Run(fmt.Sprintf("mode %d, poll %v", mode, poll), func(t *testing.T) {
				b := newBed(t, blocktest.Options{Mode: mode}, nil)
				d := b.open(func(o *client.Options) {
					o.Rings, o.Entries, o.ArenaBytes = 2, 8, 1<<20
					if !poll {
						o.Poll = -1
					}
				})
				var wg sync.WaitGroup
				for i := range 6 {
					wg.Go(func() { churn(t, d, uint64(i)*8<<20, uint64(i)) })
				}
				wg.Wait()
			})
		}
	}
}

// churn writes, clears and reads its own 4 MiB against a flat model.
func churn(t *testing.T, d *client.Disk, base, seed uint64) {
	const size = 4 << 20
	ctx := context.Background()
	model := make([]byte, size)
	rnd := rand.New(rand.NewPCG(seed, 2))
	for range 150 {
		off := uint64(rnd.IntN(size/512-1)) * 512
		n := min(uint64(rnd.IntN(200)+1)*512, size-off)
		part := model[off : off+n]
		var err error
		switch rnd.IntN(6) {
		case 0, 1:
			for i := range part {
				part[i] = byte(rnd.Uint32())
			}
			_, err = d.WriteContext(ctx, part, int64(base+off), client.Flags(rnd.IntN(2)))
		case 2:
			clear(part)
			err = d.Discard(ctx, base+off, n, 0)
		case 3:
			clear(part)
			err = d.WriteZeroes(ctx, base+off, n, client.NoUnmap)
		case 4:
			err = d.Flush(ctx)
		case 5:
			got := make([]byte, n)
			if _, err = d.ReadAt(got, int64(base+off)); err == nil && !bytes.Equal(got, part) {
				err = fmt.Errorf("wrong bytes at %d", base+off)
			}
		}
		if err != nil {
			t.Error(err)
			return
		}
	}
	got := make([]byte, size)
	if _, err := d.ReadAt(got, int64(base)); err != nil || !bytes.Equal(got, model) {
		t.Errorf("the whole differs: %v", err)
	}
}

func TestZeroCopyAndCallbacks(t *testing.T) {
	b := newBed(t, blocktest.Options{Mode: blocktest.Mixed}, nil)
	d := b.open(func(o *client.Options) { o.Entries = 16 })
	ctx := soon(t)
	const n, each = 64, 8192
	var left sync.WaitGroup
	var failed atomic.Pointer[error]
	bufs := make([][]byte, n)
	for i := range bufs {
		var err error
		if bufs[i], err = d.Alloc(ctx, each); err != nil {
			t.Fatal(err)
		}
		copy(bufs[i], pattern(each, byte(i)))
	}
	run := func(kind client.Kind) {
		for i := range bufs {
			left.Add(1)
			op := &client.Op{Kind: kind, Offset: uint64(i) * each, Data: bufs[i], Done: func(op *client.Op) {
				if err := op.Err(); err != nil {
					failed.Store(&err)
				}
				left.Done()
			}}
			if err := d.Start(ctx, op); err != nil {
				t.Fatal(err)
			}
		}
		left.Wait()
		if err := failed.Load(); err != nil {
			t.Fatal(*err)
		}
	}
	run(client.Write)
	for i := range bufs {
		clear(bufs[i])
	}
	run(client.Read)
	for i := range bufs {
		if !bytes.Equal(bufs[i], pattern(each, byte(i))) {
			t.Fatalf("buffer %d", i)
		}
		d.Free(bufs[i])
	}
	if err := d.Start(ctx, &client.Op{Kind: client.Write, Data: make([]byte, 512)}); !errors.Is(err, client.ErrNotArena) {
		t.Fatal(err)
	}
}

func TestOutcomes(t *testing.T) {
	b := newBed(t, blocktest.Options{Fail: func(r *block.Request) error {
		switch r.Offset {
		case 1 << 20:
			return fmt.Errorf("a disk: %w", block.ErrCorrupt)
		case 2 << 20:
			return block.ErrFailed
		case 3 << 20:
			return errors.New("something else")
		}
		return nil
	}}, nil)
	d := b.open(nil)
	p := make([]byte, 4096)
	for _, tc := range []struct {
		off  int64
		want ring.Status
	}{{1 << 20, ring.StatusCorrupt}, {2 << 20, ring.StatusFailed}, {3 << 20, ring.StatusIO}, {testSize, ring.StatusRange}, {1, ring.StatusAlignment}} {
		if _, err := d.WriteAt(p, tc.off); !client.IsStatus(err, tc.want) {
			t.Errorf("at %d: %v, want %v", tc.off, err, tc.want)
		}
	}
	if n, err := d.ReadAt(p, testSize-1024); n != 1024 || err != io.EOF {
		t.Error(n, err)
	}
	if _, err := d.WriteAt(pattern(1024, 1), 0); err != nil {
		t.Fatal(err)
	}
	if n, err := d.ReadAt(p[:100], 300); n != 100 || err != nil || !bytes.Equal(p[:100], pattern(1024, 1)[300:400]) {
		t.Error(n, err)
	}
}

func TestP4OneWriter(t *testing.T) {
	b := newBed(t, blocktest.Options{}, nil)
	first := b.open(nil)
	_, err := client.Open(soon(t), client.Options{Socket: b.path, Volume: testVolume})
	if !client.IsCode(err, wire.InUse) {
		t.Fatal(err)
	}
	reader := b.open(func(o *client.Options) { o.ReadOnly = true })
	if _, err := reader.WriteAt(make([]byte, 512), 0); !client.IsStatus(err, ring.StatusReadOnly) {
		t.Fatal(err)
	}
	if _, err := first.WriteAt(pattern(512, 3), 0); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, 512)
	if _, err := reader.ReadAt(got, 0); err != nil || !bytes.Equal(got, pattern(512, 3)) {
		t.Fatal(err)
	}
	first.Close()
	b.open(nil) // waits for the first one's end, if need be
	release, err := b.ram.Claim(block.Claimant{Kind: "vhost", ID: "1"})
	if err == nil {
		release()
		t.Fatal("a vhost front end got the claim of a shared-memory client")
	}
}

func TestControl(t *testing.T) {
	b := newBed(t, blocktest.Options{}, nil)
	ctx := soon(t)
	c, err := client.Dial(ctx, b.path)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if err := c.Create(ctx, "default/new", 1<<20); err != nil {
		t.Fatal(err)
	}
	if err := c.Create(ctx, "default/odd", 1000); !client.IsCode(err, wire.Failed) {
		t.Fatal(err)
	}
	if v, err := c.Stat(ctx, "default/new"); err != nil || v.Size != 1<<20 || v.Name != "default/new" || v.LogicalBlock != 512 {
		t.Fatal(v, err)
	}
	if _, err := c.Stat(ctx, "default/none"); !client.IsCode(err, wire.NotFound) {
		t.Fatal(err)
	}
	if names, err := c.List(ctx); err != nil || !slices.Equal(names, []string{"default/new", testVolume}) {
		t.Fatal(names, err)
	}
	if err := c.Snapshot(ctx, testVolume, "s1"); !client.IsCode(err, wire.Unsupported) {
		t.Fatal(err)
	}
	d := b.open(nil)
	if err := c.Resize(ctx, testVolume, 2*testSize); err != nil {
		t.Fatal(err)
	}
	hurry(t, "notice of the resize", func() bool { return d.Info().Size == 2*testSize })
	if _, err := d.WriteAt(make([]byte, 4096), testSize); err != nil {
		t.Fatal(err)
	}
}

func TestWhoMayIsDecidedByCredentials(t *testing.T) {
	b := newBed(t, blocktest.Options{}, func(c *Config) {
		c.Allow = func(who Peer, what Action, volume string) error {
			if int(who.UID) != os.Getuid() || int(who.PID) != os.Getpid() {
				return fmt.Errorf("asked about user %d, pid %d", who.UID, who.PID)
			}
			if volume != testVolume || what == ActionCreate {
				return fmt.Errorf("volume %s: %w", volume, ErrDenied)
			}
			return nil
		}
	})
	ctx := soon(t)
	c, err := client.Dial(ctx, b.path)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	b.pool.Add(blocktest.NewRAM(4096, blocktest.Options{Name: "default/secret"}))
	if _, err := c.Stat(ctx, "default/secret"); !client.IsCode(err, wire.Denied) {
		t.Fatal(err)
	}
	if err := c.Create(ctx, testVolume, 4096); !client.IsCode(err, wire.Denied) {
		t.Fatal(err)
	}
	if err := c.Snapshot(ctx, "default/secret", "s"); !client.IsCode(err, wire.Denied) {
		t.Fatal(err)
	}
	if names, err := c.List(ctx); err != nil || !slices.Equal(names, []string{testVolume}) {
		t.Fatal(names, err)
	}
	if _, err := client.Open(ctx, client.Options{Socket: b.path, Volume: "default/secret"}); !client.IsCode(err, wire.Denied) {
		t.Fatal(err)
	}
}

// The daemon goes away in order, again and again, under a load that is checked:
// callers see a pause, and no wrong byte.
func TestP3ServerGoesAndComesBack(t *testing.T) {
	b := newBed(t, blocktest.Options{Mode: blocktest.Mixed}, nil)
	d := b.open(func(o *client.Options) { o.Rings, o.Entries, o.ArenaBytes = 2, 16, 1<<20 })
	var wg sync.WaitGroup
	for i := range 4 {
		wg.Go(func() { churn(t, d, uint64(i)*8<<20, uint64(i)) })
	}
	ended := make(chan struct{})
	go func() { wg.Wait(); close(ended) }()
	for n := uint64(0); n < 5; n++ {
		b.srv.Close()
		b.start(nil)
		hurry(t, "reconnect", func() bool { return d.Reconnects() > n })
	}
	select {
	case <-ended:
	case <-soon(t).Done():
		t.Fatal("the load does not end")
	}
}

// Requests that wait for room do not hold up a stop, and are carried out by the
// next daemon.
func TestP3P8WaitingRequestsOutliveTheServer(t *testing.T) {
	b := newBed(t, blocktest.Options{}, nil)
	resume := b.ram.Stall()
	d := b.open(nil)
	wrote := make(chan error, 1)
	go func() {
		_, err := d.WriteAt(pattern(4096, 9), 8192)
		wrote <- err
	}()
	hurry(t, "request waiting for room", func() bool { return b.ram.Waiting() == 1 })
	b.srv.Close()
	if b.ram.Waiting() != 0 {
		t.Fatal("still waiting on behalf of a server that is gone")
	}
	b.start(nil)
	hurry(t, "resubmission", func() bool { return b.ram.Waiting() == 1 })
	resume()
	if err := <-wrote; err != nil {
		t.Fatal(err)
	}
	got := make([]byte, 4096)
	if _, err := d.ReadAt(got, 8192); err != nil || !bytes.Equal(got, pattern(4096, 9)) {
		t.Fatal(err)
	}
}

func TestContextEndsTheWaitNotTheWrite(t *testing.T) {
	b := newBed(t, blocktest.Options{}, nil)
	d := b.open(nil)
	resume := b.ram.Stall()
	ctx, cancel := context.WithCancel(soon(t))
	p := pattern(4096, 5)
	go func() {
		hurry(t, "write waiting", func() bool { return b.ram.Waiting() == 1 })
		cancel()
	}()
	if _, err := d.WriteContext(ctx, p, 0, 0); !errors.Is(err, context.Canceled) {
		t.Fatal(err)
	}
	clear(p) // the caller's again
	resume()
	if err := d.Flush(soon(t)); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, 4096)
	hurry(t, "write", func() bool {
		_, err := d.ReadAt(got, 0)
		return err == nil && bytes.Equal(got, pattern(4096, 5))
	})
}

func TestCloseEndsWhatIsUnderWay(t *testing.T) {
	b := newBed(t, blocktest.Options{}, nil)
	d := b.open(nil)
	resume := b.ram.Stall()
	defer resume()
	failed := make(chan error, 1)
	go func() {
		_, err := d.WriteAt(make([]byte, 4096), 0)
		failed <- err
	}()
	hurry(t, "write waiting", func() bool { return b.ram.Waiting() == 1 })
	d.Close()
	if err := <-failed; !errors.Is(err, client.ErrClosed) {
		t.Fatal(err)
	}
	if _, err := d.WriteAt(make([]byte, 4096), 0); !errors.Is(err, client.ErrClosed) {
		t.Fatal(err)
	}
	hurry(t, "cancelation", func() bool { return b.ram.Waiting() == 0 })
}
