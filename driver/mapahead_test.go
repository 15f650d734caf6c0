package driver_test

import (
	"math/rand/v2"
	"testing"

	"scoria/driver/lba"
)

// TestMapPagesAreReadAhead: the first request after an opening that meets a missing
// map page brings its neighbours in, so that the next ones do not wait; others stay
// on the disk.
func TestMapPagesAreReadAhead(t *testing.T) { overStores(t, testMapPagesAreReadAhead) }

func testMapPagesAreReadAhead(t *testing.T, k storeKind) {
	const leaves = 64
	r := newStillRig(t, k, rand.New(rand.NewPCG(1, 1)), leaves*lba.LeafClusters, 8)
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
	eventually(t, "the pages around a missing one have come in", func() bool {
		return r.vol.MapResident(0, leaves/2*lba.LeafClusters)
	})
	if r.vol.MapResident(leaves/2*lba.LeafClusters, leaves/2*lba.LeafClusters) {
		t.Error("pages far away came in as well")
	}
	r.check()
	r.close()
}
