package driver_test

import (
	"context"
	"errors"
	"math/rand/v2"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"

	"github.com/google/uuid"

	"scoria/alba/vfs"
	"scoria/driver"
	"scoria/driver/block"
)

// second opens another volume of the same engine.
func (r *rig) second(name string) *driver.Volume {
	r.t.Helper()
	cfg := r.cfg
	cfg.ID, cfg.Name = uuid.NewSHA1(r.cfg.ID, []byte(name)), name
	r.must(r.eng.CreateVolume(context.Background(), cfg)) // may be repeated
	v, err := r.eng.OpenVolume(context.Background(), cfg)
	r.must(err)
	return v
}

// failSyncs makes syncs of the rig's volume's SCOs fail, with nothing else.
func (r *rig) failSyncs(times int64) *atomic.Int64 {
	left := new(atomic.Int64)
	left.Store(times)
	id := r.cfg.ID.String()
	r.fs.SetHook(func(op vfs.Op, name string) error {
		if op == vfs.OpSync && strings.Contains(name, id) && strings.HasSuffix(name, ".sco") && left.Add(-1) >= 0 {
			return syscall.EIO
		}
		return nil
	})
	return left
}

// TestP1FailedSyncIsFinal: a flush that failed for a failed sync is never
// followed by one that succeeds, the volume takes no more writes and says so,
// and the engine's other volumes go on.
func TestP1FailedSyncIsFinal(t *testing.T) {
	forStores(t, 3, 1, func(t *testing.T, k storeKind, rng *rand.Rand) {
		r := newRig(t, k, rng, 1024, 8).create()
		other := r.second("default/other")
		r.must(r.write(0, 10, 0))
		r.must(r.flush())
		r.must(r.write(10, 30, 0))
		r.failSyncs(1)
		if err := r.flush(); !errors.Is(err, block.ErrFailed) {
			t.Fatalf("flush after a failed sync: %v", err)
		}
		for range 3 {
			if err := r.flush(); !errors.Is(err, block.ErrFailed) {
				t.Fatalf("a later flush: %v", err)
			}
			if err := r.write(5, 1, 0); !errors.Is(err, block.ErrFailed) {
				t.Fatalf("a later write: %v", err)
			}
			if err := r.write(5, 1, block.FUA); !errors.Is(err, block.ErrFailed) {
				t.Fatalf("a later FUA write: %v", err)
			}
			if err := r.discard(5, 1); !errors.Is(err, block.ErrFailed) {
				t.Fatalf("a later discard: %v", err)
			}
			part := &block.Request{Op: block.OpWrite, Offset: 512, Length: 512, Segments: [][]byte{make([]byte, 512)}}
			if err := do(r.vol, part); !errors.Is(err, block.ErrFailed) {
				t.Fatalf("a later write of part of a cluster: %v", err)
			}
		}
		if !r.has("sync-failed") || r.has("disk-error") {
			t.Fatalf("conditions: %v", r.vol.Stats().Conditions)
		}
		if hasCondition(other, "sync-failed") {
			t.Fatal("the other volume says that its syncs fail")
		}
		data := make([]byte, cluster)
		stamp(data, 3, 4)
		r.must(do(other, &block.Request{Op: block.OpWrite, Offset: 3 * cluster, Length: cluster, Segments: [][]byte{data}}))
		r.must(do(other, &block.Request{Op: block.OpFlush}))
		r.must(r.read(0, 40)) // what was taken can still be read

		// A new daemon has everything, and may flush it anew.
		at := r.clock.Add(1)
		r.kill().reopen()
		r.verify("P3", func(e *effect) bool { return e.end < at })
		r.must(r.flush())
		cut := r.clock.Add(1)
		r.crash().reopen()
		r.verify("P1", func(e *effect) bool { return e.end < cut })
		r.close()
	})
}

// TestP1FailedSyncOutlivesTheDaemon: what a failed sync may have dropped is
// written again by the next daemon before it acknowledges a flush, also what is
// no longer in the write buffer.
func TestP1FailedSyncOutlivesTheDaemon(t *testing.T) {
	forStores(t, raced(8, 2), 1, func(t *testing.T, k storeKind, rng *rand.Rand) {
		r := newRig(t, k, rng, 4096, 4).create()
		r.cfg.SCOBytes = 8 << 20 // so that a SCO is larger than the buffer
		r.close()
		r.reopen()
		r.must(r.write(0, 10, 0))
		r.must(r.flush())
		for i := range uint64(12) { // more than the buffer holds, to one file
			r.must(r.write(i*100, 100, 0))
		}
		r.failSyncs(1)
		if err := r.flush(); !errors.Is(err, block.ErrFailed) {
			t.Fatalf("flush after a failed sync: %v", err)
		}
		r.kill().reopen()
		if err := r.flush(); errors.Is(err, block.ErrFailed) && r.has("sync-failed") {
			r.kill() // it saw what the disk had lost
			return
		} else if err != nil {
			t.Fatal(err)
		}
		cut := r.clock.Add(1)
		r.crash().reopen()
		r.verify("P1", func(e *effect) bool { return e.end < cut })
		r.close()
	})
}

// TestP1FUA: a write with FUA survives a loss of power by itself.
func TestP1FUA(t *testing.T) {
	forStores(t, 5, 1, func(t *testing.T, k storeKind, rng *rand.Rand) {
		r := newRig(t, k, rng, 512, 4).create()
		for range 5 {
			for range 20 {
				first, n := span(rng, 0, 512, 20)
				r.must(r.write(first, n, block.Flags(rng.IntN(2))*block.FUA))
			}
			at := r.clock.Add(1)
			r.crash().reopen()
			r.verify("P1", func(e *effect) bool { return e.fua && e.end < at })
		}
		r.close()
	})
}

// TestP1FlushesShareSyncs: flushes that wait at the same time are served by one
// sync, and a flush with nothing to do costs none.
func TestP1FlushesShareSyncs(t *testing.T) { overStores(t, testP1FlushesShareSyncs) }

func testP1FlushesShareSyncs(t *testing.T, k storeKind) {
	r := newStillRig(t, k, rand.New(rand.NewPCG(1, 1)), 1024, 8).create()
	r.must(r.write(0, 1, 0))
	r.must(r.flush())
	var syncs atomic.Int64
	release := make(chan struct{})
	first := make(chan struct{})
	var once sync.Once
	r.fs.SetHook(func(op vfs.Op, _ string) error {
		if op == vfs.OpSync {
			syncs.Add(1)
			once.Do(func() {
				close(first)
				<-release
			})
		}
		return nil
	})
	const flushes = 50
	var wg sync.WaitGroup
	submit := func() {
		done := make(chan struct{})
		req := &block.Request{Op: block.OpFlush, Complete: func(*block.Request) { close(done) }}
		r.vol.Submit([]*block.Request{req})
		wg.Go(func() {
			if !req.Ended {
				wait(t, "a flush", done)
			}
			if req.Err != nil {
				t.Error(req.Err)
			}
		})
	}
	r.must(r.write(1, 1, 0))
	submit()
	wait(t, "the first sync", first)
	for i := range uint64(flushes) {
		r.must(r.write(2+i, 1, 0))
		submit()
	}
	close(release)
	wg.Wait()
	if n := syncs.Load(); n != 2 {
		t.Errorf("%d flushes took %d syncs, want 2", flushes+1, n)
	}
	r.must(r.flush())
	if n := syncs.Load(); n != 2 {
		t.Errorf("a flush with nothing to flush took %d syncs", n-2)
	}
	r.fs.SetHook(nil)
	r.close()
}
