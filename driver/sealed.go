package driver

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"time"

	"scoria/alba/vfs"
	"scoria/driver/block"
	"scoria/driver/cache"
	"scoria/driver/lba"
	"scoria/driver/sco"
	"scoria/driver/tlog"
)

// readSealed reads n clusters of a sealed SCO, verifies them and leaves them in the
// read cache.
func (v *Volume) readSealed(ctx context.Context, loc lba.Location, n uint32, buf []byte) error {
	number := loc.SCO()
	m, local := v.metaFor(number)
	for {
		if m == nil {
			return fmt.Errorf("SCO %d: %w", number, ErrNoObject)
		}
		p := buf[:n*block.ClusterSize]
		err := v.readCopies(ctx, m, local, loc.Cluster(), p)
		if err == nil {
			v.keep(loc, p)
			return nil
		}
		// It may have been compacted, and this generation been deleted, meanwhile.
		was := m.generation()
		if m, local = v.metaFor(number); m == nil || m.generation() <= was {
			return err
		}
	}
}

// readCopies reads clusters from the local copy of a SCO or through the store, and
// verifies them. A local copy that fails its checksum is given up in favour of the
// store's once that has been read: what is sound of it may be all that is left.
func (v *Volume) readCopies(ctx context.Context, m *scoMeta, local bool, first uint32, p []byte) error {
	var cause error
	if local {
		cause = v.readVerified(first, p, func(b []byte, off int64) error { return v.readLocal(m, b, off) }, m)
		if cause == nil || !v.isUploaded(m) {
			return cause
		}
	}
	err := v.readVerified(first, p, func(b []byte, off int64) error {
		v.stats.storeRead.Add(uint64(len(b)))
		defer v.stats.stages[StageStore].since(time.Now())
		return v.readObject(ctx, v.objectOf(m), b, off)
	}, m)
	if err == nil && cause != nil {
		v.giveUpLocal(m, cause)
	}
	return err
}

// metaFor returns a sealed SCO's description and whether it has a local copy.
func (v *Volume) metaFor(number uint64) (m *scoMeta, local bool) {
	v.metaMu.Lock()
	defer v.metaMu.Unlock()
	m = v.scos[number]
	if m == nil {
		return nil, false
	}
	m.lastRead = v.eng.now.Load()
	return m, m.local
}

// readVerified reads clusters and checks them against the CRC table, both
// through read.
func (v *Volume) readVerified(first uint32, p []byte, read func([]byte, int64) error, m *scoMeta) error {
	n := uint32(len(p) / block.ClusterSize)
	slot := first
	if m.compact != nil {
		var err error
		if slot, err = v.keptSlot(m, first, n, read); err != nil {
			return fmt.Errorf("SCO %d: cluster %d: %w", m.number, first, err)
		}
	}
	if slot+n > m.clusters {
		return fmt.Errorf("SCO %d: cluster %d: %w: the SCO has %d", m.number, first, block.ErrCorrupt, m.clusters)
	}
	if err := read(p, dataOff(slot)); err != nil {
		return fmt.Errorf("SCO %d: cluster %d: %w", m.number, first, err)
	}
	for i := range n {
		crc := tlog.CRC(p[i*block.ClusterSize : (i+1)*block.ClusterSize])
		want, err := v.storedCRC(slot+i, read, m, false)
		if err == nil && crc != want {
			// The table's page may be the one that is wrong in the cache.
			want, err = v.storedCRC(slot+i, read, m, true)
		}
		if err != nil {
			return fmt.Errorf("SCO %d: CRC table: %w", m.number, err)
		}
		if crc != want {
			v.corrupt(m.number, first+i)
			return fmt.Errorf("SCO %d: cluster %d: %w", m.number, first+i, block.ErrCorrupt)
		}
	}
	return nil
}

// keptSlot is where a compacted SCO has n clusters from first on, all of which it
// must have. Its table is read once.
func (v *Volume) keptSlot(m *scoMeta, first, n uint32, read func([]byte, int64) error) (uint32, error) {
	kept, err := v.keptOf(m, readFunc(read))
	if err != nil {
		if errors.Is(err, sco.ErrFormat) {
			v.corrupt(m.number, first)
			err = fmt.Errorf("%w: %w", block.ErrCorrupt, err)
		}
		return 0, err
	}
	slot, ok := kept.Slot(first)
	for c := first + 1; ok && c < first+n; c++ {
		ok = kept.Has(c)
	}
	if !ok {
		return 0, fmt.Errorf("%w: generation %d does not have it", block.ErrCorrupt, m.generation())
	}
	return slot, nil
}

