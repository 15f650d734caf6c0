package driver

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strings"

	"github.com/google/uuid"

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

// sequences lists all of them, ascending.
func (f *foundSnaps) sequences() []uint64 {
	out := make([]uint64, 0, len(f.local)+len(f.stored))
	for _, set := range []map[uint64]bool{f.local, f.stored} {
		for seq := range set {
			out = append(out, seq)
		}
	}
	slices.Sort(out)
	return slices.Compact(out)
}

// restoreSnapshots makes the snapshots known that exist, finishes what a crash left
// of deleting and rolling back, and corrects what the root, which may be older or
// newer, says about pins. Caller is alone.
//
// What exists is what the roots say: a snapshot's root that is there and that the
// newest root does not call dropped. One that the caller does not name is adopted:
// its record was not written yet, or is lost.
func (v *Volume) restoreSnapshots(ctx context.Context, root *lba.Root, blob *rootBlob, found *foundSnaps) error {
	c := v.ckpt
	c.dropped = blob.dropped
	exists, err := v.knowListed(found)
	if err != nil {
		return err
	}
	adopted, err := v.adoptSnapshots(ctx, root.Sequence, found, exists)
	if err != nil {
		return err
	}
	slices.SortFunc(v.snaps, func(a, b *snapshotState) int { return cmp.Compare(a.Sequence, b.Sequence) })
	for _, s := range v.snaps {
		// A number at or below the last one of a snapshot says that the snapshot
		// refers to the object if the volume does: none is used again.
		c.object = max(c.object, s.LastObject)
	}
	if err := v.correctPins(ctx, root, blob, adopted, exists, found); err != nil {
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

// forgetUnmade drops what a crash has left of the making of a volume's first snapshot,
// before there was any other root: nobody pins what it needs, so it must not turn up
// at a later opening. The next root calls it dropped. Caller is alone.
func (v *Volume) forgetUnmade(found *foundSnaps) {
	named := func(seq uint64) bool {
		has := func(s Snapshot) bool { return s.Sequence == seq }
		return slices.ContainsFunc(v.cfg.Snapshots, has) || slices.ContainsFunc(v.cfg.Deleting, has)
	}
	for _, seq := range found.sequences() {
		if found.stored[seq] || named(seq) {
			continue
		}
		v.log.Info().Uint64("sequence", seq).Msg("a snapshot whose making a crash has ended is removed")
		v.ckpt.dropped = append(v.ckpt.dropped, seqRange{seq - 1, seq + 1})
		v.ckpt.removeMapFile(snapName(seq))
	}
}

// knowListed makes those snapshots known that the caller names and that are there.
func (v *Volume) knowListed(found *foundSnaps) (exists map[uint64]bool, err error) {
	c := v.ckpt
	exists = make(map[uint64]bool, len(v.cfg.Snapshots))
	know := func(s Snapshot, deleting bool) error {
		switch seq := s.Sequence; {
		case isDropped(c.dropped, seq):
			v.log.Info().Str("snapshot", s.Name).Msg("this snapshot was deleted, or a rollback has dropped it")
		case !found.local[seq] && !found.stored[seq]:
			if !deleting {
				c.unclear[seq] = true
				v.raise("missing-snapshot", "snapshot %s: its root is neither on the local disk nor in the store: it can't be read", s.Name)
			}
		case exists[seq]:
			return fmt.Errorf("snapshot %s: two have sequence number %d", s.Name, seq)
		default:
			exists[seq] = true
			v.snaps = append(v.snaps, &snapshotState{Snapshot: s})
		}
		return nil
	}
	for _, s := range v.cfg.Snapshots {
		if err := know(s, false); err != nil {
			return nil, err
		}
	}
	for _, s := range v.cfg.Deleting {
		if err := know(s, true); err != nil {
			return nil, err
		}
	}
	return exists, nil
}

// adoptSnapshots makes those snapshots known that nobody names, as their roots
// describe them. One whose root can't be read stays where it is.
//
// A root that is not older than a snapshot and does not keep all its pages was
// written without it: an earlier version deleted it, which did not call it dropped.
func (v *Volume) adoptSnapshots(ctx context.Context, newest uint64, found *foundSnaps, exists map[uint64]bool) (adopted []uint64, err error) {
	c := v.ckpt
	for _, seq := range found.sequences() {
		if exists[seq] || isDropped(c.dropped, seq) {
			continue
		}
		s, kept, err := v.describedBy(ctx, seq, newest)
		if err == nil && !kept {
			c.dropped = append(slices.Clone(c.dropped), seqRange{seq - 1, seq + 1})
			continue
		}
		if err == nil && v.findSnapshot(s.ID) >= 0 {
			err = fmt.Errorf("%s: a snapshot with its ID %s is named with another sequence number: %w", snapName(seq), s.ID, lba.ErrFormat)
		}
		switch {
		case errors.As(err, new(*storeError)), ctx.Err() != nil:
			return nil, errors.Join(err, ctx.Err())
		case err != nil:
			c.unclear[seq] = true
			v.raise("damaged-snapshot", "there is a snapshot that is not recorded and whose root can't be read, so that it can't be recorded anew (%v); what it holds keeps its space until the snapshots around it are deleted", err)
		default:
			exists[seq] = true
			adopted = append(adopted, seq)
			v.snaps = append(v.snaps, &snapshotState{Snapshot: s})
			v.log.Warn().Str("snapshot", s.Name).Stringer("id", s.ID).Time("created", s.Created).Msg("a snapshot that was not named is adopted")
		}
	}
	return adopted, nil
}

// describedBy is the snapshot that a root describes, if all its pages are there, and
// whether the newest root keeps those or is older.
func (v *Volume) describedBy(ctx context.Context, seq, newest uint64) (s Snapshot, kept bool, err error) {
	root, err := v.readRoot(ctx, snapName(seq))
	if err != nil {
		v.checksumTrouble(err)
		return s, false, fmt.Errorf("%s: %w", snapName(seq), err)
	}
	blob, err := decodeBlob(root.Blob)
	if err == nil && (root.Volume != v.cfg.ID || root.Sequence != seq || blob.snapshot == nil || blob.snapshot.Sequence != seq || blob.snapshot.ID == uuid.Nil) {
		err = fmt.Errorf("it is the root of another: %w", lba.ErrFormat)
	}
	if err != nil {
		return s, false, fmt.Errorf("%s: %w", snapName(seq), err)
	}
	objects := map[uint32]bool{}
	for _, addr := range root.Directory {
		objects[addr.Object()] = true
	}
	for _, o := range v.ckpt.own(sortedObjects(objects)) {
		if seq <= newest && !v.ckpt.pinned[o] {
			return *blob.snapshot, false, nil
		}
		if v.ckpt.inStore[o] {
			continue
		}
		if _, serr := v.eng.cfg.FS.Stat(v.mapPath(pagesName(o))); serr != nil && err == nil {
			err = fmt.Errorf("%s: its page object %d: %w", snapName(seq), o, serr)
		}
	}
	return *blob.snapshot, true, err
}

// correctPins computes pins anew where those of the root can't be trusted: around
// roots of no snapshot, which go, from the first snapshot on that is newer, and
// around those of which nobody knew and a snapshot that the root wanted to be.
func (v *Volume) correctPins(ctx context.Context, root *lba.Root, blob *rootBlob, adopted []uint64, exists map[uint64]bool, found *foundSnaps) error {
	c := v.ckpt
	newest := root.Sequence
	doubt := slices.Clone(adopted)
	for _, seq := range found.sequences() {
		if isDropped(c.dropped, seq) {
			doubt = append(doubt, seq)
		}
	}
	if blob.snapshot != nil && !exists[newest] && !c.unclear[newest] {
		doubt = append(doubt, newest)
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
		if !exists[seq] && (found.local[seq] || found.stored[seq]) {
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
// the local disk and in the store, oldest first: those that an opening would adopt if
// none were named. Roots that can't be read are left out and reported in the error.
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
	for _, n := range append(names, local...) {
		found.see(n, true)
	}
	dropped, err := v.findDropped(ctx, local)
	if err != nil {
		return nil, fmt.Errorf("volume %s: snapshots: %w", cfg.Name, err)
	}
	var out []Snapshot
	var errs []error
	for _, seq := range found.sequences() {
		if isDropped(dropped, seq) {
			continue
		}
		n := snapName(seq)
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
	return out, errors.Join(errs...)
}

// findDropped is what the newest readable root of a volume that is not open says of
// snapshots that are gone.
func (v *Volume) findDropped(ctx context.Context, local []string) ([]seqRange, error) {
	roots, err := v.cfg.Store.List(ctx, v.namespace(), rootPrefix)
	if err != nil {
		return nil, err
	}
	for _, n := range local {
		if strings.HasPrefix(n, rootPrefix) && !strings.HasSuffix(n, ".tmp") {
			roots = append(roots, n)
		}
	}
	slices.Sort(roots)
	for _, n := range slices.Backward(slices.Compact(roots)) {
		root, err := v.readRoot(ctx, n)
		if errors.As(err, new(*storeError)) {
			return nil, err
		}
		if err != nil {
			continue
		}
		if blob, err := decodeBlob(root.Blob); err == nil {
			return blob.dropped, nil
		}
	}
	return nil, nil
}
