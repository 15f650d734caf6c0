package repair_test

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	"scoria/alba"
	"scoria/alba/albatest"
	"scoria/alba/asd/asdtest"
	"scoria/alba/proxy"
)

// TestRebuildLeavesRemovedDevicesOut: a device that was removed is not taken in by a
// rebuild, whether it was forgotten yet or not, and in whatever order devices are
// named: nothing that was deleted comes back. One that was taken in again is.
func TestRebuildLeavesRemovedDevicesOut(t *testing.T) {
	ps := albatest.Preset(alba.Policy{K: 1, M: 1, C: 2, X: 1})
	for name, c := range map[string]struct {
		forgotten, again, missed bool
	}{
		"removed": {}, "forgotten": {forgotten: true}, "taken in again": {again: true},
		"one did not hear": {missed: true}, "taken in again, one did not hear": {again: true, missed: true},
	} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t, 4, ps, nil)
			ctx := t.Context()
			must(t, r.p.CreateNamespace(ctx, "gone"))
			must(t, r.p.Put(ctx, "gone", "o", 1, strings.NewReader("x"), 1))
			for i := range 12 {
				r.put(fmt.Sprint("o", i), 20_000)
			}
			old, deaf := r.Disks[0], r.Disks[1]
			if c.again && c.missed {
				must(t, r.p.SetDeviceState(ctx, old.ID, alba.DeviceRemoved))
			}
			if c.missed {
				deaf.Faulty.Set(asdtest.Fault{Down: true})
			}
			if !c.again || !c.missed {
				must(t, r.p.SetDeviceState(ctx, old.ID, alba.DeviceRemoved))
			}
			if c.again {
				_, err := r.p.AddDevice(ctx, r.Record(old))
				must(t, err)
			}
			deaf.Faulty.Set(asdtest.Fault{})
			albatest.Eventually(t, "all are up", func() bool {
				r.p.Fleet().Poll(ctx)
				reason, _ := r.p.Fleet().Member(deaf.ID).Down()
				return reason == ""
			})
			r.pass()
			if c.forgotten {
				must(t, r.m.ForgetRemoved(ctx))
				if r.p.Fleet().Member(old.ID) != nil {
					t.Fatal("the device is not forgotten")
				}
			}
			must(t, r.p.DeleteNamespace(ctx, "gone"))
			for i := range 6 {
				must(t, r.p.Delete(ctx, ns, fmt.Sprint("o", i), 1))
				delete(r.objects, fmt.Sprint("o", i))
			}
			r.put("o0", 10_000) // anew, other contents
			albatest.Eventually(t, "the trash is empty", func() bool {
				return len(mustList(t, r.Reg, alba.TrashPrefix)) == 0
			})
			_, err := r.m.Collect(ctx) // the record of the namespace
			must(t, err)
			r.p.Close()
			for _, disks := range [][]*albatest.Disk{r.Disks, {r.Disks[3], r.Disks[2], r.Disks[1], r.Disks[0]}} {
				report := r.rebuildAll(disks)
				want := 3
				if c.again {
					want = 4
				}
				if report.Devices != want || report.Namespaces != 1 || report.Objects != len(r.objects) || len(report.Lost)+len(report.Missing) > 0 {
					t.Fatalf("%+v", report)
				}
				if _, err := r.p.Size(ctx, ns, "o3"); !errors.Is(err, proxy.ErrNoObject) {
					t.Fatalf("a deleted object is back: %v", err)
				}
				r.expectAll(r.p)
				if _, err := r.p.AddDevice(ctx, r.Record(old)); !c.again && !errors.Is(err, proxy.ErrRemoved) {
					t.Fatalf("the removed device is added: %v", err)
				}
			}
		})
	}
}

// TestRemovedDeviceAlone: a removed device that is named alone is read: it may be all
// that is left.
func TestRemovedDeviceAlone(t *testing.T) {
	r := newRig(t, 2, albatest.Preset(alba.Policy{K: 1, M: 1, C: 2, X: 1}), nil)
	r.put("o", 20_000)
	must(t, r.p.SetDeviceState(t.Context(), r.Disks[0].ID, alba.DeviceRemoved))
	if report := r.rebuildAll(r.Disks[:1]); report.Objects != 1 {
		t.Fatalf("%+v", report)
	}
	r.expectAll(r.p)
}
