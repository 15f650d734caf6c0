package repair_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync/atomic"
	"testing"

	"scoria/alba"
	"scoria/alba/albatest"
	"scoria/alba/asd/asdtest"
	"scoria/alba/proxy"
	"scoria/alba/repair"
)

// manifest returns what the registry says of an object; nil if it has none.
func (r *rig) manifest(name string) *alba.Manifest {
	r.t.Helper()
	kvs, err := r.Reg.List(r.t.Context(), alba.ObjectPrefix)
	must(r.t, err)
	for _, kv := range kvs {
		m, err := alba.DecodeManifest(kv.Value)
		must(r.t, err)
		if m.Object == name {
			return m
		}
	}
	return nil
}

// onCommit has fn called once, before the first commit that puts a key with the prefix.
func (r *rig) onCommit(prefix string, fn func(value []byte)) *atomic.Bool {
	called := new(atomic.Bool)
	r.Reg.SetHook(func(writes []alba.Write) error {
		for _, w := range writes {
			if strings.HasPrefix(w.Key, prefix) && w.Value != nil && called.CompareAndSwap(false, true) {
				fn(w.Value)
			}
		}
		return nil
	})
	return called
}

// decode returns an object's manifest by its value in the registry.
func decode(t *testing.T, value []byte) *alba.Manifest {
	t.Helper()
	m, err := alba.DecodeManifest(value)
	must(t, err)
	return m
}

// another is a proxy of another daemon, whose changes this one learns of later.
func (r *rig) another() *proxy.Proxy {
	return r.Proxy(r.t, albatest.Preset(), func(o *proxy.Options) { o.Node = "other" })
}

// TestRemovedBeforeTheCommit: a device that is removed by force when an upload has stored its
// fragments but not its manifest is not counted: the object is acknowledged with c shards on
// devices that are there, repair brings it to full safety, and nothing is lost with one copy.
func TestRemovedBeforeTheCommit(t *testing.T) {
	for _, pol := range []alba.Policy{{K: 1, M: 0, C: 1, X: 1}, {K: 1, M: 1, C: 1, X: 1}, {K: 2, M: 1, C: 3, X: 1}, {K: 2, M: 2, C: 3, X: 1}} {
		for _, who := range []string{"this daemon", "another daemon"} {
			t.Run(fmt.Sprint(pol, " ", who), func(t *testing.T) {
				r := newRig(t, pol.Shards()+1, albatest.Preset(pol), nil)
				by := r.p
				if who == "another daemon" {
					by = r.another()
				}
				gone := ""
				called := r.onCommit(alba.ObjectPrefix, func(value []byte) {
					gone = decode(t, value).Shards[0]
					if gone == "" { // it was late
						gone = decode(t, value).Shards[1]
					}
					must(t, by.SetDeviceState(t.Context(), gone, alba.DeviceRemoved))
				})
				r.put("o", 300_000)
				if !called.Load() {
					t.Fatal("nothing was committed")
				}
				m := r.manifest("o")
				if slices.Contains(m.Shards, gone) || m.Live() < pol.C {
					t.Fatalf("acknowledged with shards on %q, %s was removed before; durable must be %d", m.Shards, gone, pol.C)
				}
				r.Disk(gone).Faulty.Set(asdtest.Fault{Down: true})
				r.expectAll(r.p)
				r.settle()
				r.expectSafe(pol.M)
				r.expectClean()
				must(t, r.m.ForgetRemoved(t.Context()))
				if r.p.Fleet().Member(gone) != nil {
					t.Fatal("something refers to the removed device still")
				}
			})
		}
	}
}

// TestMovedToRemoved: a device that is removed when a shard has moved to it but is not known to be
// there gets none: the shard stays where it was, and moves elsewhere later.
func TestMovedToRemoved(t *testing.T) {
	pol := alba.Policy{K: 1, M: 0, C: 1, X: 1}
	r := newRig(t, 3, albatest.Preset(pol), nil)
	r.put("o", 300_000)
	from := r.manifest("o").Shards[0]
	must(t, r.p.SetDeviceState(t.Context(), from, alba.DeviceDraining))
	to, by := "", r.another()
	called := r.onCommit(alba.ObjectPrefix, func(value []byte) {
		to = decode(t, value).Shards[0]
		must(t, by.SetDeviceState(t.Context(), to, alba.DeviceRemoved))
		r.Disk(to).Faulty.Set(asdtest.Fault{Down: true})
	})
	r.pass()
	if !called.Load() || to == from {
		t.Fatalf("nothing was moved from %s: %q", from, to)
	}
	if at := r.manifest("o").Shards[0]; at == to || at == from {
		t.Fatalf("the only copy is at %s, was at %s; %s was removed", at, from, to)
	}
	r.settle()
	r.expectAll(r.p)
	r.expectSafe(0)
	r.expectClean()
}

