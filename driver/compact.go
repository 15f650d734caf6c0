package driver

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"time"

	"github.com/google/uuid"

	"scoria/alba/vfs"
	"scoria/driver/block"
	"scoria/driver/lba"
	"scoria/driver/sco"
	"scoria/driver/tlog"
)

// Compaction in place. What snapshots reach can't be moved to the head: the copy for
// the volume would leave the other one where it is, for the snapshots. But a SCO that
// has little of it can be replaced by one of the same number that has nothing else.
// Locations go on meaning what they did, so no map changes: neither the volume's nor
// those of snapshots and clones, which may be many and in use.
//
// Which clusters to keep is known exactly: those that s(n), the first snapshot whose
// position is not before SCO n, reaches. Later snapshots, clones of any of them and the
// volume itself reach only some of these, now and ever after (snapshot.go).
//
// Order: the new generation is written to a file of its own and synced, put into the
// store under a name of its own, and read back from there and compared. Then reads
// change over. A root that names it follows, and when that is in the store the old
// generation goes, there and here. So at any moment the newest root, on the disk as in
// the store, names a generation that is whole; whatever else a crash leaves is removed
// at the next opening. What fails before the change-over leaves everything as it was.

// reachCache is what one snapshot reaches in SCOs that may be worth compacting: it
// is found for many at once. It belongs to house.
type reachCache struct {
	snapshot uuid.UUID
	kept     map[uint64]*sco.Kept
}

// maxReachBytes bounds a reachCache.
const maxReachBytes = 16 << 20

var errPins = errors.New("snapshots are said to reach it, and none can")

// compact writes a SCO that snapshots reach anew without its garbage. Caller holds
// house.
func (v *Volume) compact(ctx context.Context, m *scoMeta) error {
	if err := v.roomToCompact(v.keptBytes(m)); err != nil {
		return err
	}
	kept, err := v.reachedBySnapshots(ctx, m)
	if err != nil || kept == nil {
		return err
	}
	records, err := v.keptRecords(ctx, m, kept)
	if err != nil {
		return err
	}
	v.generation++
	next, crcs, err := v.writeCompacted(ctx, m, kept, records)
	if err != nil {
		return err
	}
	if err := v.storeCompacted(ctx, next, crcs); err != nil {
		// It may be in the store all the same.
		v.dropLocal(next)
		v.retire(next, 0)
		if errors.Is(err, ErrStaleEpoch) {
			v.fence(err)
		}
		return err
	}
	if !v.changeOver(m, next) {
		v.dropLocal(next)
		v.retire(next, 0)
		return nil
	}
	v.stats.compacted.Add(uint64(next.size))
	v.eng.evict()
	return nil
}

// firstReaching is s(n), what stands before it, and how many clusters of the SCO are
// pinned: 0 if no snapshot reaches it any more.
func (v *Volume) firstReaching(n uint64) (s, before Snapshot, pin uint32, err error) {
	v.metaMu.Lock()
	defer v.metaMu.Unlock()
	if pin = v.pins[n]; pin == 0 {
		return s, before, 0, nil
	}
	before = v.origin
	for _, o := range v.snaps {
		if o.SCO >= n {
			return o.Snapshot, before, pin, nil
		}
		before = o.Snapshot
	}
	return s, before, pin, fmt.Errorf("SCO %d: %w", n, errPins)
}

// reachedBySnapshots is which clusters of a SCO snapshots reach; nil if that has just
// changed. There must be as many as are pinned.
func (v *Volume) reachedBySnapshots(ctx context.Context, m *scoMeta) (*sco.Kept, error) {
	s, before, pin, err := v.firstReaching(m.number)
	if err != nil || pin == 0 {
		return nil, err
	}
	if v.reach == nil || v.reach.snapshot != s.ID || v.reach.kept[m.number] == nil {
		if v.reach, err = v.findReached(ctx, m, s, before); err != nil {
			v.reach = nil
		}
	}
	now, _, pin, nerr := v.firstReaching(m.number)
	if nerr == nil && (pin == 0 || now.ID != s.ID) {
		return nil, nil // the snapshot was being deleted
	}
	if err := cmp.Or(err, nerr); err != nil {
		return nil, err
	}
	kept := v.reach.kept[m.number]
	delete(v.reach.kept, m.number)
	if kept.Len() != pin {
		return nil, fmt.Errorf("SCO %d: snapshot %s reaches %d clusters, %d are pinned: %w", m.number, s.Name, kept.Len(), pin, block.ErrCorrupt)
	}
	return kept, nil
}

