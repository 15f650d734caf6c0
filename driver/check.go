package driver

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"slices"

	"scoria/driver/block"
	"scoria/driver/lba"
	"scoria/driver/sco"
	"scoria/driver/tlog"
)

// maxProblems bounds what a report lists.
const maxProblems = 1000

func (r *CheckReport) problem(format string, args ...any) {
	if len(r.Problems) < maxProblems {
		r.Problems = append(r.Problems, fmt.Sprintf(format, args...))
	}
}

// sealedRecords reads the records of a sealed SCO from its local copy or the store.
func (v *Volume) sealedRecords(ctx context.Context, m *scoMeta) ([]tlog.Record, error) {
	t, r, done, err := v.openSealed(ctx, m)
	if err != nil {
		return nil, err
	}
	defer done()
	return t.ReadRecords(r)
}

// openSealed opens a sealed SCO wherever it is.
func (v *Volume) openSealed(ctx context.Context, m *scoMeta) (sco.Trailer, readerAt, func(), error) {
	v.metaMu.Lock()
	local := m.local
	v.metaMu.Unlock()
	var r readerAt = storeObject{ctx, v, v.objectOf(m)}
	done := func() {}
	if local {
		f, release, err := v.openLocal(m)
		switch {
		case err == nil:
			r, done = f, release
		case !errors.Is(err, fs.ErrNotExist): // else it was evicted meanwhile
			return sco.Trailer{}, nil, nil, err
		}
	}
	t, err := sco.ReadTrailer(r, m.size)
	if err != nil {
		done()
		return t, nil, nil, fmt.Errorf("SCO %d: %w", m.number, err)
	}
	return t, r, done, nil
}

// readerAt is io.ReaderAt.
type readerAt interface {
	ReadAt(p []byte, off int64) (int, error)
}

// Check verifies, while the volume is in use, that every copy of every SCO and of
// the checkpoint is whole, that the map and the SCOs' records agree, and that the
// space accounting is right. progress is called with bytes.
//
// It keeps SCOs from being deleted meanwhile, and ends early with ErrClosed when
// the volume is closed. From any goroutine.
func (v *Volume) Check(ctx context.Context, progress func(done, total int64)) (CheckReport, error) {
	var rep CheckReport
	ctx, leave, err := v.enter(ctx)
	if err != nil {
		return rep, err
	}
	defer leave()
	v.checkMu.RLock()
	defer v.checkMu.RUnlock()
	err = v.checkAll(ctx, &rep, progress)
	if err != nil && v.closing.Load() {
		err = fmt.Errorf("check: %w", block.ErrClosed)
	}
	return rep, err
}

func (v *Volume) checkAll(ctx context.Context, rep *CheckReport, progress func(done, total int64)) error {
	v.metaMu.Lock()
	var metas []*scoMeta
	var total int64
	for _, m := range v.scos {
		metas = append(metas, m)
		total += m.size
	}
	v.metaMu.Unlock()
	slices.SortFunc(metas, func(a, b *scoMeta) int { return int(int64(a.number) - int64(b.number)) })
	var done int64
	for _, m := range metas {
		if err := v.checkSealed(ctx, m, rep); err != nil {
			return err
		}
		done += m.size
		if progress != nil {
			progress(done, total)
		}
	}
	v.checkHead(ctx, rep)
	v.checkCheckpoint(ctx, rep)
	v.checkSnapshots(ctx, rep)
	return ctx.Err()
}

// checkSealed verifies every copy of a sealed SCO: one that nobody reads is what
// the next damage is repaired from.
func (v *Volume) checkSealed(ctx context.Context, m *scoMeta, rep *CheckReport) error {
	rep.SCOs++
	v.metaMu.Lock()
	local := m.local
	v.metaMu.Unlock()
	var records []tlog.Record
	if local {
		f, release, err := v.openLocal(m)
		if err == nil {
			records = v.checkCopy(ctx, m, "local copy", f, rep)
			release()
		} else if !errors.Is(err, fs.ErrNotExist) { // else it was uploaded and evicted meanwhile
			rep.problem("SCO %d: local copy: %v", m.number, err)
		}
	}
	v.metaMu.Lock()
	local, uploaded := m.local, m.uploaded
	v.metaMu.Unlock()
	if uploaded {
		if r := v.checkCopy(ctx, m, "store's copy", storeObject{ctx, v, v.objectOf(m)}, rep); records == nil {
			records = r
		}
	}
	if !local && !uploaded {
		rep.problem("SCO %d: neither a local copy nor one in the store", m.number)
	}
	if err := ctx.Err(); err != nil || records == nil {
		return err
	}
	return v.checkLive(ctx, m.number, records, rep)
}

