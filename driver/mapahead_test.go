package driver_test

import (
	"math/rand/v2"
	"testing"
	"time"

	"scoria/driver/lba"
)

// TestMapPagesAreReadAhead: the first request after an opening that meets a missing
// map page brings its neighbours in, so that the next ones do not wait; others stay
// on the disk.
func TestMapPagesAreReadAhead(t *testing.T) {
	const leaves = 64
	r := newRig(t, rand.New(rand.NewPCG(1, 1)), leaves*lba.LeafClusters, 8)
	r.create()
	for leaf := range uint64(leaves) {
		r.must(r.write(leaf*lba.LeafClusters, 1, 0))
	}
	r.close()
	r.reopen()
	if r.vol.MapResident(0, leaves*lba.LeafClusters) {
		t.Fatal("all map pages are there after an opening")
	}
	r.must(r.write(3*lba.LeafClusters, 1, 0))
	for end := time.Now().Add(time.Minute); !r.vol.MapResident(0, leaves/2*lba.LeafClusters); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("the pages around a missing one did not come in")
		}
	}
	if r.vol.MapResident(leaves/2*lba.LeafClusters, leaves/2*lba.LeafClusters) {
		t.Error("pages far away came in as well")
	}
	r.check()
	r.close()
}