// keptOf returns the table of kept clusters of a compacted SCO.
func (v *Volume) keptOf(m *scoMeta, r io.ReaderAt) (*sco.Kept, error) {
	if k := m.compact.kept.Load(); k != nil {
		return k, nil
	}
	k, err := sco.ReadKept(r, m.crcOff+sco.CRCTableBytes(m.clusters), m.compact.span, m.clusters, m.compact.keptCRC)
	if err == nil {
		m.compact.kept.Store(k)
	}
	return k, err
}

// readFunc is an io.ReaderAt that reads all or fails.
type readFunc func(p []byte, off int64) error

func (f readFunc) ReadAt(p []byte, off int64) (int, error) {
	if err := f(p, off); err != nil {
		return 0, err
	}
	return len(p), nil
}

// storedCRC returns the checksum of the cluster at a place in a SCO from the cache or
// the SCO's table.
func (v *Volume) storedCRC(cluster uint32, read func([]byte, int64) error, m *scoMeta, fresh bool) (uint32, error) {
	k := crcKey{v.tag, cluster / crcsPerPage, m.number, m.generation()}
	if page := v.eng.crcs.get(k); page != nil && !fresh {
		return page[cluster%crcsPerPage], nil
	}
	b := make([]byte, sco.Page)
	if err := read(b, m.crcOff+int64(k.page)*sco.Page); err != nil {
		return 0, err
	}
	page := new([crcsPerPage]uint32)
	for i := range page {
		page[i] = binary.LittleEndian.Uint32(b[4*i:])
	}
	v.eng.crcs.put(k, page)
	return page[cluster%crcsPerPage], nil
}

func (v *Volume) readLocal(m *scoMeta, b []byte, off int64) error {
	f, release, err := v.openLocal(m)
	if err != nil {
		return err
	}
	defer release()
	_, err = f.ReadAt(b, off)
	return err
}

func (v *Volume) openLocal(m *scoMeta) (vfs.File, func(), error) {
	return v.eng.files.get(v.fileKey(m), func() (vfs.File, error) {
		return v.eng.cfg.FS.Open(v.pathOf(m), vfs.ReadOnly)
	})
}

func (v *Volume) isUploaded(m *scoMeta) bool {
	v.metaMu.Lock()
	defer v.metaMu.Unlock()
	return m.uploaded
}

// giveUpLocal drops a local copy that can't be read, unless the store has lost others of
// the SCO's clusters.
func (v *Volume) giveUpLocal(m *scoMeta, cause error) {
	if !errors.Is(cause, fs.ErrNotExist) {
		v.log.Warn().Uint64("sco", m.number).Err(cause).Msg("local copy is not readable; using the store's")
	}
	v.dropSpare(m)
}

// dropSpare is dropLocal unless the store is known to have lost some of the SCO: the local copy
// may be all that is left.
func (v *Volume) dropSpare(m *scoMeta) {
	v.metaMu.Lock()
	had := m.local && !m.lost
	if had {
		m.local = false
	}
	v.metaMu.Unlock()
	if had {
		v.removeLocal(m)
	}
}

// dropLocal removes the local copy of an uploaded SCO.
func (v *Volume) dropLocal(m *scoMeta) {
	v.metaMu.Lock()
	had := m.local
	m.local = false
	v.metaMu.Unlock()
	if had {
		v.removeLocal(m)
	}
}

// removeLocal removes a local copy that nobody is led to any more.
func (v *Volume) removeLocal(m *scoMeta) {
	v.eng.files.forget(v.fileKey(m))
	if err := v.eng.cfg.FS.Remove(v.pathOf(m)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		v.log.Warn().Uint64("sco", m.number).Err(err).Msg("local copy can't be removed")
	}
	v.eng.addLocal(-m.size)
}

func (v *Volume) cacheKey(loc lba.Location, i uint32) cache.Key {
	return cache.Key{Volume: v.tag, Location: uint64(lba.MakeLocation(loc.SCO(), loc.Cluster()+i))}
}

