package driver

import (
	"errors"
	"fmt"
	"runtime"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"time"

	"scoria/driver/block"
	"scoria/driver/lba"
	"scoria/driver/tlog"
)

// maxInlineClusters bounds what a write copies on the caller's goroutine.
const maxInlineClusters = 256

// errNoRoom: the pool has no chunk left; the write waits.
var errNoRoom = errors.New("write buffer is full")

// submitWrites is the path of a write: reserve, copy, checksum, log record, map.
// It runs on the front end's worker; whatever can't be done at once (no room,
// part of a cluster, a map page on disk) goes to another goroutine.
func (v *Volume) submitWrites(batch []*block.Request) {
	info := v.info.Load()
	unusable := v.writable()
	var bytes uint64
	v.lastWrite.Store(v.eng.now.Load())
	throttled := v.mustThrottle()
	v.gate.RLock()
	for i, r := range batch {
		if i+1 < len(batch) && len(batch[i+1].Segments) > 0 {
			prefetch(batch[i+1].Segments[0])
		}
		err := unusable
		if err == nil {
			err = block.CheckRange(info, r)
		}
		if err == nil {
			err = checkSegments(r)
		}
		if err != nil {
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
	v.stats.ops[block.OpWrite].add(uint64(len(batch)), bytes)
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
	l := v.cur
	if !l.full(clusters, records) {
		v.extendMu.Lock()
		ok := l.begin() && l.extend(clusters, records)
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
	v.cur = l
	v.logSince.Add(int64(records))
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
	p.Store(l)
	v.metaMu.Lock()
	v.unsealed = append(v.unsealed, l)
	v.metaMu.Unlock()
	return true
}

// begin writes the Open record of a fresh SCO. Caller holds the gate exclusively
// or is alone.
func (l *logSCO) begin() bool {
	if l.head.Load() != 0 {
		return true
	}
	if !l.extend(0, 1) {
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

// parkedWrite is a write that waits, with how many clusters are done.
type parkedWrite struct {
	r     *block.Request
	done  uint32
	since time.Time
}

// parkedQueue holds the writes that wait for room, oldest first.
type parkedQueue struct {
	mu      sync.Mutex
	list    []*parkedWrite
	current *parkedWrite // taken by the admitter
	dropped bool         // current was canceled meanwhile
	running bool
	busy    atomic.Bool // running, for those who must not take the lock
}

// push adds p and reports whether an admitter must be started.
func (q *parkedQueue) push(p *parkedWrite) bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.list = append(q.list, p)
	start := !q.running
	q.running = true
	q.busy.Store(true)
	return start
}

// pop takes the oldest; nil ends the admitter.
func (q *parkedQueue) pop() *parkedWrite {
	q.mu.Lock()
	defer q.mu.Unlock()
	if len(q.list) == 0 {
		q.running = false
		q.busy.Store(false)
		q.list = nil
		return nil
	}
	p := q.list[0]
	q.list[0] = nil
	q.list = q.list[1:]
	q.current, q.dropped = p, false
	return p
}

// unpop puts p back as the oldest, unless it was canceled since it was popped.
func (q *parkedQueue) unpop(p *parkedWrite) bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.current = nil
	if q.dropped {
		return false
	}
	q.list = append([]*parkedWrite{p}, q.list...)
	return true
}

func (q *parkedQueue) remove(match func(*parkedWrite) bool) (out []*parkedWrite) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.current != nil && match(q.current) {
		q.dropped = true
	}
	keep := q.list[:0]
	for _, p := range q.list {
		if match(p) {
			out = append(out, p)
		} else {
			keep = append(keep, p)
		}
	}
	q.list = keep
	return out
}

// writeLater carries out a write that can't be done on the caller's goroutine:
// done clusters of it are written already.
func (v *Volume) writeLater(r *block.Request, done uint32) {
	if (r.Offset|r.Length)%block.ClusterSize != 0 {
		go v.writePartial(r)
		return
	}
	if v.parked.push(&parkedWrite{r: r, done: done, since: time.Now()}) && !v.spawn(v.admit) {
		// It came while the volume was being closed.
		for p := v.parked.pop(); p != nil; p = v.parked.pop() {
			v.end(p.r, block.ErrClosed)
		}
	}
}

// admit lets waiting writes in as room comes and as fast as the throttle allows.
func (v *Volume) admit() {
	debug.SetPanicOnFault(true)
	var debt time.Duration
	for {
		p := v.parked.pop()
		if p == nil {
			v.settle("write-buffer-full")
			v.settle("throttled")
			return
		}
		room := v.eng.pool.roomChan()
		before := p.done
		err := v.writeWhole(p)
		if err == errNoRoom {
			v.raise("write-buffer-full", "writes wait: the write buffer (%d MiB) is full and the local disk takes data more slowly than the guest writes it; give the daemon a larger write buffer or a faster disk", uint64(v.eng.pool.n)*chunkBytes>>20)
			if !v.parked.unpop(p) {
				v.end(p.r, block.ErrCanceled)
				continue
			}
			v.kickIO()
			v.eng.kickAll()
			v.waitRoom(room)
			continue
		}
		v.stats.stages[StageLog].since(p.since)
		if err == nil && p.r.Flags&block.FUA != 0 {
			v.flushLater(p.r)
		} else {
			v.end(p.r, err)
		}
		debt += v.throttleDelay(p.done - before)
		if debt > time.Millisecond {
			v.raise("throttled", "writes are slowed down so that the write buffer or the disk does not run full suddenly")
			select {
			case <-time.After(debt):
			case <-v.ctx.Done():
			}
			debt = 0
		}
	}
}

// waitRoom waits until room is closed, something may have changed, or the
// waiting writes have all been taken away.
func (v *Volume) waitRoom(room <-chan struct{}) {
	select {
	case <-room:
	case <-time.After(50 * time.Millisecond):
	case <-v.ctx.Done():
	}
}

// waitForRoom lets a request that is not parked wait for room, unless its owner
// gives up.
func (v *Volume) waitForRoom(r *block.Request, room <-chan struct{}) error {
	v.waiting.enter(r)
	v.kickIO()
	v.eng.kickAll()
	v.waitRoom(room)
	if v.waiting.leave(r) {
		return block.ErrCanceled
	}
	return nil
}

// writeWhole continues a write of whole clusters; it may read map pages.
func (v *Volume) writeWhole(p *parkedWrite) error {
	if err := v.writable(); err != nil {
		return err
	}
	first := p.r.Offset / block.ClusterSize
	n := uint32(p.r.Length / block.ClusterSize)
	if !v.resident(first, uint64(n)) {
		if err := v.m.Load(v.ctx, v.ckpt, first, uint64(n)); err != nil {
			return err
		}
	}
	src := segments{list: p.r.Segments}
	src.skip(int(p.done) * block.ClusterSize)
	for p.done < n {
		k := min(n-p.done, maxInlineClusters)
		v.gate.RLock()
		done, err := v.writeClusters(&src, first+uint64(p.done), k)
		v.gate.RUnlock()
		p.done += done
		if err != nil {
			return err
		}
	}
	return nil
}

// writePartial writes a request that begins or ends within a cluster: the whole
// clusters of it like any write, the pieces by read, merge, and a log record
// that applies only if nobody wrote the cluster in between.
func (v *Volume) writePartial(r *block.Request) {
	debug.SetPanicOnFault(true)
	src := segments{list: r.Segments}
	var err error
	for pos, end := r.Offset, r.Offset+r.Length; pos < end && err == nil; {
		cluster := pos / block.ClusterSize
		stop := min(end, (cluster+1)*block.ClusterSize)
		piece := make([]byte, stop-pos)
		if err = src.readSafely(piece); err == nil {
			err = v.mergeCluster(r, cluster, int(pos%block.ClusterSize), piece)
		}
		pos = stop
	}
	if err == nil && r.Flags&block.FUA != 0 {
		v.flushLater(r)
		return
	}
	v.end(r, err)
}

// mergeCluster replaces part of one cluster, for request r.
func (v *Volume) mergeCluster(r *block.Request, cluster uint64, off int, piece []byte) error {
	mu := &v.rmw[cluster%uint64(len(v.rmw))]
	mu.Lock()
	defer mu.Unlock()
	buf := make([]byte, block.ClusterSize)
	for {
		if err := v.writable(); err != nil {
			return err
		}
		loc, err := v.locate(cluster)
		if err != nil {
			return err
		}
		if loc == 0 {
			clear(buf)
		} else if err := v.readCluster(v.ctx, loc, buf); err != nil {
			if now, lerr := v.locate(cluster); lerr == nil && now != loc {
				continue // it moved, and its SCO is gone
			}
			return err
		}
		copy(buf[off:], piece)
		room := v.eng.pool.roomChan()
		done, err := v.replaceCluster(cluster, loc, buf)
		switch {
		case err == errNoRoom:
			if err := v.waitForRoom(r, room); err != nil {
				return err
			}
		case err != nil || done:
			return err
		}
	}
}

// replaceCluster logs buf for a cluster if the map still has loc for it. It is
// exclusive: a concurrent write of the whole cluster comes before or after.
func (v *Volume) replaceCluster(cluster uint64, loc lba.Location, buf []byte) (done bool, err error) {
	v.gate.Lock()
	defer v.gate.Unlock()
	if now, ok := v.m.Get(cluster); !ok || now != loc {
		return false, nil
	}
	l, err := v.roomExclusive(1, 1)
	if err != nil {
		return false, err
	}
	c, rec, ok := l.reserve(1, 1)
	if !ok {
		return false, errNoRoom
	}
	src := segments{list: [][]byte{buf}}
	_, err = v.fill(l, c, rec, 1, &src, cluster)
	return err == nil, err
}

// roomExclusive returns the current SCO with room for a reservation. Caller
// holds the gate exclusively.
func (v *Volume) roomExclusive(clusters, records uint32) (*logSCO, error) {
	if v.cur.full(clusters, records) && !v.roll() {
		return nil, errNoRoom
	}
	v.extendMu.Lock()
	defer v.extendMu.Unlock()
	if !v.cur.begin() || !v.cur.extend(clusters, records) {
		return nil, errNoRoom
	}
	return v.cur, nil
}
