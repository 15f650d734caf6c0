package repair_test

import (
	"bytes"
	"errors"
	"fmt"
	"strings"
	"testing"

	"scoria/alba"
	"scoria/alba/albatest"
	"scoria/alba/asd/asdtest"
	"scoria/alba/proxy"
	"scoria/alba/repair"
)

// lose drops all fragments of an object behind everybody's back, and returns what it had.
func (r *rig) lose(name string) []byte {
	r.t.Helper()
	m := r.manifest(name)
	prefix := alba.FragmentPrefix + m.NamespaceID.String() + "/" + m.Upload.String() + "/"
	for _, d := range r.Disks {
		for _, key := range d.Keys(r.t) {
			if strings.HasPrefix(key, prefix) {
				d.Drop(r.t, key)
			}
		}
	}
	b := r.objects[name]
	if err := r.p.ReadAt(r.t.Context(), ns, name, make([]byte, len(b)), 0); !errors.Is(err, proxy.ErrLost) {
		r.t.Fatalf("not lost: %v", err)
	}
	return b
}

func (r *rig) putLost(p *proxy.Proxy, name string, epoch uint64, b []byte) error {
	return p.PutLost(r.t.Context(), ns, name, epoch, proxy.Source{Data: bytes.NewReader(b), Size: int64(len(b))})
}

// TestPutLost: who still has the contents of an object that is lost stores it anew; nothing else
// can be changed that way, and not by a stale owner.
func TestPutLost(t *testing.T) {
	r := newRig(t, 3, albatest.Preset(alba.Policy{K: 2, M: 1, C: 3, X: 1}), nil)
	r.put("o", 300_000)
	r.put("whole", 300_000)
	upload := r.manifest("whole").Upload
	must(t, r.putLost(r.p, "whole", 1, r.objects["whole"]))
	if err := r.putLost(r.p, "whole", 1, r.objects["o"]); !errors.Is(err, proxy.ErrExists) {
		t.Fatalf("others in place of what can be read: %v", err)
	}
	if r.manifest("whole").Upload != upload {
		t.Fatal("what can be read was stored anew")
	}
	if err := r.putLost(r.p, "none", 1, r.objects["o"]); !errors.Is(err, proxy.ErrNoObject) {
		t.Fatalf("no object: %v", err)
	}
	b := r.lose("o")
	if err := r.putLost(r.p, "o", 1, b[:1000]); !errors.Is(err, proxy.ErrExists) {
		t.Fatalf("others of another size: %v", err)
	}
	must(t, r.p.Fence(t.Context(), ns, 2))
	if err := r.putLost(r.p, "o", 1, b); !errors.Is(err, proxy.ErrStaleEpoch) {
		t.Fatalf("a stale owner: %v", err)
	}
	must(t, r.putLost(r.p, "o", 2, b))
	r.settle()
	r.expectAll(r.p)
	r.expectSafe(1)
	r.expectClean()
}

// TestPutLostAtTheCommit: an owner that is fenced, or an object that is deleted, right before
// the commit is seen by it.
func TestPutLostAtTheCommit(t *testing.T) {
	for what, want := range map[string]error{"fenced": proxy.ErrStaleEpoch, "deleted": proxy.ErrNoObject} {
		t.Run(what, func(t *testing.T) {
			r := newRig(t, 3, albatest.Preset(alba.Policy{K: 2, M: 1, C: 3, X: 1}), nil)
			r.put("o", 300_000)
			b, by := r.lose("o"), r.another()
			called := r.onCommit(alba.ObjectPrefix, func([]byte) {
				if what == "fenced" {
					must(t, by.Fence(t.Context(), ns, 2))
				} else {
					must(t, by.Delete(t.Context(), ns, "o", 1))
				}
			})
			if err := r.putLost(r.p, "o", 1, b); !errors.Is(err, want) || !called.Load() {
				t.Fatalf("%s, called %v: %v", what, called.Load(), err)
			}
			if what == "deleted" {
				delete(r.objects, "o")
			} else {
				must(t, r.putLost(by, "o", 2, b))
			}
			r.settle()
			r.expectAll(by)
			r.expectClean()
		})
	}
}

