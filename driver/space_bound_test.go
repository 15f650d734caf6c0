package driver_test

import (
	"context"
	"fmt"
	"math/rand/v2"
	"runtime"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"scoria/alba/vfs"
	"scoria/driver"
)

// lazyStore lets others run for a while before it takes or deletes anything.
type lazyStore struct {
	driver.Store
	yields int
}

func (l lazyStore) laze() {
	for range l.yields {
		runtime.Gosched()
	}
}

func (l lazyStore) Put(ctx context.Context, ns, name string, epoch uint64, obj driver.Object) error {
	l.laze()
	obj.LocalPath = "" // a copy, which takes space of its own
	return l.Store.Put(ctx, ns, name, epoch, obj)
}

func (l lazyStore) Delete(ctx context.Context, ns, name string, epoch uint64) error {
	l.laze()
	return l.Store.Delete(ctx, ns, name, epoch)
}

// TestP8SpaceBound: a volume that is written over at random, as fast as it goes, takes at
// no moment more than its bound, on the local disk and in the store, however slow the
// store is: its writers are slowed down, and none fails.
func TestP8SpaceBound(t *testing.T) {
	const clusters = 6144
	for _, yields := range []int{0, 10_000} {
		t.Run(fmt.Sprint(yields), func(t *testing.T) {
			r := newRig(t, directory, rand.New(rand.NewPCG(5, uint64(yields))), clusters, 4)
			r.wrap = func(s driver.Store) driver.Store { return lazyStore{s, yields} }
			r.create()
			for first := uint64(0); first < clusters; first += 64 {
				r.must(r.write(first, 64, 0))
			}
			var most, mostLocal, mostStored float64
			for i := range raced(2, 1) * clusters {
				r.must(r.write(r.rng.Uint64N(clusters), 1, 0))
				used, allowed := r.vol.SpaceBound()
				if used > allowed {
					t.Fatalf("after %d writes the log takes %d bytes, allowed are %d: %s", i, used, allowed, r.vol.SpaceState())
				}
				most = max(most, float64(used)/float64(allowed))
				if i%512 > 0 {
					continue
				}
				local, stored := r.storedBytes("data/volumes"), r.storedBytes("data/store")
				if local > allowed+r.cfg.SCOBytes || stored > allowed {
					t.Fatalf("after %d writes %d bytes are on the local disk, %d in the store, allowed are %d", i, local, stored, allowed)
				}
				mostLocal = max(mostLocal, float64(local)/float64(allowed))
				mostStored = max(mostStored, float64(stored)/float64(allowed))
			}
			live := r.vol.Stats().Space.Live
			_, allowed := r.vol.SpaceBound()
			t.Logf("of %d KiB allowed for %d KiB of data, the log took up to %.2f, the local disk %.2f, the store %.2f; %d KiB were moved",
				allowed>>10, live>>10, most, mostLocal, mostStored, r.vol.Stats().ScrubbedBytes>>10)
			r.verify("bounded", func(*effect) bool { return true })
			r.check()
			r.close()
		})
	}
}

// TestP8BoundOnAFullDisk: that the disk has no room for a checkpoint, be it for the log or
// for the map, passes. It shows as what it is, not as space that is not given back, for
// which guests would be let beyond their bound; and the space comes back as soon as there
// is room.
func TestP8BoundOnAFullDisk(t *testing.T) { overStores(t, testP8BoundOnAFullDisk) }

func testP8BoundOnAFullDisk(t *testing.T, k storeKind) {
	for _, c := range []struct {
		name, shown string
		dir         string // where there is no room
	}{{"log", "disk-full", "/sco/"}, {"map", "checkpoint-failed", "/map/"}} {
		t.Run(c.name, func(t *testing.T) {
			const clusters = 1024
			ctx := context.Background()
			r := newStillRig(t, k, rand.New(rand.NewPCG(6, 1)), clusters, 128).create()
			for range 3 {
				for first := uint64(0); first < clusters; first += 64 {
					r.must(r.write(first, 64, 0))
				}
			}
			if !r.vol.WaitSealed() {
				t.Fatal("the log is not sealed")
			}
			r.must(r.write(0, 1, 0)) // a head that has no file yet
			before := r.inStore()
			var full atomic.Bool
			full.Store(true)
			r.fs.SetHook(func(op vfs.Op, name string) error {
				if full.Load() && (op == vfs.OpWrite || op == vfs.OpAllocate) && strings.Contains(name, c.dir) {
					return syscall.ENOSPC
				}
				return nil
			})
			for turn := range 3 {
				r.vol.Tighten()
				if r.vol.ScrubTurn(ctx) {
					t.Errorf("turn %d has left nothing to do, with a full disk", turn)
				}
				r.vol.Tick(time.Now())
				if !r.has(c.shown) || r.has("space-not-reclaimed") {
					t.Fatalf("turn %d: %+v", turn, r.vol.Stats().Conditions)
				}
			}
			full.Store(false)
			r.vol.Tighten()
			r.vol.ScrubTurn(ctx)
			if now := r.inStore(); now > before/2 {
				t.Errorf("%d bytes are in the store, there were %d: most of it is dead", now, before)
			}
			r.settled("disk-full", "checkpoint-failed")
			r.verify("given back", func(*effect) bool { return true })
			r.check()
			r.close()
		})
	}
}
