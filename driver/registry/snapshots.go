package registry

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/google/uuid"
)

// # Rules of snapshots and clones
//
// A snapshot's record exists from before the engine makes it (creating) until
// after the engine has forgotten it (deleting). Only ready ones can be used. Whoever
// opens a volume makes those that were being created ready if the engine has them,
// deletes those that were being deleted, and records those that have no record: a
// registry may be older than the volume.
//
// A clone names in Ancestors every snapshot that it reads. It may be created only
// while that of its parent is ready, which the transaction compares; a snapshot or
// volume becomes deleting first, which makes such a transaction fail, and only
// then is looked for clones; if there are some, it becomes ready again. So neither
// side can slip past the other. Who finds a deleting record that has clones (the
// deleter died in between) makes it ready, before anything else is done with it.

// ClonesError refuses to delete what clones read.
type ClonesError struct {
	What   string   // what was to be deleted
	Clones []string // POOL/VOLUME
}

func (e *ClonesError) Error() string {
	const shown = 5
	list := e.Clones
	more := ""
	if len(list) > shown {
		more = fmt.Sprintf(" and %d more", len(list)-shown)
		list = list[:shown]
	}
	return fmt.Sprintf("%s can't be deleted: %s%s read from it; delete or flatten those first", e.What, strings.Join(list, ", "), more)
}

// StateError refuses an operation on a record that is not ready.
type StateError struct {
	What  string
	State State
}

func (e *StateError) Error() string { return fmt.Sprintf("%s is not ready: it is %s", e.What, e.State) }

// Snapshots lists a volume's snapshots, oldest first; those being created last.
func Snapshots(ctx context.Context, s Store, volume uuid.UUID) ([]Entry[Snapshot], error) {
	list, err := LoadAll[Snapshot](ctx, s, SnapshotsOf(volume))
	slices.SortFunc(list, func(a, b Entry[Snapshot]) int {
		if c := cmp.Compare(boolInt(a.Record.State == StateCreating), boolInt(b.Record.State == StateCreating)); c != 0 {
			return c
		}
		return cmp.Or(cmp.Compare(a.Record.Sequence, b.Record.Sequence), cmp.Compare(a.Record.Name, b.Record.Name))
	})
	return list, err
}

func boolInt(b bool) int {
	if b {
		return 1
	}
	return 0
}

// Clones lists the volumes that read a snapshot of a volume, or any of its
// snapshots if snapshot is nil; sorted.
func Clones(ctx context.Context, s Store, volume, snapshot uuid.UUID) ([]string, error) {
	all, err := LoadAll[Volume](ctx, s, VolumePrefix)
	if err != nil {
		return nil, err
	}
	return ClonesAmong(all, volume, snapshot), nil
}

// ClonesAmong is Clones on records that were read before.
func ClonesAmong(all []Entry[Volume], volume, snapshot uuid.UUID) []string {
	var names []string
	for i := range all {
		if slices.ContainsFunc(all[i].Record.Ancestors, func(a Ancestor) bool {
			return a.Volume == volume && (snapshot == uuid.Nil || a.Snapshot == snapshot)
		}) {
			names = append(names, all[i].Record.FullName())
		}
	}
	slices.Sort(names)
	return names
}

// BeginSnapshot writes the record of a snapshot in state creating. The volume has
// to be ready; ErrExist if it has a snapshot of that name.
func BeginSnapshot(ctx context.Context, s Store, volume Entry[Volume], r Snapshot) (Entry[Snapshot], error) {
	e := Entry[Snapshot]{Record: r}
	e.Record.Volume, e.Record.State = volume.Record.ID, StateCreating
	if volume.Record.State != StateReady {
		return e, &StateError{"volume " + volume.Record.FullName(), volume.Record.State}
	}
	key := SnapshotKey(r.Volume, r.Name)
	if err := CheckName("snapshot", r.Name); err != nil {
		return e, err
	}
	if _, found, err := s.Get(ctx, key); err != nil || found {
		if found {
			err = fmt.Errorf("%s: %w", key, ErrExist)
		}
		return e, err
	}
	b, err := encode(e.Record)
	if err != nil {
		return e, err
	}
	e.Revision, err = s.Commit(ctx, []Compare{
		{Key: VolumeKey(volume.Record.Pool, volume.Record.Name), Revision: volume.Revision}, {Key: key},
	}, []Write{{Key: key, Value: b}})
	e.Record.Version = RecordVersion
	return e, err
}

