package lba

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"hash/crc32"
	"io"
	"iter"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"github.com/google/uuid"
)

var update = flag.Bool("update", false, "rewrite the golden files")

var testVolume = uuid.MustParse("6ba7b810-9dad-11d1-80b4-00c04fd430c8")

// golden compares b with a file in testdata.
func golden(t *testing.T, name string, b []byte) {
	t.Helper()
	path := filepath.Join("testdata", name)
	if *update {
		if err := os.WriteFile(path, b, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(b, want) {
		t.Fatalf("%s: %d bytes that differ from the golden file's %d: the format changed without a new version", name, len(b), len(want))
	}
}

func testPage(leaf uint64) []byte {
	var page [LeafClusters]uint64
	for i := range page {
		if i%3 == 0 {
			page[i] = uint64(MakeLocation(leaf+1, uint32(i)))
		}
	}
	return bytes.Clone(heapBytes(&page))
}

func testObject(t testing.TB, number uint32, leaves ...uint64) []byte {
	b := NewPageObjectBuilder(testVolume)
	b.Reset(number)
	for i, leaf := range leaves {
		addr, err := b.Add(leaf, testPage(leaf))
		if err != nil {
			t.Fatal(err)
		}
		if addr != MakePageAddr(number, uint32(i)) {
			t.Fatalf("leaf %d at %v", leaf, addr)
		}
	}
	all, err := io.ReadAll(io.NewSectionReader(b, 0, b.Size()))
	if err != nil {
		t.Fatal(err)
	}
	return all
}

type pair struct {
	leaf uint64
	addr PageAddr
}

func testRoot(pairs ...pair) *Root {
	return &Root{
		Volume: testVolume, Sequence: 7, LogSCO: 1 << 33, LogRecord: 12345, Clusters: 1000 * LeafClusters,
		Mapped: uint64(len(pairs)) + 3, Blob: []byte("what the driver says"),
		Directory: func(yield func(uint64, PageAddr) bool) {
			for _, p := range pairs {
				if !yield(p.leaf, p.addr) {
					return
				}
			}
		},
	}
}

var testPairs = []pair{
	{0, MakePageAddr(1, 0)}, {1, MakePageAddr(1, 1)}, {2, MakePageAddr(1, 2)}, // a run
	{3, MakePageAddr(1, 2)},                          // the page before again: not a run
	{10, MakePageAddr(1, 3)},                         // a gap
	{11, MakePageAddr(4_000_000_000, 4_294_967_295)}, // the largest page …
	{12, MakePageAddr(4_000_000_001, 0)},             // … is no run with the next object
	{999, MakePageAddr(2, 500)},
}

func pairs(seq iter.Seq2[uint64, PageAddr]) (all []pair) {
	for leaf, addr := range seq {
		all = append(all, pair{leaf, addr})
	}
	return all
}

func encodeRoot(t testing.TB, r *Root) []byte {
	t.Helper()
	var buf bytes.Buffer
	if err := r.Encode(&buf); err != nil {
		t.Fatal(err)
	}
	return buf.Bytes()
}

func TestPageObject(t *testing.T) {
	b := testObject(t, 9, 0, 5, MaxLeaves-1)
	golden(t, "pages.v1", b)
	o, err := OpenPageObject(bytes.NewReader(b), int64(len(b)), testVolume, 9)
	if err != nil {
		t.Fatal(err)
	}
	page := make([]byte, PageBytes)
	for i, leaf := range []uint64{0, 5, MaxLeaves - 1} {
		if err := o.ReadPage(bytes.NewReader(b), uint32(i), page); err != nil {
			t.Fatal(err)
		}
		if o.Leaf(uint32(i)) != leaf || !bytes.Equal(page, testPage(leaf)) {
			t.Fatalf("page %d is not leaf %d's", i, leaf)
		}
	}
	if err := o.ReadPage(bytes.NewReader(b), 3, page); !errors.Is(err, ErrFormat) {
		t.Fatalf("page behind the end: %v", err)
	}
}

// TestPageObjectSums: the sums of an object's pages are those of its bytes, and all that is
// read for them is the header; one that has changed since it was opened is refused.
func TestPageObjectSums(t *testing.T) {
	const headerPages = 2
	leaves := make([]uint64, 600)
	for i := range leaves {
		leaves[i] = uint64(2 * i)
	}
	all := testObject(t, 9, leaves...)
	o, err := OpenPageObject(bytes.NewReader(all), int64(len(all)), testVolume, 9)
	if err != nil {
		t.Fatal(err)
	}
	sums, err := o.Sums(bytes.NewReader(all[:headerPages*PageBytes]))
	if err != nil {
		t.Fatal(err)
	}
	if len(sums)*PageBytes != len(all) {
		t.Fatalf("%d sums for %d bytes", len(sums), len(all))
	}
	for i, sum := range sums {
		if want := crc32.Checksum(all[i*PageBytes:][:PageBytes], castagnoli); sum != want {
			t.Errorf("page %d: sum %08x, its bytes have %08x", i, sum, want)
		}
	}
	all[pageHeaderBytes+5] ^= 1
	if _, err := o.Sums(bytes.NewReader(all)); !errors.Is(err, ErrChecksum) {
		t.Errorf("a header that has changed: %v", err)
	}
}

func TestPageObjectOfTheLargestSize(t *testing.T) {
	b := NewPageObjectBuilder(testVolume)
	for range 2 { // the second one in the memory of the first
		b.Reset(3)
		for !b.Full() {
			if _, err := b.Add(uint64(b.Len()), testPage(uint64(b.Len()))); err != nil {
				t.Fatal(err)
			}
		}
		o, err := OpenPageObject(b, b.Size(), testVolume, 3)
		if err != nil {
			t.Fatal(err)
		}
		page := make([]byte, PageBytes)
		if err := o.ReadPage(b, ObjectPages-1, page); err != nil || !bytes.Equal(page, testPage(ObjectPages-1)) {
			t.Fatalf("last page: %v", err)
		}
	}
}

// TestP5EveryFlippedBitOfAPageObjectIsNoticed flips each byte that carries
// something: reading all must fail.
func TestP5EveryFlippedBitOfAPageObjectIsNoticed(t *testing.T) {
	good := testObject(t, 9, 1, 2)
	for at := range good {
		if at >= pageHeaderBytes+2*pageIndexBytes && at < PageBytes {
			continue // padding
		}
		b := bytes.Clone(good)
		b[at] ^= 1 << (at % 8)
		if err := readObject(b, 9); !errors.Is(err, ErrFormat) {
			t.Fatalf("byte %d: %v", at, err)
		}
	}
	for n := range len(good) / 64 {
		if err := readObject(good[:n*64], 9); !errors.Is(err, ErrFormat) {
			t.Fatalf("%d bytes of %d: %v", n*64, len(good), err)
		}
	}
	if err := readObject(good, 8); !errors.Is(err, ErrFormat) {
		t.Fatalf("another object's number: %v", err)
	}
}

func readObject(b []byte, number uint32) error {
	o, err := OpenPageObject(bytes.NewReader(b), int64(len(b)), testVolume, number)
	if err != nil {
		return err
	}
	page := make([]byte, PageBytes)
	for i := range o.Pages() {
		if err := o.ReadPage(bytes.NewReader(b), uint32(i), page); err != nil {
			return err
		}
	}
	return nil
}

func TestRoot(t *testing.T) {
	root := testRoot(testPairs...)
	b := encodeRoot(t, root)
	golden(t, "root.v1", b)
	got, err := ReadRoot(bytes.NewReader(b), int64(len(b)))
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(encodeRoot(t, got), b) {
		t.Fatal("a decoded root encodes differently")
	}
	if p := pairs(got.Directory); len(p) != len(testPairs) {
		t.Fatalf("directory %v", p)
	} else {
		for i := range p {
			if p[i] != testPairs[i] {
				t.Fatalf("entry %d is %v, should be %v", i, p[i], testPairs[i])
			}
		}
	}
	if got.Volume != root.Volume || got.Sequence != 7 || got.LogSCO != 1<<33 || got.LogRecord != 12345 ||
		got.Clusters != root.Clusters || got.Mapped != root.Mapped || string(got.Blob) != string(root.Blob) {
		t.Fatalf("decoded %+v", got)
	}
	for range got.Directory {
		break // stops without trouble
	}
	empty := testRoot()
	empty.Mapped, empty.Blob = 0, nil
	if got, err := DecodeRoot(encodeRoot(t, empty)); err != nil || len(pairs(got.Directory)) != 0 {
		t.Fatalf("empty root: %v", err)
	}
}

func TestP5EveryFlippedBitOfARootIsNoticed(t *testing.T) {
	good := encodeRoot(t, testRoot(testPairs...))
	for at := range good {
		b := bytes.Clone(good)
		b[at] ^= 1 << (at % 8)
		if _, err := DecodeRoot(b); !errors.Is(err, ErrFormat) {
			t.Fatalf("byte %d: %v", at, err)
		}
		if _, err := ReadRoot(bytes.NewReader(good[:at]), int64(len(good))); !errors.Is(err, ErrFormat) {
			t.Fatalf("cut to %d bytes: %v", at, err)
		}
	}
}

func TestRootRefusesWhatContradictsItself(t *testing.T) {
	for name, spoil := range map[string]func(*Root){
		"descending":       func(r *Root) { r.Directory = testRoot(pair{2, 1 << 32}, pair{1, 1 << 32}).Directory },
		"twice":            func(r *Root) { r.Directory = testRoot(pair{2, 1 << 32}, pair{2, 1<<32 + 1}).Directory },
		"behind the end":   func(r *Root) { r.Directory = testRoot(pair{1000, 1 << 32}).Directory },
		"run over the end": func(r *Root) { r.Directory = testRoot(pair{999, 1 << 32}, pair{1000, 1<<32 + 1}).Directory },
		"object 0":         func(r *Root) { r.Directory = testRoot(pair{1, 5}).Directory },
		"too few mapped":   func(r *Root) { r.Mapped = 1 },
		"too many mapped":  func(r *Root) { r.Mapped = uint64(len(testPairs))*LeafClusters + 1 },
		"sequence":         func(r *Root) { r.Sequence = 0 },
		"clusters":         func(r *Root) { r.Clusters = MaxClusters + 1 },
		"no clusters":      func(r *Root) { r.Clusters = 0 },
	} {
		r := testRoot(testPairs...)
		spoil(r)
		if err := r.Encode(io.Discard); !errors.Is(err, ErrFormat) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

type failingWriter struct{}

var errDisk = errors.New("disk says no")

func (failingWriter) Write([]byte) (int, error) { return 0, errDisk }

func TestRootEncodeReportsTheWriter(t *testing.T) {
	if err := testRoot(testPairs...).Encode(failingWriter{}); !errors.Is(err, errDisk) {
		t.Fatal(err)
	}
}

// seal makes arbitrary bytes pass the checksum, so that the fuzzer gets behind it.
func seal(b []byte) []byte {
	b = bytes.Clone(b)
	if len(b) >= rootHeaderBytes {
		copy(b, rootMagic)
		le.PutUint32(b[8:], rootVersion)
	}
	return le.AppendUint32(b, crc32.Checksum(b, castagnoli))
}

func FuzzDecodeRoot(f *testing.F) {
	good := encodeRoot(f, testRoot(testPairs...))
	f.Add(good[:len(good)-4])
	f.Add(good[:80])
	f.Fuzz(func(t *testing.T, b []byte) {
		_, _ = DecodeRoot(b)
		r, err := DecodeRoot(seal(b))
		if err != nil {
			if !errors.Is(err, ErrFormat) {
				t.Fatal(err)
			}
			return
		}
		if r.Clusters > 1<<20 {
			return // a few bytes can stand for the largest volume; this costs time only
		}
		again, err := DecodeRoot(encodeRoot(t, r))
		if err != nil {
			t.Fatal(err)
		}
		m := newMap(t, r.Clusters)
		defer m.Close()
		if err := m.RestoreDirectory(again.Directory, again.Mapped); err != nil {
			t.Fatalf("a root that decodes can't be restored: %v", err)
		}
	})
}

func FuzzOpenPageObject(f *testing.F) {
	f.Add(testObject(f, 9, 1, 2, 3), true)
	f.Fuzz(func(t *testing.T, b []byte, sealed bool) {
		if n := len(b) / PageBytes; sealed && n >= 2 && pageObjectHeader(n-1) == PageBytes {
			b = bytes.Clone(b[:n*PageBytes])
			copy(b, testObject(t, 9, 1)[:32])
			le.PutUint32(b[32:], uint32(n-1))
			le.PutUint32(b[36:], headerCRC(b, b[pageHeaderBytes:pageHeaderBytes+(n-1)*pageIndexBytes]))
		}
		if err := readObject(b, 9); err != nil && !errors.Is(err, ErrFormat) {
			t.Fatal(err)
		}
	})
}

func TestObjectReader(t *testing.T) {
	objects := map[uint32][]byte{1: testObject(t, 1, 3, 4), 2: testObject(t, 2, 5)}
	opened := 0
	r := NewObjectReader(testVolume, func(_ context.Context, object uint32) (io.ReaderAt, int64, error) {
		opened++
		b, ok := objects[object]
		if !ok {
			return nil, 0, os.ErrNotExist
		}
		return bytes.NewReader(b), int64(len(b)), nil
	})
	ctx, page := context.Background(), make([]byte, PageBytes)
	read := func(object, index uint32) error { return r.ReadPage(ctx, MakePageAddr(object, index), page) }
	for range 3 {
		if err := errors.Join(read(1, 0), read(1, 1), read(2, 0)); err != nil {
			t.Fatal(err)
		}
	}
	if opened != 2 || !bytes.Equal(page, testPage(5)) {
		t.Fatalf("opened %d times", opened)
	}
	if err := read(3, 0); !errors.Is(err, os.ErrNotExist) {
		t.Fatal(err)
	}
	// A damaged copy is replaced behind the reader's back: it opens again.
	bad := bytes.Clone(objects[2])
	bad[len(bad)-1] ^= 1
	good := objects[2]
	objects[2] = bad
	r.Forget(2)
	if err := read(2, 0); !errors.Is(err, ErrChecksum) {
		t.Fatal(err)
	}
	_, _, _ = r.object(ctx, 2)
	objects[2] = good
	if err := read(2, 0); err != nil {
		t.Fatal(err)
	}
	stopped, cancel := context.WithCancel(ctx)
	cancel()
	if err := r.ReadPage(stopped, MakePageAddr(1, 0), page); !errors.Is(err, context.Canceled) {
		t.Fatal(err)
	}
}

func TestObjectReaderKeepsABoundedNumberOfHeaders(t *testing.T) {
	r := NewObjectReader(testVolume, func(_ context.Context, object uint32) (io.ReaderAt, int64, error) {
		b := testObject(t, object, 1)
		return bytes.NewReader(b), int64(len(b)), nil
	})
	page := make([]byte, PageBytes)
	for object := range uint32(maxOpenObjects + 50) {
		if err := r.ReadPage(context.Background(), MakePageAddr(object+1, 0), page); err != nil {
			t.Fatal(err)
		}
	}
	if len(r.objects) != maxOpenObjects {
		t.Fatalf("keeps %d headers", len(r.objects))
	}
}

// tebibyteRoot is the root of 1 TiB mapped; scattered puts each page elsewhere.
func tebibyteRoot(b *testing.B, scattered bool) []byte {
	const leaves = 1 << 40 / (LeafClusters * PageBytes)
	where := make([]PageAddr, leaves)
	for i := range where {
		where[i] = MakePageAddr(uint32(i/ObjectPages)+1, uint32(i%ObjectPages))
	}
	if scattered {
		rand.New(rand.NewPCG(3, 3)).Shuffle(leaves, func(i, j int) { where[i], where[j] = where[j], where[i] })
	}
	return encodeRoot(b, &Root{
		Volume: testVolume, Sequence: 1, Clusters: leaves * LeafClusters, Mapped: leaves * LeafClusters,
		Directory: func(yield func(uint64, PageAddr) bool) {
			for i, addr := range where {
				if !yield(uint64(i), addr) {
					return
				}
			}
		},
	})
}

func benchmarkRestore(b *testing.B, scattered bool) {
	root := tebibyteRoot(b, scattered)
	b.ReportMetric(float64(len(root)), "root-bytes")
	for b.Loop() {
		r, err := ReadRoot(bytes.NewReader(root), int64(len(root)))
		if err != nil {
			b.Fatal(err)
		}
		m, err := New(r.Clusters)
		if err != nil {
			b.Fatal(err)
		}
		if err := m.RestoreDirectory(r.Directory, r.Mapped); err != nil {
			b.Fatal(err)
		}
		m.Close()
	}
}

func BenchmarkRestore1TiB(b *testing.B)          { benchmarkRestore(b, false) }
func BenchmarkRestore1TiBScattered(b *testing.B) { benchmarkRestore(b, true) }
