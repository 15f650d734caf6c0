package driver

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/google/uuid"

	"scoria/driver/block"
	"scoria/driver/cache"
	"scoria/driver/lba"
)

// spillAt is the part of the pool from which on the head is written out without
// a flush asking for it; throttleAt the part from which on writers are slowed.
// Once begun, writing out goes on until drainedAt: the next burst finds room. Up to
// hurryAt it gets the CPU time that is left over (niceness), which next to a worker
// that polls is none; from then on its fair share.
const (
	drainedAt  = 0.10
	spillAt    = 0.50
	hurryAt    = (spillAt + throttleAt) / 2
	throttleAt = 0.75
)

// Engine is what all volumes of a daemon share.
type Engine struct {
	cfg   Config
	pool  *pool
	cache *cache.Cache
	crcs  crcCache
	files *fileCache
	sums  sumCache
	room  diskRoom

	adopted bool
	still   bool // nothing ticks: space is given back when a test wants it, so it has no bound
	drain   atomic.Bool
	drained atomic.Bool
	nice    niceness

	now        atomic.Int64 // Unix nanoseconds, a second exact; for the hot path
	localBytes atomic.Int64 // sealed SCOs on the local disk
	perCluster atomic.Int64 // nanoseconds that spilling a cluster takes, smoothed

	mu      sync.Mutex
	volumes map[uuid.UUID]*Volume
	nextTag uint32
	stop    chan struct{}
	stopped sync.WaitGroup
}

// OpenEngine maps the pool and starts the housekeeper. Volumes whose data is in
// the pool of a daemon that died (Pending) should be opened soon: their chunks
// are taken until then.
func OpenEngine(_ context.Context, cfg Config) (*Engine, error) {
	return openEngine(cfg, time.NewTicker(time.Second).C)
}

// openEngine is OpenEngine with the housekeeper's clock: it ticks all volumes when
// ticks delivers.
func openEngine(cfg Config, ticks <-chan time.Time) (*Engine, error) {
	if cfg.BootID == "" {
		b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
		if err != nil {
			return nil, fmt.Errorf("boot id: %w", err)
		}
		cfg.BootID = strings.TrimSpace(string(b))
	}
	if err := cfg.FS.MkdirAll(cfg.DataDir + "/volumes"); err != nil {
		return nil, err
	}
	p, adopted, err := openPool(cfg.FS, cfg.PoolFile, cfg.PoolBytes, cfg.BootID)
	if err != nil {
		return nil, err
	}
	c, err := cache.New(cfg.ReadCacheBytes)
	if err == nil && cfg.SSDCacheBytes > 0 {
		err = c.AttachSSD(cfg.FS, cfg.DataDir+"/read-cache", cfg.SSDCacheBytes)
	}
	if err != nil {
		p.mapping.Close()
		return nil, fmt.Errorf("read cache: %w", err)
	}
	e := &Engine{
		cfg: cfg, pool: p, cache: c, files: newFileCache(), adopted: adopted,
		volumes: map[uuid.UUID]*Volume{}, stop: make(chan struct{}), still: ticks == nil,
	}
	e.room.fs, e.room.dir, e.room.reserve = cfg.FS, cfg.DataDir, cfg.ReserveBytes
	e.room.uploads = make(chan struct{}, 1)
	e.room.free.Store(1 << 60) // if nobody can tell
	e.room.look()
	e.nice.probe()
	e.now.Store(time.Now().UnixNano())
	e.stopped.Add(2)
	go e.housekeeper(ticks)
	go e.populate()
	return e, nil
}

// Adopted reports whether the pool of an earlier daemon was found.
func (e *Engine) Adopted() bool { return e.adopted }

// Drained reports, after Close, whether the pool holds nothing any more that the
// next start needs.
func (e *Engine) Drained() bool { return e.drained.Load() }

