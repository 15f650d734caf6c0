package sco

import (
	"bytes"
	"encoding/binary"
	"errors"
	"hash/crc32"
	"io"
	"math/rand/v2"
	"os"
	"testing"

	"scoria/driver/tlog"
)

// compactedHeader is goldenHeader's SCO, compacted.
func compactedHeader() *Header {
	h := goldenHeader
	h.Generation = 3
	return &h
}

// buildCompacted keeps some clusters of a SCO that buildSealed made.
func buildCompacted(clusters []uint32, span uint32) ([]byte, Trailer, *Kept) {
	h := compactedHeader()
	sealed, _, all := buildSealed(&goldenHeader, span)
	kept := NewKept(span)
	for _, c := range clusters {
		kept.Add(c)
	}
	kept.Seal()
	out := h.Encode()
	records := all[:1:1]
	var crcs []uint32
	for i := range all {
		r := all[i]
		if r.HasData() && kept.Has(r.Cluster) {
			records = append(records, r)
			crcs = append(crcs, r.DataCRC)
			out = append(out, sealed[DataOff(r.Cluster):DataOff(r.Cluster+1)]...)
		}
	}
	t, footer := h.CompactFooter(kept, records, crcs)
	return append(out, footer...), t, kept
}

// TestGoldenCompacted: a compacted SCO is stored as the package doc draws it.
func TestGoldenCompacted(t *testing.T) {
	const name = "testdata/compacted.sco.gz"
	compacted, trailer, _ := buildCompacted([]uint32{1, 2, 70}, 71)
	if *update {
		if err := os.WriteFile(name, zipped(t, compacted), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want := unzipped(t, name)
	if !bytes.Equal(compacted, want) {
		t.Error("a compacted SCO is not stored as the golden file")
	}
	if h, err := DecodeHeader(want[:Page]); err != nil || h != *compactedHeader() {
		t.Errorf("header %+v, %v", h, err)
	}
	got, recs, crcs, err := openSealed(want)
	if err != nil || got != trailer || len(recs) != 4 || len(crcs) != 3 {
		t.Fatalf("trailer %+v, %d records, %d CRCs, %v; want %+v", got, len(recs), len(crcs), err, trailer)
	}
	kept, err := got.ReadKept(bytes.NewReader(want))
	if err != nil {
		t.Fatal(err)
	}
	for i, r := range recs {
		if i == 0 {
			if r.Type != tlog.Open {
				t.Errorf("record 0 is of type %d", r.Type)
			}
			continue
		}
		slot, ok := kept.Slot(r.Cluster)
		if !ok || tlog.CRC(want[DataOff(slot):DataOff(slot+1)]) != crcs[slot] || r.DataCRC != crcs[slot] {
			t.Errorf("cluster %d is at %d, %v, and not what it was", r.Cluster, slot, ok)
		}
	}
}

// TestKept: a set of clusters is what was put in, before and after it was stored, and
// the places are its order.
func TestKept(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 1))
	for _, span := range []uint32{1, 63, 64, 65, 256, 1000, 40000} {
		for _, part := range []int{0, 1, 10, 99, 100} {
			in := map[uint32]bool{}
			k := NewKept(span)
			for c := range span {
				if rng.IntN(100) < part {
					in[c] = true
				}
			}
			for c := range in {
				if !k.Add(c) || k.Add(c) {
					t.Fatalf("cluster %d can be put in other than once", c)
				}
			}
			if k.Add(span) {
				t.Error("a cluster behind the span can be put in")
			}
			b, crc := k.Seal().Encode()
			again, err := ReadKept(bytes.NewReader(b), 0, span, uint32(len(in)), crc)
			if err != nil || int64(len(b)) != KeptBytes(span) {
				t.Fatalf("span %d: %d bytes, %v", span, len(b), err)
			}
			for _, k := range []*Kept{k, again} {
				compareKept(t, k, in, span)
			}
			for _, wrong := range []func() (*Kept, error){
				func() (*Kept, error) { return ReadKept(bytes.NewReader(b), 0, span, uint32(len(in))+1, crc) },
				func() (*Kept, error) { return ReadKept(bytes.NewReader(b), 0, span, uint32(len(in)), crc+1) },
				func() (*Kept, error) { return ReadKept(bytes.NewReader(b), 0, 0, 0, crc) },
			} {
				if _, err := wrong(); !errors.Is(err, ErrFormat) {
					t.Errorf("span %d: a wrong table is read: %v", span, err)
				}
			}
		}
	}
	// A bit behind the span.
	b, _ := NewKept(70).Encode()
	b[9] = 0x80
	if _, err := ReadKept(bytes.NewReader(b), 0, 70, 1, crc32.Checksum(b, castagnoli)); !errors.Is(err, ErrFormat) {
		t.Errorf("a cluster behind the span is read: %v", err)
	}
}

