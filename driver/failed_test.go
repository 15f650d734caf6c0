package driver_test

import (
	"errors"
	"math/rand/v2"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"

	"scoria/alba/vfs"
	"scoria/driver/block"
)

// TestP8FailedVolumeDoesNotStarveOthers: a volume that has the whole write buffer
// when its sync fails gives it to the others, acknowledges no flush, and loses
// nothing, neither for reads nor for the next daemon.
func TestP8FailedVolumeDoesNotStarveOthers(t *testing.T) {
	forStores(t, raced(3, 1), 1, func(t *testing.T, k storeKind, rng *rand.Rand) {
		r := newRig(t, k, rng, 4096, 8).create()
		other := r.second("default/other")
		r.must(r.write(0, 10, 0))
		r.must(r.flush())
		var full, failed atomic.Bool // the disk takes no data; a sync has failed
		full.Store(true)
		id := r.cfg.ID.String()
		r.fs.SetHook(func(op vfs.Op, name string) error {
			mine := strings.Contains(name, id) && strings.HasSuffix(name, ".sco")
			switch {
			case mine && op == vfs.OpWrite && full.Load():
				return syscall.ENOSPC
			case mine && op == vfs.OpSync && !failed.Swap(true):
				return syscall.EIO
			}
			return nil
		})
		filling := make(chan error, 1)
		go func() {
			var err error
			for i := uint64(10); err == nil; i++ {
				err = r.write(i, 1, 0)
			}
			filling <- err
		}()
		eventually(t, "the write buffer to be full", func() bool { return r.has("write-buffer-full") })
		flush := make(chan error, 1)
		go func() { flush <- r.flush() }()
		full.Store(false)
		if err := <-flush; !errors.Is(err, block.ErrFailed) {
			t.Fatalf("flush: %v", err)
		}
		if err := result(t, "the write that waited", filling); !errors.Is(err, block.ErrFailed) {
			t.Fatalf("a write that waited: %v", err)
		}
		// Three times what the pool has.
		data := make([]byte, 64*cluster)
		for i := range uint64(96) {
			done := outcome(other, &block.Request{Op: block.OpWrite, Offset: i % 60 * 64 * cluster, Length: uint64(len(data)), Segments: [][]byte{data}})
			r.must(result(t, "a write to the other volume", done))
		}
		r.must(result(t, "a flush of the other volume", outcome(other, &block.Request{Op: block.OpFlush})))
		if err := r.flush(); !errors.Is(err, block.ErrFailed) {
			t.Fatalf("a later flush: %v", err)
		}
		// What was in the file alone when its sync failed may be lost, and only that;
		// reads say so. It is the same for the next daemon.
		lost := func() (n int) {
			for c := range uint64(len(r.history)) {
				switch err := r.read(c, 1); {
				case errors.Is(err, block.ErrCorrupt) && c >= 10:
					n++
				case err != nil:
					t.Fatalf("cluster %d: %v", c, err)
				}
			}
			return n
		}
		before := lost()
		r.kill().reopen()
		if after := lost(); after != before {
			t.Fatalf("%d clusters were lost with the sync, %d after a restart", before, after)
		}
		r.close()
	})
}
