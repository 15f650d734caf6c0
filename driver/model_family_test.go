package driver_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/google/uuid"

	"scoria/alba/vfs"
	"scoria/driver"
)

// family is a volume with clones and clones of clones, each beside its flat model,
// on one engine. A world comes after those that it builds on.
type family struct {
	t      *testing.T
	rng    *rand.Rand
	worlds []*world
	kin    map[*world][]driver.Ancestor // what the registry knows
	born   int
	trace  []string
}

const maxWorlds = 5

func newFamily(t *testing.T, k storeKind, rng *rand.Rand) *family {
	f := &family{t: t, rng: rng, kin: map[*world][]driver.Ancestor{}}
	w := newWorld(t, k, rng, uint64(2+rng.IntN(4))<<20, int64(1+rng.IntN(2))<<20, int64(6+rng.IntN(10))<<20)
	f.adopt(w)
	return f
}

func (f *family) adopt(w *world) {
	w.locked = f.locked
	f.worlds = append(f.worlds, w)
}

// locked reports whether a clone builds on the snapshot.
func (f *family) locked(id uuid.UUID) bool {
	for _, w := range f.worlds {
		f.kin[w] = w.vol.Ancestors()
		if slices.ContainsFunc(f.kin[w], func(a driver.Ancestor) bool { return a.Snapshot == id }) {
			return true
		}
	}
	return false
}

// hasClones reports whether a clone builds on the volume.
func (f *family) hasClones(parent *world) bool {
	return slices.ContainsFunc(f.worlds, func(w *world) bool {
		return slices.ContainsFunc(f.kin[w], func(a driver.Ancestor) bool { return a.Volume == parent.cfg.ID })
	})
}

func (f *family) where() string {
	return fmt.Sprintf("family after %d operations, the last: %v", len(f.trace), f.trace[max(0, len(f.trace)-12):])
}

func (f *family) note(format string, args ...any) {
	f.trace = append(f.trace, fmt.Sprintf(format, args...))
}

// clone makes a volume of a snapshot. As long as CreateClone has not returned the
// registry knows only that the snapshot is needed.
func (f *family) clone(parent *world, s shot) error {
	f.born++
	w := &world{
		t: f.t, rng: f.rng, fs: parent.fs, eng: parent.eng, store: parent.store, pool: parent.pool, boot: parent.boot, cache: parent.cache,
		size: s.Size, model: bytes.Clone(s.data), flushed: bytes.Clone(s.data), cfg: parent.cfg,
	}
	if f.rng.IntN(3) == 0 { // it may be larger
		w.size += uint64(f.rng.IntN(3)) << 20
		w.model = append(w.model, make([]byte, w.size-s.Size)...)
		w.flushed = bytes.Clone(w.model)
	}
	w.cfg.ID, w.cfg.Name, w.cfg.Size, w.cfg.Snapshots, w.cfg.Deleting = randomID(f.rng), fmt.Sprintf("default/clone%d", f.born), w.size, nil, nil
	f.note("clone %s of %s", w.cfg.Name, s.Name)
	for range 1 + f.rng.IntN(2) { // it may be repeated
		if err := f.worlds[0].eng.CreateClone(context.Background(), w.cfg, parent.vol, s.ID); err != nil {
			return err
		}
	}
	var err error
	if w.vol, err = w.eng.OpenVolume(context.Background(), w.cfg); err != nil {
		return err
	}
	f.kin[w] = w.vol.Ancestors()
	if n := len(f.kin[w]); n == 0 || f.kin[w][n-1].Snapshot != s.ID {
		f.t.Fatalf("%s: the clone of %s builds on %+v", f.where(), s.Name, f.kin[w])
	}
	f.adopt(w)
	return nil
}

func (f *family) remove(w *world) error {
	f.note("delete %s", w.cfg.Name)
	if err := w.vol.Close(context.Background()); err != nil {
		return err
	}
	f.worlds = slices.DeleteFunc(f.worlds, func(o *world) bool { return o == w })
	return w.eng.DeleteVolume(context.Background(), w.cfg)
}