// checkCopy verifies header, trailer, records, CRC table and data of one copy,
// and returns the records, nil if they can't be read.
func (v *Volume) checkCopy(ctx context.Context, m *scoMeta, which string, r io.ReaderAt, rep *CheckReport) []tlog.Record {
	bad := func(err error) {
		rep.problem("SCO %d: %s: %v", m.number, which, err)
		if errors.Is(err, ErrLost) {
			v.lostInStore(v.objectOf(m))
		}
	}
	page := make([]byte, sco.Page)
	if _, err := r.ReadAt(page, 0); err != nil {
		bad(err)
	} else if h, err := sco.DecodeHeader(page); err != nil {
		bad(err)
	} else if h.Volume != v.cfg.ID || h.Number != m.number || h.Generation != m.generation() {
		bad(fmt.Errorf("its header is of SCO %d, generation %d, of volume %s", h.Number, h.Generation, h.Volume))
	}
	t, err := sco.ReadTrailer(r, m.size)
	if err != nil {
		bad(err)
		return nil
	}
	if t.Clusters != m.clusters || t.Records != m.records {
		bad(fmt.Errorf("its trailer has %d clusters and %d records, %d and %d are known", t.Clusters, t.Records, m.clusters, m.records))
	}
	place, err := v.checkGeneration(m, &t, r)
	if err != nil {
		bad(err)
		return nil
	}
	table, err := t.ReadCRCs(r)
	if err != nil {
		bad(err)
	}
	records, err := t.ReadRecords(r)
	if err != nil {
		bad(err)
		return nil
	}
	crcs := make(map[uint32]uint32, len(records))
	for i := range records {
		if !records[i].HasData() {
			continue
		}
		c, ok := place(records[i].Cluster)
		if !ok {
			bad(fmt.Errorf("record %d names cluster %d, which it does not have", i, records[i].Cluster))
			continue
		}
		crcs[c] = records[i].DataCRC
		if table != nil && (int(c) >= len(table) || table[c] != records[i].DataCRC) {
			bad(fmt.Errorf("the CRC table differs from record %d", i))
		}
	}
	if t.Generation > 0 && uint32(len(crcs)) != t.Clusters {
		bad(fmt.Errorf("%d of %d clusters have a record", len(crcs), t.Clusters))
	}
	v.checkData(ctx, &t, crcs, r, rep, bad)
	return records
}

// checkGeneration verifies what makes a copy the generation that is known, and returns
// where in it a cluster lies.
func (v *Volume) checkGeneration(m *scoMeta, t *sco.Trailer, r io.ReaderAt) (place func(uint32) (uint32, bool), err error) {
	if t.Generation != m.generation() {
		return nil, fmt.Errorf("its trailer is of generation %d, %d is known", t.Generation, m.generation())
	}
	if m.compact == nil {
		return func(c uint32) (uint32, bool) { return c, true }, nil
	}
	kept, err := t.ReadKept(r)
	if err != nil {
		return nil, err
	}
	if t.Span != m.compact.span || t.KeptCRC != m.compact.keptCRC {
		return nil, fmt.Errorf("it keeps other clusters than are known: %w", sco.ErrFormat)
	}
	return kept.Slot, nil
}

// checkData verifies the clusters of one copy.
func (v *Volume) checkData(ctx context.Context, t *sco.Trailer, crcs map[uint32]uint32, r io.ReaderAt, rep *CheckReport, bad func(error)) {
	buf := make([]byte, 1<<20)
	for c := uint32(0); c < t.Clusters && ctx.Err() == nil; {
		n := min(uint32(len(buf)/block.ClusterSize), t.Clusters-c)
		p := buf[:n*block.ClusterSize]
		if _, err := r.ReadAt(p, sco.DataOff(c)); err != nil {
			bad(fmt.Errorf("clusters %d to %d: %w", c, c+n-1, err))
		} else {
			for i := range n {
				want, has := crcs[c+i]
				if has && tlog.CRC(p[i*block.ClusterSize:(i+1)*block.ClusterSize]) != want {
					bad(fmt.Errorf("cluster %d: %w", c+i, block.ErrCorrupt))
				}
			}
			rep.Clusters += uint64(n)
			rep.Bytes += uint64(len(p))
		}
		c += n
	}
}

