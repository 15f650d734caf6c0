// Package sco is the format of a Storage Container Object, as a file that grows
// and as the sealed object in the backend. It is pure: encoding, decoding and
// the arithmetic of offsets.
//
// # Layout
//
//	          0        4096                        RecordOff            CRCOff
//	          ├────────┼──────────────┬───────────┼───────────────────┬─────────────┬─────────┐
//	open      │ header │ clusters     │ (not yet) │ records, growing  │ (room)                │
//	          ├────────┼──────────────┴───────────┼───────────────────┼─────────────┼─────────┤
//	sealed    │ header │ clusters                 │ records           │ CRC table   │ trailer │
//	          ├────────┼───────────────┬──────────┴────────┬──────────┴──┬────────┬─┴───────┐
//	compacted │ header │ kept clusters │ records of these  │ CRC table   │ kept   │ trailer │
//	          └────────┴───────────────┴───────────────────┴─────────────┴────────┴─────────┘
//
// Everything begins at a multiple of 4096 bytes; little endian throughout. While
// the SCO is open the records lie behind room for all its clusters. A SCO that
// is sealed early gets its records, CRC table and trailer right behind its last
// cluster, unless they would overlap the place where they already are: a crash
// in the middle must still find the old ones. Readers go by the trailer.
//
// The CRC table repeats the CRC32C of each cluster, four bytes each, so that a
// partial read can be verified by reading one page more.
//
// A compacted SCO is a later generation of a sealed one, which it replaces. It holds
// the clusters that something still refers to, in the same order, and nothing
// between them. The table of kept clusters has one bit for each cluster below the
// span of the original, set if it is there: bit i%8 of byte i/8 for cluster i.
// Records go on naming clusters by the index that they have had from the beginning;
// a cluster lies at the place, from 0 on, that is the number of bits set before its
// own. Kept are the Open record and those with the data of kept clusters, numbered
// anew. Such a SCO stands for all that its records say only to those who do not
// replay it.
//
// header (4096 bytes): "SCORIASC", version u32, clusters capacity u32, volume
// UUID 16, SCO number u64, epoch u64, record capacity u32, in version 2 generation
// u32, CRC32C u32 of what precedes; rest zero.
//
// trailer (4096 bytes): "SCORIAEN", version u32, clusters u32, volume UUID 16,
// SCO number u64, epoch u64, records u32, CRC32C of the records u32, record
// offset u64, CRC table offset u64, CRC32C of the CRC table u32, generation u32, in
// version 2 span u32 and CRC32C of the table of kept clusters u32, CRC32C u32 of what
// precedes; rest zero.
//
// Version 2 is a compacted SCO's, version 1 that of all others (generation 0).
package sco

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"

	"github.com/google/uuid"

	"scoria/driver/tlog"
)

// Page is the alignment of everything in a SCO, and the size of a cluster, in bytes.
const Page = 4096

// Version of the format that this package writes for compacted SCOs; others have
// version 1. It reads both.
const Version = 2

// Limits of what decoders accept.
const (
	MaxClusters = 1 << 18 // 1 GiB of data
	MaxRecords  = 1 << 20
)

const (
	headerMagic  = "SCORIASC"
	trailerMagic = "SCORIAEN"
	headerLen    = 56
	headerLen2   = 60
	trailerLen   = 84
	trailerLen2  = 92
)

// ErrFormat: the bytes are not a header or trailer of this format.
var ErrFormat = errors.New("not a SCO")

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// Header begins every SCO.
type Header struct {
	Volume       uuid.UUID
	Number       uint64
	Epoch        uint64
	ClustersCap  uint32
	RecordsLimit uint32
	Generation   uint32 // 0 unless it is compacted
}

// Trailer ends a sealed SCO.
type Trailer struct {
	Volume     uuid.UUID
	Number     uint64
	Epoch      uint64
	Clusters   uint32
	Records    uint32
	RecordsCRC uint32
	CRCsCRC    uint32
	RecordOff  int64
	CRCOff     int64

	Generation uint32 // 0 unless it is compacted; then also:
	Span       uint32 // how many clusters it had before it was ever compacted
	KeptCRC    uint32 // of the table of kept clusters
}

// Size is the length in bytes of the sealed SCO.
func (t *Trailer) Size() int64 {
	if t.Generation > 0 {
		return t.KeptOff() + KeptBytes(t.Span) + Page
	}
	return t.CRCOff + CRCTableBytes(t.Clusters) + Page
}

