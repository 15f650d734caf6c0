package erasure_test

import (
	"bytes"
	"encoding/hex"
	"errors"
	"flag"
	"fmt"
	"hash/crc32"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"scoria/alba"
	"scoria/alba/erasure"
)

var update = flag.Bool("update", false, "write the golden files anew")

func never() error { return nil }

// source returns n bytes of which about half compress.
func source(seed uint64, n int) []byte {
	rng := rand.New(rand.NewPCG(seed, 1))
	b := make([]byte, n)
	for i := 0; i < n; i += 8192 {
		for j := i; j < min(i+4096, n); j++ {
			b[j] = byte(rng.Uint32())
		}
	}
	return b
}

type stored struct {
	m      *alba.Manifest
	chunks [][][]byte
	key    []byte
}

func encode(t testing.TB, src io.ReaderAt, size int64, k, m, fragment int, c alba.Compression, e alba.Encryption, upload alba.ID) (stored, error) {
	t.Helper()
	key := bytes.Repeat([]byte{7}, alba.KeyBytes)
	blocks, err := erasure.NewBlocks(c, e, key, upload)
	if err != nil {
		t.Fatal(err)
	}
	man := &alba.Manifest{Upload: upload, Size: size, Policy: alba.Policy{K: k, M: m}, Compression: c, Encryption: e,
		BlockBytes: alba.BlockBytes(c), FragmentBytes: alba.PlanFragment(erasure.MaxStored(c, e, size), k, fragment, alba.Unit(c, e))}
	enc, err := erasure.NewEncoder(src, size, man.Layout(), blocks)
	if err != nil {
		t.Fatal(err)
	}
	s := stored{m: man, key: key}
	for {
		c := new(erasure.Chunk)
		var ready [][]byte
		var end int64
		var last bool
		err := enc.Next(c, never, func(shard int) {
			if shard != len(ready) || shard > 0 && (c.End != end || c.Last != last) {
				t.Fatalf("fragment %d of %d is ready as number %d, end %d after %d, last %v after %v", shard, k+m, len(ready), c.End, end, c.Last, last)
			}
			ready, end, last = append(ready, bytes.Clone(c.Shards[shard])), c.End, c.Last
		})
		if errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) {
			break
		}
		if err != nil {
			return s, err
		}
		if c.Number != len(s.chunks) {
			t.Fatalf("chunk %d, want %d", c.Number, len(s.chunks))
		}
		// What was ready was final.
		if !slices.EqualFunc(ready, c.Shards, bytes.Equal) || c.End != end || c.Last != last || end != enc.Stored() || last != enc.Done() {
			t.Fatalf("chunk %d changed when it was ready: %d fragments of %d, end %d, then %d of %d, last %v, then %v of %v",
				c.Number, len(ready), len(c.Shards), end, c.End, enc.Stored(), last, c.Last, enc.Done())
		}
		s.chunks = append(s.chunks, c.Shards)
	}
	man.Stored = enc.Stored()
	l := man.Layout()
	if l.Chunks() != len(s.chunks) {
		t.Fatalf("%d chunks, the layout says %d", len(s.chunks), l.Chunks())
	}
	for i, c := range s.chunks {
		if len(c[0]) != l.FragmentLen(i) || len(c[0])%l.Unit != 0 {
			t.Fatalf("chunk %d has fragments of %d bytes, the layout says %d", i, len(c[0]), l.FragmentLen(i))
		}
	}
	return s, nil
}

func (s *stored) fetch(p []byte, off int64) error {
	if off < 0 || off+int64(len(p)) > s.m.Stored {
		return fmt.Errorf("fetch of %d bytes at %d of %d", len(p), off, s.m.Stored)
	}
	n := 0
	s.m.Layout().Pieces(off, len(p), func(pc alba.Piece) bool {
		n += copy(p[n:], s.chunks[pc.Chunk][pc.Shard][pc.Off:pc.Off+pc.Len])
		return true
	})
	if n != len(p) {
		return fmt.Errorf("pieces of %d bytes, want %d", n, len(p))
	}
	return nil
}

