package driver_test

import (
	"context"
	"errors"
	"math/rand/v2"
	"testing"

	"scoria/driver"
	"scoria/driver/block"
)

// fenced checks that a volume whose owner was replaced says so and serves nothing.
func (r *rig) fenced() {
	r.t.Helper()
	eventually(r.t, "the volume notices that it was fenced", func() bool { return r.has("fenced") })
	if err := r.write(0, 1, 0); !errors.Is(err, block.ErrClosed) {
		r.t.Fatalf("write after fencing: %v", err)
	}
	if err := r.read(0, 1); !errors.Is(err, block.ErrClosed) {
		r.t.Fatalf("read after fencing: %v", err)
	}
	if err := r.flush(); !errors.Is(err, block.ErrClosed) {
		r.t.Fatalf("flush after fencing: %v", err)
	}
	if err := r.discard(0, 1); !errors.Is(err, block.ErrClosed) {
		r.t.Fatalf("discard after fencing: %v", err)
	}
}

// objects lists what the store has of the volume.
func (r *rig) objects() []string {
	r.t.Helper()
	names, err := r.cfg.Store.List(context.Background(), r.cfg.ID.String(), "")
	r.must(err)
	return names
}

// TestP4StaleOwner: once the store knows a newer epoch, uploads, publications
// and deletions of the old owner have no effect and end its service.
func TestP4StaleOwner(t *testing.T) { overStores(t, testP4StaleOwner) }

func testP4StaleOwner(t *testing.T, k storeKind) {
	ctx := context.Background()
	prepare := func(t *testing.T) *rig {
		r := newStillRig(t, k, rand.New(rand.NewPCG(1, 1)), 1024, 8).create()
		r.must(r.write(0, 600, 0))
		r.must(r.vol.Checkpoint(ctx))
		r.vol.WaitSealed()
		_, err := r.vol.Publish(ctx)
		r.must(err)
		return r
	}
	steal := func(r *rig) []string {
		r.must(r.cfg.Store.Fence(ctx, r.cfg.ID.String(), r.cfg.Epoch+1))
		return r.objects()
	}
	unchanged := func(r *rig, before []string) {
		r.t.Helper()
		after := r.objects()
		if len(after) != len(before) {
			r.t.Fatalf("the store has changed after fencing: %q, before %q", after, before)
		}
		for i := range after {
			if after[i] != before[i] {
				r.t.Fatalf("the store has changed after fencing: %q, before %q", after, before)
			}
		}
		r.close()
	}
	t.Run("upload", func(t *testing.T) {
		r := prepare(t)
		before := steal(r)
		r.must(r.write(0, 600, 0))
		r.fenced()
		unchanged(r, before)
	})
	t.Run("publish", func(t *testing.T) {
		r := prepare(t)
		r.must(r.write(0, 600, 0))
		r.must(r.vol.Checkpoint(ctx))
		r.vol.WaitSealed() // all that is left is the root and the deletions
		before := steal(r)
		if _, err := r.vol.Publish(ctx); !errors.Is(err, driver.ErrStaleEpoch) {
			t.Fatalf("publication after fencing: %v", err)
		}
		r.vol.Housekeep(ctx, 0)
		r.fenced()
		unchanged(r, before)
	})
	t.Run("reopen", func(t *testing.T) {
		r := prepare(t)
		r.must(r.write(0, 5, 0))
		r.close()
		r.start()
		steal(r)
		if err := r.tryOpen(); !errors.Is(err, driver.ErrStaleEpoch) {
			t.Fatalf("open with an old epoch: %v", err)
		}
		r.cfg.Epoch++
		r.mustOpen()
		r.verify("P1", func(*effect) bool { return true })
		r.close()
	})
}
