package repair_test

import (
	"bytes"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/rs/zerolog"

	"scoria/alba"
	"scoria/alba/albatest"
	"scoria/alba/asd"
	"scoria/alba/asd/asdtest"
	"scoria/alba/proxy"
	"scoria/alba/repair"
)

// putBack ends the proxy and puts a backup in the registry's place.
func (r *rig) putBack(backup *albatest.Registry) {
	r.t.Helper()
	r.p.Close()
	r.Reg = backup
	r.restart()
}

// restart opens the registry with a new proxy.
func (r *rig) restart() {
	r.p.Close()
	r.p = r.Proxy(r.t, alba.Preset{Name: "p"}, func(o *proxy.Options) { o.Keys = albatest.Keys(r.t, "a") })
	r.m = r.maintainer(r.p, func(o *repair.Options) { o.DownAfter, o.IntentAge = time.Nanosecond, time.Nanosecond })
}

// maintain does everything that deletes something, and must not be able to.
func (r *rig) maintainOlder() {
	r.t.Helper()
	r.p.Fleet().Poll(r.t.Context())
	if _, err := r.m.Collect(r.t.Context()); !errors.Is(err, proxy.ErrOlder) {
		r.t.Errorf("collected: %v", err)
	}
	if _, err := r.m.Pass(r.t.Context()); !errors.Is(err, proxy.ErrOlder) {
		r.t.Errorf("repaired: %v", err)
	}
	must(r.t, r.m.Start(r.t.Context(), repair.JobRebalance))
	if err := r.m.RunJob(r.t.Context(), repair.JobRebalance); !errors.Is(err, proxy.ErrOlder) {
		r.t.Errorf("rebalanced: %v", err)
	}
}

// rebuildAll makes the registry anew from devices and uses it.
func (r *rig) rebuildAll(disks []*albatest.Disk) repair.Rebuilt {
	r.t.Helper()
	r.p.Close()
	r.Reg = albatest.NewRegistry()
	var devices []alba.Device
	for _, d := range disks {
		devices = append(devices, r.Record(d))
	}
	report, err := repair.RebuildRegistry(r.t.Context(), r.Reg, r.Dial, devices, zerolog.Nop())
	must(r.t, err)
	r.restart()
	return report
}

// rebuildWhole makes the registry anew from all devices: every object is there, and stays.
func (r *rig) rebuildWhole() {
	r.t.Helper()
	if report := r.rebuildAll(r.Disks); report.Objects != len(r.objects) || len(report.Lost) > 0 {
		r.t.Fatalf("%+v", report)
	}
	r.expectAll(r.p)
	r.settle()
	r.expectAll(r.p)
}

// TestOlderRegistryDeletesNothing: with a registry that was put back from a backup, what
// was stored, moved or committed since is not taken for orphans, also not after several
// restarts; the registry is rebuilt from the devices, and all is there.
func TestOlderRegistryDeletesNothing(t *testing.T) {
	ps := albatest.Preset(alba.Policy{K: 1, M: 0, C: 1, X: 1})
	for what, since := range map[string]func(r *rig) *albatest.Registry{
		"stored since": func(r *rig) *albatest.Registry {
			backup := r.Reg.Backup()
			r.put("new", 40_000)
			return backup
		},
		"moved since": func(r *rig) *albatest.Registry {
			backup := r.Reg.Backup()
			for _, d := range r.Disks[:2] {
				must(r.t, r.p.SetDeviceState(r.t.Context(), d.ID, alba.DeviceDraining))
			}
			r.pass()
			return backup
		},
		"committed since": func(r *rig) *albatest.Registry {
			// The backup has the upload's intent.
			var backup *albatest.Registry
			reg := r.Reg
			reg.SetHook(func(writes []alba.Write) error {
				if strings.HasPrefix(writes[0].Key, alba.ObjectPrefix) && backup == nil {
					backup = reg.Backup()
				}
				return nil
			})
			r.put("new", 40_000)
			reg.SetHook(nil)
			return backup
		},
		"deleted and stored since": func(r *rig) *albatest.Registry {
			backup := r.Reg.Backup()
			must(r.t, r.p.Delete(r.t.Context(), ns, "o1", 1))
			delete(r.objects, "o1")
			r.put("new", 40_000)
			r.settle()
			return backup
		},
	} {
		t.Run(what, func(t *testing.T) {
			r := newRig(t, 3, ps, nil)
			for i := range 4 {
				r.put(fmt.Sprint("o", i), 30_000)
			}
			backup := since(r)
			before := fmt.Sprint(r.keys(alba.FragmentPrefix, alba.ShardPrefix))
			r.putBack(backup)
			for range 3 {
				r.maintainOlder()
				if after := fmt.Sprint(r.keys(alba.FragmentPrefix, alba.ShardPrefix)); after != before {
					t.Fatalf("of\n%s\nare left\n%s", before, after)
				}
				if err := r.p.Put(t.Context(), ns, "fork", 1, bytes.NewReader(nil), 0); err == nil {
					t.Fatal("an older registry's owner stores something")
				}
				r.restart()
			}
			r.rebuildWhole()
			r.put("after", 20_000)
			r.restart()
			r.settle()
			r.expectAll(r.p)
			r.expectClean()
		})
	}
}

