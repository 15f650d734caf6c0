package repair_test

import (
	"context"
	"errors"
	"fmt"
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

// TestRemovedDeviceIsForgotten: its record stays while objects refer to it, and then
// the disk may come back with what it had; after that the record is gone, and the disk
// is refused.
func TestRemovedDeviceIsForgotten(t *testing.T) {
	r := newRig(t, 3, albatest.Preset(alba.Policy{K: 2, M: 1, C: 3, X: 1}), func(o *repair.Options) { o.Interval = 5 * time.Millisecond })
	r.put("o", 100_000)
	gone := r.Disks[0]
	run := func() {
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() { defer close(done); r.m.Run(ctx) }()
		t.Cleanup(func() { cancel(); albatest.Await(t, done, "the maintainer ends") })
	}
	must(t, r.p.SetDeviceState(t.Context(), gone.ID, alba.DeviceRemoved))
	_, err := r.m.Pass(t.Context())
	must(t, err)
	if d := r.p.Fleet().Member(gone.ID); d == nil || d.Record().State != alba.DeviceRemoved {
		t.Fatal("it is forgotten although an object refers to it")
	}
	_, err = r.p.AddDevice(t.Context(), r.Record(gone))
	must(t, err)
	r.expectSafe(1)
	must(t, r.p.SetDeviceState(t.Context(), gone.ID, alba.DeviceRemoved))
	run()
	_, err = r.p.AddDevice(t.Context(), r.Record(r.NewDisk()))
	must(t, err)
	albatest.Eventually(t, "it is forgotten", func() bool { return r.p.Fleet().Member(gone.ID) == nil })
	r.expectSafe(1)
	r.expectAll(r.p)
	if _, ok, err := r.Reg.Get(t.Context(), alba.RemovedKey(gone.ID)); !ok || err != nil {
		t.Fatalf("nobody remembers that it was removed: %v", err)
	}
	if _, err := r.p.AddDevice(t.Context(), r.Record(gone)); !errors.Is(err, proxy.ErrRemoved) {
		t.Fatalf("it comes back: %v", err)
	}
	if r.p.Fleet().Member(gone.ID) != nil {
		t.Fatal("it is in the registry again")
	}
}

// TestForgettingWaitsForUploads: an upload that may still write there keeps a removed
// device's record.
func TestForgettingWaitsForUploads(t *testing.T) {
	r := newRig(t, 3, albatest.Preset(alba.Policy{K: 1, M: 1, C: 2, X: 1}), nil)
	key := alba.IntentKey(alba.NewID(), alba.NewID())
	rec := alba.Intent{Namespace: ns, Object: "o", Policy: alba.Policy{K: 1, M: 1, C: 2, X: 1}, Shards: []string{r.Disks[0].ID, ""}, By: "other", Since: time.Now()}
	_, err := r.Reg.Commit(t.Context(), nil, []alba.Write{{Key: key, Value: alba.Encode(rec)}})
	must(t, err)
	must(t, r.p.SetDeviceState(t.Context(), r.Disks[0].ID, alba.DeviceRemoved))
	must(t, r.m.ForgetRemoved(t.Context()))
	if r.p.Fleet().Member(r.Disks[0].ID) == nil {
		t.Fatal("forgotten although an upload may write there")
	}
	_, err = r.Reg.Commit(t.Context(), nil, []alba.Write{{Key: key}})
	must(t, err)
	must(t, r.m.ForgetRemoved(t.Context()))
	if r.p.Fleet().Member(r.Disks[0].ID) != nil {
		t.Fatal("not forgotten")
	}
}

// TestTrashIsEmptiedWhenDeviceReturns: what could not be deleted while a device was
// away is deleted when it is back, long before the next search for orphans.
func TestTrashIsEmptiedWhenDeviceReturns(t *testing.T) {
	r := newRig(t, 3, albatest.Preset(alba.Policy{K: 2, M: 1, C: 3, X: 1}), func(o *repair.Options) {
		o.Interval, o.OrphanEvery = 5*time.Millisecond, 1000*time.Hour
	})
	r.put("gone", 100_000)
	r.put("stays", 100_000)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { defer close(done); r.m.Run(ctx) }()
	defer func() { cancel(); albatest.Await(t, done, "the maintainer ends") }()
	albatest.Eventually(t, "the first search is over", func() bool {
		jobs, err := r.m.Jobs(t.Context())
		must(t, err)
		for _, j := range jobs {
			if j.Name == repair.JobOrphans {
				return j.State == repair.JobDone
			}
		}
		return false
	})
	away := r.Disks[1]
	away.Faulty.Set(asdtest.Fault{Down: true})
	must(t, r.p.Delete(t.Context(), ns, "gone", 1))
	delete(r.objects, "gone")
	trash := func() int {
		kvs, err := r.Reg.List(t.Context(), alba.TrashPrefix)
		must(t, err)
		return len(kvs)
	}
	albatest.Eventually(t, "the device is missed", func() bool {
		reason, _ := r.p.Fleet().Member(away.ID).Down()
		return reason != ""
	})
	if trash() != 1 {
		t.Fatalf("%d records in the trash, want 1", trash())
	}
	away.Faulty.Set(asdtest.Fault{})
	albatest.Eventually(t, "the trash is empty", func() bool {
		r.p.Fleet().Poll(t.Context())
		return trash() == 0
	})
	r.expectClean()
	r.expectAll(r.p)
}

// priorities counts reads of a device by priority.
type priorities struct {
	asd.Client
	reads *[2]atomic.Int64
}

func (p priorities) ReadAt(ctx context.Context, key string, b []byte, off int64, pri asd.Priority) (asd.ReadInfo, error) {
	p.reads[pri].Add(1)
	return p.Client.ReadAt(ctx, key, b, off, pri)
}

// TestUpgradeReadsAtRepairsPriority: what storing an object anew reads is read as
// repair is, so that the devices have guests go first.
func TestUpgradeReadsAtRepairsPriority(t *testing.T) {
	for name, missing := range map[string]bool{"all there": false, "one missing": true} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t, 5, albatest.Preset(alba.Policy{K: 2, M: 1, C: 3, X: 1}), nil)
			r.put("o", 200_000)
			ps := albatest.Preset(alba.Policy{K: 3, M: 2, C: 5, X: 1}, alba.Policy{K: 3, M: 1, C: 4, X: 1})
			must(t, r.p.SetPreset(t.Context(), ps))
			var reads [2]atomic.Int64
			p, err := proxy.New(t.Context(), proxy.Options{Registry: r.Reg, Node: "other", Preset: "p", Keys: albatest.Keys(t, "a"),
				Dial: func(ctx context.Context, d alba.Device) (asd.Client, error) {
					c, err := r.Dial(ctx, d)
					return priorities{c, &reads}, err
				}})
			must(t, err)
			t.Cleanup(p.Close)
			if missing {
				for _, d := range r.Disks {
					if len(d.Keys(t)) > 2 { // with a part of the object
						d.Faulty.Set(asdtest.Fault{Down: true})
						break
					}
				}
				p.Fleet().Poll(t.Context())
			}
			m := repair.New(repair.Options{Proxy: p, DownAfter: time.Hour})
			report, err := m.Pass(t.Context())
			must(t, err)
			if report.Upgraded != 1 {
				t.Fatalf("report %+v", report)
			}
			if g, n := reads[asd.PriorityGuest].Load(), reads[asd.PriorityRepair].Load(); g != 0 || n == 0 {
				t.Errorf("%d reads as guests, %d as repair", g, n)
			}
			got := make([]byte, len(r.objects["o"]))
			must(t, p.ReadAt(t.Context(), ns, "o", got, 0))
			if reads[asd.PriorityGuest].Load() == 0 {
				t.Error("a guest's read is none")
			}
		})
	}
}

