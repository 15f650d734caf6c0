package disk

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path"
	"sync"
	"sync/atomic"
	"time"

	"scoria/alba/asd"
	"scoria/alba/vfs"

	"github.com/cockroachdb/pebble/v2"
	"github.com/cockroachdb/pebble/v2/bloom"
	"github.com/cockroachdb/pebble/v2/sstable"
	"github.com/google/uuid"
	"github.com/rs/zerolog"
)

// Options of an ASD. The zero value is usable.
type Options struct {
	// ID, if set, is the UUID that the directory must have; another one, or an
	// empty directory (a disk that is not mounted, say), is refused with
	// asd.ErrWrongASD.
	ID string
	// Version is what Stats shows as the program's version.
	Version string
	// CapacityBytes is what the ASD may fill, its reserve included; 0 means all
	// that the file system has.
	CapacityBytes int64
	// ReserveBytes of the capacity and of the file system's free room are not for
	// values: the key-value store needs them to delete and to compact. 0 means a
	// 64th of the capacity, from 64 MiB to 4 GiB.
	ReserveBytes int64
	// InlineBytes: values up to this size live in the key-value store; 0 means 16 KiB.
	InlineBytes int
	// CacheBytes of the key-value store's blocks; 0 means 32 MiB.
	CacheBytes int64
	// Slots bounds the requests that use the disk at once; 0 means 64.
	Slots int
	// Handles bounds the open value files; 0 means 1024. Each keeps its checksums
	// in memory, 4 bytes per block.
	Handles int
	// Salvage opens an ASD whose key-value store's log is damaged, without what the log
	// held from there on. Otherwise it is refused (asd.ErrCorrupt).
	Salvage bool
	// ReopenAfter, of Supervise: how long after a failure the first attempt is made to
	// open the disk anew; 0 means 1 s. The wait doubles with each one.
	ReopenAfter time.Duration
	Log         zerolog.Logger
}

const (
	defaultInlineBytes = 16 << 10
	defaultCacheBytes  = 32 << 20
	defaultSlots       = 64
	defaultHandles     = 1024
	memTableBytes      = 16 << 20

	// kvFormat is written out so that a newer Pebble does not change the format
	// on the disk by itself.
	kvFormat = pebble.FormatWALSyncChunks

	// idsPerDir names share a directory; reserveIDs are reserved at a time.
	idsPerDir  = 1 << 10
	reserveIDs = 1 << 20
)

// errStuck: goroutines and memory of the key-value store stay for good.
var errStuck = errors.New("key-value store is stuck")

// Disk is the engine: one ASD in one directory. It implements asd.Client and
// asd.BlockReader.
type Disk struct {
	fs   vfs.FS
	dir  string
	opts Options
	log  zerolog.Logger
	id   uuid.UUID
	db   *pebble.DB
	// access is db's way to its files.
	access *kvAccess
	// tableOpts is how Verify reads the key-value store's tables.
	tableOpts sstable.ReaderOptions
	durable   *durableSizes // of the key-value store's log and manifest
	lock      io.Closer
	gate      *gate
	handles   *handles
	opened    time.Time

	queue     chan *applyReq // to the committer
	dead      chan uint64    // value files to the remover
	stop      chan struct{}  // closed by Close
	failed    chan struct{}  // closed by fail
	stuck     chan struct{}  // closed when a goroutine of the key-value store is; see kvLogger
	stuckOnce sync.Once
	users     sync.WaitGroup // calls under way
	loops     sync.WaitGroup // committer, remover, sweeper

	mu      sync.Mutex // guards the following and the order of Close
	closed  bool
	failure error
	damaged string
	dirs    map[uint64]struct{} // value directories that exist

	nextID   atomic.Uint64
	reserved atomic.Uint64
	inFlight atomic.Int64 // bytes of puts between their check for room and their commit
	state    atomic.Pointer[meta]
	kvBytes  atomic.Int64 // what the key-value store takes, sampled

	n counters
}

var (
	_ asd.Client      = (*Disk)(nil)
	_ asd.BlockReader = (*Disk)(nil)
)