// TestDeviceKnowsWhyItDeleted: a device that has deleted fragments knows the change of the
// registry that made them superfluous, however soon afterwards the daemon dies: a registry
// of right before that change is recognised, and nothing is lost.
func TestDeviceKnowsWhyItDeleted(t *testing.T) {
	one := albatest.Preset(alba.Policy{K: 1, M: 0, C: 1, X: 1})
	two := albatest.Preset(alba.Policy{K: 1, M: 1, C: 2, X: 1}, one.Policies[0])
	for what, c := range map[string]struct {
		key    string // prefix of what the change writes
		change func(r *rig)
	}{
		"deleted": {alba.TrashPrefix, func(r *rig) {
			must(r.t, r.p.Delete(r.t.Context(), ns, "o1", 1))
			delete(r.objects, "o1")
		}},
		"stored anew": {alba.TrashPrefix, func(r *rig) {
			must(r.t, r.p.SetPreset(r.t.Context(), two))
			_, err := r.m.Pass(r.t.Context())
			must(r.t, err)
		}},
		"moved": {alba.ObjectPrefix, func(r *rig) {
			must(r.t, r.p.SetDeviceState(r.t.Context(), r.Disks[0].ID, alba.DeviceDraining))
			must(r.t, r.p.SetDeviceState(r.t.Context(), r.Disks[1].ID, alba.DeviceDraining))
			_, err := r.m.Pass(r.t.Context())
			must(r.t, err)
		}},
		"left by a move": {alba.ObjectPrefix, func(r *rig) {
			for _, d := range r.Disks[:2] {
				d.Faulty.Set(asdtest.Fault{Hook: func(op, key string) error {
					if op == "Apply" && (strings.HasPrefix(key, alba.FragmentPrefix) || key == alba.PositionName) {
						return asd.ErrAssert // as for one whose shards are being moved
					}
					return nil
				}})
				must(r.t, r.p.SetDeviceState(r.t.Context(), d.ID, alba.DeviceDraining))
			}
			_, err := r.m.Pass(r.t.Context())
			must(r.t, err)
			r.deaf()
			_, err = r.m.Collect(r.t.Context())
			must(r.t, err)
		}},
	} {
		t.Run(what, func(t *testing.T) {
			r := newRig(t, 3, one, nil)
			for i := range 6 {
				r.put(fmt.Sprint("o", i), 30_000)
			}
			r.p.Close() // all were told
			r.deaf()
			r.restart()
			before := r.keys(alba.FragmentPrefix)
			var backup *albatest.Registry
			reg := r.Reg
			reg.SetHook(func(writes []alba.Write) error {
				if backup == nil && slices.ContainsFunc(writes, func(w alba.Write) bool { return strings.HasPrefix(w.Key, c.key) && w.Value != nil }) {
					backup = reg.Backup()
				}
				return nil
			})
			c.change(r)
			reg.SetHook(nil)
			albatest.Eventually(t, "something is deleted", func() bool {
				now := r.keys(alba.FragmentPrefix)
				return slices.ContainsFunc(before, func(k string) bool { return !slices.Contains(now, k) })
			})
			r.p.Close()
			r.hear()
			r.putBack(backup)
			r.maintainOlder()
			r.rebuildWhole()
			r.expectClean()
		})
	}
}

// deaf has all devices refuse to be told how far the registry is, by itself.
func (r *rig) deaf() {
	for _, d := range r.Disks {
		d.Faulty.Set(asdtest.Fault{Hook: func(op, key string) error {
			if op == "Apply" && key == alba.PositionName {
				return asd.ErrAssert
			}
			return nil
		}})
	}
}

// hear ends deaf.
func (r *rig) hear() {
	for _, d := range r.Disks {
		d.Faulty.Set(asdtest.Fault{})
	}
}

