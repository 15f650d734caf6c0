package registry_test

import (
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/google/uuid"

	"scoria/driver/registry"
)

// family is a volume with a ready snapshot "s".
type family struct {
	registry.Store
	volume   registry.Entry[registry.Volume]
	snapshot registry.Entry[registry.Snapshot]
}

func newFamily(t *testing.T) *family {
	t.Helper()
	f := &family{Store: open(t, filepath.Join(t.TempDir(), "registry.db"))}
	v := sampleVolume()
	var err error
	if f.volume, err = registry.Create(t.Context(), f.Store, registry.VolumeKey(v.Pool, v.Name), v); err != nil {
		t.Fatal(err)
	}
	f.snapshot = f.snap(t, "s", 1)
	return f
}

func (f *family) snap(t *testing.T, name string, sequence uint64) registry.Entry[registry.Snapshot] {
	t.Helper()
	e, err := registry.BeginSnapshot(t.Context(), f, f.volume, registry.Snapshot{ID: uuid.New(), Volume: f.volume.Record.ID, Name: name})
	if err != nil {
		t.Fatal(err)
	}
	e.Record.State, e.Record.Sequence = registry.StateReady, sequence
	if e, err = registry.Replace(t.Context(), f.Store, registry.SnapshotKey(e.Record.Volume, name), e); err != nil {
		t.Fatal(err)
	}
	return e
}

func (f *family) clone(t *testing.T, name string) (registry.Entry[registry.Volume], error) {
	t.Helper()
	v := sampleVolume()
	v.ID, v.Name = uuid.New(), name
	return registry.BeginClone(t.Context(), f, f.volume, f.snapshot, v)
}

func (f *family) stateOf(t *testing.T, snapshot string) registry.State {
	t.Helper()
	e, err := registry.Load[registry.Snapshot](t.Context(), f.Store, registry.SnapshotKey(f.volume.Record.ID, snapshot))
	if err != nil {
		t.Fatal(err)
	}
	return e.Record.State
}

func TestSnapshotNamesAreUniquePerVolume(t *testing.T) {
	f := newFamily(t)
	_, err := registry.BeginSnapshot(t.Context(), f, f.volume, registry.Snapshot{ID: uuid.New(), Volume: f.volume.Record.ID, Name: "s"})
	if !errors.Is(err, registry.ErrExist) {
		t.Fatalf("a second snapshot s: %v; want ErrExist", err)
	}
	f.snap(t, "b", 3)
	f.snap(t, "a", 2)
	if _, err := registry.RenameSnapshot(t.Context(), f, f.volume.Record.ID, "a", "b"); !errors.Is(err, registry.ErrExist) {
		t.Fatalf("rename onto b: %v; want ErrExist", err)
	}
	if _, err := registry.RenameSnapshot(t.Context(), f, f.volume.Record.ID, "nosuch", "c"); !errors.Is(err, registry.ErrNotFound) {
		t.Fatalf("rename of nothing: %v; want ErrNotFound", err)
	}
	if _, err := registry.RenameSnapshot(t.Context(), f, f.volume.Record.ID, "a", "A"); err == nil {
		t.Fatal("renamed to a name that can't be")
	}
	if _, err := registry.RenameSnapshot(t.Context(), f, f.volume.Record.ID, "a", "z"); err != nil {
		t.Fatal(err)
	}
	list, err := registry.Snapshots(t.Context(), f, f.volume.Record.ID)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, e := range list {
		names = append(names, e.Record.Name)
	}
	if want := []string{"s", "z", "b"}; !slices.Equal(names, want) {
		t.Fatalf("snapshots %q; want %q, oldest first", names, want)
	}
}

func TestOfManySnapshotsOfOneNameOneIsMade(t *testing.T) {
	f := newFamily(t)
	var wg sync.WaitGroup
	made := make(chan error, 8)
	for range cap(made) {
		wg.Go(func() {
			_, err := registry.BeginSnapshot(t.Context(), f, f.volume, registry.Snapshot{ID: uuid.New(), Volume: f.volume.Record.ID, Name: "x"})
			made <- err
		})
	}
	wg.Wait()
	close(made)
	n := 0
	for err := range made {
		if err == nil {
			n++
		} else if !errors.Is(err, registry.ErrExist) && !errors.Is(err, registry.ErrConflict) {
			t.Error(err)
		}
	}
	if n != 1 {
		t.Fatalf("%d were made", n)
	}
}

