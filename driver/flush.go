package driver

import (
	"errors"
	"fmt"
	"runtime"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"scoria/alba/vfs"
	"scoria/driver/block"
	"scoria/driver/sco"
	"scoria/driver/tlog"
)

// ioState is the work of a volume's I/O goroutine, which exists only while
// there is some.
type ioState struct {
	mu      sync.Mutex
	running bool
	again   bool
	waiters []flushWaiter
	spill   bool // write everything out, without a sync

	stopped   bool // no goroutine may be started any more
	uploading atomic.Bool
}

// flushWaiter is a flush or a FUA write.
type flushWaiter struct {
	r     *block.Request
	since time.Time
}

// flushLater lets r end when everything that is in the log now is durable.
func (v *Volume) flushLater(r *block.Request) {
	v.io.mu.Lock()
	stopped := v.io.stopped
	if !stopped {
		v.io.waiters = append(v.io.waiters, flushWaiter{r, time.Now()})
	}
	v.io.mu.Unlock()
	if stopped { // it came while the volume was being closed
		v.end(r, block.ErrClosed)
		return
	}
	v.kickIO()
}

// nothingToFlush reports whether all that is in the log is durable already.
func (v *Volume) nothingToFlush() bool {
	if v.failed.Load() {
		return false
	}
	v.gate.RLock()
	defer v.gate.RUnlock()
	records, _ := unpack(v.cur.head.Load())
	if v.cur.durable.Load() != records {
		return false
	}
	v.metaMu.Lock()
	defer v.metaMu.Unlock()
	return len(v.unsealed) == 1 || (len(v.unsealed) > 1 && records > 0)
}

// kickIO makes the I/O goroutine look for work.
func (v *Volume) kickIO() {
	v.io.mu.Lock()
	defer v.io.mu.Unlock()
	v.io.again = true
	if !v.io.running && !v.io.stopped {
		v.io.running = true
		v.background.Go(v.ioLoop)
	}
}

// kickSpill asks for everything to be written out soon.
func (v *Volume) kickSpill() {
	v.io.mu.Lock()
	v.io.spill = true
	v.io.mu.Unlock()
	v.kickIO()
}

// ioLoop flushes first, then seals, then spills a little, until nothing is left.
func (v *Volume) ioLoop() {
	// The thread's priority goes up and down with what it does.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	defer v.eng.nice.set(false)
	for {
		v.io.mu.Lock()
		waiters := v.io.waiters
		v.io.waiters = nil
		again := v.io.again
		v.io.again = false
		if len(waiters) == 0 && !again {
			v.io.running = false
			v.io.mu.Unlock()
			return
		}
		v.io.mu.Unlock()

		v.eng.nice.set(len(waiters) == 0 && v.eng.pool.fill() < throttleAt)
		if len(waiters) > 0 {
			err := v.syncAll()
			for _, w := range waiters {
				v.stats.stages[StageFlush].since(w.since)
				v.end(w.r, err)
			}
			if v.unsealedCount() > maxUnsealed {
				// Flushes without a pause must not keep SCOs from being sealed.
				if _, err := v.ioStep(); err != nil {
					v.ioFailed(err)
				}
			}
			v.kickIO()
			continue
		}
		more, err := v.ioStep()
		if err != nil {
			v.ioFailed(err)
			select {
			case <-time.After(200 * time.Millisecond):
				v.kickIO()
			case <-v.ctx.Done():
			}
			continue
		}
		if more {
			v.settle("disk-full")
			v.settle("disk-error")
			v.kickIO()
		}
	}
}

