package driver

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
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
	if err := v.correctPins(ctx, root.Sequence, exists, found); err != nil {
		return err
	}
	for _, s := range v.snaps {
		if !found.stored[s.Sequence] {
			if err := v.requeue(ctx, s); err != nil {
				v.damagedSnapshot(err)
			}
		} else if found.local[s.Sequence] {
			c.removeMapFile(snapName(s.Sequence))
		}
	}
	c.owes.Store(len(c.queue) > 0 || len(c.gone) > 0)
	return nil
}

// correctPins computes pins anew where those of the root can't be trusted: around
// roots of no snapshot, which go, and from the first snapshot on that is newer.
func (v *Volume) correctPins(ctx context.Context, newest uint64, exists map[uint64]bool, found *foundSnaps) error {
	c := v.ckpt
	var doubt []uint64
	for _, set := range []map[uint64]bool{found.local, found.stored} {
		for seq := range set {
			if !exists[seq] {
				doubt = append(doubt, seq)
			}
		}
	}
	for _, s := range v.snaps {
		if s.Sequence > newest {
			doubt = append(doubt, s.Sequence)
		}
	}
	outcome := map[int]error{} // by the snapshot behind
	for _, seq := range doubt {
		i, _ := slices.BinarySearchFunc(v.snaps, seq, func(s *snapshotState, seq uint64) int { return cmp.Compare(s.Sequence, seq) })
		err, known := outcome[i]
		if !known {
			err = v.repinBefore(ctx, i)
			outcome[i] = err
		}
		if errors.As(err, new(*storeError)) {
			return err
		}
		if err != nil {
			// What is pinned too much, with a root that nobody needs, is found again
			// next time.
			v.damagedSnapshot(err)
			continue
		}
		c.overdue = true
		if !exists[seq] {
			c.gone[seq] = c.sequence + 1
		}
	}
	return nil
}

// repinBefore computes the pins between the i-th snapshot, which may be none, and
// the one before it.
func (v *Volume) repinBefore(ctx context.Context, i int) error {
	r, err := v.ckpt.reachBetween(ctx, i, i)
	if err == nil {
		v.ckpt.repin(r)
	}
	return err
}

func isDropped(ranges []seqRange, seq uint64) bool {
	return slices.ContainsFunc(ranges, func(r seqRange) bool { return r.contains(seq) })
}

func (v *Volume) damagedSnapshot(err error) {
	v.raise("damaged-snapshot", "a snapshot's root can't be read (%v): the snapshot can't be read, nor can the one before it be deleted; run scoria volume check %s and delete it", err, v.cfg.Name)
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

// FindSnapshots lists the snapshots of a volume that is not open, from what lies on
// the local disk and in the store, oldest first: for a registry that has lost its
// records. Roots that can't be read are left out and reported in the error.
func (e *Engine) FindSnapshots(ctx context.Context, cfg VolumeConfig) ([]Snapshot, error) {
	v := &Volume{eng: e, cfg: cfg, dir: e.volumeDir(cfg.ID), log: e.cfg.Log}
	names, err := cfg.Store.List(ctx, v.namespace(), snapPrefix)
	if err != nil {
		return nil, fmt.Errorf("volume %s: snapshots: %w", cfg.Name, err)
	}
	local, err := e.cfg.FS.List(v.mapDir())
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("volume %s: snapshots: %w", cfg.Name, err)
	}
	found := foundSnaps{local: map[uint64]bool{}, stored: map[uint64]bool{}}
	var out []Snapshot
	var errs []error
	for _, n := range append(names, local...) {
		seq, ok := found.see(n, false)
		if !ok || found.stored[seq] {
			continue
		}
		found.stored[seq] = true // once
		root, err := v.readRoot(ctx, n)
		if err == nil {
			var blob *rootBlob
			if blob, err = decodeBlob(root.Blob); err == nil && blob.snapshot != nil {
				out = append(out, *blob.snapshot)
				continue
			}
		}
		errs = append(errs, fmt.Errorf("volume %s: %s: %w", cfg.Name, n, err))
	}
	slices.SortFunc(out, func(a, b Snapshot) int { return cmp.Compare(a.Sequence, b.Sequence) })
	return out, errors.Join(errs...)
}