// TestRiskiestFirstUpToALimit: a pass does no more objects than its limit, those that
// can lose the fewest disks, counts the others, and further passes do them.
func TestRiskiestFirstUpToALimit(t *testing.T) {
	const n, limit = 10, 3
	r := newRig(t, 7, albatest.Preset(alba.Policy{K: 2, M: 2, C: 4, X: 1}), nil)
	for i := range n {
		r.put(fmt.Sprint("o", i), 20_000)
	}
	r.m.SetTasks(limit)
	must(t, r.p.SetDeviceState(t.Context(), r.Disks[0].ID, alba.DeviceRemoved))
	must(t, r.p.SetDeviceState(t.Context(), r.Disks[1].ID, alba.DeviceRemoved))
	spares := func() (worst, hurt int) { // of the objects that miss something
		worst = 2
		kvs, err := r.Reg.List(t.Context(), alba.ObjectPrefix)
		must(t, err)
		for _, kv := range kvs {
			man, err := alba.DecodeManifest(kv.Value)
			must(t, err)
			spare := 2
			for _, id := range man.Shards {
				if id == "" || id == r.Disks[0].ID || id == r.Disks[1].ID {
					spare--
				}
			}
			if worst = min(worst, spare); spare < 2 {
				hurt++
			}
		}
		return worst, hurt
	}
	_, hurt := spares()
	if hurt <= limit {
		t.Fatalf("only %d objects are hurt: the limit is not reached", hurt)
	}
	last := -2
	for hurt > 0 {
		worst, before := spares()
		report, err := r.m.Pass(t.Context())
		must(t, err)
		_, hurt = spares()
		if report.Objects != n || report.Mended != min(limit, before) || hurt != before-report.Mended || report.Left != hurt {
			t.Fatalf("of %d objects %d were hurt, now %d: %+v", n, before, hurt, report)
		}
		if worst < last {
			t.Fatalf("an object that could lose %d more was left behind those that could lose %d", worst, last)
		}
		last = worst
	}
	r.expectSafe(2)
	r.expectAll(r.p)
}