// findReached reads what a snapshot's map says of m and of other SCOs with garbage
// between it and the snapshot before. Pages that are older than that have none of
// them. What is found must be as many clusters as the snapshot's root says.
func (v *Volume) findReached(ctx context.Context, m *scoMeta, s, before Snapshot) (*reachCache, error) {
	root, blob, err := v.readSnapshotRoot(ctx, &s)
	if err != nil {
		return nil, err
	}
	kept := map[uint64]*sco.Kept{m.number: sco.NewKept(m.span())}
	room := int64(maxReachBytes)
	v.metaMu.Lock()
	for n, o := range v.scos {
		if pin := v.pins[n]; n > before.SCO && n <= s.SCO && pin > 0 && float64(pin) < fullPart*float64(o.clusters) && kept[n] == nil {
			if room -= int64(o.span())/4 + 256; room < 0 {
				break
			}
			kept[n] = sco.NewKept(o.span())
		}
	}
	v.metaMu.Unlock()
	page := make([]byte, lba.PageBytes)
	pages := 0
	for leaf, addr := range root.Directory {
		if addr.Object() <= before.LastObject {
			continue
		}
		if pages++; pages%64 == 0 {
			if err := v.yield(ctx); err != nil {
				return nil, err
			}
		}
		if err := v.ckpt.ReadPage(ctx, addr, page); err != nil {
			return nil, fmt.Errorf("snapshot %s: map leaf %d: %w", s.Name, leaf, err)
		}
		for i := range uint64(lba.LeafClusters) {
			loc := lba.SlotOf(page, i)
			if k := kept[loc.SCO()]; k != nil && !k.Add(loc.Cluster()) {
				return nil, fmt.Errorf("snapshot %s: map leaf %d: location %s: %w", s.Name, leaf, loc, block.ErrCorrupt)
			}
		}
	}
	live := liveCounts(blob.scos)
	for n, k := range kept {
		if k.Len() != live[n] {
			err := fmt.Errorf("SCO %d: snapshot %s reaches %d clusters, its root says %d: %w", n, s.Name, k.Len(), live[n], block.ErrCorrupt)
			if n == m.number {
				return nil, err
			}
			v.raise("accounting", "%v; run scoria volume check %s", err, v.cfg.Name)
			delete(kept, n)
			continue
		}
		k.Seal()
	}
	return &reachCache{s.ID, kept}, nil
}

// span is how many clusters locations in the SCO may name.
func (m *scoMeta) span() uint32 {
	if m.compact != nil {
		return m.compact.span
	}
	return m.clusters
}

// keptRecords are the records of a compacted SCO. It is the last look at those that go:
// none may be current, whatever the snapshot says.
func (v *Volume) keptRecords(ctx context.Context, m *scoMeta, kept *sco.Kept) ([]tlog.Record, error) {
	all, err := v.sealedRecords(ctx, m)
	if err != nil {
		return nil, err
	}
	if all[0].Type != tlog.Open {
		return nil, fmt.Errorf("SCO %d: it does not begin with its predecessor: %w", m.number, sco.ErrFormat)
	}
	records := append(make([]tlog.Record, 0, kept.Len()+1), all[0])
	named := sco.NewKept(kept.Span())
	for i := range all {
		r := &all[i]
		switch {
		case !r.HasData():
		case kept.Has(r.Cluster):
			if named.Add(r.Cluster) {
				records = append(records, *r)
			}
		default:
			now, err := v.locateIn(ctx, r.LBA)
			if err != nil {
				return nil, err
			}
			if now == lba.MakeLocation(m.number, r.Cluster) {
				return nil, fmt.Errorf("SCO %d: cluster %d is current in it and no snapshot has it: %w", m.number, r.LBA, block.ErrCorrupt)
			}
		}
	}
	if named.Len() != kept.Len() {
		return nil, fmt.Errorf("SCO %d: %d of %d reached clusters have a record: %w", m.number, named.Len(), kept.Len(), block.ErrCorrupt)
	}
	return records, nil
}

