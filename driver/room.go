package driver

import (
	"context"
	"fmt"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"scoria/alba/vfs"
	"scoria/driver/block"
	"scoria/driver/lba"
	"scoria/driver/sco"
)

// # Room on the local disk
//
// What is in the write buffer has to go to the disk before a checkpoint can be made,
// and only a checkpoint lets garbage be deleted. If the buffer took what the disk has
// no room for, a disk that was filled while the store was away would stay full when it
// is back. So room is promised at admission: a SCO is begun only if its whole file fits
// beside all that was promised before and the reserve (Config.ReserveBytes). Promised
// are, for all volumes of the daemon together,
//
//   - the files of SCOs that have been begun and have none yet (logSCO.promise);
//   - what a store that shares the disk (DiskSharer) will take for SCOs that it does not
//     have yet, as far as that is more than the local copies give back when they go
//     (Volume.storeDue): the parity of several storage daemons on one disk;
//   - the map pages that the next checkpoint writes, and that it would write if the rest
//     of the head went to pages that are clean now, and a copy of them in the store;
//   - the next root, likewise.
//
// What was admitted is written without a look at the reserve, from which checkpoints, the
// registry and storage daemons on the same disk live; only a quarter of it, without
// which those can't work, is never taken by files of the log: somebody else may have
// used up what was free.
//
// Requests that give room back, the scrubber and discards, may begin a SCO on half of the
// reserve, and a SCO that is compacted may take it (roomToCompact). Guests wait meanwhile: they get the next chunk of a SCO only while what is
// free and not promised is no less than the reserve. Before that writers are slowed down
// (roomDelay). A volume with large SCOs has a reserve of three of them at least, with
// what the store takes: the scrubber needs one, and a store on the same disk has to copy
// one before the local one can go. Such uploads go one at a time then, for all volumes
// (uploadTurn): several that are cut off for want of room would begin anew for ever.

// diskRoom knows what is free on the local disk and what of it is promised. free is
// as of the last look, at least once a second and whenever a file of the log was
// made: beginning a SCO, on a front end's worker, costs no system call. Any goroutine;
// mu is a leaf but for the file system.
type diskRoom struct {
	fs      vfs.FS
	dir     string
	reserve int64 // bytes, of the configuration

	free     atomic.Int64
	promised atomic.Int64
	wanted   atomic.Int64 // when somebody was last refused, Unix nanoseconds

	mu      sync.Mutex // one look at a time
	looked  time.Time
	evicted time.Time // when local copies were last dropped to make room

	uploads chan struct{} // the token of the one upload when there is no room for several
}

// look asks the file system what is free. If it can't tell, the last answer stands.
func (r *diskRoom) look() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.lookLocked()
}

func (r *diskRoom) lookLocked() {
	if free, err := r.fs.Free(r.dir); err == nil {
		r.free.Store(int64(min(free, 1<<60)))
	}
	r.looked = time.Now()
}

// left is what is neither used nor promised, the reserve included.
func (r *diskRoom) left() int64 { return r.free.Load() - r.promised.Load() }

// promise takes n bytes if at least spare are left then.
func (r *diskRoom) promise(n, spare int64) bool {
	if p := r.promised.Add(n); n > 0 && r.free.Load()-p < spare {
		r.promised.Add(-n)
		return false
	}
	return true
}

// tight reports whether writers are about to be slowed down, or somebody has been
// refused room just now: what can give room back should.
func (r *diskRoom) tight() bool {
	return r.left() < 2*r.reserve || r.refused()
}

// refused reports whether somebody has been refused room just now.
func (r *diskRoom) refused() bool {
	return time.Now().UnixNano()-r.wanted.Load() < int64(2*time.Second)
}

// kept makes the promise of l good, whose file has just got its room.
func (r *diskRoom) kept(l *logSCO) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.lookLocked() // before the promise goes: what was taken must not seem free
	r.forget(l)
}

// forget takes back what was promised to l.
func (r *diskRoom) forget(l *logSCO) { r.promised.Add(-l.promise.Swap(0)) }