// ioStep does one piece of background work: seal the oldest closed SCO if all of
// it is written, else write a piece of it or of the head. more says whether
// there is another piece to do at once.
func (v *Volume) ioStep() (more bool, err error) {
	v.ioMu.Lock()
	defer v.ioMu.Unlock()
	v.metaMu.Lock()
	var l *logSCO
	if len(v.unsealed) > 0 {
		l = v.unsealed[0]
	}
	v.metaMu.Unlock()
	if l == nil || l.lost {
		return false, nil
	}
	closed := l.closed.Load() // before head, which is final only then
	records, clusters := unpack(l.head.Load())
	if closed {
		if l.spilledR < records || l.spilledC < clusters {
			return true, v.spill(l, records, spillPiece)
		}
		return true, v.seal(l)
	}
	if !v.wantSpill() {
		return false, nil
	}
	// Only whole chunks: the last one is still being filled.
	whole := clusters / chunkClusters * chunkClusters
	if whole > l.spilledC {
		return true, v.spillWhole(l, whole)
	}
	v.io.mu.Lock()
	all := v.io.spill
	v.io.spill = false
	v.io.mu.Unlock()
	if all && l.spilledR < records {
		return false, v.spill(l, records, -1)
	}
	return false, nil
}

// spillPiece is how many clusters are written between two looks at the waiters.
const spillPiece = maxVec * chunkClusters

// wantSpill decides whether the head should be written out before it must be.
func (v *Volume) wantSpill() bool {
	v.io.mu.Lock()
	asked := v.io.spill
	v.io.mu.Unlock()
	return asked || v.eng.pool.fill() > spillAt
}

// ioFailed explains why background writing does not get on; it is tried again.
func (v *Volume) ioFailed(err error) {
	if v.failed.Load() {
		return // "sync-failed" says it, and nothing is tried again
	}
	if errors.Is(err, syscall.ENOSPC) {
		v.eng.evictForRoom(v.scoDir())
		v.raise("disk-full", "the local disk under %s is full: the log can't be written out; writes pause when the write buffer is full and resume by themselves when there is room (%v)", v.dir, err)
		return
	}
	v.raise("disk-error", "the local disk under %s fails: %v; tried again until it works", v.dir, err)
}

// spillWhole writes whole chunks of the head, without records: spilledR must
// never run ahead of the clusters that its records name. A cluster may still be
// on its way into its chunk, so it waits for the records.
func (v *Volume) spillWhole(l *logSCO, whole uint32) error {
	records, _ := unpack(l.head.Load())
	l.filled(l.spilledR, records, true)
	return v.writeOut(l, l.spilledR, min(whole, l.spilledC+spillPiece))
}

// spill writes records up to records and the clusters that belong to them; at
// most piece clusters if that is positive.
func (v *Volume) spill(l *logSCO, records uint32, piece int) error {
	l.filled(l.spilledR, records, true)
	clusters := v.clustersBefore(l, records)
	if piece > 0 && clusters > l.spilledC+uint32(piece) {
		return v.writeOut(l, l.spilledR, l.spilledC+uint32(piece))
	}
	return v.writeOut(l, records, clusters)
}

// clustersBefore is how many clusters the first records use: clusters are
// reserved in the order of the records.
func (v *Volume) clustersBefore(l *logSCO, records uint32) uint32 {
	for i := records; i > l.spilledR; i-- {
		r, ok := tlog.Get(l.record(i-1), l.key, i-1)
		if !ok {
			panic(fmt.Sprintf("driver: SCO %d: record %d is filled but not valid", l.hdr.Number, i-1))
		}
		if r.Cluster != tlog.NoCluster {
			return max(r.Cluster+1, l.spilledC)
		}
	}
	return l.spilledC
}

// writeOut writes clusters [spilledC, clusters) and records [spilledR, records)
// to the SCO's file. Caller holds ioMu.
func (v *Volume) writeOut(l *logSCO, records, clusters uint32) error {
	if err := v.ensureFile(l); err != nil {
		return err
	}
	start := time.Now()
	from := l.spilledC
	for l.spilledC < clusters {
		if err := v.writeChunks(l, clusters); err != nil {
			return err
		}
	}
	if clusters > from {
		v.eng.spillRate(int(clusters-from), time.Since(start))
	}
	return v.writeRecords(l, records)
}

// maxVec is how many chunks one write to the disk takes together: 4 MiB.
const maxVec = 16

// aheadChunks of zeroes follow a small write into blocks that were never
// written. The first write into an allocated block makes the file system log
// that; when flushes come one by one, doing it for many blocks at once saves most
// of each.
const aheadChunks = 4

var zeroes = aligned(make([]byte, chunkBytes))

