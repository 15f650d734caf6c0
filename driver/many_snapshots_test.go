package driver_test

import (
	"context"
	"math/rand/v2"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/google/uuid"

	"scoria/alba/vfs"
	"scoria/driver"
)

// readCounter counts what is read through a store.
type readCounter struct {
	driver.Store
	reads atomic.Int64
}

func (s *readCounter) ReadAt(ctx context.Context, ns, name string, p []byte, off int64) error {
	s.reads.Add(1)
	return s.Store.ReadAt(ctx, ns, name, p, off)
}

func (s *readCounter) Size(ctx context.Context, ns, name string) (int64, error) {
	s.reads.Add(1)
	return s.Store.Size(ctx, ns, name)
}

// TestTenThousandSnapshots: a volume takes ten thousand snapshots, and opening it
// reads no more than with a few. Any of them can be read and deleted, which looks
// at its neighbours only.
func TestTenThousandSnapshots(t *testing.T) { overStores(t, testTenThousandSnapshots) }

func testTenThousandSnapshots(t *testing.T, k storeKind) {
	count := k.fewer(10000, 1000)
	if testing.Short() || raced(0, 1) == 1 {
		count = 500
	}
	r := newStillRig(t, k, rand.New(rand.NewPCG(1, 1)), 512, 16)
	counting := &readCounter{}
	r.wrap = func(s driver.Store) driver.Store { counting.Store = s; return counting }
	r.create()
	ctx := context.Background()
	var snaps []driver.Snapshot
	wrote := map[int]uint64{}
	take := func(n int) {
		for range n {
			if i := len(snaps); i%20 == 0 {
				c := uint64(i/20) % 512
				r.must(r.write(c, 1, 0))
				wrote[i] = r.versions.Load()
			}
			s, err := r.vol.CreateSnapshot(ctx, uuid.UUID{byte(len(snaps)), byte(len(snaps) >> 8), 1}, strconv.Itoa(len(snaps)), nil)
			r.must(err)
			snaps = append(snaps, s)
			if len(snaps)%250 == 0 {
				r.vol.WaitSealed()
				_, err := r.vol.Publish(ctx)
				r.must(err)
			}
		}
	}
	// calls opens the volume anew and returns how much it reads.
	calls := func() int64 {
		// What was logged since the last checkpoint has to be read, too, and how much
		// that is depends on when there was one.
		r.must(r.vol.Checkpoint(ctx))
		r.vol.WaitSealed()
		for range 3 {
			_, err := r.vol.Publish(ctx)
			r.must(err)
		}
		r.close()
		r.cfg.Snapshots = snaps
		r.start()
		before := counting.reads.Load()
		var disk atomic.Int64
		r.fs.SetHook(func(op vfs.Op, name string) error {
			if strings.HasPrefix(name, "data/volumes/") { // what is asked of the store is counted
				disk.Add(1)
			}
			return nil
		})
		r.mustOpen()
		r.fs.SetHook(nil)
		return counting.reads.Load() - before + disk.Load()
	}
	take(50)
	few := calls()
	take(count - len(snaps))
	many := calls()
	t.Logf("%d calls to disk and store with 50 snapshots, %d with %d", few, many, count)
	if many > few+few/2+20 {
		t.Errorf("opening takes %d calls with %d snapshots, %d with 50", many, count, few)
	}
	if n := len(r.vol.Snapshots()); n != count {
		t.Fatalf("%d snapshots, want %d", n, count)
	}
	for range 20 {
		i := r.rng.IntN(len(snaps))
		view, err := r.vol.OpenSnapshot(ctx, snaps[i].ID)
		r.must(err)
		number, err := strconv.Atoi(snaps[i].Name)
		r.must(err)
		last := number / 20 * 20
		got := make([]byte, cluster)
		r.must(do(view, readOf(uint64(last/20)%512, got)))
		if version, ok := readStamp(got, uint64(last/20)%512); !ok || version != wrote[last] {
			t.Errorf("snapshot %d: version %d, want %d", i, version, wrote[last])
		}
		r.must(view.Close())
		before := counting.reads.Load()
		r.must(r.vol.DeleteSnapshot(ctx, snaps[i].ID))
		if n := counting.reads.Load() - before; n > 20 {
			t.Errorf("deleting one takes %d reads", n)
		}
		snaps = append(snaps[:i:i], snaps[i+1:]...)
	}
	r.close()
}