func TestParentsWithClonesStay(t *testing.T) {
	f := newFamily(t)
	c, err := f.clone(t, "c")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.clone(t, "c"); !errors.Is(err, registry.ErrExist) {
		t.Fatalf("a second c: %v; want ErrExist", err)
	}
	var clones *registry.ClonesError
	_, err = registry.BeginDeleteSnapshot(t.Context(), f, &f.volume.Record, "s")
	if !errors.As(err, &clones) || !strings.Contains(err.Error(), "default/c") {
		t.Fatalf("deletion of a snapshot with a clone: %v", err)
	}
	if _, err = registry.BeginDeleteVolume(t.Context(), f, f.volume); !errors.As(err, &clones) {
		t.Fatalf("deletion of a volume with a clone: %v", err)
	}
	if got := f.stateOf(t, "s"); got != registry.StateReady {
		t.Fatalf("after refusals the snapshot is %s", got)
	}
	// A clone of the clone reads both.
	c.Record.State = registry.StateReady
	if c, err = registry.Replace(t.Context(), f.Store, registry.VolumeKey("default", "c"), c); err != nil {
		t.Fatal(err)
	}
	grand := &family{Store: f.Store, volume: c}
	grand.snapshot = grand.snap(t, "s", 1)
	g, err := grand.clone(t, "g")
	if err != nil || len(g.Record.Ancestors) != 2 || g.Record.Ancestors[0].Volume != f.volume.Record.ID {
		t.Fatalf("ancestors of a clone's clone: %+v, %v", g.Record.Ancestors, err)
	}
	if err := registry.Remove(t.Context(), f, registry.VolumeKey("default", "c"), c.Revision); err != nil {
		t.Fatal(err)
	}
	if _, err = registry.BeginDeleteSnapshot(t.Context(), f, &f.volume.Record, "s"); !errors.As(err, &clones) || !slices.Equal(clones.Clones, []string{"default/g"}) {
		t.Fatalf("deletion of a snapshot that a clone's clone reads: %v", err)
	}
	if err := registry.Remove(t.Context(), f, registry.VolumeKey("default", "g"), g.Revision); err != nil {
		t.Fatal(err)
	}
	if _, err = registry.BeginDeleteSnapshot(t.Context(), f, &f.volume.Record, "s"); err != nil {
		t.Fatal(err)
	}
	if _, err := registry.BeginDeleteVolume(t.Context(), f, f.volume); err != nil {
		t.Fatal(err)
	}
}

// TestNoCloneOfWhatIsBeingDeleted: whichever of the two begins first wins, and
// what the other read before is of no use to it.
func TestNoCloneOfWhatIsBeingDeleted(t *testing.T) {
	f := newFamily(t)
	if _, err := registry.BeginDeleteSnapshot(t.Context(), f, &f.volume.Record, "s"); err != nil {
		t.Fatal(err)
	}
	if _, err := f.clone(t, "c"); !errors.Is(err, registry.ErrConflict) {
		t.Fatalf("clone of a snapshot that went meanwhile: %v; want ErrConflict", err)
	}
	// It may have failed half way, and is then done again.
	if e, err := registry.BeginDeleteSnapshot(t.Context(), f, &f.volume.Record, "s"); err != nil || e.Record.State != registry.StateDeleting {
		t.Fatalf("second deletion: %v", err)
	}
	f = newFamily(t)
	if _, err := registry.BeginDeleteVolume(t.Context(), f, f.volume); err != nil {
		t.Fatal(err)
	}
	if _, err := f.clone(t, "c"); !errors.Is(err, registry.ErrConflict) {
		t.Fatalf("clone of a volume that went meanwhile: %v; want ErrConflict", err)
	}
	if _, err := registry.BeginSnapshot(t.Context(), f, f.volume, registry.Snapshot{ID: uuid.New(), Volume: f.volume.Record.ID, Name: "x"}); !errors.Is(err, registry.ErrConflict) {
		t.Fatalf("snapshot of a volume that went meanwhile: %v; want ErrConflict", err)
	}
}

// TestReviveParents: a deleter that died between its two looks for clones left a
// parent deleting.
func TestReviveParents(t *testing.T) {
	f := newFamily(t)
	if _, err := f.clone(t, "c"); err != nil {
		t.Fatal(err)
	}
	f.snap(t, "alone", 2)
	for _, name := range []string{"s", "alone"} {
		if _, err := registry.Update(t.Context(), f.Store, registry.SnapshotKey(f.volume.Record.ID, name), func(r *registry.Snapshot) error {
			r.State = registry.StateDeleting
			return nil
		}); err != nil {
			t.Fatal(err)
		}
	}
	f.volume.Record.State = registry.StateDeleting
	key := registry.VolumeKey("default", "vm1")
	if _, err := registry.Replace(t.Context(), f.Store, key, f.volume); err != nil {
		t.Fatal(err)
	}
	if err := registry.ReviveParents(t.Context(), f); err != nil {
		t.Fatal(err)
	}
	if e, err := registry.Load[registry.Volume](t.Context(), f.Store, key); err != nil || e.Record.State != registry.StateReady {
		t.Fatalf("the volume is %s, %v", e.Record.State, err)
	}
	if s, alone := f.stateOf(t, "s"), f.stateOf(t, "alone"); s != registry.StateReady || alone != registry.StateDeleting {
		t.Fatalf("the snapshot with a clone is %s, the one without is %s", s, alone)
	}
}

func TestRemoveSnapshotsOfAVolume(t *testing.T) {
	f := newFamily(t)
	other := uuid.New()
	var writes []registry.Write
	for i := range 600 {
		writes = append(writes, registry.Write{Key: registry.SnapshotKey(f.volume.Record.ID, fmt.Sprint("x", i)), Value: []byte(`{"version":2}`)})
	}
	writes = append(writes, registry.Write{Key: registry.SnapshotKey(other, "x"), Value: []byte(`{"version":2}`)})
	if _, err := f.Commit(t.Context(), nil, writes); err != nil {
		t.Fatal(err)
	}
	if err := registry.RemoveSnapshots(t.Context(), f, f.volume.Record.ID); err != nil {
		t.Fatal(err)
	}
	kvs, err := f.List(t.Context(), registry.SnapshotPrefix)
	if err != nil || len(kvs) != 1 || kvs[0].Key != registry.SnapshotKey(other, "x") {
		t.Fatalf("left: %d, %v", len(kvs), err)
	}
}