// TestRemoveCountsUploads: a device that an upload under way has chosen is not removed without
// force, and its state stays what it was; Status counts what the upload stores there.
func TestRemoveCountsUploads(t *testing.T) {
	for _, state := range []alba.DeviceState{alba.DeviceActive, alba.DeviceDraining} {
		t.Run(string(state), func(t *testing.T) {
			r := newRig(t, 2, albatest.Preset(alba.Policy{K: 1, M: 0, C: 1, X: 1}), nil)
			chosen, by := "", r.another()
			other := r.maintainer(by, nil)
			called := r.onCommit(alba.ObjectPrefix, func(value []byte) {
				chosen = decode(t, value).Shards[0]
				must(t, by.SetDeviceState(t.Context(), chosen, state))
				if err := other.Remove(t.Context(), chosen); !errors.Is(err, proxy.ErrInUse) {
					t.Errorf("removed under an upload: %v", err)
				}
				if n := shards(t, other, chosen); n != 1 {
					t.Errorf("%d shards on the device of the upload, want 1", n)
				}
			})
			r.put("o", 300_000)
			if !called.Load() {
				t.Fatal("nothing was committed")
			}
			if m := r.manifest("o"); m.Shards[0] != chosen {
				t.Fatalf("stored on %s, not on %s, which stayed in use", m.Shards[0], chosen)
			}
			if err := r.m.Remove(t.Context(), chosen); !errors.Is(err, proxy.ErrInUse) {
				t.Fatalf("removed with an object on it: %v", err)
			}
			must(t, r.p.Fleet().Reload(t.Context()))
			if got := r.p.Fleet().Member(chosen).Record().State; got != state {
				t.Fatalf("%s after it was not removed, was %s", got, state)
			}
			if n := shards(t, r.m, chosen); n != 1 {
				t.Fatalf("%d shards on it, want 1", n)
			}
			r.expectAll(r.p)
		})
	}
}

// TestRemoveGivenUp: a removal whose caller gives up as soon as the device takes nothing new leaves
// it in the state that it had.
func TestRemoveGivenUp(t *testing.T) {
	r := newRig(t, 2, albatest.Preset(alba.Policy{K: 1, M: 0, C: 1, X: 1}), nil)
	id := r.Disks[0].ID
	ctx, giveUp := context.WithCancel(t.Context())
	defer giveUp()
	r.onCommit(alba.DeviceKey(id), func([]byte) { giveUp() })
	if err := r.m.Remove(ctx, id); !errors.Is(err, context.Canceled) {
		t.Fatalf("removed: %v", err)
	}
	must(t, r.p.Fleet().Reload(t.Context()))
	if got := r.p.Fleet().Member(id).Record().State; got != alba.DeviceActive {
		t.Fatalf("it is %s", got)
	}
}

// TestRemovedBeforeTheIntent: an upload that has chosen a device which is removed before its
// intent says so, unnoticed then, goes elsewhere.
func TestRemovedBeforeTheIntent(t *testing.T) {
	r := newRig(t, 2, albatest.Preset(alba.Policy{K: 1, M: 0, C: 1, X: 1}), nil)
	chosen, other := "", r.maintainer(r.another(), nil)
	called := r.onCommit(alba.IntentPrefix, func(value []byte) {
		rec, err := alba.Decode[alba.Intent](value)
		must(t, err)
		chosen = rec.Shards[0]
		must(t, other.Remove(t.Context(), chosen))
		r.Disk(chosen).Faulty.Set(asdtest.Fault{Down: true})
	})
	r.put("o", 300_000)
	if m := r.manifest("o"); !called.Load() || m.Shards[0] == chosen {
		t.Fatalf("stored on %s, %q was removed before", m.Shards[0], chosen)
	}
	r.expectAll(r.p)
	if err := other.Remove(t.Context(), chosen); err != nil {
		t.Fatalf("removed again: %v", err)
	}
	if err := other.Remove(t.Context(), "nobody"); !errors.Is(err, proxy.ErrDevice) {
		t.Fatalf("removed what is not there: %v", err)
	}
}

// shards is what Status counts on a device.
func shards(t *testing.T, m *repair.Maintainer, id string) int64 {
	t.Helper()
	st, err := m.Status(t.Context())
	must(t, err)
	i := slices.IndexFunc(st.Devices, func(d repair.DeviceStatus) bool { return d.ID == id })
	if i < 0 {
		t.Fatalf("no device %s", id)
	}
	return st.Devices[i].Shards
}
