package driver

import (
	"fmt"
	"sync"
	"time"

	"scoria/alba/vfs"
	"scoria/driver/block"
	"scoria/driver/sco"
	"scoria/driver/tlog"
)

// spillWhole writes whole chunks of the head, without records: spilledR must
// never run ahead of the clusters that its records name. A cluster may still be
// on its way into its chunk, so it waits for the records.
func (v *Volume) spillWhole(l *logSCO, whole uint32) error {
	records, _ := unpack(l.head.Load())
	l.filled(l.spilledR, records, true)
	return v.writeOut(l, l.spilledR, min(whole, l.spilledC+spillPiece), v.gently())
}

// spill writes records up to records and the clusters that belong to them; at
// most piece clusters if that is positive. one is how many chunks a write to the
// disk takes.
func (v *Volume) spill(l *logSCO, records uint32, piece, one int) error {
	l.filled(l.spilledR, records, true)
	clusters := v.clustersBefore(l, records)
	if piece > 0 && clusters > l.spilledC+uint32(piece) {
		return v.writeOut(l, l.spilledR, l.spilledC+uint32(piece), one)
	}
	return v.writeOut(l, records, clusters, one)
}

// gently is how many chunks one write to the disk takes if nobody waits for it.
func (v *Volume) gently() int {
	if v.eng.pool.fill() >= throttleAt || v.space.hurry.Load() {
		return maxVec // somebody does
	}
	return gentleVec
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
// to the SCO's file, one chunks at a time. Caller holds ioMu.
func (v *Volume) writeOut(l *logSCO, records, clusters uint32, one int) error {
	if err := v.ensureFile(l); err != nil {
		return err
	}
	start := time.Now()
	from := l.spilledC
	if small, err := v.writeSmall(l, records, clusters); small || err != nil {
		return err
	}
	for l.spilledC < clusters {
		if err := v.writeChunks(l, clusters, one); err != nil {
			return err
		}
	}
	if clusters > from {
		v.eng.spillRate(int(clusters-from), time.Since(start), one == maxVec)
	}
	return v.writeRecords(l, records)
}

// writeSmall writes a few clusters and the records that name them at the same
// time, which is half the wait of one after the other, if both lie in one piece.
// The sync that follows covers both. Without it, records may be on the disk whose
// clusters are not: recovery believes what was not known to be synced only as far
// as the clusters have the right checksums.
func (v *Volume) writeSmall(l *logSCO, records, clusters uint32) (done bool, err error) {
	from := l.spilledR / recordsPage * recordsPage
	to := divUp(records, recordsPage) * recordsPage
	if clusters <= l.spilledC || clusters-l.spilledC > chunkClusters ||
		records <= l.spilledR || to-from > recordScratch/tlog.Size || from/chunkRecords != (to-1)/chunkRecords {
		return false, nil
	}
	var vec [maxVec + aheadChunks][]byte
	n, c, blocks := v.gather(l, clusters, maxVec, &vec)
	scratch := recordBuffers.Get().(*[]byte)
	defer recordBuffers.Put(scratch)
	data := v.copyRecords(l, *scratch, from, to)
	l.unsynced = true
	start := time.Now()
	bytes, err := l.file.WriteParts([]vfs.Part{
		{Bufs: vec[:n], Off: sco.DataOff(l.spilledC)},
		{Bufs: [][]byte{data}, Off: l.hdr.RecordOff() + int64(from)*tlog.Size},
	})
	v.stats.stages[StageSpill].since(start)
	v.stats.spilled.Add(uint64(bytes))
	if err != nil {
		return false, fmt.Errorf("SCO %d: write %d clusters and their records: %w", l.hdr.Number, c-l.spilledC, err)
	}
	l.blocksC = max(l.blocksC, blocks)
	v.spilledTo(l, c)
	l.spilledR = records
	return true, nil
}

// maxVec is how many chunks one write to the disk takes together at most: 4 MiB.
// The kernel prepares a direct write without letting others have the CPU, for
// about 55 µs per MiB. A worker on that CPU must not be held up for long when
// nobody waits for the write: then it is gentleVec.
const (
	maxVec    = 16
	gentleVec = 4
)

// aheadChunks of zeroes follow a small write into blocks that were never
// written. The first write into an allocated block makes the file system log
// that; when flushes come one by one, doing it for many blocks at once saves most
// of each.
const aheadChunks = 4

var zeroes = aligned(make([]byte, chunkBytes))

// writeChunks writes clusters from spilledC on, up to clusters or one chunks.
func (v *Volume) writeChunks(l *logSCO, clusters uint32, one int) error {
	var vec [maxVec + aheadChunks][]byte
	from := l.spilledC
	n, c, blocks := v.gather(l, clusters, one, &vec)
	l.unsynced = true
	start := time.Now()
	bytes, err := l.file.WriteVecAt(vec[:n], sco.DataOff(from))
	v.stats.stages[StageSpill].since(start)
	v.stats.spilled.Add(uint64(bytes))
	l.blocksC = max(l.blocksC, blocks)
	if err != nil {
		return fmt.Errorf("SCO %d: write %d clusters: %w", l.hdr.Number, c-from, err)
	}
	v.spilledTo(l, c)
	return nil
}

// gather collects what is to be written from spilledC on: clusters up to
// clusters, as many as one chunks hold (at most maxVec), and zeroes behind few where more
// flushes are to be expected. It returns the number of pieces, where the clusters end, and where the zeroes do.
func (v *Volume) gather(l *logSCO, clusters uint32, one int, vec *[maxVec + aheadChunks][]byte) (n int, c, blocks uint32) {
	for c = l.spilledC; n < one && c < clusters; n++ {
		slot, off := l.cluster(c)
		k := min(chunkClusters-c%chunkClusters, clusters-c)
		vec[n] = v.eng.pool.chunk(l.data[slot].Load())[off : off+int(k)*block.ClusterSize]
		c += k
	}
	blocks = c
	if l.flushed && !l.closed.Load() && c-l.spilledC < chunkClusters && c > l.blocksC {
		for ; n < len(vec) && blocks < l.hdr.ClustersCap; n++ {
			k := min(chunkClusters, l.hdr.ClustersCap-blocks)
			vec[n] = zeroes[:k*block.ClusterSize]
			blocks += k
		}
	}
	return n, c, blocks
}

// spilledTo notes that the clusters before c are in the file.
func (v *Volume) spilledTo(l *logSCO, c uint32) {
	from := l.spilledC
	l.spilledC = c
	for slot := from / chunkClusters; slot < divUp(c, chunkClusters); slot++ {
		if (slot+1)*chunkClusters <= c || l.endsAt(c) {
			v.eng.pool.markClean(l, slot)
		}
	}
}

const (
	recordsPage = sco.Page / tlog.Size
	// recordScratch is the size of the buffers that records are written from.
	recordScratch = 64 << 10
)

var recordBuffers = sync.Pool{New: func() any {
	b := aligned(make([]byte, recordScratch))
	return &b
}}

// writeRecords writes the pages that hold records [spilledR, records). The first
// page repeats records that are durable already, with the same bytes: a torn
// write can't hurt them.
func (v *Volume) writeRecords(l *logSCO, records uint32) error {
	for r := l.spilledR / recordsPage * recordsPage; r < records && l.spilledR < records; {
		stop := min(divUp(records, recordsPage)*recordsPage, (r/chunkRecords+1)*chunkRecords, r+recordScratch/tlog.Size)
		scratch := recordBuffers.Get().(*[]byte)
		data := v.copyRecords(l, *scratch, r, stop)
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

// copyRecords copies records [from, to), which lie in one chunk, to scratch:
// writers go on filling the last page, and what changes under a direct write
// upsets checksums and mirrors below.
func (v *Volume) copyRecords(l *logSCO, scratch []byte, from, to uint32) []byte {
	b := v.eng.pool.chunk(l.recs[from/chunkRecords].Load())
	first := from % chunkRecords
	return scratch[:copy(scratch, b[int(first)*tlog.Size:int(first+to-from)*tlog.Size])]
}

// ensureFile creates the SCO's file with room for all that may come into it, which was
// promised when the SCO was begun (room.go).
func (v *Volume) ensureFile(l *logSCO) error {
	if l.file != nil {
		return nil
	}
	name := v.scoPath(l.hdr.Number, 0)
	if err := v.roomForLog(l); err != nil {
		return fmt.Errorf("create %s: %w", name, err)
	}
	f, err := v.eng.cfg.FS.Open(name, vfs.Create|vfs.Direct)
	if err != nil {
		return fmt.Errorf("create %s: %w", name, err)
	}
	if err = v.allocate(l, f); err == nil {
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
	l.created = true
	v.eng.room.kept(l)
	return nil
}

// attach makes f, opened for direct writes, the file of l, and opens it a second
// time for reads.
func (v *Volume) attach(l *logSCO, f vfs.File) error {
	r, err := v.eng.cfg.FS.Open(v.scoPath(l.hdr.Number, 0), vfs.ReadOnly)
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
