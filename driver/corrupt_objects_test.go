package driver_test

import (
	"context"
	"fmt"
	"testing"

	"scoria/alba"
	"scoria/alba/albatest"
	"scoria/driver/host/objecttest"
)

// damage flips a bit of an object in the store, for good. Again, it undoes that.
func (r *rig) damage(name string, off int64) {
	r.t.Helper()
	if s, ok := r.store.(*objecttest.Store); ok {
		r.must(s.Spoil(context.Background(), r.cfg.ID.String(), name, off))
		return
	}
	r.must(r.fs.Corrupt(fmt.Sprintf("data/store/%s/objects/%s", r.cfg.ID, name), off))
}

// valueSpots lists spots of the files that storage daemons keep fragments in.
func (r *rig) valueSpots() (out []spot) {
	r.t.Helper()
	files, err := objecttest.ValueFiles(r.fs, "data/store")
	r.must(err)
	for _, name := range files {
		info, err := r.fs.Stat(name)
		r.must(err)
		data, err := objecttest.DataOff(r.fs, name)
		r.must(err)
		if data > 0 {
			out = append(out, spot{name, 50, "head"})
		}
		out = append(out, spot{name, data + (info.Size()-data)/2, "data"})
	}
	return out
}

// verified has the store verify itself, and repair what it can.
func (r *rig) verified() (problems int64) {
	r.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), waitLimit)
	defer cancel()
	problems, err := r.store.(*objecttest.Store).Verify(ctx)
	r.must(err)
	return problems
}

// TestP5DamagedFragment flips a bit in the files of fragments, of which the object store
// has one more than it needs. No read fails or gives anything else than what was written,
// whether the volume has a copy of its own or not; the damage is counted by reads or found
// by a verification, and repaired: then nothing counts any more, and nothing is found.
func TestP5DamagedFragment(t *testing.T) {
	r := newRot(t, objects, false)
	r.each(raced(31, 97), r.valueSpots(), func(t *testing.T, s spot) {
		r.corrupt(s)
		r.start()
		defer func() { r.eng.Abandon() }()
		r.mustOpen()
		r.vol.DropLocalCopies()
		faults := &r.store.(*objecttest.Store).Proxy.Counters().Faults
		if failed := r.readDamaged(s); failed > 0 {
			t.Errorf("%+v: %d clusters can't be read although there are other fragments", s, failed)
		}
		r.check()
		found := r.verified()
		if faults.Load() == 0 && found == 0 && !r.gone(s) {
			t.Errorf("%+v: neither met by reads nor found by the verification", s)
		}
		if n := r.verified(); n > 0 {
			t.Errorf("%+v: %d problems are left after the repair", s, n)
		}
		r.eng.ForgetRAM()
		r.eng.ForgetClusters()
		before := faults.Load()
		if failed := r.readDamaged(s); failed > 0 || faults.Load() > before {
			t.Errorf("%+v: %d clusters can't be read after the repair, reads met %d bad fragments", s, failed, faults.Load()-before)
		}
	})
}

// TestP5OneCopy flips a bit in what an object store on one disk has, which takes the
// volume's own files where it can: then there is nothing to read it from, and it must fail
// at once. Never is anything else read; the check of the volume, where the damage is of a
// file that both have, and the verification of the store find it.
func TestP5OneCopy(t *testing.T) {
	ps := albatest.Preset(alba.Policy{K: 1, M: 0, C: 1, X: 1})
	ps.FragmentBytes = 256 << 10
	for _, adopted := range []bool{true, false} {
		t.Run(fmt.Sprintf("adopted=%v", adopted), func(t *testing.T) {
			r := newRot(t, storeKind{"one", openObjects(ps)}, adopted)
			spots := r.spots()
			if !adopted {
				spots = r.valueSpots()
			}
			lost := 0
			r.each(raced(3, 13), spots, func(t *testing.T, s spot) {
				r.corrupt(s)
				r.start()
				defer func() { r.eng.Abandon() }()
				if err := r.tryOpen(); err != nil {
					if !isDamage(err) || !adopted {
						t.Fatalf("%+v: open: %v", s, err)
					}
					return
				}
				if !adopted {
					if failed := r.readDamaged(s); failed > 0 {
						t.Errorf("%+v: %d clusters can't be read although the volume has a copy", s, failed)
					}
					r.vol.DropLocalCopies()
					r.eng.ForgetRAM()
					r.eng.ForgetClusters()
				}
				failed := r.readDamaged(s)
				lost += failed
				if failed > 0 && r.vol.Stats().ChecksumErrors == 0 && !r.has("data-lost") {
					t.Errorf("%+v: %d reads failed, nothing was counted or shown", s, failed)
				}
				rep, err := r.vol.Check(context.Background(), nil)
				if err != nil {
					t.Fatalf("%+v: check: %v", s, err)
				}
				found := r.verified()
				if len(rep.Problems) == 0 && found == 0 && !r.gone(s) {
					t.Errorf("%+v: found neither by the check nor by the verification", s)
				}
				if failed > 0 && (len(rep.Problems) == 0 || found == 0) {
					t.Errorf("%+v: %d clusters are lost; the check says %q, the verification found %d", s, failed, rep.Problems, found)
				}
			})
			if lost == 0 && !raceEnabled { // few spots are tried then
				t.Error("nothing was lost: nothing was tried")
			}
		})
	}
}
