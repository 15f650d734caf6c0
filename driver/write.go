package driver

import (
	"errors"
	"fmt"
	"runtime"

	"scoria/driver/block"
	"scoria/driver/lba"
	"scoria/driver/tlog"
)

// maxInlineClusters bounds what a request copies on the caller's goroutine: the
// other queues of that front end's worker wait meanwhile.
const maxInlineClusters = 256

// errNoRoom: the pool has no chunk left, or the disk no room (lacksRoom says which);
// the write waits.
var errNoRoom = errors.New("write buffer or disk is full")

// submitWrites is the path of a write: reserve, copy, checksum, log record, map.
// It runs on the front end's worker; whatever can't be done at once (no room,
// part of a cluster, a map page on disk) goes to another goroutine.
func (v *Volume) submitWrites(batch []*block.Request) {
	unusable := v.writable()
	var bytes uint64
	var inlined uint32 // clusters
	v.lastWrite.Store(v.eng.now.Load())
	paced := v.mayThrottle()
	throttled := v.mustThrottle(paced)
	v.gate.RLock()
	info := v.info.Load() // the size shrinks with the gate closed only
	for i, r := range batch {
		if i+1 < len(batch) {
			v.prefetchFor(batch[i+1])
		}
		if err := refusal(info, r, unusable); err != nil {
			v.answer(r, err)
			continue
		}
		bytes += r.Length
		first := r.Offset / block.ClusterSize
		n := r.Length / block.ClusterSize
		inline := !throttled && (r.Offset|r.Length)%block.ClusterSize == 0 && n <= maxInlineClusters
		if !inline || !v.resident(first, n) {
			v.takeOver(r)
			v.writeLater(r, 0)
			continue
		}
		src := segments{list: r.Segments}
		done, err := v.writeClusters(&src, first, uint32(n))
		inlined += done
		if err == errNoRoom {
			v.takeOver(r)
			v.writeLater(r, uint32(done))
			continue
		}
		if err == nil && r.Flags&block.FUA != 0 {
			v.takeOver(r)
			v.flushLater(r)
			continue
		}
		v.answer(r, err)
	}
	v.gate.RUnlock()
	if inlined > 0 && paced {
		v.charge(inlined)
	}
	v.stats.ops[block.OpWrite].add(uint64(len(batch)), bytes)
}

// prefetchFor has the CPU fetch what the next write needs while this one is copied: its
// data and its place in the map.
func (v *Volume) prefetchFor(next *block.Request) {
	v.m.Prefetch(next.Offset / block.ClusterSize)
	if len(next.Segments) > 0 {
		prefetch(next.Segments[0])
	}
}

// resident reports whether the map knows about those clusters without I/O. The
// map keeps what it has, so the answer stays true.
func (v *Volume) resident(first, n uint64) bool {
	for ; n > 0; n-- {
		if _, ok := v.m.Get(first); !ok {
			return false
		}
		first++
	}
	return true
}

// writeClusters logs n whole clusters from src. The caller holds the gate shared
// (and has it again on return) and knows that the map is resident. It returns
// how many clusters were written before an error.
func (v *Volume) writeClusters(src *segments, first uint64, n uint32) (done uint32, err error) {
	for done < n {
		l := v.cur
		k := min(n-done, chunkClusters, l.hdr.ClustersCap)
		c, rec, ok := l.reserve(k, k)
		if !ok {
			if err := v.makeRoom(k, k); err != nil {
				return done, err
			}
			if first+uint64(n) > v.info.Load().Size/block.ClusterSize {
				return done, block.ErrRange // it shrank while the gate was open
			}
			continue
		}
		filled, err := v.fill(l, c, rec, k, src, first+uint64(done))
		done += filled
		if err != nil {
			for i := filled; i < k; i++ {
				tlog.Put(l.record(rec+i), l.key, rec+i, &tlog.Record{Type: tlog.Void, Cluster: c + i})
			}
			return done, err
		}
	}
	return done, nil
}