// TestFaultsNeedNoSurvey: a fault has its object looked at, and no other.
func TestFaultsNeedNoSurvey(t *testing.T) {
	r := newRig(t, 5, albatest.Preset(alba.Policy{K: 2, M: 2, C: 4, X: 1}), nil)
	for i := range 10 {
		r.put(fmt.Sprint("o", i), 20_000)
	}
	kv, ok, err := r.Reg.Get(t.Context(), r.objectKey("o7"))
	if !ok || err != nil {
		t.Fatal(ok, err)
	}
	man, err := alba.DecodeManifest(kv.Value)
	must(t, err)
	r.Disk(man.Shards[1]).Drop(t, alba.FragmentKey(man.NamespaceID, man.Upload, 1, 0))
	r.faults.Add(proxy.Fault{Namespace: ns, Object: "o7", Shard: 1, Device: man.Shards[1]})
	r.faults.Add(proxy.Fault{Namespace: ns, Object: "o7", Shard: 1, Device: man.Shards[1], Reason: "again"})
	r.faults.Add(proxy.Fault{Namespace: ns, Object: "deleted", Shard: 1, Device: man.Shards[1]})
	r.faults.Add(proxy.Fault{Namespace: "nosuch", Object: "o7", Shard: 1, Device: man.Shards[1]})
	report, err := r.m.PassFaults(t.Context())
	must(t, err)
	if report.Objects != 1 || report.Mended != 1 || report.Left != 0 {
		t.Fatalf("report %+v", report)
	}
	if !r.faults.Empty() {
		t.Error("faults are left")
	}
	r.expectClean()
}

func (r *rig) objectKey(name string) string {
	kv, ok, err := r.Reg.Get(r.t.Context(), alba.NamespaceKey(ns))
	if !ok || err != nil {
		r.t.Fatal(ok, err)
	}
	n, err := alba.Decode[alba.Namespace](kv.Value)
	must(r.t, err)
	return alba.ObjectKey(n.ID, name)
}

// TestOrphansByPages: collection and verification find what they should although they
// never list all manifests.
func TestOrphansByPages(t *testing.T) {
	r, reg := pagedRig(t, 3, alba.Policy{K: 2, M: 1, C: 3, X: 1})
	var orphans int64
	kv, _, err := r.Reg.Get(t.Context(), r.objectKey("o3"))
	must(t, err)
	man, err := alba.DecodeManifest(kv.Value)
	must(t, err)
	for _, d := range r.Disks {
		for _, key := range []string{alba.FragmentKey(man.NamespaceID, alba.NewID(), 0, 0), alba.ShardKey(alba.NewID(), alba.NewID(), 1), alba.TombstoneKey(alba.NewID(), alba.NewID())} {
			must(t, d.Model.Apply(t.Context(), nil, []asd.Update{asd.Put(key, asd.NewValue([]byte("x")))}, asd.PriorityGuest))
			orphans++
		}
	}
	// A part on a device that the manifest does not name is an orphan too.
	for i, id := range man.Shards {
		if id != r.Disks[0].ID {
			must(t, r.Disks[0].Model.Apply(t.Context(), nil, []asd.Update{asd.Put(alba.FragmentKey(man.NamespaceID, man.Upload, i, 0), asd.NewValue([]byte("x")))}, asd.PriorityGuest))
			orphans++
		}
	}
	deleted, err := r.m.Collect(t.Context())
	must(t, err)
	if deleted != orphans {
		t.Errorf("%d keys were deleted, want %d", deleted, orphans)
	}
	r.expectClean()
	r.expectAll(r.p)
	r.Disk(man.Shards[1]).Drop(t, alba.FragmentKey(man.NamespaceID, man.Upload, 1, 0))
	must(t, r.m.Start(t.Context(), repair.JobVerify))
	must(t, r.m.RunJob(t.Context(), repair.JobVerify))
	if r.faults.Empty() {
		t.Error("verification found nothing")
	}
	reg.expectPages(t)
}
