package repair_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"scoria/alba"
	"scoria/alba/albatest"
	"scoria/alba/asd"
	"scoria/alba/asd/asdtest"
	"scoria/alba/proxy"
	"scoria/alba/repair"
)

// onDelete has fn called once, before the first deletion of a fragment on the device
// that comes from now on, and fails if that deletion never came.
func onDelete(t *testing.T, d *albatest.Disk, fn func()) (check func()) {
	t.Helper()
	var called atomic.Bool
	d.Faulty.Set(asdtest.Fault{Hook: func(op, key string) error {
		if op == "Apply" && strings.HasPrefix(key, alba.FragmentPrefix) {
			if called.CompareAndSwap(false, true) { // fn may come here again
				fn()
			}
		}
		return nil
	}})
	return func() {
		t.Helper()
		d.Faulty.Set(asdtest.Fault{})
		if !called.Load() {
			t.Fatal("the device was to delete nothing")
		}
	}
}

// movable is a rig with one object on the first of two devices.
func movable(t *testing.T) (r *rig, from, to *albatest.Disk) {
	ps := albatest.Preset(alba.Policy{K: 1, M: 0, C: 1, X: 1})
	r = newRig(t, 2, ps, nil)
	r.put("o", 200_000)
	from, to = r.Disks[0], r.Disks[1]
	if len(r.keysOf(to)) > 0 {
		from, to = to, from
	}
	return r, from, to
}

func (r *rig) keysOf(d *albatest.Disk) (list []string) {
	for _, k := range d.Keys(r.t) {
		if strings.HasPrefix(k, alba.FragmentPrefix) || strings.HasPrefix(k, alba.ShardPrefix) {
			list = append(list, k)
		}
	}
	return list
}

// move drains one device to another.
func (r *rig) move(from, to *albatest.Disk) {
	r.t.Helper()
	must(r.t, r.p.SetDeviceState(r.t.Context(), to.ID, alba.DeviceActive))
	must(r.t, r.p.SetDeviceState(r.t.Context(), from.ID, alba.DeviceDraining))
	must(r.t, r.m.MendForTest(r.t.Context(), ns, "o"))
	if len(r.keysOf(to)) == 0 {
		r.t.Fatal("nothing was moved")
	}
}

// TestOrphanThatIsWrittenAgain: what a failed move has left on a device is not collected
// from under a second move to it, which writes the same keys.
func TestOrphanThatIsWrittenAgain(t *testing.T) {
	r, from, to := movable(t)
	must(t, r.p.SetDeviceState(t.Context(), from.ID, alba.DeviceDraining))
	failed := errors.New("failed")
	// The commit fails, and with it what would have cleaned up.
	r.Reg.SetHook(func(writes []alba.Write) error {
		if strings.HasPrefix(writes[0].Key, alba.ObjectPrefix) {
			return failed
		}
		return nil
	})
	if err := r.m.MendForTest(t.Context(), ns, "o"); !errors.Is(err, failed) {
		t.Fatal(err)
	}
	r.Reg.SetHook(nil)
	if len(r.keysOf(to)) == 0 {
		t.Fatal("the move has left nothing")
	}
	check := onDelete(t, to, func() { r.move(from, to) })
	_, err := r.m.Collect(t.Context())
	must(t, err)
	check()
	r.expectAll(r.p)
	r.settle()
	r.expectAll(r.p)
	r.expectClean()
}

// TestMovedBackMeanwhile: a move that cleans up where a shard was does not delete what a
// later move has brought back there.
func TestMovedBackMeanwhile(t *testing.T) {
	for _, again := range []bool{false, true} { // the shard was moved before, or put there by its upload
		r, from, to := movable(t)
		if again {
			r.move(from, to)
			from, to = to, from
		}
		must(t, r.p.SetDeviceState(t.Context(), to.ID, alba.DeviceActive))
		must(t, r.p.SetDeviceState(t.Context(), from.ID, alba.DeviceDraining))
		check := onDelete(t, from, func() { r.move(to, from) })
		must(t, r.m.MendForTest(t.Context(), ns, "o"))
		check()
		r.expectAll(r.p)
		r.settle()
		r.expectAll(r.p)
		r.expectClean()
	}
}

// TestFailedMoveBesideAnother: a move whose intent was taken away, and that fails then,
// does not delete what the next one has stored in the same place.
func TestFailedMoveBesideAnother(t *testing.T) {
	r, from, to := movable(t)
	by := r.Proxy(t, alba.Preset{}, func(o *proxy.Options) { o.Node = "other" })
	other := r.maintainer(by, func(o *repair.Options) { o.IntentAge = time.Nanosecond })
	must(t, r.p.SetDeviceState(t.Context(), from.ID, alba.DeviceDraining))
	must(t, by.Fleet().Reload(t.Context())) // it would learn of it a little later
	var called atomic.Bool
	r.Reg.SetHook(func(writes []alba.Write) error {
		if strings.HasPrefix(writes[0].Key, alba.ObjectPrefix) {
			if called.CompareAndSwap(false, true) {
				_, err := other.Collect(context.Background())
				must(t, err)
				must(t, other.MendForTest(context.Background(), ns, "o"))
			}
		}
		return nil
	})
	if err := r.m.MendForTest(t.Context(), ns, "o"); !errors.Is(err, alba.ErrConflict) {
		t.Fatal(err)
	}
	r.Reg.SetHook(nil)
	if len(r.keysOf(to)) == 0 {
		t.Fatal("nothing is where it was moved to")
	}
	r.expectAll(r.p)
	r.settle()
	r.expectAll(r.p)
	r.expectClean()
}

