package driver

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync/atomic"

	"scoria/alba/vfs"
	"scoria/driver/block"
	"scoria/driver/sco"
	"scoria/driver/tlog"
)

// loadSCO reads a SCO from wherever it is. nil: there is nothing of it.
func (v *Volume) loadSCO(ctx context.Context, n uint64, inv *inventory) (*replaySCO, error) {
	s, err := v.findSCO(ctx, n, inv)
	if s != nil {
		inv.taken = append(inv.taken, s)
	}
	return s, err
}

func (v *Volume) findSCO(ctx context.Context, n uint64, inv *inventory) (*replaySCO, error) {
	chunks := inv.chunks[n]
	if inv.local[n] {
		s, err := v.loadSealedLocal(n)
		if err != nil && inv.uploaded[n] {
			v.log.Warn().Uint64("sco", n).Err(err).Msg("local copy is damaged; using the store's")
			v.stats.checksumErrors.Add(1)
			s, err = v.loadFromStore(ctx, n)
		}
		if err != nil {
			return nil, err
		}
		if s != nil && !inv.uploaded[n] {
			if err := v.sealAgain(s.meta); err != nil {
				return nil, err
			}
		}
		if s != nil {
			s.meta.uploaded = inv.uploaded[n]
			v.releaseFound(chunks)
			delete(inv.chunks, n)
			return s, nil
		}
	}
	if len(chunks) > 0 {
		delete(inv.chunks, n)
		if s, err := v.loadFromPool(n, chunks, inv.local[n]); s != nil || err != nil {
			return s, err
		}
	}
	if inv.uploaded[n] { // sealed once, whatever the local file looks like now
		if inv.local[n] {
			v.log.Warn().Uint64("sco", n).Msg("local copy is damaged; using the store's")
			v.stats.checksumErrors.Add(1)
		}
		return v.loadFromStore(ctx, n)
	}
	if inv.local[n] {
		return v.loadOpenFile(n)
	}
	return nil, nil
}

// sealAgain repeats the last step of a seal, as the daemon that did it may have
// died before its sync, or have had that fail: without the truncation a loss of
// power would bring the open format back, with the records elsewhere.
func (v *Volume) sealAgain(m *scoMeta) error {
	f, err := v.eng.cfg.FS.Open(v.pathOf(m), 0)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := f.Truncate(m.size); err != nil {
		return fmt.Errorf("SCO %d: truncate to %d: %w", m.number, m.size, err)
	}
	if err := f.Sync(); err != nil {
		return fmt.Errorf("SCO %d: %w", m.number, err)
	}
	return nil
}

func (v *Volume) sealedSCO(t sco.Trailer, r io.ReaderAt) (*replaySCO, error) {
	if t.Volume != v.cfg.ID {
		return nil, fmt.Errorf("SCO %d belongs to volume %s: %w", t.Number, t.Volume, sco.ErrFormat)
	}
	records, err := t.ReadRecords(r)
	if err != nil {
		return nil, err
	}
	return &replaySCO{
		number: t.Number, records: records, cut: t.Records, bound: t.Records,
		meta: metaOf(&t),
	}, nil
}

func (v *Volume) loadSealedLocal(n uint64) (*replaySCO, error) {
	f, err := v.eng.cfg.FS.Open(v.scoPath(n, 0), vfs.ReadOnly)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	size, err := f.Size()
	if err != nil {
		return nil, err
	}
	t, err := sco.ReadTrailer(f, size)
	if errors.Is(err, sco.ErrFormat) {
		return nil, nil // not sealed
	}
	if err != nil {
		return nil, err
	}
	s, err := v.sealedSCO(t, f)
	if s != nil {
		s.meta.local = true
	}
	return s, err
}

func (v *Volume) loadFromStore(ctx context.Context, n uint64) (*replaySCO, error) {
	size, err := v.cfg.Store.Size(ctx, v.namespace(), scoObject(n, 0))
	if err != nil {
		return nil, err
	}
	r := storeObject{ctx, v, scoObject(n, 0)}
	t, err := sco.ReadTrailer(r, size)
	if err != nil {
		return nil, err
	}
	s, err := v.sealedSCO(t, r)
	if s != nil {
		s.meta.uploaded = true
	}
	return s, err
}

