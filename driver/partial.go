package driver

import (
	"context"
	"runtime/debug"

	"scoria/driver/block"
	"scoria/driver/lba"
)

// writePartial writes a request that begins or ends within a cluster: the whole
// clusters of it like any write, the pieces by read, merge, and a log record
// that applies only if nobody wrote the cluster in between.
func (v *Volume) writePartial(r *block.Request) {
	debug.SetPanicOnFault(true)
	src := segments{list: r.Segments}
	var err error
	for pos, end := r.Offset, r.Offset+r.Length; pos < end && err == nil; {
		cluster := pos / block.ClusterSize
		stop := min(end, (cluster+1)*block.ClusterSize)
		piece := make([]byte, stop-pos)
		if err = src.readSafely(piece); err == nil {
			err = v.mergeCluster(r, cluster, int(pos%block.ClusterSize), piece)
		}
		pos = stop
	}
	if err == nil && r.Flags&block.FUA != 0 {
		v.flushLater(r)
		return
	}
	v.end(r, err)
}

// mergeCluster replaces part of one cluster, for request r.
func (v *Volume) mergeCluster(r *block.Request, cluster uint64, off int, piece []byte) error {
	return v.patiently(v.forRequest(r.Owner), func(ctx context.Context) error {
		return v.tryMerge(ctx, r, cluster, off, piece)
	})
}

func (v *Volume) tryMerge(ctx context.Context, r *block.Request, cluster uint64, off int, piece []byte) error {
	mu := &v.rmw[cluster%uint64(len(v.rmw))]
	mu.Lock()
	defer mu.Unlock()
	buf := make([]byte, block.ClusterSize)
	for {
		if err := v.writable(); err != nil {
			return err
		}
		loc, err := v.locateOn(ctx, v.m, cluster)
		if err != nil {
			return err
		}
		if loc == 0 {
			clear(buf)
		} else if err := v.readCluster(ctx, loc, buf); err != nil {
			if now, lerr := v.locateOn(ctx, v.m, cluster); lerr == nil && now != loc {
				continue // it moved, and its SCO is gone
			}
			return err
		}
		copy(buf[off:], piece)
		room := v.eng.pool.roomChan()
		done, err := v.replaceCluster(cluster, loc, buf)
		switch {
		case err == errNoRoom:
			if freed := v.spaceFreed(); freed != nil {
				room = freed
			}
			if err := v.waitForRoom(r, room, false); err != nil {
				return err
			}
		case err != nil || done:
			v.roomFound()
			return err
		}
	}
}

// replaceCluster logs buf for a cluster if the map still has loc for it. It is
// exclusive: a concurrent write of the whole cluster comes before or after.
func (v *Volume) replaceCluster(cluster uint64, loc lba.Location, buf []byte) (done bool, err error) {
	v.gate.Lock()
	defer v.gate.Unlock()
	if cluster >= v.info.Load().Size/block.ClusterSize {
		return false, block.ErrRange // it has shrunk meanwhile
	}
	if now, ok := v.m.Get(cluster); !ok || now != loc {
		return false, nil
	}
	if v.space.held.Load() {
		return false, errNoRoom
	}
	l, err := v.headWithRoom(1, 1, false)
	if err != nil {
		return false, err
	}
	c, rec, ok := l.reserve(1, 1)
	if !ok {
		return false, errNoRoom
	}
	src := segments{list: [][]byte{buf}}
	_, err = v.fill(l, c, rec, 1, &src, cluster)
	return err == nil, err
}

// roomExclusive returns the current SCO with room for a reservation of what gives room
// back in the end: half of the disk's reserve is for that. Caller holds the gate
// exclusively.
func (v *Volume) roomExclusive(clusters, records uint32) (*logSCO, error) {
	return v.headWithRoom(clusters, records, true)
}

func (v *Volume) headWithRoom(clusters, records uint32, upkeep bool) (*logSCO, error) {
	if !upkeep && !v.mayWrite() || v.cur.full(clusters, records) && !v.roll() {
		return nil, errNoRoom
	}
	v.extendMu.Lock()
	defer v.extendMu.Unlock()
	if !v.cur.begin(upkeep) || !v.cur.extend(clusters, records) {
		return nil, errNoRoom
	}
	return v.cur, nil
}
