package driver_test

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"strings"
	"testing"

	"scoria/alba/vfs"
	"scoria/driver"
	"scoria/driver/block"
	"scoria/driver/lba"
	"scoria/driver/sco"
)

// copies is a store that never links the driver's files, so that the local copy
// and the store's are damaged one by one.
type copies struct{ driver.Store }

func (c copies) Put(ctx context.Context, ns, name string, epoch uint64, obj driver.Object) error {
	obj.LocalPath = ""
	return c.Store.Put(ctx, ns, name, epoch, obj)
}

// spot is a byte to damage.
type spot struct {
	file string
	off  int64
	what string
}

// spots lists one byte of everything that is stored, of a volume that was closed
// in good order.
func (r *rig) spots() (out []spot) {
	r.t.Helper()
	var walk func(dir string)
	walk = func(dir string) {
		names, err := r.fs.List(dir)
		r.must(err)
		for _, n := range names {
			name := dir + "/" + n
			info, err := r.fs.Stat(name)
			r.must(err)
			switch {
			case info.IsDir():
				walk(name)
			case strings.HasSuffix(n, ".sco"), strings.HasPrefix(n, "sco-"):
				out = append(out, r.scoSpots(name, info.Size())...)
			case strings.HasPrefix(n, "root-"):
				out = append(out, spot{name, 10, "root"}, spot{name, info.Size() - 20, "root's end"})
			case strings.HasPrefix(n, "pages-"):
				out = append(out, spot{name, 4096 + 77, "page"}, spot{name, 3, "page object's begin"}, spot{name, info.Size() - 5, "page object's end"})
			}
		}
	}
	walk("data")
	return out
}

func (r *rig) scoSpots(name string, size int64) []spot {
	f, err := r.fs.Open(name, vfs.ReadOnly)
	r.must(err)
	defer f.Close()
	tr, err := sco.ReadTrailer(f, size)
	r.must(err)
	out := []spot{
		{name, 20, "header"},
		{name, tr.RecordOff + 8, "records"},
		{name, size - sco.Page + 20, "trailer"},
	}
	if tr.Generation > 0 {
		out = append(out, spot{name, tr.KeptOff() + 3, "table of kept clusters"})
	}
	if tr.Clusters > 0 {
		out = append(out,
			spot{name, sco.DataOff(tr.Clusters/2) + 1234, "data"},
			spot{name, tr.CRCOff + 4*int64(tr.Clusters/2), "CRC table"})
	}
	return out
}

// isDamage reports whether an error names damaged data as its cause.
func isDamage(err error) bool {
	return errors.Is(err, block.ErrCorrupt) || errors.Is(err, sco.ErrFormat) || errors.Is(err, lba.ErrFormat) || errors.Is(err, driver.ErrLost)
}

// readDamaged reads every cluster by itself: right data or an error that says
// why. It returns how many fail.
func (r *rig) readDamaged(s spot) (failed int) {
	r.t.Helper()
	buf := make([]byte, cluster)
	for c := range uint64(len(r.history)) {
		err := do(r.vol, &block.Request{Op: block.OpRead, Offset: c * cluster, Length: cluster, Segments: [][]byte{buf}})
		if err != nil {
			if !isDamage(err) {
				r.t.Fatalf("%+v: read of cluster %d: %v", s, c, err)
			}
			failed++
			continue
		}
		version, ok := readStamp(buf, c)
		if want := r.history[c][len(r.history[c])-1].version; !ok || version != want {
			r.t.Fatalf("P5: %+v: cluster %d reads as version %d, ok %v; it is %d", s, c, version, ok, want)
		}
	}
	return failed
}

// grow makes a volume with some of everything: sealed SCOs in the store, dead
// clusters, several page objects, and a published root.
func (r *rig) grow() {
	ctx := context.Background()
	size := uint64(len(r.history))
	for i := range uint64(4) {
		for first := i * 7; first+30 < size; first += 60 + i*13 {
			r.must(r.write(first, 30, 0))
		}
		r.must(r.discard(i*40, 10))
		r.must(r.vol.Checkpoint(ctx))
		r.vol.WaitSealed()
		_, err := r.vol.Publish(ctx)
		r.must(err)
	}
}