// Pending lists the volumes that have data in the pool and are not open.
func (e *Engine) Pending() []uuid.UUID {
	e.pool.mu.Lock()
	defer e.pool.mu.Unlock()
	ids := make([]uuid.UUID, 0, len(e.pool.found))
	for id := range e.pool.found {
		ids = append(ids, id)
	}
	return ids
}

// populate touches the pool so that writers never wait for a page of it, and then,
// when nothing else wants the CPU, puts it on huge pages.
func (e *Engine) populate() {
	defer e.stopped.Done()
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	e.eachStep(func(b []byte) bool { populate(b); return true })
	e.nice.set(true)
	defer e.nice.set(false)
	e.eachStep(func(b []byte) bool { return len(b) < populateStep || collapse(b) })
}

// eachStep calls do for one part of the pool after the other until it returns
// false or the engine is stopped.
func (e *Engine) eachStep(do func(b []byte) bool) {
	for off := 0; off < len(e.pool.bytes); off += populateStep {
		select {
		case <-e.stop:
			return
		default:
		}
		if !do(e.pool.bytes[off:min(off+populateStep, len(e.pool.bytes))]) {
			return
		}
	}
}

// housekeeper ticks all volumes once a second.
func (e *Engine) housekeeper(ticks <-chan time.Time) {
	defer e.stopped.Done()
	for {
		var now time.Time
		select {
		case <-e.stop:
			return
		case now = <-ticks:
			e.now.Store(now.UnixNano())
		case now = <-e.cfg.Ticks:
		}
		e.room.look()
		if e.room.tight() {
			e.makeDiskRoom()
		}
		for _, v := range e.list() {
			v.tick(now)
		}
		e.evict()
	}
}

func (e *Engine) list() []*Volume {
	e.mu.Lock()
	defer e.mu.Unlock()
	out := make([]*Volume, 0, len(e.volumes))
	for _, v := range e.volumes {
		if v != nil {
			out = append(out, v)
		}
	}
	return out
}

// draining reports whether heads should be written out although nobody asked.
func (e *Engine) draining() bool {
	switch fill := e.pool.fill(); {
	case fill > spillAt:
		e.drain.Store(true)
	case fill < drainedAt:
		e.drain.Store(false)
	}
	return e.drain.Load()
}

// maxClosed is how many heads one call of kickAll closes.
const maxClosed = 32

// kickAll makes every volume write out what it can: one of them waits for room.
// A head that is filled in part holds chunks that only its end can free, so those
// that were not written to for the longest time are closed. One that was written
// to just now is left alone, unless heads take a good part of the pool: closing it
// would cost its volume a new SCO every few writes and free next to nothing. They are
// closed, too, when it is the disk that has no room: to one that is closed no more is
// promised than it takes.
func (e *Engine) kickAll() {
	const perHead = 2 // chunks: one of clusters, one of records
	volumes := e.list()
	crowd := uint32(len(volumes))*perHead > e.pool.n/4
	recently := e.now.Load() - int64(2*time.Second)
	slices.SortFunc(volumes, func(a, b *Volume) int { return cmp.Compare(a.lastWrite.Load(), b.lastWrite.Load()) })
	closed, wanted := 0, e.room.tight()
	for _, v := range volumes {
		if closed < maxClosed && (e.pool.fill() > throttleAt || wanted) && (crowd || v.lastWrite.Load() < recently) && v.closeHead() {
			closed++
		}
		v.kickIO()
	}
}

// evictForRoom drops local copies of uploaded SCOs as long as that makes room
// on a disk that is full.
func (e *Engine) evictForRoom(dir string) {
	want := uint64(e.cfg.ReserveBytes) + 2*MaxSCOBytes
	for {
		free, err := e.cfg.FS.Free(dir)
		if err != nil || free > want || !e.evictOne() {
			return
		}
		if now, err := e.cfg.FS.Free(dir); err != nil || now <= free {
			return // the store shares the disk's blocks with us
		}
	}
}

