package driver

import (
	"errors"
	"fmt"
	"runtime"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"scoria/driver/block"
)

// ioState is the work of a volume's I/O goroutine, which exists only while
// there is some.
type ioState struct {
	mu      sync.Mutex
	running bool
	again   bool
	waiters []flushWaiter
	served  []flushWaiter // whom the sync under way is for
	spill   bool          // write everything out, without a sync

	stopped   bool // no goroutine may be started any more
	uploading atomic.Bool
}

// flushWaiter is a flush or a FUA write.
type flushWaiter struct {
	r     *block.Request
	since time.Time
}

// flushLater lets r end when everything that is in the log now is durable.
func (v *Volume) flushLater(r *block.Request) {
	v.io.mu.Lock()
	stopped := v.io.stopped
	if !stopped {
		v.io.waiters = append(v.io.waiters, flushWaiter{r, time.Now()})
	}
	v.io.mu.Unlock()
	if stopped { // it came while the volume was being closed
		v.end(r, block.ErrClosed)
		return
	}
	v.kickIO()
}

// cancelFlushes ends the flushes of owner: on a full disk they wait for room.
func (v *Volume) cancelFlushes(owner any) {
	var gone []flushWaiter
	take := func(list []flushWaiter) (keep []flushWaiter) {
		for _, w := range list {
			if w.r.Owner == owner {
				gone = append(gone, w)
			} else {
				keep = append(keep, w)
			}
		}
		return keep
	}
	v.io.mu.Lock()
	v.io.waiters = take(v.io.waiters)
	v.io.served = take(v.io.served)
	v.io.mu.Unlock()
	for _, w := range gone {
		v.end(w.r, block.ErrCanceled)
	}
}

// nothingToFlush reports whether all that is in the log is durable already.
func (v *Volume) nothingToFlush() bool {
	if v.failed.Load() {
		return false
	}
	v.gate.RLock()
	defer v.gate.RUnlock()
	records, _ := unpack(v.cur.head.Load())
	if v.cur.durable.Load() != records {
		return false
	}
	v.metaMu.Lock()
	defer v.metaMu.Unlock()
	return len(v.unsealed) == 1 || (len(v.unsealed) > 1 && records > 0)
}

// kickIO makes the I/O goroutine look for work.
func (v *Volume) kickIO() {
	v.io.mu.Lock()
	defer v.io.mu.Unlock()
	v.io.again = true
	if !v.io.running && !v.io.stopped {
		v.io.running = true
		v.background.Go(v.ioLoop)
	}
}

// kickSpill asks for everything to be written out soon.
func (v *Volume) kickSpill() {
	v.io.mu.Lock()
	v.io.spill = true
	v.io.mu.Unlock()
	v.kickIO()
}

// ioLoop flushes first, then seals, then spills a little, until nothing is left.
func (v *Volume) ioLoop() {
	// The thread's priority goes up and down with what it does.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	lowered := false
	lower := func(want bool) {
		if want != lowered {
			lowered = want
			v.eng.nice.set(want)
		}
	}
	defer lower(false)
	for {
		v.io.mu.Lock()
		waiters := v.io.waiters
		v.io.waiters, v.io.served = nil, waiters
		again := v.io.again
		v.io.again = false
		if len(waiters) == 0 && !again {
			v.io.running = false
			v.io.mu.Unlock()
			return
		}
		v.io.mu.Unlock()

		lower(len(waiters) == 0 && v.eng.pool.fill() < hurryAt && !v.spaceWanted())
		if len(waiters) > 0 {
			err := v.syncAll(maxVec)
			v.io.mu.Lock()
			waiters, v.io.served = v.io.served, nil
			v.io.mu.Unlock()
			for _, w := range waiters {
				v.stats.stages[StageFlush].since(w.since)
				v.end(w.r, err)
			}
			if v.unsealedCount() > maxUnsealed {
				// Flushes without a pause must not keep SCOs from being sealed.
				if _, err := v.ioStep(); err != nil {
					v.ioFailed(err)
				}
			}
			v.kickIO()
			continue
		}
		more, err := v.ioStep()
		if err != nil {
			v.ioFailed(err)
			pause := 200 * time.Millisecond
			if v.failed.Load() {
				pause = failedPause
			}
			select {
			case <-time.After(pause):
				v.kickIO()
			case <-v.ctx.Done():
			}
			continue
		}
		if more {
			v.settleDisk()
			v.kickIO()
		}
	}
}

// ioStep does one piece of background work: seal the oldest closed SCO if all of
// it is written, else write a piece of it or of the head. more says whether
// there is another piece to do at once.
func (v *Volume) ioStep() (more bool, err error) {
	v.ioMu.Lock()
	defer v.ioMu.Unlock()
	if v.failed.Load() {
		return v.spillFailed()
	}
	v.metaMu.Lock()
	var l *logSCO
	if len(v.unsealed) > 0 {
		l = v.unsealed[0]
	}
	v.metaMu.Unlock()
	if l == nil || l.lost {
		return false, nil
	}
	closed := l.closed.Load() // before head, which is final only then
	records, clusters := unpack(l.head.Load())
	if closed {
		if l.spilledR < records || l.spilledC < clusters {
			return true, v.spill(l, records, spillPiece, v.gently())
		}
		return true, v.seal(l)
	}
	if !v.wantSpill() {
		return false, nil
	}
	// Only whole chunks: the last one is still being filled.
	whole := clusters / chunkClusters * chunkClusters
	if whole > l.spilledC {
		return true, v.spillWhole(l, whole)
	}
	v.io.mu.Lock()
	all := v.io.spill
	v.io.spill = false
	v.io.mu.Unlock()
	if all && l.spilledR < records {
		return false, v.spill(l, records, -1, v.gently())
	}
	return false, nil
}

