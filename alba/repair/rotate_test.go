package repair_test

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/rs/zerolog"

	"scoria/alba"
	"scoria/alba/albatest"
	"scoria/alba/asd"
	"scoria/alba/asd/asdtest"
	"scoria/alba/proxy"
	"scoria/alba/repair"
)

// rotationRig is a cluster with two encrypted namespaces, whose keys a master key "a"
// wraps.
func rotationRig(t *testing.T) *rig {
	ps := albatest.Preset(alba.Policy{K: 2, M: 1, C: 3, X: 1})
	ps.Encryption = alba.EncryptAES256GCM
	r := newRig(t, 4, ps, nil)
	r.put("o", 30_000)
	must(t, r.p.CreateNamespace(t.Context(), "other"))
	must(t, r.p.Put(t.Context(), "other", "o", 1, strings.NewReader("secret"), 6))
	return r
}

// withKeys returns a proxy with these master keys, the one in use first, which does
// nothing on devices but what it is told.
func (r *rig) withKeys(digits ...string) *proxy.Proxy {
	return r.Proxy(r.t, alba.Preset{}, func(o *proxy.Options) { o.Keys, o.Silent = albatest.Keys(r.t, digits...), true })
}

// rebuilt reads everything from a registry made anew from devices, with master key "b"
// alone.
func (r *rig) rebuilt(disks []*albatest.Disk) {
	r.t.Helper()
	reg := r.Reg
	defer func() { r.Reg = reg }()
	r.Reg = albatest.NewRegistry()
	var devices []alba.Device
	for _, d := range disks {
		rec := r.Record(d)
		rec.ID = ""
		devices = append(devices, rec)
	}
	if report, err := repair.RebuildRegistry(r.t.Context(), r.Reg, r.Dial, devices, zerolog.Nop()); err != nil || report.Objects != 2 {
		r.t.Fatalf("%+v: %v", report, err)
	}
	p := r.withKeys("b")
	defer p.Close()
	r.expectAll(p)
	b := make([]byte, 6)
	if err := p.ReadAt(r.t.Context(), "other", "o", b, 0); err != nil || string(b) != "secret" {
		r.t.Fatalf("%q, %v", b, err)
	}
}

// TestRotationDiedAnywhere: a rotation of the master key that dies at any of its steps is
// finished by the next; then nothing needs the old one, not even a registry that is
// made anew from the devices.
func TestRotationDiedAnywhere(t *testing.T) {
	for at := 1; ; at++ {
		r := rotationRig(t)
		life := dying{at: at}
		r.p.Close()
		p := r.withKeys("b", "a")
		r.Reg.SetHook(func([]alba.Write) error { return life.step() })
		for _, d := range r.Disks {
			d.Faulty.Set(asdtest.Fault{Hook: func(op, _ string) error {
				if op != "Apply" {
					return nil
				}
				return life.step()
			}})
		}
		_, err := p.RotateKeys(t.Context())
		over := life.over()
		p.Close()
		r.Reg.SetHook(nil)
		for _, d := range r.Disks {
			d.Faulty.Set(asdtest.Fault{})
		}
		if over != (err == nil) {
			t.Fatalf("died at step %d of %d: %v", at, life.steps, err)
		}
		p = r.withKeys("b", "a")
		_, err = p.RotateKeys(t.Context())
		must(t, err)
		p.Close()
		p = r.withKeys("b")
		r.expectAll(p)
		p.Close()
		for i := range r.Disks {
			r.rebuilt(append([]*albatest.Disk{r.Disks[i]}, append(r.Disks[:i:i], r.Disks[i+1:]...)...))
		}
		if over {
			return
		}
	}
}

// TestRotationNeedsAllDevices: as long as a device has copies of keys that the old
// master key wraps, a rotation says so; a registry rebuilt with it takes the later copies.
func TestRotationNeedsAllDevices(t *testing.T) {
	r := rotationRig(t)
	p := r.withKeys("b", "a")
	r.Disks[1].Faulty.Set(asdtest.Fault{Down: true})
	for _, want := range []int{2, 0} {
		n, err := p.RotateKeys(t.Context())
		if n != want || !errors.Is(err, proxy.ErrOldKeys) || !strings.Contains(fmt.Sprint(err), r.Disks[1].ID) {
			t.Fatalf("rotated %d keys, want %d: %v", n, want, err)
		}
	}
	r.Disks[1].Faulty.Set(asdtest.Fault{})
	// The device that was away is read first.
	r.rebuilt([]*albatest.Disk{r.Disks[1], r.Disks[0], r.Disks[2], r.Disks[3]})
	albatest.Eventually(t, "the device is told", func() bool {
		_, err := p.RotateKeys(t.Context())
		return err == nil
	})
	if _, err := r.Proxy(t, alba.Preset{}, nil).RotateKeys(t.Context()); err == nil {
		// albatest's proxies have no master keys if they are not told.
		t.Fatal("rotated without a master key")
	}
}

// TestFenceThatIsLate: a fence that reaches the devices after a rotation does not put a key
// there again that the old master key wraps: a registry made anew needs only the new one.
func TestFenceThatIsLate(t *testing.T) {
	r := rotationRig(t)
	r.p.Close()
	fencing, rotating := r.withKeys("a"), r.withKeys("b", "a")
	kv, _, err := r.Reg.Get(t.Context(), alba.NamespaceKey(ns))
	must(t, err)
	n, err := alba.Decode[alba.Namespace](kv.Value)
	must(t, err)
	var once sync.Once
	late := 0
	var mu sync.Mutex
	for _, d := range r.Disks {
		d.Faulty.Set(asdtest.Fault{Hook: func(op, key string) error {
			if op != "Apply" || key != n.ID.String() { // the rotation's begin with a copy's order
				return nil
			}
			mu.Lock()
			late++
			mu.Unlock()
			once.Do(func() { // the others wait here
				if n, err := rotating.RotateKeys(t.Context()); n != 2 || err != nil {
					t.Errorf("%d keys rotated: %v", n, err)
				}
			})
			return nil
		}})
	}
	must(t, fencing.Fence(t.Context(), ns, 5))
	for _, d := range r.Disks {
		d.Faulty.Set(asdtest.Fault{})
	}
	if late < len(r.Disks) {
		t.Fatalf("the fence went to %d devices", late)
	}
	r.rebuilt(r.Disks)
	for _, d := range r.Disks {
		v, err := d.Model.Get(t.Context(), alba.NamespaceCopyKey(n.ID), asd.PriorityRepair)
		must(t, err)
		if have, err := alba.Decode[alba.Namespace](v.Data); err != nil || have.Key.Rotations != 1 || have.Epoch != 5 {
			t.Errorf("%s has epoch %d and a key wrapped %d times: %v", d.ID, have.Epoch, have.Key.Rotations+1, err)
		}
		epochs, _, err := d.Model.Epochs(t.Context(), "")
		must(t, err)
		if !slices.Contains(epochs, asd.NamespaceEpoch{Namespace: n.ID.String(), Epoch: 5}) {
			t.Errorf("%s was not fenced: %v", d.ID, epochs)
		}
	}
}
