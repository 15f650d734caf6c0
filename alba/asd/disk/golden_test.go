package disk

import (
	"bytes"
	"encoding/hex"
	"flag"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"scoria/alba/asd"
	"scoria/alba/asd/asdtest"
	"scoria/alba/vfs"

	"github.com/google/uuid"
)

var update = flag.Bool("update", false, "write the golden files anew")

func golden(t *testing.T, name string, got []byte) {
	t.Helper()
	file := filepath.Join("testdata", name)
	if *update {
		must(t, os.WriteFile(file, []byte(hex.Dump(got)), 0o644))
	}
	want, err := os.ReadFile(file)
	must(t, err)
	if hex.Dump(got) != string(want) {
		t.Fatalf("%s: the format has changed:\n%s", name, hex.Dump(got))
	}
}

var goldenID = uuid.MustParse("6b7d1a8e-3f0a-4d39-9a51-0c8f6fb0c7d1")

func TestGoldenFormats(t *testing.T) {
	v := asd.NewValueBlocks([]byte(strings.Repeat("golden value ", 100)), 512)
	golden(t, "valuefile.hex", append(encodeFileHead(0x1234, "golden/key", &v, v.Sum()), v.Data...))
	golden(t, "record-inline.hex", encodeInline(&v, v.Sum()))
	golden(t, "record-file.hex", encodeFile(&v, v.Sum(), 0x1234))
	golden(t, "record-adopted.hex", encodeAdopted(&asd.FilePart{Key: "k", Off: 8192, Size: 5000, CRCs: []uint32{0x11223344, 0x55667788}}, 0x1234))
	m := meta{id: goldenID, keys: 3, bytes: 4, fileBytes: 5, reserved: 6}
	golden(t, "state.hex", m.encode())
	b, err := encodeIdentity(goldenID)
	must(t, err)
	golden(t, "identity.hex", b)
	if id, err := decodeIdentity("identity", b); err != nil || id != goldenID {
		t.Fatal(id, err)
	}
	if got, err := decodeMeta(m.encode()); err != nil || got != m {
		t.Fatal(got, err)
	}
	h, err := decodeFileHead(encodeFileHead(0x1234, "golden/key", &v, v.Sum()))
	if err != nil || h.key != "golden/key" || h.id != 0x1234 || h.size != int64(len(v.Data)) || asd.SumOf(h.size, h.blockSize, h.crcs) != v.Sum() {
		t.Fatalf("%+v, %v", h, err)
	}
}

// goldenContents is what testdata/v1 holds.
func goldenContents(t *testing.T, c asd.Client) {
	for _, us := range [][]asd.Update{
		{asd.Put("small", asd.NewValue([]byte("small value"))), asd.Put("large", asd.NewValue(bytes.Repeat([]byte("large value "), 2000)))},
		{asd.Put("gone", asd.NewValue(make([]byte, 20_000))), asd.RaiseEpoch("volume", 7)},
		{asd.Delete("gone"), asd.Put("blocks", asd.NewValueBlocks(bytes.Repeat([]byte{1, 2, 3}, 6000), 4112))},
	} {
		must(t, c.Apply(background, nil, us, guest))
	}
}

// TestGoldenDirectory: an ASD that the first version wrote opens in this one.
func TestGoldenDirectory(t *testing.T) {
	const dir = "testdata/v1"
	if *update {
		must(t, os.RemoveAll(dir))
		d := open(t, vfs.OS(), dir, testOptions)
		goldenContents(t, d)
		must(t, d.Close())
		must(t, open(t, vfs.OS(), dir, testOptions).Close()) // the log becomes a table
		must(t, os.Remove(dir+"/lock"))
		must(t, os.Remove(dir+"/kv/LOCK"))
	}
	fsys := vfs.NewMem()
	must(t, filepath.Walk(dir, func(name string, info os.FileInfo, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(dir, name)
		if err != nil {
			return err
		}
		to := filepath.ToSlash(filepath.Join("/asd", rel))
		if info.IsDir() {
			return fsys.MkdirAll(to)
		}
		b, err := os.ReadFile(name)
		if err != nil {
			return err
		}
		f, err := fsys.Open(to, vfs.Create)
		if err != nil {
			return err
		}
		if _, err := f.WriteAt(b, 0); err != nil {
			return err
		}
		return f.Close()
	}))
	m := asdtest.NewModel("m")
	goldenContents(t, m)
	checkAfterCrash(t, fsys, testOptions, m)
}

func FuzzDecode(f *testing.F) {
	v := asd.NewValueBlocks([]byte(strings.Repeat("golden value ", 100)), 512)
	f.Add(encodeFileHead(1, "key", &v, v.Sum()))
	f.Add(encodeInline(&v, v.Sum()))
	f.Add(encodeFile(&v, v.Sum(), 1))
	f.Add(encodeAdopted(&asd.FilePart{Key: "k", Off: 8192, Size: 5000, CRCs: []uint32{1, 2}}, 1))
	f.Add((&meta{}).encode())
	b, _ := encodeIdentity(goldenID)
	f.Add(b)
	for _, name := range []string{"testdata/v1/kv/000007.log", "testdata/v1/kv/MANIFEST-000006"} {
		b, err := os.ReadFile(name)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		if r, err := decodeRecord(b); err == nil && r.fileID == 0 && int64(len(r.data)) != r.size {
			t.Fatalf("%+v", r)
		}
		if h, err := decodeFileHead(b); err == nil && len(h.crcs) != asd.Blocks(h.size, h.blockSize) {
			t.Fatalf("%+v", h)
		}
		if m, err := decodeMeta(b); err == nil && !bytes.Equal(m.encode()[2:], b[2:]) {
			t.Fatalf("%+v", m)
		}
		_, _ = decodeIdentity("identity", b)
		if end, whole := walEnd(b, 7); whole < 0 || end < whole || end > int64(len(b)) {
			t.Fatalf("a log of %d bytes ends at %d, its records at %d", len(b), end, whole)
		}
		_, _, _ = walDamage(b, 7, len(b)%2 == 0)
		if good, err := better(b, nil); err != nil || !bytes.HasPrefix(b, good) {
			t.Fatalf("%q of a manifest %q: %v", good, b, err)
		}
	})
}