func (e *Engine) volumeDir(id uuid.UUID) string { return e.cfg.DataDir + "/volumes/" + id.String() }

// CreateVolume makes a volume's directories and namespace. It may be repeated.
func (e *Engine) CreateVolume(ctx context.Context, cfg VolumeConfig) error {
	if err := cfg.Validate(); err != nil {
		return err
	}
	if err := e.makeDirs(cfg.ID); err != nil {
		return fmt.Errorf("volume %s: %w", cfg.Name, err)
	}
	if err := cfg.Store.CreateNamespace(ctx, cfg.ID.String()); err != nil {
		return fmt.Errorf("volume %s: %w", cfg.Name, err)
	}
	if err := cfg.Store.Fence(ctx, cfg.ID.String(), cfg.Epoch); err != nil {
		return fmt.Errorf("volume %s: %w", cfg.Name, err)
	}
	return nil
}

func (e *Engine) makeDirs(id uuid.UUID) error {
	dir := e.volumeDir(id)
	for _, d := range []string{dir + "/sco", dir + "/map"} {
		if err := e.cfg.FS.MkdirAll(d); err != nil {
			return err
		}
	}
	for _, d := range []string{dir, e.cfg.DataDir + "/volumes"} {
		if err := e.cfg.FS.SyncDir(d); err != nil {
			return err
		}
	}
	return nil
}

// OpenVolume recovers a volume and starts it.
func (e *Engine) OpenVolume(ctx context.Context, cfg VolumeConfig) (*Volume, error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	e.mu.Lock()
	if _, ok := e.volumes[cfg.ID]; ok {
		e.mu.Unlock()
		return nil, fmt.Errorf("volume %s is open already", cfg.Name)
	}
	e.volumes[cfg.ID] = nil // reserved
	e.nextTag++
	tag := e.nextTag
	e.mu.Unlock()

	v, err := e.openVolume(ctx, cfg, tag)
	e.mu.Lock()
	defer e.mu.Unlock()
	if err != nil {
		delete(e.volumes, cfg.ID)
		return nil, fmt.Errorf("open volume %s: %w", cfg.Name, err)
	}
	e.volumes[cfg.ID] = v
	return v, nil
}

func (e *Engine) openVolume(ctx context.Context, cfg VolumeConfig, tag uint32) (*Volume, error) {
	if err := e.makeDirs(cfg.ID); err != nil {
		return nil, err
	}
	m, err := lba.New(cfg.Size / block.ClusterSize)
	if err != nil {
		return nil, err
	}
	v := &Volume{
		eng: e, cfg: cfg, tag: tag, m: m, dir: e.volumeDir(cfg.ID),
		log: e.cfg.Log.With().Str("volume", cfg.Name).Logger(), scos: map[uint64]*scoMeta{}, pins: map[uint64]uint32{},
		stored: make(chan struct{}, 1),
	}
	v.ctx, v.cancel = context.WithCancel(context.Background())
	// All SCOs that can have chunks in the pool, and those waiting to be sealed.
	inRAM := int64(e.pool.n) * chunkBytes / cfg.SCOBytes
	slots := ramTableMin
	for int64(slots) < 2*inRAM+ramTableMin {
		slots *= 2
	}
	v.ram = make([]ramSlot, slots)
	v.openBytes = newLogSCO(v, 0, 0, 0).hdr.OpenSize()
	v.lastWrite.Store(e.now.Load())
	v.setInfo()
	v.ckpt = newCheckpoints(v)
	start := time.Now()
	if err := v.recover(ctx); err != nil {
		v.cancel()
		v.letGo()
		return nil, err
	}
	v.log.Info().Dur("took", time.Since(start)).Uint64("replayed_records", v.stats.replayed.Load()).
		Uint64("mapped_clusters", v.m.Mapped()).Msg("volume opened")
	v.usage()
	v.learnShare(ctx)
	v.adjustRoom()
	v.kickIO()
	v.kickUpload()
	v.adjustSpace()
	return v, nil
}

