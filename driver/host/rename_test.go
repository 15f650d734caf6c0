package host

import (
	"context"
	"errors"
	"slices"
	"sync"
	"testing"

	"scoria/driver/block"
	"scoria/driver/control"
	"scoria/driver/limit"
	"scoria/driver/registry"
)

// TestRename: everything follows a volume to its new name, in this run and the next.
func TestRename(t *testing.T) {
	b := newBench(t)
	ctx := testContext(t)
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	before := b.mustCreate(t, "v")
	b.mustSnap(t, "v", "s")
	b.put("default/v", 5)
	_, err := b.api.CloneVolume(ctx, control.CloneVolume{From: "v@s", Name: "c"})
	must(err)
	_, err = b.api.ChangeLimits(ctx, "v", control.ChangeLimits{Set: limit.Settings{ReadIOPS: new(uint64(7))}})
	must(err)
	b.mu.Lock()
	b.used["default/v"] = true
	b.mu.Unlock()
	v, err := b.api.RenameVolume(ctx, "v", control.RenameVolume{Name: "w"})
	if err != nil || v.Name != "default/w" || v.ID != before.ID || v.Serial != before.Serial || v.Socket == before.Socket || v.Snapshots != 1 {
		t.Fatalf("renamed: %+v, %v", v, err)
	}
	if b.front.has("default/v") || !b.front.has("default/w") {
		t.Error("the front end serves the old name, or not the new one")
	}
	if got := b.attached(); !slices.Equal(got, []string{"default/w"}) {
		t.Errorf("attached are %q", got)
	}
	_, err = b.api.Volume(ctx, "v")
	refused(t, "the old name", err, control.CodeNotFound, "no volume default/v")
	for _, set := range []*bench{b, attach(t, b.reg, b.engine, "node-1")} {
		if set != b {
			b.engine.reopen()
		}
		if _, err := set.Open(ctx, "w"); err != nil {
			t.Fatal(err)
		}
		if dev := set.device("default/w"); dev.Info().Name != "default/w" || b.engine.disks[v.ID].content != 5 {
			t.Fatalf("opened %+v", dev.Info())
		}
		if l, err := set.api.Limits(ctx, "w"); err != nil || l.Own.ReadIOPS == nil || *l.Own.ReadIOPS != 7 {
			t.Errorf("limits %+v, %v", l, err)
		}
		if got := set.names(t, "w"); !slices.Equal(got, []string{"s"}) {
			t.Errorf("snapshots %q", got)
		}
		if _, err := set.Open(ctx, "c"); err != nil {
			t.Errorf("the clone: %v", err)
		}
		if c, err := set.api.Volume(ctx, "c"); err != nil || c.Parent != "default/w@s" {
			t.Errorf("the clone reads from %q, %v", c.Parent, err)
		}
	}
	// The old name is free.
	b.mustCreate(t, "v")
}

