package driver_test

import (
	"context"
	"errors"
	"math/rand/v2"
	"strings"
	"syscall"
	"testing"
	"time"

	"scoria/alba/vfs"
	"scoria/driver"
)

// logFile says whether a file is of the log, not a compacted SCO.
func logFile(name string) bool {
	return strings.HasPrefix(name, "data/volumes/") && strings.HasSuffix(name, ".sco") && strings.Count(name, ".") == 1
}

// TestP8CompactionLeavesPromisedRoom: the room that is promised to what is in the write
// buffer is not taken by SCOs that are compacted meanwhile. Otherwise nothing could be
// flushed, nor go into the checkpoint for which the space of the old ones waits.
func TestP8CompactionLeavesPromisedRoom(t *testing.T) {
	overStores(t, testP8CompactionLeavesPromisedRoom)
}

func testP8CompactionLeavesPromisedRoom(t *testing.T, k storeKind) {
	const clusters = 4096
	ctx := context.Background()
	r := newStillRig(t, k, rand.New(rand.NewPCG(21, 1)), clusters, 64)
	r.reserve, r.cache = 4<<20, 1<<20
	r.create()
	snaps := garbled(r)
	slow, begun := make(chan struct{}), make(chan struct{}, 1)
	r.fs.SetHook(func(op vfs.Op, name string) error {
		if op == vfs.OpOpen && logFile(name) {
			select {
			case begun <- struct{}{}:
			default:
			}
			<-slow
		}
		return nil
	})
	const written = 12
	r.fs.SetCapacity(r.fs.Used() + r.reserve + (written+written/2+4)<<20)
	for first := range uint64(written) {
		r.must(r.write(first*256, 256, 0))
	}
	wait(t, "the log to be written out", begun)
	if err := r.vol.CompactAll(ctx); err != nil && !driver.IsNoRoom(err) && !errors.Is(err, syscall.ENOSPC) {
		t.Fatal(err)
	}
	flushed := make(chan error, 1)
	go func() { flushed <- r.flush() }()
	close(slow)
	r.must(func() error {
		for end := time.Now().Add(waitLimit); time.Now().Before(end); time.Sleep(time.Millisecond) {
			select {
			case err := <-flushed:
				return err
			default:
			}
			if r.has("disk-full") {
				t.Fatalf("the log has no room: %+v", r.vol.Stats().Conditions)
			}
		}
		t.Fatal("no flush ended")
		return nil
	}())
	r.fs.SetHook(nil)
	// As much as there is of it, all garbage is got rid of.
	r.settle()
	for range 20 {
		r.must(ignoreFull(r.vol.CompactAll(ctx)))
		r.settle()
	}
	r.exact()
	r.verify("P8", func(*effect) bool { return true })
	r.seesAll(snaps...)
	r.check()
	r.close()
}