// step does one random operation on one of the volumes.
func (f *family) step() error {
	w := f.worlds[f.rng.IntN(len(f.worlds))]
	switch f.rng.IntN(30) {
	case 0:
		if len(w.shots) > 0 && len(f.worlds) < maxWorlds {
			return f.clone(w, w.shots[f.rng.IntN(len(w.shots))])
		}
	case 1:
		if len(f.worlds) > 2 && w != f.worlds[0] && !f.hasClones(w) {
			return f.remove(w)
		}
	case 2:
		if w != f.worlds[0] {
			return f.flatten(w)
		}
	}
	f.note("%s", w.cfg.Name)
	err := w.step()
	f.note("%v", w.trace[len(w.trace)-1])
	if err != nil {
		return fmt.Errorf("%s: %w", w.cfg.Name, err)
	}
	return nil
}

func (f *family) flatten(w *world) error {
	f.note("flatten %s", w.cfg.Name)
	var last uint64
	err := w.vol.Flatten(context.Background(), func(done, total uint64) {
		if done < last || done > total {
			f.t.Errorf("%s: %d of %d are flattened after %d", f.where(), done, total, last)
		}
		last = done
	})
	if err != nil {
		return err
	}
	f.kin[w] = w.vol.Ancestors()
	if len(w.shots) == 0 && len(f.kin[w]) > 0 {
		f.t.Fatalf("%s: it is flattened and still builds on %+v", f.where(), f.kin[w])
	}
	return nil
}

// goOn starts everything again on fs.
func (f *family) goOn(fsys *vfs.Mem, newBoot bool) {
	f.t.Helper()
	first := f.worlds[0]
	first.fs = fsys
	if newBoot {
		first.boot++
	}
	first.start()
	for _, w := range f.worlds {
		w.fs, w.eng, w.store, w.boot, w.cfg.Store = first.fs, first.eng, first.store, first.boot, first.store
		w.open()
		f.kin[w] = w.vol.Ancestors()
	}
}

func (f *family) verify(how func(*world)) {
	f.t.Helper()
	for _, w := range f.worlds {
		w.note("%v", f.trace[max(0, len(f.trace)-20):])
		how(w)
		w.verifyShots()
	}
}

func (f *family) check() {
	f.t.Helper()
	for _, w := range f.worlds {
		w.check()
	}
}

func (f *family) crash() {
	f.note("power loss")
	fsys, eng := f.worlds[0].fs, f.worlds[0].eng
	clone := fsys.CrashClone(f.rng)
	fsys.Kill()
	eng.Abandon()
	f.goOn(clone, true)
	f.verify((*world).verifyPrefix)
}

func (f *family) kill() {
	f.note("kill -9")
	clone, err := f.worlds[0].fs.KillClone()
	if err != nil {
		f.t.Fatal(err)
	}
	f.worlds[0].eng.Abandon()
	f.goOn(clone, false)
	f.verify((*world).verifyAll)
}

func (f *family) restart() {
	f.note("clean restart")
	f.close()
	for _, w := range f.worlds {
		w.settled()
	}
	f.goOn(f.worlds[0].fs, false)
	f.verify((*world).verifyAll)
}

func (f *family) close() {
	f.t.Helper()
	if err := f.worlds[0].eng.Close(context.Background()); err != nil {
		f.t.Fatalf("%s: close: %v", f.where(), err)
	}
}

// TestP2Family: random operations on a volume, its snapshots, clones and clones of
// clones, with restarts, kills and losses of power in between, give the answers of
// flat models.
func TestP2Family(t *testing.T) {
	forStores(t, raced(6, 2), 1, func(t *testing.T, k storeKind, rng *rand.Rand) {
		f := newFamily(t, k, rng)
		for range k.fewer(600, raced(300, 80)) {
			if err := f.step(); err != nil {
				t.Fatalf("%s: %v", f.where(), err)
			}
			switch rng.IntN(80) {
			case 0:
				f.kill()
				f.check()
			case 1:
				f.crash()
				f.check()
			case 2:
				f.restart()
			case 3:
				f.check()
			}
		}
		f.restart()
		for _, w := range f.worlds {
			w.verifySpace()
		}
		f.check()
		f.close()
		// P10: the store has it all.
		for _, name := range []string{"data/volumes", "run"} {
			if err := f.worlds[0].fs.RemoveAll(name); err != nil {
				t.Fatal(err)
			}
		}
		f.note("the local disk is lost, and what the registry knew of snapshots")
		f.worlds[0].start()
		for _, w := range f.worlds {
			w.cfg.Store = f.worlds[0].store
			found, err := f.worlds[0].eng.FindSnapshots(context.Background(), w.cfg)
			if err != nil || len(found) != len(w.shots) {
				t.Fatalf("%s: found %+v, %v, want %d", f.where(), found, err, len(w.shots))
			}
			if w.rng.IntN(2) == 0 {
				w.buried = nil
			}
		}
		f.close()
		f.goOn(f.worlds[0].fs, true)
		f.verify((*world).verifyAll)
		f.check()
		f.close()
	})
}