// TestP5RoundTrip: any range of any object comes back as it was, for every
// compression and encryption, also with m fragments lost.
func TestP5RoundTrip(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		k, m := rapid.IntRange(1, 6).Draw(rt, "k"), rapid.IntRange(0, 3).Draw(rt, "m")
		c := alba.Compression(rapid.IntRange(0, 2).Draw(rt, "compression"))
		e := alba.Encryption(rapid.IntRange(0, 1).Draw(rt, "encryption"))
		size := rapid.IntRange(0, 600_000).Draw(rt, "size")
		b := source(rapid.Uint64().Draw(rt, "seed"), size)
		s, err := encode(t, bytes.NewReader(b), int64(size), k, m, alba.MinFragmentBytes, c, e, alba.NewID())
		if err != nil {
			rt.Fatal(err)
		}
		lose(rt, &s, k, m)
		o, err := erasure.NewObject(s.m, s.key)
		if err != nil {
			rt.Fatal(err)
		}
		for range 8 {
			off := rapid.IntRange(0, size).Draw(rt, "off")
			p := make([]byte, rapid.IntRange(0, size-off).Draw(rt, "len"))
			if err := o.ReadAt(p, int64(off), s.fetch); err != nil || !bytes.Equal(p, b[off:off+len(p)]) {
				rt.Fatalf("%d bytes at %d of %d: wrong, error %v", len(p), off, size, err)
			}
		}
		if err := o.ReadAt(make([]byte, 2), int64(size)-1, s.fetch); !errors.Is(err, io.ErrUnexpectedEOF) && size > 0 {
			rt.Fatalf("read beyond the end: %v", err)
		}
	})
}

// lose wipes up to m fragments of each chunk and reconstructs them.
func lose(rt *rapid.T, s *stored, k, m int) {
	codec, err := erasure.CodecFor(k, m)
	if err != nil {
		rt.Fatal(err)
	}
	for i := range s.chunks {
		have, want := make([]bool, k+m), make([]bool, k+m)
		for j := range have {
			have[j] = true
		}
		for range rapid.IntRange(0, m).Draw(rt, "lost") {
			j := rapid.IntRange(0, k+m-1).Draw(rt, "which")
			have[j], want[j] = false, true
			clear(s.chunks[i][j])
		}
		if err := codec.Reconstruct(s.chunks[i], have, want); err != nil {
			rt.Fatal(err)
		}
	}
}

// TestReconstructEveryCombination: every set of at most m lost fragments comes
// back, data and parity; one more is refused.
func TestReconstructEveryCombination(t *testing.T) {
	for k := 1; k <= 5; k++ {
		for m := 0; m <= 3; m++ {
			codec, err := erasure.CodecFor(k, m)
			if err != nil {
				t.Fatal(err)
			}
			full := make([][]byte, k+m)
			for i := range full {
				full[i] = make([]byte, 70_000)
				if i < k {
					copy(full[i], source(uint64(i+1), 70_000))
				}
			}
			if err := codec.Encode(full); err != nil {
				t.Fatal(err)
			}
			for mask := range 1 << (k + m) {
				have, want, lost := make([]bool, k+m), make([]bool, k+m), 0
				got := make([][]byte, k+m)
				for i := range got {
					have[i] = mask>>i&1 == 0
					want[i] = !have[i]
					if have[i] {
						got[i] = full[i]
					} else {
						got[i] = bytes.Repeat([]byte{0xee}, 70_000)
						lost++
					}
				}
				err := codec.Reconstruct(got, have, want)
				if lost > m {
					if !errors.Is(err, erasure.ErrTooFew) {
						t.Fatalf("(%d, %d), lost %b: %v", k, m, mask, err)
					}
					continue
				}
				for i := range got {
					if err != nil || !bytes.Equal(got[i], full[i]) {
						t.Fatalf("(%d, %d), lost %b: fragment %d is wrong: %v", k, m, mask, i, err)
					}
				}
			}
		}
	}
}

