package host

import (
	"testing"

	"scoria/driver/block"
	"scoria/driver/control"
)

// TestClientsThatDieLeaveNothing: what was made for a client's operation goes when the
// client does, and only that.
func TestClientsThatDieLeaveNothing(t *testing.T) {
	b := newBench(t)
	ctx := testContext(t)
	gone := func(name string) func() bool {
		return func() bool {
			_, err := b.api.Volume(ctx, name)
			return control.CodeOf(err) == control.CodeNotFound
		}
	}
	importAs := func(owner, name string) (control.Volume, error) {
		return b.api.CreateVolume(ctx, control.CreateVolume{Name: name, Size: 1 << 20, Import: true, Owner: owner})
	}
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	b.mustCreate(t, "v")
	dying, other := b.BeginHold(), b.BeginHold()
	for _, name := range []string{"half", "whole"} {
		_, err := importAs(dying, name)
		must(err)
	}
	_, err := b.api.Complete(ctx, "whole")
	must(err)
	// One that the client has deleted itself, with the name given to another import.
	_, err = importAs(dying, "again")
	must(err)
	must(b.api.DeleteVolume(ctx, "again", true, func(int64, int64) {}))
	_, err = importAs(other, "again")
	must(err)
	for _, s := range []control.CreateSnapshot{{Name: "tmp", Temporary: true, Owner: dying}, {Name: "kept", Owner: dying}, {Name: "others", Temporary: true, Owner: other}} {
		_, err := b.api.CreateSnapshot(ctx, "v", s)
		must(err)
	}
	// A reader and a writer that are about to end hold nothing up for good.
	reader, err := snapshotOpener{b.VolumeSet}.Open(ctx, "v@tmp")
	must(err)
	b.front.mu.Lock()
	b.front.users = []string{"nbd pid 7"}
	b.front.mu.Unlock()
	asked := b.front.asked.Load()
	b.EndHold(dying)
	await(t, "a look at the users", func() bool { return b.front.asked.Load() > asked })
	if gone("half")() {
		t.Fatal("deleted under its writer")
	}
	b.front.mu.Lock()
	b.front.users = nil
	b.front.mu.Unlock()
	block.Release(reader)
	await(t, "end of the import", gone("half"))
	await(t, "end of the snapshot", func() bool {
		_, err := b.api.Snapshot(ctx, "v", "tmp")
		return control.CodeOf(err) == control.CodeNotFound
	})
	b.VolumeSet.wg.Wait()
	for _, name := range []string{"v", "whole", "again"} {
		if _, err := b.api.Volume(ctx, name); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	for _, name := range []string{"kept", "others"} {
		if _, err := b.api.Snapshot(ctx, "v", name); err != nil {
			t.Errorf("v@%s: %v", name, err)
		}
	}
	// What arrives after the end is refused, and nothing of it left.
	_, err = importAs(dying, "late")
	refused(t, "an import of a client that is gone", err, control.CodeCanceled, "is gone")
	if !gone("late")() {
		t.Error("late is left")
	}
	_, err = b.api.CreateSnapshot(ctx, "v", control.CreateSnapshot{Name: "late", Temporary: true, Owner: dying})
	refused(t, "a snapshot of a client that is gone", err, control.CodeCanceled, "is gone")
	if _, err := b.api.Snapshot(ctx, "v", "late"); control.CodeOf(err) != control.CodeNotFound {
		t.Errorf("v@late: %v", err)
	}
	b.EndHold(other)
	await(t, "end of the other import", gone("again"))
}
