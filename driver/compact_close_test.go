package driver_test

import (
	"context"
	"errors"
	"math/rand/v2"
	"testing"
	"time"

	"scoria/driver"
)

// TestP8HangingPutOfACompactedSCODoesNotHoldUpTheEnd: a volume is closed at once while
// the store hangs with a compacted SCO of the housekeeping's; it does not wait for the
// put's own deadline. Nothing is lost, and the next opening goes on.
func TestP8HangingPutOfACompactedSCODoesNotHoldUpTheEnd(t *testing.T) {
	overStores(t, testP8HangingPutOfACompactedSCODoesNotHoldUpTheEnd)
}

func testP8HangingPutOfACompactedSCODoesNotHoldUpTheEnd(t *testing.T, k storeKind) {
	s := &liar{}
	r := newStillRig(t, k, rand.New(rand.NewPCG(9, 7)), 1024, 8)
	r.wrap = func(inner driver.Store) driver.Store {
		s.Store = copies{inner}
		return s
	}
	r.create()
	snaps := garbled(r)
	hung, ended := make(chan struct{}, 1), make(chan error, 1)
	s.on(func(ctx context.Context, name string) error {
		if !isGeneration(name) {
			return nil
		}
		hung <- struct{}{}
		<-ctx.Done()
		ended <- ctx.Err()
		return ctx.Err()
	}, nil)
	eventually(t, "a compaction that hangs", func() bool {
		r.vol.Tick(time.Now()) // does nothing while housekeeping runs
		return len(hung) > 0
	})
	closed := make(chan error, 1)
	go func() { closed <- r.vol.Close(context.Background()) }()
	if err := result(t, "close", closed); err != nil {
		t.Fatal(err)
	}
	if err := <-ended; !errors.Is(err, context.Canceled) {
		t.Fatalf("the put ended with %v: Close waited for its deadline", err)
	}
	s.on(nil, nil)
	r.mustOpen()
	r.seesAll(snaps...)
	r.verify("after it", func(*effect) bool { return true })
	r.exact()
	r.seesAll(snaps...)
	r.check()
	r.close()
}
