package driver_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"scoria/alba/vfs"
	"scoria/driver"
	"scoria/driver/host/objecttest"
)

// forgetful is an object store that has no place for what it has lost, or can't be reached, while
// it is told so.
type forgetful struct {
	*objecttest.Store
	mu    sync.Mutex
	full  bool
	away  bool
	asked map[string]int // in vain, by object
}

func (f *forgetful) setAway(away bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.away = away
}

// gone returns errAway while the store is away.
func (f *forgetful) gone(name string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if !f.away {
		return nil
	}
	f.inVain(name)
	return errAway
}

// inVain counts a call. Called with mu.
func (f *forgetful) inVain(name string) {
	if f.asked == nil {
		f.asked = map[string]int{}
	}
	f.asked[name]++
}

// eachInVain says whether n calls were made in vain for each of the objects.
func (f *forgetful) eachInVain(names []string, n int) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return !slices.ContainsFunc(names, func(name string) bool { return f.asked[name] < n })
}

func (f *forgetful) ReadAt(ctx context.Context, ns, name string, p []byte, off int64) error {
	if err := f.gone(name); err != nil {
		return err
	}
	return f.Store.ReadAt(ctx, ns, name, p, off)
}

func (f *forgetful) refuse(full bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.full = full
}

func (f *forgetful) PutLost(ctx context.Context, ns, name string, epoch uint64, obj driver.Object) error {
	f.mu.Lock()
	full := f.full
	if full {
		f.inVain(name)
	}
	f.mu.Unlock()
	if full {
		return driver.ErrLost
	}
	if err := f.gone(name); err != nil {
		return err
	}
	return f.Store.PutLost(ctx, ns, name, epoch, obj)
}

// lostRig is a volume with a snapshot, all in an object store, that does nothing by itself.
func lostRig(t *testing.T) (*rig, *forgetful) {
	r := newStillRig(t, objects, rand.New(rand.NewPCG(4, 6)), 1024, 8)
	f := &forgetful{}
	r.wrap = func(opened driver.Store) driver.Store {
		f.Store = opened.(*objecttest.Store)
		return f
	}
	r.create()
	r.over(0, 1024)
	r.snap("s")
	r.over(256, 256)
	for did := true; did; {
		var err error
		did, err = r.vol.Publish(context.Background())
		r.must(err)
	}
	return r, f
}

// lost lists the objects that the store has lost.
func (r *rig) lost() (names []string) {
	r.t.Helper()
	ctx, ns := context.Background(), r.cfg.ID.String()
	for _, name := range r.objects() {
		size, err := r.cfg.Store.Size(ctx, ns, name)
		r.must(err)
		if err = r.cfg.Store.ReadAt(ctx, ns, name, make([]byte, size), 0); errors.Is(err, driver.ErrLost) {
			names = append(names, name)
			continue
		}
		r.must(err)
	}
	return names
}

// lose has the store lose all objects with these prefixes, and returns which.
func (r *rig) lose(f *forgetful, prefixes ...string) []string {
	r.t.Helper()
	for _, p := range prefixes {
		names := r.stored(p)
		if len(names) == 0 {
			r.t.Fatalf("nothing in the store begins with %q", p)
		}
		for _, name := range names {
			r.must(f.Lose(context.Background(), r.cfg.ID.String(), name))
		}
	}
	return r.lost()
}

func (r *rig) storedAnew() {
	r.t.Helper()
	eventually(r.t, "what is lost is stored anew", func() bool { return !r.vol.PuttingLost() })
}

// TestP5LostInStore: what the store has lost, SCOs, pages of the map and its root, is stored
// anew from the local disk when the store says so, or when a check finds it; with the
// local copies gone everything can be read after that, also by the next opening.
func TestP5LostInStore(t *testing.T) {
	_ = objects
	for how, find := range map[string]func(r *rig, names []string){
		"told": func(r *rig, names []string) {
			for _, name := range names {
				r.eng.LostInStore("another", name)
				r.eng.LostInStore(r.cfg.ID.String(), name)
			}
		},
		"checked": func(r *rig, _ []string) {
			rep, err := r.vol.Check(context.Background(), nil)
			r.must(err)
			if len(rep.Problems) == 0 {
				r.t.Fatal("a check finds nothing")
			}
		},
	} {
		t.Run(how, func(t *testing.T) {
			r, f := lostRig(t)
			lost := r.lose(f, "sco-", "pages-", "root-")
			find(r, lost)
			r.storedAnew()
			if left := r.lost(); len(left) > 0 || len(lost) < 6 {
				t.Fatalf("still lost are %q of %q", left, lost)
			}
			r.vol.DropLocalCopies()
			r.eng.ForgetRAM()
			r.eng.ForgetClusters()
			r.must(r.read(0, 1024))
			r.close()
			r.reopen()
			r.must(r.read(0, 1024))
			r.close()
		})
	}
}