// writeCompacted writes a generation to the local disk and syncs it. It leaves nothing
// behind if it fails.
func (v *Volume) writeCompacted(ctx context.Context, m *scoMeta, kept *sco.Kept, records []tlog.Record) (*scoMeta, []uint32, error) {
	h := &sco.Header{
		Volume: v.cfg.ID, Number: m.number, Epoch: v.cfg.Epoch, Generation: v.generation,
		ClustersCap: kept.Span(), RecordsLimit: recordsLimit(kept.Span()),
	}
	crcs := make([]uint32, kept.Len())
	for i := range records {
		if slot, ok := kept.Slot(records[i].Cluster); ok && records[i].HasData() {
			crcs[slot] = records[i].DataCRC
		}
	}
	t, footer := h.CompactFooter(kept, records, crcs)
	next := metaOf(&t)
	next.compact.kept.Store(kept)
	name := v.pathOf(next)
	err := v.roomToCompact(t.Size())
	if err == nil {
		err = v.writeGeneration(ctx, name, m, h, kept, crcs, &t, footer)
	}
	if err == nil {
		err = v.eng.cfg.FS.SyncDir(v.scoDir())
	}
	if err != nil {
		if rerr := v.eng.cfg.FS.Remove(name); rerr != nil && !errors.Is(rerr, fs.ErrNotExist) {
			v.log.Warn().Uint64("sco", m.number).Err(rerr).Msg("half a compacted SCO can't be removed")
		}
		return nil, nil, fmt.Errorf("SCO %d: generation %d: %w", m.number, v.generation, err)
	}
	v.metaMu.Lock()
	next.local, next.uploaded, next.lastRead = true, true, m.lastRead
	v.spaceTaken(next.size, 0)
	v.metaMu.Unlock()
	v.eng.addLocal(next.size)
	return next, crcs, nil
}

// keptBytes is about what a SCO will take when it is compacted.
func (v *Volume) keptBytes(m *scoMeta) int64 {
	v.metaMu.Lock()
	defer v.metaMu.Unlock()
	return m.size * int64(v.pins[m.number]) / int64(max(m.clusters, 1))
}

// roomToCompact fails with errNoRoom unless a file of that size, and what the store takes
// for it, leaves half of the disk's reserve and all that is promised (room.go): the old
// generation goes when a checkpoint is in the store, and for that the log must get its room.
func (v *Volume) roomToCompact(size int64) error {
	v.eng.room.look()
	if v.eng.room.left() >= size+v.inStore(size)+v.spare()/2 {
		return nil
	}
	v.askForRoom()
	return errNoRoom
}

// compactPiece is how many clusters are copied at a time.
const compactPiece = 256

func (v *Volume) writeGeneration(ctx context.Context, name string, m *scoMeta, h *sco.Header, kept *sco.Kept, crcs []uint32, t *sco.Trailer, footer []byte) (err error) {
	f, err := v.eng.cfg.FS.Open(name, vfs.Create|vfs.Exclusive|vfs.Direct)
	if err != nil {
		return err
	}
	defer func() {
		if cerr := f.Close(); err == nil {
			err = cerr
		}
	}()
	if err := f.Allocate(0, t.Size()); err != nil {
		return err
	}
	v.eng.room.look() // nobody is to be promised that
	if _, err := f.WriteAt(aligned(h.Encode()), 0); err != nil {
		return err
	}
	buf := aligned(make([]byte, compactPiece*block.ClusterSize))
	next := uint32(0) // cluster to look at
	for slot := uint32(0); slot < kept.Len(); {
		if err := v.yield(ctx); err != nil {
			return err
		}
		n := uint32(0)
		for n < compactPiece && slot+n < kept.Len() {
			first, run := kept.Run(next, min(maxRunClusters, compactPiece-n))
			if err := v.copyClusters(ctx, m, first, buf[n*block.ClusterSize:(n+run)*block.ClusterSize], crcs[slot+n:]); err != nil {
				return err
			}
			next = first + run
			n += run
		}
		if _, err := f.WriteAt(buf[:n*block.ClusterSize], sco.DataOff(slot)); err != nil {
			return err
		}
		slot += n
	}
	if _, err := f.WriteAt(aligned(footer), t.RecordOff); err != nil {
		return err
	}
	return f.Sync()
}