// Open opens the ASD in dir, which is made if it does not exist, and recovers
// what it acknowledged. vfs.ErrLocked if another process has it open.
func Open(fsys vfs.FS, dir string, opts Options) (*Disk, error) {
	opts.setDefaults()
	if err := fsys.MkdirAll(dir); err != nil {
		return nil, fmt.Errorf("open ASD: %w", err)
	}
	lock, err := fsys.Lock(path.Join(dir, "lock"))
	if err != nil {
		return nil, fmt.Errorf("open ASD in %s: %w", dir, err)
	}
	d := &Disk{
		fs: fsys, dir: dir, opts: opts, lock: lock, opened: time.Now(),
		log:    opts.Log.With().Str("asd_dir", dir).Logger(),
		gate:   newGate(opts.Slots),
		queue:  make(chan *applyReq, maxGroup),
		dead:   make(chan uint64, 4096),
		stop:   make(chan struct{}),
		failed: make(chan struct{}),
		stuck:  make(chan struct{}),
		dirs:   make(map[uint64]struct{}),
	}
	d.durable = &durableSizes{files: map[string]int64{}}
	d.handles = newHandles(d, opts.Handles)
	d.access = newKVAccess(fsys, d.fail, d.halt)
	// The key-value store may get stuck while it is being opened, too.
	started := make(chan error, 1)
	go func() { started <- d.start() }()
	select {
	case err = <-started:
	case <-d.stuck:
		close(d.stop)
		d.access.revoke()
		err = fmt.Errorf("%w: %w", errStuck, d.failErr())
	}
	if err != nil {
		_ = lock.Close()
		return nil, fmt.Errorf("open ASD in %s: %w", dir, err)
	}
	return d, nil
}

func (o *Options) setDefaults() {
	if o.InlineBytes == 0 {
		o.InlineBytes = defaultInlineBytes
	}
	if o.CacheBytes == 0 {
		o.CacheBytes = defaultCacheBytes
	}
	if o.Slots == 0 {
		o.Slots = defaultSlots
	}
	if o.Handles == 0 {
		o.Handles = defaultHandles
	}
}

// start opens the key-value store, agrees on the identity, reserves the ids of
// this run's value files, and starts the goroutines.
func (d *Disk) start() error {
	known, err := readIdentity(d.fs, d.dir)
	if err != nil && !isNotExist(err) {
		return err
	}
	fresh := err != nil
	if d.opts.ID != "" && (fresh || known.String() != d.opts.ID) {
		return fmt.Errorf("%w: the directory has ASD %q, want %q", asd.ErrWrongASD, known, d.opts.ID)
	}
	if err := d.openKV(fresh); err != nil {
		return err
	}
	m, err := d.loadMeta(fresh, known)
	if err == nil && fresh {
		// The log of a new store is begun in Pebble's oldest format, whose chunks don't say
		// how far it was durable (see kvwal.go). This begins another.
		err = kvError(d.db.Flush())
	}
	if err == nil && fresh {
		err = writeIdentity(d.fs, d.dir, m.id)
	}
	if err != nil {
		_ = d.db.Close()
		return err
	}
	d.id = m.id
	d.state.Store(m)
	d.sampleKV()
	snapshot := d.db.NewSnapshot()
	firstID := d.nextID.Load()
	d.loops.Go(d.commitLoop)
	d.loops.Go(d.removeLoop)
	d.loops.Go(func() {
		defer snapshot.Close()
		d.sweep(snapshot, firstID)
	})
	return nil
}

func (d *Disk) openKV(fresh bool) error {
	dir := path.Join(d.dir, "kv")
	if err := d.checkKV(dir); err != nil {
		return err
	}
	replay := &kvReplay{salvage: d.opts.Salvage, cut: func(text string) {
		d.log.Error().Str("file", text).Msg("what the key-value store's log held from there on is given up; the whole file is kept as *.damaged")
	}}
	opts := &pebble.Options{
		FS:                          kvFS{d.access, d.durable, replay},
		FormatMajorVersion:          kvFormat,
		ErrorIfNotExists:            !fresh,
		CacheSize:                   d.opts.CacheBytes,
		MemTableSize:                memTableBytes,
		MemTableStopWritesThreshold: 4,
		L0CompactionThreshold:       2,
		L0StopWritesThreshold:       24,
		// Pebble syncs whole files at this pace where it has no descriptor.
		BytesPerSync:  4 << 20,
		MaxOpenFiles:  256,
		Logger:        kvLogger{d},
		EventListener: d.kvEvents(),
	}
	for i := range opts.Levels {
		opts.Levels[i].FilterPolicy = bloom.FilterPolicy(10)
		opts.Levels[i].FilterType = pebble.TableFilter
	}
	compactions := newCompactions()
	opts.Experimental.CompactionScheduler = compactions
	opts.EnsureDefaults()
	d.tableOpts = opts.MakeReaderOptions()
	d.access.phase.Store(phaseOpening)
	db, err := pebble.Open(dir, opts)
	d.access.phase.Store(phaseOpen)
	if err != nil && replay.err != nil {
		return replay.err
	}
	if err != nil {
		return fmt.Errorf("key-value store: %w", kvError(err))
	}
	d.db = db
	compactions.opened()
	return nil
}

