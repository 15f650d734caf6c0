package driver_test

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path"
	"strings"
	"testing"

	"scoria/alba/vfs"
	"scoria/driver"
	"scoria/driver/block"
	"scoria/driver/dirstore"
)

const goldenDir = "testdata/datadir.tar.gz"

// goldenClusters is the size of the golden volume.
const goldenClusters = 2048

// goldenLife writes the golden volume, or only computes what it holds.
type goldenLife struct {
	r    *rig
	want map[uint64]string
}

func (g *goldenLife) write(first, n uint64, text string) {
	var data []byte
	for c := first; c < first+n; c++ {
		line := fmt.Sprintf("%-12s%04d", text, c)
		g.want[c] = line
		data = append(data, bytes.Repeat([]byte(line), cluster/16)...)
	}
	if g.r != nil {
		g.r.must(do(g.r.vol, &block.Request{Op: block.OpWrite, Offset: first * cluster, Length: n * cluster, Segments: [][]byte{data}}))
	}
}

func (g *goldenLife) discard(first, n uint64) {
	for c := first; c < first+n; c++ {
		delete(g.want, c)
	}
	if g.r != nil {
		g.r.must(do(g.r.vol, &block.Request{Op: block.OpDiscard, Offset: first * cluster, Length: n * cluster}))
	}
}

func (g *goldenLife) step(fn func(context.Context, *driver.Volume) error) {
	if g.r != nil {
		g.r.must(fn(context.Background(), g.r.vol))
	}
}

// live leaves sealed SCOs in the store, a published root, a later one that is
// only local, moved clusters, and a SCO that is flushed and open.
func (g *goldenLife) live() {
	seal := func(_ context.Context, v *driver.Volume) error { v.WaitSealed(); return nil }
	checkpoint := func(ctx context.Context, v *driver.Volume) error { return v.Checkpoint(ctx) }
	g.write(0, 160, "first")
	g.write(1500, 40, "far away")
	g.discard(20, 5)
	g.write(80, 110, "second")
	g.step(checkpoint)
	g.step(seal)
	g.step(func(ctx context.Context, v *driver.Volume) error { _, err := v.Publish(ctx); return err })
	g.step(func(ctx context.Context, v *driver.Volume) error { return v.ScrubAll(ctx) })
	g.write(50, 10, "third")
	g.step(checkpoint)
	g.step(seal)
	g.write(55, 10, "fourth")
	g.discard(1510, 3)
	g.write(2040, 8, "the end")
	g.step(func(_ context.Context, v *driver.Volume) error { return do(v, &block.Request{Op: block.OpFlush}) })
}

// TestGoldenDataDirectory: a data directory that an earlier version left when the
// power went opens, and the volume reads back.
func TestGoldenDataDirectory(t *testing.T) { overStores(t, testGoldenDataDirectory) }