// writeChunks writes clusters from spilledC on, up to clusters or maxVec chunks.
func (v *Volume) writeChunks(l *logSCO, clusters uint32) error {
	var vec [maxVec + aheadChunks][]byte
	var n int
	from := l.spilledC
	c := from
	for ; n < maxVec && c < clusters; n++ {
		slot, off := l.cluster(c)
		k := min(chunkClusters-c%chunkClusters, clusters-c)
		vec[n] = v.eng.pool.chunk(l.data[slot].Load())[off : off+int(k)*block.ClusterSize]
		c += k
	}
	l.unsynced = true
	blocks := c
	if c-from < chunkClusters && c > l.blocksC {
		for ; n < len(vec) && blocks < l.hdr.ClustersCap; n++ {
			k := min(chunkClusters, l.hdr.ClustersCap-blocks)
			vec[n] = zeroes[:k*block.ClusterSize]
			blocks += k
		}
	}
	start := time.Now()
	bytes, err := l.file.WriteVecAt(vec[:n], sco.DataOff(from))
	v.stats.stages[StageSpill].since(start)
	v.stats.spilled.Add(uint64(bytes))
	l.blocksC = max(l.blocksC, blocks)
	if err != nil {
		return fmt.Errorf("SCO %d: write %d clusters: %w", l.hdr.Number, c-from, err)
	}
	l.spilledC = c
	for slot := from / chunkClusters; slot < divUp(c, chunkClusters); slot++ {
		if (slot+1)*chunkClusters <= c || l.endsAt(c) {
			v.eng.pool.markClean(l, slot)
		}
	}
	return nil
}

// recordScratch is the size of the buffers that records are written from.
const recordScratch = 64 << 10

var recordBuffers = sync.Pool{New: func() any {
	b := aligned(make([]byte, recordScratch))
	return &b
}}

// writeRecords writes the pages that hold records [spilledR, records). The first
// page repeats records that are durable already, with the same bytes: a torn
// write can't hurt them.
func (v *Volume) writeRecords(l *logSCO, records uint32) error {
	const perPage = sco.Page / tlog.Size
	for r := l.spilledR / perPage * perPage; r < records && l.spilledR < records; {
		slot := r / chunkRecords
		stop := min((records+perPage-1)/perPage*perPage, (slot+1)*chunkRecords)
		b := v.eng.pool.chunk(l.recs[slot].Load())
		stop = min(stop, r+recordScratch/tlog.Size)
		// A copy: writers go on filling the last page, and what changes under a
		// direct write upsets checksums and mirrors below.
		scratch := recordBuffers.Get().(*[]byte)
		data := (*scratch)[:copy(*scratch, b[int(r%chunkRecords)*tlog.Size:int(r%chunkRecords+stop-r)*tlog.Size])]
		l.unsynced = true
		_, err := l.file.WriteAt(data, l.hdr.RecordOff()+int64(r)*tlog.Size)
		recordBuffers.Put(scratch)
		if err != nil {
			return fmt.Errorf("SCO %d: write records: %w", l.hdr.Number, err)
		}
		v.stats.spilled.Add(uint64(len(data)))
		r = stop
	}
	l.spilledR = max(l.spilledR, records)
	return nil
}

// ensureFile creates the SCO's file with room for all it can hold.
func (v *Volume) ensureFile(l *logSCO) error {
	if l.file != nil {
		return nil
	}
	name := v.scoPath(l.hdr.Number)
	free, err := v.eng.cfg.FS.Free(v.scoDir())
	if err != nil {
		return fmt.Errorf("create %s: %w", name, err)
	}
	// The last of the disk is for what gives room back: sealing, checkpoints.
	if need := uint64(l.hdr.OpenSize() + v.eng.cfg.ReserveBytes); free < need {
		return fmt.Errorf("create %s: %w: %d bytes are free, %d are needed with the reserve", name, syscall.ENOSPC, free, need)
	}
	f, err := v.eng.cfg.FS.Open(name, vfs.Create|vfs.Direct)
	if err != nil {
		return fmt.Errorf("create %s: %w", name, err)
	}
	err = f.Allocate(0, l.hdr.OpenSize())
	if err == nil {
		_, err = f.WriteAt(aligned(l.hdr.Encode()), 0)
	}
	if err == nil {
		// The length must be durable before there can be a footer: a file that is
		// shorter counts as sealed.
		if serr := f.Sync(); serr != nil {
			err = v.syncFailed(l, serr)
		}
	}
	if err == nil {
		err = v.eng.cfg.FS.SyncDir(v.scoDir())
	}
	if err == nil {
		err = v.attach(l, f)
	}
	if err != nil {
		f.Close()
		return fmt.Errorf("create %s: %w", name, err)
	}
	return nil
}

