package driver

import (
	"context"
	"errors"
	"slices"
	"time"
)

// When to checkpoint: after checkpointMin records if the log has grown by
// checkpointGrowth times what the checkpoint would write, after checkpointMax in any
// case. A record stands for a cluster, 2^18 of them for 1 GiB; replaying 2^22
// takes about a second.
//
// Where every page is dirty again each time, as with random writes, the map then takes a
// sixteenth of what the disk writes, and as much again in a store that does not link it.
const (
	checkpointMin    = 1 << 18
	checkpointMax    = 1 << 22
	checkpointGrowth = 16
)

// idleSpill is how long a volume rests before its head is written out, idleSeal
// before the SCO is closed so that its chunks serve others. A head of fewer than
// idleSpillMin records waits for that: writing out is what makes a later flush
// short, and such a flush is short anyway.
const (
	idleSpill    = 3 * time.Second
	idleSeal     = 60 * time.Second
	idleSpillMin = 256
)

// exemptShare is the part of its fair share of the pool below which a volume is
// not slowed down for the pool's sake: it is others that fill it.
const exemptShare = 0.5

// minPerCluster is what the disk needs for a cluster at least, in nanoseconds, where it
// is not known yet or a flush found nothing to do.
const minPerCluster = 1000

// mustThrottle reports whether writes have to go through the queue: somebody
// waits already, or they have a pace to keep (mayThrottle) and are ahead of it.
func (v *Volume) mustThrottle(paced bool) bool {
	if v.parked.busy.Load() {
		return true // whoever waits comes first
	}
	return v.space.held.Load() || paced && v.pace.ahead(time.Now()) > maxAhead
}

// mayThrottle reports whether writes have a pace to keep.
func (v *Volume) mayThrottle() bool {
	return v.eng.pool.fill() > throttleAt && v.eng.pool.share(v) > exemptShare || v.space.tight.Load() ||
		v.eng.room.left() < 2*v.spare()
}

// throttleDelay is how long writers rest after that many clusters: from nothing
// at throttleAt to twice what the disk needs for them when the pool is full; or what
// the bound of space or the end of the disk's room (roomDelay) asks for, if that is more.
func (v *Volume) throttleDelay(clusters uint32) time.Duration {
	per := float64(v.eng.perCluster.Load())
	f := (v.eng.pool.fill() - throttleAt) / (1 - throttleAt)
	if v.eng.pool.share(v) <= exemptShare {
		f = 0
	}
	slow := max(2*f*per, float64(v.space.slow.Load()), v.roomDelay()*max(per, minPerCluster))
	return time.Duration(max(0, slow) * float64(clusters))
}

// maintain starts the background work that is due. It runs once a second and
// must not block.
func (v *Volume) maintain(idle time.Duration) {
	if v.closing.Load() || v.fenced.Load() || v.resting() && !v.eng.room.refused() {
		return
	}
	v.adjustRoom()
	if idle > idleSpill && v.unspilled() {
		v.kickSpill()
	}
	v.startHousekeep(idle)
}

// startHousekeep starts housekeep unless it runs.
func (v *Volume) startHousekeep(idle time.Duration) {
	if !v.scrubbing.CompareAndSwap(false, true) {
		return
	}
	if !v.spawn(func() {
		v.housekeep(v.ckpt.work, idle)
		v.space.rested.Store(time.Now().UnixNano())
		v.scrubbing.Store(false)
		v.adjustSpace() // starts it again if it must go on
	}) {
		v.scrubbing.Store(false)
	}
}

// kickHouse has housekeep work now, without waiting for the next tick. From any
// goroutine that may start one.
func (v *Volume) kickHouse() {
	if v.closing.Load() || v.fenced.Load() || v.failed.Load() || v.ckpt.work.Err() != nil {
		return
	}
	v.startHousekeep(0)
}

// logEnd names the end of the log: it changes with everything that is logged.
type logEnd struct {
	sco  uint64
	head uint64
}

// resting reports whether nothing was logged since housekeep found nothing more
// to do.
func (v *Volume) resting() bool {
	rest := v.rest.Load()
	if rest == nil || v.ckpt.owes.Load() || !v.gate.TryRLock() {
		return false
	}
	defer v.gate.RUnlock()
	return *rest == logEnd{v.cur.hdr.Number, v.cur.head.Load()}
}

// unspilled reports whether enough is not in a file yet to be written out.
func (v *Volume) unspilled() bool {
	if !v.ioMu.TryLock() {
		return false // it is being written
	}
	defer v.ioMu.Unlock()
	v.metaMu.Lock()
	defer v.metaMu.Unlock()
	for _, l := range v.unsealed {
		r, _ := unpack(l.head.Load())
		if l.closed.Load() && l.spilledR < r || r-l.spilledR >= idleSpillMin {
			return true
		}
	}
	return false
}

// housekeep does what takes longer: checkpoints, publications, the scrubber. It
// returns soon after ctx ends, which Close waits for.
func (v *Volume) housekeep(ctx context.Context, idle time.Duration) {
	v.house.Lock()
	defer v.house.Unlock()
	if v.failed.Load() || v.closing.Load() || v.fenced.Load() {
		return
	}
	v.gate.RLock()
	end := logEnd{v.cur.hdr.Number, v.cur.head.Load()}
	v.gate.RUnlock()
	v.rest.Store(nil)
	v.forgetEmptyRAM()
	if now := time.Now(); now.Sub(v.shareAsked) > shareAgain {
		v.shareAsked = now
		v.learnShare(ctx)
	}
	quiet := v.publishNow(ctx)
	due, must := v.checkpointDue(idle)
	due = due || v.ckpt.isOverdue()
	if due && (must || v.ckpt.idle() && !v.behind()) {
		quiet = false
		v.checkpointNow(ctx)
	}
	v.compactCheckpoints(ctx)
	if v.scrub(ctx) && quiet && !due && v.ckpt.idle() && !v.ckpt.owes.Load() && v.unsealedRecords() == 0 && v.allStored() {
		v.rest.Store(&end)
	}
}

