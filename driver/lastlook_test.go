package driver_test

import (
	"context"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"

	"scoria/driver"
)

// lossyStore is one whose reads of objects with some prefixes fail with an error.
type lossyStore struct {
	driver.Store
	mu       sync.Mutex
	err      error
	prefixes []string
}

func (l *lossyStore) lose(err error, prefixes ...string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.err, l.prefixes = err, prefixes
}

func (l *lossyStore) ask(name string) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if slices.ContainsFunc(l.prefixes, func(p string) bool { return strings.HasPrefix(name, p) }) {
		return l.err
	}
	return nil
}

func (l *lossyStore) ReadAt(ctx context.Context, ns, name string, p []byte, off int64) error {
	if err := l.ask(name); err != nil {
		return err
	}
	return l.Store.ReadAt(ctx, ns, name, p, off)
}

func (l *lossyStore) Size(ctx context.Context, ns, name string) (int64, error) {
	if err := l.ask(name); err != nil {
		return 0, err
	}
	return l.Store.Size(ctx, ns, name)
}

// lossyRig is a volume of four SCOs that does nothing by itself.
func lossyRig(t *testing.T, k storeKind) (*rig, *lossyStore) {
	r := newStillRig(t, k, rand.New(rand.NewPCG(4, 5)), 1024, 8)
	l := &lossyStore{}
	r.wrap = func(s driver.Store) driver.Store {
		l.Store = s
		return l
	}
	r.create()
	r.over(0, 1024)
	return r, l
}

// over writes clusters and has the log stored.
func (r *rig) over(first, n uint64) {
	r.t.Helper()
	for c := first; c < first+n; c += 64 {
		r.must(r.write(c, 64, 0))
	}
	r.must(r.flush())
	r.must(r.vol.Checkpoint(context.Background()))
	if !r.vol.WaitSealed() {
		r.t.Fatal("the log can't be stored")
	}
}

// publish publishes all there is, after which the store alone has what it has.
func (r *rig) publish() (err error) {
	r.t.Helper()
	for did := true; did; {
		did, err = r.vol.Publish(context.Background())
	}
	r.vol.DropLocalCopies()
	r.eng.ForgetRAM()
	r.eng.ForgetClusters()
	return err
}

// holds makes sure that exactly these SCOs take space.
func (r *rig) holds(want map[uint64]bool, why string) {
	r.t.Helper()
	if held := r.vol.Held(); !maps.Equal(held, want) {
		r.t.Fatalf("%s: there are SCOs %v instead of %v", why, slices.Sorted(maps.Keys(held)), slices.Sorted(maps.Keys(want)))
	}
}

// TestP5LostSCOsAreDropped: a SCO that the store has lost goes when nothing refers to
// it any more; and as long as the volume, a snapshot or a clone does, it does not, even
// if it counts as empty.
func TestP5LostSCOsAreDropped(t *testing.T) { overStores(t, testP5LostSCOsAreDropped) }

func testP5LostSCOsAreDropped(t *testing.T, k storeKind) {
	r, l := lossyRig(t, k)
	ctx := context.Background()
	s := r.snap("s")
	cfg := r.cfg
	cfg.ID, cfg.Name, cfg.Snapshots = randomID(r.rng), "default/clone", nil
	r.must(r.eng.CreateClone(ctx, cfg, r.vol, s.ID))
	clone, err := r.eng.OpenVolume(ctx, cfg)
	r.must(err)
	r.must(r.publish())
	before := r.vol.Held()
	r.over(512, 512) // the snapshot and the clone alone have what this replaces
	r.must(r.publish())
	var overwritten []uint64
	for n := range r.vol.Held() {
		if !before[n] {
			overwritten = append(overwritten, n)
		}
	}
	l.lose(driver.ErrLost, "sco-")
	r.over(512, 512)
	want := r.vol.Held()
	r.must(r.publish())
	for _, n := range overwritten {
		delete(want, n)
	}
	r.holds(want, "after all of some SCOs was written over")
	if len(want) < 6 || len(overwritten) < 2 || r.has("accounting") {
		t.Fatalf("%d SCOs are left, %d had to go, accounting %v", len(want), len(overwritten), r.has("accounting"))
	}

	r.vol.CountAsEmpty()
	r.must(r.publish())
	r.holds(want, "all SCOs counted as empty")
	if !r.has("accounting") {
		t.Fatal("that SCOs counted as empty does not show")
	}
	l.lose(nil)
	r.must(s.seen(clone))
	r.must(r.read(0, 1024))
}

// TestP5LostMapKeepsSCOs: what part of a map that can't be read says of a SCO which
// counts as empty is not known, so the SCO stays; if nothing refers to it, it goes when
// the map is back.
func TestP5LostMapKeepsSCOs(t *testing.T) { overStores(t, testP5LostMapKeepsSCOs) }

func testP5LostMapKeepsSCOs(t *testing.T, k storeKind) {
	for _, lost := range []string{"pages-", "snap-"} {
		t.Run(lost, func(t *testing.T) {
			r, l := lossyRig(t, k)
			r.must(r.publish())
			first := r.vol.Held()
			r.over(0, 256)
			s := r.snap("s") // what was written over is older than it and not in it
			r.over(256, 768)
			l.lose(errMoody, "sco-") // the first look is not the last
			if err := r.publish(); err == nil {
				t.Fatal("SCOs were given back without a look at them")
			}
			r.over(0, 1024) // nothing but the snapshot has its map
			_ = r.publish()
			want := r.vol.Held()

			l.lose(driver.ErrLost, "sco-", lost)
			r.vol.CountAsEmpty()
			r.must(r.publish())
			r.vol.LookAgain()
			r.must(r.publish())
			old := func(held map[uint64]bool) (n int) {
				for sco := range held {
					if sco <= s.SCO {
						n++
					}
				}
				return n
			}
			if held := r.vol.Held(); old(held) != old(want) {
				t.Fatalf("of %d SCOs that the snapshot may have %d are left", old(want), old(held))
			}
			l.lose(driver.ErrLost, "sco-")
			r.must(r.publish()) // not looked at yet
			if held := r.vol.Held(); old(held) != old(want) {
				t.Fatalf("of %d SCOs %d are left", old(want), old(held))
			}
			r.vol.LookAgain()
			r.must(r.publish())
			if n := old(r.vol.Held()); n != old(want)-1 || old(want) != len(first)+1 {
				t.Fatalf("of %d SCOs %d are left when the map is back", old(want), n)
			}
			l.lose(nil)
			view, err := r.vol.OpenSnapshot(context.Background(), s.ID)
			r.must(err)
			r.must(s.seen(view))
			r.must(view.Close())
			r.must(r.read(0, 1024))
		})
	}
}