// loadFromPool adopts the chunks that a dead daemon left. Records are valid or
// were never finished; the latter become void.
func (v *Volume) loadFromPool(n uint64, chunks []foundChunk, hasFile bool) (*replaySCO, error) {
	l := newLogSCO(v, n, 0, 0)
	var file vfs.File
	if hasFile {
		var err error
		if file, err = v.eng.cfg.FS.Open(v.scoPath(n, 0), vfs.Direct); err != nil {
			return nil, err
		}
		head := aligned(make([]byte, sco.Page))
		_, err = file.ReadAt(head, 0)
		h, herr := sco.DecodeHeader(head)
		if err == nil && herr == nil && h.Volume == v.cfg.ID && h.Number == n {
			l.hdr = h
			l.makeSlots()
		} else { // it died before the header, so nothing else is there either
			file.Close()
			file = nil
		}
	}
	for i, c := range chunks {
		if int(c.slot) >= len(l.slots(c.kind)) || l.slots(c.kind)[c.slot].Load() != 0 {
			if file != nil {
				file.Close()
			}
			v.eng.pool.abandon(l)
			v.eng.pool.putBack(v.cfg.ID, chunks[i:])
			return nil, fmt.Errorf("SCO %d: two chunks of the write buffer claim slot %d: %w", n, c.slot, block.ErrCorrupt)
		}
		v.eng.pool.adopt(c, l)
	}
	s := &replaySCO{number: n, log: l, hdr: l.hdr}
	s.records = l.salvage()
	if len(s.records) == 0 || s.records[0].Type != tlog.Open {
		l.releaseChunks()
		if file != nil {
			file.Close()
		}
		return nil, nil
	}
	if file != nil {
		// The dead daemon may have written without a sync.
		l.unsynced = true
		err := v.rewriteUnsynced(l, file, s.records)
		if err == nil {
			err = file.Sync() // as in ensureFile
		}
		if err == nil {
			err = v.attach(l, file)
		}
		if err != nil {
			file.Close()
			v.eng.pool.abandon(l)
			return nil, err
		}
	}
	l.hdr.Epoch = v.cfg.Epoch
	return s, nil
}

// rewriteUnsynced writes the clusters again that the dead daemon had written to
// the file, did not know to be synced, and keeps nowhere else. Its last sync may
// have failed, and then ours alone would prove nothing (see package vfs).
func (v *Volume) rewriteUnsynced(l *logSCO, file vfs.File, records []tlog.Record) error {
	synced, first := uint32(0), uint32(0)
	for i := range records {
		synced = max(synced, records[i].Durable)
	}
	for i := range records[:min(synced, uint32(len(records)))] {
		if c := records[i].Cluster; c != tlog.NoCluster {
			first = max(first, c+1)
		}
	}
	buf := aligned(make([]byte, chunkBytes))
	for c := first; c < l.spilledC; {
		n := min(chunkClusters, l.spilledC-c)
		p := buf[:n*block.ClusterSize]
		if _, err := file.ReadAt(p, sco.DataOff(c)); err != nil {
			return fmt.Errorf("SCO %d: %d clusters at %d: %w", l.hdr.Number, n, c, err)
		}
		for i := c; i < c+n; i++ {
			crcs := l.crcs[i/chunkClusters].Load()
			if crcs == nil || crcs[i%chunkClusters].Load() == 0 {
				continue // void
			}
			if tlog.CRC(p[(i-c)*block.ClusterSize:(i-c+1)*block.ClusterSize]) != crcs[i%chunkClusters].Load() {
				v.corrupt(l.hdr.Number, i)
				v.failed.Store(true)
				v.raise("sync-failed", "the local disk under %s lost data of SCO %d that were written but never synced: reads of them and all flushes and writes of this volume fail; check the disk", v.dir, l.hdr.Number)
			}
		}
		if _, err := file.WriteAt(p, sco.DataOff(c)); err != nil {
			return fmt.Errorf("SCO %d: rewrite %d clusters at %d: %w", l.hdr.Number, n, c, err)
		}
		c += n
	}
	return nil
}

