package driver_test

import (
	"context"
	"encoding/json"
	"io"
	"math/rand/v2"
	"os"
	"testing"

	"scoria/alba/vfs"
	"scoria/driver"
	"scoria/driver/block"
)

const goldenCompacted = "testdata/datadir-3.tar.gz"

// goldenCompaction makes a volume with a snapshot, SCOs that were compacted and
// published, and others that were compacted and are named by no root yet.
func goldenCompaction(t *testing.T) {
	r := newStillRig(t, directory, rand.New(rand.NewPCG(1, 1)), 1024, 8).create()
	ctx := context.Background()
	g := &goldenVolume{ID: r.cfg.ID, Size: r.cfg.Size, Lines: map[string]map[uint64]string{"": {}}}
	for i, name := range []string{"one", "two"} {
		g.write(t, r.vol, 0, 120, "before "+name)
		g.write(t, r.vol, 20, 90, "again "+name)
		g.write(t, r.vol, 90, 3, "last "+name)
		g.snapshot(t, r.vol, byte(i+1), name)
		r.settle()
		r.must(r.vol.CompactAll(ctx))
		if i == 0 {
			r.settle()
		}
	}
	g.write(t, r.vol, 5, 50, "open")
	r.must(do(r.vol, &block.Request{Op: block.OpFlush}))
	r.crash()
	text, err := json.Marshal(g)
	r.must(err)
	f, err := r.fs.Open(goldenRegistry, vfs.Create)
	r.must(err)
	_, err = f.WriteAt(text, 0)
	r.must(err)
	r.must(f.Close())
	r.must(os.WriteFile(goldenCompacted, packFiles(t, r.fs), 0o644))
}

// TestGoldenCompactedVolume: a data directory with compacted SCOs, of which some roots
// know and some don't, as an earlier version left it when the power went, opens and
// reads back.
func TestGoldenCompactedVolume(t *testing.T) { overStores(t, testGoldenCompactedVolume) }

func testGoldenCompactedVolume(t *testing.T, k storeKind) {
	// What an earlier version wrote is not written anew.
	if _, err := os.Stat(goldenCompacted); *driver.UpdateGolden && err != nil {
		goldenCompaction(t)
	}
	packed, err := os.ReadFile(goldenCompacted)
	if err != nil {
		t.Fatal(err)
	}
	if len(packed) > 64<<10 {
		t.Errorf("%s has %d bytes", goldenCompacted, len(packed))
	}
	r := newStillRig(t, k, rand.New(rand.NewPCG(1, 1)), 1024, 8)
	r.unpack(packed)
	f, err := r.fs.Open(goldenRegistry, vfs.ReadOnly)
	r.must(err)
	text, err := io.ReadAll(io.NewSectionReader(f, 0, 1<<20))
	r.must(err)
	r.must(f.Close())
	var g goldenVolume
	r.must(json.Unmarshal(text, &g))
	ctx := context.Background()
	for range 2 {
		r.start()
		r.vol, err = r.eng.OpenVolume(ctx, g.config(r))
		r.must(err)
		compareLines(t, r.vol, g.Lines[""])
		for _, s := range g.Snapshots {
			view, err := r.vol.OpenSnapshot(ctx, s.ID)
			r.must(err)
			compareLines(t, view, g.Lines[s.Name])
			r.must(view.Close())
		}
		if len(r.compactedSCOs()) == 0 {
			t.Error("no SCO is compacted")
		}
		r.check()
		r.exact()
		r.check()
		r.close()
	}
}
