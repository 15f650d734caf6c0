package sco

import (
	"fmt"
	"io"

	"scoria/driver/tlog"
)

// PageSums returns the CRC32C of each page of a sealed SCO of size bytes. Those of
// clusters are the records': older than the file, and no cluster is read for them. What
// no record vouches for, that is header, footer and clusters that were reserved and
// never used, is read.
func PageSums(r io.ReaderAt, size int64) ([]uint32, error) {
	t, err := ReadTrailer(r, size)
	if err != nil {
		return nil, err
	}
	records, err := t.ReadRecords(r)
	if err != nil {
		return nil, err
	}
	var kept *Kept
	if t.Generation > 0 {
		if kept, err = t.ReadKept(r); err != nil {
			return nil, err
		}
	}
	sums := make([]uint32, size/Page)
	known := make([]bool, len(sums))
	for i := range records {
		rec := &records[i]
		if !rec.HasData() {
			continue
		}
		slot, ok := rec.Cluster, rec.Cluster < t.Clusters
		if kept != nil {
			slot, ok = kept.Slot(rec.Cluster)
		}
		if !ok {
			return nil, fmt.Errorf("SCO %d: record %d: %w: cluster %d is not among the %d", t.Number, i, ErrFormat, rec.Cluster, t.Clusters)
		}
		page := DataOff(slot) / Page
		sums[page], known[page] = rec.DataCRC, true
	}
	return sums, readSums(r, sums, known)
}

// SealedSums is PageSums from memory, of the SCO that begins with h and ends with the
// footer that belongs to t; crcs are its clusters'. A checksum of 0 stands for a cluster
// that is not known, as in the CRC table: then, or if there is a gap before the footer,
// it returns nil.
func SealedSums(h *Header, t *Trailer, crcs []uint32, footer []byte) []uint32 {
	if t.Generation > 0 || t.RecordOff != DataOff(t.Clusters) {
		return nil
	}
	sums := make([]uint32, 0, t.Size()/Page)
	sums = append(sums, tlog.CRC(h.Encode()))
	for _, c := range crcs[:t.Clusters] {
		if c == 0 {
			return nil
		}
		sums = append(sums, c)
	}
	for off := 0; off < len(footer); off += Page {
		sums = append(sums, tlog.CRC(footer[off:off+Page]))
	}
	return sums
}

// readSums computes the sums that are not known.
func readSums(r io.ReaderAt, sums []uint32, known []bool) error {
	const most = 256 // pages at a time
	buf := make([]byte, most*Page)
	for i := 0; i < len(sums); {
		if known[i] {
			i++
			continue
		}
		n := 1
		for n < most && i+n < len(sums) && !known[i+n] {
			n++
		}
		if _, err := r.ReadAt(buf[:n*Page], int64(i)*Page); err != nil {
			return fmt.Errorf("SCO: %d pages at %d: %w", n, int64(i)*Page, err)
		}
		for j := range n {
			sums[i+j] = tlog.CRC(buf[j*Page : (j+1)*Page])
		}
		i += n
	}
	return nil
}
