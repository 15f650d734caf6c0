package driver_test

import (
	"context"
	"errors"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"scoria/alba/vfs"
	"scoria/driver"
	"scoria/driver/block"
)

// touchyStore asks before it lets a change through.
type touchyStore struct {
	driver.Store
	mu  sync.Mutex
	put func(ctx context.Context, name string) error
	del func(name string) error
}

// on sets what is asked; nil is always yes.
func (s *touchyStore) on(put func(ctx context.Context, name string) error, del func(name string) error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.put, s.del = put, del
}

func (s *touchyStore) Put(ctx context.Context, ns, name string, epoch uint64, obj driver.Object) error {
	s.mu.Lock()
	ask := s.put
	s.mu.Unlock()
	if ask != nil {
		if err := ask(ctx, name); err != nil {
			return err
		}
	}
	return s.Store.Put(ctx, ns, name, epoch, obj)
}

func (s *touchyStore) Delete(ctx context.Context, ns, name string, epoch uint64) error {
	s.mu.Lock()
	ask := s.del
	s.mu.Unlock()
	if ask != nil {
		if err := ask(name); err != nil {
			return err
		}
	}
	return s.Store.Delete(ctx, ns, name, epoch)
}

// newTouchy makes a volume of so many MiB on a store that can be made to fail.
func newTouchy(t *testing.T, k storeKind, mib uint64) (*rig, *touchyStore) {
	t.Helper()
	s := &touchyStore{}
	r := newStillRig(t, k, rand.New(rand.NewPCG(1, 1)), mib*256, 8)
	r.wrap = func(inner driver.Store) driver.Store {
		s.Store = inner
		return s
	}
	return r.create(), s
}

// overwrite writes the whole volume, so that what was there before is garbage,
// and waits until it is in the store.
func (r *rig) overwrite() {
	r.t.Helper()
	for first := uint64(0); first < uint64(len(r.history)); first += 64 {
		r.must(r.write(first, 64, 0))
	}
	r.must(r.flush())
	if !r.vol.WaitSealed() {
		r.t.Fatal("SCOs are not sealed")
	}
}

// background runs fn and returns a channel with its result.
func background[T any](fn func() T) <-chan T {
	ch := make(chan T, 1)
	go func() { ch <- fn() }()
	return ch
}

var errAway = errors.New("the store is away")

// TestScrubKeepsRoot: while the store is behind, the scrubber does not replace the
// root that waits for it by one that has to wait longer, or under steady
// overwrites nothing would ever be given back.
func TestScrubKeepsRoot(t *testing.T) { overStores(t, testScrubKeepsRoot) }

func testScrubKeepsRoot(t *testing.T, k storeKind) {
	r, store := newTouchy(t, k, 16)
	r.overwrite()
	for c := uint64(0); c < 16*256; c += 2 { // half of every SCO is garbage
		r.must(r.write(c, 1, 0))
	}
	r.must(r.flush())
	if !r.vol.WaitSealed() {
		t.Fatal("SCOs are not sealed")
	}
	goOn := r.vol.NoTicks()
	var behind atomic.Bool
	behind.Store(true)
	store.on(func(_ context.Context, name string) error {
		if behind.Load() && strings.HasPrefix(name, "sco-") {
			return errAway
		}
		return nil
	}, nil)
	goOn()
	for range 2 {
		r.vol.Housekeep(context.Background(), 0)
	}
	if n := r.vol.Stats().Checkpoints; n != 1 {
		t.Errorf("%d checkpoints were written while the first one waited", n)
	}
	scrubbed := r.vol.Stats().ScrubbedBytes
	if scrubbed == 0 || scrubbed > 6<<20 {
		t.Errorf("%d bytes were scrubbed although nothing could be given back", scrubbed)
	}
	behind.Store(false)
	eventually(t, "garbage is given back", func() bool {
		r.vol.Housekeep(context.Background(), 0)
		return r.vol.Stats().ReclaimedBytes > 4<<20
	})
	r.check()
	r.close()
}

// TestScrubUnderOverwrite: garbage is given back while writers go on overwriting
// several times faster than the store takes what they write.
func TestScrubUnderOverwrite(t *testing.T) { overStores(t, testScrubUnderOverwrite) }