// checkpointDue reports whether the map should be checkpointed, and whether it
// must be even if the last one is not in the store yet: an outage of the store
// must not make the next start long.
func (v *Volume) checkpointDue(idle time.Duration) (due, must bool) {
	due, must = logGrown(v.logSince.Load(), int64(v.m.Stats().DirtyPages))
	if must {
		return true, true
	}
	u := v.usage()
	return due || (idle > idleSeal && (v.unsealedRecords() > 0 || u.retired)) || u.reclaimable(v) || u.dead > 0 && v.eng.room.tight(), false
}

// logGrown is checkpointDue as far as it is for the growth of the log, in records, since
// the last checkpoint.
func logGrown(since, dirtyPages int64) (due, must bool) {
	return since > checkpointMin && since > checkpointGrowth*dirtyPages || since > checkpointMax, since > checkpointMax
}

// behind reports whether more of the log than a checkpoint should have to write out
// is only in the write buffer. A checkpoint does that at once, at the expense of the
// guests' requests; it is better to leave it to ioLoop, which yields to them, and to
// make the checkpoint then. This does not put it off for ever: past checkpointMax
// it must be made, and the pool holds only so much.
func (v *Volume) behind() bool {
	return int64(v.dirtyChunks.Load())*chunkBytes > behindSCOs*v.cfg.SCOBytes && v.eng.pool.fill() < throttleAt
}

const behindSCOs = 3

// checkpointNow makes one, if it can.
func (v *Volume) checkpointNow(ctx context.Context) {
	v.checkpointEnded(ctx, v.checkpoint(ctx))
}

// checkpointEnded shows how a checkpoint ended.
func (v *Volume) checkpointEnded(ctx context.Context, err error) {
	switch {
	case err == nil:
		v.settle("checkpoint-failed")
	case errors.Is(err, errNoRoom):
		v.kickIO() // until a SCO has been sealed
	case ctx.Err() == nil:
		v.raise("checkpoint-failed", "the map can't be checkpointed: %v; tried again", err)
	}
}

// publishNow reports whether the store has taken all that there was.
func (v *Volume) publishNow(ctx context.Context) bool {
	did, err := v.publish(ctx)
	v.publishEnded(ctx, did, err)
	return err == nil
}

// publishEnded shows how a publication ended.
func (v *Volume) publishEnded(ctx context.Context, did bool, err error) {
	if did {
		v.settle("store-unreachable")
	}
	switch {
	case errors.Is(err, ErrStaleEpoch):
		v.fence(err)
	case err != nil && ctx.Err() == nil:
		v.storeTrouble(err)
	}
}

// allStored reports whether every sealed SCO is in the store and none has still
// to be deleted.
func (v *Volume) allStored() bool {
	v.metaMu.Lock()
	defer v.metaMu.Unlock()
	for _, m := range v.scos {
		if !m.uploaded || m.doomed || m.dropping {
			return false
		}
	}
	return true
}

// forgetEmptyRAM forgets sealed SCOs whose chunks have all been given to others.
func (v *Volume) forgetEmptyRAM() {
	for i := range v.ram {
		if l := v.ram[i].Load(); l != nil && l.sealed.Load() && !l.inPool() {
			v.ram[i].CompareAndSwap(l, nil)
		}
	}
}

func (l *logSCO) inPool() bool {
	for i := range l.data {
		if l.data[i].Load() != 0 {
			return true
		}
	}
	return false
}

func (v *Volume) storeTrouble(err error) {
	v.raise("store-unreachable", "the store does not take data: %v; tried again until it works", err)
}

func (v *Volume) unsealedRecords() (n uint32) {
	v.metaMu.Lock()
	defer v.metaMu.Unlock()
	for _, l := range v.unsealed {
		r, _ := unpack(l.head.Load())
		n += r
	}
	return n
}

// compactCheckpoints has the pages of the emptiest page object rewritten by the
// next checkpoint when more than half of all stored pages are stale.
func (v *Volume) compactCheckpoints(ctx context.Context) {
	c := v.ckpt
	c.mu.Lock()
	defer c.mu.Unlock()
	// Pages that a snapshot refers to as well would only be doubled.
	objects := slices.DeleteFunc(c.own(v.m.Objects()), func(o uint32) bool { return c.pinned[o] })
	if len(objects) < 8 {
		return
	}
	emptiest, least, live := uint32(0), 0, 0
	for _, o := range objects {
		n := v.m.LivePages(o)
		live += n
		if emptiest == 0 || n < least {
			emptiest, least = o, n
		}
	}
	if least*len(objects)*2 > live {
		return // no object is below half of the average
	}
	if err := v.m.MarkObjectDirty(ctx, v.ckpt, emptiest); err != nil && ctx.Err() == nil {
		v.log.Warn().Err(err).Uint32("object", emptiest).Msg("checkpoint pages can't be compacted")
	}
}

// coldest is the SCO with a local copy, and one in the store, that was not read for longest, and when
// it was last read, which readers go on changing.
func (v *Volume) coldest() (best *scoMeta, lastRead int64) {
	v.metaMu.Lock()
	defer v.metaMu.Unlock()
	for _, r := range v.retired {
		if r.local {
			return r.scoMeta, r.lastRead // nobody reads it any more
		}
	}
	for _, m := range v.scos {
		if m.local && m.uploaded && !m.lost && (best == nil || m.lastRead < best.lastRead) {
			best = m
		}
	}
	if best == nil {
		return nil, 0
	}
	return best, best.lastRead
}