// TestPartialReadsStayPartial: reading 4 KiB fetches exactly 4 KiB, or 4 KiB and
// a tag, however large the object.
func TestPartialReadsStayPartial(t *testing.T) {
	b := source(3, 3<<20)
	for e, want := range []int{4096, 4112} {
		s, err := encode(t, bytes.NewReader(b), int64(len(b)), 4, 2, alba.MinFragmentBytes, alba.CompressNone, alba.Encryption(e), alba.NewID())
		if err != nil {
			t.Fatal(err)
		}
		o, err := erasure.NewObject(s.m, s.key)
		if err != nil {
			t.Fatal(err)
		}
		for off := int64(0); off < int64(len(b)); off += 4096 {
			fetched, pieces := 0, 0
			err := o.ReadAt(make([]byte, 4096), off, func(p []byte, at int64) error {
				fetched += len(p)
				s.m.Layout().Pieces(at, len(p), func(alba.Piece) bool { pieces++; return true })
				return s.fetch(p, at)
			})
			if err != nil || fetched != want || pieces != 1 {
				t.Fatalf("encryption %d: read at %d fetched %d bytes in %d pieces, want %d in 1: %v", e, off, fetched, pieces, want, err)
			}
		}
	}
}

// TestP5EncryptedDamageIsFound: no changed bit of an encrypted stream is taken for data.
func TestP5EncryptedDamageIsFound(t *testing.T) {
	b := source(5, 50_000)
	for c := range alba.Compression(3) {
		s, err := encode(t, bytes.NewReader(b), int64(len(b)), 2, 0, alba.MinFragmentBytes, c, alba.EncryptAES256GCM, alba.NewID())
		if err != nil {
			t.Fatal(err)
		}
		for at := int64(0); at < s.m.Stored; at += 97 {
			o, err := erasure.NewObject(s.m, s.key)
			if err != nil {
				t.Fatal(err)
			}
			p := make([]byte, len(b))
			err = o.ReadAt(p, 0, func(p []byte, off int64) error {
				err := s.fetch(p, off)
				if i := at - off; i >= 0 && i < int64(len(p)) {
					p[i] ^= 4
				}
				return err
			})
			if err == nil && !bytes.Equal(p, b) {
				t.Fatalf("%v: changed byte %d gave wrong data", c, at)
			}
		}
	}
}

// TestSourceErrors: a source that is short or fails ends the encoding.
func TestSourceErrors(t *testing.T) {
	b := source(1, 100_000)
	for c := range alba.Compression(3) {
		if _, err := encode(t, bytes.NewReader(b), int64(len(b))+1, 2, 1, alba.MinFragmentBytes, c, 0, alba.NewID()); !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Fatalf("short source: %v", err)
		}
	}
}

// TestGoldenVectors: layout, parity and encryption are what they were when the format
// was released. (Compressed bytes may differ between versions of a compressor;
// that they are read is what TestGoldenStreams holds.)
func TestGoldenVectors(t *testing.T) {
	var got strings.Builder
	b := source(42, 200_001)
	for c := range alba.Compression(1) {
		for e := range alba.Encryption(2) {
			for _, km := range [][2]int{{1, 0}, {1, 2}, {4, 2}, {8, 3}} {
				upload, err := alba.ParseID("000102030405060708090a0b0c0d0e0f")
				if err != nil {
					t.Fatal(err)
				}
				s, err := encode(t, bytes.NewReader(b), int64(len(b)), km[0], km[1], alba.MinFragmentBytes, c, e, upload)
				if err != nil {
					t.Fatal(err)
				}
				fmt.Fprintf(&got, "%v %v k=%d m=%d stored=%d", c, e, km[0], km[1], s.m.Stored)
				for _, chunk := range s.chunks {
					got.WriteString("\n ")
					for _, f := range chunk {
						fmt.Fprintf(&got, " %08x", crc32.Checksum(f, crc32.MakeTable(crc32.Castagnoli)))
					}
				}
				got.WriteString("\n")
			}
		}
	}
	golden(t, "vectors.txt", got.String())
}

