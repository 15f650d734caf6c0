package driver

import (
	"context"
	"errors"
	"fmt"
	"time"

	"scoria/driver/block"
	"scoria/driver/lba"
	"scoria/driver/sco"
)

// garbageLow is the part of what is reached that the scrubber leaves as garbage, besides
// two SCOs, where the bound of space (space.go) does not ask for less.
const garbageLow = 0.15

// spaceUse sums up the sealed SCOs, in clusters, without those that only have to
// be deleted yet. live is what the volume or snapshots reach, dead what a checkpoint
// gives back.
type spaceUse struct {
	clusters, live, dead uint64
	retired              bool // a generation waits for a checkpoint
}

// usage also makes the volume's account of space right.
func (v *Volume) usage() (u spaceUse) {
	inherited := v.inherited()
	v.metaMu.Lock()
	defer v.metaMu.Unlock()
	var sealed, dead, beside int64
	defer func() {
		v.space.beside.Store(beside - int64(inherited))
		v.countSpace(sealed, dead)
	}()
	for _, m := range v.scos {
		sealed += m.size
		beside += int64(v.reachedOf(m)) - int64(max(v.live.at(m.number).Load(), 0))
		if m.doomed || m.dropping {
			dead += m.size
			continue
		}
		n := v.reachedOf(m)
		u.live += uint64(n)
		u.clusters += uint64(m.clusters)
		if n == 0 {
			u.dead += uint64(m.clusters)
			dead += m.size
		}
	}
	for _, r := range v.retired {
		sealed += r.size
		dead += r.size
		if !r.doomed {
			u.retired = true
			u.clusters += uint64(r.clusters)
			u.dead += uint64(r.clusters)
		}
	}
	return u
}

// reachedOf is how many clusters of a SCO something refers to. Caller holds metaMu.
func (v *Volume) reachedOf(m *scoMeta) uint32 {
	return max(uint32(max(v.live.at(m.number).Load(), 0)), v.pins[m.number])
}

// reclaimSlack is how many clusters of garbage are not worth a checkpoint: it writes
// every page of the map that has changed, and ends the SCO that is open.
func (u spaceUse) reclaimSlack(v *Volume) uint64 {
	return max(u.live/20, uint64(2*v.cfg.SCOBytes/block.ClusterSize))
}

// garbage is how many clusters nothing refers to.
func (u spaceUse) garbage() uint64 { return u.clusters - min(u.live, u.clusters) }

// reclaimable reports whether a checkpoint would give enough space back. Where guests
// are slow for want of it, less is enough, and where they wait, for that or for the disk
// (room.go), one SCO.
func (u spaceUse) reclaimable(v *Volume) bool {
	switch s := &v.space; {
	case s.held.Load(), v.eng.room.refused():
		return u.dead > 0
	case s.tight.Load(), s.due.Load():
		return u.dead > uint64(v.cfg.SCOBytes/block.ClusterSize)
	}
	return u.dead > u.reclaimSlack(v)
}

// How long the scrubber leaves a SCO alone that it could not empty because of
// its data, or of a disk or the store, which may recover.
const (
	scrubRetryData = 10 * time.Minute
	scrubRetryDisk = 10 * time.Second
)

// scrubTurn is how many SCOs are rid of their garbage, or waited for, before other
// housekeeping gets its turn.
const scrubTurn = 64

// scrub rewrites the live clusters of the emptiest SCOs to the head, or compacts them
// if snapshots reach them, until the garbage that can't be given back otherwise is
// within bounds. It reports whether they are, and nothing is left alone for a while.
//
// What it has emptied takes space until a checkpoint without it is in the store,
// and this one waits for the upload of the SCOs before it. That goes on beside
// (giveBack), one checkpoint at a time for all that was emptied during the last one; the
// scrubber waits for it only when there is no room to carry more to the head. Caller
// holds house; nothing is left running on return.
func (v *Volume) scrub(ctx context.Context) (done bool) {
	back := v.newGiveBack(ctx)
	defer back.finish()
	v.startGain()
	v.endLeavingAlone()
	for range scrubTurn {
		if ctx.Err() != nil || v.failed.Load() || v.fenced.Load() {
			return false
		}
		if back.poll(); back.failed != nil {
			v.spaceStuck(back.failed.Error())
			return false
		}
		if back.late {
			return false
		}
		u := v.usage()
		v.adjustSpace()
		back.begin(u)
		b := v.spaceBudget()
		full := v.eng.room.refused()
		if full || v.spaceUsed()+b.emptying > max(b.allowed, v.spaceCeiling()) {
			if back.running {
				back.await()
				continue
			}
			if u.dead > 0 {
				if !back.force() {
					return false
				}
				continue
			}
		}
		if full {
			b.target = 1 // guests wait for the disk: all that can be given back is
		}
		enough := int64(u.garbage()-min(u.dead, u.garbage()))*block.ClusterSize < b.target
		var m *scoMeta
		if !enough {
			m = v.emptiest()
		}
		if m == nil {
			if again := v.nothingToEmpty(back, enough); again {
				continue
			}
			return enough && !v.space.tight.Load() && len(v.unscrubbed) == 0
		}
		err := v.reduce(ctx, m)
		switch {
		case err == nil:
			v.spaceStep()
		case ctx.Err() != nil:
			return false
		case errors.Is(err, errNoRoom), errors.Is(err, errSnapped):
			if err := v.awaitPool(ctx); err != nil {
				return false
			}
		default:
			v.leaveAlone(m, err)
		}
	}
	return false
}

