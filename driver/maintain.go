package driver

import (
	"context"
	"fmt"
	"time"

	"scoria/driver/block"
	"scoria/driver/tlog"

	"scoria/driver/lba"
)

// When to checkpoint: after checkpointMin records if the log has grown by
// several times what the checkpoint would write, after checkpointMax in any
// case. A record stands for a cluster, 2^18 of them for 1 GiB; replaying 2^22
// takes about a second.
const (
	checkpointMin = 1 << 18
	checkpointMax = 1 << 22
)

// idleSpill is how long a volume rests before its head is written out, idleSeal
// before the SCO is closed so that its chunks serve others.
const (
	idleSpill = 3 * time.Second
	idleSeal  = 60 * time.Second
)

// Space. The scrubber works when garbage exceeds garbageLow of the live data
// (plus slack for what is too small to matter) and stops writers for a moment
// when it exceeds garbageHigh.
const (
	garbageLow  = 0.15
	garbageHigh = 0.28
)

// mustThrottle reports whether writes have to go through the queue: somebody
// waits already, or the pool is so full that they are slowed down.
func (v *Volume) mustThrottle() bool {
	return v.eng.pool.fill() > throttleAt || v.parked.busy.Load() || v.tooMuchGarbage.Load()
}

// throttleDelay is how long writers rest after that many clusters: from nothing
// at throttleAt to twice what the disk needs for them when the pool is full.
func (v *Volume) throttleDelay(clusters uint32) time.Duration {
	per := float64(v.eng.perCluster.Load())
	f := (v.eng.pool.fill() - throttleAt) / (1 - throttleAt)
	if v.tooMuchGarbage.Load() {
		f = max(f, 0.5)
	}
	if f <= 0 {
		return 0
	}
	return time.Duration(2 * f * per * float64(clusters))
}

// maintain starts the background work that is due. It runs once a second and
// must not block.
func (v *Volume) maintain(idle time.Duration) {
	if v.closing.Load() || v.fenced.Load() {
		return
	}
	if idle > idleSpill && v.unspilled() {
		v.kickSpill()
	}
	if v.scrubbing.CompareAndSwap(false, true) {
		v.background.Add(1)
		go func() {
			defer v.background.Done()
			defer v.scrubbing.Store(false)
			v.housekeep(v.ctx, idle)
		}()
	}
}

// unspilled reports whether the head has something that is not in a file.
func (v *Volume) unspilled() bool {
	if !v.ioMu.TryLock() {
		return false // it is being written
	}
	defer v.ioMu.Unlock()
	v.metaMu.Lock()
	defer v.metaMu.Unlock()
	for _, l := range v.unsealed {
		if r, _ := unpack(l.head.Load()); l.spilledR < r {
			return true
		}
	}
	return false
}

// housekeep does what takes longer: checkpoints, publications, the scrubber.
func (v *Volume) housekeep(ctx context.Context, idle time.Duration) {
	if v.failed.Load() {
		return
	}
	if _, err := v.publish(ctx); err != nil && ctx.Err() == nil {
		v.storeTrouble(err)
	}
	st := v.m.Stats()
	since := v.logSince.Load()
	due := since > checkpointMax || (since > checkpointMin && since > 4*int64(st.DirtyPages)) ||
		(idle > idleSeal && v.unsealedRecords() > 0) || v.deadBytes() > v.reclaimSlack()
	if due && v.ckpt.idle() {
		if err := v.checkpoint(ctx, false); err != nil && ctx.Err() == nil {
			v.raise("checkpoint-failed", "the map can't be checkpointed: %v; tried again", err)
		} else {
			v.settle("checkpoint-failed")
		}
	}
	v.compactCheckpoints(ctx)
	v.scrub(ctx)
}

func (v *Volume) storeTrouble(err error) {
	v.raise("store-unreachable", "the store does not take data: %v; tried again until it works", err)
}

// idle reports whether no root waits for its publication.
func (c *checkpoints) idle() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.pending == nil
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
	objects := v.m.Objects()
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

// usage sums up the sealed SCOs.
func (v *Volume) usage() (clusters, live, dead uint64) {
	v.metaMu.Lock()
	defer v.metaMu.Unlock()
	for _, m := range v.scos {
		n := v.live.at(m.number).Load()
		clusters += uint64(m.clusters)
		live += uint64(max(n, 0))
		if n == 0 {
			dead += uint64(m.clusters)
		}
	}
	return clusters, live, dead
}

