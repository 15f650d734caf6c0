package driver_test

import (
	"context"
	"math/rand/v2"
	"testing"
)

// TestP9OpeningReadsWhatChanged: opening after a loss of power reads the records
// behind the last checkpoint, however much was written before.
func TestP9OpeningReadsWhatChanged(t *testing.T) { overStores(t, testP9OpeningReadsWhatChanged) }

func testP9OpeningReadsWhatChanged(t *testing.T, k storeKind) {
	ctx := context.Background()
	rng := rand.New(rand.NewPCG(1, 1))
	for _, before := range []int{1, 20, 100} {
		r := newStillRig(t, k, rng, 2048, 8).create()
		for range before {
			first, n := span(rng, 0, 1500, 400)
			r.must(r.write(first, n, 0))
		}
		r.must(r.vol.Checkpoint(ctx))
		const after = 300
		r.must(r.write(0, after, 0))
		r.must(r.flush())
		// Each SCO adds a record of its own, and the scrubber may have been at work.
		most := after + 8 + r.vol.Stats().ScrubbedBytes/cluster
		r.crash().reopen()
		if n := r.vol.Stats().ReplayedRecords; n < after || n > most {
			t.Errorf("%d records were replayed after %d requests and %d clusters behind the checkpoint", n, before, after)
		}
		r.verify("P1", func(*effect) bool { return true })
		r.close()
		r.reopen()
		if n := r.vol.Stats().ReplayedRecords; n != 0 {
			t.Errorf("%d records were replayed after a clean end", n)
		}
		r.verify("P1", func(*effect) bool { return true })
		r.close()
	}
}

// TestP10StoreAlone: with the host's disk lost, what the store has of a volume
// that was closed and published opens elsewhere.
func TestP10StoreAlone(t *testing.T) { overStores(t, testP10StoreAlone) }

func testP10StoreAlone(t *testing.T, k storeKind) {
	ctx := context.Background()
	r := newStillRig(t, k, rand.New(rand.NewPCG(2, 2)), 2048, 8).create()
	for i := range uint64(5) {
		r.must(r.write(i*300, 400, 0))
		r.must(r.discard(i*200, 30))
		if i == 2 {
			r.must(r.vol.Checkpoint(ctx))
			r.vol.WaitSealed()
			_, err := r.vol.Publish(ctx)
			r.must(err)
		}
	}
	r.must(r.vol.Checkpoint(ctx)) // closes the head; its root is not published
	if !r.vol.WaitSealed() {
		t.Fatal("not everything is uploaded")
	}
	r.must(r.fs.RemoveAll("data/volumes"))
	r.boot++
	r.kill().reopen()
	r.verify("P10", func(*effect) bool { return true })
	r.check()
	r.close()
}
