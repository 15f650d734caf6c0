package driver_test

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"testing"

	"scoria/driver"
)

// storedBytes sums up the files under a directory, which may be removed meanwhile.
func (r *rig) storedBytes(dir string) (sum int64) {
	r.t.Helper()
	names, err := r.fs.List(dir)
	if !errors.Is(err, fs.ErrNotExist) {
		r.must(err)
	}
	for _, n := range names {
		info, err := r.fs.Stat(dir + "/" + n)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		r.must(err)
		if info.IsDir() {
			sum += r.storedBytes(dir + "/" + n)
		} else {
			sum += info.Size()
		}
	}
	return sum
}

// inStore is how many bytes the volume's objects in the store have.
func (r *rig) inStore() (sum int64) {
	r.t.Helper()
	for _, name := range r.objects() {
		n, err := r.store.Size(context.Background(), r.cfg.ID.String(), name)
		if !errors.Is(err, driver.ErrNoObject) { // it may go meanwhile
			r.must(err)
		}
		sum += n
	}
	return sum
}

// onDisks waits until the files of the store take no more than its objects should, with
// their redundancy, a tenth for what small fragments need besides, and a SCO.
func (r *rig) onDisks() {
	r.t.Helper()
	if r.stores.name != objects.name {
		return
	}
	eventually(r.t, "what was deleted is gone from the storage daemons' disks", func() bool {
		var sum int64
		for i := range 3 {
			sum += r.storedBytes(fmt.Sprintf("data/store/asd%d/values", i))
		}
		return sum <= r.inStore()*3/2*11/10+r.cfg.SCOBytes
	})
}

// TestSpace: a volume that is written over and over, in small and in large
// pieces, takes little more than its live data, on the local disk and in the
// store; after everything is discarded nearly all of it comes back.
func TestSpace(t *testing.T) { overStores(t, testSpace) }

func testSpace(t *testing.T, k storeKind) {
	ctx := context.Background()
	for _, c := range []struct {
		piece, clusters uint64
		times           int
	}{{1, 8192, 4}, {16, 16384, 5}} {
		t.Run(fmt.Sprintf("%dKiB", c.piece*4), func(t *testing.T) {
			r := newRig(t, k, rand.New(rand.NewPCG(3, c.piece)), c.clusters, 8)
			r.wrap = func(s driver.Store) driver.Store { return copies{s} }
			r.create()
			rng := r.rng
			var peak, peakStored int64
			for range raced(c.times, 1) * int(c.clusters/c.piece) {
				first := rng.Uint64N(c.clusters/c.piece) * c.piece
				r.must(r.write(first, c.piece, 0))
				if rng.IntN(1000) == 0 {
					r.vol.Housekeep(ctx, 0)
					peak = max(peak, r.storedBytes("data/volumes"))
					peakStored = max(peakStored, r.inStore())
				}
			}
			r.rest()
			st := r.vol.Stats()
			if st.UploadedBytes < st.Space.Store || st.Space.Store == 0 {
				t.Errorf("%d bytes are in the store, %d have been put there", st.Space.Store, st.UploadedBytes)
			}
			r.must(r.write(0, 1, 0))
			if held := r.vol.Stats().BufferBytes; held == 0 || held > uint64(r.pool) {
				t.Errorf("right after a write %d bytes of the write buffer are in use, of %d", held, r.pool)
			}
			live := int64(r.vol.Stats().Space.Live)
			limit := live*13/10 + r.pool + 6*r.cfg.SCOBytes
			local, stored := r.storedBytes("data/volumes"), r.inStore()
			t.Logf("most while writing: local %d KiB, store %d KiB", peak>>10, peakStored>>10)
			t.Logf("live %d KiB, local %d KiB, store %d KiB, all pages %d KiB; scrubbed %d KiB",
				live>>10, local>>10, stored>>10, r.fs.Used()>>10, r.vol.Stats().ScrubbedBytes>>10)
			if most := limit + 8*r.cfg.SCOBytes; peak > most || peakStored > most {
				t.Errorf("while writing: local %d, store %d, both should be at most %d", peak, peakStored, most)
			}
			if local > limit || stored > limit {
				t.Errorf("%d bytes are live; local %d, store %d, both should be at most %d", live, local, stored, limit)
			}
			r.onDisks()
			if used := r.fs.Used(); used > 2*limit && k.name == directory.name {
				t.Errorf("files take %d bytes, should take at most %d", used, 2*limit)
			}
			r.verify("scrubbed", func(*effect) bool { return true })
			r.check()
			r.must(r.discard(0, c.clusters))
			r.rest()
			local, stored = r.storedBytes("data/volumes"), r.inStore()
			t.Logf("all discarded: local %d KiB, store %d KiB", local>>10, stored>>10)
			if most := r.pool + 4*r.cfg.SCOBytes; local > most || stored > most {
				t.Errorf("all is discarded; local %d, store %d, both should be at most %d", local, stored, most)
			}
			r.onDisks()
			r.verify("discarded", func(*effect) bool { return true })
			r.check()
			r.close()
		})
	}
}

