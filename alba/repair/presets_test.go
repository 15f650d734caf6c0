package repair_test

import (
	"slices"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/rs/zerolog"

	"scoria/alba"
	"scoria/alba/albatest"
	"scoria/alba/asd"
	"scoria/alba/asd/asdtest"
	"scoria/alba/proxy"
	"scoria/alba/repair"
)

// expectPreset rebuilds registries from the devices, named in every order that begins with
// another one: all have the preset with the fragments of that size.
func (r *rig) expectPreset(fragment int) {
	r.t.Helper()
	disks := slices.Clone(r.Disks)
	for range disks {
		disks = append(disks[1:], disks[0])
		var devices []alba.Device
		for _, d := range disks {
			devices = append(devices, r.Record(d))
		}
		reg := albatest.NewRegistry()
		if _, err := repair.RebuildRegistry(r.t.Context(), reg, r.Dial, devices, zerolog.Nop()); err != nil {
			r.t.Fatal(err)
		}
		ps, err := proxy.LoadPreset(r.t.Context(), reg, "p")
		must(r.t, err)
		if ps.FragmentBytes != fragment {
			r.t.Errorf("read from %s first, the preset has fragments of %d bytes, want %d", disks[0].ID, ps.FragmentBytes, fragment)
		}
	}
}

// TestLaterPresetWins: of copies of a preset that differ, a registry made anew has that of
// the last change; a copy without an order, as earlier versions wrote it, is older than
// all that have one.
func TestLaterPresetWins(t *testing.T) {
	ps := albatest.Preset(alba.Policy{K: 1, M: 1, C: 2, X: 1})
	r := newRig(t, 3, ps, nil)
	r.put("o", 20_000)
	change := func(missed *albatest.Disk) {
		t.Helper()
		missed.Faulty.Set(asdtest.Fault{Down: true})
		ps.FragmentBytes += alba.BlockSize
		must(t, r.p.SetPreset(t.Context(), ps))
		missed.Faulty.Set(asdtest.Fault{})
	}
	change(r.Disks[2])
	r.expectPreset(ps.FragmentBytes)

	// Later generations of the registry.
	for _, missed := range r.Disks {
		r.restart()
		albatest.Eventually(t, "all are up", func() bool {
			r.p.Fleet().Poll(t.Context())
			return !slices.ContainsFunc(r.p.Fleet().Members(), func(m *proxy.Member) bool { return !m.Up() })
		})
		change(missed)
		r.expectPreset(ps.FragmentBytes)
	}

	old := r.NewDisk()
	v, err := r.Disks[0].Model.Get(t.Context(), alba.ClusterCopyKey, asd.PriorityRepair)
	must(t, err)
	unordered := ps
	unordered.FragmentBytes = alba.MaxFragmentBytes
	must(t, old.Model.Apply(t.Context(), nil, []asd.Update{asd.Put(alba.ClusterCopyKey, v),
		asd.Put(alba.PresetCopyKey("p"), asd.NewValue(alba.Encode(unordered)))}, asd.PriorityRepair))
	r.expectPreset(ps.FragmentBytes)
	r.Disks = r.Disks[3:] // it alone
	r.expectPreset(alba.MaxFragmentBytes)
}

// TestPresetCopyThatIsLate: a copy of a preset that reaches a device after that of a later
// change does not replace it.
func TestPresetCopyThatIsLate(t *testing.T) {
	ps := albatest.Preset(alba.Policy{K: 1, M: 0, C: 1, X: 1})
	r := newRig(t, 1, ps, nil)
	d := r.Disks[0]
	var called atomic.Bool
	d.Faulty.Set(asdtest.Fault{Hook: func(op, key string) error {
		if op == "Apply" && strings.HasPrefix(key, alba.StatedPrefix) { // which copies begin with
			if called.CompareAndSwap(false, true) { // what follows comes here again
				ps.FragmentBytes += alba.BlockSize
				must(t, r.p.SetPreset(t.Context(), ps))
			}
		}
		return nil
	}})
	r.p.CopyRecords(t.Context(), r.p.Fleet().Member(d.ID))
	d.Faulty.Set(asdtest.Fault{})
	if !called.Load() {
		t.Fatal("nothing was copied")
	}
	r.expectPreset(ps.FragmentBytes)
}