// fill copies k clusters into the reservation. A fault on the peer's memory ends
// it with ErrFault; the caller voids the rest.
func (v *Volume) fill(l *logSCO, c, rec, k uint32, src *segments, first uint64) (filled uint32, err error) {
	defer func() {
		if e := recover(); e != nil {
			err = faultError(e)
		}
		if filled > 0 {
			v.live.at(l.hdr.Number).Add(int32(filled))
		}
	}()
	p := v.eng.pool
	r := tlog.Record{Type: tlog.Write, Durable: l.durable.Load()}
	for ; filled < k; filled++ {
		i := c + filled
		slot, off := l.cluster(i)
		dst := p.chunk(l.data[slot].Load())[off : off+block.ClusterSize]
		src.read(dst)
		// The checksum is of our copy: the peer may change its memory meanwhile.
		r.DataCRC = tlog.CRC(dst)
		r.LBA, r.Cluster = first+uint64(filled), i
		l.crcs[slot].Load()[i%chunkClusters].Store(r.DataCRC)
		tlog.Put(l.record(rec+filled), l.key, rec+filled, &r)
		old, ok := v.m.Set(r.LBA, lba.MakeLocation(l.hdr.Number, i))
		if !ok { // the kernel refuses memory for the map
			tlog.Put(l.record(rec+filled), l.key, rec+filled, &tlog.Record{Type: tlog.Void, Cluster: i})
			return filled, fmt.Errorf("write cluster %d: %w", r.LBA, lba.ErrMemory)
		}
		if old != 0 {
			v.live.at(old.SCO()).Add(-1)
		}
	}
	return filled, nil
}

// faultError turns a recovered memory fault into ErrFault; other panics go on.
func faultError(e any) error {
	if f, ok := e.(interface {
		runtime.Error
		Addr() uintptr
	}); ok {
		return fmt.Errorf("%w: at %#x", block.ErrFault, f.Addr())
	}
	panic(e)
}

// makeRoom provides chunks at the head, or opens the next SCO. The caller holds
// the gate shared; it is released meanwhile if the SCO is full.
func (v *Volume) makeRoom(clusters, records uint32) error {
	if v.space.held.Load() || !v.mayWrite() {
		return errNoRoom
	}
	l := v.cur
	if !l.full(clusters, records) {
		v.extendMu.Lock()
		ok := l.begin(false) && l.extend(clusters, records)
		v.extendMu.Unlock()
		if !ok {
			return errNoRoom
		}
		return nil
	}
	v.gate.RUnlock()
	defer v.gate.RLock()
	v.gate.Lock()
	defer v.gate.Unlock()
	if v.cur != l {
		return nil // somebody else did it
	}
	if !v.roll() {
		return errNoRoom
	}
	return nil
}

// roll closes the current SCO and opens the next. Caller holds the gate
// exclusively, so every reservation in the old one is filled. false: the slot
// in the RAM table is still taken by a SCO that is not sealed.
func (v *Volume) roll() bool {
	old := v.cur
	records, _ := unpack(old.head.Load())
	l := newLogSCO(v, old.hdr.Number+1, old.hdr.Number, records)
	if !v.install(l) {
		return false
	}
	old.closed.Store(true)
	v.shrinkRoom(old)
	v.filling.CompareAndSwap(old, nil)
	v.cur = l
	v.logSince.Add(int64(records))
	v.adjustSpace()
	v.kickIO()
	return true
}

// closeHead ends the current SCO early if it holds anything, so that its chunks
// become free. It reports whether it did.
func (v *Volume) closeHead() bool {
	v.gate.Lock()
	defer v.gate.Unlock()
	records, _ := unpack(v.cur.head.Load())
	return records > 0 && v.roll()
}

// install makes l reachable for readers and the I/O goroutine.
func (v *Volume) install(l *logSCO) bool {
	p := &v.ram[l.hdr.Number&uint64(len(v.ram)-1)]
	if o := p.Load(); o != nil {
		if !o.sealed.Load() {
			return false
		}
		p.Store(nil)
		o.releaseChunks()
	}
	v.live.ensure(l.hdr.Number)
	v.promiseFound(l)
	p.Store(l)
	v.metaMu.Lock()
	v.unsealed = append(v.unsealed, l)
	v.metaMu.Unlock()
	return true
}

// begin writes the Open record of a fresh SCO, to which it has the disk's room
// promised. false: the disk or the pool has none. upkeep: for what gives room back.
// Caller holds vol.extendMu.
func (l *logSCO) begin(upkeep bool) bool {
	if l.head.Load() != 0 {
		return true
	}
	if !l.vol.promiseRoom(l, upkeep) {
		return false
	}
	if !l.extend(0, 1) {
		l.vol.unpromiseRoom(l)
		return false
	}
	_, rec, ok := l.reserve(0, 1)
	if !ok || rec != 0 {
		panic("driver: first record is not free")
	}
	tlog.Put(l.record(0), l.key, 0, &tlog.Record{
		Type: tlog.Open, LBA: l.prev, Arg: uint64(l.prevRecords), DataCRC: uint32(l.hdr.Epoch), Cluster: tlog.NoCluster,
	})
	return true
}

// releaseChunks gives the chunks of a sealed SCO back.
func (l *logSCO) releaseChunks() {
	p := l.vol.eng.pool
	for _, kind := range []chunkKind{chunkData, chunkRecs} {
		for i := range l.slots(kind) {
			p.releaseOf(l, kind, uint32(i))
		}
	}
}
