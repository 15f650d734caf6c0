package driver_test

import (
	"context"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
)

// mapFiles lists the roots and page objects on the local disk.
func (r *rig) mapFiles() []string {
	r.t.Helper()
	names, err := r.fs.List("data/volumes/" + r.cfg.ID.String() + "/map")
	r.must(err)
	slices.Sort(names)
	return names
}

func (r *rig) stored(prefix string) []string {
	r.t.Helper()
	names, err := r.cfg.Store.List(context.Background(), r.cfg.ID.String(), prefix)
	r.must(err)
	return names
}

// TestP10RootOfACleanStopReachesTheStore: the checkpoint that a clean stop, or the
// daemon's death, kept from the store gets there when the volume is open again,
// without another write; the store alone has the volume then.
func TestP10RootOfACleanStopReachesTheStore(t *testing.T) {
	overStores(t, testP10RootOfACleanStopReachesTheStore)
}

func testP10RootOfACleanStopReachesTheStore(t *testing.T, k storeKind) {
	for _, clean := range []bool{true, false} {
		r := newRig(t, k, rand.New(rand.NewPCG(3, 1)), 2048, 8).create()
		for range 4 {
			r.must(r.write(0, 512, 0)) // leaves dead SCOs behind
		}
		r.must(r.flush())
		if clean {
			r.close()
		} else {
			r.must(r.vol.Checkpoint(context.Background()))
			r.kill()
		}
		r.reopen()
		var root string
		for _, n := range r.mapFiles() {
			if strings.HasPrefix(n, "root-") {
				root = n // the newest
			}
		}
		eventually(t, "the root to be in the store", func() bool { return slices.Contains(r.stored("root-"), root) })
		r.check()
		r.close()
		r.must(r.fs.RemoveAll("data/volumes"))
		r.boot++ // the pool is gone, too
		r.reopen()
		r.verify("P10", func(*effect) bool { return true })
		r.close()
	}
}

// TestCloseOfAnUnchangedVolumeWritesNothing: stopping a thousand idle volumes must
// not cost a thousand checkpoints.
func TestCloseOfAnUnchangedVolumeWritesNothing(t *testing.T) {
	overStores(t, testCloseOfAnUnchangedVolumeWritesNothing)
}

func testCloseOfAnUnchangedVolumeWritesNothing(t *testing.T, k storeKind) {
	r := newStillRig(t, k, rand.New(rand.NewPCG(3, 2)), 1024, 8).create()
	r.close() // never written to
	if names := r.mapFiles(); len(names) > 0 {
		t.Fatalf("closing an empty volume wrote %q", names)
	}
	r.reopen()
	r.must(r.write(0, 100, 0))
	r.close()
	before := r.mapFiles()
	for range 3 {
		r.reopen()
		r.must(r.read(0, 100))
		r.close()
		if now := r.mapFiles(); !slices.Equal(now, before) {
			t.Fatalf("closing an unchanged volume made %q of %q", now, before)
		}
	}
}
