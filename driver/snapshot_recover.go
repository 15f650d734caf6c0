package driver

import (
	"cmp"
	"context"
	"fmt"
	"slices"

	"scoria/driver/lba"
)

// foundSnaps is the roots of snapshots that lie on the local disk and in the store,
// by sequence number.
type foundSnaps struct {
	local, stored map[uint64]bool
}

// see notes a name of a map object and reports whether it is of a snapshot.
func (f *foundSnaps) see(name string, stored bool) (sequence uint64, ok bool) {
	if _, err := fmt.Sscanf(name, snapPrefix+"%016x", &sequence); err != nil || name != snapName(sequence) {
		return 0, false
	}
	if stored {
		f.stored[sequence] = true
	} else {
		f.local[sequence] = true
	}
	return sequence, true
}

// restoreSnapshots makes the snapshots known that exist, finishes what a crash left
// of making, deleting and rolling back, and corrects what the root, which may be
// older or newer, says about pins. Caller is alone.
func (v *Volume) restoreSnapshots(ctx context.Context, root *lba.Root, blob *rootBlob, found *foundSnaps) error {
	c := v.ckpt
	listed := slices.Clone(v.cfg.Snapshots)
	slices.SortFunc(listed, func(a, b Snapshot) int { return cmp.Compare(a.Sequence, b.Sequence) })
	exists := make(map[uint64]bool, len(listed))
	for _, s := range listed {
		switch seq := s.Sequence; {
		case isDropped(blob.dropped, seq):
			v.log.Warn().Str("snapshot", s.Name).Msg("a rollback has dropped this snapshot")
			continue
		case !found.local[seq] && !found.stored[seq]:
			v.raise("missing-snapshot", "snapshot %s: its root is neither on the local disk nor in the store: it can't be read", s.Name)
			continue
		case exists[seq]:
			return fmt.Errorf("snapshot %s: two have sequence number %d", s.Name, seq)
		}
		exists[s.Sequence] = true
		// A number at or below the last one of a snapshot says that the snapshot
		// refers to the object if the volume does: none is used again.
		c.object = max(c.object, s.LastObject)
		v.snaps = append(v.snaps, &snapshotState{Snapshot: s})
	}
	for _, r := range blob.dropped {
		if slices.ContainsFunc(listed, func(s Snapshot) bool { return r.contains(s.Sequence) }) {
			c.dropped = append(c.dropped, r)
		}
	}
	// Where the root's pins can't be trusted: around roots of no snapshot, and
	// from the first snapshot on that is newer.
	var doubt []uint64
	for _, set := range []map[uint64]bool{found.local, found.stored} {
		for seq := range set {
			if !exists[seq] {
				c.gone[seq] = c.sequence + 1
				doubt = append(doubt, seq)
			}
		}
	}
	for _, s := range v.snaps {
		if s.Sequence > root.Sequence {
			doubt = append(doubt, s.Sequence)
		}
	}
	if err := v.repinAround(ctx, doubt); err != nil {
		return err
	}
	c.overdue = len(doubt) > 0
	for _, s := range v.snaps {
		if !found.stored[s.Sequence] {
			if err := v.requeue(ctx, s); err != nil {
				return err
			}
		} else if found.local[s.Sequence] {
			c.removeMapFile(snapName(s.Sequence))
		}
	}
	c.owes.Store(len(c.queue) > 0 || len(c.gone) > 0)
	return nil
}

func isDropped(ranges []seqRange, seq uint64) bool {
	return slices.ContainsFunc(ranges, func(r seqRange) bool { return r.contains(seq) })
}

// repinAround computes the pins between the two snapshots that lie around each of
// the sequence numbers, from the root of the later one.
func (v *Volume) repinAround(ctx context.Context, sequences []uint64) error {
	c := v.ckpt
	slices.Sort(sequences)
	done := -1
	for _, seq := range sequences {
		i, _ := slices.BinarySearchFunc(v.snaps, seq, func(s *snapshotState, seq uint64) int { return cmp.Compare(s.Sequence, seq) })
		if i == done {
			continue
		}
		done = i
		r, err := c.reachBetween(ctx, i, i)
		if err != nil {
			return err
		}
		c.repin(r)
	}
	return nil
}

// requeue lets a snapshot's root go to the store.
func (v *Volume) requeue(ctx context.Context, s *snapshotState) error {
	root, blob, err := v.readSnapshotRoot(ctx, &s.Snapshot)
	if err != nil {
		return err
	}
	p := &publication{sequence: s.Sequence, pos: position{root.LogSCO, uint32(root.LogRecord)}}
	objects := map[uint32]bool{}
	for _, addr := range root.Directory {
		objects[addr.Object()] = true
	}
	p.objects = v.ckpt.own(sortedObjects(objects))
	for i := range blob.scos {
		if e := &blob.scos[i]; e.sealed && e.live == 0 && e.pinned == 0 {
			p.dead = append(p.dead, e.number)
		}
	}
	v.ckpt.queue = append(v.ckpt.queue, p)
	return nil
}