// shrinkRoom lowers what is promised to l, which has been closed just now, to what it
// will take. Caller holds the gate exclusively.
func (v *Volume) shrinkRoom(l *logSCO) {
	v.eng.room.shrink(l)
	v.extendMu.Lock()
	defer v.extendMu.Unlock()
	if l.head.Load() != 0 {
		less := v.moreInStore(v.openBytes) - v.moreInStore(l.fileRoom())
		v.storeDue -= less
		v.eng.room.promised.Add(-less)
	}
}

// shrink lowers the promise to l, which is closed, to what its file will take.
func (r *diskRoom) shrink(l *logSCO) {
	need := l.fileRoom()
	for p := l.promise.Load(); p > need; p = l.promise.Load() {
		if l.promise.CompareAndSwap(p, need) {
			r.promised.Add(need - p)
		}
	}
}

// fileRoom is how many bytes of the disk the SCO's file takes at most until it is
// sealed: all that it can hold, or, if nothing more will come, what there is.
func (l *logSCO) fileRoom() int64 {
	sealed, records := l.extents()
	return sealed + records
}

// extents are the two parts of the SCO's file that need room: from its beginning, and
// where its records are until it is sealed; the second is 0 if the first has them.
func (l *logSCO) extents() (sealed, records int64) {
	if !l.closed.Load() {
		return l.hdr.OpenSize(), 0
	}
	r, c := unpack(l.head.Load())
	at := l.hdr.SealedRecordOff(c, r)
	if at == l.hdr.RecordOff() {
		return l.hdr.OpenSize(), 0
	}
	return at + sco.RecordBytes(r) + sco.CRCTableBytes(c) + sco.Page, sco.RecordBytes(r)
}

// spare is what writers of v leave free, in bytes.
func (v *Volume) spare() int64 {
	return max(v.eng.cfg.ReserveBytes, spareSCOs*(v.openBytes+v.moreInStore(v.openBytes)))
}

const spareSCOs = 3

// mapNeed is what the next checkpoint may take, in bytes, if rest more clusters are
// written before.
func (v *Volume) mapNeed(rest uint32) int64 {
	leaves := (v.m.Clusters() + lba.LeafClusters - 1) / lba.LeafClusters
	pages := min(leaves, v.m.Stats().DirtyPages+uint64(rest))
	if pages == 0 {
		return 0
	}
	n := int64(pages)*(lba.PageBytes+sco.Page/64) + v.rootBytes.Load()
	return n + max(n, v.inStore(n))
}

// diskShare is what objects take of the disk in a store that shares it.
type diskShare struct{ base, open int64 } // bytes: a small one, one of openBytes

// inStore is how many bytes of the disk an object of that size takes in the store.
func (v *Volume) inStore(size int64) int64 {
	s := v.share.Load()
	if s == nil || s.open == 0 {
		return 0
	}
	return s.base + int64(float64(s.open-s.base)*float64(size)/float64(v.openBytes))
}

// moreInStore is how many more it takes there than the local file, which can go then.
func (v *Volume) moreInStore(size int64) int64 { return max(0, v.inStore(size)-size) }

// shareAgain is how often a store is asked what it takes of the disk, which its devices
// and preset decide, and shareTimeout for how long.
const (
	shareAgain   = 10 * time.Second
	shareTimeout = 2 * time.Second
)

// learnShare asks the store what it takes of the disk. What it said last stands if it
// does not answer.
func (v *Volume) learnShare(ctx context.Context) {
	s, ok := v.cfg.Store.(DiskSharer)
	if !ok {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, shareTimeout)
	defer cancel()
	base, err := s.DiskBytes(ctx, v.namespace(), 1)
	if err != nil {
		return
	}
	open, err := s.DiskBytes(ctx, v.namespace(), v.openBytes)
	if err == nil {
		v.share.Store(&diskShare{base, open})
	}
}

// storeNeeds is what the store will take beside what local copies give back, when it has
// all that it does not have yet. Caller holds extendMu: no SCO is begun meanwhile.
func (v *Volume) storeNeeds() (n int64) {
	if v.moreInStore(v.openBytes) == 0 {
		return 0
	}
	v.metaMu.Lock()
	defer v.metaMu.Unlock()
	for _, l := range v.unsealed {
		if l.head.Load() != 0 {
			n += v.moreInStore(l.fileRoom())
		}
	}
	for _, m := range v.scos {
		if !m.uploaded && !m.unwanted && !m.dropping {
			n += v.moreInStore(m.size)
		}
	}
	return n
}