// attach makes f, opened for direct writes, the file of l, and opens it a second
// time for reads.
func (v *Volume) attach(l *logSCO, f vfs.File) error {
	r, err := v.eng.cfg.FS.Open(v.scoPath(l.hdr.Number), vfs.ReadOnly)
	if err != nil {
		return err
	}
	l.file = f
	l.reader.Store(&r)
	return nil
}

// closeFiles lets go of what attach took.
func (l *logSCO) closeFiles() {
	if l.file != nil {
		l.file.Close()
	}
	if r := l.reader.Swap(nil); r != nil {
		(*r).Close()
	}
}

// syncAll makes everything in the log durable: data and records of each SCO that
// is not sealed, oldest first, then one sync for each file that was written.
// A failed sync fails this and all later flushes (see package vfs).
func (v *Volume) syncAll() error {
	if v.failed.Load() {
		return fmt.Errorf("flush: %w: an earlier sync failed", block.ErrFailed)
	}
	v.gate.RLock()
	target := v.cur
	records, _ := unpack(target.head.Load())
	v.gate.RUnlock()
	for {
		err := v.trySync(target, records)
		if err == nil {
			v.settle("disk-full")
			v.settle("disk-error")
			return nil
		}
		if v.failed.Load() {
			return err
		}
		// Not written yet, but still in the pool: wait for the disk (P8).
		v.ioFailed(err)
		select {
		case <-time.After(200 * time.Millisecond):
		case <-v.ctx.Done():
			return block.ErrClosed
		}
		// Sealing and uploading may be what gives room back.
		if _, err := v.ioStep(); err != nil {
			v.ioFailed(err)
		}
	}
}

// maxUnsealed is how many SCOs may wait to be sealed before sealing gets its
// turn between flushes.
const maxUnsealed = 4

func (v *Volume) unsealedCount() int {
	v.metaMu.Lock()
	defer v.metaMu.Unlock()
	return len(v.unsealed)
}

// spawn starts a goroutine of the volume, unless Close waits for them already.
func (v *Volume) spawn(fn func()) bool {
	v.io.mu.Lock()
	defer v.io.mu.Unlock()
	if v.io.stopped {
		return false
	}
	v.background.Go(fn)
	return true
}

// stopSpawning keeps spawn and kickIO from starting anything.
func (v *Volume) stopSpawning() {
	v.io.mu.Lock()
	v.io.stopped = true
	v.io.mu.Unlock()
}

func (v *Volume) trySync(target *logSCO, records uint32) error {
	v.ioMu.Lock()
	defer v.ioMu.Unlock()
	v.metaMu.Lock()
	list := append([]*logSCO(nil), v.unsealed...)
	v.metaMu.Unlock()
	for _, l := range list {
		if l.hdr.Number > target.hdr.Number {
			break
		}
		upTo, _ := unpack(l.head.Load())
		if l == target {
			upTo = records
		}
		if upTo == 0 {
			continue
		}
		if l.spilledR < upTo {
			if err := v.spill(l, upTo, -1); err != nil {
				return err
			}
		}
		if l.unsynced {
			if err := v.syncFile(l); err != nil {
				return err
			}
		}
		if d := l.spilledR; d > l.durable.Load() {
			l.durable.Store(d)
		}
	}
	return nil
}

