package driver_test

import (
	"math/rand/v2"
	"strings"
	"sync"
	"testing"

	"scoria/alba/vfs"
)

// TestP3KillAtEveryCall kills the daemon at each call to the disk, one after the
// other, of a short life and of the recovery from it. A flush afterwards means
// what it says although the dead daemon left files half made.
func TestP3KillAtEveryCall(t *testing.T) { overStores(t, testP3KillAtEveryCall) }

func testP3KillAtEveryCall(t *testing.T, k storeKind) {
	if testing.Short() {
		t.Skip("long")
	}
	life := func(r *rig) error {
		for i := range uint64(6) {
			if err := r.write(i*20, 20, 0); err != nil {
				return err
			}
			if i%2 == 1 {
				if err := r.flush(); err != nil {
					return err
				}
			}
		}
		r.vol.SpillNow()
		if err := ignoreFull(r.vol.Checkpoint(t.Context())); err != nil {
			return err
		}
		if err := r.write(0, 40, 0); err != nil {
			return err
		}
		r.vol.WaitSealed()
		if _, err := r.vol.Publish(t.Context()); err != nil {
			return err
		}
		return r.write(10, 5, 0)
	}
	for call := 1; ; call += k.fewer(raced(1, 7), raced(19, 61)) {
		rng := rand.New(rand.NewPCG(uint64(call), 9))
		r := newRig(t, k, rng, 256, 4).create()
		d, died := r.killedAt(call, 40, func() error { return life(r) })
		if !died {
			return
		}
		if rng.IntN(2) == 0 && !r.dieWhileOpening() {
			r.verify("P3", func(e *effect) bool { return e.end < d.at })
		} else {
			r.reopen()
			r.verify("P3", func(e *effect) bool { return e.end < d.at })
		}
		r.must(r.write(100, 3, 0))
		r.must(r.flush())
		cut := r.clock.Add(1)
		r.must(r.write(50, 60, 0))
		r.crash().reopen()
		r.verify("P1 after a kill", func(e *effect) bool { return e.end < cut })
		r.check()
		r.close()
	}
}

// TestP2PowerLossWhileSealing: a SCO that was never synced and loses power in
// the middle of being sealed is a torn tail, whatever pieces of its footer and
// of its size are there. Every moment is tried with many outcomes.
func TestP2PowerLossWhileSealing(t *testing.T) { overStores(t, testP2PowerLossWhileSealing) }

func testP2PowerLossWhileSealing(t *testing.T, k storeKind) {
	type moment struct{ clones []*vfs.Mem }
	seed := rand.Uint64()
	t.Logf("SCORIA_SEED=%d", seed)
	names := []string{"full", "early", "many records"}
	for _, name := range names[:k.fewer(len(names), raced(3, 1))] {
		t.Run(name, func(t *testing.T) {
			rng := rand.New(rand.NewPCG(seed, 1))
			r := newRig(t, k, rng, 1024, 8).create()
			if name == "many records" { // a SCO full of clusters and of records
				for i := range uint64(4) {
					r.must(r.write(i*200, 200, 0))
				}
				r.must(r.flush())
				r.must(r.vol.Checkpoint(t.Context()))
				r.vol.WaitSealed()
			}
			cut := r.clock.Add(1)
			var mu sync.Mutex
			var moments []moment
			fsys := r.fs
			fsys.SetHook(func(op vfs.Op, file string) error {
				mu.Lock()
				defer mu.Unlock()
				if !strings.HasSuffix(file, ".sco") || op == vfs.OpRead || len(moments) > k.fewer(40, raced(12, 4)) {
					return nil
				}
				var m moment
				for range k.fewer(raced(6, 2), 2) {
					m.clones = append(m.clones, fsys.CrashClone(rng))
				}
				moments = append(moments, m)
				return nil
			})
			switch name {
			case "full":
				r.must(r.write(0, 250, 0))
				r.must(r.write(300, 40, 0))
			case "early":
				r.must(r.write(0, 90, 0))
				r.must(r.vol.Checkpoint(t.Context()))
			case "many records":
				for i := range uint64(700) {
					r.must(r.discard(i, 1))
				}
				r.must(r.write(0, 250, 0))
				r.must(r.vol.Checkpoint(t.Context()))
			}
			r.vol.WaitSealed()
			fsys.SetHook(nil)
			r.close()
			history := r.history
			for _, m := range moments {
				for _, clone := range m.clones {
					r.history = append([][]*effect(nil), history...)
					r.fs = clone
					r.boot++
					r.reopen()
					r.verify("P2", func(e *effect) bool { return e.end < cut })
					r.check()
					r.close()
				}
			}
		})
	}
}

// TestP1P2PowerLossInSmallFlushes: a small flush has clusters and records under
// way at the same time, so that power may be lost with the records on the disk and
// the clusters not. Every moment of several flushes is tried with many outcomes:
// what was flushed before is there, and what is there is a prefix.
func TestP1P2PowerLossInSmallFlushes(t *testing.T) { overStores(t, testP1P2PowerLossInSmallFlushes) }

func testP1P2PowerLossInSmallFlushes(t *testing.T, k storeKind) {
	type moment struct {
		at     int64
		clones []*vfs.Mem
	}
	seed := rand.Uint64()
	t.Logf("SCORIA_SEED=%d", seed)
	rng := rand.New(rand.NewPCG(seed, 2))
	r := newRig(t, k, rng, 256, 4).create()
	var mu sync.Mutex
	var moments []moment
	fsys := r.fs
	fsys.SetHook(func(op vfs.Op, file string) error {
		if !strings.HasSuffix(file, ".sco") || op == vfs.OpRead {
			return nil
		}
		mu.Lock()
		defer mu.Unlock()
		m := moment{at: r.clock.Add(1)}
		for range k.fewer(raced(8, 3), raced(3, 1)) {
			m.clones = append(m.clones, fsys.CrashClone(rng))
		}
		moments = append(moments, m)
		return nil
	})
	const writes = 12 // each to a place of its own
	for i := range uint64(writes) {
		r.must(r.write(i*8, 1+i%5, 0))
		if i%3 != 1 {
			r.must(r.flush())
		}
	}
	fsys.SetHook(nil)
	r.close()
	history := r.history
	torn := 0
	for _, m := range moments {
		flushed := r.flushedBefore(m.at)
		for _, clone := range m.clones {
			r.history = append([][]*effect(nil), history...)
			r.fs = clone
			r.boot++
			r.reopen()
			r.verify("P1", func(e *effect) bool { return e.end < flushed })
			last := true
			for i := range writes {
				there := r.history[i*8][0].version != 0
				for k := range 1 + i%5 {
					if r.history[i*8+k][0].version != 0 != there {
						torn++ // a write of several clusters has no promise to be whole
					}
				}
				if there && !last {
					t.Fatalf("P2: write %d is there, the one before is not", i)
				}
				last = there
			}
			r.check()
			r.close()
		}
	}
	t.Logf("%d moments, %d clusters of torn writes", len(moments), torn)
}