// KeptOff is where a compacted SCO has the table of kept clusters.
func (t *Trailer) KeptOff() int64 { return t.CRCOff + CRCTableBytes(t.Clusters) }

// ReadKept reads and verifies the table of kept clusters of a compacted SCO.
func (t *Trailer) ReadKept(r io.ReaderAt) (*Kept, error) {
	k, err := ReadKept(r, t.KeptOff(), t.Span, t.Clusters, t.KeptCRC)
	if err != nil {
		return nil, fmt.Errorf("SCO %d: %w", t.Number, err)
	}
	return k, nil
}

// RoundUp rounds n up to whole pages.
func RoundUp(n int64) int64 { return (n + Page - 1) &^ (Page - 1) }

// DataOff is the offset of cluster index i.
func DataOff(i uint32) int64 { return Page * (1 + int64(i)) }

// RecordOff is where the records lie in an open SCO.
func (h *Header) RecordOff() int64 { return DataOff(h.ClustersCap) }

// OpenSize is the length of the file of an open SCO. It is longer than any sealed
// one of that capacity, so a trailer counts only after the truncation.
func (h *Header) OpenSize() int64 {
	return h.RecordOff() + RecordBytes(h.RecordsLimit) + CRCTableBytes(h.ClustersCap) + 2*Page
}

// RecordBytes is the room that n records take.
func RecordBytes(n uint32) int64 { return RoundUp(int64(n) * tlog.Size) }

// CRCTableBytes is the room that the CRC table of n clusters takes.
func CRCTableBytes(n uint32) int64 { return RoundUp(int64(n) * 4) }

// SealedRecordOff decides where a SCO that is sealed with that many clusters and
// records keeps its records.
func (h *Header) SealedRecordOff(clusters, records uint32) int64 {
	early := DataOff(clusters)
	if early+RecordBytes(records)+CRCTableBytes(clusters)+Page <= h.RecordOff() {
		return early
	}
	return h.RecordOff()
}

// Encode returns the header's page.
func (h *Header) Encode() []byte {
	b := make([]byte, Page)
	copy(b, headerMagic)
	le := binary.LittleEndian
	le.PutUint32(b[8:], version(h.Generation))
	le.PutUint32(b[12:], h.ClustersCap)
	copy(b[16:32], h.Volume[:])
	le.PutUint64(b[32:], h.Number)
	le.PutUint64(b[40:], h.Epoch)
	le.PutUint32(b[48:], h.RecordsLimit)
	if h.Generation > 0 {
		le.PutUint32(b[52:], h.Generation)
	}
	end := endOf(h.Generation, headerLen, headerLen2) - 4
	le.PutUint32(b[end:], crc32.Checksum(b[:end], castagnoli))
	return b
}

// version is that of the format of a generation.
func version(generation uint32) uint32 {
	if generation > 0 {
		return 2
	}
	return 1
}

// endOf picks by version: first unless the SCO is compacted.
func endOf(generation uint32, first, second int) int {
	if generation > 0 {
		return second
	}
	return first
}

// DecodeHeader verifies and decodes the first page of a SCO.
func DecodeHeader(b []byte) (h Header, err error) {
	le := binary.LittleEndian
	v, err := checkPage(b, headerMagic, headerLen, headerLen2)
	if err != nil {
		return h, fmt.Errorf("SCO header: %w", err)
	}
	h = Header{
		ClustersCap: le.Uint32(b[12:]), Number: le.Uint64(b[32:]),
		Epoch: le.Uint64(b[40:]), RecordsLimit: le.Uint32(b[48:]),
	}
	copy(h.Volume[:], b[16:32])
	if v == 2 {
		if h.Generation = le.Uint32(b[52:]); h.Generation == 0 {
			return h, fmt.Errorf("SCO header: %w: compacted, and of generation 0", ErrFormat)
		}
	}
	if h.ClustersCap == 0 || h.ClustersCap > MaxClusters || h.RecordsLimit == 0 || h.RecordsLimit > MaxRecords {
		return h, fmt.Errorf("SCO header: %w: room for %d clusters and %d records", ErrFormat, h.ClustersCap, h.RecordsLimit)
	}
	return h, nil
}

