package driver_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"

	"github.com/google/uuid"

	"scoria/alba/vfs"
	"scoria/driver"
	"scoria/driver/block"
)

// TestP2SnapshotUnderLoad: snapshots taken while many write, with the write buffer
// full and SCOs evicted: each has every write that completed before it was asked for
// and none that began after it was made, whole.
func TestP2SnapshotUnderLoad(t *testing.T) {
	forStores(t, raced(4, 2), 1, func(t *testing.T, k storeKind, rng *rand.Rand) {
		r := newRig(t, k, rng, 1024, 6).create()
		c := r.hire(true)
		ctx := context.Background()
		type taken struct {
			driver.Snapshot
			begin, end int64
		}
		var all []taken
		for i := range 30 {
			begin := r.clock.Add(1)
			s, err := r.vol.CreateSnapshot(ctx, randomID(rng), fmt.Sprint(i), nil)
			r.must(err)
			all = append(all, taken{s, begin, r.clock.Add(1)})
			if rng.IntN(3) == 0 {
				k := rng.IntN(len(all))
				r.must(r.vol.DeleteSnapshot(ctx, all[k].ID))
				all = append(all[:k], all[k+1:]...)
			}
		}
		c.fire()
		for _, s := range all {
			view, err := r.vol.OpenSnapshot(ctx, s.ID)
			r.must(err)
			buf := make([]byte, cluster)
			for at := range uint64(len(r.history)) {
				r.must(do(view, readOf(at, buf)))
				version, ok := readStamp(buf, at)
				if !ok {
					t.Fatalf("snapshot %s: cluster %d is torn", s.Name, at)
				}
				if why := r.explain(at, version, func(e *effect) bool { return e.end < s.begin }); why != "" {
					t.Fatalf("snapshot %s [%d,%d]: cluster %d: %s", s.Name, s.begin, s.end, at, why)
				}
				if r.beganAfter(at, version, s.end) {
					t.Fatalf("snapshot %s [%d,%d]: cluster %d has version %d, which is younger", s.Name, s.begin, s.end, at, version)
				}
			}
			r.must(view.Close())
		}
		r.check()
		for _, s := range all {
			r.cfg.Snapshots = append(r.cfg.Snapshots, s.Snapshot)
		}
		r.crash().reopen()
		r.check()
		r.close()
	})
}

// beganAfter reports whether every write of that version to a cluster began after a
// time.
func (r *rig) beganAfter(c, version uint64, at int64) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, e := range r.history[c] {
		if e.version == version && e.begin <= at {
			return false
		}
	}
	return true
}

// TestP8SnapshotOnAFullDisk: it fails, leaves nothing behind, and works when there
// is room again.
func TestP8SnapshotOnAFullDisk(t *testing.T) { overStores(t, testP8SnapshotOnAFullDisk) }

func testP8SnapshotOnAFullDisk(t *testing.T, k storeKind) {
	r := newStillRig(t, k, rand.New(rand.NewPCG(1, 1)), 4096, 8)
	r.wrap = func(s driver.Store) driver.Store { return copies{s} }
	r.create()
	ctx := context.Background()
	r.must(r.write(0, 300, 0))
	r.must(r.vol.Checkpoint(ctx))
	r.vol.WaitSealed()
	r.must(r.write(1000, 100, 0))
	before, err := r.fs.List("data/volumes/" + r.cfg.ID.String() + "/map")
	r.must(err)
	r.fs.SetCapacity(1)
	_, err = r.vol.CreateSnapshot(ctx, uuid.UUID{1}, "full", nil)
	if !errors.Is(err, syscall.ENOSPC) {
		t.Fatalf("snapshot on a full disk: %v", err)
	}
	after, err := r.fs.List("data/volumes/" + r.cfg.ID.String() + "/map")
	r.must(err)
	if strings.Join(after, " ") != strings.Join(before, " ") || len(r.vol.Snapshots()) != 0 {
		t.Errorf("left behind: %v, before %v, %d snapshots", after, before, len(r.vol.Snapshots()))
	}
	r.fs.SetCapacity(0)
	if _, err = r.vol.CreateSnapshot(ctx, uuid.UUID{1}, "full", nil); err != nil {
		t.Fatal(err)
	}
	r.check()
	r.close()
}

// TestP4SnapshotOfAFencedVolume: who does not own the volume makes and deletes none.
func TestP4SnapshotOfAFencedVolume(t *testing.T) { overStores(t, testP4SnapshotOfAFencedVolume) }