// localReads counts reads of the volume's local files from now on.
func (r *rig) localReads() *atomic.Int64 {
	reads := new(atomic.Int64)
	id := r.cfg.ID.String()
	r.fs.SetHook(func(op vfs.Op, name string) error {
		if op == vfs.OpRead && strings.Contains(name, id) {
			reads.Add(1)
		}
		return nil
	})
	return reads
}

// TestP5LostCopyStays: the local copy of what the store has lost is not given up for room while
// the store has no place for it, nor read over and over.
func TestP5LostCopyStays(t *testing.T) {
	_ = objects
	r, f := lostRig(t)
	f.refuse(true)
	names := r.lose(f, "sco-")
	reads := r.localReads()
	for _, name := range names {
		r.eng.LostInStore(r.cfg.ID.String(), name)
	}
	r.vol.DropLocalCopies()
	eventually(t, "a place for all is looked for", func() bool { return f.eachInVain(names, 1) })
	once := reads.Load()
	eventually(t, "a place for all is looked for again", func() bool { return f.eachInVain(names, 3) })
	if n := reads.Load(); n != once || n == 0 {
		t.Errorf("%d reads of local copies, and then %d, while there was no place for them", once, n)
	}
	f.refuse(false)
	r.storedAnew()
	if left := r.lost(); len(left) > 0 {
		t.Fatalf("still lost are %q", left)
	}
	r.vol.DropLocalCopies()
	r.eng.ForgetRAM()
	r.eng.ForgetClusters()
	r.must(r.read(0, 1024))
	r.close()
}

// TestP5LostWhileEvicted: a local copy that was picked to make room stays if its loss in the store is
// found out before it is gone.
func TestP5LostWhileEvicted(t *testing.T) {
	_ = objects
	r, f := lostRig(t)
	f.refuse(true)
	r.vol.EvictAfter(func() {
		for _, name := range r.lose(f, "sco-") {
			r.eng.LostInStore(r.cfg.ID.String(), name)
		}
	})
	f.refuse(false)
	r.storedAnew()
	r.eng.ForgetRAM()
	r.eng.ForgetClusters()
	r.must(r.read(0, 1024))
	r.close()
}

// TestP8AwayIsNotLost: while the store can't say whether it has lost something, nobody reads the
// local copies over and over.
func TestP8AwayIsNotLost(t *testing.T) {
	_ = objects
	r, f := lostRig(t)
	reads := r.localReads()
	f.setAway(true)
	names := r.stored("sco-")
	for _, name := range names {
		r.eng.LostInStore(r.cfg.ID.String(), name)
	}
	eventually(t, "the store is asked again", func() bool { return f.eachInVain(names, 3) })
	if n := reads.Load(); n > 0 {
		t.Errorf("%d reads of local files while the store was away", n)
	}
	f.setAway(false)
	r.storedAnew()
	r.close()
}

// TestP5DamagedCopyOfLost: the local copy of what the store has lost is not given up, for room
// or because a part of it can't be read, although it is damaged and can't be stored anew:
// what is sound in it is nowhere else.
func TestP5DamagedCopyOfLost(t *testing.T) {
	_ = objects
	r, f := lostRig(t)
	for _, told := range []bool{false, true} {
		lost := r.lose(f, "sco-")
		if !told {
			for _, name := range lost {
				file := fmt.Sprintf("data/volumes/%s/sco/%s.sco", r.cfg.ID, strings.TrimPrefix(name, "sco-"))
				r.must(r.fs.Corrupt(file, 5*cluster+77))
			}
		}
		if told {
			for _, name := range lost {
				r.eng.LostInStore(r.cfg.ID.String(), name)
			}
			r.storedAnew()
			r.vol.DropLocalCopies()
		}
		r.eng.ForgetRAM()
		for range 2 {
			r.eng.ForgetClusters()
			if failed := r.readDamaged(spot{what: "lost"}); failed == 0 || failed > 2*len(lost) {
				t.Fatalf("told %v: %d clusters can't be read, %d SCOs have a damaged one", told, failed, len(lost))
			}
		}
	}
	r.close()
}