// checkPage verifies magic, version and checksum of a header or trailer, whose
// length with the checksum depends on the version.
func checkPage(b []byte, magic string, len1, len2 int) (version uint32, err error) {
	if len(b) < len1 || string(b[:8]) != magic {
		return 0, fmt.Errorf("%w: wrong magic", ErrFormat)
	}
	version = binary.LittleEndian.Uint32(b[8:])
	end := len1 - 4
	switch {
	case version == 0 || version > Version:
		return 0, fmt.Errorf("%w: version %d, this program reads up to %d", ErrFormat, version, Version)
	case version == 2 && len(b) < len2:
		return 0, fmt.Errorf("%w: it ends early", ErrFormat)
	case version == 2:
		end = len2 - 4
	}
	if crc32.Checksum(b[:end], castagnoli) != binary.LittleEndian.Uint32(b[end:]) {
		return 0, fmt.Errorf("%w: checksum", ErrFormat)
	}
	return version, nil
}

// Encode returns the trailer's page.
func (t *Trailer) Encode() []byte {
	b := make([]byte, Page)
	copy(b, trailerMagic)
	le := binary.LittleEndian
	le.PutUint32(b[8:], version(t.Generation))
	le.PutUint32(b[12:], t.Clusters)
	copy(b[16:32], t.Volume[:])
	le.PutUint64(b[32:], t.Number)
	le.PutUint64(b[40:], t.Epoch)
	le.PutUint32(b[48:], t.Records)
	le.PutUint32(b[52:], t.RecordsCRC)
	le.PutUint64(b[56:], uint64(t.RecordOff))
	le.PutUint64(b[64:], uint64(t.CRCOff))
	le.PutUint32(b[72:], t.CRCsCRC)
	le.PutUint32(b[76:], t.Generation)
	if t.Generation > 0 {
		le.PutUint32(b[80:], t.Span)
		le.PutUint32(b[84:], t.KeptCRC)
	}
	end := endOf(t.Generation, trailerLen, trailerLen2) - 4
	le.PutUint32(b[end:], crc32.Checksum(b[:end], castagnoli))
	return b
}

// DecodeTrailer verifies and decodes the last page of a sealed SCO of that size.
func DecodeTrailer(b []byte, size int64) (t Trailer, err error) {
	le := binary.LittleEndian
	v, err := checkPage(b, trailerMagic, trailerLen, trailerLen2)
	if err != nil {
		return t, fmt.Errorf("SCO trailer: %w", err)
	}
	t = Trailer{
		Clusters: le.Uint32(b[12:]), Number: le.Uint64(b[32:]), Epoch: le.Uint64(b[40:]),
		Records: le.Uint32(b[48:]), RecordsCRC: le.Uint32(b[52:]),
		RecordOff: int64(le.Uint64(b[56:])), CRCOff: int64(le.Uint64(b[64:])), CRCsCRC: le.Uint32(b[72:]),
	}
	copy(t.Volume[:], b[16:32])
	if v == 2 {
		t.Generation, t.Span, t.KeptCRC = le.Uint32(b[76:]), le.Uint32(b[80:]), le.Uint32(b[84:])
		if t.Generation == 0 || t.Span == 0 || t.Span > MaxClusters || t.Clusters > t.Span {
			return t, fmt.Errorf("SCO trailer: %w: generation %d, %d of %d clusters", ErrFormat, t.Generation, t.Clusters, t.Span)
		}
	}
	if t.Clusters > MaxClusters || t.Records == 0 || t.Records > MaxRecords ||
		t.RecordOff < DataOff(t.Clusters) || t.RecordOff > DataOff(MaxClusters) || t.RecordOff%Page != 0 ||
		t.CRCOff != t.RecordOff+RecordBytes(t.Records) || t.Size() != size {
		return t, fmt.Errorf("SCO trailer: %w: %d clusters, %d records at %d, size %d", ErrFormat, t.Clusters, t.Records, t.RecordOff, size)
	}
	return t, nil
}

// ReadTrailer reads the trailer of a sealed SCO of size bytes.
func ReadTrailer(r io.ReaderAt, size int64) (Trailer, error) {
	if size < 3*Page || size%Page != 0 {
		return Trailer{}, fmt.Errorf("SCO trailer: %w: size %d", ErrFormat, size)
	}
	b := make([]byte, Page)
	if _, err := r.ReadAt(b, size-Page); err != nil {
		return Trailer{}, fmt.Errorf("SCO trailer: %w", err)
	}
	return DecodeTrailer(b, size)
}