// uploadTurn lets uploads that copy to the same disk go one after the other while it has
// no room for several: what was sent of one that fails is of no use. Those into a store
// that does not answer must not keep others for long.
func (v *Volume) uploadTurn(size int64) (done func()) {
	r := &v.eng.room
	if v.inStore(size) == 0 || r.left() >= v.spare() {
		return func() {}
	}
	patience := time.NewTimer(slowUpload)
	defer patience.Stop()
	select {
	case r.uploads <- struct{}{}:
		return func() { <-r.uploads }
	case <-patience.C:
	case <-v.ctx.Done():
	}
	return func() {}
}

// promiseRoom promises the room for l, which is begun, and what it means for the map. Caller
// holds extendMu.
func (v *Volume) promiseRoom(l *logSCO, upkeep bool) bool {
	r, spare := &v.eng.room, v.spare()
	if upkeep {
		spare /= 2
	}
	file, pages, store := v.openBytes, v.mapNeed(l.hdr.ClustersCap), v.moreInStore(v.openBytes)
	if !r.promise(file+pages-v.mapRoom+store, spare) {
		return false
	}
	v.mapRoom = pages
	v.storeDue += store
	l.promise.Store(file)
	v.filling.Store(l)
	return true
}

// unpromiseRoom takes back what was promised to l, which can't be begun after all. Caller
// holds extendMu.
func (v *Volume) unpromiseRoom(l *logSCO) {
	v.eng.room.forget(l)
	store := v.moreInStore(v.openBytes)
	v.storeDue -= store
	v.eng.room.promised.Add(-store)
}

// adjustRoom lets the promises follow the map and the store: fewer pages need writing
// after a checkpoint, or because the same ones were written again and again; and less
// has to get to the store after an upload, or because it is overwritten.
func (v *Volume) adjustRoom() {
	if !v.gate.TryRLock() {
		return
	}
	defer v.gate.RUnlock()
	v.extendMu.Lock()
	defer v.extendMu.Unlock()
	rest := uint32(0)
	if records, clusters := unpack(v.cur.head.Load()); records > 0 {
		rest = v.cur.hdr.ClustersCap - clusters
	}
	pages, store := v.mapNeed(rest), v.storeNeeds()
	v.eng.room.promised.Add(pages - v.mapRoom + store - v.storeDue)
	v.mapRoom, v.storeDue = pages, store
}

// forgetRoom takes back what was promised to v, which is closed.
func (v *Volume) forgetRoom() {
	for _, l := range v.unsealed {
		v.eng.room.forget(l)
	}
	v.eng.room.promised.Add(-v.mapRoom - v.storeDue)
	v.mapRoom, v.storeDue = 0, 0
}

// mayWrite reports whether the disk has room for more of what guests write: the next
// chunk of the head, which is promised, or the next SCO.
func (v *Volume) mayWrite() bool { return v.eng.room.left() >= v.spare() }

// lacksRoom says whether it is the disk for which a write of this volume could not be
// taken, and then shows it and has room made. upkeep: a request that gives room back.
func (v *Volume) lacksRoom(upkeep bool) bool {
	r := &v.eng.room
	need, lacks := v.wantRoom(upkeep)
	if left := r.left(); lacks && left < need {
		v.roomless.Store(true)
		v.raise("disk-full", "the local disk under %s is full: writes wait until %d MiB more are free, beside what is promised already and what is left for what gives room back (cache.reserve, three SCOs at least: %d MiB); they resume by themselves", v.dir, (need-left)>>20+1, v.spare()>>20)
	}
	return lacks
}

// wantRoom says whether the disk lacks room for the next write, for which need bytes must
// be left, and then has some made.
func (v *Volume) wantRoom(upkeep bool) (need int64, lacks bool) {
	r := &v.eng.room
	need = v.roomNeeded(upkeep)
	if r.left() >= need {
		return need, false
	}
	v.askForRoom()
	return need, true
}

// askForRoom notes that somebody has been refused room, and has some made.
func (v *Volume) askForRoom() {
	v.eng.room.wanted.Store(time.Now().UnixNano())
	v.eng.makeDiskRoom()
	v.kickIO()
}

