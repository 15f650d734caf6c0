package driver

import (
	"context"
	"errors"
	"fmt"
	"time"

	"scoria/driver/block"
	"scoria/driver/lba"
	"scoria/driver/sco"
	"scoria/driver/tlog"
)

// Space. The scrubber works when garbage exceeds garbageLow of the live data
// (plus slack for what is too small to matter) and stops writers for a moment
// when it exceeds garbageHigh.
const (
	garbageLow  = 0.15
	garbageHigh = 0.28
)

// spaceUse sums up the sealed SCOs, in clusters, without those that only have to
// be deleted yet. live is what the volume or snapshots reach, dead what a checkpoint
// gives back.
type spaceUse struct {
	clusters, live, dead uint64
	retired              bool // a generation waits for a checkpoint
}

func (v *Volume) usage() (u spaceUse) {
	v.metaMu.Lock()
	defer v.metaMu.Unlock()
	for _, m := range v.scos {
		if m.doomed || m.dropping {
			continue
		}
		n := v.reachedOf(m)
		u.live += uint64(n)
		u.clusters += uint64(m.clusters)
		if n == 0 {
			u.dead += uint64(m.clusters)
		}
	}
	for _, r := range v.retired {
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

// reclaimSlack is how many clusters of garbage are not worth a checkpoint.
func (u spaceUse) reclaimSlack(v *Volume) uint64 {
	return max(u.live/20, uint64(v.cfg.SCOBytes/block.ClusterSize))
}

// garbage is how many clusters nothing refers to.
func (u spaceUse) garbage() uint64 { return u.clusters - min(u.live, u.clusters) }

// tooMuch reports whether there is so much garbage that writers have to be slowed
// down. Half of the write buffer may be: a burst into it leaves as much behind, which
// takes space only until the burst is over.
func (u spaceUse) tooMuch(v *Volume) bool {
	slack := max(4*uint64(v.cfg.SCOBytes/block.ClusterSize), uint64(v.eng.pool.n)*chunkClusters/2)
	return float64(u.garbage()) > garbageHigh*float64(u.live)+float64(slack)
}

// reclaimable reports whether a checkpoint would give enough space back.
func (u spaceUse) reclaimable(v *Volume) bool { return u.dead > u.reclaimSlack(v) }

// How long the scrubber leaves a SCO alone that it could not empty because of
// its data, or of a disk or the store, which may recover.
const (
	scrubRetryData = 10 * time.Minute
	scrubRetryDisk = 10 * time.Second
)

// scrub rewrites the live clusters of the emptiest SCOs to the head, or compacts them
// if snapshots reach them, until the garbage that can't be given back otherwise is
// within bounds. It reports whether they are.
//
// What it has emptied takes space until a checkpoint without it is in the store,
// and this one waits for the upload of the SCOs before it. So each turn publishes
// first, and a new checkpoint is begun only when the last one is published.
func (v *Volume) scrub(ctx context.Context) (done bool) {
	defer v.tooMuchGarbage.Store(false)
	for ctx.Err() == nil && !v.failed.Load() && !v.fenced.Load() {
		if !v.publishNow(ctx) {
			return false
		}
		u := v.usage()
		all := u.garbage()
		slack := uint64(2 * v.cfg.SCOBytes / block.ClusterSize)
		tooMuch := u.tooMuch(v)
		wanted := v.eng.room.refused() // then all that can be given back is
		if (u.reclaimable(v) || wanted && u.dead > 0) && v.ckpt.idle() && (v.behind() && !tooMuch || !v.checkpointNow(ctx)) {
			return false
		}
		if float64(all-min(all, u.dead)) < garbageLow*float64(u.live)+float64(slack) && !wanted {
			v.reach = nil
			return true
		}
		v.tooMuchGarbage.Store(tooMuch)
		if u.dead > 2*u.reclaimSlack(v) && !v.ckpt.idle() {
			if !v.awaitPublication(ctx) {
				return false
			}
			continue
		}
		m := v.emptiest()
		if m == nil {
			return false
		}
		if err := v.reduce(ctx, m); err != nil {
			if ctx.Err() == nil && !errors.Is(err, errNoRoom) {
				v.leaveAlone(m, err)
			}
			return false
		}
	}
	return false
}

// reduce rids a SCO of its garbage.
func (v *Volume) reduce(ctx context.Context, m *scoMeta) error {
	v.metaMu.Lock()
	pinned := v.pins[m.number] > 0
	v.metaMu.Unlock()
	if pinned {
		return v.compact(ctx, m)
	}
	return v.empty(ctx, m)
}

var errNotEmpty = errors.New("clusters are accounted for that no record names")

// empty moves what is live in a SCO and sees whether all of it was.
func (v *Volume) empty(ctx context.Context, m *scoMeta) error {
	if err := v.rewrite(ctx, m); err != nil {
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

// awaitPublication waits a moment for the uploads that the pending root builds
// on, and reports whether that was worth it. An outage of the store may last:
// other housekeeping must go on.
func (v *Volume) awaitPublication(ctx context.Context) bool {
	for range 50 {
		v.kickUpload()
		if did, err := v.publish(ctx); did || err != nil {
			return err == nil
		}
		select {
		case <-time.After(20 * time.Millisecond):
		case <-ctx.Done():
			return false
		}
	}
	return false
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

// fullPart is from which part of reached clusters on a SCO is left as it is.
const fullPart = 0.95

// emptiest picks the sealed SCO with the smallest part of reached clusters, nil if
// none would give anything back. Caller holds house.
func (v *Volume) emptiest() *scoMeta {
	now := time.Now()
	for n, until := range v.unscrubbed {
		if now.After(until) {
			delete(v.unscrubbed, n)
		}
	}
	if len(v.unscrubbed) == 0 {
		v.settle("scrub-failed")
	}
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

// rewrite copies the live clusters of a SCO to the head of the log.
func (v *Volume) rewrite(ctx context.Context, m *scoMeta) error {
	records, err := v.sealedRecords(ctx, m)
	if err != nil {
		return err
	}
	var batch []moving
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
		batch = append(batch, moving{lba: r.LBA, from: loc})
		if len(batch) == cap(movingBuffers) {
			if err := v.move(ctx, batch); err != nil {
				return err
			}
			batch = batch[:0]
		}
	}
	return v.move(ctx, batch)
}

// moving is a cluster that the scrubber carries to the head.
type moving struct {
	lba  uint64
	from lba.Location
}

var movingBuffers = make([]struct{}, 0, 16)

// move copies clusters to the head where the map still says that they lie where
// the scrubber saw them. It yields to writers: it waits while the pool is full.
func (v *Volume) move(ctx context.Context, batch []moving) error {
	if len(batch) == 0 {
		return nil
	}
	for v.eng.pool.fill() > (spillAt+throttleAt)/2 {
		v.kickSpill()
		v.eng.kickAll()
		select {
		case <-v.eng.pool.roomChan():
		case <-time.After(10 * time.Millisecond):
		case <-ctx.Done():
			return ctx.Err()
		case <-v.ctx.Done():
			return block.ErrClosed
		}
	}
	buf := make([]byte, len(batch)*block.ClusterSize)
	for i, mv := range batch {
		if err := v.readCluster(ctx, mv.from, buf[i*block.ClusterSize:(i+1)*block.ClusterSize]); err != nil {
			if now, lerr := v.locateIn(ctx, mv.lba); lerr == nil && now != mv.from {
				continue
			}
			return err
		}
	}
	v.gate.Lock()
	defer v.gate.Unlock()
	for i, mv := range batch {
		if now, ok := v.m.Get(mv.lba); !ok || now != mv.from {
			continue
		}
		l, err := v.roomExclusive(1, 1)
		if err != nil {
			return err
		}
		c, rec, ok := l.reserve(1, 1)
		if !ok {
			return errNoRoom
		}
		v.relocate(l, c, rec, mv, buf[i*block.ClusterSize:(i+1)*block.ClusterSize])
	}
	return nil
}

// relocate logs one moved cluster. Caller holds the gate exclusively.
func (v *Volume) relocate(l *logSCO, c, rec uint32, mv moving, data []byte) {
	slot, off := l.cluster(c)
	dst := v.eng.pool.chunk(l.data[slot].Load())[off : off+block.ClusterSize]
	copy(dst, data)
	r := tlog.Record{
		Type: tlog.Relocate, LBA: mv.lba, Arg: uint64(mv.from), DataCRC: tlog.CRC(dst),
		Durable: l.durable.Load(), Cluster: c,
	}
	l.crcs[slot].Load()[c%chunkClusters].Store(r.DataCRC)
	tlog.Put(l.record(rec), l.key, rec, &r)
	if done, ok := v.m.Replace(mv.lba, mv.from, lba.MakeLocation(l.hdr.Number, c)); !done || !ok {
		panic("driver: map changed with the gate closed")
	}
	v.live.at(mv.from.SCO()).Add(-1)
	v.live.at(l.hdr.Number).Add(1)
	v.stats.scrubbed.Add(block.ClusterSize)
}
