package driver_test

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"testing"
	"time"

	"github.com/google/uuid"

	"scoria/alba/vfs"
	"scoria/driver"
	"scoria/driver/block"
)

const (
	goldenSnapshots = "testdata/datadir-2.tar.gz"
	goldenRegistry  = "data/z-registry.json" // behind what makes the directory
)

// goldenVolume is what a registry would know of a volume, and what it reads as.
type goldenVolume struct {
	ID        uuid.UUID
	Size      uint64
	Snapshots []driver.Snapshot
	Lines     map[string]map[uint64]string // by snapshot, "" is the volume: cluster to what fills it
}

func (g *goldenVolume) config(r *rig) driver.VolumeConfig {
	cfg := r.cfg
	cfg.ID, cfg.Size, cfg.Snapshots, cfg.Name = g.ID, g.Size, g.Snapshots, "default/"+g.ID.String()
	return cfg
}

func (g *goldenVolume) write(t *testing.T, v *driver.Volume, first, n uint64, what string) {
	t.Helper()
	var data []byte
	for c := first; c < first+n; c++ {
		line := fmt.Sprintf("%-11.11s %04d", what, c)
		g.Lines[""][c] = line
		data = append(data, bytes.Repeat([]byte(line), cluster/16)...)
	}
	if err := do(v, &block.Request{Op: block.OpWrite, Offset: first * cluster, Length: n * cluster, Segments: [][]byte{data}}); err != nil {
		t.Fatal(err)
	}
}

func (g *goldenVolume) snapshot(t *testing.T, v *driver.Volume, id byte, name string) {
	t.Helper()
	s, err := v.CreateSnapshot(context.Background(), uuid.UUID{id}, name, map[string]string{"of": "gold"})
	if err != nil {
		t.Fatal(err)
	}
	g.Snapshots = append(g.Snapshots, s)
	g.Lines[name] = map[uint64]string{}
	for c, line := range g.Lines[""] {
		g.Lines[name][c] = line
	}
}

// goldenFamily makes a volume with snapshots in the store and on the local disk
// only, one of them deleted, and a clone that was written to and has a snapshot.
func goldenFamily(t *testing.T) {
	r := newRig(t, directory, rand.New(rand.NewPCG(1, 1)), 1024, 8).create()
	ctx := context.Background()
	a := &goldenVolume{ID: r.cfg.ID, Size: r.cfg.Size, Lines: map[string]map[uint64]string{"": {}}}
	publish := func(v *driver.Volume) {
		v.WaitSealed()
		for range 3 {
			_, err := v.Publish(ctx)
			r.must(err)
		}
	}
	a.write(t, r.vol, 0, 60, "first")
	a.snapshot(t, r.vol, 1, "one")
	a.write(t, r.vol, 40, 60, "second")
	a.snapshot(t, r.vol, 2, "two")
	publish(r.vol)
	a.write(t, r.vol, 20, 30, "third")
	a.snapshot(t, r.vol, 3, "three")
	r.must(r.vol.DeleteSnapshot(ctx, a.Snapshots[1].ID))
	a.Snapshots = append(a.Snapshots[:1:1], a.Snapshots[2])
	b := &goldenVolume{ID: uuid.UUID{7, 2}, Size: r.cfg.Size + 1<<20, Lines: map[string]map[uint64]string{"": {}}}
	for c, line := range a.Lines["one"] {
		b.Lines[""][c] = line
	}
	r.must(r.eng.CreateClone(ctx, b.config(r), r.vol, a.Snapshots[0].ID))
	clone, err := r.eng.OpenVolume(ctx, b.config(r))
	r.must(err)
	b.write(t, clone, 10, 20, "cloned")
	b.snapshot(t, clone, 4, "four")
	b.write(t, clone, 1100, 10, "behind")
	a.write(t, r.vol, 0, 5, "fourth")
	for _, v := range []*driver.Volume{r.vol, clone} {
		r.must(do(v, &block.Request{Op: block.OpFlush}))
	}
	r.crash()
	text, err := json.Marshal([]*goldenVolume{a, b})
	r.must(err)
	f, err := r.fs.Open(goldenRegistry, vfs.Create)
	r.must(err)
	_, err = f.WriteAt(text, 0)
	r.must(err)
	r.must(f.Close())
	r.must(os.WriteFile(goldenSnapshots, packFiles(t, r.fs), 0o644))
}

// TestGoldenSnapshots: a data directory with snapshots and a clone, as an earlier
// version left it when the power went, opens, and all of them read back.
func TestGoldenSnapshots(t *testing.T) { overStores(t, testGoldenSnapshots) }

func testGoldenSnapshots(t *testing.T, k storeKind) {
	if *driver.UpdateGolden {
		goldenFamily(t)
	}
	packed, err := os.ReadFile(goldenSnapshots)
	if err != nil {
		t.Fatal(err)
	}
	r := newRig(t, k, rand.New(rand.NewPCG(1, 1)), 1024, 8)
	r.unpack(packed)
	f, err := r.fs.Open(goldenRegistry, vfs.ReadOnly)
	r.must(err)
	text, err := io.ReadAll(io.NewSectionReader(f, 0, 1<<20))
	r.must(err)
	var volumes []*goldenVolume
	r.must(json.Unmarshal(text, &volumes))
	ctx := context.Background()
	for range 2 {
		r.start()
		for _, g := range volumes {
			v, err := r.eng.OpenVolume(ctx, g.config(r))
			r.must(err)
			compareLines(t, v, g.Lines[""])
			if n := len(v.Snapshots()); n != len(g.Snapshots) {
				t.Errorf("%d snapshots, want %d", n, len(g.Snapshots))
			}
			for _, s := range g.Snapshots {
				view, err := v.OpenSnapshot(ctx, s.ID)
				r.must(err)
				if got := view.Snapshot(); got.Name != s.Name || !got.Created.Equal(s.Created) || time.Since(got.Created) < 0 {
					t.Errorf("snapshot %+v, want %+v", got, s)
				}
				compareLines(t, view, g.Lines[s.Name])
				r.must(view.Close())
			}
			rep, err := v.Check(ctx, nil)
			if err != nil || len(rep.Problems) > 0 {
				t.Fatalf("check: %v %q", err, rep.Problems)
			}
		}
		r.close()
	}
}

func compareLines(t *testing.T, dev block.Device, want map[uint64]string) {
	t.Helper()
	buf := make([]byte, cluster)
	for c := range dev.Info().Size / cluster {
		if err := do(dev, readOf(c, buf)); err != nil {
			t.Fatal(err)
		}
		expect := make([]byte, cluster)
		if line := want[c]; line != "" {
			expect = bytes.Repeat([]byte(line), cluster/16)
		}
		if !bytes.Equal(buf, expect) {
			t.Fatalf("%s: cluster %d reads %q, want %q", dev.Info().Name, c, buf[:16], expect[:16])
		}
	}
}
