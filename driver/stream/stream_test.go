package stream_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"flag"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"

	"scoria/driver/stream"
)

var update = flag.Bool("update", false, "rewrite the golden files")

func sampleHeader() stream.Header {
	return stream.Header{
		Volume: "default/vm1", VolumeID: uuid.MustParse("6ba7b810-9dad-41d1-80b4-00c04fd430c8"), Size: 1 << 40, BlockSize: 512,
		Snapshot: stream.Snapshot{
			ID: uuid.MustParse("6ba7b811-9dad-41d1-80b4-00c04fd430c8"), Name: "monday",
			Created: time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC), Metadata: map[string]string{"by": "me"},
		},
		Base: &stream.Snapshot{ID: uuid.MustParse("6ba7b812-9dad-41d1-80b4-00c04fd430c8"), Name: "sunday"}, Start: 4096, DataBytes: 5000,
	}
}

// write makes a stream of extents, those without data being zeroes.
func write(t testing.TB, h stream.Header, extents []stream.Extent) []byte {
	t.Helper()
	var b bytes.Buffer
	w, err := stream.NewWriter(&b, h)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range extents {
		if e.Data != nil {
			err = w.Data(e.Offset, e.Data)
		} else {
			err = w.Zero(e.Offset, e.Length)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	if err := w.End(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func read(r io.Reader) (h stream.Header, extents []stream.Extent, err error) {
	s, err := stream.NewReader(r)
	if err != nil {
		return h, nil, err
	}
	for {
		e, err := s.Next()
		if err != nil {
			if errors.Is(err, io.EOF) {
				err = nil
			}
			return s.Header(), extents, err
		}
		e.Data = bytes.Clone(e.Data)
		extents = append(extents, e)
	}
}

func sampleExtents() []stream.Extent {
	return []stream.Extent{
		{Offset: 4096, Length: 4096, Data: bytes.Repeat([]byte{7}, 4096)},
		{Offset: 8192, Length: 1 << 39},
		{Offset: 1<<40 - 904, Length: 904, Data: bytes.Repeat([]byte{9}, 904)},
	}
}

func TestRoundTrip(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 2))
	for range 50 {
		h := sampleHeader()
		var in []stream.Extent
		at := h.Start
		for range rng.IntN(20) {
			at += uint64(rng.IntN(1 << 16))
			e := stream.Extent{Offset: at, Length: uint64(1 + rng.IntN(16<<10))}
			if rng.IntN(2) == 0 {
				e.Data = make([]byte, e.Length)
				for i := range e.Data {
					e.Data[i] = byte(rng.Uint32())
				}
			}
			in = append(in, e)
			at += e.Length
		}
		got, out, err := read(bytes.NewReader(write(t, h, in)))
		if err != nil || !reflect.DeepEqual(got, h) || !reflect.DeepEqual(out, in) {
			t.Fatalf("%d extents became %d, header %+v, %v", len(in), len(out), got, err)
		}
	}
}

// TestLargeDataIsCut: what is longer than a record goes into several.
func TestLargeDataIsCut(t *testing.T) {
	h := sampleHeader()
	data := bytes.Repeat([]byte{1, 2, 3}, stream.MaxData)
	_, out, err := read(bytes.NewReader(write(t, h, []stream.Extent{{Offset: 8192, Length: uint64(len(data)), Data: data}})))
	if err != nil || len(out) != 3 {
		t.Fatalf("%d records, %v; want 3", len(out), err)
	}
	var joined []byte
	for _, e := range out {
		if e.Offset != 8192+uint64(len(joined)) {
			t.Fatalf("a record at %d follows %d bytes", e.Offset, len(joined))
		}
		joined = append(joined, e.Data...)
	}
	if !bytes.Equal(joined, data) {
		t.Fatal("other bytes came back")
	}
}

// TestGolden holds version 1, as a file that an earlier program wrote.
func TestGolden(t *testing.T) {
	golden := filepath.Join("testdata", "stream_v1.bin")
	got := write(t, sampleHeader(), sampleExtents())
	if *update {
		if err := os.WriteFile(golden, got, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(golden)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Error("the same stream is written otherwise than before")
	}
	h, extents, err := read(bytes.NewReader(want))
	if err != nil || !reflect.DeepEqual(h, sampleHeader()) || !reflect.DeepEqual(extents, sampleExtents()) {
		t.Fatalf("read as %+v, %d extents, %v", h, len(extents), err)
	}
}

// TestDamageIsFound: no byte can change, and nothing can be missing, without the
// reader saying so.
func TestDamageIsFound(t *testing.T) {
	h := sampleHeader()
	h.Size = 1 << 20
	good := write(t, h, []stream.Extent{
		{Offset: 4096, Length: 3, Data: []byte("abc")}, {Offset: 8192, Length: 512}, {Offset: 12288, Length: 3, Data: []byte("def")},
	})
	for i := range good {
		bad := bytes.Clone(good)
		bad[i] ^= 0x40
		if _, _, err := read(bytes.NewReader(bad)); !errors.Is(err, stream.ErrFormat) && !errors.Is(err, stream.ErrVersion) && !errors.Is(err, stream.ErrTruncated) {
			t.Fatalf("byte %d changed: %v", i, err)
		}
	}
	for n := range good {
		if _, _, err := read(bytes.NewReader(good[:n])); !errors.Is(err, stream.ErrTruncated) {
			t.Fatalf("cut to %d bytes: %v; want ErrTruncated", n, err)
		}
	}
	// A whole record taken out: each one's checksum is right by itself.
	first := len(good) - 40 - 27 - 24 - 27
	for _, cut := range [][2]int{{first, first + 27}, {first + 27, first + 51}, {first + 51, first + 78}} {
		bad := append(bytes.Clone(good[:cut[0]]), good[cut[1]:]...)
		if _, _, err := read(bytes.NewReader(bad)); !errors.Is(err, stream.ErrFormat) {
			t.Fatalf("without bytes %v: %v; want ErrFormat", cut, err)
		}
	}
}

func TestWhatCantBeIsRefused(t *testing.T) {
	h := sampleHeader()
	h.Snapshot.ID = uuid.Nil
	if _, err := stream.NewWriter(io.Discard, h); err == nil {
		t.Error("a header without a snapshot is written")
	}
	h = sampleHeader()
	h.Snapshot.Metadata = map[string]string{"x": strings.Repeat("x", 1<<17)}
	if _, err := stream.NewWriter(io.Discard, h); err == nil || !strings.Contains(err.Error(), "metadata") {
		t.Errorf("an endless header: %v", err)
	}
	w, err := stream.NewWriter(io.Discard, sampleHeader())
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range []stream.Extent{{Offset: 0, Length: 4096}, {Offset: 1 << 40, Length: 1}, {Offset: 4096, Length: 1 << 63}} {
		if err := w.Zero(e.Offset, e.Length); !errors.Is(err, stream.ErrOrder) {
			t.Errorf("%d bytes at %d: %v; want ErrOrder", e.Length, e.Offset, err)
		}
	}
	later := write(t, sampleHeader(), nil)
	binary.LittleEndian.PutUint16(later[8:], 2)
	if _, _, err := read(bytes.NewReader(later)); !errors.Is(err, stream.ErrVersion) {
		t.Errorf("version 2: %v; want ErrVersion", err)
	}
}

// FuzzReader: any bytes are either refused or a stream that, written again, is
// read the same.
func FuzzReader(f *testing.F) {
	golden, err := os.ReadFile(filepath.Join("testdata", "stream_v1.bin"))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(golden)
	f.Add(golden[:40])
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, b []byte) {
		h, extents, err := read(bytes.NewReader(b))
		if err != nil {
			return
		}
		again, list, err := read(bytes.NewReader(write(t, h, extents)))
		if err != nil || !reflect.DeepEqual(again, h) || !reflect.DeepEqual(list, extents) {
			t.Fatalf("read again: %+v, %v; want %+v", again, err, h)
		}
	})
}

func BenchmarkStream(b *testing.B) {
	data := make([]byte, stream.MaxData)
	b.SetBytes(int64(len(data)))
	h := sampleHeader()
	h.Size = 1 << 50
	r, w := io.Pipe()
	go func() {
		s, err := stream.NewWriter(w, h)
		for i := 0; err == nil; i++ {
			err = s.Data(h.Start+uint64(i)*stream.MaxData, data)
		}
	}()
	s, err := stream.NewReader(r)
	if err != nil {
		b.Fatal(err)
	}
	for b.Loop() {
		if _, err := s.Next(); err != nil {
			b.Fatal(err)
		}
	}
	r.Close()
}
