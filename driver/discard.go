package driver

import (
	"context"
	"runtime/debug"

	"scoria/driver/block"
	"scoria/driver/lba"
	"scoria/driver/tlog"
)

// clearPiece is how many mapped clusters' worth of range one exclusive section
// clears: 1 GiB. A volume with little in it is cleared in one go.
const (
	clearPiece = 1 << 18
	clearSmall = 1 << 16
)

// clearRange makes a range read as zeroes: one log record and one map update for
// the whole clusters, read-merge-write for the parts at its ends.
func (v *Volume) clearRange(r *block.Request) {
	debug.SetPanicOnFault(true)
	v.lastWrite.Store(v.eng.now.Load())
	err := v.clearBytes(r)
	if err == nil && r.Flags&block.FUA != 0 {
		v.flushLater(r)
		return
	}
	v.end(r, err)
}

func (v *Volume) clearBytes(r *block.Request) error {
	off, end := r.Offset, r.Offset+r.Length
	first := (off + block.ClusterSize - 1) / block.ClusterSize
	last := end / block.ClusterSize
	if first > last { // within one cluster
		return v.clearPart(r, off, end)
	}
	if err := v.clearPart(r, off, first*block.ClusterSize); err != nil {
		return err
	}
	if err := v.clearPart(r, last*block.ClusterSize, end); err != nil {
		return err
	}
	return v.clearWhole(r, first, last)
}

// clearWhole forgets the clusters [first, last), in pieces if there is much to do.
func (v *Volume) clearWhole(r *block.Request, first, last uint64) error {
	for first < last {
		n := last - first
		if v.m.Mapped() > clearSmall {
			n = min(n, clearPiece)
		}
		if err := v.clearClusters(r, first, n); err != nil {
			return err
		}
		first += n
	}
	return nil
}

// clearPart zeroes part of one cluster, if it has anything in it.
func (v *Volume) clearPart(r *block.Request, off, end uint64) error {
	if off == end {
		return nil
	}
	cluster := off / block.ClusterSize
	var loc lba.Location
	err := v.patiently(v.forRequest(r.Owner), func(ctx context.Context) (err error) {
		loc, err = v.locateOn(ctx, v.m, cluster)
		return err
	})
	if err != nil || loc == 0 {
		return err
	}
	return v.mergeCluster(r, cluster, int(off%block.ClusterSize), make([]byte, end-off))
}

// clearClusters forgets whole clusters.
func (v *Volume) clearClusters(r *block.Request, first, n uint64) error {
	for {
		if err := v.writable(); err != nil {
			return err
		}
		if err := v.loadPatiently(v.forRequest(r.Owner), v.m, first, n); err != nil {
			return err
		}
		room := v.eng.pool.roomChan()
		done, err := v.clearExclusive(first, n)
		if err == errNoRoom {
			if err := v.waitForRoom(r, room, true); err != nil {
				return err
			}
			continue
		}
		if done || err != nil {
			v.roomFound()
			return err
		}
	}
}

// clearExclusive logs and applies a discard between all other changes. Nothing
// is logged if nothing was mapped.
func (v *Volume) clearExclusive(first, n uint64) (done bool, err error) {
	v.gate.Lock()
	defer v.gate.Unlock()
	l, err := v.roomExclusive(0, 1)
	if err != nil {
		return false, err
	}
	any := false
	if !v.m.Clear(first, n, func(old lba.Location) {
		any = true
		v.live.at(old.SCO()).Add(-1)
	}) {
		return false, nil
	}
	if !any {
		return true, nil
	}
	_, rec, ok := l.reserve(0, 1)
	if !ok {
		panic("driver: no record where room was made")
	}
	tlog.Put(l.record(rec), l.key, rec, &tlog.Record{
		Type: tlog.Discard, LBA: first, Arg: n, Durable: l.durable.Load(), Cluster: tlog.NoCluster,
	})
	return true, nil
}
