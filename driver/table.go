package driver

import (
	"encoding/binary"
	"encoding/json"
	"fmt"
	"math"
	"slices"

	"github.com/google/uuid"

	"scoria/driver/lba"
	"scoria/driver/sco"
)

// The driver's part of a root, little endian:
//
//	version                                                   u32   3
//	n, then n SCOs                                            u32
//	  number u64, size i64, CRC table offset i64, clusters u32, records u32,
//	  live u32, flags u32 (1: it was sealed, the other fields count),
//	  pinned u32, generation u32, and if it is compacted, else zero:
//	  span u32, CRC32C of the table of kept clusters u32
//	n, then n ancestors, oldest first                         u32
//	  volume 16, snapshot 16, last SCO u64, last page object u32, zero u32
//	n, then n runs of page objects that snapshots refer to    u32
//	  first u32, count u32
//	n, then n ranges of snapshots that are gone (dropped.go)  u32
//	  sequence behind which u64, sequence before which u64
//	n, then n bytes: the snapshot that this root is, as JSON; none: 0
//
// Version 2 knows of no generations: its SCOs end with pinned and a zero u32. Version
// 1 ends behind the SCOs, which lack these, too.
const (
	tableVersion = 3
	tableSealed  = 1

	entryLenV1  = 40
	entryLenV2  = 48
	entryLen    = 56
	ancestorLen = 48
	rangeLen    = 16
	runLen      = 8
)

// tableEntry is a SCO as a root knows it.
type tableEntry struct {
	scoMeta
	live   uint32
	sealed bool
	pinned uint32 // clusters of it that snapshots reach
}

// rootBlob is the driver's part of a root.
type rootBlob struct {
	scos     []tableEntry
	ancestry []Ancestor
	objects  []uint32 // that snapshots refer to, ascending
	dropped  []seqRange
	snapshot *Snapshot
}

func (b *rootBlob) encode() ([]byte, error) {
	le := binary.LittleEndian
	out := make([]byte, 0, 32+entryLen*len(b.scos))
	out = le.AppendUint32(out, tableVersion)
	out = le.AppendUint32(out, uint32(len(b.scos)))
	for i := range b.scos {
		e := &b.scos[i]
		flags := uint32(0)
		if e.sealed {
			flags = tableSealed
		}
		out = le.AppendUint64(out, e.number)
		out = le.AppendUint64(out, uint64(e.size))
		out = le.AppendUint64(out, uint64(e.crcOff))
		var span, keptCRC uint32
		if e.compact != nil {
			span, keptCRC = e.compact.span, e.compact.keptCRC
		}
		for _, w := range []uint32{e.clusters, e.records, e.live, flags, e.pinned, e.generation(), span, keptCRC} {
			out = le.AppendUint32(out, w)
		}
	}
	out = le.AppendUint32(out, uint32(len(b.ancestry)))
	for _, a := range b.ancestry {
		out = append(out, a.Volume[:]...)
		out = append(out, a.Snapshot[:]...)
		out = le.AppendUint64(out, a.SCO)
		out = le.AppendUint64(out, uint64(a.Object))
	}
	runs := objectRuns(b.objects)
	out = le.AppendUint32(out, uint32(len(runs)))
	for _, r := range runs {
		out = le.AppendUint32(out, r.first)
		out = le.AppendUint32(out, r.count)
	}
	out = le.AppendUint32(out, uint32(len(b.dropped)))
	for _, r := range b.dropped {
		out = le.AppendUint64(out, r.after)
		out = le.AppendUint64(out, r.before)
	}
	var text []byte
	if b.snapshot != nil {
		var err error
		if text, err = json.Marshal(b.snapshot); err != nil {
			return nil, fmt.Errorf("snapshot %s: %w", b.snapshot.Name, err)
		}
	}
	out = le.AppendUint32(out, uint32(len(text)))
	return append(out, text...), nil
}

type objectRun struct{ first, count uint32 }

func objectRuns(objects []uint32) (runs []objectRun) {
	for _, o := range objects {
		if n := len(runs); n > 0 && runs[n-1].first+runs[n-1].count == o {
			runs[n-1].count++
			continue
		}
		runs = append(runs, objectRun{o, 1})
	}
	return runs
}

// blobReader takes a blob apart; bad is sticky.
type blobReader struct {
	b   []byte
	bad bool
}

func (r *blobReader) take(n int) []byte {
	if n < 0 || n > len(r.b) {
		r.bad = true
		return make([]byte, max(0, min(n, 64)))
	}
	p := r.b[:n]
	r.b = r.b[n:]
	return p
}

func (r *blobReader) u32() uint32 { return binary.LittleEndian.Uint32(r.take(4)) }
func (r *blobReader) u64() uint64 { return binary.LittleEndian.Uint64(r.take(8)) }

// list reads a count and checks that so many items of that length can follow.
func (r *blobReader) list(length int) int {
	n := r.u32()
	if r.bad || uint64(n)*uint64(length) > uint64(len(r.b)) {
		r.bad = true
		return 0
	}
	return int(n)
}

// maxPinnedObjects bounds what a blob may claim: a run costs eight bytes and may
// stand for billions.
const maxPinnedObjects = 1 << 24