// TestP2FamilyCrashAtEveryStep: the power goes between any two calls to the disk,
// while volumes are snapshot, cloned and deleted.
func TestP2FamilyCrashAtEveryStep(t *testing.T) {
	forStores(t, raced(10, 3), raced(2, 1), func(t *testing.T, k storeKind, rng *rand.Rand) {
		f := newFamily(t, k, rng)
		for range k.fewer(12, raced(12, 4)) {
			countdown := 1 + rng.IntN(200)
			w := f.worlds[0]
			clone := stepsUntilPowerLoss(t, rng, w.fs, w.eng, countdown, func() error {
				if rng.IntN(3) > 0 { // mostly what is new here
					if err := f.worlds[rng.IntN(len(f.worlds))].snapshotStep(); err != nil {
						return err
					}
				}
				return f.step()
			})
			if clone == nil {
				continue
			}
			f.note("power lost at disk call %d", countdown)
			f.goOn(clone, true)
			f.verify((*world).verifyPrefix)
			f.check()
		}
		for _, w := range f.worlds {
			w.verifySpace()
		}
	})
}

// TestP2FirstSnapshotDied: of a volume's first snapshot whose making a power loss has
// ended anywhere, all is there at once or nothing ever: what is left of it does not turn
// up at a later opening.
func TestP2FirstSnapshotDied(t *testing.T) {
	overStores(t, func(t *testing.T, k storeKind) {
		for countdown := range k.fewer(40, 20) {
			rng := rand.New(rand.NewPCG(uint64(countdown), 7))
			f := newFamily(t, k, rng)
			w := f.worlds[0]
			clone := stepsUntilPowerLoss(t, rng, w.fs, w.eng, 1+countdown, w.snapshot)
			if clone == nil {
				t.Fatal("the power was not lost")
			}
			f.note("power lost at disk call %d", 1+countdown)
			f.goOn(clone, true)
			f.verify((*world).verifyPrefix)
			if err := errors.Join(w.write(0, cluster, true), w.snapshot()); err != nil {
				t.Fatalf("%s: %v", f.where(), err)
			}
			f.crash()
			f.check()
			f.close()
		}
	})
}

// TestCloneRefusals: a clone needs its ancestors open, and they wait for it.
func TestCloneRefusals(t *testing.T) { overStores(t, testCloneRefusals) }

func testCloneRefusals(t *testing.T, k storeKind) {
	f := newFamily(t, k, rand.New(rand.NewPCG(1, 1)))
	w := f.worlds[0]
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	must(w.write(0, 8*cluster, false))
	must(w.snapshot())
	small := w.cfg
	small.ID, small.Size = uuid.UUID{8}, cluster
	if err := w.eng.CreateClone(context.Background(), small, w.vol, w.shots[0].ID); err == nil {
		t.Error("a clone smaller than its snapshot was made")
	}
	must(f.clone(w, w.shots[0]))
	c := f.worlds[1]
	must(c.write(cluster, cluster, false))
	if err := w.vol.DeleteSnapshot(context.Background(), w.shots[0].ID); !errors.Is(err, driver.ErrSnapshotInUse) {
		t.Errorf("snapshot of a clone: %v", err)
	}
	ended, cancel := context.WithCancel(context.Background())
	cancel()
	if err := w.vol.Close(ended); !errors.Is(err, context.Canceled) {
		t.Errorf("close of a parent: %v", err)
	}
	must(w.write(0, cluster, false)) // it still is open
	must(c.vol.Close(context.Background()))
	must(w.vol.Close(context.Background()))
	if _, err := w.eng.OpenVolume(context.Background(), c.cfg); !errors.Is(err, driver.ErrAncestorClosed) {
		t.Errorf("a clone without its parent: %v", err)
	}
	w.open()
	c.open()
	f.verify((*world).verifyAll)
	f.close()
}
