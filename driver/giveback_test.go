package driver_test

import (
	"context"
	"math/rand/v2"
	"testing"
)

// TestGiveBackIsPutOffOnce: what is put off until the log has been written out is not tried
// again and again in one turn of the scrubber, which looks at all SCOs each time; unless
// guests wait for it.
func TestGiveBackIsPutOffOnce(t *testing.T) { overStores(t, testGiveBackIsPutOffOnce) }

func testGiveBackIsPutOffOnce(t *testing.T, k storeKind) {
	ctx := context.Background()
	r := newStillRig(t, k, rand.New(rand.NewPCG(23, 1)), 1024, 16).create()
	for range 2 {
		for first := uint64(0); first < 1024; first += 256 {
			r.must(r.write(first, 256, 0))
		}
	}
	if !r.vol.WaitSealed() {
		t.Fatal("the log is not sealed")
	}
	slow, begun := r.holdLog()
	for range 5 { // all of it is to be written out, and little of it can be given back
		r.must(r.write(0, 256, 0))
	}
	wait(t, "the log to be written out", begun)
	if n := r.vol.GiveBackTurns(ctx, 10); n != 1 {
		t.Errorf("%d attempts in one turn", n)
	}
	close(slow)
	r.fs.SetHook(nil)
	r.must(r.flush())
	r.vol.Tighten()
	if n := r.vol.GiveBackTurns(ctx, 1); n != 1 {
		t.Errorf("%d attempts when guests wait", n)
	}
	r.check()
	r.close()
}

// TestP5UnreadIsNotMoved: a cluster that could not be read where it was, because it is
// elsewhere by then, is not moved with whatever was read, though it be there again.
func TestP5UnreadIsNotMoved(t *testing.T) { overStores(t, testP5UnreadIsNotMoved) }

func testP5UnreadIsNotMoved(t *testing.T, k storeKind) {
	r := newStillRig(t, k, rand.New(rand.NewPCG(24, 1)), 1024, 8).create()
	r.must(r.write(0, 64, 0))
	r.must(r.flush())
	moved, err := r.vol.MoveWhatComesBack(context.Background(), 7)
	if moved || err != nil {
		t.Errorf("moved: %v, %v", moved, err)
	}
	r.verify("P5", func(*effect) bool { return true })
	r.close()
}