// BeginDeleteSnapshot makes a ready snapshot deleting. *ClonesError if clones
// read it; it then stays ready.
func BeginDeleteSnapshot(ctx context.Context, s Store, volume *Volume, name string) (Entry[Snapshot], error) {
	what := fmt.Sprintf("snapshot %s@%s", volume.FullName(), name)
	key := SnapshotKey(volume.ID, name)
	e, err := Update(ctx, s, key, func(r *Snapshot) error {
		clones, err := Clones(ctx, s, volume.ID, r.ID)
		switch {
		case err != nil:
			return err
		case len(clones) > 0:
			return &ClonesError{what, clones}
		case r.State != StateReady && r.State != StateDeleting: // the latter failed before
			return &StateError{what, r.State}
		}
		r.State = StateDeleting
		return nil
	})
	if err != nil {
		return e, err
	}
	clones, err := Clones(ctx, s, volume.ID, e.Record.ID)
	if err == nil && len(clones) == 0 {
		return e, nil
	}
	e.Record.State = StateReady
	back, backErr := Replace(ctx, s, key, e)
	if err == nil {
		err = &ClonesError{what, clones}
	}
	return back, errors.Join(err, backErr)
}

// BeginDeleteVolume makes a volume deleting. *ClonesError if clones read it; it
// then stays as it was.
func BeginDeleteVolume(ctx context.Context, s Store, e Entry[Volume]) (Entry[Volume], error) {
	what := "volume " + e.Record.FullName()
	clones, err := Clones(ctx, s, e.Record.ID, uuid.Nil)
	if err == nil && len(clones) > 0 {
		err = &ClonesError{what, clones}
	}
	if err != nil {
		return e, err
	}
	key, before := VolumeKey(e.Record.Pool, e.Record.Name), e.Record.State
	e.Record.State = StateDeleting
	if e, err = Replace(ctx, s, key, e); err != nil {
		return e, err
	}
	clones, err = Clones(ctx, s, e.Record.ID, uuid.Nil)
	if err == nil && len(clones) == 0 {
		return e, nil
	}
	e.Record.State = before
	back, backErr := Replace(ctx, s, key, e)
	if err == nil {
		err = &ClonesError{what, clones}
	}
	return back, errors.Join(err, backErr)
}

// ReviveParents makes what is deleting and has clones ready again, and takes back
// rollbacks over a snapshot that has: who began that died before it saw them.
// Called at a start, before any volume is opened.
func ReviveParents(ctx context.Context, s Store) error {
	all, err := LoadAll[Volume](ctx, s, VolumePrefix)
	if err != nil {
		return err
	}
	for _, e := range all {
		if e.Record.State == StateDeleting && len(ClonesAmong(all, e.Record.ID, uuid.Nil)) > 0 {
			e.Record.State = StateReady
			if _, err := Replace(ctx, s, VolumeKey(e.Record.Pool, e.Record.Name), e); err != nil {
				return err
			}
		}
	}
	snapshots, err := LoadAll[Snapshot](ctx, s, SnapshotPrefix)
	if err != nil {
		return err
	}
	for _, e := range snapshots {
		if e.Record.State == StateDeleting && len(ClonesAmong(all, e.Record.Volume, e.Record.ID)) > 0 {
			e.Record.State = StateReady
			if _, err := Replace(ctx, s, SnapshotKey(e.Record.Volume, e.Record.Name), e); err != nil {
				return err
			}
		}
	}
	for _, e := range all {
		if e.Record.RollingBack != nil && rollsOverClones(&e.Record, all, snapshots) {
			if _, err := Update(ctx, s, VolumeKey(e.Record.Pool, e.Record.Name), func(r *Volume) error {
				r.RollingBack = nil
				return nil
			}); err != nil {
				return err
			}
		}
	}
	return nil
}

// rollsOverClones says whether a snapshot behind the one that v goes back to has
// clones.
func rollsOverClones(v *Volume, all []Entry[Volume], snapshots []Entry[Snapshot]) bool {
	i := slices.IndexFunc(snapshots, func(s Entry[Snapshot]) bool {
		return s.Record.Volume == v.ID && s.Record.ID == *v.RollingBack
	})
	return i >= 0 && slices.ContainsFunc(snapshots, func(s Entry[Snapshot]) bool {
		return s.Record.Volume == v.ID && s.Record.Sequence > snapshots[i].Record.Sequence && len(ClonesAmong(all, v.ID, s.Record.ID)) > 0
	})
}

// BeginClone writes the record of a clone, in state creating, if the parent and
// the snapshot are ready and unchanged; else ErrConflict, and the caller reads
// them anew. ErrExist if a volume has that name.
func BeginClone(ctx context.Context, s Store, parent Entry[Volume], snapshot Entry[Snapshot], r Volume) (Entry[Volume], error) {
	from := parent.Record.FullName() + "@" + snapshot.Record.Name
	r.State = StateCreating
	r.Parent = &Parent{Volume: parent.Record.ID, Snapshot: snapshot.Record.ID, Name: from}
	r.Ancestors = append(slices.Clone(parent.Record.Ancestors), Ancestor{Volume: parent.Record.ID, Snapshot: snapshot.Record.ID})
	e := Entry[Volume]{Record: r}
	switch {
	case parent.Record.State != StateReady:
		return e, &StateError{"volume " + parent.Record.FullName(), parent.Record.State}
	case snapshot.Record.State != StateReady:
		return e, &StateError{"snapshot " + from, snapshot.Record.State}
	case parent.Record.RollingBack != nil:
		return e, &StateError{"volume " + parent.Record.FullName(), "rolling back"}
	}
	key := VolumeKey(r.Pool, r.Name)
	if _, found, err := s.Get(ctx, key); err != nil || found {
		if found {
			err = fmt.Errorf("%s: %w", key, ErrExist)
		}
		return e, err
	}
	b, err := encode(r)
	if err != nil {
		return e, err
	}
	e.Revision, err = s.Commit(ctx, []Compare{
		{Key: VolumeKey(parent.Record.Pool, parent.Record.Name), Revision: parent.Revision},
		{Key: SnapshotKey(parent.Record.ID, snapshot.Record.Name), Revision: snapshot.Revision},
		{Key: key},
	}, []Write{{Key: key, Value: b}})
	return e, err
}

