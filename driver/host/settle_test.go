package host

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"scoria/driver/control"
	"scoria/driver/registry"
)

func hasCode(list []control.Condition, code string) bool {
	return slices.ContainsFunc(list, func(c control.Condition) bool { return c.Code == code })
}

// copyStore keeps a copy of the registry as it was after each commit.
type copyStore struct {
	registry.Store
	t      *testing.T
	copies [][]registry.KV
}

func (s *copyStore) keep() {
	kvs, err := s.List(context.Background(), "")
	if err != nil {
		s.t.Fatal(err)
	}
	s.copies = append(s.copies, kvs)
}

func (s *copyStore) Commit(ctx context.Context, compares []registry.Compare, writes []registry.Write) (int64, error) {
	rev, err := s.Store.Commit(ctx, compares, writes)
	s.keep()
	return rev, err
}

// restore is a registry with the contents of a copy.
func restore(t *testing.T, kvs []registry.KV) *registry.Embedded {
	t.Helper()
	reg, err := registry.Open(filepath.Join(t.TempDir(), "registry.db"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { reg.Close() })
	for _, kv := range kvs {
		if _, err := reg.Commit(t.Context(), nil, []registry.Write{{Key: kv.Key, Value: kv.Value}}); err != nil {
			t.Fatal(err)
		}
	}
	return reg
}

// TestAnOlderRegistryLosesNothing: with the registry as it was after any commit of a
// volume's life, all snapshots that exist are there, under names of their own, those
// that were deleted are not, and what was done to the registry shows.
func TestAnOlderRegistryLosesNothing(t *testing.T) {
	b := newBench(t)
	ctx := testContext(t)
	b.mustCreate(t, "v")
	copies := &copyStore{Store: b.VolumeSet.reg, t: t}
	b.goThrough(copies)
	copies.keep()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	b.mustSnap(t, "v", "a")
	b.mustSnap(t, "v", "b")
	must(b.api.DeleteSnapshot(ctx, "v", "a"))
	b.mustSnap(t, "v", "a") // another one of that name
	b.mustSnap(t, "v", "c")
	_, err := b.api.RenameSnapshot(ctx, "v", "b", "first")
	must(err)
	_, err = b.api.CloneVolume(ctx, control.CloneVolume{From: "v@c", Name: "clone"})
	must(err)
	b.mustSnap(t, "v", "d")
	b.mustSnap(t, "v", "e")
	must(b.api.DeleteSnapshot(ctx, "v", "d"))
	id := b.mustLoad(t, "v").ID
	var want []string
	for _, s := range b.engine.disks[id].snaps {
		want = append(want, s.ID.String())
	}
	slices.Sort(want)
	if len(want) != 4 {
		t.Fatalf("the engine has snapshots %q", want)
	}
	for i, kvs := range copies.copies {
		t.Run(fmt.Sprint(i), func(t *testing.T) {
			b.engine.reopen()
			next := attach(t, restore(t, kvs), b.engine, "node-1")
			if _, err := next.Open(ctx, "v"); err != nil {
				t.Fatal(err)
			}
			list, err := next.api.Snapshots(ctx, "v")
			if err != nil {
				t.Fatal(err)
			}
			names := map[string]bool{}
			var got, adopted []string
			for _, s := range list {
				got = append(got, s.ID.String())
				names[s.Name] = true
				if s.State != "ready" {
					t.Errorf("%s is %s", s.Name, s.State)
				}
				if s.Adopted {
					adopted = append(adopted, s.Name)
				}
			}
			slices.Sort(got)
			if !slices.Equal(got, want) || len(names) != len(got) {
				t.Fatalf("snapshots %+v, want %q", list, want)
			}
			had := map[string]bool{}
			stale := false
			for _, kv := range kvs {
				if !strings.HasPrefix(kv.Key, registry.SnapshotsOf(id)) {
					continue
				}
				e, err := registry.Load[registry.Snapshot](ctx, restore(t, []registry.KV{kv}), kv.Key)
				if err != nil {
					t.Fatal(err)
				}
				had[e.Record.ID.String()] = true
				stale = stale || e.Record.State == registry.StateReady && !slices.Contains(want, e.Record.ID.String())
			}
			missing := 0
			for _, id := range want {
				if !had[id] {
					missing++
				}
			}
			v, err := next.api.Volume(ctx, "v")
			if err != nil || len(adopted) != missing || hasCode(v.Conditions, "snapshots-adopted") != (missing > 0) || hasCode(v.Conditions, "snapshot-gone") != stale {
				t.Fatalf("adopted %q, %d were missing, stale %v, conditions %+v, %v", adopted, missing, stale, v.Conditions, err)
			}
			for _, name := range adopted {
				if _, err := next.api.RenameSnapshot(ctx, "v", name, "kept-"+name); err != nil {
					t.Fatal(err)
				}
			}
			if v, err = next.api.Volume(ctx, "v"); err != nil || hasCode(v.Conditions, "snapshots-adopted") {
				t.Fatalf("after they were named: %+v, %v", v.Conditions, err)
			}
		})
	}
}

// TestAnOldRollbackIsNotRepeated: the intent of a rollback in an older copy of the
// registry drops no snapshot that was made since, nor does it keep the volume from
// being opened if its snapshot is gone.
func TestAnOldRollbackIsNotRepeated(t *testing.T) {
	for _, gone := range []bool{false, true} {
		b := newBench(t)
		ctx := testContext(t)
		b.mustCreate(t, "v")
		b.mustSnap(t, "v", "one")
		b.put("default/v", 2)
		copies := &copyStore{Store: b.VolumeSet.reg, t: t}
		b.goThrough(copies)
		if _, err := b.api.Rollback(ctx, "v", "one", true); err != nil {
			t.Fatal(err)
		}
		b.put("default/v", 3)
		b.mustSnap(t, "v", "two")
		if gone {
			if err := b.api.DeleteSnapshot(ctx, "v", "one"); err != nil {
				t.Fatal(err)
			}
		}
		next := attach(t, restore(t, copies.copies[0]), b.engine, "node-1")
		b.engine.reopen()
		if r := next.mustLoad(t, "v"); r.RollingBack == nil {
			t.Fatal("the copy has no intent")
		}
		if _, err := next.Open(ctx, "v"); err != nil {
			t.Fatal(err)
		}
		v, err := next.api.Volume(ctx, "v")
		if err != nil || !hasCode(v.Conditions, "rollback-not-finished") || !hasCode(v.Conditions, "snapshots-adopted") {
			t.Fatalf("conditions %+v, %v", v.Conditions, err)
		}
		if d := b.engine.disks[v.ID]; d.content != 3 || next.mustLoad(t, "v").RollingBack != nil {
			t.Fatalf("contents %d", d.content)
		}
	}
}

// TestWhatCouldNotBeRecordedIsRecordedLater: a snapshot that was made or deleted while
// the registry failed does not wait for the volume's next opening.
func TestWhatCouldNotBeRecordedIsRecordedLater(t *testing.T) {
	b := newBench(t)
	ctx := testContext(t)
	b.mustCreate(t, "v")
	balky := &balkyStore{Store: b.VolumeSet.reg}
	b.goThrough(balky)
	balky.left.Store(1) // state creating
	if _, err := b.api.CreateSnapshot(ctx, "v", control.CreateSnapshot{Name: "one"}); !errors.Is(err, errBalky) || !strings.Contains(err.Error(), "tried again") {
		t.Fatalf("creation: %v", err)
	}
	if v, err := b.api.Volume(ctx, "v"); err != nil || !hasCode(v.Conditions, "snapshots-unsettled") {
		t.Fatalf("conditions %+v, %v", v.Conditions, err)
	}
	balky.left.Store(-1)
	state := func() string {
		list, err := b.api.Snapshots(ctx, "v")
		if err != nil || len(list) != 1 {
			return fmt.Sprint(len(list), err)
		}
		return list[0].State
	}
	await(t, "the record of the creation", func() bool { return state() == "ready" })
	balky.left.Store(1) // state deleting
	if err := b.api.DeleteSnapshot(ctx, "v", "one"); !errors.Is(err, errBalky) {
		t.Fatalf("deletion: %v", err)
	}
	if s := state(); s != "deleting" {
		t.Fatalf("state %s", s)
	}
	balky.left.Store(-1)
	await(t, "the record to go", func() bool { return len(b.names(t, "v")) == 0 })
	// Whoever comes first need not wait for the next try.
	balky.left.Store(1)
	if _, err := b.api.CreateSnapshot(ctx, "v", control.CreateSnapshot{Name: "two"}); !errors.Is(err, errBalky) {
		t.Fatalf("creation: %v", err)
	}
	balky.left.Store(-1)
	_, err := b.api.CreateSnapshot(ctx, "v", control.CreateSnapshot{Name: "two"})
	refused(t, "the same name", err, control.CodeExists, "exists already")
	if s := state(); s != "ready" {
		t.Fatalf("state %s", s)
	}
}

// TestTemporarySnapshotsOfACrashGo: one that was being made for an operation goes as
// one that was made.
func TestTemporarySnapshotsOfACrashGo(t *testing.T) {
	b := newBench(t)
	ctx := testContext(t)
	b.mustCreate(t, "v")
	if _, err := b.Open(ctx, "v"); err != nil {
		t.Fatal(err)
	}
	b.VolumeSet.wg.Wait()
	crash := &crasher{left: 4} // the record, the engine
	b.engine.crash = crash
	b.goThrough(crashStore{b.reg, crash})
	if _, err := b.api.CreateSnapshot(ctx, "v", control.CreateSnapshot{Name: "brief", Temporary: true}); !errors.Is(err, errCrashed) {
		t.Fatalf("creation: %v", err)
	}
	b.cancel()
	b.VolumeSet.wg.Wait()
	b.engine.crash = nil
	b.engine.reopen()
	next := attach(t, b.reg, b.engine, "node-1")
	if got := next.names(t, "v"); len(got) > 0 || len(b.engine.disks[next.mustLoad(t, "v").ID].snaps) > 0 {
		t.Fatalf("snapshots %q", got)
	}
}

// TestDeletionOfAVolumeLooksForSnapshots: those that the registry has lost count, too.
func TestDeletionOfAVolumeLooksForSnapshots(t *testing.T) {
	b := newBench(t)
	ctx := testContext(t)
	b.mustCreate(t, "v")
	b.mustSnap(t, "v", "one")
	if err := registry.RemoveSnapshots(ctx, b.reg, b.mustLoad(t, "v").ID); err != nil {
		t.Fatal(err)
	}
	next := attach(t, b.reg, b.engine, "node-1")
	b.engine.reopen()
	refused(t, "deletion", next.api.DeleteVolume(ctx, "default/v", false, nil), control.CodeNeedsForce, "one")
	if err := next.api.DeleteVolume(ctx, "default/v", true, nil); err != nil {
		t.Fatal(err)
	}
}