func TestRenameRefusals(t *testing.T) {
	b := newBench(t)
	ctx := testContext(t)
	b.mustCreate(t, "v")
	b.mustCreate(t, "taken")
	b.mustSnap(t, "v", "s")
	rename := func(to string) error {
		_, err := b.api.RenameVolume(ctx, "v", control.RenameVolume{Name: to})
		return err
	}
	refused(t, "a name that is taken", rename("taken"), control.CodeExists, "default/taken exists")
	refused(t, "another pool", rename("other/v"), control.CodeInvalid, "stays in its pool")
	refused(t, "its own name", rename("default/v"), control.CodeInvalid, "already")
	refused(t, "a bad name", rename("V"), control.CodeInvalid, "capital letters")
	_, err := b.api.RenameVolume(ctx, "nosuch", control.RenameVolume{Name: "x"})
	refused(t, "no volume", err, control.CodeNotFound, "no volume")
	dev, err := b.Open(ctx, "v")
	if err != nil {
		t.Fatal(err)
	}
	release, err := dev.Claim(block.Claimant{Kind: "vhost", ID: "1"})
	if err != nil {
		t.Fatal(err)
	}
	refused(t, "a volume with a guest", rename("w"), control.CodeInUse, "vhost 1")
	release()
	snap, err := snapshotOpener{b.VolumeSet}.Open(ctx, "v@s")
	if err != nil {
		t.Fatal(err)
	}
	refused(t, "a volume whose snapshot is read", rename("w"), control.CodeInUse, "snapshot")
	block.Release(snap)
	if _, err := b.api.CloneVolume(ctx, control.CloneVolume{From: "v@s", Name: "c"}); err != nil {
		t.Fatal(err)
	}
	if _, err := b.Open(ctx, "c"); err != nil {
		t.Fatal(err)
	}
	refused(t, "a volume with an open clone", rename("w"), control.CodeInUse, "default/c")
	if _, err := b.api.CreateVolume(ctx, control.CreateVolume{Name: "half", Size: 1 << 20, Import: true}); err != nil {
		t.Fatal(err)
	}
	_, err = b.api.RenameVolume(ctx, "half", control.RenameVolume{Name: "w"})
	refused(t, "a volume that is imported", err, control.CodeUnavailable, "imported")
	if !b.front.has("default/v") {
		t.Error("a refusal took it from the front end")
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.volumes["default/w"] != nil {
		t.Error("a name that no volume has is kept")
	}
}

// TestRenameWithAFailingRegistry: what the registry did not take did not happen, and
// what it took without saying so did.
func TestRenameWithAFailingRegistry(t *testing.T) {
	b := newBench(t)
	ctx := testContext(t)
	b.mustCreate(t, "v")
	plain := b.VolumeSet.reg
	balky := &balkyStore{Store: plain}
	b.goThrough(balky)
	if _, err := b.api.RenameVolume(ctx, "v", control.RenameVolume{Name: "w"}); !errors.Is(err, errBalky) {
		t.Fatalf("renamed: %v", err)
	}
	if _, err := b.Open(ctx, "v"); err != nil || !b.front.has("default/v") || b.front.has("default/w") {
		t.Fatalf("after a failure: %v", err)
	}
	b.goThrough(silentStore{plain})
	if v, err := b.api.RenameVolume(ctx, "v", control.RenameVolume{Name: "w"}); err != nil || v.Name != "default/w" || !b.front.has("default/w") {
		t.Fatalf("renamed: %+v, %v", v, err)
	}
}

// silentStore commits and then fails.
type silentStore struct{ registry.Store }

func (s silentStore) Commit(ctx context.Context, compares []registry.Compare, writes []registry.Write) (int64, error) {
	if _, err := s.Store.Commit(ctx, compares, writes); err != nil {
		return 0, err
	}
	return 0, errBalky
}

// TestRenamesThatCross: names that are swapped from many sides at once block nobody,
// and in the end each volume has one name.
func TestRenamesThatCross(t *testing.T) {
	b := newBench(t)
	ctx := testContext(t)
	b.mustCreate(t, "a")
	names := []string{"a", "b", "c"}
	var wg sync.WaitGroup
	for i := range 12 {
		wg.Go(func() {
			from, to := names[i%3], names[(i+1+i/6)%3]
			_, err := b.api.RenameVolume(ctx, from, control.RenameVolume{Name: to})
			if code := control.CodeOf(err); err != nil && code != control.CodeNotFound && code != control.CodeExists {
				t.Errorf("%s to %s: %v", from, to, err)
			}
		})
	}
	wg.Wait()
	list, err := b.api.Volumes(ctx, "")
	if err != nil || len(list) != 1 || !b.front.has(list[0].Name) {
		t.Fatalf("volumes %+v, %v", list, err)
	}
	if _, err := b.Open(ctx, list[0].Name); err != nil {
		t.Fatal(err)
	}
}
