package driver

import (
	"context"
	"errors"
	"fmt"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"time"

	"github.com/rs/zerolog"

	"scoria/driver/block"
	"scoria/driver/lba"
)

// ramTableMin is the least number of SCOs that a volume can have in RAM.
const ramTableMin = 16

type ramSlot = atomic.Pointer[logSCO]

// Volume is an open virtual disk. It implements block.Device.
type Volume struct {
	eng *Engine
	cfg VolumeConfig
	log zerolog.Logger
	tag uint32 // names the volume in the caches
	dir string

	info atomic.Pointer[block.Info]
	m    *lba.Map
	ckpt *checkpoints

	// gate: shared by writers from reservation to map update, exclusive for
	// what must not interleave with any of them (see the package doc).
	gate sync.RWMutex
	cur  *logSCO // guarded by gate

	extendMu sync.Mutex // provides chunks to cur
	mapRoom  int64      // bytes of the disk promised to the next checkpoint; guarded by extendMu
	storeDue int64      // the same, to what is not in the store yet; guarded by extendMu

	filling   atomic.Pointer[logSCO] // the SCO that was begun last, until it is closed
	roomless  atomic.Bool            // the disk has no room for a write that waits
	rootBytes atomic.Int64           // size of the last root
	openBytes int64                  // what the file of a SCO takes until it is sealed
	share     atomic.Pointer[diskShare]

	// ram finds the SCOs in RAM by number & (len-1).
	ram []ramSlot

	live liveTable

	// ioMu is held by the one goroutine that writes, syncs and seals this
	// volume's SCO files.
	ioMu     sync.Mutex
	unsealed []*logSCO // oldest first; appended under gate and metaMu, removed under ioMu and metaMu
	io       ioState

	metaMu sync.Mutex
	scos   map[uint64]*scoMeta // every SCO that is sealed
	// pins is how many clusters of a SCO snapshots reach, none left out. snaps,
	// oldest first, changes under ckpt.mu too, either suffices for reading.
	pins  map[uint64]uint32
	snaps []*snapshotState

	retired []retiree // generations that have a successor, to be deleted

	kin              atomic.Pointer[kin] // nil: it builds on nobody
	origin           Snapshot            // SCOs and page objects up to there are not its own
	inheritedAtStart int64               // clusters in ancestors, in the root that recovery began with
	clones           users               // open clones

	parked     parkedQueue
	pace       pace
	waiting    waitingSet
	resizeMu   sync.Mutex     // one change of size at a time; before house
	rmw        [64]sync.Mutex // sub-cluster writes, by cluster number
	claims     claims
	watches    watches
	conds      conditions
	stats      counters
	seq        seqReader
	aheadBusy  atomic.Bool // readMapAhead works
	storeWaits storeWaits
	lost       lostData
	again      lostObjects

	users      users          // who is inside without a request
	background sync.WaitGroup // goroutines of this volume
	pending    sync.WaitGroup // requests that wait
	ctx        context.Context
	cancel     context.CancelFunc
	closing    atomic.Bool
	failed     atomic.Bool // a sync failed: no flush succeeds any more
	fenced     atomic.Bool // a newer owner exists: nothing is served any more
	lastWrite  atomic.Int64

	dirtyChunks atomic.Uint32 // of the pool; see pool.share
	logSince    atomic.Int64  // records in the SCOs closed since the last checkpoint
	scrubbing   atomic.Bool   // housekeep runs or is about to
	putSince    atomic.Int64  // when the upload under way began, Unix nanoseconds; 0: none

	house      sync.Mutex // held by housekeep; before all other locks
	unscrubbed map[uint64]time.Time
	generation uint32                 // the last that was used; belongs to house
	reach      *reachCache            // likewise
	shareAsked time.Time              // when learnShare was called last; likewise
	rest       atomic.Pointer[logEnd] // where the log ended when nothing was left to do

	// snapping grows when a snapshot is cut, with the gate closed, and when what it pins
	// is known or it has failed: it is odd meanwhile.
	snapping atomic.Uint64

	space   spaceGate
	stored  chan struct{} // has something when a SCO came to the store
	checkMu sync.RWMutex  // Check holds it shared against deletion of SCOs
}

var _ block.Device = (*Volume)(nil)

// Info implements block.Device.
func (v *Volume) Info() block.Info { return *v.info.Load() }

// ID returns the volume's identity.
func (v *Volume) ID() string { return v.cfg.ID.String() }

func (v *Volume) setInfo() {
	v.info.Store(&block.Info{
		Name: v.cfg.Name, Serial: v.cfg.Serial, Size: v.cfg.Size,
		LogicalBlock: v.cfg.LogicalBlock, PhysicalBlock: block.ClusterSize,
		ReadOnly: v.cfg.ReadOnly, DiscardAlignment: block.ClusterSize,
	})
}

// Submit implements block.Device.
func (v *Volume) Submit(batch []*block.Request) {
	// A fault on the peer's memory becomes a panic that fill and readInline catch.
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	for len(batch) > 0 {
		n := 1
		for n < len(batch) && batch[n].Op == batch[0].Op {
			n++
		}
		switch batch[0].Op {
		case block.OpRead:
			v.submitReads(batch[:n])
		case block.OpWrite:
			v.submitWrites(batch[:n])
		default:
			for _, r := range batch[:n] {
				v.submitOther(r)
			}
		}
		batch = batch[n:]
	}
}

// answer ends a request from within Submit.
func (v *Volume) answer(r *block.Request, err error) {
	if err != nil {
		v.stats.ops[r.Op].errors.Add(1)
	}
	r.Err, r.Ended = err, true
}