// salvage reads all records in the pool, voids the holes, and sets the
// reservation and what has to be written out again.
func (l *logSCO) salvage() []tlog.Record {
	var records []tlog.Record
	provided := uint32(0)
	for slot := range l.recs {
		if l.recs[slot].Load() == 0 {
			break
		}
		provided = min(uint32(slot+1)*chunkRecords, l.hdr.RecordsLimit)
	}
	end := uint32(0)
	for i := range provided {
		if _, ok := tlog.Get(l.record(i), l.key, i); ok {
			end = i + 1
		}
	}
	clusters := uint32(0)
	for i := range end {
		r, ok := tlog.Get(l.record(i), l.key, i)
		if !ok {
			// Its clusters are known only by what its neighbours leave out; nothing
			// refers to them.
			r = tlog.Record{Type: tlog.Void, Cluster: tlog.NoCluster}
			clear(l.record(i))
			tlog.Put(l.record(i), l.key, i, &r)
		}
		if r.Cluster != tlog.NoCluster {
			clusters = max(clusters, r.Cluster+1)
		}
		if r.HasData() {
			l.keepCRC(r.Cluster, r.DataCRC)
		}
		records = append(records, r)
	}
	l.head.Store(pack(end, clusters))
	l.limit.Store(pack(end, clusters))
	l.closed.Store(true)
	l.spilledC = clusters
	for slot := divUp(clusters, chunkClusters); slot > 0 && l.data[slot-1].Load() != 0; slot-- {
		l.spilledC = (slot - 1) * chunkClusters
	}
	return records
}

// cutAt ends an adopted SCO behind the given records.
func (l *logSCO) cutAt(records []tlog.Record) {
	clusters := uint32(0)
	for i := range records {
		if c := records[i].Cluster; c != tlog.NoCluster {
			clusters = max(clusters, c+1)
		}
	}
	l.head.Store(pack(uint32(len(records)), clusters))
	l.spilledC = min(l.spilledC, clusters)
}

func (l *logSCO) keepCRC(cluster, crc uint32) {
	p := &l.crcs[cluster/chunkClusters]
	if p.Load() == nil {
		p.Store(new([chunkClusters]atomic.Uint32))
	}
	p.Load()[cluster%chunkClusters].Store(crc)
}

// loadOpenFile reads a SCO that was not sealed when power was lost.
func (v *Volume) loadOpenFile(n uint64) (*replaySCO, error) {
	f, err := v.eng.cfg.FS.Open(v.scoPath(n, 0), 0)
	if err != nil {
		return nil, err
	}
	s, err := v.scanOpenFile(n, f)
	if s == nil {
		f.Close()
	}
	return s, err
}

func (v *Volume) scanOpenFile(n uint64, f vfs.File) (*replaySCO, error) {
	head := make([]byte, sco.Page)
	if _, err := f.ReadAt(head, 0); err != nil && !errors.Is(err, io.EOF) {
		return nil, err
	}
	h, err := sco.DecodeHeader(head)
	if err != nil || h.Volume != v.cfg.ID || h.Number != n {
		return nil, nil
	}
	encoded := make([]byte, int(h.RecordsLimit)*tlog.Size)
	if k, err := f.ReadAt(encoded, h.RecordOff()); err != nil && !errors.Is(err, io.EOF) {
		return nil, err
	} else {
		clear(encoded[k:])
	}
	s := &replaySCO{number: n, hdr: h, file: f}
	key := tlog.Key(v.cfg.ID, n)
	whole := true
	for i := range h.RecordsLimit {
		r, ok := tlog.Get(encoded[i*tlog.Size:], key, i)
		if !ok {
			whole = false
			continue
		}
		if whole {
			s.records = append(s.records, r)
		}
		// Behind the end too: a valid record is genuine, and tells what was synced.
		s.bound = max(s.bound, r.Durable)
	}
	if uint32(len(s.records)) < s.bound {
		return nil, fmt.Errorf("SCO %d: record %d is damaged, %d were synced: %w", n, len(s.records), s.bound, block.ErrCorrupt)
	}
	if len(s.records) == 0 || s.records[0].Type != tlog.Open {
		return nil, nil
	}
	buf := make([]byte, block.ClusterSize)
	for i := int(s.bound); i < len(s.records); i++ {
		r := &s.records[i]
		if !r.HasData() {
			continue
		}
		if r.Cluster >= h.ClustersCap {
			s.records = s.records[:i]
			break
		}
		if _, err := f.ReadAt(buf, sco.DataOff(r.Cluster)); err != nil && !errors.Is(err, io.EOF) {
			return nil, err
		}
		if tlog.CRC(buf) != r.DataCRC {
			s.records = s.records[:i]
			break
		}
	}
	return s, nil
}