// spillPiece is how many clusters are written between two looks at the waiters.
const spillPiece = maxVec * chunkClusters

// wantSpill decides whether the head should be written out before it must be.
func (v *Volume) wantSpill() bool {
	v.io.mu.Lock()
	asked := v.io.spill
	v.io.mu.Unlock()
	return asked || v.eng.draining() || v.spaceWanted()
}

// ioFailed explains why background writing does not get on; it is tried again.
func (v *Volume) ioFailed(err error) {
	if v.failed.Load() {
		return // "sync-failed" says it, and nothing is tried again
	}
	if errors.Is(err, syscall.ENOSPC) {
		v.eng.evictForRoom(v.scoDir())
		v.eng.room.look() // somebody has used it up since the last one
		v.raise("disk-full", "the local disk under %s is full: the log can't be written out; writes pause when the write buffer is full and resume by themselves when there is room (%v)", v.dir, err)
		return
	}
	v.raise("disk-error", "the local disk under %s fails: %v; tried again until it works", v.dir, err)
}

// syncAll makes everything in the log durable: data and records of each SCO that
// is not sealed, oldest first, then one sync for each file that was written.
// A failed sync fails this and all later flushes (see package vfs). one is how many
// chunks a write to the disk takes.
func (v *Volume) syncAll(one int) error {
	if v.failed.Load() {
		return fmt.Errorf("flush: %w: an earlier sync failed", block.ErrFailed)
	}
	v.gate.RLock()
	target := v.cur
	records, _ := unpack(target.head.Load())
	v.gate.RUnlock()
	for {
		err := v.trySync(target, records, one)
		if err == nil {
			v.settleDisk()
			return nil
		}
		if v.failed.Load() {
			return err
		}
		// Not written yet, but still in the pool: wait for the disk (P8).
		v.ioFailed(err)
		select {
		case <-time.After(200 * time.Millisecond):
		case <-v.ctx.Done():
			return block.ErrClosed
		}
		// Sealing and uploading may be what gives room back.
		if _, err := v.ioStep(); err != nil {
			v.ioFailed(err)
		}
	}
}

// maxUnsealed is how many SCOs may wait to be sealed before sealing gets its
// turn between flushes.
const maxUnsealed = 4

func (v *Volume) unsealedCount() int {
	v.metaMu.Lock()
	defer v.metaMu.Unlock()
	return len(v.unsealed)
}

// spawn starts a goroutine of the volume, unless Close waits for them already.
func (v *Volume) spawn(fn func()) bool {
	v.io.mu.Lock()
	defer v.io.mu.Unlock()
	if v.io.stopped {
		return false
	}
	v.background.Go(fn)
	return true
}

// stopSpawning keeps spawn and kickIO from starting anything.
func (v *Volume) stopSpawning() {
	v.io.mu.Lock()
	v.io.stopped = true
	v.io.mu.Unlock()
}

// trySync is one attempt of syncAll, up to a record of target.
func (v *Volume) trySync(target *logSCO, records uint32, one int) error {
	v.ioMu.Lock()
	defer v.ioMu.Unlock()
	v.metaMu.Lock()
	list := append([]*logSCO(nil), v.unsealed...)
	v.metaMu.Unlock()
	for _, l := range list {
		if l.hdr.Number > target.hdr.Number {
			break
		}
		upTo, _ := unpack(l.head.Load())
		if l == target {
			upTo = records
		}
		if upTo == 0 {
			continue
		}
		l.flushed = true
		if l.spilledR < upTo {
			if err := v.spill(l, upTo, -1, one); err != nil {
				return err
			}
		}
		if l.unsynced {
			if err := v.syncFile(l); err != nil {
				return err
			}
		}
		if d := l.spilledR; d > l.durable.Load() {
			l.durable.Store(d)
		}
	}
	return nil
}

// syncFile syncs a SCO's file. A failure is final for the volume: what the
// kernel could not write it may have dropped, and a later sync would not say so.
func (v *Volume) syncFile(l *logSCO) error {
	v.stats.syncs.Add(1)
	defer v.stats.stages[StageSync].since(time.Now())
	if err := l.file.Sync(); err != nil {
		return v.syncFailed(l, err)
	}
	l.unsynced = false
	return nil
}

// syncFailed ends the volume's service of flushes and writes.
func (v *Volume) syncFailed(l *logSCO, err error) error {
	if !v.failed.Swap(true) {
		v.spawn(v.afterFailure)
	}
	l.lost = true
	v.spillAgain(l)
	v.raise("sync-failed", "a sync of the local disk failed (%v): flushes of this volume fail until the daemon is restarted, because nobody can say what the disk has kept; check the disk under %s", err, v.dir)
	return fmt.Errorf("flush: SCO %d: %w: %v", l.hdr.Number, block.ErrFailed, err)
}