func testP4SnapshotOfAFencedVolume(t *testing.T, k storeKind) {
	r := newRig(t, k, rand.New(rand.NewPCG(1, 1)), 1024, 8).create()
	ctx := context.Background()
	r.must(r.write(0, 10, 0))
	s, err := r.vol.CreateSnapshot(ctx, uuid.UUID{1}, "mine", nil)
	r.must(err)
	r.must(r.cfg.Store.Fence(ctx, r.cfg.ID.String(), r.cfg.Epoch+1))
	r.vol.WaitSealed()
	r.vol.Housekeep(ctx, 0)
	r.fenced()
	if _, err := r.vol.CreateSnapshot(ctx, uuid.UUID{2}, "late", nil); !errors.Is(err, block.ErrClosed) {
		t.Errorf("snapshot: %v", err)
	}
	if err := r.vol.DeleteSnapshot(ctx, s.ID); !errors.Is(err, block.ErrClosed) {
		t.Errorf("delete: %v", err)
	}
	if err := r.vol.Rollback(ctx, s.ID, true); !errors.Is(err, block.ErrClosed) {
		t.Errorf("rollback: %v", err)
	}
	if err := r.vol.Shrink(ctx, cluster*16, true); !errors.Is(err, block.ErrClosed) {
		t.Errorf("shrink: %v", err)
	}
	r.eng.Abandon()
}

// TestRollbackRefusedInUse: a front end that has the volume keeps it as it is.
func TestRollbackRefusedInUse(t *testing.T) { overStores(t, testRollbackRefusedInUse) }

func testRollbackRefusedInUse(t *testing.T, k storeKind) {
	r := newRig(t, k, rand.New(rand.NewPCG(1, 1)), 256, 8).create()
	ctx := context.Background()
	s, err := r.vol.CreateSnapshot(ctx, uuid.UUID{1}, "s", nil)
	r.must(err)
	release, err := r.vol.Claim(block.Claimant{Kind: "test"})
	r.must(err)
	var inUse *block.InUseError
	if err := r.vol.Rollback(ctx, s.ID, true); !errors.As(err, &inUse) {
		t.Errorf("rollback under a guest: %v", err)
	}
	release()
	if err := r.vol.Rollback(ctx, uuid.UUID{9}, true); !errors.Is(err, driver.ErrNoSnapshot) {
		t.Errorf("rollback to nothing: %v", err)
	}
	r.must(r.vol.Rollback(ctx, s.ID, false))
	if _, held := r.vol.Holder(); held {
		t.Error("the claim is still held")
	}
	r.close()
}

// TestP5DamagedSnapshotRoot: a root whose local copy is damaged is read from the
// store; one that is damaged everywhere is reported, and the others are still there.
func TestP5DamagedSnapshotRoot(t *testing.T) { overStores(t, testP5DamagedSnapshotRoot) }

func testP5DamagedSnapshotRoot(t *testing.T, k storeKind) {
	r := newRig(t, k, rand.New(rand.NewPCG(1, 1)), 256, 8)
	r.wrap = func(s driver.Store) driver.Store { return copies{s} }
	r.create()
	ctx := context.Background()
	for i := range byte(3) {
		r.must(r.write(uint64(i), 1, 0))
		s, err := r.vol.CreateSnapshot(ctx, uuid.UUID{i + 1}, fmt.Sprint(i), nil)
		r.must(err)
		r.cfg.Snapshots = append(r.cfg.Snapshots, s)
	}
	r.vol.WaitSealed()
	_, err := r.vol.Publish(ctx)
	r.must(err)
	r.damage(fmt.Sprintf("snap-%016x", r.cfg.Snapshots[1].Sequence), 100)
	if _, err := r.vol.OpenSnapshot(ctx, r.cfg.Snapshots[1].ID); err == nil {
		t.Error("a damaged root was read")
	}
	for _, i := range []int{0, 2} {
		view, err := r.vol.OpenSnapshot(ctx, r.cfg.Snapshots[i].ID)
		r.must(err)
		r.must(view.Close())
	}
	rep, err := r.vol.Check(ctx, nil)
	if err != nil || len(rep.Problems) == 0 || !strings.Contains(strings.Join(rep.Problems, " "), "snapshot 1") {
		t.Errorf("check: %v %q", err, rep.Problems)
	}
	r.close()
	r.reopen() // all the same
	// Deleting the one before needs that root; deleting it does not.
	if err := r.vol.DeleteSnapshot(ctx, r.cfg.Snapshots[0].ID); err == nil {
		t.Error("a neighbour was deleted without knowing what the next one needs")
	}
	r.must(r.vol.DeleteSnapshot(ctx, r.cfg.Snapshots[1].ID))
	r.must(r.vol.DeleteSnapshot(ctx, r.cfg.Snapshots[0].ID))
	r.check()
	r.close()
}