// checkLive compares the map's references to a SCO with the counter. The map is
// made resident first so that the comparison itself is one short exclusive
// section.
func (v *Volume) checkLive(ctx context.Context, number uint64, records []tlog.Record, rep *CheckReport) error {
	for i := range records {
		if r := &records[i]; r.HasData() {
			if _, err := v.locateIn(ctx, r.LBA); err != nil {
				rep.problem("map page of cluster %d: %v", r.LBA, err)
				return ctx.Err()
			}
		}
	}
	v.gate.Lock()
	defer v.gate.Unlock()
	live := int32(0)
	for i := range records {
		r := &records[i]
		if !r.HasData() {
			continue
		}
		if now, _ := v.m.Get(r.LBA); now == lba.MakeLocation(number, r.Cluster) {
			live++
		}
	}
	if have := v.live.at(number).Load(); have != live {
		rep.problem("SCO %d: %d clusters are current, %d are accounted for", number, live, have)
	}
	return nil
}

// checkHead verifies the SCOs that are not sealed, and that all references of
// the map are accounted for.
func (v *Volume) checkHead(ctx context.Context, rep *CheckReport) {
	v.metaMu.Lock()
	list := append([]*logSCO(nil), v.unsealed...)
	v.metaMu.Unlock()
	buf := make([]byte, block.ClusterSize)
	for _, l := range list {
		records, _ := unpack(l.head.Load())
		for i := uint32(0); i < records && !l.sealed.Load() && ctx.Err() == nil; i++ {
			r, ok := l.peek(i)
			if !ok || !r.HasData() {
				continue
			}
			loc := lba.MakeLocation(l.hdr.Number, r.Cluster)
			now, err := v.locateIn(ctx, r.LBA)
			if err != nil {
				rep.problem("map page of cluster %d: %v", r.LBA, err)
				return
			}
			if now != loc {
				continue
			}
			if err := v.readCluster(ctx, loc, buf); err != nil {
				rep.problem("SCO %d: cluster %d: %v", l.hdr.Number, r.Cluster, err)
			} else if tlog.CRC(buf) != r.DataCRC {
				if again, _ := v.locateIn(ctx, r.LBA); again == loc && !l.sealed.Load() {
					rep.problem("SCO %d: cluster %d fails its checksum in the write buffer", l.hdr.Number, r.Cluster)
				}
			}
			rep.Clusters++
			rep.Bytes += block.ClusterSize
		}
	}
	v.gate.Lock()
	defer v.gate.Unlock()
	v.metaMu.Lock()
	defer v.metaMu.Unlock()
	sum := v.inherited()
	for _, m := range v.scos {
		sum += uint64(v.live.at(m.number).Load())
	}
	for _, l := range v.unsealed {
		sum += uint64(v.live.at(l.hdr.Number).Load())
	}
	if mapped := v.m.Mapped(); sum != mapped {
		rep.problem("the map has %d clusters, the SCOs and ancestors account for %d", mapped, sum)
	}
}

// peek reads a record of a SCO that may be sealed at any moment, which gives the
// chunk to somebody else: the checksum, which is of this SCO and this index,
// tells.
func (l *logSCO) peek(i uint32) (r tlog.Record, ok bool) {
	id := l.recs[i/chunkRecords].Load()
	if id == 0 {
		return r, false
	}
	off := int(i%chunkRecords) * tlog.Size
	return tlog.Get(l.vol.eng.pool.chunk(id)[off:off+tlog.Size], l.key, i)
}

// locateIn is locate for work that ends with ctx.
func (v *Volume) locateIn(ctx context.Context, cluster uint64) (lba.Location, error) {
	for try := 0; ; try++ {
		if loc, ok := v.m.Get(cluster); ok {
			return loc, nil
		}
		if try > 0 {
			return 0, fmt.Errorf("map page of cluster %d: %w", cluster, errNotLoaded)
		}
		if err := v.m.Load(ctx, v.ckpt, cluster, 1); err != nil {
			return 0, err
		}
	}
}

// errNotLoaded is a broken promise of the map, reported instead of trying for ever.
var errNotLoaded = errors.New("it was loaded and is not there")

// CheckVolume checks a volume that is not open.
func (e *Engine) CheckVolume(ctx context.Context, cfg VolumeConfig, progress func(done, total int64)) (CheckReport, error) {
	v, err := e.OpenVolume(ctx, cfg)
	if err != nil {
		return CheckReport{}, err
	}
	rep, err := v.Check(ctx, progress)
	if cerr := v.Close(ctx); err == nil {
		err = cerr
	}
	return rep, err
}