// ReadRecords reads and verifies all records of a sealed SCO.
func (t *Trailer) ReadRecords(r io.ReaderAt) ([]tlog.Record, error) {
	b := make([]byte, RecordBytes(t.Records))
	if _, err := r.ReadAt(b, t.RecordOff); err != nil {
		return nil, fmt.Errorf("SCO %d: records at %d: %w", t.Number, t.RecordOff, err)
	}
	b = b[:t.Records*tlog.Size]
	if crc32.Checksum(b, castagnoli) != t.RecordsCRC {
		return nil, fmt.Errorf("SCO %d: records: %w: checksum", t.Number, ErrFormat)
	}
	key := tlog.Key(t.Volume, t.Number)
	recs := make([]tlog.Record, t.Records)
	for i := range recs {
		rec, ok := tlog.Get(b[i*tlog.Size:], key, uint32(i))
		if !ok {
			return nil, fmt.Errorf("SCO %d: record %d: %w", t.Number, i, ErrFormat)
		}
		recs[i] = rec
	}
	return recs, nil
}

// ReadCRCs reads and verifies the CRC table of a sealed SCO.
func (t *Trailer) ReadCRCs(r io.ReaderAt) ([]uint32, error) {
	b := make([]byte, CRCTableBytes(t.Clusters))
	if len(b) > 0 {
		if _, err := r.ReadAt(b, t.CRCOff); err != nil {
			return nil, fmt.Errorf("SCO %d: CRC table at %d: %w", t.Number, t.CRCOff, err)
		}
	}
	if crc32.Checksum(b[:4*t.Clusters], castagnoli) != t.CRCsCRC {
		return nil, fmt.Errorf("SCO %d: CRC table: %w: checksum", t.Number, ErrFormat)
	}
	crcs := make([]uint32, t.Clusters)
	for i := range crcs {
		crcs[i] = binary.LittleEndian.Uint32(b[4*i:])
	}
	return crcs, nil
}

// Footer builds what follows the clusters of a sealed SCO: records, CRC table
// and trailer, to be written at the returned trailer's RecordOff. records holds
// the encoded records.
func (h *Header) Footer(clusters, records uint32, encoded []byte, crcs []uint32) (Trailer, []byte) {
	t := Trailer{
		Volume: h.Volume, Number: h.Number, Epoch: h.Epoch, Clusters: clusters, Records: records,
		RecordOff: h.SealedRecordOff(clusters, records),
	}
	t.CRCOff = t.RecordOff + RecordBytes(records)
	return t, t.footer(encoded, crcs, nil)
}

// CompactFooter builds what follows the clusters of a compacted SCO, at the returned
// trailer's RecordOff. crcs are those of the kept clusters, in their order; records
// are the Open record and those that name the kept clusters.
func (h *Header) CompactFooter(kept *Kept, records []tlog.Record, crcs []uint32) (Trailer, []byte) {
	t := Trailer{
		Volume: h.Volume, Number: h.Number, Epoch: h.Epoch, Clusters: kept.Len(), Records: uint32(len(records)),
		RecordOff: DataOff(kept.Len()), Generation: h.Generation, Span: kept.Span(),
	}
	t.CRCOff = t.RecordOff + RecordBytes(t.Records)
	encoded := make([]byte, len(records)*tlog.Size)
	key := tlog.Key(h.Volume, h.Number)
	for i := range records {
		tlog.Put(encoded[i*tlog.Size:], key, uint32(i), &records[i])
	}
	var table []byte
	table, t.KeptCRC = kept.Encode()
	return t, t.footer(encoded, crcs, table)
}

// footer fills in the checksums and builds what lies from RecordOff on.
func (t *Trailer) footer(encoded []byte, crcs []uint32, kept []byte) []byte {
	b := make([]byte, t.Size()-t.RecordOff)
	n := copy(b, encoded[:t.Records*tlog.Size])
	t.RecordsCRC = crc32.Checksum(b[:n], castagnoli)
	tab := b[t.CRCOff-t.RecordOff:]
	for i, c := range crcs[:t.Clusters] {
		binary.LittleEndian.PutUint32(tab[4*i:], c)
	}
	t.CRCsCRC = crc32.Checksum(tab[:4*t.Clusters], castagnoli)
	copy(b[t.KeptOff()-t.RecordOff:], kept)
	copy(b[len(b)-Page:], t.Encode())
	return b
}
