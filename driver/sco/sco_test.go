package sco

import (
	"bytes"
	"compress/gzip"
	"encoding/binary"
	"errors"
	"flag"
	"hash/crc32"
	"io"
	"os"
	"testing"

	"github.com/google/uuid"

	"scoria/driver/tlog"
)

var update = flag.Bool("update", false, "write the golden files anew")

var goldenHeader = Header{
	Volume: uuid.MustParse("00112233-4455-6677-8899-aabbccddeeff"), Number: 7, Epoch: 3,
	ClustersCap: 256, RecordsLimit: 1024,
}

// buildSealed makes a sealed SCO with clusters of data and a discard.
func buildSealed(h *Header, clusters uint32) ([]byte, Trailer, []tlog.Record) {
	key := tlog.Key(h.Volume, h.Number)
	recs := []tlog.Record{{Type: tlog.Open, LBA: h.Number - 1, Arg: 9, DataCRC: uint32(h.Epoch), Cluster: tlog.NoCluster}}
	crcs := make([]uint32, clusters)
	out := h.Encode()
	for c := range clusters {
		p := make([]byte, Page)
		for i := range p {
			p[i] = byte(c) + byte(i>>4)
		}
		out = append(out, p...)
		crcs[c] = tlog.CRC(p)
		recs = append(recs, tlog.Record{Type: tlog.Write, LBA: uint64(c) * 5, DataCRC: crcs[c], Durable: c, Cluster: c})
	}
	recs = append(recs, tlog.Record{Type: tlog.Discard, LBA: 1 << 20, Arg: 4096, Cluster: tlog.NoCluster})
	encoded := make([]byte, len(recs)*tlog.Size)
	for i := range recs {
		tlog.Put(encoded[i*tlog.Size:], key, uint32(i), &recs[i])
	}
	t, footer := h.Footer(clusters, uint32(len(recs)), encoded, crcs)
	out = append(out, make([]byte, t.RecordOff-int64(len(out)))...)
	return append(out, footer...), t, recs
}

// openSealed reads everything of a sealed SCO.
func openSealed(b []byte) (t Trailer, recs []tlog.Record, crcs []uint32, err error) {
	r := bytes.NewReader(b)
	if _, err = DecodeHeader(b[:min(len(b), Page)]); err != nil {
		return
	}
	if t, err = ReadTrailer(r, int64(len(b))); err != nil {
		return
	}
	if recs, err = t.ReadRecords(r); err != nil {
		return
	}
	crcs, err = t.ReadCRCs(r)
	return
}

func zipped(t *testing.T, b []byte) []byte {
	t.Helper()
	var z bytes.Buffer
	w := gzip.NewWriter(&z)
	if _, err := w.Write(b); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return z.Bytes()
}