func (v *Volume) deadBytes() uint64 {
	_, _, dead := v.usage()
	return dead * block.ClusterSize
}

// reclaimSlack is the garbage in bytes that is not worth a checkpoint.
func (v *Volume) reclaimSlack() uint64 {
	_, live, _ := v.usage()
	return max(live*block.ClusterSize/20, uint64(v.cfg.SCOBytes))
}

// scrub rewrites the live clusters of the emptiest SCOs to the head until the
// garbage that can't be given back otherwise is within bounds.
func (v *Volume) scrub(ctx context.Context) {
	defer func() { v.tooMuchGarbage.Store(false) }()
	for ctx.Err() == nil && !v.failed.Load() {
		clusters, live, dead := v.usage()
		garbage := clusters - min(live, clusters) - dead
		slack := uint64(2 * v.cfg.SCOBytes / block.ClusterSize)
		if float64(garbage) < garbageLow*float64(live)+float64(slack) {
			return
		}
		all := clusters - min(live, clusters)
		v.tooMuchGarbage.Store(float64(all) > garbageHigh*float64(live)+float64(2*slack))
		m := v.emptiest()
		if m == nil {
			return
		}
		if err := v.rewrite(ctx, m); err != nil {
			if ctx.Err() == nil {
				v.log.Warn().Err(err).Uint64("sco", m.number).Msg("scrub")
			}
			return
		}
		if v.deadBytes() > v.reclaimSlack() {
			if err := v.checkpoint(ctx, false); err != nil {
				return
			}
			if _, err := v.publish(ctx); err != nil {
				return
			}
		}
	}
}

// emptiest picks the sealed SCO with the smallest part of live clusters, nil if
// none would give anything back.
func (v *Volume) emptiest() *scoMeta {
	v.metaMu.Lock()
	defer v.metaMu.Unlock()
	var best *scoMeta
	var bestPart float64
	for _, m := range v.scos {
		n := v.live.at(m.number).Load()
		if n <= 0 || m.dropping || !m.uploaded {
			continue
		}
		part := float64(n) / float64(max(m.clusters, 1))
		if part < 0.95 && (best == nil || part < bestPart) {
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
		now, err := v.locate(r.LBA)
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
		}
	}
	buf := make([]byte, len(batch)*block.ClusterSize)
	for i, mv := range batch {
		if err := v.readCluster(ctx, mv.from, buf[i*block.ClusterSize:(i+1)*block.ClusterSize]); err != nil {
			if now, lerr := v.locate(mv.lba); lerr == nil && now != mv.from {
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

// deleteSCO gives the space of a dead SCO back, after a last look: no record of
// it may be current, whatever the counter says.
func (v *Volume) deleteSCO(ctx context.Context, n uint64) error {
	v.checkMu.Lock()
	defer v.checkMu.Unlock()
	v.metaMu.Lock()
	m := v.scos[n]
	v.metaMu.Unlock()
	if m == nil {
		return nil
	}
	records, err := v.sealedRecords(ctx, m)
	if err != nil {
		return err
	}
	for i := range records {
		r := &records[i]
		if !r.HasData() {
			continue
		}
		now, err := v.locate(r.LBA)
		if err != nil {
			return err
		}
		if now == lba.MakeLocation(n, r.Cluster) {
			v.live.at(n).Add(1)
			v.raise("accounting", "SCO %d counted as empty but cluster %d is current in it; it is kept", n, r.LBA)
			return nil
		}
	}
	v.metaMu.Lock()
	m.dropping = true
	v.metaMu.Unlock()
	if err := v.cfg.Store.Delete(ctx, v.namespace(), scoObject(n), v.cfg.Epoch); err != nil {
		return fmt.Errorf("SCO %d: %w", n, err)
	}
	if l := v.ramSCO(n); l != nil && v.ram[n&uint64(len(v.ram)-1)].CompareAndSwap(l, nil) {
		l.releaseChunks()
	}
	v.dropLocal(m)
	v.metaMu.Lock()
	delete(v.scos, n)
	v.metaMu.Unlock()
	v.stats.reclaimed.Add(uint64(m.size))
	return nil
}

// coldest is the uploaded SCO with a local copy that was not read for longest.
func (v *Volume) coldest() *scoMeta {
	v.metaMu.Lock()
	defer v.metaMu.Unlock()
	var best *scoMeta
	for _, m := range v.scos {
		if m.local && m.uploaded && (best == nil || m.lastRead < best.lastRead) {
			best = m
		}
	}
	return best
}
