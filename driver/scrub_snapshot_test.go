package driver_test

import (
	"context"
	"errors"
	"math/rand/v2"
	"testing"

	"github.com/google/uuid"

	"scoria/driver"
	"scoria/driver/block"
)

// TestScrubberAndSnapshot: what the scrubber would move when a snapshot has come since it
// picked the SCO stays where it is: it has not changed since that snapshot, which reaches it.
func TestScrubberAndSnapshot(t *testing.T) { overStores(t, testScrubberAndSnapshot) }

func testScrubberAndSnapshot(t *testing.T, k storeKind) {
	ctx := context.Background()
	r := newStillRig(t, k, rand.New(rand.NewPCG(21, 1)), 1024, 8).create()
	size := uint64(len(r.history))
	r.must(r.write(0, size, 0))
	for c := uint64(0); c < size; c += 8 {
		r.must(r.write(c, 3, 0))
	}
	r.settle()
	empty, ok := r.vol.EmptyLater()
	if !ok {
		t.Fatal("no SCO has garbage")
	}
	s := r.snap("s")
	if err := empty(ctx); !errors.Is(err, driver.ErrSnapped) {
		t.Fatalf("emptied a SCO that a snapshot reaches: %v", err)
	}
	r.must(r.vol.Changes(ctx, s.ID, uuid.Nil, 0, size*cluster, func(e block.Extent) bool {
		if e.Mapped {
			t.Errorf("%d bytes at %d have changed since the snapshot", e.Length, e.Offset)
		}
		return true
	}))
	r.close()
}