// roomNeeded is what must be left for the next write.
func (v *Volume) roomNeeded(upkeep bool) int64 {
	spare := v.spare()
	if upkeep {
		spare /= 2
	}
	v.gate.RLock()
	defer v.gate.RUnlock()
	l := v.cur
	if records, clusters := unpack(l.head.Load()); records > 0 && clusters < l.hdr.ClustersCap {
		return spare
	}
	v.extendMu.Lock()
	defer v.extendMu.Unlock()
	return spare + max(0, v.openBytes+v.moreInStore(v.openBytes)+v.mapNeed(l.hdr.ClustersCap)-v.mapRoom)
}

// roomFound says that a write that may have waited for the disk need not any more.
func (v *Volume) roomFound() {
	if v.roomless.Load() && v.roomless.Swap(false) {
		v.settle("disk-full")
	}
}

// settleDisk says that the disk takes what is written to it.
func (v *Volume) settleDisk() {
	if !v.roomless.Load() {
		v.settle("disk-full")
	}
	v.settle("disk-error")
}

// makeDiskRoom looks again at what is free, and drops local copies of what is in the
// store: not more than once a second, as where the store shares the disk that gives
// nothing back.
func (e *Engine) makeDiskRoom() {
	const again, evictAgain = 20 * time.Millisecond, time.Second
	r := &e.room
	r.mu.Lock()
	now := time.Now()
	if now.Sub(r.looked) < again {
		r.mu.Unlock()
		return
	}
	r.lookLocked()
	evict := now.Sub(r.evicted) >= evictAgain
	if evict {
		r.evicted = now
	}
	r.mu.Unlock()
	if evict {
		e.evictForRoom(e.cfg.DataDir)
		r.look()
	}
}

// maxRoomDelay is how much slower than the disk writers get before they have to wait.
const maxRoomDelay = 31

// roomDelay is how many times as long as the disk needs for what they write writers
// rest, so that the end of the room does not come suddenly: nothing as long as
// another reserve is left, and the more the nearer the end is.
func (v *Volume) roomDelay() float64 {
	spare := v.spare()
	left := v.eng.room.left() - spare
	if left >= spare {
		return 0
	}
	// Whole SCOs only, and what is left of the head.
	writable := max(0, left) / v.openBytes * v.cfg.SCOBytes
	if l := v.filling.Load(); l != nil {
		_, clusters := unpack(l.head.Load())
		writable += int64(l.hdr.ClustersCap-clusters) * block.ClusterSize
	}
	return min(maxRoomDelay, max(0, float64(spare)/float64(max(writable, 1))-1))
}

// allocate gives the file of l the room that it needs, all or nothing: what an attempt
// that fails had got would be missing elsewhere.
func (v *Volume) allocate(l *logSCO, f vfs.File) error {
	sealed, records := l.extents()
	err := f.Allocate(0, sealed)
	if err == nil && records > 0 {
		err = f.Allocate(l.hdr.RecordOff(), records)
	}
	if err == nil && records > 0 {
		err = f.Truncate(l.hdr.OpenSize())
	}
	if err != nil {
		if terr := f.Truncate(0); terr != nil {
			v.log.Warn().Uint64("sco", l.hdr.Number).Err(terr).Msg("room that was not enough can't be given back")
		}
	}
	return err
}

// roomForLog refuses a file of the log only if it would take the last quarter of the
// reserve: the room was promised, but others may have used it up.
func (v *Volume) roomForLog(l *logSCO) error {
	free, err := v.eng.cfg.FS.Free(v.scoDir())
	if err != nil {
		return err
	}
	if need := uint64(l.fileRoom() + v.eng.cfg.ReserveBytes/4); free < need {
		return fmt.Errorf("%w: %d bytes are free, %d are needed with a quarter of the reserve", syscall.ENOSPC, free, need)
	}
	return nil
}

// promiseFound promises the room for a SCO that a dead daemon left in the pool: its
// clusters were taken, whatever the disk has now.
func (v *Volume) promiseFound(l *logSCO) {
	if l.file == nil && l.head.Load() != 0 {
		l.promise.Store(l.fileRoom())
		v.eng.room.promised.Add(l.fileRoom())
	}
}