func compareKept(t *testing.T, k *Kept, in map[uint32]bool, span uint32) {
	t.Helper()
	next := uint32(0)
	for c := range span + 70 {
		slot, ok := k.Slot(c)
		if ok != in[c] || k.Has(c) != ok || ok && slot != next {
			t.Fatalf("span %d: cluster %d is at %d, %v; want %d, %v", span, c, slot, ok, next, in[c])
		}
		if ok {
			next++
		}
	}
	if k.Len() != next || k.Span() != span {
		t.Fatalf("%d of %d clusters, want %d of %d", k.Len(), k.Span(), next, span)
	}
	total := uint32(0)
	for c := uint32(0); ; {
		first, n := k.Run(c, 5)
		if n == 0 {
			break
		}
		for i := first; i < first+n; i++ {
			if !in[i] {
				t.Fatalf("run %d+%d has cluster %d", first, n, i)
			}
		}
		total += n
		c = first + n
	}
	if total != next {
		t.Fatalf("runs have %d clusters, want %d", total, next)
	}
}

// TestEveryByteCompacted: damage of any byte that carries meaning is noticed.
func TestEveryByteCompacted(t *testing.T) {
	b, tr, _ := buildCompacted([]uint32{0, 5, 64, 65}, 66)
	open := func(b []byte) error {
		tr, _, _, err := openSealed(b)
		if err == nil {
			_, err = tr.ReadKept(bytes.NewReader(b))
		}
		return err
	}
	if err := open(b); err != nil {
		t.Fatal(err)
	}
	for _, c := range [][2]int64{
		{0, headerLen2},
		{tr.RecordOff, tr.RecordOff + int64(tr.Records)*tlog.Size},
		{tr.CRCOff, tr.CRCOff + 16},
		{tr.KeptOff(), tr.KeptOff() + KeptBytes(tr.Span)},
		{tr.Size() - Page, tr.Size() - Page + trailerLen2},
	} {
		for i := c[0]; i < c[1]; i++ {
			b[i] ^= 4
			if err := open(b); !errors.Is(err, ErrFormat) {
				t.Errorf("byte %d is damaged: %v", i, err)
			}
			b[i] ^= 4
		}
	}
}

// FuzzCompacted: a compacted SCO whose trailer and table of kept clusters hold
// anything, with right checksums, is refused or reads within its bounds.
func FuzzCompacted(f *testing.F) {
	b, tr, _ := buildCompacted([]uint32{0, 5, 64, 65}, 66)
	f.Add(b[len(b)-Page:len(b)-Page+trailerLen2], b[tr.KeptOff():tr.KeptOff()+16], uint8(len(b)/Page))
	f.Add(b[len(b)-Page:len(b)-Page+trailerLen2], []byte{255, 255}, uint8(len(b)/Page))
	f.Fuzz(func(t *testing.T, trailer, table []byte, pages uint8) {
		out := make([]byte, int(pages)*Page)
		copy(out, b)
		if len(out) >= 2*Page {
			last := out[len(out)-Page:]
			clear(last)
			copy(last, trailer)
			binary.LittleEndian.PutUint32(last[8:], 2)
			kept := out[len(out)-2*Page : len(out)-Page] // the table of a small one
			clear(kept)
			copy(kept, table)
			binary.LittleEndian.PutUint32(last[84:], crc32.Checksum(kept, castagnoli))
			binary.LittleEndian.PutUint32(last[88:], crc32.Checksum(last[:88], castagnoli))
		}
		tr, _, _, err := openSealed(out)
		var kept *Kept
		if err == nil && tr.Generation > 0 {
			kept, err = tr.ReadKept(bytes.NewReader(out))
		}
		if err != nil {
			if !errors.Is(err, ErrFormat) && !errors.Is(err, io.EOF) {
				t.Fatal(err)
			}
			return
		}
		for c := uint32(0); kept != nil && c < tr.Span+1; c++ {
			if slot, ok := kept.Slot(c); ok && (slot >= tr.Clusters || c >= tr.Span) {
				t.Fatalf("%+v: cluster %d is at %d", tr, c, slot)
			}
		}
	})
}

// BenchmarkSlot is what finding a cluster in a compacted SCO costs.
func BenchmarkSlot(b *testing.B) {
	k := NewKept(16384)
	for c := uint32(0); c < 16384; c += 3 {
		k.Add(c)
	}
	k.Seal()
	sum := uint32(0)
	for i := range b.N {
		slot, _ := k.Slot(uint32(i) * 3 % 16384)
		sum += slot
	}
	if sum == 1 {
		b.Log(sum)
	}
}