// TestGoldenStreams reads streams that were stored when the format was released: an
// encoder may learn to compress otherwise, a decoder must read what there is.
func TestGoldenStreams(t *testing.T) {
	b := source(9, 40_000)
	for c := range alba.Compression(3) {
		for e := range alba.Encryption(2) {
			name := filepath.Join("testdata", fmt.Sprintf("stream-%v-%v.hex", c, e))
			upload, err := alba.ParseID("000102030405060708090a0b0c0d0e0f")
			if err != nil {
				t.Fatal(err)
			}
			if *update {
				s, err := encode(t, bytes.NewReader(b), int64(len(b)), 1, 0, alba.MinFragmentBytes, c, e, upload)
				if err != nil {
					t.Fatal(err)
				}
				text := hex.EncodeToString(s.chunks[0][0][:s.m.Stored])
				if err := os.WriteFile(name, []byte(text+"\n"), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			text, err := os.ReadFile(name)
			if err != nil {
				t.Fatal(err)
			}
			stream, err := hex.DecodeString(strings.TrimSpace(string(text)))
			if err != nil {
				t.Fatal(err)
			}
			m := &alba.Manifest{Upload: upload, Size: int64(len(b)), Stored: int64(len(stream)), Compression: c, Encryption: e, BlockBytes: alba.BlockBytes(c)}
			o, err := erasure.NewObject(m, bytes.Repeat([]byte{7}, alba.KeyBytes))
			if err != nil {
				t.Fatal(err)
			}
			p := make([]byte, len(b))
			err = o.ReadAt(p, 0, func(p []byte, off int64) error { copy(p, stream[off:]); return nil })
			if err != nil || !bytes.Equal(p, b) {
				t.Fatalf("%s: wrong bytes: %v", name, err)
			}
		}
	}
}

func golden(t *testing.T, name, got string) {
	t.Helper()
	name = filepath.Join("testdata", name)
	if *update {
		if err := os.WriteFile(name, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	if got != string(want) {
		t.Fatalf("%s differs; a change of a format needs a new version. Got:\n%s", name, got)
	}
}

// FuzzOpenStream: no stream, index or block makes a reader panic, take memory out of
// proportion or return more than was asked.
func FuzzOpenStream(f *testing.F) {
	b := source(9, 5000)
	for c := range alba.Compression(3) {
		s, err := encode(f, bytes.NewReader(b), int64(len(b)), 1, 0, alba.MinFragmentBytes, c, 0, alba.ID{1})
		if err != nil {
			f.Fatal(err)
		}
		f.Add(byte(c), int64(len(b)), s.chunks[0][0][:s.m.Stored], int64(0), 5000)
	}
	f.Fuzz(func(t *testing.T, c byte, size int64, stream []byte, off int64, n int) {
		if n < 0 || n > 1<<16 {
			return
		}
		comp := alba.Compression(c % 3)
		m := &alba.Manifest{Size: size, Stored: int64(len(stream)), Compression: comp, BlockBytes: alba.BlockBytes(comp)}
		o, err := erasure.NewObject(m, nil)
		if err != nil {
			return
		}
		_ = o.ReadAt(make([]byte, n), off, func(p []byte, off int64) error {
			if off < 0 || off+int64(len(p)) > int64(len(stream)) {
				return fmt.Errorf("fetch of %d at %d", len(p), off)
			}
			copy(p, stream[off:])
			return nil
		})
	})
}

func BenchmarkEncode(b *testing.B) {
	for _, km := range [][2]int{{4, 2}, {8, 3}, {16, 4}} {
		b.Run(fmt.Sprintf("%d+%d", km[0], km[1]), func(b *testing.B) {
			codec, err := erasure.CodecFor(km[0], km[1])
			if err != nil {
				b.Fatal(err)
			}
			shards := make([][]byte, km[0]+km[1])
			for i := range shards {
				shards[i] = source(uint64(i), 4<<20)
			}
			b.SetBytes(int64(km[0]) * 4 << 20)
			for b.Loop() {
				if err := codec.Encode(shards); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
