package driver

import (
	"context"
	"sync"
	"time"

	"scoria/driver/block"
	"scoria/driver/lba"
	"scoria/driver/tlog"
)

// moving is a cluster that the scrubber carries to the head.
type moving struct {
	lba  uint64
	from lba.Location
	crc  uint32 // of its record, if that was read: it stays the same all its life
	read bool
	asOf uint64 // Volume.snapping when no snapshot reached it, or whenever
}

// whenever: what is in an ancestor moves whether there is a snapshot or not.
const whenever = ^uint64(0)

// moveBatch is how many clusters are moved while the gate is closed; movedTogether how many
// of a SCO are read at once.
const (
	moveBatch     = 16
	movedTogether = 64
)

// moveOut moves clusters of one SCO, in the order in which they lie there. Those that
// are near each other are read together, past the caches: nobody is about to read them
// again. What can't be read so is read like a guest reads it.
func (v *Volume) moveOut(ctx context.Context, m *scoMeta, batch []moving) error {
	buf := make([]byte, len(batch)*block.ClusterSize)
	for len(batch) > 0 {
		n := v.readTogether(m, batch, buf)
		for i := 0; i < n; i += moveBatch {
			part := batch[i:min(i+moveBatch, n)]
			if err := v.moveRead(ctx, part, buf[i*block.ClusterSize:]); err != nil {
				return err
			}
		}
		if n == 0 {
			n = min(moveBatch, len(batch))
			if err := v.move(ctx, batch[:n]); err != nil {
				return err
			}
		}
		batch = batch[n:]
	}
	return nil
}

// maxGap is how many clusters between two that are wanted are read along, maxTogether
// how many are read at once.
const (
	maxGap      = 16
	maxTogether = 4 * movedTogether
)

// readTogether reads the first clusters of a batch from the local copy of their SCO
// into buf and returns how many: 0 if that does not work or one of them is not what its
// record says.
func (v *Volume) readTogether(m *scoMeta, batch []moving, buf []byte) (n int) {
	v.metaMu.Lock()
	local := m.local
	v.metaMu.Unlock()
	if !local || m.compact != nil {
		return 0
	}
	first := batch[0].from.Cluster()
	last := first
	for n = 1; n < len(batch); n++ {
		c := batch[n].from.Cluster()
		if c <= last || c-last > maxGap || c-first >= maxTogether {
			break
		}
		last = c
	}
	raw := relocationBuffers.Get().(*[]byte)
	defer relocationBuffers.Put(raw)
	p := (*raw)[:int(last-first+1)*block.ClusterSize]
	f, release, err := v.openLocal(m)
	if err != nil {
		return 0
	}
	defer release()
	if _, err := f.ReadAt(p, dataOff(first)); err != nil {
		return 0
	}
	for i, mv := range batch[:n] {
		off := int(mv.from.Cluster()-first) * block.ClusterSize
		data := p[off : off+block.ClusterSize]
		if tlog.CRC(data) != mv.crc {
			return 0
		}
		copy(buf[i*block.ClusterSize:], data)
	}
	return n
}

var relocationBuffers = sync.Pool{New: func() any {
	b := make([]byte, maxTogether*block.ClusterSize)
	return &b
}}

// move copies clusters to the head where the map still says that they lie where
// the scrubber saw them.
func (v *Volume) move(ctx context.Context, batch []moving) error {
	if len(batch) == 0 {
		return nil
	}
	buf := make([]byte, len(batch)*block.ClusterSize)
	read := make([]moving, 0, len(batch))
	for _, mv := range batch {
		at := len(read) * block.ClusterSize
		if err := v.readCluster(ctx, mv.from, buf[at:at+block.ClusterSize]); err != nil {
			if now, lerr := v.locateIn(ctx, mv.lba); lerr == nil && now != mv.from {
				continue // it must not be moved even if a rollback brings it back meanwhile
			}
			return err
		}
		read = append(read, mv)
	}
	return v.moveRead(ctx, read, buf)
}

// moveRead logs clusters that have been read. It yields to writers, unless these wait
// for it. It fails with errNoRoom if the disk has no room even for what gives room back:
// only housekeeping, which the caller may be in the way of, can change that.
func (v *Volume) moveRead(ctx context.Context, batch []moving, buf []byte) error {
	for until := time.Now().Add(dirtyWait); v.tooDirty() && time.Now().Before(until); {
		if err := v.awaitPool(ctx); err != nil {
			return err
		}
	}
	for {
		err := v.moveNow(batch, buf)
		if err != errNoRoom {
			return err
		}
		if _, lacks := v.wantRoom(true); lacks {
			return err
		}
		if err := v.awaitPool(ctx); err != nil {
			return err
		}
	}
}

// dirtyWait is how long the scrubber waits for the disk at most before each batch: guests
// may write faster than the disk takes it for as long as they are let.
const dirtyWait = 50 * time.Millisecond

// tooDirty reports whether the scrubber has to wait for the disk: what it carries to the
// head must not fill the write buffer that guests need, and a checkpoint, which is what
// gives space back, has to write all of it out. Records stay until their SCO is sealed, so
// there is always some. When guests are held, they wait for the scrubber.
func (v *Volume) tooDirty() bool {
	sco, buffer := v.cfg.SCOBytes, int64(v.eng.pool.n)*chunkBytes
	switch s := &v.space; {
	case s.held.Load():
		return false
	case v.eng.pool.fill() > (spillAt+throttleAt)/2 && !s.press.Load():
		return true
	case s.giving.Load() && s.cramped.Load():
		return true // room comes back soon, until then it is for guests
	}
	return int64(v.dirtyChunks.Load())*chunkBytes > max(min(sco/2, buffer/8), sco/32+8*chunkBytes)
}

// awaitPool waits a moment for room in the pool.
func (v *Volume) awaitPool(ctx context.Context) error {
	room := v.eng.pool.roomChan()
	v.kickSpill()
	v.eng.kickAll()
	select {
	case <-room:
	case <-time.After(10 * time.Millisecond):
	case <-ctx.Done():
		return ctx.Err()
	case <-v.ctx.Done():
		return block.ErrClosed
	}
	return nil
}

// moveNow logs what move has read, between all other changes. It may be repeated.
func (v *Volume) moveNow(batch []moving, buf []byte) error {
	v.gate.Lock()
	defer v.gate.Unlock()
	for i, mv := range batch {
		if mv.asOf != whenever && (mv.asOf != v.snapping.Load() || mv.asOf%2 != 0) {
			return errSnapped
		}
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
		Type: tlog.Relocate, LBA: mv.lba, Arg: uint64(mv.from), DataCRC: mv.crc,
		Durable: l.durable.Load(), Cluster: c,
	}
	if !mv.read {
		r.DataCRC = tlog.CRC(dst)
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
