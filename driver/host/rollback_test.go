package host

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync/atomic"
	"testing"

	"scoria/driver/block"
	"scoria/driver/control"
	"scoria/driver/registry"
)

// mustLoad reads the record of a volume.
func (b *bench) mustLoad(t *testing.T, name string) registry.Volume {
	t.Helper()
	e, err := b.load(testContext(t), name)
	if err != nil {
		t.Fatal(err)
	}
	return e.Record
}

// TestAFailedRollbackIsNotDoneLater: what guests write after a rollback was refused
// is there after the next start.
func TestAFailedRollbackIsNotDoneLater(t *testing.T) {
	b := newBench(t)
	ctx := testContext(t)
	b.mustCreate(t, "v")
	b.mustSnap(t, "v", "one")
	b.put("default/v", 2)
	b.mustSnap(t, "v", "two")
	full := errors.New("no space on the disk")
	b.engine.fail["rollback"] = full
	if _, err := b.api.Rollback(ctx, "v", "one", true); !errors.Is(err, full) {
		t.Fatalf("rollback: %v", err)
	}
	delete(b.engine.fail, "rollback")
	if _, err := b.Open(ctx, "v"); err != nil {
		t.Fatal(err)
	}
	b.put("default/v", 3)
	next := attach(t, b.reg, b.engine, "node-1")
	b.engine.reopen()
	if _, err := next.Open(ctx, "v"); err != nil {
		t.Fatal(err)
	}
	if got := next.names(t, "v"); !slices.Equal(got, []string{"one", "two"}) {
		t.Fatalf("snapshots %q", got)
	}
	if d := b.engine.disks[next.mustLoad(t, "v").ID]; d.content != 3 {
		t.Fatalf("contents %d, written was 3", d.content)
	}
}

// TestARollbackOfAFailedVolumeIsFinishedLater: such a volume takes no writes, and
// what is on its disk may be either state.
func TestARollbackOfAFailedVolumeIsFinishedLater(t *testing.T) {
	b := newBench(t)
	ctx := testContext(t)
	b.mustCreate(t, "v")
	b.mustSnap(t, "v", "one")
	b.put("default/v", 2)
	b.engine.fail["rollback"] = fmt.Errorf("rename: %w", block.ErrFailed)
	if _, err := b.api.Rollback(ctx, "v", "one", true); !errors.Is(err, block.ErrFailed) {
		t.Fatalf("rollback: %v", err)
	}
	_, err := b.Open(ctx, "v")
	refused(t, "a guest", err, control.CodeUnavailable, "rolled back")
	if b.front.has("default/v") {
		t.Fatal("it is served")
	}
	delete(b.engine.fail, "rollback")
	next := attach(t, b.reg, b.engine, "node-1")
	b.engine.reopen()
	if _, err := next.Open(ctx, "v"); err != nil {
		t.Fatal(err)
	}
	r := next.mustLoad(t, "v")
	if d := b.engine.disks[r.ID]; d.content != 0 || r.RollingBack != nil {
		t.Fatalf("contents %d, intent %v", d.content, r.RollingBack)
	}
}

// balkyStore fails commits after so many while that is not negative.
type balkyStore struct {
	registry.Store
	left atomic.Int64
}

var errBalky = errors.New("the registry's disk is full")

func (s *balkyStore) Commit(ctx context.Context, compares []registry.Compare, writes []registry.Write) (int64, error) {
	if s.left.Load() == 0 {
		return 0, errBalky
	}
	s.left.Add(-1)
	return s.Store.Commit(ctx, compares, writes)
}

// TestAnUnrecordedRollbackComesBeforeGuests: as long as the intent is recorded the
// next start rolls back, so nobody may write; any operation finishes it.
func TestAnUnrecordedRollbackComesBeforeGuests(t *testing.T) {
	b := newBench(t)
	ctx := testContext(t)
	b.mustCreate(t, "v")
	b.mustSnap(t, "v", "one")
	b.put("default/v", 2)
	b.mustSnap(t, "v", "two")
	balky := &balkyStore{Store: b.VolumeSet.reg}
	b.goThrough(balky)
	balky.left.Store(1) // the intent
	if _, err := b.api.Rollback(ctx, "v", "one", true); !errors.Is(err, errBalky) {
		t.Fatalf("rollback: %v", err)
	}
	_, err := b.Open(ctx, "v")
	refused(t, "a guest", err, control.CodeUnavailable, "rolled back")
	if b.front.has("default/v") {
		t.Fatal("it is served")
	}
	balky.left.Store(-1)
	b.mustSnap(t, "v", "three")
	if _, err := b.Open(ctx, "v"); err != nil || !b.front.has("default/v") {
		t.Fatalf("a guest is not let in: %v", err)
	}
	if r := b.mustLoad(t, "v"); r.RollingBack != nil || !slices.Equal(b.names(t, "v"), []string{"one", "three"}) {
		t.Fatalf("intent %v, snapshots %q", r.RollingBack, b.names(t, "v"))
	}
}

func (e *fakeEngine) setLate(err error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.late = err
}

// TestADeletionThatFailedHalfWay: a snapshot that the engine has forgotten is not
// ready again, and the deletion is finished as soon as that is possible.
func TestADeletionThatFailedHalfWay(t *testing.T) {
	b := newBench(t)
	ctx := testContext(t)
	b.mustCreate(t, "v")
	b.mustSnap(t, "v", "one")
	full := errors.New("no space on the disk")
	b.engine.setLate(full)
	if err := b.api.DeleteSnapshot(ctx, "v", "one"); !errors.Is(err, full) {
		t.Fatalf("deletion: %v", err)
	}
	_, err := b.api.CloneVolume(ctx, control.CloneVolume{From: "v@one", Name: "c"})
	refused(t, "a clone of it", err, control.CodeUnavailable, "deleting")
	if v, err := b.api.Volume(ctx, "v"); err != nil || !hasCode(v.Conditions, "snapshots-unsettled") {
		t.Fatalf("conditions %+v, %v", v.Conditions, err)
	}
	b.engine.setLate(nil)
	await(t, "the end of the deletion", func() bool { return len(b.names(t, "v")) == 0 })
	await(t, "the end of the condition", func() bool {
		v, err := b.api.Volume(ctx, "v")
		return err == nil && !hasCode(v.Conditions, "snapshots-unsettled")
	})
}
