package driver_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"github.com/google/uuid"

	"scoria/alba/vfs"
	"scoria/driver"
)

// snapNames lists the names of the volume's snapshots.
func (r *rig) snapNames() (names []string) {
	for _, s := range r.vol.Snapshots() {
		names = append(names, s.Name)
	}
	return names
}

// settleStore publishes until nothing is left to be done.
func (r *rig) settleStore() {
	r.t.Helper()
	for try := 0; try < 3 || !r.vol.Settled(); try++ {
		r.must(r.vol.CheckpointAnew(context.Background()))
		r.vol.WaitSealed()
		for range 3 { // the one that waits, the one behind it, and what is dead
			_, err := r.vol.Publish(context.Background())
			r.must(err)
		}
		if try > 200 {
			r.t.Fatal("there is always something left to do")
		}
	}
}

// threeSnapshots makes snapshots 0, 1 and 2 with one write before each.
func (r *rig) threeSnapshots() (snaps []driver.Snapshot, versions []uint64) {
	r.t.Helper()
	for i := range byte(3) {
		r.must(r.write(0, 64, 0))
		versions = append(versions, r.versions.Load())
		s, err := r.vol.CreateSnapshot(context.Background(), uuid.UUID{i + 1}, fmt.Sprint(i), map[string]string{"n": fmt.Sprint(i)})
		r.must(err)
		snaps = append(snaps, s)
	}
	return snaps, versions
}

// snapReads compares what a snapshot reads as.
func (r *rig) snapReads(id uuid.UUID, version uint64) {
	r.t.Helper()
	view, err := r.vol.OpenSnapshot(context.Background(), id)
	r.must(err)
	for c := range uint64(64) {
		p := make([]byte, cluster)
		r.must(do(view, readOf(c, p)))
		if got, ok := readStamp(p, c); !ok || got != version {
			r.t.Fatalf("snapshot %s: cluster %d has version %d, want %d", id, c, got, version)
		}
	}
	r.must(view.Close())
}

// TestP10SnapshotsThatNobodyNamesAreAdopted: snapshots that the registry does not
// know are there all the same, with all that was known of them, and so is a clone of
// one; whether they are in the store yet or not.
func TestP10SnapshotsThatNobodyNamesAreAdopted(t *testing.T) {
	overStores(t, testP10SnapshotsThatNobodyNamesAreAdopted)
}

func testP10SnapshotsThatNobodyNamesAreAdopted(t *testing.T, k storeKind) {
	for _, published := range []bool{false, true} {
		t.Run(fmt.Sprintf("published=%v", published), func(t *testing.T) {
			r, m := moodyRig(t, k, rand.New(rand.NewPCG(5, 1)), 256, 8)
			m.fail.Store(!published)
			ctx := context.Background()
			snaps, versions := r.threeSnapshots()
			r.must(r.write(0, 64, 0))
			clone := r.cfg
			clone.ID, clone.Name = uuid.UUID{9}, "default/clone"
			if published {
				r.settleStore()
				r.must(r.eng.CreateClone(ctx, clone, r.vol, snaps[1].ID))
			}
			for _, named := range [][]driver.Snapshot{nil, snaps[:1], snaps[1:2], {snaps[2], snaps[0]}} {
				r.cfg.Snapshots = named
				r.kill().reopen()
				got := r.vol.Snapshots()
				for i := range got {
					if got[i].ID != snaps[i].ID || got[i].Sequence != snaps[i].Sequence || got[i].SCO != snaps[i].SCO ||
						got[i].LastObject != snaps[i].LastObject || got[i].Metadata["n"] != snaps[i].Name || !got[i].Created.Equal(snaps[i].Created) {
						t.Fatalf("adopted %+v, made was %+v", got[i], snaps[i])
					}
					r.snapReads(snaps[i].ID, versions[i])
				}
				if len(got) != 3 {
					t.Fatalf("snapshots %v", r.snapNames())
				}
				r.check()
				if published {
					clone.Store = r.cfg.Store
					vol, err := r.eng.OpenVolume(ctx, clone)
					r.must(err)
					p := make([]byte, cluster)
					r.must(do(vol, readOf(7, p)))
					if version, ok := readStamp(p, 7); !ok || version != versions[1] {
						t.Fatalf("the clone has version %d, want %d", version, versions[1])
					}
					r.must(vol.Close(ctx))
				}
			}
			m.fail.Store(false)
			r.settleStore()
			if n := len(r.stored("snap-")); n != 3 {
				t.Fatalf("%d roots of snapshots are in the store", n)
			}
			r.close()
		})
	}
}

// TestDeletedSnapshotsDoNotComeBack: as soon as a deletion has returned, a registry
// that still names the snapshot does not bring it back, although the store could not
// be told yet; nor does one that does not name it. Its space comes back.
func TestDeletedSnapshotsDoNotComeBack(t *testing.T) {
	overStores(t, testDeletedSnapshotsDoNotComeBack)
}

