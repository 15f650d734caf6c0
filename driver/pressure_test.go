package driver_test

import (
	"context"
	"errors"
	"math/rand/v2"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"scoria/driver"
	"scoria/driver/block"
)

// moodyStore refuses or holds back what would change it.
type moodyStore struct {
	driver.Store
	fail atomic.Bool
	// failRoots: roots of maps only are refused, however early they come.
	failRoots atomic.Bool
	mu        sync.Mutex
	hang      chan struct{} // not nil: Put and Delete wait until it is closed
}

var errMoody = errors.New("the store is in a mood")

func (m *moodyStore) mood(ctx context.Context) error {
	m.mu.Lock()
	hang := m.hang
	m.mu.Unlock()
	if hang != nil {
		select {
		case <-hang:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	if m.fail.Load() {
		return errMoody
	}
	return nil
}

// DiskBytes implements driver.DiskSharer.
func (m *moodyStore) DiskBytes(ctx context.Context, ns string, size int64) (int64, error) {
	if s, ok := m.Store.(driver.DiskSharer); ok {
		return s.DiskBytes(ctx, ns, size)
	}
	return 0, nil
}

func (m *moodyStore) setHang(on bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if on {
		m.hang = make(chan struct{})
	} else if m.hang != nil {
		close(m.hang)
		m.hang = nil
	}
}

func (m *moodyStore) Put(ctx context.Context, ns, name string, epoch uint64, obj driver.Object) error {
	if err := m.mood(ctx); err != nil {
		return err
	}
	if m.failRoots.Load() && strings.HasPrefix(name, "root-") {
		return errMoody
	}
	return m.Store.Put(ctx, ns, name, epoch, obj)
}

func (m *moodyStore) Delete(ctx context.Context, ns, name string, epoch uint64) error {
	if err := m.mood(ctx); err != nil {
		return err
	}
	return m.Store.Delete(ctx, ns, name, epoch)
}

// moodyRig is a rig whose store can fail and hang.
func moodyRig(t *testing.T, k storeKind, rng *rand.Rand, clusters uint64, poolMiB int64, options ...func(*rig)) (*rig, *moodyStore) {
	r := newRig(t, k, rng, clusters, poolMiB)
	for _, o := range options {
		o(r)
	}
	m := &moodyStore{}
	r.wrap = func(s driver.Store) driver.Store {
		m.Store = s
		return m
	}
	r.create()
	return r, m
}

// TestP8DiskFull: with a disk that others have filled writes pause, the reason shows,
// nothing fails, and everything goes on by itself when there is room.
func TestP8DiskFull(t *testing.T) {
	forStores(t, raced(3, 1), 1, func(t *testing.T, k storeKind, rng *rand.Rand) {
		r := newRig(t, k, rng, 8192, 4).create()
		r.must(r.write(0, 200, 0))
		r.must(r.flush())
		c := r.newCrew()
		for i := range uint64(2) {
			c.run("writer", rng.Uint64(), func(rng *rand.Rand) error {
				first, n := span(rng, 4096*i, 4096*(i+1), 100)
				return r.write(first, n, 0)
			})
		}
		flushing := make(chan error, 1)
		r.must(r.write(8000, 100, 0))
		r.fs.SetCapacity(r.fs.Used() + 2<<20) // storage daemons keep some of that
		eventually(t, "writes pause", func() bool { return r.has("disk-full") })
		go func() { flushing <- r.flush() }()
		r.must(r.read(0, 200)) // reads go on
		done := c.ops.Load()
		r.fs.SetCapacity(0)
		r.must(wait(t, "the flush", flushing))
		eventually(t, "writes go on", func() bool { return c.ops.Load() > done+20 })
		c.fire()
		r.must(r.flush())
		r.settled("disk-full", "write-buffer-full", "disk-error")
		r.verify("P8", func(e *effect) bool { return true })
		r.check()
		r.close()
	})
}

// TestP8Cancel: requests that wait for room end when their owner gives up, of
// every kind, and only his.
func TestP8Cancel(t *testing.T) { overStores(t, testP8Cancel) }

func testP8Cancel(t *testing.T, k storeKind) {
	r := newRig(t, k, rand.New(rand.NewPCG(1, 1)), 8192, 4).create()
	r.must(r.write(7000, 20, 0))
	r.must(r.flush())
	r.fs.SetCapacity(r.fs.Used())
	type pending struct {
		req  *block.Request
		done chan struct{}
	}
	submit := func(owner any, op block.Op, off, length uint64) *pending {
		p := &pending{done: make(chan struct{})}
		p.req = &block.Request{Op: op, Offset: off, Length: length, Owner: owner, Complete: func(*block.Request) { close(p.done) }}
		if op == block.OpWrite {
			data := make([]byte, length)
			for i := uint64(0); i+cluster <= length; i += cluster {
				stamp(data[i:i+cluster], off/cluster+i/cluster, 1<<30)
			}
			p.req.Segments = [][]byte{data}
		}
		r.vol.Submit([]*block.Request{p.req})
		if p.req.Ended {
			close(p.done)
		}
		return p
	}
	alice, bob := "alice", "bob"
	var hers []*pending
	for i := uint64(0); !r.has("disk-full"); i = (i + 100) % 6000 {
		hers = append(hers, submit(alice, block.OpWrite, i*cluster, 100*cluster))
		if len(hers) > 3000 {
			t.Fatal("writes do not pause")
		}
	}
	hers = append(hers,
		submit(alice, block.OpWrite, 7000*cluster+512, 512),
		submit(alice, block.OpWriteZeroes, 7003*cluster, cluster),
		submit(alice, block.OpDiscard, 7005*cluster+512, 1024),
		submit(alice, block.OpWrite, 0, 300*cluster))
	his := submit(bob, block.OpWrite, 100*cluster, 10*cluster)
	eventually(t, "all of hers have ended", func() bool { // one may be on its way when Cancel comes
		r.vol.Cancel(alice)
		for _, p := range hers {
			select {
			case <-p.done:
			default:
				return false
			}
		}
		return true
	})
	canceled := 0
	for _, p := range hers {
		if errors.Is(p.req.Err, block.ErrCanceled) {
			canceled++
		} else if p.req.Err != nil {
			t.Fatalf("%s at %d: %v", p.req.Op, p.req.Offset, p.req.Err)
		}
	}
	if canceled < 2 {
		t.Errorf("%d of %d requests were canceled", canceled, len(hers))
	}
	select {
	case <-his.done:
		if his.req.Err != nil {
			t.Fatalf("his write was canceled with hers: %v", his.req.Err)
		}
	default:
	}
	r.fs.SetCapacity(0)
	wait(t, "his write", his.done)
	r.must(his.req.Err)
	r.must(r.flush())
	r.check()
	r.close()
}

// TestP8StoreFails: while the store fails or hangs, writes go on, the backlog and
// the reason show, another volume with its own store is left alone, and the
// backlog drains by itself afterwards.
func TestP8StoreFails(t *testing.T) { overStores(t, testP8StoreFails) }

func testP8StoreFails(t *testing.T, k storeKind) {
	for _, how := range []string{"fails", "hangs"} {
		t.Run(how, func(t *testing.T) {
			r, m := moodyRig(t, k, rand.New(rand.NewPCG(2, 2)), 4096, 8)
			healthy := r.cfg
			r.cfg.Store = m.Store // the second volume's is fine
			other := r.second("default/other")
			r.cfg = healthy
			if how == "fails" {
				m.fail.Store(true)
			} else {
				m.setHang(true)
			}
			for i := range uint64(8) {
				r.must(r.write(i*300, 300, 0))
			}
			r.must(r.flush())
			eventually(t, "the backlog shows", func() bool { return r.vol.Stats().UploadBacklog > 4<<20 })
			eventually(t, "the reason shows", func() bool {
				r.vol.Tick(time.Now().Add(time.Hour))
				return r.has("store-unreachable")
			})
			for i := range uint64(8) {
				data := make([]byte, 300*cluster)
				r.must(do(other, &block.Request{Op: block.OpWrite, Offset: i * 300 * cluster, Length: 300 * cluster, Segments: [][]byte{data}}))
			}
			r.must(do(other, &block.Request{Op: block.OpFlush}))
			if !other.WaitSealed() {
				t.Error("the other volume's SCOs are not uploaded")
			}
			if hasCondition(other, "store-unreachable") {
				t.Errorf("the other volume has %v", other.Stats().Conditions)
			}
			r.verify("P8", func(*effect) bool { return true })
			m.fail.Store(false)
			m.setHang(false)
			eventually(t, "the backlog is gone", func() bool { return r.vol.Stats().UploadBacklog == 0 })
			r.settled("store-unreachable")
			r.check()
			r.close()
		})
	}
}

// TestP8PublishRecovers: a store that fails only while the map is published is
// reported, tried again, and then the report ends.
func TestP8PublishRecovers(t *testing.T) { overStores(t, testP8PublishRecovers) }

func testP8PublishRecovers(t *testing.T, k storeKind) {
	ctx := context.Background()
	r, m := moodyRig(t, k, rand.New(rand.NewPCG(3, 3)), 1024, 8)
	m.failRoots.Store(true) // housekeeping may publish as soon as there is a checkpoint
	r.must(r.write(0, 600, 0))
	r.must(r.vol.Checkpoint(ctx))
	r.vol.WaitSealed()
	eventually(t, "the root to be refused", func() bool {
		r.vol.Housekeep(ctx, 0)
		return r.has("store-unreachable")
	})
	m.failRoots.Store(false)
	r.vol.Housekeep(ctx, 0)
	r.settled("store-unreachable")
	r.close()
}

// TestScrubFailureEnds: what the scrubber could not do while the store was away is no trouble
// any more if meanwhile there is too little garbage for another attempt.
func TestScrubFailureEnds(t *testing.T) { overStores(t, testScrubFailureEnds) }

func testScrubFailureEnds(t *testing.T, k storeKind) {
	r := newRig(t, k, rand.New(rand.NewPCG(7, 7)), 1024, 8).create()
	r.must(r.write(0, 100, 0))
	r.must(r.vol.Checkpoint(context.Background()))
	r.vol.LeaveAlone(1, 300*time.Millisecond)
	if !r.has("scrub-failed") {
		t.Errorf("conditions: %v", r.vol.Stats().Conditions)
	}
	r.settled("scrub-failed")
	r.close()
}

// TestP3OpenFailsFirst: a daemon that was killed and finds its store out of
// order opens the volume later, and then everything is there.
func TestP3OpenFailsFirst(t *testing.T) { overStores(t, testP3OpenFailsFirst) }

func testP3OpenFailsFirst(t *testing.T, k storeKind) {
	r := newRig(t, k, rand.New(rand.NewPCG(4, 4)), 1024, 8)
	var down atomic.Bool
	r.wrap = func(s driver.Store) driver.Store { return &blindStore{Store: s, down: &down} }
	r.create()
	r.must(r.write(0, 100, 0))
	r.must(r.flush())
	r.must(r.write(50, 100, 0))
	r.kill().start()
	down.Store(true)
	for range 3 {
		if err := r.tryOpen(); !errors.Is(err, errMoody) {
			t.Fatalf("open without a store: %v", err)
		}
	}
	down.Store(false)
	r.mustOpen()
	r.verify("P3", func(*effect) bool { return true })
	r.check()
	r.close()
}

// blindStore fails what reads while it is down, but not the first List.
type blindStore struct {
	driver.Store
	down *atomic.Bool
	seen atomic.Int64
}

func (b *blindStore) List(ctx context.Context, ns, prefix string) ([]string, error) {
	if b.down.Load() && b.seen.Add(1)%2 == 0 {
		return nil, errMoody
	}
	return b.Store.List(ctx, ns, prefix)
}

// TestP8CloseAndReopen: volumes that are closed while their data can't be written
// keep it, and opening them again in the same daemon finds it.
func TestP8CloseAndReopen(t *testing.T) { overStores(t, testP8CloseAndReopen) }

func testP8CloseAndReopen(t *testing.T, k storeKind) {
	r := newRig(t, k, rand.New(rand.NewPCG(5, 5)), 1024, 8).create()
	r.must(r.write(0, 100, 0))
	r.must(r.flush())
	r.must(r.write(50, 100, 0))
	r.failSyncs(1)
	if err := r.flush(); !errors.Is(err, block.ErrFailed) {
		t.Fatal(err)
	}
	r.fs.SetHook(nil)
	r.must(r.vol.Close(context.Background()))
	r.mustOpen()
	r.verify("P3", func(*effect) bool { return true })
	r.close()
}