func testGoldenDataDirectory(t *testing.T, k storeKind) {
	// What an earlier version wrote is not written anew.
	if _, err := os.Stat(goldenDir); *driver.UpdateGolden && err != nil {
		r := newRig(t, directory, rand.New(rand.NewPCG(1, 1)), goldenClusters, 8).create()
		(&goldenLife{r, map[uint64]string{}}).live()
		r.crash()
		if err := os.WriteFile(goldenDir, packFiles(t, r.fs), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	packed, err := os.ReadFile(goldenDir)
	if err != nil {
		t.Fatal(err)
	}
	if len(packed) > 64<<10 {
		t.Errorf("%s has %d bytes", goldenDir, len(packed))
	}
	r := newRig(t, k, rand.New(rand.NewPCG(1, 1)), goldenClusters, 8)
	r.unpack(packed)
	r.reopen()
	if n := r.vol.Stats().ReplayedRecords; n == 0 || n > 30 {
		t.Errorf("%d records were replayed", n)
	}
	want := &goldenLife{nil, map[uint64]string{}}
	want.live()
	for range 2 {
		buf := make([]byte, cluster)
		for c := range uint64(goldenClusters) {
			r.must(do(r.vol, &block.Request{Op: block.OpRead, Offset: c * cluster, Length: cluster, Segments: [][]byte{buf}}))
			expect := make([]byte, cluster)
			if line := want.want[c]; line != "" {
				expect = bytes.Repeat([]byte(line), cluster/16)
			}
			if !bytes.Equal(buf, expect) {
				t.Fatalf("cluster %d reads %q, want %q", c, buf[:16], expect[:16])
			}
		}
		r.check()
		r.close()
		r.reopen()
	}
	r.close()
}

// packFiles makes an archive of the data directory.
func packFiles(t *testing.T, fsys vfs.FS) []byte {
	t.Helper()
	var out bytes.Buffer
	z, _ := gzip.NewWriterLevel(&out, gzip.BestCompression)
	w := tar.NewWriter(z)
	var walk func(dir string)
	walk = func(dir string) {
		names, err := fsys.List(dir)
		if err != nil {
			t.Fatal(err)
		}
		for _, n := range names {
			name := path.Join(dir, n)
			info, err := fsys.Stat(name)
			if err != nil {
				t.Fatal(err)
			}
			switch {
			case n == ".tmp":
			case info.IsDir():
				if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: name + "/", Mode: 0o755}); err != nil {
					t.Fatal(err)
				}
				walk(name)
			default:
				f, err := fsys.Open(name, vfs.ReadOnly)
				if err != nil {
					t.Fatal(err)
				}
				b := make([]byte, info.Size())
				if _, err := f.ReadAt(b, 0); err != nil && err != io.EOF {
					t.Fatal(err)
				}
				f.Close()
				if err := w.WriteHeader(&tar.Header{Name: name, Mode: 0o644, Size: int64(len(b))}); err != nil {
					t.Fatal(err)
				}
				if _, err := w.Write(b); err != nil {
					t.Fatal(err)
				}
			}
		}
	}
	walk("data")
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	if err := z.Close(); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

// unpack makes the data directory of a volume in the directory store, and has what is in
// the store in the rig's own kind of store, where the same version would have put it.
func (r *rig) unpack(packed []byte) {
	r.t.Helper()
	unpackFiles(r.t, r.fs, packed)
	if r.stores.name == directory.name {
		return
	}
	ctx := context.Background()
	r.must(r.fs.Rename("data/store", "data/written"))
	from, err := dirstore.Open(r.fs, "data/written", dirstore.Options{})
	r.must(err)
	to, err := r.stores.open(r.fs)
	r.must(err)
	defer func() { r.must(to.Close()) }()
	namespaces, err := from.Namespaces(ctx)
	r.must(err)
	for _, ns := range namespaces {
		r.must(to.CreateNamespace(ctx, ns))
		r.must(to.Fence(ctx, ns, r.cfg.Epoch))
		names, err := from.List(ctx, ns, "")
		r.must(err)
		for _, name := range names {
			size, err := from.Size(ctx, ns, name)
			r.must(err)
			b := make([]byte, size)
			r.must(from.ReadAt(ctx, ns, name, b, 0))
			r.must(to.Put(ctx, ns, name, r.cfg.Epoch, driver.Object{Data: bytes.NewReader(b), Size: size}))
		}
	}
	r.must(r.fs.RemoveAll("data/written"))
}

func unpackFiles(t *testing.T, fsys vfs.FS, packed []byte) {
	t.Helper()
	z, err := gzip.NewReader(bytes.NewReader(packed))
	if err != nil {
		t.Fatal(err)
	}
	r := tar.NewReader(z)
	for {
		h, err := r.Next()
		if err == io.EOF {
			return
		}
		if err != nil {
			t.Fatal(err)
		}
		if h.Typeflag == tar.TypeDir {
			err = fsys.MkdirAll(strings.TrimSuffix(h.Name, "/"))
		} else {
			var f vfs.File
			if f, err = fsys.Open(h.Name, vfs.Create); err == nil {
				var b []byte
				if b, err = io.ReadAll(r); err == nil && len(b) > 0 {
					_, err = f.WriteAt(b, 0)
				}
				f.Close()
			}
		}
		if err != nil {
			t.Fatal(err)
		}
	}
}