// nothingToEmpty reports whether the scrubber should look again: garbage may become
// visible to it when the log has been written out.
func (v *Volume) nothingToEmpty(back *giveBack, enough bool) (again bool) {
	switch {
	case back.running && v.space.tight.Load():
		back.await()
		return true
	case back.running:
		back.finish()
		return true
	case enough && !v.space.tight.Load():
		v.reach = nil
		return false
	case !v.space.tight.Load():
		return false
	case back.force():
		return true
	}
	select { // what lies in SCOs that are not in the store yet can be seen to when they are
	case <-v.stored:
	case <-time.After(20 * time.Millisecond):
	case <-v.ckpt.work.Done():
	}
	return false
}

// reduce rids a SCO of its garbage.
func (v *Volume) reduce(ctx context.Context, m *scoMeta) error {
	asOf := v.snapping.Load()
	v.metaMu.Lock()
	pinned := v.pins[m.number] > 0
	v.metaMu.Unlock()
	if pinned {
		return v.compact(ctx, m)
	}
	return v.empty(ctx, m, asOf)
}

// errSnapped: a snapshot was made since it was found that none reaches a SCO, or is
// being made. What moved now would count as changed since that snapshot.
var errSnapped = errors.New("a snapshot was made meanwhile")

var errNotEmpty = errors.New("clusters are accounted for that no record names")

// empty moves what is live in a SCO, which no snapshot reaches as of snapping, and sees
// whether all of it was.
func (v *Volume) empty(ctx context.Context, m *scoMeta, asOf uint64) error {
	if err := v.rewrite(ctx, m, asOf); err != nil {
		return err
	}
	v.gate.Lock() // a writer maps its cluster before it adjusts the counts
	left := v.live.at(m.number).Load()
	v.gate.Unlock()
	if left > 0 {
		return fmt.Errorf("%w: %d", errNotEmpty, left)
	}
	return nil
}

// leaveAlone keeps the scrubber from a SCO for a while. Caller holds house.
func (v *Volume) leaveAlone(m *scoMeta, why error) {
	wait := scrubRetryData
	if !errors.Is(why, block.ErrCorrupt) && !errors.Is(why, sco.ErrFormat) && !errors.Is(why, errNotEmpty) && !errors.Is(why, errPins) {
		wait = scrubRetryDisk
	}
	v.raise("scrub-failed", "SCO %d can't be rid of garbage, which keeps its space: %v; tried again in %v", m.number, why, wait)
	if v.unscrubbed == nil {
		v.unscrubbed = map[uint64]time.Time{}
	}
	v.unscrubbed[m.number] = time.Now().Add(wait)
}

// endLeavingAlone lets the scrubber look again at what it has left alone for long enough.
// That ends the condition, whether or not there is still garbage enough for a try. Caller
// holds house.
func (v *Volume) endLeavingAlone() {
	now := time.Now()
	for n, until := range v.unscrubbed {
		if now.After(until) {
			delete(v.unscrubbed, n)
		}
	}
	if len(v.unscrubbed) == 0 {
		v.settle("scrub-failed")
	}
}

// fullPart is from which part of reached clusters on a SCO is left as it is.
const fullPart = 0.95

// emptiest picks the sealed SCO with the smallest part of reached clusters, nil if
// none would give anything back. Caller holds house.
func (v *Volume) emptiest() *scoMeta {
	v.endLeavingAlone()
	v.metaMu.Lock()
	defer v.metaMu.Unlock()
	var best *scoMeta
	var bestPart float64
	for _, m := range v.scos {
		n := v.reachedOf(m)
		if _, skip := v.unscrubbed[m.number]; skip || n == 0 || m.dropping || !m.uploaded {
			continue
		}
		part := float64(n) / float64(max(m.clusters, 1))
		if v.reach != nil && v.reach.kept[m.number] != nil && part < 0.5 {
			part /= 2 // looking at another snapshot's map costs more
		}
		if part < fullPart && (best == nil || part < bestPart) {
			best, bestPart = m, part
		}
	}
	return best
}

// rewrite copies the live clusters of a SCO to the head of the log, unless there is a
// snapshot that was not there as of snapping.
func (v *Volume) rewrite(ctx context.Context, m *scoMeta, asOf uint64) error {
	records, err := v.sealedRecords(ctx, m)
	if err != nil {
		return err
	}
	var batch []moving
	defer v.space.moving.Store(0)
	for i := range records {
		r := &records[i]
		if !r.HasData() {
			continue
		}
		loc := lba.MakeLocation(m.number, r.Cluster)
		now, err := v.locateIn(ctx, r.LBA)
		if err != nil {
			return err
		}
		if now != loc {
			continue
		}
		batch = append(batch, moving{lba: r.LBA, from: loc, crc: r.DataCRC, read: true, asOf: asOf})
		if len(batch) == movedTogether {
			if err := v.moveOut(ctx, m, batch); err != nil {
				return err
			}
			batch = batch[:0]
			v.space.moving.Store(m.size * int64(i) / int64(len(records)))
		}
	}
	return v.moveOut(ctx, m, batch)
}