// keep leaves verified clusters in the read cache.
func (v *Volume) keep(loc lba.Location, p []byte) {
	for i := uint32(0); i < uint32(len(p)/block.ClusterSize); i++ {
		v.eng.cache.Put(v.cacheKey(loc, i), p[i*block.ClusterSize:(i+1)*block.ClusterSize])
	}
}

// upload sends sealed SCOs to the store, oldest first, until none is left that has
// to be there.
func (v *Volume) upload() {
	wait := 100 * time.Millisecond
	for {
		m := v.nextUpload()
		if m == nil {
			v.settle("store-unreachable")
			return
		}
		err := v.uploadOne(m)
		switch {
		case err == nil:
			wait = 100 * time.Millisecond
			continue
		case v.ctx.Err() != nil:
			v.stopUpload()
			return
		case errors.Is(err, ErrStaleEpoch):
			v.fence(err)
			v.stopUpload()
			return
		}
		v.raise("store-unreachable", "closed SCOs can't be uploaded: %v; tried again until it works, meanwhile they stay on the local disk", err)
		v.spaceStuck("the store does not take data")
		select {
		case <-time.After(wait):
			wait = min(2*wait, 10*time.Second)
		case <-v.ctx.Done():
			v.stopUpload()
			return
		}
	}
}

// slowUpload is after how long an upload that does not end is reported.
const slowUpload = 15 * time.Second

// watchUpload reports a store that neither takes a SCO nor says why.
func (v *Volume) watchUpload(now time.Time) {
	since := v.putSince.Load()
	if since == 0 {
		return
	}
	if took := now.Sub(time.Unix(0, since)); took > slowUpload {
		v.raise("store-unreachable", "the store has been busy with one SCO for %d s; closed SCOs stay on the local disk meanwhile", int(took.Seconds()))
	}
}

func (v *Volume) uploadOne(m *scoMeta) error {
	f, release, err := v.openLocal(m)
	if err != nil {
		return err
	}
	defer release()
	turn := v.uploadTurn(m.size)
	v.putSince.Store(time.Now().UnixNano())
	defer v.stats.stages[StageStore].since(time.Now())
	err = v.cfg.Store.Put(v.ctx, v.namespace(), v.objectOf(m), v.cfg.Epoch,
		Object{Data: f, Size: m.size, LocalPath: v.pathOf(m), Sums: func() ([]uint32, error) { return v.pageSums(m, f) }})
	v.putSince.Store(0)
	turn()
	if err != nil {
		return err
	}
	v.stats.uploaded.Add(uint64(m.size))
	v.metaMu.Lock()
	m.uploaded = true
	gone := m.dropping
	v.metaMu.Unlock()
	select {
	case v.stored <- struct{}{}:
	default:
	}
	v.spaceProgress()
	if gone { // it died while it was on its way
		return v.cfg.Store.Delete(v.ctx, v.namespace(), v.objectOf(m), v.cfg.Epoch)
	}
	v.eng.evict()
	v.adjustRoom()
	return nil
}

// nextUpload returns the oldest sealed SCO that has to get to the store; nil ends
// the uploader.
func (v *Volume) nextUpload() *scoMeta {
	v.metaMu.Lock()
	defer v.metaMu.Unlock()
	var next *scoMeta
	for _, m := range v.scos {
		if !m.uploaded && !m.unwanted && !m.dropping && (next == nil || m.number < next.number) {
			next = m
		}
	}
	if next == nil {
		v.io.uploading.Store(false)
	}
	return next
}

func (v *Volume) stopUpload() { v.io.uploading.Store(false) }

// kickUpload starts the uploader unless it runs. Its last look for work holds
// metaMu, as does whoever adds some before calling this.
func (v *Volume) kickUpload() {
	v.metaMu.Lock()
	defer v.metaMu.Unlock()
	if !v.closing.Load() && v.ctx.Err() == nil && v.io.uploading.CompareAndSwap(false, true) {
		if !v.spawn(v.upload) {
			v.stopUpload()
		}
	}
}

// fence stops the volume: somebody else owns it (P4).
func (v *Volume) fence(cause error) {
	if v.fenced.Swap(true) {
		return
	}
	v.raise("fenced", "another daemon has taken this volume over: %v; this one serves it no longer", cause)
}