func decodeBlob(b []byte) (*rootBlob, error) {
	malformed := func(what string) error {
		return fmt.Errorf("SCO table of %d bytes: %w: %s", len(b), lba.ErrFormat, what)
	}
	r := &blobReader{b: b}
	version := r.u32()
	if r.bad || version == 0 || version > tableVersion {
		return nil, malformed(fmt.Sprintf("version %d, this program reads 1 to %d", version, tableVersion))
	}
	out := &rootBlob{}
	length := entryLen
	switch version {
	case 1:
		length = entryLenV1
	case 2:
		length = entryLenV2
	}
	out.scos = make([]tableEntry, r.list(length))
	for i := range out.scos {
		out.scos[i] = decodeEntry(r, version)
		e := &out.scos[i]
		if e.number == 0 || e.number > lba.MaxSCO {
			return nil, malformed(fmt.Sprintf("SCO number %d", e.number))
		}
		if c := e.compact; c != nil && (!e.sealed || c.generation == 0 || c.span == 0 || c.span > sco.MaxClusters || e.clusters > c.span) {
			return nil, malformed(fmt.Sprintf("SCO %d: generation %d has %d of %d clusters", e.number, c.generation, e.clusters, c.span))
		}
	}
	if version >= 2 {
		if err := out.decodeRest(r); err != nil {
			return nil, malformed(err.Error())
		}
	}
	if r.bad || len(r.b) > 0 {
		return nil, malformed("it ends early or late")
	}
	return out, nil
}

func decodeEntry(r *blobReader, version uint32) (e tableEntry) {
	e.number, e.size, e.crcOff = r.u64(), int64(r.u64()), int64(r.u64())
	e.clusters, e.records, e.live = r.u32(), r.u32(), r.u32()
	e.sealed = r.u32()&tableSealed != 0
	if version >= 2 {
		e.pinned = r.u32()
		generation := r.u32()
		if version >= 3 {
			if span, crc := r.u32(), r.u32(); generation > 0 || span > 0 {
				e.compact = &compacted{generation: generation, span: span, keptCRC: crc}
			}
		}
	}
	return e
}

// decodeRest reads what version 2 added.
func (b *rootBlob) decodeRest(r *blobReader) error {
	for range r.list(ancestorLen) {
		var a Ancestor
		a.Volume, a.Snapshot = uuid.UUID(r.take(16)), uuid.UUID(r.take(16))
		a.SCO = r.u64()
		object := r.u64()
		if a.SCO > lba.MaxSCO || object > math.MaxUint32 {
			return fmt.Errorf("ancestor up to SCO %d, page object %d", a.SCO, object)
		}
		a.Object = uint32(object)
		if n := len(b.ancestry); n > 0 && (b.ancestry[n-1].SCO > a.SCO || b.ancestry[n-1].Object > a.Object) {
			return fmt.Errorf("ancestors do not ascend")
		}
		b.ancestry = append(b.ancestry, a)
	}
	total := uint64(0)
	for range r.list(runLen) {
		first, count := r.u32(), r.u32()
		if total += uint64(count); total > maxPinnedObjects || uint64(first)+uint64(count) > math.MaxUint32 {
			return fmt.Errorf("%d page objects from %d on", count, first)
		}
		for o := range count {
			b.objects = append(b.objects, first+o)
		}
	}
	for range r.list(rangeLen) {
		b.dropped = append(b.dropped, seqRange{r.u64(), r.u64()})
	}
	if text := r.take(r.list(1)); len(text) > 0 && !r.bad {
		b.snapshot = &Snapshot{}
		if err := json.Unmarshal(text, b.snapshot); err != nil {
			return fmt.Errorf("snapshot: %v", err)
		}
	}
	return nil
}

// noPins is beyond the last SCO: a table with no new pins.
const noPins = math.MaxUint64

// table describes all SCOs up to a position, with the live counts of a moment when
// the log ended there, and lists those that nothing refers to. SCOs behind pinFrom
// are entered as pinned as far as they were live: a snapshot is being made. What was
// sealed since that moment may be entered as sealed, what was deleted may be left out.
func (v *Volume) table(upTo, pinFrom uint64, live liveCounters) (table []tableEntry, dead []uint64) {
	v.metaMu.Lock()
	defer v.metaMu.Unlock()
	table = make([]tableEntry, 0, len(v.scos)+len(v.unsealed))
	add := func(m scoMeta, sealed bool) tableEntry {
		e := tableEntry{scoMeta: m, live: live.at(m.number), sealed: sealed, pinned: v.pins[m.number]}
		if m.number > pinFrom {
			e.pinned = e.live
		}
		table = append(table, e)
		return e
	}
	for _, m := range v.scos {
		if m.dropping || m.number > upTo {
			continue
		}
		if e := add(*m, true); e.live == 0 && e.pinned == 0 {
			dead = append(dead, m.number)
		}
	}
	for _, l := range v.unsealed {
		if r, c := unpack(l.head.Load()); r > 0 && l.hdr.Number <= upTo {
			add(scoMeta{number: l.hdr.Number, clusters: c, records: r}, false)
		}
	}
	return table, dead
}

// sortedObjects is the keys of a set of page objects, ascending.
func sortedObjects(set map[uint32]bool) []uint32 {
	out := make([]uint32, 0, len(set))
	for o := range set {
		out = append(out, o)
	}
	slices.Sort(out)
	return out
}