func testScrubUnderOverwrite(t *testing.T, k storeKind) {
	r, store := newTouchy(t, k, 8)
	store.on(func(context.Context, string) error {
		time.Sleep(5 * time.Millisecond)
		return nil
	}, nil)
	c := r.newCrew()
	data := make([]byte, 32*cluster)
	c.run("writer", 1, func(rng *rand.Rand) error {
		first, n := span(rng, 0, 8*256, 32)
		return do(r.vol, &block.Request{
			Op: block.OpWrite, Offset: first * cluster, Length: n * cluster, Segments: [][]byte{data[:n*cluster]},
		})
	})
	c.run("housekeeper", 2, func(*rand.Rand) error {
		r.vol.Housekeep(c.ctx, 0)
		return nil
	})
	eventually(t, "garbage is given back", func() bool { return r.vol.Stats().ReclaimedBytes > uint64(k.fewer(64, raced(64, 16)))<<20 })
	c.fire()
	r.check()
	r.close()
}

// TestHousekeepingBesideCheck: while a check keeps SCOs from being deleted,
// everything else goes on; afterwards they are.
func TestHousekeepingBesideCheck(t *testing.T) { overStores(t, testHousekeepingBesideCheck) }

func testHousekeepingBesideCheck(t *testing.T, k storeKind) {
	r, _ := newTouchy(t, k, 4)
	r.overwrite()
	r.overwrite()
	release := r.vol.HoldCheck()
	wait(t, "housekeeping beside a check", background(func() error {
		for range 3 {
			r.vol.Housekeep(context.Background(), 2*time.Minute)
			r.vol.WaitSealed()
		}
		return nil
	}))
	checkpoints := r.vol.Stats().Checkpoints
	if checkpoints == 0 || r.vol.Stats().ReclaimedBytes != 0 {
		t.Errorf("%d checkpoints, %d bytes reclaimed", checkpoints, r.vol.Stats().ReclaimedBytes)
	}
	r.vol.Housekeep(context.Background(), 0)
	if n := r.vol.Stats().Checkpoints; n != checkpoints {
		t.Errorf("%d checkpoints are written for what has only to be deleted", n-checkpoints)
	}
	release()
	r.vol.Housekeep(context.Background(), 0)
	if n := r.vol.DeadBytes(); n > 2<<20 {
		t.Errorf("%d bytes of dead SCOs are left after the check", n)
	}
	r.check()
	r.close()
}

// TestDeleteAgain: a SCO that the store did not delete is tried again, and keeps
// none of the others.
func TestDeleteAgain(t *testing.T) { overStores(t, testDeleteAgain) }

func testDeleteAgain(t *testing.T, k storeKind) {
	r, store := newTouchy(t, k, 4)
	goOn := r.vol.NoTicks()
	r.overwrite()
	r.overwrite()
	var tried atomic.Int32
	store.on(nil, func(name string) error {
		if strings.HasPrefix(name, "sco-") && tried.Add(1) == 1 {
			return errAway
		}
		return nil
	})
	r.must(r.vol.Checkpoint(context.Background()))
	if !r.vol.WaitSealed() {
		t.Fatal("not sealed")
	}
	if _, err := r.vol.Publish(context.Background()); !errors.Is(err, errAway) {
		t.Fatalf("the error is lost: %v", err)
	}
	if n := r.vol.Stats().ReclaimedBytes; n == 0 {
		t.Error("one failure kept all of them")
	}
	if r.vol.DeadBytes() == 0 {
		t.Fatal("none was left")
	}
	_, err := r.vol.Publish(context.Background())
	r.must(err)
	if n := r.vol.DeadBytes(); n != 0 {
		t.Errorf("%d bytes are left", n)
	}
	goOn()
	r.check()
	r.close()
}

// TestCloseDoesNotWaitForStore: a store that hangs while it takes a root keeps
// nobody from closing the volume.
func TestCloseDoesNotWaitForStore(t *testing.T) { overStores(t, testCloseDoesNotWaitForStore) }

func testCloseDoesNotWaitForStore(t *testing.T, k storeKind) {
	r, store := newTouchy(t, k, 4)
	r.overwrite()
	hangs := make(chan struct{})
	var once sync.Once
	store.on(func(ctx context.Context, name string) error {
		if !strings.HasPrefix(name, "root-") {
			return nil
		}
		once.Do(func() { close(hangs) })
		<-ctx.Done()
		return ctx.Err()
	}, nil)
	r.must(r.vol.Checkpoint(context.Background()))
	if !r.vol.WaitSealed() {
		t.Fatal("not sealed")
	}
	r.vol.Tick(time.Now())
	wait(t, "the store to hang", hangs)
	r.must(r.write(0, 8, 0))
	r.must(wait(t, "Close", background(func() error { return r.vol.Close(context.Background()) })))
	store.on(nil, nil)
	r.mustOpen()
	if n := r.vol.Stats().ReplayedRecords; n != 0 {
		t.Errorf("%d records are replayed after a clean end", n)
	}
	r.verify("P1", func(*effect) bool { return true })
	r.close()
}