// unzipped reads a golden file.
func unzipped(t *testing.T, name string) []byte {
	t.Helper()
	f, err := os.Open(name)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	z, err := gzip.NewReader(f)
	if err != nil {
		t.Fatal(err)
	}
	b, err := io.ReadAll(z)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// TestGolden: a sealed SCO is stored as the package doc draws it, and one that
// an earlier version wrote opens.
func TestGolden(t *testing.T) {
	const name = "testdata/sealed.sco.gz"
	sealed, trailer, recs := buildSealed(&goldenHeader, 5)
	if *update {
		if err := os.WriteFile(name, zipped(t, sealed), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want := unzipped(t, name)
	if !bytes.Equal(sealed, want) {
		t.Error("a sealed SCO is not stored as the golden file")
	}
	h, err := DecodeHeader(want[:Page])
	if err != nil || h != goldenHeader {
		t.Errorf("header %+v, %v; want %+v", h, err, goldenHeader)
	}
	got, gotRecs, crcs, err := openSealed(want)
	if err != nil || got != trailer || len(gotRecs) != len(recs) || len(crcs) != 5 {
		t.Fatalf("trailer %+v, %d records, %d CRCs, %v; want %+v and %d", got, len(gotRecs), len(crcs), err, trailer, len(recs))
	}
	for i := range recs {
		if gotRecs[i] != recs[i] {
			t.Errorf("record %d: %+v, want %+v", i, gotRecs[i], recs[i])
		}
		if r := &gotRecs[i]; r.HasData() && tlog.CRC(want[DataOff(r.Cluster):DataOff(r.Cluster+1)]) != crcs[r.Cluster] {
			t.Errorf("cluster %d fails its checksum", r.Cluster)
		}
	}
}

// TestSizes: a sealed SCO is shorter than an open one, and its footer never
// overlaps the place where an open one has its records unless it repeats them
// there.
func TestSizes(t *testing.T) {
	for _, h := range []Header{
		{ClustersCap: 256, RecordsLimit: 1024}, {ClustersCap: 16384, RecordsLimit: 32768}, {ClustersCap: 1, RecordsLimit: 1},
	} {
		for _, clusters := range []uint32{0, 1, h.ClustersCap / 2, h.ClustersCap - 1, h.ClustersCap} {
			for _, records := range []uint32{1, h.RecordsLimit / 2, h.RecordsLimit} {
				records = max(records, 1)
				tr, footer := h.Footer(clusters, records, make([]byte, records*tlog.Size), make([]uint32, clusters))
				switch end := tr.RecordOff + int64(len(footer)); {
				case end != tr.Size():
					t.Errorf("%+v, %d clusters, %d records: footer ends at %d, size is %d", h, clusters, records, end, tr.Size())
				case tr.Size() >= h.OpenSize():
					t.Errorf("%+v, %d clusters, %d records: sealed size %d, open size %d", h, clusters, records, tr.Size(), h.OpenSize())
				case tr.RecordOff < DataOff(clusters):
					t.Errorf("%+v, %d clusters, %d records: footer at %d overlaps the data", h, clusters, records, tr.RecordOff)
				case tr.RecordOff != h.RecordOff() && end > h.RecordOff():
					t.Errorf("%+v, %d clusters, %d records: footer ends at %d inside the open records", h, clusters, records, end)
				}
			}
		}
	}
}

// TestEveryByte: damage of any byte that carries meaning is noticed.
func TestEveryByte(t *testing.T) {
	sealed, tr, recs := buildSealed(&goldenHeader, 3)
	covered := [][2]int64{
		{0, headerLen},
		{tr.RecordOff, tr.RecordOff + int64(len(recs))*tlog.Size},
		{tr.CRCOff, tr.CRCOff + 12},
		{tr.Size() - Page, tr.Size() - Page + 76},
		{tr.Size() - Page + 80, tr.Size() - Page + trailerLen},
	}
	for _, c := range covered {
		for i := c[0]; i < c[1]; i++ {
			sealed[i] ^= 4
			if _, _, _, err := openSealed(sealed); !errors.Is(err, ErrFormat) {
				t.Errorf("byte %d is damaged: %v", i, err)
			}
			sealed[i] ^= 4
		}
	}
	for _, n := range []int{0, 1, Page, len(sealed) - Page, len(sealed) - 1} {
		if _, _, _, err := openSealed(sealed[:n]); !errors.Is(err, ErrFormat) {
			t.Errorf("cut to %d bytes: %v", n, err)
		}
	}
	later := append([]byte(nil), sealed...)
	binary.LittleEndian.PutUint32(later[8:], Version+1)
	binary.LittleEndian.PutUint32(later[52:], crc32.Checksum(later[:52], castagnoli))
	if _, err := DecodeHeader(later); !errors.Is(err, ErrFormat) {
		t.Errorf("a later version is read: %v", err)
	}
}

// FuzzDecodeHeader: any bytes are refused or are what encodes to them.
func FuzzDecodeHeader(f *testing.F) {
	f.Add(goldenHeader.Encode()[:headerLen])
	f.Add([]byte(headerMagic))
	f.Fuzz(func(t *testing.T, b []byte) {
		h, err := DecodeHeader(b)
		if err != nil {
			if !errors.Is(err, ErrFormat) {
				t.Fatal(err)
			}
			return
		}
		if !bytes.Equal(h.Encode()[:headerLen], b[:headerLen]) {
			t.Fatalf("%x is read as %+v", b[:headerLen], h)
		}
	})
}

// FuzzSealed: a file that is wrong in any way, but whose trailer has a right
// checksum, is refused or reads within its bounds.
func FuzzSealed(f *testing.F) {
	sealed, _, _ := buildSealed(&goldenHeader, 2)
	f.Add(sealed[len(sealed)-Page:len(sealed)-Page+trailerLen], uint8(len(sealed)/Page))
	f.Fuzz(func(t *testing.T, trailer []byte, pages uint8) {
		b := make([]byte, int(pages)*Page)
		copy(b, sealed)
		if len(b) >= Page {
			last := b[len(b)-Page:]
			clear(last)
			copy(last, trailer)
			binary.LittleEndian.PutUint32(last[80:], crc32.Checksum(last[:80], castagnoli))
		}
		tr, _, crcs, err := openSealed(b)
		if err != nil {
			if !errors.Is(err, ErrFormat) && !errors.Is(err, io.EOF) {
				t.Fatal(err)
			}
			return
		}
		if tr.Size() != int64(len(b)) || len(crcs) != int(tr.Clusters) || DataOff(tr.Clusters) > tr.RecordOff {
			t.Fatalf("%d bytes are read as %+v", len(b), tr)
		}
	})
}