// TestDeepChain: a read of what the oldest of a hundred generations wrote costs what
// it costs one generation later, and all generations share what they cache.
func TestDeepChain(t *testing.T) { overStores(t, testDeepChain) }

func testDeepChain(t *testing.T, k storeKind) {
	depth := raced(100, 12)
	r := newStillRig(t, k, rand.New(rand.NewPCG(1, 1)), 512, 64).create()
	ctx := context.Background()
	r.must(r.write(0, 200, 0))
	volumes := []*driver.Volume{r.vol}
	for i := range depth {
		parent := volumes[i]
		s, err := parent.CreateSnapshot(ctx, uuid.UUID{1, byte(i)}, "s", nil)
		r.must(err)
		cfg := r.cfg
		cfg.ID, cfg.Name = uuid.UUID{9, byte(i)}, fmt.Sprintf("default/c%d", i)
		r.must(r.eng.CreateClone(ctx, cfg, parent, s.ID))
		v, err := r.eng.OpenVolume(ctx, cfg)
		r.must(err)
		data := make([]byte, cluster)
		stamp(data, 300+uint64(i), uint64(i))
		r.must(do(v, &block.Request{Op: block.OpWrite, Offset: (300 + uint64(i)) * cluster, Length: cluster, Segments: [][]byte{data}}))
		volumes = append(volumes, v)
	}
	if n := len(volumes[depth].Ancestors()); n != depth {
		t.Fatalf("%d ancestors, want %d", n, depth)
	}
	for _, v := range volumes {
		v.WaitSealed()
	}
	cost := func(v *driver.Volume, c uint64) int64 {
		var calls atomic.Int64
		r.fs.SetHook(func(op vfs.Op, name string) error {
			if op == vfs.OpRead || op == vfs.OpOpen {
				calls.Add(1)
			}
			return nil
		})
		defer r.fs.SetHook(nil)
		buf := make([]byte, cluster)
		r.must(do(v, readOf(c, buf)))
		if version, ok := readStamp(buf, c); !ok || version != 1 {
			t.Fatalf("cluster %d reads version %d", c, version)
		}
		return calls.Load()
	}
	r.eng.ForgetRAM()
	cost(volumes[1], 199) // what both need of the SCO's checksums
	first, last := cost(volumes[1], 10), cost(volumes[depth], 20)
	t.Logf("a read takes %d calls at depth 1, %d at depth %d", first, last, depth)
	if last > first+2 { // the map page of each is its own
		t.Errorf("a read takes %d calls at depth %d, %d at depth 1", last, depth, first)
	}
	if again := cost(volumes[depth/2], 20); again > first {
		t.Errorf("%d calls for a cluster that a descendant has just read", again)
	}
	for i := range depth {
		buf := make([]byte, cluster)
		r.must(do(volumes[depth], readOf(300+uint64(i), buf)))
		if version, ok := readStamp(buf, 300+uint64(i)); !ok || version != uint64(i) {
			t.Fatalf("generation %d: version %d, %v", i, version, ok)
		}
	}
	rep, err := volumes[depth].Check(ctx, nil)
	if err != nil || len(rep.Problems) > 0 {
		t.Fatalf("check: %v %q", err, rep.Problems)
	}
	r.close()
}

// TestDeleteSnapshotUnderTheHousekeeper: the daemon's own look at a snapshot does not
// make it one in use.
func TestDeleteSnapshotUnderTheHousekeeper(t *testing.T) {
	overStores(t, testDeleteSnapshotUnderTheHousekeeper)
}

func testDeleteSnapshotUnderTheHousekeeper(t *testing.T, k storeKind) {
	w := newWorld(t, k, rand.New(rand.NewPCG(3, 1)), 4<<20, 1<<20, 8<<20)
	ctx := context.Background()
	if err := w.write(0, 8*cluster, false); err != nil {
		t.Fatal(err)
	}
	if err := w.snapshot(); err != nil {
		t.Fatal(err)
	}
	done, err := w.vol.LookAtSnapshot(ctx, w.shots[0].ID)
	if err != nil {
		t.Fatal(err)
	}
	err = w.vol.DeleteSnapshot(ctx, w.shots[0].ID)
	done()
	if err != nil {
		t.Fatal(err)
	}
	w.shots = nil
	w.verifySpace()
}