// TestFailedCheckpointLeavesNothing: checkpoints that fail because the disk is
// full do not fill it.
func TestFailedCheckpointLeavesNothing(t *testing.T) {
	overStores(t, testFailedCheckpointLeavesNothing)
}

func testFailedCheckpointLeavesNothing(t *testing.T, k storeKind) {
	r, _ := newTouchy(t, k, 4)
	goOn := r.vol.NoTicks()
	r.overwrite()
	list := func() int {
		names, err := r.fs.List("data/volumes/" + r.cfg.ID.String() + "/map")
		r.must(err)
		return len(names)
	}
	for _, part := range []string{"root-", "pages-"} {
		before := list()
		r.fs.SetHook(func(op vfs.Op, name string) error {
			if (op == vfs.OpWrite || op == vfs.OpSync) && strings.Contains(name, "/map/"+part) {
				return syscall.ENOSPC
			}
			return nil
		})
		for i := range uint64(5) {
			r.must(r.write(i*600%1024, 1, 0))
			if err := r.vol.Checkpoint(context.Background()); !errors.Is(err, syscall.ENOSPC) {
				t.Fatalf("%s: %v", part, err)
			}
		}
		if n := list(); n != before {
			t.Errorf("%s: %d files before, %d after the failures", part, before, n)
		}
		r.fs.SetHook(nil)
	}
	r.must(r.vol.Checkpoint(context.Background()))
	goOn()
	r.check()
	r.close()
	r.reopen()
	r.verify("P1", func(*effect) bool { return true })
	r.close()
}

// TestCheckpointsWithoutStore: while the store takes no root, the log is
// checkpointed locally all the same, and the first and the last of these get to
// the store when it is back.
func TestCheckpointsWithoutStore(t *testing.T) { overStores(t, testCheckpointsWithoutStore) }

func testCheckpointsWithoutStore(t *testing.T, k storeKind) {
	r, store := newTouchy(t, k, 4)
	store.on(func(_ context.Context, name string) error {
		if strings.HasPrefix(name, "root-") {
			return errAway
		}
		return nil
	}, nil)
	for i := range 4 {
		r.overwrite()
		r.vol.GrowLog(driver.CheckpointMax + 1)
		r.vol.Housekeep(context.Background(), 0)
		if n := r.vol.Stats().Checkpoints; n != uint64(i+1) {
			t.Fatalf("%d checkpoints after %d rounds", n, i+1)
		}
	}
	if !r.has("store-unreachable") {
		t.Error("nobody is told that the store is away")
	}
	var mu sync.Mutex
	var roots []string
	store.on(func(_ context.Context, name string) error {
		if strings.HasPrefix(name, "root-") {
			mu.Lock()
			defer mu.Unlock()
			roots = append(roots, name)
		}
		return nil
	}, nil)
	if !r.vol.WaitSealed() {
		t.Fatal("not sealed")
	}
	for range 2 {
		_, err := r.vol.Publish(context.Background())
		r.must(err)
	}
	mu.Lock()
	if want := []string{"root-0000000000000001", "root-0000000000000004"}; !slices.Equal(roots, want) {
		t.Errorf("published: %v, not %v", roots, want)
	}
	mu.Unlock()
	stored, err := store.List(context.Background(), r.cfg.ID.String(), "root-")
	r.must(err)
	if len(stored) != 1 || stored[0] != "root-0000000000000004" {
		t.Errorf("roots in the store: %v", stored)
	}
	r.check()
	// The store alone has everything that the last root refers to.
	r.must(r.vol.Close(context.Background()))
	r.must(r.fs.RemoveAll("data/volumes"))
	r.mustOpen()
	r.verify("P1", func(*effect) bool { return true })
	r.close()
}

// TestTableNamesEachOnce: a checkpoint that begins while SCOs are sealed has each
// of them once.
func TestTableNamesEachOnce(t *testing.T) { overStores(t, testTableNamesEachOnce) }

func testTableNamesEachOnce(t *testing.T, k storeKind) {
	r, _ := newTouchy(t, k, 8)
	c := r.newCrew()
	c.run("writer", 1, func(rng *rand.Rand) error {
		first, n := span(rng, 0, 8*256, 64)
		return r.write(first, n, 0)
	})
	head := func() uint64 { return r.vol.Stats().Ops[block.OpWrite].Bytes }
	for head() < 48<<20 {
		if n := r.vol.DuplicateInTable(); n != 0 {
			t.Errorf("SCO %d is in the table twice", n)
			break
		}
	}
	c.fire()
	r.close()
}