// TestOrphansInParts: a search that can compare only a few shards at a time finds all
// orphans and nothing else.
func TestOrphansInParts(t *testing.T) {
	ps := albatest.Preset(alba.Policy{K: 2, M: 1, C: 3, X: 1})
	r := newRig(t, 4, ps, nil)
	for i := range 60 {
		r.put(fmt.Sprint("o", i), 9_000)
	}
	m := r.maintainer(r.p, nil)
	m.SetLook(5)
	for i := range 20 {
		name := fmt.Sprint("o", 3*i)
		must(t, r.drop(name))
		delete(r.objects, name)
	}
	n, err := m.Collect(t.Context())
	must(t, err)
	if n != 20*3*2 {
		t.Errorf("%d keys deleted, want %d", n, 20*3*2)
	}
	r.expectClean()
	r.expectAll(r.p)
	// A namespace that is gone altogether.
	must(t, r.p.DeleteNamespace(t.Context(), ns))
	r.objects = nil
	albatest.Eventually(t, "all is deleted", func() bool {
		_, err := m.Collect(t.Context())
		must(t, err)
		return len(r.keys(alba.FragmentPrefix, alba.ShardPrefix, alba.AttemptPrefix, alba.NamespaceCopyPrefix)) == 0
	})
}

// drop takes an object's manifest out of the registry behind everybody's back.
func (r *rig) drop(name string) error {
	kvs, err := r.Reg.List(r.t.Context(), alba.ObjectPrefix)
	for _, kv := range kvs {
		if strings.HasSuffix(kv.Key, "/"+name) {
			_, err = r.Reg.Commit(r.t.Context(), nil, []alba.Write{{Key: kv.Key}})
		}
	}
	return err
}

// TestSearchReadsManifestsOnce: a search reads a namespace's manifests once per device
// that has no orphans, however many pages of keys it has; and once more for each few
// thousand orphans.
func TestSearchReadsManifestsOnce(t *testing.T) {
	ps := albatest.Preset(alba.Policy{K: 1, M: 0, C: 1, X: 1})
	r := newRig(t, 1, ps, nil)
	r.put("o", 10)
	kv := mustList(t, r.Reg, alba.ObjectPrefix)[0]
	man, err := alba.DecodeManifest(kv.Value)
	must(t, err)
	// Many more, as if they had been put: 5 pages of keys on the device.
	for i := range 2500 {
		m := man.Clone()
		m.Upload, m.Object = alba.NewID(), fmt.Sprint("o", i)
		must(t, r.Disks[0].Model.Apply(t.Context(), nil, []asd.Update{
			asd.Put(alba.FragmentKey(m.NamespaceID, m.Upload, 0, 0), asd.NewValue([]byte("x"))),
			asd.Put(alba.ShardKey(m.NamespaceID, m.Upload, 0), asd.NewValue(m.Encode()))}, asd.PriorityRepair))
		_, err := r.Reg.Commit(t.Context(), nil, []alba.Write{{Key: alba.ObjectKey(m.NamespaceID, m.Object), Value: m.Encode()}})
		must(t, err)
	}
	count := &counting{Registry: r.Reg}
	p, err := proxy.New(t.Context(), proxy.Options{Registry: count, Dial: r.Dial, Node: "other", Preset: "p", Keys: albatest.Keys(t, "a")})
	must(t, err)
	t.Cleanup(p.Close)
	m := repair.New(repair.Options{Proxy: p, DownAfter: time.Hour})
	for orphans, most := range map[int]int64{0: 1, 7: 2} {
		for i := range orphans {
			must(t, r.drop(fmt.Sprint("o", i)))
		}
		count.lists.Store(0)
		n, err := m.Collect(t.Context())
		must(t, err)
		if n != int64(2*orphans) || count.lists.Load() > most {
			t.Errorf("%d orphans: %d keys deleted, the manifests were read %d times, want %d", orphans, n, count.lists.Load(), most)
		}
	}
}

// counting counts how often all manifests are read.
type counting struct {
	alba.Registry
	lists atomic.Int64
}

func (c *counting) List(ctx context.Context, prefix string) ([]alba.KV, error) {
	if strings.HasPrefix(prefix, alba.ObjectPrefix) {
		c.lists.Add(1)
	}
	return c.Registry.List(ctx, prefix)
}