// TestPutLostDied: a daemon that dies at any commit of it leaves the object lost or whole,
// and the next one stores it.
func TestPutLostDied(t *testing.T) {
	ps := albatest.Preset(alba.Policy{K: 2, M: 1, C: 3, X: 1})
	for at := 1; ; at++ {
		r := newRig(t, 4, ps, nil)
		r.put("o", 100_000)
		b := r.lose("o")
		life := dying{at: at}
		r.Reg.SetHook(func([]alba.Write) error { return life.step() })
		err := r.putLost(r.p, "o", 1, b)
		over := life.over()
		r.p.Close()
		r.Reg.SetHook(nil)
		r.p = r.Proxy(t, ps, nil)
		r.m = r.maintainer(r.p, nil)
		got := make([]byte, len(b))
		if rerr := r.p.ReadAt(t.Context(), ns, "o", got, 0); rerr != nil && (err == nil || !errors.Is(rerr, proxy.ErrLost)) {
			t.Fatalf("died at commit %d: put %v, then read: %v", at, err, rerr)
		}
		must(t, r.putLost(r.p, "o", 1, b))
		r.settle()
		r.expectAll(r.p)
		r.expectSafe(1)
		r.expectClean()
		if over {
			must(t, err)
			return
		}
	}
}

// TestPutLostWithoutRoom: that there is no place for what is lost says that it is lost, so that
// who has it keeps it.
func TestPutLostWithoutRoom(t *testing.T) {
	r := newRig(t, 3, albatest.Preset(alba.Policy{K: 2, M: 1, C: 3, X: 1}), nil)
	r.put("o", 300_000)
	b := r.lose("o")
	must(t, r.p.SetDeviceState(t.Context(), r.Disks[0].ID, alba.DeviceRemoved))
	if err := r.putLost(r.p, "o", 1, b); !errors.Is(err, proxy.ErrLost) {
		t.Fatalf("too few devices: %v", err)
	}
	_, err := r.p.AddDevice(t.Context(), r.Record(r.NewDisk()))
	must(t, err)
	must(t, r.putLost(r.p, "o", 1, b))
	r.expectAll(r.p)
}

// TestPutLostOfRemoved: a device that was removed counts for nothing, though it still answers over
// a connection of before: what it alone had is lost, is not read from it, and is stored anew, so
// that it is there when the connection is not.
func TestPutLostOfRemoved(t *testing.T) {
	for _, who := range []string{"this daemon", "another daemon"} {
		t.Run(who, func(t *testing.T) {
			r := newRig(t, 2, albatest.Preset(alba.Policy{K: 1, M: 0, C: 1, X: 1}), nil)
			by := r.p
			if who == "another daemon" {
				by = r.another()
			}
			r.put("o", 300_000)
			r.expectAll(r.p)
			gone, b := r.manifest("o").Shards[0], r.objects["o"]
			must(t, by.SetDeviceState(t.Context(), gone, alba.DeviceRemoved))
			must(t, r.p.Fleet().Reload(t.Context()))
			if err := r.p.ReadAt(t.Context(), ns, "o", make([]byte, len(b)), 0); !errors.Is(err, proxy.ErrLost) {
				t.Fatalf("read from a removed device: %v", err)
			}
			_, err := r.p.Mend(t.Context(), ns, "o", proxy.Mend{Gone: func(id string) bool { return id == gone }})
			if !errors.Is(err, proxy.ErrUnreadable) || strings.Contains(err.Error(), "%!") {
				t.Fatalf("mended: %v", err)
			}
			must(t, r.putLost(r.p, "o", 1, b))
			if at := r.manifest("o").Shards[0]; at == gone {
				t.Fatalf("is on %s still, which was removed", at)
			}
			r.Disk(gone).Faulty.Set(asdtest.Fault{Down: true})
			r.settle()
			r.expectAll(r.p)
			r.expectSafe(0)
			r.expectClean()
		})
	}
}

// TestLostWithoutRoomIsTold: who may still have the contents of an object is told that too little of
// it is left, even if no device is there for what is missing: it must not be given up meanwhile.
func TestLostWithoutRoomIsTold(t *testing.T) {
	for _, pol := range []alba.Policy{{K: 1, M: 0, C: 1, X: 1}, {K: 2, M: 1, C: 3, X: 1}} {
		t.Run(fmt.Sprint(pol), func(t *testing.T) {
			told := map[string]int{}
			r := newRig(t, pol.Shards(), albatest.Preset(pol), func(o *repair.Options) {
				o.Failed = func(namespace, object string) { told[namespace+"/"+object]++ }
			})
			r.put("o", 300_000)
			for lost, d := range r.Disks[:pol.M+1] {
				if lost == pol.M && len(told) > 0 {
					t.Fatalf("told of %v, which can be read", told)
				}
				must(t, r.p.SetDeviceState(t.Context(), d.ID, alba.DeviceRemoved))
				report, err := r.m.Pass(t.Context())
				must(t, err)
				if report.Left != 1 {
					t.Fatalf("%d objects are left", report.Left)
				}
			}
			if told[ns+"/o"] != 1 || len(told) != 1 {
				t.Fatalf("told of %v", told)
			}
		})
	}
}