// TestSealedBesideCheck: what a check still looks for in a SCO that was sealed
// meanwhile is not there any more, and a sealed SCO costs no memory for long.
func TestSealedBesideCheck(t *testing.T) { overStores(t, testSealedBesideCheck) }

func testSealedBesideCheck(t *testing.T, k storeKind) {
	r, _ := newTouchy(t, k, 16)
	r.must(r.write(0, 64, 0))
	old := r.vol.Head()
	if old.Records() == 0 || old.Checksums() == 0 {
		t.Fatal("the head has no records")
	}
	r.overwrite()
	eventually(t, "the SCO is sealed", old.IsSealed)
	if n := old.Records(); n != 0 {
		t.Errorf("%d records of a sealed SCO are in the pool", n)
	}
	if n := old.Checksums(); n != 0 {
		t.Errorf("%d checksums of a sealed SCO are in RAM", n)
	}
	r.overwrite() // 16 MiB through a pool of 8
	r.vol.Housekeep(context.Background(), 0)
	if old.InRAM() {
		t.Error("a SCO without chunks is kept in RAM")
	}
	r.check()
	r.close()
}

// TestCloseWaitsForUsers: Close does not take the map away under somebody who
// reads it, and nobody reads it afterwards.
func TestCloseWaitsForUsers(t *testing.T) { overStores(t, testCloseWaitsForUsers) }

func testCloseWaitsForUsers(t *testing.T, k storeKind) {
	r, _ := newTouchy(t, k, 8)
	r.must(r.write(0, 1, 0))
	r.must(r.write(1000, 1, 0))
	inside, goOn := make(chan struct{}), make(chan struct{})
	var once sync.Once
	status := background(func() error {
		return r.vol.BlockStatus(context.Background(), 0, r.cfg.Size, func(block.Extent) bool {
			once.Do(func() { close(inside) })
			<-goOn
			return true
		})
	})
	wait(t, "the first extent", inside)
	closed := background(func() error { return r.vol.Close(context.Background()) })
	eventually(t, "the volume is closing", r.vol.Closing)
	select {
	case err := <-closed:
		t.Fatalf("closed under a reader of the map: %v", err)
	default:
	}
	close(goOn)
	if err := wait(t, "BlockStatus", status); err == nil {
		t.Error("BlockStatus did not end early")
	}
	r.must(wait(t, "Close", closed))
	ctx := context.Background()
	if err := r.vol.BlockStatus(ctx, 0, 1<<20, func(block.Extent) bool { return true }); !errors.Is(err, block.ErrClosed) {
		t.Errorf("BlockStatus: %v", err)
	}
	if _, err := r.vol.Check(ctx, nil); !errors.Is(err, block.ErrClosed) {
		t.Errorf("Check: %v", err)
	}
	if err := r.vol.Resize(ctx, 2*r.cfg.Size); !errors.Is(err, block.ErrClosed) {
		t.Errorf("Resize: %v", err)
	}
	r.vol.Tick(time.Now())
	r.close()
}

// TestRest: a volume that has nothing left to do is left alone until somebody
// writes.
func TestRest(t *testing.T) { overStores(t, testRest) }

func testRest(t *testing.T, k storeKind) {
	r, _ := newTouchy(t, k, 4)
	r.overwrite()
	eventually(t, "the volume rests", func() bool {
		r.vol.Housekeep(context.Background(), 2*time.Minute)
		r.vol.WaitSealed()
		return r.vol.Resting()
	})
	r.must(r.write(7, 1, 0))
	if r.vol.Resting() {
		t.Error("it rests although something was written")
	}
	r.close()
}

// TestP4FencedByMap: a volume that uploads nothing but a root learns from that,
// too, that somebody has taken it over.
func TestP4FencedByMap(t *testing.T) { overStores(t, testP4FencedByMap) }

func testP4FencedByMap(t *testing.T, k storeKind) {
	r, store := newTouchy(t, k, 4)
	r.overwrite()
	r.must(r.vol.Checkpoint(context.Background()))
	if !r.vol.WaitSealed() {
		t.Fatal("not sealed")
	}
	r.must(store.Fence(context.Background(), r.cfg.ID.String(), r.cfg.Epoch+1))
	r.vol.Housekeep(context.Background(), 0)
	if err := r.write(0, 1, 0); !errors.Is(err, block.ErrClosed) {
		t.Errorf("a write after the takeover: %v", err)
	}
	r.must(r.vol.Close(context.Background()))
}
