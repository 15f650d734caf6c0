package driver

import (
	"fmt"

	"scoria/alba/vfs"
	"scoria/driver/sco"
	"scoria/driver/tlog"
)

// sealFile writes a footer (records, CRC table and trailer) behind the clusters and
// makes the file final. The order matters: a crash before the truncation finds the
// open format, one after it the trailer at the end of the file.
func sealFile(f vfs.File, t *sco.Trailer, footer []byte, sync func() error) (*scoMeta, error) {
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
	m := metaOf(t)
	m.local = true
	return m, nil
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
	encoded := make([]byte, 0, int64(records)*tlog.Size)
	for slot := range divUp(records, chunkRecords) {
		left := min(cap(encoded)-len(encoded), chunkBytes)
		encoded = append(encoded, v.eng.pool.chunk(l.recs[slot].Load())[:left]...)
	}
	crcs := make([]uint32, clusters)
	for i := range crcs {
		if t := l.crcs[i/chunkClusters].Load(); t != nil {
			crcs[i] = t[i%chunkClusters].Load()
		}
	}
	l.unsynced = true
	t, footer := l.hdr.Footer(clusters, records, encoded, crcs)
	m, err := sealFile(l.file, &t, footer, func() error { return v.syncFile(l) })
	if err != nil {
		return fmt.Errorf("SCO %d: %w", l.hdr.Number, err)
	}
	l.durable.Store(records)
	v.stats.spilled.Add(uint64(m.size - m.crcOff + sco.RecordBytes(records)))
	if l.created {
		v.eng.sums.put(v.fileKey(m), sco.SealedSums(&l.hdr, &t, crcs, footer))
	}
	v.metaMu.Lock() // a checkpoint sees it here or there, not twice
	v.scos[m.number] = m
	v.unlist(l)
	v.spaceTaken(m.size, 0)
	v.metaMu.Unlock()
	v.adjustSpace()
	for slot := range l.recs {
		v.eng.pool.releaseOf(l, chunkRecs, uint32(slot))
	}
	for slot := range l.data {
		v.eng.pool.markClean(l, uint32(slot))
	}
	l.sealed.Store(true)
	v.eng.files.put(v.fileKey(m), *l.reader.Swap(nil))
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
			v.spaceTaken(0, -l.provided())
			return
		}
	}
}