// takeOver says that r will end later; every takeOver has one end.
func (v *Volume) takeOver(r *block.Request) {
	r.Ended = false
	v.pending.Add(1)
}

// end ends a request that Submit took over.
func (v *Volume) end(r *block.Request, err error) {
	if err != nil {
		v.stats.ops[r.Op].errors.Add(1)
	}
	r.Err = err
	r.Complete(r)
	v.pending.Done()
}

// usable returns why the volume serves nothing, if so.
func (v *Volume) usable() error {
	if v.closing.Load() || v.fenced.Load() {
		return block.ErrClosed
	}
	return nil
}

// writable returns why the volume takes no changes, if so: what can never become
// durable should not be accepted, and must not fill the pool for the others.
func (v *Volume) writable() error {
	if v.failed.Load() {
		return fmt.Errorf("%w: an earlier sync of the local disk failed", block.ErrFailed)
	}
	return v.usable()
}

func (v *Volume) submitOther(r *block.Request) {
	info := v.info.Load()
	err := block.CheckRange(info, r)
	if err == nil {
		err = v.usable()
	}
	if err != nil {
		v.answer(r, err)
		return
	}
	switch r.Op {
	case block.OpFlush:
		v.stats.ops[r.Op].add(1, 0)
		if v.nothingToFlush() {
			v.answer(r, nil)
			return
		}
		v.takeOver(r)
		v.flushLater(r)
	case block.OpDiscard, block.OpWriteZeroes:
		v.stats.ops[r.Op].add(1, r.Length)
		if r.Length == 0 {
			v.answer(r, nil)
			return
		}
		v.takeOver(r)
		go v.clearRange(r)
	default:
		v.answer(r, fmt.Errorf("operation %s is unknown", r.Op))
	}
}

// Cancel implements block.Device.
func (v *Volume) Cancel(owner any) {
	for _, p := range v.parked.remove(func(p *parkedWrite) bool { return p.r.Owner == owner }) {
		v.end(p.r, block.ErrCanceled)
	}
	v.waiting.cancel(owner)
	v.storeWaits.cancel(owner)
	v.cancelFlushes(owner)
}

// Claim implements block.Device.
func (v *Volume) Claim(c block.Claimant) (func(), error) { return v.claims.take(v.cfg.Name, c) }

// Holder returns who may write now.
func (v *Volume) Holder() (block.Claimant, bool) { return v.claims.current() }

// Watch implements block.Device.
func (v *Volume) Watch(fn func(block.Info)) func() { return v.watches.add(fn) }

// Close stops the volume: waiting requests end, everything is made durable and a
// checkpoint is written so that the next opening replays nothing. Front ends
// must have let go of it. It waits for the volume's clones to be closed, and gives
// up, the volume still open, if they aren't when ctx ends. It does not wait for the store; whatever else it waits
// for, it does so no longer than ctx.
func (v *Volume) Close(ctx context.Context) error {
	if err := v.awaitClones(ctx); err != nil {
		return err
	}
	if v.closing.Swap(true) {
		return nil
	}
	for _, p := range v.parked.remove(func(*parkedWrite) bool { return true }) {
		v.end(p.r, block.ErrClosed)
	}
	defer context.AfterFunc(ctx, v.cancel)()
	// Housekeeping must be over before the last checkpoint: it may wait for the
	// store with the checkpoints locked, and the scrubber writes to the log.
	v.ckpt.stop()
	v.house.Lock()
	//lint:ignore SA2001 this only waits: whoever comes later sees closing
	v.house.Unlock()
	v.users.shut()
	v.pending.Wait()
	var err error
	if !v.fenced.Load() && !v.failed.Load() {
		err = v.lastCheckpoint(ctx)
	}
	v.cancel()
	v.stopSpawning()
	v.background.Wait()
	for more := err == nil; more; {
		// What is durable already is also sealed, so that the pool is left empty. A
		// failure here costs the next opening some work, nothing else.
		if more, err = v.ioStep(); err != nil {
			v.log.Warn().Err(err).Msg("SCOs are left to be sealed at the next start")
			more, err = false, nil
		}
	}
	v.letGo()
	if err != nil {
		return fmt.Errorf("volume %s: close: %w", v.cfg.Name, err)
	}
	return nil
}

// lastCheckpoint waits, if it must, until the oldest SCOs are sealed and the disk takes
// the log.
func (v *Volume) lastCheckpoint(ctx context.Context) error {
	for {
		err := v.checkpoint(ctx)
		pause := 10 * time.Millisecond
		switch {
		case errors.Is(err, errNoRoom):
		case errors.Is(err, errLogBehind):
			pause = behindPause
		default:
			return err
		}
		v.kickIO()
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return err
		case <-v.ctx.Done():
			return err
		}
	}
}

// letGo frees what the volume holds in shared structures.
func (v *Volume) letGo() {
	v.eng.forget(v)
	for i := range v.ram {
		l := v.ram[i].Swap(nil)
		if l == nil {
			continue
		}
		if l.sealed.Load() {
			l.releaseChunks()
		}
	}
	v.forgetRoom()
	for _, l := range v.unsealed {
		if v.fenced.Load() {
			l.releaseChunks() // the owner of a newer epoch went on without them
		} else {
			v.eng.pool.abandon(l)
		}
		l.closeFiles()
	}
	v.ckpt.close()
	v.unlink()
	v.m.Close()
}

// tick is called once a second by the engine.
func (v *Volume) tick(now time.Time) {
	if !v.users.add() {
		return
	}
	defer v.users.done()
	v.logEnded(now)
	v.watchUpload(now)
	v.watchSpace(now)
	idle := now.UnixNano() - v.lastWrite.Load()
	v.maintain(time.Duration(idle))
}
