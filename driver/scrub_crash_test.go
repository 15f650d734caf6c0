package driver_test

import (
	"context"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"

	"scoria/alba/vfs"
)

// overwritten fills a volume, takes a snapshot and writes over half of it at random
// until there is much to give back: SCOs that only the volume reaches, in part, and some
// that the snapshot reaches besides.
func overwritten(r *rig) (snaps []kept) {
	r.t.Helper()
	size := uint64(len(r.history))
	r.must(r.write(0, size, 0))
	snaps = append(snaps, r.snap("before"))
	for range 3 * size {
		r.must(r.write(r.rng.Uint64N(size), 1, 0))
	}
	r.settle()
	return snaps
}

// scrubAndPublish gives back what the scrubber would, and what its last turn has left to
// the next.
func (r *rig) scrubAndPublish() error {
	ctx := context.Background()
	for range 2 {
		r.vol.ScrubTurn(ctx)
	}
	if err := r.vol.CheckpointAnew(ctx); err != nil {
		return err
	}
	r.vol.WaitSealed()
	for range 2 {
		if _, err := r.vol.Publish(ctx); err != nil {
			return err
		}
	}
	return nil
}

// TestP2ScrubCrashAtEveryStep: power is lost at any call to the disk, of the volume's or
// of its store's, while the scrubber empties SCOs and others are given back beside it. The
// volume and its snapshot read as before, and all is sound.
func TestP2ScrubCrashAtEveryStep(t *testing.T) { overStores(t, testP2ScrubCrashAtEveryStep) }

func testP2ScrubCrashAtEveryStep(t *testing.T, k storeKind) {
	if testing.Short() {
		t.Skip("long")
	}
	r := newStillRig(t, k, rand.New(rand.NewPCG(5, 1)), 512, 4).create()
	snaps := overwritten(r)
	type moment struct {
		call string
		fs   *vfs.Mem
	}
	step := k.fewer(raced(2, 5), raced(7, 61))
	var mu sync.Mutex
	var moments []moment
	fsys, n := r.fs, 0
	fsys.SetHook(func(op vfs.Op, file string) error {
		mu.Lock()
		defer mu.Unlock()
		if n++; n%step == 0 && op != vfs.OpRead && op != vfs.OpOpen {
			moments = append(moments, moment{fmt.Sprintf("power loss at call %d, %v of %s", n, op, file), fsys.CrashClone(r.rng)})
		}
		return nil
	})
	before := r.vol.Stats()
	r.must(r.scrubAndPublish())
	fsys.SetHook(nil)
	after := r.vol.Stats()
	if after.ScrubbedBytes == before.ScrubbedBytes || after.ReclaimedBytes == before.ReclaimedBytes || len(moments) < 5 {
		t.Fatalf("%d bytes were moved and %d given back in %d calls", after.ScrubbedBytes-before.ScrubbedBytes,
			after.ReclaimedBytes-before.ReclaimedBytes, n)
	}
	t.Logf("%d moments, %d KiB moved, %d KiB given back", len(moments),
		(after.ScrubbedBytes-before.ScrubbedBytes)>>10, (after.ReclaimedBytes-before.ReclaimedBytes)>>10)
	r.close()
	history := r.history
	for i := 0; i < len(moments); i++ {
		r.history = append([][]*effect(nil), history...)
		r.fs = moments[i].fs
		r.boot++
		r.survives(moments[i].call, snaps)
	}
}

// survives opens what a death left, sees that all is there, and that the scrubber can go
// on from it.
func (r *rig) survives(after string, snaps []kept) {
	r.t.Helper()
	r.reopen()
	r.verify(after, func(*effect) bool { return true })
	r.seesAll(snaps...)
	r.vol.ScrubTurn(context.Background())
	r.settle()
	r.verify(after+", scrubbed", func(*effect) bool { return true })
	r.seesAll(snaps...)
	if rep, err := r.vol.Check(context.Background(), nil); err != nil || len(rep.Problems) > 0 {
		r.t.Fatalf("%s: check: %v %q", after, err, rep.Problems)
	}
	r.check()
	if r.t.Failed() {
		r.t.Fatal(after)
	}
	r.close()
}

// TestP3ScrubKilledAtEveryStep: likewise for the daemon's death.
func TestP3ScrubKilledAtEveryStep(t *testing.T) { overStores(t, testP3ScrubKilledAtEveryStep) }

func testP3ScrubKilledAtEveryStep(t *testing.T, k storeKind) {
	if testing.Short() {
		t.Skip("long")
	}
	for call := 1; ; call += k.fewer(raced(11, 61), raced(101, 601)) {
		r := newStillRig(t, k, rand.New(rand.NewPCG(uint64(call), 9)), 512, 4).create()
		snaps := overwritten(r)
		if _, died := r.killedAt(call, 100, r.scrubAndPublish); !died {
			return
		}
		r.survives(fmt.Sprintf("kill at call %d", call), snaps)
	}
}