// rest gives housekeeping the time that an idle minute has.
func (r *rig) rest() {
	r.t.Helper()
	for range 60 {
		r.vol.Housekeep(context.Background(), 0)
		r.vol.WaitSealed()
	}
}

// TestSpaceWithSnapshots: a volume that is written over several times between two
// snapshots, of which the last few are kept, takes little more than what it and they
// reach, on the local disk and in the store; and when they are deleted, than its live
// data.
func TestSpaceWithSnapshots(t *testing.T) { overStores(t, testSpaceWithSnapshots) }

func testSpaceWithSnapshots(t *testing.T, k storeKind) {
	const clusters = 4096
	ctx := context.Background()
	r := newStillRig(t, k, rand.New(rand.NewPCG(4, 1)), clusters, 8)
	r.wrap = func(s driver.Store) driver.Store { return copies{s} }
	r.create()
	var snaps []kept
	compare := func(when string) {
		t.Helper()
		r.rest()
		space := r.vol.Stats().Space
		reached := int64(space.Live + space.Snapshots)
		limit := reached*13/10 + 4*r.cfg.SCOBytes
		local, stored := r.storedBytes("data/volumes"), r.inStore()
		t.Logf("%s: live %d KiB, snapshots %d KiB, garbage %d KiB, local %d KiB, store %d KiB; moved %d KiB, compacted %d KiB", when,
			space.Live>>10, space.Snapshots>>10, space.Garbage>>10, local>>10, stored>>10,
			r.vol.Stats().ScrubbedBytes>>10, r.vol.Stats().CompactedBytes>>10)
		if local > limit || stored > limit {
			t.Errorf("%s: %d bytes are reached; local %d, store %d, both should be at most %d", when, reached, local, stored, limit)
		}
		// What is said of space is what is there, but for checkpoints.
		if said := int64(space.Live + space.Snapshots + space.Garbage + space.Overhead); stored > said+r.pool || said > stored+r.pool {
			t.Errorf("%s: %d bytes are accounted for, the store has %d", when, said, stored)
		}
	}
	for hour := range k.fewer(6, 4) {
		for range raced(3, 1) * clusters {
			r.must(r.write(r.rng.Uint64N(clusters), 1, 0))
			if r.rng.IntN(1000) == 0 {
				r.vol.Housekeep(ctx, 0)
			}
		}
		snaps = append(snaps, r.snap(fmt.Sprint("hour ", hour)))
		if len(snaps) > 3 {
			r.unsnap(snaps[0])
			snaps = snaps[1:]
		}
		compare(fmt.Sprint("hour ", hour))
	}
	if n := r.vol.Stats().CompactedBytes; n == 0 && raced(1, 0) > 0 {
		t.Error("nothing was compacted")
	}
	r.verify("compacted", func(*effect) bool { return true })
	r.seesAll(snaps...)
	r.check()
	for _, s := range snaps {
		r.unsnap(s)
	}
	compare("no snapshots")
	r.onDisks()
	r.verify("no snapshots", func(*effect) bool { return true })
	r.check()
	r.close()
}