// copyClusters reads clusters of a SCO and sees that they are what its records say.
func (v *Volume) copyClusters(ctx context.Context, m *scoMeta, first uint32, p []byte, crcs []uint32) error {
	v.metaMu.Lock()
	local := m.local
	v.metaMu.Unlock()
	if err := v.readCopies(ctx, m, local, first, p); err != nil {
		return err
	}
	for i := range len(p) / block.ClusterSize {
		if tlog.CRC(p[i*block.ClusterSize:(i+1)*block.ClusterSize]) != crcs[i] {
			v.corrupt(m.number, first+uint32(i))
			return fmt.Errorf("cluster %d is not what its record says: %w", first+uint32(i), block.ErrCorrupt)
		}
	}
	return nil
}

// storeCompacted puts a generation into the store and reads it back: what it replaces
// is the only other copy.
func (v *Volume) storeCompacted(ctx context.Context, next *scoMeta, crcs []uint32) error {
	// A store that hangs must not keep the volume from its other work.
	ctx, cancel := context.WithTimeout(ctx, putTimeout+time.Duration(next.size>>20)*100*time.Millisecond)
	defer cancel()
	defer v.stats.stages[StageStore].since(time.Now())
	f, release, err := v.openLocal(next)
	if err != nil {
		return err
	}
	defer release()
	err = v.cfg.Store.Put(ctx, v.namespace(), v.objectOf(next), v.cfg.Epoch,
		Object{Data: f, Size: next.size, LocalPath: v.pathOf(next)})
	if err == nil {
		err = v.compareStored(ctx, next, crcs)
	}
	if err != nil {
		return fmt.Errorf("SCO %d: generation %d: %w", next.number, next.generation(), err)
	}
	return nil
}

// compareStored reads all of a generation from the store.
func (v *Volume) compareStored(ctx context.Context, next *scoMeta, crcs []uint32) error {
	r := storeObject{ctx, v, v.objectOf(next)}
	t, err := sco.ReadTrailer(r, next.size)
	if err != nil {
		return err
	}
	if got := metaOf(&t); got.compact == nil || got.clusters != next.clusters || got.records != next.records ||
		got.crcOff != next.crcOff || t.Generation != next.generation() || t.KeptCRC != next.compact.keptCRC || t.Volume != v.cfg.ID || t.Number != next.number {
		return fmt.Errorf("the store returned the trailer of another: %w", block.ErrCorrupt)
	}
	if _, err := t.ReadKept(r); err != nil {
		return err
	}
	if _, err := t.ReadRecords(r); err != nil {
		return err
	}
	if _, err := t.ReadCRCs(r); err != nil {
		return err
	}
	buf := make([]byte, compactPiece*block.ClusterSize)
	for c := uint32(0); c < next.clusters; {
		if err := v.yield(ctx); err != nil {
			return err
		}
		n := min(compactPiece, next.clusters-c)
		p := buf[:n*block.ClusterSize]
		if _, err := r.ReadAt(p, sco.DataOff(c)); err != nil {
			return err
		}
		for i := range n {
			if tlog.CRC(p[i*block.ClusterSize:(i+1)*block.ClusterSize]) != crcs[c+i] {
				return fmt.Errorf("cluster at %d came back changed from the store: %w", c+i, block.ErrCorrupt)
			}
		}
		c += n
	}
	return nil
}

// changeOver makes a generation the one that is read. The old one stays until the next
// root, which is the first to name the new one, is in the store. It reports false if
// the SCO is being deleted.
func (v *Volume) changeOver(old, next *scoMeta) bool {
	c := v.ckpt
	c.mu.Lock()
	defer c.mu.Unlock()
	v.metaMu.Lock()
	if v.scos[old.number] != old || old.dropping || old.doomed {
		v.metaMu.Unlock()
		return false
	}
	v.scos[old.number] = next
	v.metaMu.Unlock()
	v.retire(old, c.sequence+1)
	return true
}

// yield lets guests go first: while the write buffer fills, the disk is theirs. It
// does not wait for long, as what is compacted gives room.
func (v *Volume) yield(ctx context.Context) error {
	for range 10 {
		if err := ctx.Err(); err != nil {
			return err
		}
		if v.eng.pool.fill() <= (spillAt+throttleAt)/2 || v.space.tight.Load() {
			return nil
		}
		select {
		case <-v.eng.pool.roomChan():
		case <-time.After(10 * time.Millisecond):
		case <-ctx.Done():
		}
	}
	return ctx.Err()
}