// syncFile syncs a SCO's file. A failure is final for the volume: what the
// kernel could not write it may have dropped, and a later sync would not say so.
func (v *Volume) syncFile(l *logSCO) error {
	v.stats.syncs.Add(1)
	defer v.stats.stages[StageSync].since(time.Now())
	if err := l.file.Sync(); err != nil {
		return v.syncFailed(l, err)
	}
	l.unsynced = false
	return nil
}

// syncFailed ends the volume's service of flushes and writes.
func (v *Volume) syncFailed(l *logSCO, err error) error {
	v.failed.Store(true)
	l.lost = true
	v.raise("sync-failed", "a sync of the local disk failed (%v): flushes of this volume fail until the daemon is restarted, because nobody can say what the disk has kept; check the disk under %s", err, v.dir)
	return fmt.Errorf("flush: SCO %d: %w: %v", l.hdr.Number, block.ErrFailed, err)
}

// sealFile writes records, CRC table and trailer behind the clusters and makes
// the file final. The order matters: a crash before the truncation finds the
// open format, one after it the trailer at the end of the file.
func sealFile(f vfs.File, h *sco.Header, clusters, records uint32, encoded []byte, crcs []uint32, sync func() error) (*scoMeta, error) {
	t, footer := h.Footer(clusters, records, encoded, crcs)
	if _, err := f.WriteAt(aligned(footer), t.RecordOff); err != nil {
		return nil, fmt.Errorf("write footer: %w", err)
	}
	if err := sync(); err != nil {
		return nil, err
	}
	if err := f.Truncate(t.Size()); err != nil {
		return nil, fmt.Errorf("truncate to %d: %w", t.Size(), err)
	}
	if err := sync(); err != nil {
		return nil, err
	}
	return &scoMeta{number: t.Number, clusters: clusters, records: records, crcOff: t.CRCOff, size: t.Size(), local: true}, nil
}

// seal makes a closed SCO's file final. Caller holds ioMu.
func (v *Volume) seal(l *logSCO) error {
	records, clusters := unpack(l.head.Load())
	if records == 0 {
		// Nothing was ever logged here (a clean stop): forget it.
		v.metaMu.Lock()
		v.unlist(l)
		v.metaMu.Unlock()
		return nil
	}
	if err := v.ensureFile(l); err != nil {
		return err
	}
	encoded := make([]byte, 0, sco.RecordBytes(records)+chunkBytes)
	for slot := range divUp(records, chunkRecords) {
		encoded = append(encoded, v.eng.pool.chunk(l.recs[slot].Load())...)
	}
	crcs := make([]uint32, clusters)
	for i := range crcs {
		if t := l.crcs[i/chunkClusters].Load(); t != nil {
			crcs[i] = t[i%chunkClusters].Load()
		}
	}
	l.unsynced = true
	m, err := sealFile(l.file, &l.hdr, clusters, records, encoded, crcs, func() error { return v.syncFile(l) })
	if err != nil {
		return fmt.Errorf("SCO %d: %w", l.hdr.Number, err)
	}
	l.durable.Store(records)
	v.stats.spilled.Add(uint64(m.size - m.crcOff + sco.RecordBytes(records)))
	v.metaMu.Lock() // a checkpoint sees it here or there, not twice
	v.scos[m.number] = m
	v.unlist(l)
	v.metaMu.Unlock()
	for slot := range l.recs {
		v.eng.pool.releaseOf(l, chunkRecs, uint32(slot))
	}
	for slot := range l.data {
		v.eng.pool.markClean(l, uint32(slot))
	}
	l.sealed.Store(true)
	v.eng.files.put(fileKey{v.tag, m.number}, *l.reader.Swap(nil))
	for i := range l.crcs {
		l.crcs[i].Store(nil) // the file has them now
	}
	if err := l.file.Close(); err != nil {
		v.log.Warn().Uint64("sco", m.number).Err(err).Msg("close after sealing")
	}
	v.eng.addLocal(m.size)
	v.kickUpload()
	return nil
}

// unlist takes l from the SCOs that are not sealed. Caller holds metaMu.
func (v *Volume) unlist(l *logSCO) {
	for i, o := range v.unsealed {
		if o == l {
			v.unsealed = append(v.unsealed[:i:i], v.unsealed[i+1:]...)
			return
		}
	}
}
