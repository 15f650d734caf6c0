package host

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/google/uuid"

	"scoria/driver/block"
	"scoria/driver/control"
	"scoria/driver/registry"
)

func (b *bench) mustSnap(t *testing.T, volume, name string) control.Snapshot {
	t.Helper()
	s, err := b.api.CreateSnapshot(testContext(t), volume, control.CreateSnapshot{Name: name, Metadata: map[string]string{"by": "test"}})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func (b *bench) names(t *testing.T, volume string) (names []string) {
	t.Helper()
	list, err := b.api.Snapshots(testContext(t), volume)
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range list {
		names = append(names, s.Name)
	}
	return names
}

// refused checks an error's code and what it says.
func refused(t *testing.T, what string, err error, code control.Code, text string) {
	t.Helper()
	if control.CodeOf(err) != code || err == nil || !strings.Contains(err.Error(), text) {
		t.Errorf("%s: %v (%s); want %s and %q", what, err, control.CodeOf(err), code, text)
	}
}

func TestSnapshotLife(t *testing.T) {
	b := newBench(t)
	ctx := testContext(t)
	b.mustCreate(t, "v")
	s := b.mustSnap(t, "v", "one")
	if s.Volume != "default/v" || s.State != "ready" || s.Size != 1<<30 || s.Metadata["by"] != "test" || !strings.Contains(s.NBD, "default/v@one") {
		t.Fatalf("created %+v", s)
	}
	_, err := b.api.CreateSnapshot(ctx, "v", control.CreateSnapshot{Name: "one"})
	refused(t, "the same name", err, control.CodeExists, "exists already")
	_, err = b.api.CreateSnapshot(ctx, "v", control.CreateSnapshot{Name: "a@b"})
	refused(t, "a bad name", err, control.CodeInvalid, "must be 1 to 63")
	_, err = b.api.CreateSnapshot(ctx, "nosuch", control.CreateSnapshot{Name: "one"})
	refused(t, "no volume", err, control.CodeNotFound, "no volume")
	b.mustSnap(t, "v", "two")
	if _, err := b.api.RenameSnapshot(ctx, "v", "one", "first"); err != nil {
		t.Fatal(err)
	}
	_, err = b.api.RenameSnapshot(ctx, "v", "first", "two")
	refused(t, "a name that is taken", err, control.CodeExists, "exists already")
	if got := b.names(t, "v"); !slices.Equal(got, []string{"first", "two"}) {
		t.Fatalf("snapshots %q", got)
	}
	if s, err = b.api.Snapshot(ctx, "v", "first"); err != nil || s.Alone == nil || *s.Alone != 4096 {
		t.Fatalf("show: %+v, %v", s, err)
	}
	// They stay when the daemon is another one.
	next := attach(t, b.reg, b.engine, "node-1")
	b.engine.reopen()
	if got := next.names(t, "v"); !slices.Equal(got, []string{"first", "two"}) {
		t.Fatalf("after a restart: %q", got)
	}
	if v, err := next.api.Volume(ctx, "v"); err != nil || v.Snapshots != 2 {
		t.Fatalf("volume: %+v, %v", v, err)
	}
	if err := next.api.DeleteSnapshot(ctx, "v", "first"); err != nil {
		t.Fatal(err)
	}
	refused(t, "what is gone", next.api.DeleteSnapshot(ctx, "v", "first"), control.CodeNotFound, "no snapshot default/v@first")
	err = next.api.DeleteVolume(ctx, "default/v", false, nil)
	refused(t, "a volume with a snapshot", err, control.CodeNeedsForce, "two")
	if err = next.api.DeleteVolume(ctx, "default/v", true, nil); err != nil {
		t.Fatal(err)
	}
	if kvs, err := b.reg.List(ctx, registry.SnapshotPrefix); err != nil || len(kvs) > 0 {
		t.Fatalf("records are left: %v, %v", kvs, err)
	}
}

// reopen forgets which volumes are open, as the death of a daemon does.
func (e *fakeEngine) reopen() {
	e.mu.Lock()
	defer e.mu.Unlock()
	clear(e.views)
	e.open = map[uuid.UUID]bool{}
}

func TestAReaderKeepsItsSnapshot(t *testing.T) {
	b := newBench(t)
	ctx := testContext(t)
	b.mustCreate(t, "v")
	b.mustSnap(t, "v", "old")
	b.mustSnap(t, "v", "s")
	o := snapshotOpener{b.VolumeSet}
	dev, err := o.Open(ctx, "v@s")
	if err != nil || !dev.Info().ReadOnly {
		t.Fatalf("%v, %v", dev, err)
	}
	refused(t, "a snapshot that is read", b.api.DeleteSnapshot(ctx, "v", "s"), control.CodeInUse, "being read")
	refused(t, "a volume whose snapshot is read", b.api.DeleteVolume(ctx, "default/v", true, nil), control.CodeInUse, "snapshot")
	if got := b.names(t, "v"); !slices.Equal(got, []string{"old", "s"}) {
		t.Fatalf("after the refusal: %q", got)
	}
	_, err = b.api.Rollback(ctx, "v", "old", true)
	refused(t, "a rollback over what is read", err, control.CodeInUse, "being read")
	since, err := dev.(block.Differ).Since(ctx)
	if err != nil || !slices.Equal(since, []string{"old"}) {
		t.Fatalf("since %q, %v; want those before", since, err)
	}
	block.Release(dev)
	if err := b.api.DeleteSnapshot(ctx, "v", "s"); err != nil {
		t.Fatal(err)
	}
	// A volume that was asked what changed since a snapshot keeps that.
	if dev, err = o.Open(ctx, "v"); err != nil {
		t.Fatal(err)
	}
	if err := dev.(block.Differ).Changes(ctx, "old", 0, 4096, func(block.Extent) bool { return true }); err != nil {
		t.Fatal(err)
	}
	refused(t, "a base of a backup", b.api.DeleteSnapshot(ctx, "v", "old"), control.CodeInUse, "being read")
	block.Release(dev)
	if err := b.api.DeleteSnapshot(ctx, "v", "old"); err != nil {
		t.Fatal(err)
	}
	if names, err := o.Names(ctx); err != nil || !slices.Equal(names, []string{"default/v"}) {
		t.Fatalf("exports %q, %v", names, err)
	}
	if _, err := o.Open(ctx, "v@old"); !errors.Is(err, block.ErrNotFound) {
		t.Fatalf("open of what is gone: %v", err)
	}
}

func TestRollback(t *testing.T) {
	b := newBench(t)
	ctx := testContext(t)
	b.mustCreate(t, "v")
	b.mustSnap(t, "v", "one")
	b.put("default/v", 2)
	b.mustSnap(t, "v", "two")
	b.put("default/v", 3)
	if _, err := b.api.ResizeVolume(ctx, "v", 2<<30, false); err != nil {
		t.Fatal(err)
	}
	_, err := b.api.Rollback(ctx, "v", "one", false)
	refused(t, "without force", err, control.CodeNeedsForce, "two")
	_, err = b.api.Rollback(ctx, "v", "nosuch", true)
	refused(t, "to nothing", err, control.CodeNotFound, "no snapshot")
	release, err := b.device("default/v").Claim(block.Claimant{Kind: "vhost", ID: "1"})
	if err != nil {
		t.Fatal(err)
	}
	_, err = b.api.Rollback(ctx, "v", "one", true)
	refused(t, "under a guest", err, control.CodeInUse, "vhost 1")
	release()
	clone, err := b.api.CloneVolume(ctx, control.CloneVolume{From: "v@two", Name: "c"})
	if err != nil {
		t.Fatal(err)
	}
	_, err = b.api.Rollback(ctx, "v", "one", true)
	refused(t, "over a snapshot with a clone", err, control.CodeInUse, clone.Name)
	if err := b.api.DeleteVolume(ctx, clone.Name, false, nil); err != nil {
		t.Fatal(err)
	}
	v, err := b.api.Rollback(ctx, "v", "one", true)
	if err != nil || v.Size != 1<<30 || v.Snapshots != 1 {
		t.Fatalf("rolled back: %+v, %v", v, err)
	}
	if d := b.engine.disks[v.ID]; d.content != 0 {
		t.Fatalf("contents %d", d.content)
	}
}

func TestCloneLife(t *testing.T) {
	b := newBench(t)
	ctx := testContext(t)
	b.mustCreate(t, "v")
	b.put2(t, "v", 5)
	b.mustSnap(t, "v", "s")
	c, err := b.api.CloneVolume(ctx, control.CloneVolume{From: "v@s", Name: "c", Size: 2 << 30, Serial: "C1"})
	if err != nil || c.Size != 2<<30 || c.Parent != "default/v@s" || c.Serial != "C1" || !b.front.has("default/c") {
		t.Fatalf("clone: %+v, %v", c, err)
	}
	_, err = b.api.CloneVolume(ctx, control.CloneVolume{From: "v@s", Name: "c"})
	refused(t, "a name that is taken", err, control.CodeExists, "exists")
	_, err = b.api.CloneVolume(ctx, control.CloneVolume{From: "v@s", Name: "d", Size: 4096})
	refused(t, "less than the parent", err, control.CodeInvalid, "at least the snapshot's")
	_, err = b.api.CloneVolume(ctx, control.CloneVolume{From: "v", Name: "d"})
	refused(t, "no snapshot named", err, control.CodeInvalid, "name a snapshot")
	refused(t, "deletion of its snapshot", b.api.DeleteSnapshot(ctx, "v", "s"), control.CodeInUse, "default/c")
	refused(t, "deletion of its parent", b.api.CheckDelete(ctx, "v", true), control.CodeInUse, "default/c")
	readOnly := true
	if _, err := b.Open(ctx, "c"); err != nil {
		t.Fatal(err)
	}
	_, err = b.api.SetVolume(ctx, "v", control.SetVolume{ReadOnly: &readOnly})
	refused(t, "closing the parent of an open clone", err, control.CodeInUse, "default/c")
	if v, err := b.api.Volume(ctx, "v"); err != nil || !slices.Equal(v.Clones, []string{"default/c"}) {
		t.Fatalf("the parent: %+v, %v", v, err)
	}

	// In another daemon, opening the clone opens what it reads.
	next := attach(t, b.reg, b.engine, "node-1")
	b.engine.reopen()
	if _, err := next.Open(ctx, "c"); err != nil || next.device("default/v") == nil {
		t.Fatalf("open of a clone: %v", err)
	}
	if err := next.api.FlattenVolume(ctx, "c", func(int64, int64) {}); err != nil {
		t.Fatal(err)
	}
	refused(t, "flatten of what is no clone", next.api.FlattenVolume(ctx, "c", func(int64, int64) {}), control.CodeInvalid, "no clone")
	if v, err := next.api.Volume(ctx, "c"); err != nil || v.Parent != "" {
		t.Fatalf("flattened: %+v, %v", v, err)
	}
	if err := next.api.DeleteSnapshot(ctx, "v", "s"); err != nil {
		t.Fatal(err)
	}
	if err := next.api.DeleteVolume(ctx, "default/v", false, nil); err != nil {
		t.Fatal(err)
	}
}

// put2 is put on a volume that may be closed.
func (b *bench) put2(t *testing.T, name string, content int) {
	t.Helper()
	if _, err := b.Open(testContext(t), name); err != nil {
		t.Fatal(err)
	}
	b.put("default/"+name, content)
}

func TestManyClonesAtOnce(t *testing.T) {
	b := newBench(t)
	ctx := testContext(t)
	b.mustCreate(t, "v")
	if _, err := b.api.SetTemplate(ctx, "v", true); err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	for i := range 64 {
		wg.Go(func() {
			if _, err := b.api.CloneVolume(ctx, control.CloneVolume{From: "v", Name: fmt.Sprint("c", i)}); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	list, err := b.api.Volumes(ctx, "")
	if err != nil || len(list) != 65 || len(list[64].Clones) != 64 {
		t.Fatalf("%d volumes, %v", len(list), err)
	}
}

func TestTemplatesRefuseWrites(t *testing.T) {
	b := newBench(t)
	ctx := testContext(t)
	b.mustCreate(t, "v")
	dev, err := b.Open(ctx, "v")
	if err != nil {
		t.Fatal(err)
	}
	release, err := dev.Claim(block.Claimant{Kind: "vhost", ID: "1"})
	if err != nil {
		t.Fatal(err)
	}
	_, err = b.api.SetTemplate(ctx, "v", true)
	refused(t, "under a guest", err, control.CodeInUse, "vhost 1")
	release()
	v, err := b.api.SetTemplate(ctx, "v", true)
	if err != nil || !v.Template || v.Snapshots != 1 {
		t.Fatalf("template: %+v, %v", v, err)
	}
	for _, set := range []*bench{b, attach(t, b.reg, b.engine, "node-1")} {
		if set != b {
			b.engine.reopen()
		}
		if dev, err = set.Open(ctx, "v"); err != nil || !dev.Info().ReadOnly {
			t.Fatalf("a template's device: %+v, %v", dev.Info(), err)
		}
		reqs := []*block.Request{{Op: block.OpRead}, {Op: block.OpWrite}, {Op: block.OpFlush}, {Op: block.OpDiscard}, {Op: block.OpRead}}
		dev.Submit(reqs)
		for _, r := range reqs {
			if refused := errors.Is(r.Err, block.ErrReadOnly); !r.Ended || refused != (r.Op == block.OpWrite || r.Op == block.OpDiscard) {
				t.Errorf("%s: ended %v, %v", r.Op, r.Ended, r.Err)
			}
		}
		if _, err := dev.Claim(block.Claimant{}); !errors.Is(err, block.ErrReadOnly) {
			t.Errorf("claim: %v", err)
		}
	}
	if v, err = b.api.SetTemplate(ctx, "v", false); err != nil || v.Template {
		t.Fatalf("undone: %+v, %v", v, err)
	}
	if v, err = b.api.SetTemplate(ctx, "v", true); err != nil || v.Snapshots != 2 {
		t.Fatalf("again: %+v, %v", v, err)
	}
}

func TestShrink(t *testing.T) {
	b := newBench(t)
	ctx := testContext(t)
	v := b.mustCreate(t, "v")
	_, err := b.api.ResizeVolume(ctx, "v", 1<<29, false)
	refused(t, "without force", err, control.CodeNeedsForce, "4KiB that are written there would be lost, the last at byte 1073741823")
	if v, err = b.api.ResizeVolume(ctx, "v", 1<<29, true); err != nil || v.Size != 1<<29 || b.engine.disks[v.ID].size != 1<<29 {
		t.Fatalf("with force: %+v, %v", v, err)
	}
}

// TestTemporarySnapshotsGoAtTheNextStart: whoever made them can't delete them any
// more.
func TestTemporarySnapshotsGoAtTheNextStart(t *testing.T) {
	b := newBench(t)
	ctx := testContext(t)
	b.mustCreate(t, "v")
	b.mustSnap(t, "v", "kept")
	if _, err := b.api.CreateSnapshot(ctx, "v", control.CreateSnapshot{Name: "brief", Temporary: true}); err != nil {
		t.Fatal(err)
	}
	next := attach(t, b.reg, b.engine, "node-1")
	b.engine.reopen()
	if names, err := next.unfinished(ctx); err != nil || !slices.Equal(names, []string{"default/v"}) {
		t.Fatalf("unfinished %q, %v", names, err)
	}
	if _, err := next.Open(ctx, "v"); err != nil {
		t.Fatal(err)
	}
	if got := next.names(t, "v"); !slices.Equal(got, []string{"kept"}) {
		t.Fatalf("snapshots %q", got)
	}
}

// TestCrashBetweenAnyTwoSteps: whatever an operation had done when the daemon died,
// the next one finishes or undoes it, and what the registry says of snapshots,
// clones and sizes is what the engine has.
func TestCrashBetweenAnyTwoSteps(t *testing.T) {
	for name, op := range map[string]func(context.Context, *bench) error{
		"create snapshot": func(ctx context.Context, b *bench) error {
			_, err := b.api.CreateSnapshot(ctx, "v", control.CreateSnapshot{Name: "new"})
			return err
		},
		"delete snapshot": func(ctx context.Context, b *bench) error { return b.api.DeleteSnapshot(ctx, "v", "two") },
		"rename snapshot": func(ctx context.Context, b *bench) error {
			_, err := b.api.RenameSnapshot(ctx, "v", "two", "zwei")
			return err
		},
		"rename volume": func(ctx context.Context, b *bench) error {
			_, err := b.api.RenameVolume(ctx, "c", control.RenameVolume{Name: "d"})
			return err
		},
		"roll back": func(ctx context.Context, b *bench) error {
			_, err := b.api.Rollback(ctx, "v", "one", true)
			return err
		},
		"clone": func(ctx context.Context, b *bench) error {
			_, err := b.api.CloneVolume(ctx, control.CloneVolume{From: "v@two", Name: "new"})
			return err
		},
		"flatten": func(ctx context.Context, b *bench) error {
			return b.api.FlattenVolume(ctx, "c", func(int64, int64) {})
		},
		"template": func(ctx context.Context, b *bench) error {
			_, err := b.api.SetTemplate(ctx, "v", true)
			return err
		},
		"shrink": func(ctx context.Context, b *bench) error {
			_, err := b.api.ResizeVolume(ctx, "v", 1<<29, true)
			return err
		},
		"delete clone": func(ctx context.Context, b *bench) error { return b.api.DeleteVolume(ctx, "default/c", true, nil) },
		"import": func(ctx context.Context, b *bench) error {
			_, err := b.api.CreateVolume(ctx, control.CreateVolume{Name: "new", Size: 1 << 20, Import: true})
			if err == nil {
				_, err = b.api.Complete(ctx, "new")
			}
			return err
		},
	} {
		t.Run(name, func(t *testing.T) {
			for at := 0; ; at++ {
				if done := crashAt(t, op, at); done {
					if at < 2 {
						t.Fatalf("%d steps only", at)
					}
					return
				}
			}
		})
	}
}

// crashAt runs an operation that dies at a step and checks what the next daemon
// makes of it. done says that the operation had ended before.
func crashAt(t *testing.T, op func(context.Context, *bench) error, at int) (done bool) {
	t.Helper()
	b := newBench(t)
	ctx := testContext(t)
	b.mustCreate(t, "v")
	b.mustSnap(t, "v", "one")
	b.put2(t, "v", 2)
	b.mustSnap(t, "v", "two")
	b.put("default/v", 3)
	if _, err := b.api.CloneVolume(ctx, control.CloneVolume{From: "v@one", Name: "c"}); err != nil {
		t.Fatal(err)
	}
	crash := &crasher{left: at}
	b.engine.crash = crash
	b.goThrough(crashStore{b.reg, crash})
	err := op(ctx, b)
	b.cancel() // nothing of it goes on in the background
	b.VolumeSet.wg.Wait()
	done = crash.steps <= at
	if !done && err == nil {
		// The step after the last change: nobody would know.
		t.Logf("at %d: the operation did not notice", at)
	}
	b.engine.crash = nil
	b.engine.reopen()
	next := attach(t, b.reg, b.engine, "node-1")
	next.checkOrder(t, at)
	return done
}

// checkOrder opens all volumes and compares registry and engine.
func (b *bench) checkOrder(t *testing.T, at int) {
	t.Helper()
	ctx := testContext(t)
	entries, err := registry.LoadAll[registry.Volume](ctx, b.reg, registry.VolumePrefix)
	if err != nil {
		t.Fatal(err)
	}
	known := map[uuid.UUID]bool{}
	for i := range entries {
		r := &entries[i].Record
		known[r.ID] = true
		if r.State != registry.StateReady || r.Incomplete != nil {
			t.Errorf("at %d: volume %s is left %s, %+v", at, r.FullName(), r.State, r.Incomplete)
			continue
		}
		if _, err := b.Open(ctx, r.FullName()); err != nil {
			t.Errorf("at %d: %v", at, err)
			continue
		}
		e, err := b.load(ctx, r.FullName())
		if err != nil {
			t.Fatal(err)
		}
		d := b.engine.disks[r.ID]
		if e.Record.RollingBack != nil || e.Record.Size < d.size || len(e.Record.Ancestors) != len(d.ancestors) {
			t.Errorf("at %d: record %+v, engine %+v", at, e.Record, d)
		}
		var want []string
		for _, s := range d.snaps {
			want = append(want, s.ID.String()+" ready")
		}
		var got []string
		list, err := registry.Snapshots(ctx, b.reg, r.ID)
		if err != nil {
			t.Fatal(err)
		}
		for i := range list {
			got = append(got, list[i].Record.ID.String()+" "+string(list[i].Record.State))
		}
		if !slices.Equal(got, want) {
			t.Errorf("at %d: %s has snapshots %q, the engine %q", at, r.FullName(), got, want)
		}
	}
	for id := range b.engine.made {
		if !known[id] {
			t.Errorf("at %d: the engine has a volume %x that the registry does not know", at, id)
		}
	}
}
