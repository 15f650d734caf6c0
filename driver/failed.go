package driver

import (
	"slices"
	"time"

	"scoria/driver/tlog"
)

// failedPause is between two attempts to write out what a failed volume has in
// the pool.
const failedPause = 2 * time.Second

// spillFailed writes a piece of what a volume whose sync failed still has in the
// pool to its files, never to be synced: the chunks can then serve other volumes,
// which would starve if a volume that takes no more writes kept them. Nothing is
// acknowledged for it. Reads find the clusters in the files, verified; the next
// daemon finds them there or, where nobody needed the chunks, in the pool. What
// stays is the records, a 128th. more says whether there is another piece. Caller
// holds ioMu.
func (v *Volume) spillFailed() (more bool, err error) {
	v.metaMu.Lock()
	list := slices.Clone(v.unsealed)
	v.metaMu.Unlock()
	for _, l := range list {
		closed := l.closed.Load() // before head, which is final only then
		records, clusters := unpack(l.head.Load())
		if !closed {
			clusters = clusters / chunkClusters * chunkClusters
		}
		switch {
		case l.spilledC >= clusters && (!closed || l.spilledR >= records):
		case closed:
			return true, v.spill(l, records, spillPiece, v.gently())
		default:
			return true, v.spillWhole(l, clusters)
		}
	}
	return false, nil
}

// spillAgain lets what the failed sync of l may have dropped be written once more,
// as far as its chunks are still there: the oldest were taken first. Caller holds
// ioMu.
func (v *Volume) spillAgain(l *logSCO) {
	from := l.spilledC
	for slot := int(divUp(l.spilledC, chunkClusters)) - 1; slot >= 0 && v.eng.pool.markDirty(l, uint32(slot)); slot-- {
		from = uint32(slot) * chunkClusters
	}
	// With their records: which clusters to write is seen from those.
	r := uint32(0)
	for r < min(l.spilledR, l.durable.Load()) {
		rec, ok := tlog.Get(l.record(r), l.key, r)
		if !ok || rec.Cluster != tlog.NoCluster && rec.Cluster >= from {
			break
		}
		r++
	}
	l.spilledC, l.spilledR = from, r
}

// afterFailure lets go of the head, so that all of it can be written out.
func (v *Volume) afterFailure() {
	v.closeHead()
	v.kickIO()
}