// checkKV mends the key-value store's manifest, in which Pebble would take damage for the
// end of what was written. Logs are checked when Pebble opens them; see kvReplay.
func (d *Disk) checkKV(dir string) error {
	if _, err := d.fs.Stat(dir); isNotExist(err) {
		return nil
	}
	mended, err := mendManifests(d.fs, dir)
	if err != nil {
		return fmt.Errorf("key-value store: %w: %w", asd.ErrCorrupt, err)
	}
	for _, name := range mended {
		d.n.corruptBlocks.Add(1)
		d.log.Warn().Str("file", name).Msg("a damaged file of the key-value store was written anew from its copy")
	}
	return nil
}

// loadMeta reads or makes the ASD's state and reserves ids for this run.
func (d *Disk) loadMeta(fresh bool, known uuid.UUID) (*meta, error) {
	m := new(meta)
	b, closer, err := d.db.Get(metaKey)
	switch {
	case err == nil:
		*m, err = decodeMeta(b)
		_ = closer.Close()
		if err != nil {
			return nil, err
		}
		if !fresh && m.id != known {
			return nil, fmt.Errorf("%w: identity file says %s, the key-value store is of %s", asd.ErrWrongASD, known, uuid.UUID(m.id))
		}
	case errors.Is(err, pebble.ErrNotFound) && fresh:
		id, err := uuid.NewRandom()
		if err != nil {
			return nil, fmt.Errorf("make an id: %w", err)
		}
		m.id, m.reserved = id, idsPerDir
	default:
		return nil, fmt.Errorf("state in the key-value store: %w", kvError(err))
	}
	if fresh && m.keys > 0 {
		return nil, fmt.Errorf("identity file is missing, but there is data of ASD %s: restore the file, or empty the directory", uuid.UUID(m.id))
	}
	d.nextID.Store(m.reserved)
	m.reserved += reserveIDs
	d.reserved.Store(m.reserved)
	if err := d.db.Set(metaKey, m.encode(), pebble.Sync); err != nil {
		return nil, fmt.Errorf("state in the key-value store: %w", kvError(err))
	}
	if err := d.failErr(); err != nil {
		return nil, err
	}
	return m, nil
}

// enter begins a call; leave ends it.
func (d *Disk) enter() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.closed {
		return asd.ErrClosed
	}
	d.users.Add(1)
	return nil
}

func (d *Disk) leave() { d.users.Done() }

// fail makes the ASD refuse every further Apply; see the package doc.
func (d *Disk) fail(err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.failure == nil {
		d.failure = err
		close(d.failed)
		d.log.Error().Err(err).Msg("the disk failed: no writes are taken until it is opened anew")
	}
}

// failErr returns ErrFailed with the reason, or nil.
func (d *Disk) failErr() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.failure == nil {
		return nil
	}
	return fmt.Errorf("%w: %w", asd.ErrFailed, d.failure)
}

func (d *Disk) setDamaged(reason string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.damaged == "" {
		d.damaged = reason
		d.log.Error().Str("reason", reason).Msg("the key-value store is damaged: move this ASD's data elsewhere and replace it")
	}
}

// ID returns the ASD's UUID.
func (d *Disk) ID() string { return d.id.String() }

// Close waits for the calls under way, then closes the disk. Of a key-value store
// whose log or manifest failed some goroutines and its memory stay for good, but they
// reach the disk no more: the directory may be opened again in any case.
func (d *Disk) Close() error {
	d.mu.Lock()
	if d.closed {
		d.mu.Unlock()
		return nil
	}
	d.closed = true
	d.mu.Unlock()
	d.users.Wait()
	close(d.stop)
	// The key-value store may die while it is being closed, too, and take the
	// goroutine that closes it with it.
	done := make(chan error, 1)
	go func() {
		d.loops.Wait()
		d.handles.close()
		err := d.db.Close()
		if lockErr := d.lock.Close(); err == nil {
			err = lockErr
		}
		done <- err
	}()
	select {
	case err := <-done:
		if err != nil {
			return fmt.Errorf("close ASD: %w", err)
		}
	case <-d.stuck:
		d.access.revoke()
		d.handles.close()
		_ = d.lock.Close()
		return fmt.Errorf("close ASD: %w", d.failErr())
	}
	return nil
}

// isStuck says that a goroutine of the key-value store will never end.
func (d *Disk) isStuck() bool {
	select {
	case <-d.stuck:
		return true
	default:
		return false
	}
}

func isNotExist(err error) bool { return errors.Is(err, fs.ErrNotExist) }
func isExist(err error) bool    { return errors.Is(err, fs.ErrExist) }