// RenameSnapshot gives a ready snapshot another name; if it was adopted, that is
// confirmed. ErrNotFound, ErrExist.
func RenameSnapshot(ctx context.Context, s Store, volume uuid.UUID, from, to string) (Entry[Snapshot], error) {
	e, err := Load[Snapshot](ctx, s, SnapshotKey(volume, from))
	if err != nil {
		return e, err
	}
	if e.Record.State != StateReady {
		return e, &StateError{"snapshot " + from, e.Record.State}
	}
	if err := CheckName("snapshot", to); err != nil {
		return e, err
	}
	if _, found, err := s.Get(ctx, SnapshotKey(volume, to)); err != nil || found {
		if found {
			err = fmt.Errorf("%s: %w", SnapshotKey(volume, to), ErrExist)
		}
		return e, err
	}
	old := e.Revision
	e.Record.Name, e.Record.Adopted = to, false
	b, err := encode(e.Record)
	if err != nil {
		return e, err
	}
	e.Revision, err = s.Commit(ctx,
		[]Compare{{Key: SnapshotKey(volume, from), Revision: old}, {Key: SnapshotKey(volume, to)}},
		[]Write{{Key: SnapshotKey(volume, from)}, {Key: SnapshotKey(volume, to), Value: b}})
	return e, err
}

// RenameVolume gives a volume another name in its pool, in one transaction.
// ErrExist; ErrConflict if the record has changed since it was read.
func RenameVolume(ctx context.Context, s Store, e Entry[Volume], to string) (Entry[Volume], error) {
	from := VolumeKey(e.Record.Pool, e.Record.Name)
	key := VolumeKey(e.Record.Pool, to)
	if err := CheckName("volume", to); err != nil {
		return e, err
	}
	if _, found, err := s.Get(ctx, key); err != nil || found {
		if found {
			err = fmt.Errorf("%s: %w", key, ErrExist)
		}
		return e, err
	}
	renamed := e
	renamed.Record.Name = to
	b, err := encode(renamed.Record)
	if err != nil {
		return e, err
	}
	renamed.Revision, err = s.Commit(ctx,
		[]Compare{{Key: from, Revision: e.Revision}, {Key: key}},
		[]Write{{Key: from}, {Key: key, Value: b}})
	if err != nil {
		return e, err
	}
	return renamed, nil
}

// RemoveSnapshots removes the records of a volume that is being deleted, in
// commits that the store takes.
func RemoveSnapshots(ctx context.Context, s Store, volume uuid.UUID) error {
	kvs, err := s.List(ctx, SnapshotsOf(volume))
	if err != nil {
		return err
	}
	for part := range slices.Chunk(kvs, MaxWrites/2) {
		writes := make([]Write, len(part))
		for i := range part {
			writes[i].Key = part[i].Key
		}
		if _, err := s.Commit(ctx, nil, writes); err != nil {
			return err
		}
	}
	return nil
}

// BeginRollback records that a volume goes back to a snapshot, after which no
// clone of it can be begun, if no clone reads one of the later snapshots, which
// are to go; else *ClonesError.
func BeginRollback(ctx context.Context, s Store, e Entry[Volume], to uuid.UUID, later []Entry[Snapshot]) (Entry[Volume], error) {
	if err := checkNoClones(ctx, s, &e.Record, later); err != nil {
		return e, err
	}
	key := VolumeKey(e.Record.Pool, e.Record.Name)
	e.Record.RollingBack = &to
	e, err := Replace(ctx, s, key, e)
	if err != nil {
		e.Record.RollingBack = nil
		return e, err
	}
	if err := checkNoClones(ctx, s, &e.Record, later); err != nil {
		e.Record.RollingBack = nil
		back, backErr := Replace(ctx, s, key, e)
		return back, errors.Join(err, backErr)
	}
	return e, nil
}

func checkNoClones(ctx context.Context, s Store, v *Volume, snapshots []Entry[Snapshot]) error {
	all, err := LoadAll[Volume](ctx, s, VolumePrefix)
	if err != nil {
		return err
	}
	for i := range snapshots {
		r := &snapshots[i].Record
		if clones := ClonesAmong(all, v.ID, r.ID); len(clones) > 0 {
			return &ClonesError{fmt.Sprintf("snapshot %s@%s", v.FullName(), r.Name), clones}
		}
	}
	return nil
}