func testDeletedSnapshotsDoNotComeBack(t *testing.T, k storeKind) {
	for _, old := range []bool{false, true} {
		t.Run(fmt.Sprintf("named=%v", old), func(t *testing.T) {
			r, m := moodyRig(t, k, rand.New(rand.NewPCG(5, 2)), 256, 8)
			snaps, versions := r.threeSnapshots()
			r.must(r.write(0, 64, 0))
			r.settleStore()
			m.fail.Store(true)
			r.must(r.vol.DeleteSnapshot(context.Background(), snaps[1].ID))
			if old {
				r.cfg.Snapshots = snaps
			}
			for range 3 {
				r.kill().reopen()
				if got := r.snapNames(); !slices.Equal(got, []string{"0", "2"}) {
					t.Fatalf("snapshots %q", got)
				}
				if r.has("missing-snapshot") {
					t.Error("a deleted snapshot counts as missing")
				}
			}
			found, err := r.eng.FindSnapshots(context.Background(), r.cfg)
			if err != nil || len(found) != 2 {
				t.Fatalf("found %+v, %v", found, err)
			}
			m.fail.Store(false)
			r.settleStore()
			if n := len(r.stored("snap-")); n != 2 {
				t.Fatalf("%d roots of snapshots are in the store", n)
			}
			reached, _, err := r.vol.Reached(context.Background())
			r.must(err)
			for n := range r.vol.Held() {
				if reached[n] == 0 {
					t.Errorf("SCO %d is not reached and takes space", n)
				}
			}
			r.snapReads(snaps[0].ID, versions[0])
			r.snapReads(snaps[2].ID, versions[2])
			r.check()
			r.close()
		})
	}
}

// TestP5AnUnknownDamagedSnapshotIsKept: a root that nobody names and that can't be
// read is reported and stays; its number is not used for anything else.
func TestP5AnUnknownDamagedSnapshotIsKept(t *testing.T) {
	overStores(t, testP5AnUnknownDamagedSnapshotIsKept)
}

func testP5AnUnknownDamagedSnapshotIsKept(t *testing.T, k storeKind) {
	r := newRig(t, k, rand.New(rand.NewPCG(5, 3)), 256, 8)
	r.wrap = func(s driver.Store) driver.Store { return copies{s} }
	r.create()
	snaps, versions := r.threeSnapshots()
	r.settleStore()
	r.damage(fmt.Sprintf("snap-%016x", snaps[1].Sequence), 100)
	r.kill().reopen()
	if got := r.snapNames(); !slices.Equal(got, []string{"0", "2"}) || !r.has("damaged-snapshot") {
		t.Fatalf("snapshots %q, conditions %+v", got, r.vol.Stats().Conditions)
	}
	r.snapReads(snaps[2].ID, versions[2])
	r.must(r.vol.DeleteSnapshot(context.Background(), snaps[0].ID))
	r.must(r.vol.DeleteSnapshot(context.Background(), snaps[2].ID))
	r.settleStore()
	r.kill().reopen()
	if n := len(r.stored("snap-")); n != 1 || !r.has("damaged-snapshot") {
		t.Fatalf("%d roots, conditions %+v", n, r.vol.Stats().Conditions)
	}
	r.close()
}

// TestASnapshotThatFailedIsNotAdopted: when a snapshot fails after its root has got a
// name, it is gone, also when the power fails then, and the next one has a number of
// its own.
func TestASnapshotThatFailedIsNotAdopted(t *testing.T) {
	forStores(t, raced(20, 5), 1, func(t *testing.T, k storeKind, rng *rand.Rand) {
		r := newRig(t, k, rng, 256, 8).create()
		ctx := context.Background()
		r.must(r.write(0, 64, 0))
		full := errors.New("the disk is full")
		ordinary := rng.IntN(2) == 0 // which root it is that fails
		r.fs.SetHook(func(op vfs.Op, name string) error {
			at := strings.LastIndex(name, "/") + 1
			if op != vfs.OpRead && strings.HasPrefix(name[at:], "root-") == ordinary && (ordinary || strings.HasPrefix(name[at:], "snap-") && !strings.HasSuffix(name, ".tmp")) {
				return full
			}
			return nil
		})
		_, err := r.vol.CreateSnapshot(ctx, uuid.UUID{1}, "failed", nil)
		r.fs.SetHook(nil)
		if !errors.Is(err, full) {
			t.Fatalf("create: %v", err)
		}
		made := []string(nil)
		if rng.IntN(2) == 0 {
			s, err := r.vol.CreateSnapshot(ctx, uuid.UUID{2}, "made", nil)
			r.must(err)
			made = []string{s.Name}
		}
		r.crash().reopen()
		if got := r.snapNames(); !slices.Equal(got, made) {
			t.Fatalf("snapshots %q, want %q", got, made)
		}
		r.check()
		r.settleStore()
		if n := len(r.stored("snap-")); n != len(made) {
			t.Fatalf("%d roots of snapshots are in the store", n)
		}
		r.close()
	})
}

// TestMapPagesMoveAway: who has begun to read a page object of a snapshot that lies on
// the local disk goes on in the store when the local one goes.
func TestMapPagesMoveAway(t *testing.T) { overStores(t, testMapPagesMoveAway) }

func testMapPagesMoveAway(t *testing.T, k storeKind) {
	r := newStillRig(t, k, rand.New(rand.NewPCG(12, 1)), 1024, 8).create()
	ctx := context.Background()
	r.must(r.write(0, 16, 0))
	_, err := r.vol.CreateSnapshot(ctx, uuid.UUID{1}, "s", nil)
	r.must(err)
	pages, size, err := r.vol.OpenMapPages(ctx, 1)
	r.must(err)
	want, got := make([]byte, size), make([]byte, size)
	_, err = pages.ReadAt(want, 0)
	r.must(err)
	name := fmt.Sprintf("data/volumes/%s/map/pages-%08x", r.cfg.ID, 1)
	for try := 0; ; try++ {
		if _, err := r.fs.Stat(name); errors.Is(err, fs.ErrNotExist) {
			break
		}
		if try == 100 {
			t.Fatal("the local copy stays")
		}
		r.must(r.write(0, 16, 0))
		r.must(r.flush())
		r.vol.WaitSealed()
		r.must(r.vol.Checkpoint(ctx))
		_, err := r.vol.Publish(ctx)
		r.must(err)
	}
	_, err = pages.ReadAt(got, 0)
	r.must(err)
	if !bytes.Equal(got, want) {
		t.Fatal("the store has other pages")
	}
}