// rot is one of everything stored that is damaged, in a volume that was closed.
type rot struct {
	*rig
	healthy *vfs.Mem
}

// newRot makes such a volume in a store, which takes the volume's own files where it can.
func newRot(t *testing.T, k storeKind, linked bool) *rot {
	t.Helper()
	r := newStillRig(t, k, rand.New(rand.NewPCG(4, 4)), 1500, 8)
	if !linked {
		r.wrap = func(s driver.Store) driver.Store { return copies{s} }
	}
	r.create()
	r.grow()
	r.close()
	return &rot{r, r.fs}
}

// each runs fn for the spots, of which only every so manieth, on a copy of the volume's
// files that is not open.
func (r *rot) each(every int, spots []spot, fn func(t *testing.T, s spot)) {
	for i, s := range spots {
		if i%every != 0 {
			continue
		}
		outer := r.t
		outer.Run(s.what+" of "+s.file[strings.LastIndex(s.file, "/")+1:], func(t *testing.T) {
			r.t = t
			r.fs = r.healthy.CrashClone(r.rng)
			r.boot++
			fn(t, s)
		})
		r.t = outer
	}
}

// corrupt damages a spot, which may be gone.
func (r *rot) corrupt(s spot) {
	r.t.Helper()
	if err := r.fs.Corrupt(s.file, s.off); errors.Is(err, fs.ErrNotExist) {
		r.t.Skip("was removed")
	} else {
		r.must(err)
	}
}

// gone reports whether a spot is there no more. The root of a stop is published after the
// opening, and what it does not need goes: with it, perhaps, the damage.
func (r *rot) gone(s spot) bool {
	_, err := r.fs.Stat(s.file)
	return errors.Is(err, fs.ErrNotExist)
}

// TestP5Damage flips a bit in each part of everything that the volume and a directory
// store have in files. Reads then give the right data or fail, never anything else; what
// has a second copy is read from that; the check names the damage.
func TestP5Damage(t *testing.T) { overStores(t, testP5Damage) }

func testP5Damage(t *testing.T, k storeKind) {
	for _, linked := range []bool{false, true} {
		if linked && k.name != directory.name {
			continue // fragments are never linked; see TestP5OneCopy
		}
		t.Run(fmt.Sprintf("linked=%v", linked), func(t *testing.T) {
			r := newRot(t, k, linked)
			r.each(raced(1, 11)*k.fewer(1, 3), r.spots(), func(t *testing.T, s spot) {
				r.corrupt(s)
				r.start()
				defer func() { r.eng.Abandon() }()
				if err := r.tryOpen(); err != nil {
					if !isDamage(err) {
						t.Fatalf("%+v: open: %v", s, err)
					}
					if !linked {
						t.Fatalf("%+v: open fails although there is a second copy: %v", s, err)
					}
					return
				}
				failed := r.readDamaged(s)
				counted := r.vol.Stats().ChecksumErrors
				if failed > 0 && !linked {
					t.Errorf("%+v: %d clusters can't be read although there is a second copy", s, failed)
				}
				if failed > 0 && counted == 0 {
					t.Errorf("%+v: %d reads failed, nothing was counted", s, failed)
				}
				rep, err := r.vol.Check(context.Background(), nil)
				if err != nil {
					t.Fatalf("%+v: check: %v", s, err)
				}
				if len(rep.Problems) == 0 && counted == 0 && !r.gone(s) {
					t.Errorf("%+v: neither counted by reads nor found by the check", s)
				}
			})
		})
	}
}

// TestP5Check: the check by itself finds damage of every part of what is stored.
func TestP5Check(t *testing.T) { overStores(t, testP5Check) }

func testP5Check(t *testing.T, k storeKind) {
	r := newRot(t, k, false)
	r.each(raced(1, 11)*k.fewer(1, 3), r.spots(), func(t *testing.T, s spot) {
		r.start()
		defer func() { r.eng.Abandon() }()
		r.mustOpen()
		r.corrupt(s)
		rep, err := r.vol.Check(context.Background(), nil)
		if err != nil {
			t.Fatalf("%+v: check: %v", s, err)
		}
		if len(rep.Problems) == 0 && !r.gone(s) {
			t.Errorf("%+v: the check does not find it", s)
		}
	})
}