// TestDeviceThatKnowsMore: a device that was away when the registry was put back is
// found to know more when it returns, however many changes there were meanwhile; and
// nothing happens to it. The others go on but for maintenance.
func TestDeviceThatKnowsMore(t *testing.T) {
	ps := albatest.Preset(alba.Policy{K: 1, M: 0, C: 1, X: 1})
	r := newRig(t, 3, ps, nil)
	r.put("o", 30_000)
	r.settle()
	r.p.Close() // all were told
	backup := r.Reg.Backup()
	r.restart()
	for i := range 12 {
		r.put(fmt.Sprint("new", i), 30_000)
	}
	r.p.Close()
	// Of the daemons' disks only the first remembers: the others were put back, too.
	knows := r.Disks[0]
	before := fmt.Sprint(knows.Keys(t))
	for _, d := range r.Disks[1:] {
		forgetPosition(t, r, d)
	}
	knows.Faulty.Set(asdtest.Fault{Down: true})
	r.putBack(backup)
	for range 100 {
		_, err := r.Reg.Commit(t.Context(), nil, []alba.Write{{Key: "x", Value: []byte("x")}})
		must(t, err)
	}
	r.p.Fleet().Poll(t.Context())
	must(t, r.p.Put(t.Context(), ns, "other", 1, bytes.NewReader(nil), 0))
	must(t, r.p.Older())
	r.restart()
	knows.Faulty.Set(asdtest.Fault{})
	albatest.Eventually(t, "the device is asked", func() bool {
		r.p.Fleet().Poll(t.Context())
		return r.p.Older() != nil
	})
	r.maintainOlder()
	if after := fmt.Sprint(knows.Keys(t)); after != before {
		t.Fatalf("of\n%s\nare left\n%s", before, after)
	}
	if reason, _ := r.p.Fleet().Member(knows.ID).Down(); reason == "" {
		t.Error("the device is used")
	}
	must(t, r.p.Put(t.Context(), ns, "another", 1, bytes.NewReader(make([]byte, 30_000)), 30_000))
	// What is deleted may be what the newer state needs: it stays on the others.
	others := func() string { return fmt.Sprint(r.Disks[1].Keys(t), r.Disks[2].Keys(t)) }
	before = others()
	must(t, r.p.Delete(t.Context(), ns, "another", 1))
	kv := mustList(t, r.Reg, alba.TrashPrefix)[0]
	rec, err := alba.Decode[alba.Intent](kv.Value)
	must(t, err)
	of, upload, err := alba.SplitKey(kv.Key, alba.TrashPrefix)
	must(t, err)
	if err := r.p.Purge(t.Context(), of, upload, rec, kv.Revision); !errors.Is(err, proxy.ErrOlder) {
		t.Errorf("purged: %v", err)
	}
	r.maintainOlder()
	if after := others(); after != before {
		t.Fatalf("of\n%s\nare left\n%s", before, after)
	}
	// Given up, it is in nobody's way.
	must(t, r.p.SetDeviceState(t.Context(), knows.ID, alba.DeviceRemoved))
	albatest.Eventually(t, "what was deleted is gone", func() bool {
		_, err := r.m.Collect(t.Context())
		must(t, err)
		return len(mustList(t, r.Reg, alba.TrashPrefix)) == 0
	})
	if after := others(); after == before {
		t.Error("nothing is deleted")
	}
}

// forgetPosition makes a device anew with the same values, and of what it was told
// nothing.
func forgetPosition(t *testing.T, r *rig, d *albatest.Disk) {
	t.Helper()
	d.Model = asdtest.NewModel(d.ID)
	d.Faulty = asdtest.NewFaulty(d.Model)
}

// TestRebuiltWithoutDevice: a device that a registry was rebuilt without is not used, and
// nothing is collected from it; with it the registry is rebuilt anew.
func TestRebuiltWithoutDevice(t *testing.T) {
	ps := albatest.Preset(alba.Policy{K: 1, M: 0, C: 1, X: 1})
	r := newRig(t, 3, ps, nil)
	for i := range 9 {
		r.put(fmt.Sprint("o", i), 30_000)
	}
	left := r.Disks[0]
	before := fmt.Sprint(left.Keys(t))
	r.rebuildAll(r.Disks[1:])
	if _, err := r.p.AddDevice(t.Context(), r.Record(left)); !errors.Is(err, proxy.ErrOlder) {
		t.Fatalf("taken in: %v", err)
	}
	_, err := r.m.Collect(t.Context())
	must(t, err)
	if after := fmt.Sprint(left.Keys(t)); after != before {
		t.Fatalf("of\n%s\nare left\n%s", before, after)
	}
	r.rebuildAll(r.Disks)
	r.expectAll(r.p)
	r.settle()
	r.expectAll(r.p)
}