// forget takes a volume out of the engine.
func (e *Engine) forget(v *Volume) {
	e.mu.Lock()
	if e.volumes[v.cfg.ID] == v {
		delete(e.volumes, v.cfg.ID)
	}
	e.mu.Unlock()
	e.files.forgetAll(v.tag)
	e.cache.DropVolume(v.tag)
	v.metaMu.Lock()
	defer v.metaMu.Unlock()
	for _, m := range v.scos {
		if m.local {
			e.addLocal(-m.size)
		}
	}
	for _, r := range v.retired {
		if r.local {
			e.addLocal(-r.size)
		}
	}
}

// DeleteVolume removes a volume that is not open. It may be repeated.
func (e *Engine) DeleteVolume(ctx context.Context, cfg VolumeConfig) error {
	e.mu.Lock()
	_, open := e.volumes[cfg.ID]
	e.mu.Unlock()
	if open {
		return fmt.Errorf("volume %s is open", cfg.Name)
	}
	if err := cfg.Store.DeleteNamespace(ctx, cfg.ID.String()); err != nil {
		return fmt.Errorf("volume %s: %w", cfg.Name, err)
	}
	if err := e.cfg.FS.RemoveAll(e.volumeDir(cfg.ID)); err != nil {
		return fmt.Errorf("volume %s: %w", cfg.Name, err)
	}
	for _, c := range e.pool.takeFound(cfg.ID) {
		e.pool.release(c.id)
	}
	return e.cfg.FS.SyncDir(e.cfg.DataDir + "/volumes")
}

// Close closes all volumes and unmaps the pool. After a clean end the pool holds
// nothing; its file stays, because giving a gigabyte of memory back and taking it
// anew is most of what a restart costs the guests.
func (e *Engine) Close(ctx context.Context) error {
	var errs []error
	var wg sync.WaitGroup
	var mu sync.Mutex
	for _, v := range e.list() {
		wg.Add(1)
		go func() {
			defer wg.Done()
			if err := v.Close(ctx); err != nil {
				mu.Lock()
				errs = append(errs, err)
				mu.Unlock()
			}
		}()
	}
	wg.Wait()
	close(e.stop)
	e.stopped.Wait()
	e.drained.Store(e.pool.dirty.Load() == 0)
	errs = append(errs, e.pool.mapping.Close(), e.cache.Close())
	return errors.Join(errs...)
}

// addLocal accounts for sealed SCOs on the local disk.
func (e *Engine) addLocal(n int64) { e.localBytes.Add(n) }

// evict drops local copies of uploaded SCOs, those first that were not read for
// the longest time, until they fit the budget.
func (e *Engine) evict() {
	for e.localBytes.Load() > e.cfg.CacheBytes {
		if !e.evictOne() {
			return
		}
	}
}

// evictOne drops the local copy that was not read for longest, if there is one.
func (e *Engine) evictOne() bool {
	var victim *scoMeta
	var owner *Volume
	var oldest int64
	for _, v := range e.list() {
		if m, lastRead := v.coldest(); m != nil && (victim == nil || lastRead < oldest) {
			victim, owner, oldest = m, v, lastRead
		}
	}
	if victim == nil {
		return false
	}
	owner.dropSpare(victim)
	return true
}

// spillRate keeps the smoothed time that writing out a cluster takes. In a write
// that nobody was in a hurry for, most of that may be waiting for the CPU: it can
// show that the disk is faster than was known, but not that it is slower.
func (e *Engine) spillRate(clusters int, took time.Duration, hurry bool) {
	per := int64(took) / int64(clusters)
	old := e.perCluster.Load()
	if old == 0 {
		old = per
	}
	if !hurry && per > old {
		return
	}
	e.perCluster.Store((old*7 + per) / 8)
}
