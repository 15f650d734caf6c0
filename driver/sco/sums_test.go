package sco

import (
	"bytes"
	"errors"
	"io"
	"slices"
	"testing"

	"scoria/driver/tlog"
)

// countedReads notes which pages are read.
type countedReads struct {
	io.ReaderAt
	pages map[int64]bool
}

func (r countedReads) ReadAt(p []byte, off int64) (int, error) {
	for page := off / Page; page <= (off+int64(len(p))-1)/Page; page++ {
		r.pages[page] = true
	}
	return r.ReaderAt.ReadAt(p, off)
}

// TestPageSums: every page's checksum is right, that of a cluster nobody vouches for
// too, and the clusters that records vouch for are not read.
func TestPageSums(t *testing.T) {
	const clusters, void = 20, 7
	sealed, trailer, recs := buildSealed(&goldenHeader, clusters)
	crcs := make([]uint32, clusters)
	encoded := make([]byte, len(recs)*tlog.Size)
	for i := range recs {
		if recs[i].Type == tlog.Write && recs[i].Cluster == void {
			recs[i] = tlog.Record{Type: tlog.Void, Cluster: void}
		} else if recs[i].HasData() {
			crcs[recs[i].Cluster] = recs[i].DataCRC
		}
		tlog.Put(encoded[i*tlog.Size:], tlog.Key(goldenHeader.Volume, goldenHeader.Number), uint32(i), &recs[i])
	}
	_, footer := goldenHeader.Footer(clusters, uint32(len(recs)), encoded, crcs)
	sealed = append(sealed[:trailer.RecordOff], footer...)
	r := countedReads{bytes.NewReader(sealed), map[int64]bool{}}
	sums, err := PageSums(r, int64(len(sealed)))
	if err != nil || len(sums) != len(sealed)/Page {
		t.Fatalf("%d sums, %v", len(sums), err)
	}
	for i := range sums {
		if want := tlog.CRC(sealed[i*Page : (i+1)*Page]); sums[i] != want {
			t.Errorf("page %d: %08x, want %08x", i, sums[i], want)
		}
	}
	for c := range uint32(clusters) {
		if read := r.pages[DataOff(c)/Page]; read != (c == void) {
			t.Errorf("cluster %d was read: %v", c, read)
		}
	}
	if _, err := PageSums(bytes.NewReader(sealed[:len(sealed)-Page]), int64(len(sealed)-Page)); !errors.Is(err, ErrFormat) {
		t.Errorf("cut off: %v", err)
	}
}

// TestPageSumsCompacted: the same for a later generation, in which clusters lie
// elsewhere than their records say.
func TestPageSumsCompacted(t *testing.T) {
	const span = 20
	sealed, _, recs := buildSealed(&goldenHeader, span)
	kept := NewKept(span)
	h := goldenHeader
	h.Generation = 1
	out := h.Encode()
	left := recs[:1:1]
	var crcs []uint32
	for _, r := range recs {
		if r.HasData() && r.Cluster%3 == 1 {
			kept.Add(r.Cluster)
			left, crcs = append(left, r), append(crcs, r.DataCRC)
			out = append(out, sealed[DataOff(r.Cluster):DataOff(r.Cluster+1)]...)
		}
	}
	_, footer := h.CompactFooter(kept.Seal(), left, crcs)
	out = append(out, footer...)
	sums, err := PageSums(bytes.NewReader(out), int64(len(out)))
	if err != nil || len(sums) != len(out)/Page {
		t.Fatalf("%d sums, %v", len(sums), err)
	}
	for i := range sums {
		if want := tlog.CRC(out[i*Page : (i+1)*Page]); sums[i] != want {
			t.Errorf("page %d: %08x, want %08x", i, sums[i], want)
		}
	}
}

// TestSealedSums: what is computed from memory is what PageSums reads; a cluster without
// a checksum, a gap before the footer or a later generation leaves it to that.
func TestSealedSums(t *testing.T) {
	const clusters = 20
	sealed, trailer, recs := buildSealed(&goldenHeader, clusters)
	footer := sealed[trailer.RecordOff:]
	var crcs []uint32
	for i := range recs {
		if recs[i].HasData() {
			crcs = append(crcs, recs[i].DataCRC)
		}
	}
	want, err := PageSums(bytes.NewReader(sealed), int64(len(sealed)))
	if err != nil {
		t.Fatal(err)
	}
	if trailer.RecordOff != DataOff(clusters) {
		t.Fatalf("the records lie at %d: not the case that is tested", trailer.RecordOff)
	}
	if got := SealedSums(&goldenHeader, &trailer, crcs, footer); !slices.Equal(got, want) {
		t.Errorf("sums %x, want %x", got, want)
	}
	gap, later, unknown := trailer, trailer, slices.Clone(crcs)
	gap.RecordOff += Page
	later.Generation = 1
	unknown[7] = 0
	for name, sums := range map[string][]uint32{
		"a gap":              SealedSums(&goldenHeader, &gap, crcs, footer),
		"a later generation": SealedSums(&goldenHeader, &later, crcs, footer),
		"an unknown cluster": SealedSums(&goldenHeader, &trailer, unknown, footer),
	} {
		if sums != nil {
			t.Errorf("%s: %d sums", name, len(sums))
		}
	}
}
