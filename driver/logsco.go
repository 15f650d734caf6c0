package driver

import (
	"runtime"
	"sync/atomic"

	"scoria/alba/vfs"
	"scoria/driver/block"
	"scoria/driver/sco"
	"scoria/driver/tlog"
)

// logSCO is a SCO whose clusters or records are (also) in the pool: the log's
// head, those behind it that are not sealed yet, and sealed ones as long as
// their chunks serve reads.
//
// Writers reserve with one compare-and-swap of head. limit is how far chunks
// have been provided; it grows under extendMu of the volume. A reservation never
// passes limit, so whatever is reserved has its chunks.
type logSCO struct {
	hdr sco.Header
	key uint32
	vol *Volume

	head  atomic.Uint64 // reserved so far: records<<32 | clusters
	limit atomic.Uint64 // provided so far, likewise

	data []atomic.Uint32 // chunk numbers by slot
	recs []atomic.Uint32
	crcs []atomic.Pointer[[chunkClusters]atomic.Uint32]

	// durable is how many records are on stable storage; new records carry it.
	durable atomic.Uint32

	prev        uint64 // the SCO before this one in the log
	prevRecords uint32

	reader atomic.Pointer[vfs.File] // file, for reads, until sealed

	promise atomic.Int64 // bytes of the disk that are promised to it and not taken yet

	// The rest belongs to whoever holds vol.ioMu.
	file     vfs.File
	created  bool   // this process made file: what lies in it is known
	spilledC uint32 // clusters written to file
	spilledR uint32 // records written to file
	blocksC  uint32 // clusters whose blocks in the file have been written once
	unsynced bool   // written since the last sync
	flushed  bool   // a flush was for it: more may come
	lost     bool   // a write or sync of file failed for good

	closed atomic.Bool // no more reservations; set with the gate closed
	sealed atomic.Bool
}

func pack(records, clusters uint32) uint64       { return uint64(records)<<32 | uint64(clusters) }
func unpack(w uint64) (records, clusters uint32) { return uint32(w >> 32), uint32(w) }
func divUp(a, b uint32) uint32                   { return (a + b - 1) / b }
func recordsLimit(clusters uint32) uint32        { return max(2*clusters, 1024) }
func (l *logSCO) cluster(i uint32) (c uint32, o int) {
	return i / chunkClusters, int(i%chunkClusters) * block.ClusterSize
}

func newLogSCO(v *Volume, number, prev uint64, prevRecords uint32) *logSCO {
	clusters := uint32(v.cfg.SCOBytes / block.ClusterSize)
	l := &logSCO{
		hdr: sco.Header{
			Volume: v.cfg.ID, Number: number, Epoch: v.cfg.Epoch,
			ClustersCap: clusters, RecordsLimit: recordsLimit(clusters),
		},
		key: tlog.Key(v.cfg.ID, number), vol: v, prev: prev, prevRecords: prevRecords,
	}
	l.makeSlots()
	return l
}

func (l *logSCO) makeSlots() {
	l.data = make([]atomic.Uint32, divUp(l.hdr.ClustersCap, chunkClusters))
	l.crcs = make([]atomic.Pointer[[chunkClusters]atomic.Uint32], len(l.data))
	l.recs = make([]atomic.Uint32, divUp(l.hdr.RecordsLimit, chunkRecords))
}

func (l *logSCO) slots(kind chunkKind) []atomic.Uint32 {
	if kind == chunkData {
		return l.data
	}
	return l.recs
}

// reserve takes room for clusters and records. ok is false if limit is too near.
func (l *logSCO) reserve(clusters, records uint32) (cluster, record uint32, ok bool) {
	for {
		h := l.head.Load()
		r, c := unpack(h)
		lr, lc := unpack(l.limit.Load())
		if r+records > lr || c+clusters > lc {
			return 0, 0, false
		}
		if l.head.CompareAndSwap(h, pack(r+records, c+clusters)) {
			return c, r, true
		}
	}
}

// full reports whether the SCO itself has no room for that many more.
func (l *logSCO) full(clusters, records uint32) bool {
	r, c := unpack(l.head.Load())
	return r+records > l.hdr.RecordsLimit || c+clusters > l.hdr.ClustersCap
}

// extend provides chunks until the reservation fits or the SCO has become full
// meanwhile. It returns false if the pool has none left. Caller holds
// vol.extendMu.
func (l *logSCO) extend(clusters, records uint32) bool {
	p := l.vol.eng.pool
	for {
		r, c := unpack(l.head.Load())
		lr, lc := unpack(l.limit.Load())
		more := uint32(0) // clusters
		switch {
		case r+records > l.hdr.RecordsLimit || c+clusters > l.hdr.ClustersCap:
			return true
		case c+clusters > lc:
			slot := divUp(lc, chunkClusters)
			if l.crcs[slot].Load() == nil {
				l.crcs[slot].Store(new([chunkClusters]atomic.Uint32))
			}
			id := p.alloc(l, slot, chunkData)
			if id == 0 {
				return false
			}
			l.data[slot].Store(id)
			was := lc
			lc = min((slot+1)*chunkClusters, l.hdr.ClustersCap)
			more = lc - was
		case r+records > lr:
			slot := divUp(lr, chunkRecords)
			id := p.alloc(l, slot, chunkRecs)
			if id == 0 {
				return false
			}
			l.recs[slot].Store(id)
			lr = min((slot+1)*chunkRecords, l.hdr.RecordsLimit)
		default:
			return true
		}
		l.limit.Store(pack(lr, lc))
		l.vol.providedMore(more)
	}
}

// record returns the 32 bytes of record i, whose chunk is in the pool until the
// SCO is sealed.
func (l *logSCO) record(i uint32) []byte {
	b := l.vol.eng.pool.chunk(l.recs[i/chunkRecords].Load())
	off := int(i%chunkRecords) * tlog.Size
	return b[off : off+tlog.Size : off+tlog.Size]
}

// endsAt reports whether no cluster will ever come from c on.
func (l *logSCO) endsAt(c uint32) bool {
	if !l.closed.Load() {
		return false
	}
	_, clusters := unpack(l.head.Load())
	return c == clusters
}

// filled returns how many records from from on, up to to, have been filled
// without a gap. With wait it yields until all have: writers fill what they
// reserved without waiting for anything.
func (l *logSCO) filled(from, to uint32, wait bool) uint32 {
	for i := from; i < to; i++ {
		for !tlog.Filled(l.record(i)) {
			if !wait {
				return i
			}
			runtime.Gosched()
		}
	}
	return to
}

// readRAM copies cluster i from the pool into dst, which may be shorter than a
// cluster, from byte off on. false: it is not in RAM (any more), and dst is
// undefined.
func (l *logSCO) readRAM(dst []byte, i uint32, off int) bool {
	slot, start := l.cluster(i)
	id := l.data[slot].Load()
	if id == 0 {
		return false
	}
	p := l.vol.eng.pool
	gen := p.gen[id].Load()
	if l.data[slot].Load() != id {
		return false
	}
	copy(dst, p.chunk(id)[start+off:start+block.ClusterSize])
	return p.gen[id].Load() == gen
}
