package driver_test

import (
	"bytes"
	"context"
	"math/rand/v2"
	"strings"
	"testing"

	"github.com/google/uuid"

	"scoria/driver/block"
)

// TestP5PagesOfARollbackStayInTheStore: a root from before a rollback that goes to the
// store after it does not take away the pages that the volume has gone back to, even
// when their snapshot is deleted by then and only the store has them.
func TestP5PagesOfARollbackStayInTheStore(t *testing.T) {
	overStores(t, testP5PagesOfARollbackStayInTheStore)
}

func testP5PagesOfARollbackStayInTheStore(t *testing.T, k storeKind) {
	r, m := moodyRig(t, k, rand.New(rand.NewPCG(1, 5)), 1024, 8)
	ctx := context.Background()
	const length = 64 * cluster
	fill := func(b byte) {
		t.Helper()
		for _, q := range []*block.Request{
			{Op: block.OpWrite, Length: length, Segments: [][]byte{bytes.Repeat([]byte{b}, length)}},
			{Op: block.OpFlush},
		} {
			r.must(result(t, q.Op.String(), outcome(r.vol, q)))
		}
	}
	snapshot := func(id byte) {
		t.Helper()
		s, err := r.vol.CreateSnapshot(ctx, uuid.UUID{id}, string('a'+rune(id)), nil)
		r.must(err)
		r.cfg.Snapshots = append(r.cfg.Snapshots, s)
	}
	fill(1)
	snapshot(1)
	first := r.stored("pages-")
	eventually(t, "the snapshot to be in the store", func() bool {
		first = r.stored("pages-")
		return len(r.stored("snap-")) == 1 && len(first) > 0
	})
	fill(2)
	snapshot(2)
	eventually(t, "its pages to be only there", func() bool {
		names, err := r.fs.List("data/volumes/" + r.cfg.ID.String() + "/map")
		return err == nil && len(r.stored("snap-")) == 2 && !strings.Contains(strings.Join(names, " "), first[0])
	})
	m.fail.Store(true)
	fill(3)
	snapshot(3) // the root that waits for the store
	r.must(r.vol.Rollback(ctx, uuid.UUID{1}, true))
	r.must(r.vol.DeleteSnapshot(ctx, uuid.UUID{1}))
	r.cfg.Snapshots = nil
	m.fail.Store(false)
	eventually(t, "the snapshots to be gone from the store", func() bool { return len(r.stored("snap-")) == 0 })
	got := make([]byte, length)
	r.must(result(t, "read", outcome(r.vol, &block.Request{Op: block.OpRead, Length: length, Segments: [][]byte{got}})))
	if !bytes.Equal(got, bytes.Repeat([]byte{1}, length)) {
		t.Fatalf("the volume begins with %d after a rollback to 1", got[0])
	}
	r.close()
}
