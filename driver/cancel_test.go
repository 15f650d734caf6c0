package driver_test

import (
	"context"
	"errors"
	"math/rand/v2"
	"testing"
	"time"

	"scoria/driver/block"
)

// TestP8CancelFlushOnFullDisk: a flush that waits for room on the disk ends when
// its owner gives up, so that a dead front end's session can end too.
func TestP8CancelFlushOnFullDisk(t *testing.T) { overStores(t, testP8CancelFlushOnFullDisk) }

func testP8CancelFlushOnFullDisk(t *testing.T, k storeKind) {
	w := newWorld(t, k, rand.New(rand.NewPCG(1, 2)), 4<<20, 1<<20, 6<<20)
	if err := w.write(0, 64*cluster, false); err != nil {
		t.Fatal(err)
	}
	w.fs.SetCapacity(w.fs.Used() + 64<<10) // somebody takes the room that was promised to the write
	ended := make(chan error, 1)
	r := &block.Request{Op: block.OpFlush, Owner: "gone", Complete: func(r *block.Request) { ended <- r.Err }}
	w.vol.Submit([]*block.Request{r})
	if r.Ended {
		t.Fatalf("flush on a full disk ended at once: %v", r.Err)
	}
	w.vol.Cancel("somebody else")
	select {
	case err := <-ended:
		t.Fatalf("another owner's cancel ended it: %v", err)
	case <-time.After(50 * time.Millisecond):
	}
	w.vol.Cancel("gone")
	select {
	case err := <-ended:
		if !errors.Is(err, block.ErrCanceled) {
			t.Fatalf("ended with %v", err)
		}
	case <-time.After(2 * time.Minute):
		t.Fatal("cancel did not end the flush")
	}
	w.fs.SetCapacity(0)
	if err := w.flush(); err != nil {
		t.Fatal(err)
	}
	if err := w.eng.Close(context.Background()); err != nil {
		t.Fatal(err)
	}
}
