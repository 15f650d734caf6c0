package repair_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/bits"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/rs/zerolog"

	"scoria/alba"
	"scoria/alba/albatest"
	"scoria/alba/asd/asdtest"
	"scoria/alba/proxy"
	"scoria/alba/repair"
)

// faults that hit devices, and what is done about them.
var hits = []struct {
	name string
	hit  func(r *rig, d *albatest.Disk)
	cure func(r *rig, d *albatest.Disk)
}{
	{"kill", func(_ *rig, d *albatest.Disk) { d.Faulty.Set(asdtest.Fault{Down: true}) }, heal},
	{"stop", func(_ *rig, d *albatest.Disk) { d.Faulty.Set(asdtest.Fault{Stopped: true}) }, heal},
	{"delay", func(_ *rig, d *albatest.Disk) { d.Faulty.Set(asdtest.Fault{Delay: 30 * time.Millisecond}) }, heal},
	{"fill", func(_ *rig, d *albatest.Disk) { d.Faulty.Set(asdtest.Fault{Full: true}) }, heal},
	{"lose answers", func(_ *rig, d *albatest.Disk) { d.Faulty.Set(asdtest.Fault{LoseAnswers: true}) }, heal},
	{"corrupt", func(r *rig, d *albatest.Disk) {
		for _, key := range d.Keys(r.t) {
			if strings.HasPrefix(key, alba.FragmentPrefix) {
				d.Model.Corrupt(key, 100)
			}
		}
	}, func(r *rig, _ *albatest.Disk) {
		must(r.t, r.m.Start(r.t.Context(), repair.JobVerify))
		must(r.t, r.m.RunJob(r.t.Context(), repair.JobVerify))
	}},
	{"remove", func(r *rig, d *albatest.Disk) { d.Faulty.Set(asdtest.Fault{Down: true}) }, func(r *rig, d *albatest.Disk) {
		must(r.t, r.p.SetDeviceState(r.t.Context(), d.ID, alba.DeviceRemoved))
		_, err := r.p.AddDevice(r.t.Context(), r.Record(r.NewDisk()))
		must(r.t, err)
	}},
}

func heal(_ *rig, d *albatest.Disk) { d.Faulty.Set(asdtest.Fault{}) }

// TestEveryCombination: whatever happens to up to m devices, in every combination,
// while a client writes and verifies: no error, no wrong byte, and after the cure and
// a repair everything is as safe as before.
func TestEveryCombination(t *testing.T) {
	for _, km := range [][2]int{{1, 1}, {1, 2}, {2, 1}, {2, 2}, {3, 2}} {
		k, m := km[0], km[1]
		disks := k + m
		for _, h := range hits {
			t.Run(fmt.Sprintf("%d+%d/%s", k, m, h.name), func(t *testing.T) {
				t.Parallel()
				for mask := 1; mask < 1<<disks; mask++ {
					if bits.OnesCount(uint(mask)) > m || testing.Short() && bits.OnesCount(uint(mask)) < m {
						continue
					}
					combination(t, k, m, mask, h.hit, h.cure)
				}
			})
		}
	}
}

func combination(t *testing.T, k, m, mask int, hit, cure func(r *rig, d *albatest.Disk)) {
	r := newRig(t, k+m, albatest.Preset(alba.Policy{K: k, M: m, C: k, X: 1}), nil)
	defer r.p.Close()
	r.put("a", 150_000)
	r.put("b", 5000)
	// Objects that are complete before the blow: a c below k+m lets more be missing.
	r.pass()
	for i, d := range r.Disks {
		if mask>>i&1 == 1 {
			hit(r, d)
		}
	}
	r.expectAll(r.p)
	r.put("c", 70_000)
	r.put("d", 1)
	r.expectAll(r.p)
	for i, d := range r.Disks[:k+m] {
		if mask>>i&1 == 1 {
			cure(r, d)
		}
	}
	r.pass()
	r.expectAll(r.p)
	_, err := r.m.Collect(t.Context())
	must(t, err)
	r.settle()
	r.expectSafe(m)
	r.expectClean()
	if t.Failed() {
		t.Fatalf("combination %b", mask)
	}
}

// TestTooManyLostComeBack: with more than m devices gone reads fail and say so; when
// they are back everything is there.
func TestTooManyLostComeBack(t *testing.T) {
	r := newRig(t, 5, albatest.Preset(alba.Policy{K: 3, M: 2, C: 5, X: 1}), nil)
	r.put("a", 100_000)
	for _, d := range r.Disks[:3] {
		d.Faulty.Set(asdtest.Fault{Down: true})
	}
	if err := r.p.ReadAt(t.Context(), ns, "a", make([]byte, 100_000), 0); !errors.Is(err, proxy.ErrUnreadable) {
		t.Fatalf("read: %v", err)
	}
	st, err := r.m.Status(t.Context())
	if err != nil || st.Classes[0].Disks[-1] != 1 {
		t.Fatalf("status %+v: %v", st, err)
	}
	for _, d := range r.Disks[:3] {
		d.Faulty.Set(asdtest.Fault{})
	}
	r.pass()
	r.expectAll(r.p)
	r.expectSafe(2)
}

// TestDownForLong: the shards of a device that stays away are rebuilt on others, and
// what it has is collected when it returns.
func TestDownForLong(t *testing.T) {
	r := newRig(t, 6, albatest.Preset(alba.Policy{K: 3, M: 2, C: 5, X: 1}), func(o *repair.Options) { o.DownAfter = time.Nanosecond })
	for i := range 10 {
		r.put(fmt.Sprint("o", i), 80_000)
	}
	r.Disks[2].Faulty.Set(asdtest.Fault{Down: true})
	albatest.Eventually(t, "the device is known to be down", func() bool {
		r.p.Fleet().Poll(t.Context())
		reason, _ := r.p.Fleet().Member(r.Disks[2].ID).Down()
		return reason != ""
	})
	r.pass()
	r.expectSafe(2)
	r.Disks[2].Faulty.Set(asdtest.Fault{})
	albatest.Eventually(t, "the device is up", func() bool {
		r.p.Fleet().Poll(t.Context())
		reason, _ := r.p.Fleet().Member(r.Disks[2].ID).Down()
		return reason == ""
	})
	r.settle()
	r.expectAll(r.p)
	r.expectClean()
}

// TestBusyGuestsDelayRepairOnly: with guests that wait all the time, everything is
// repaired, moved and verified all the same.
func TestBusyGuestsDelayRepairOnly(t *testing.T) {
	var asked atomic.Int64
	r := newRig(t, 6, albatest.Preset(alba.Policy{K: 3, M: 2, C: 5, X: 1}), func(o *repair.Options) {
		o.DownAfter = time.Nanosecond
		o.Busy = func() bool { asked.Add(1); return true }
	})
	for i := range 4 {
		r.put(fmt.Sprint("o", i), 80_000)
	}
	must(t, r.p.SetDeviceState(t.Context(), r.Disks[2].ID, alba.DeviceRemoved))
	r.pass()
	r.expectSafe(2)
	r.expectAll(r.p)
	if asked.Load() == 0 || r.m.Yielded() == 0 {
		t.Errorf("guests were asked about %d times, and given way to for %v", asked.Load(), r.m.Yielded())
	}
}

// TestDrain: a device that is drained is empty afterwards, and its data was moved, not
// computed.
func TestDrain(t *testing.T) {
	r := newRig(t, 6, albatest.Preset(alba.Policy{K: 3, M: 2, C: 5, X: 1}), nil)
	for i := range 10 {
		r.put(fmt.Sprint("o", i), 80_000)
	}
	id := r.Disks[1].ID
	must(t, r.p.SetDeviceState(t.Context(), id, alba.DeviceDraining))
	r.pass()
	r.expectAll(r.p)
	r.expectSafe(2)
	for _, key := range r.keys(alba.FragmentPrefix, alba.ShardPrefix) {
		if strings.HasPrefix(key, id+" ") {
			t.Errorf("%s is left", key)
		}
	}
	r.expectClean()
	st, err := r.m.Status(t.Context())
	must(t, err)
	if st.Devices[1].Shards != 0 || st.Devices[1].Condition != repair.Leaving {
		t.Errorf("status of the drained device: %+v", st.Devices[1])
	}
}

// TestUpgrade: objects that were stored under a lesser policy are stored anew when
// the devices return, and nothing of the old ones is left.
func TestUpgrade(t *testing.T) {
	ps := albatest.Preset(alba.Policy{K: 3, M: 2, C: 5, X: 1}, alba.Policy{K: 1, M: 1, C: 2, X: 1})
	ps.Compression, ps.Encryption = alba.CompressZstd, alba.EncryptAES256GCM
	r := newRig(t, 5, ps, nil)
	for _, d := range r.Disks[:2] {
		d.Faulty.Set(asdtest.Fault{Down: true})
	}
	r.p.Fleet().Poll(t.Context())
	for i := range 4 {
		r.put(fmt.Sprint("o", i), 60_000)
	}
	r.expectSafe(1)
	for _, d := range r.Disks[:2] {
		d.Faulty.Set(asdtest.Fault{})
	}
	r.settle()
	albatest.Eventually(t, "the objects are upgraded", func() bool {
		r.p.Fleet().Poll(t.Context())
		r.pass()
		st, err := r.m.Status(t.Context())
		must(t, err)
		return len(st.Classes) == 1 && st.Classes[0].Policy.K == 3
	})
	r.expectAll(r.p)
	r.settle()
	r.expectSafe(2)
	r.expectClean()
}

// TestP5VerifyFindsEverything: a bad byte in any value of any device is found by a
// verification and repaired; so is a value that is gone.
func TestP5VerifyFindsEverything(t *testing.T) {
	r := newRig(t, 5, albatest.Preset(alba.Policy{K: 3, M: 2, C: 5, X: 1}), nil)
	r.put("a", 150_000)
	r.put("b", 10)
	verify := func() int64 {
		t.Helper()
		must(t, r.m.Start(t.Context(), repair.JobVerify))
		must(t, r.m.RunJob(t.Context(), repair.JobVerify))
		jobs, err := r.m.Jobs(t.Context())
		must(t, err)
		for _, j := range jobs {
			if j.Name == repair.JobVerify {
				if j.State != repair.JobDone {
					t.Fatalf("verification: %+v", j)
				}
				return j.Problems
			}
		}
		t.Fatal("no job")
		return 0
	}
	if n := verify(); n != 0 {
		t.Fatalf("%d problems in a healthy store", n)
	}
	for _, d := range r.Disks {
		for _, key := range d.Keys(t) {
			if key == alba.ClusterCopyKey {
				continue
			}
			if !d.Model.Corrupt(key, 0) {
				t.Fatalf("%s on %s has no byte", key, d.ID)
			}
			if n := verify(); n != 1 {
				t.Fatalf("%s on %s: %d problems found, want 1", key, d.ID, n)
			}
			r.pass()
			if n := verify(); n != 0 {
				t.Fatalf("%s on %s: %d problems after repair", key, d.ID, n)
			}
			if strings.HasPrefix(key, alba.FragmentPrefix) || strings.HasPrefix(key, alba.ShardPrefix) {
				d.Drop(t, key)
				if n := verify(); n != 1 {
					t.Fatalf("%s on %s is gone: %d problems found, want 1", key, d.ID, n)
				}
				r.pass()
				if n := verify(); n != 0 {
					t.Fatalf("%s on %s is gone: %d problems after repair", key, d.ID, n)
				}
			}
		}
	}
	r.expectAll(r.p)
}

// TestDiedAtEveryCommit: a daemon that dies at any of its registry commits leaves
// nothing that the next one does not finish or collect, and loses nothing.
func TestDiedAtEveryCommit(t *testing.T) {
	for at := 1; ; at++ {
		r := newRig(t, 5, albatest.Preset(alba.Policy{K: 2, M: 1, C: 3, X: 1}), nil)
		r.put("kept", 20_000)
		life := dying{at: at}
		r.Reg.SetHook(func([]alba.Write) error { return life.step() })
		ctx := t.Context()
		b := albatest.Pattern(9, 100_000)
		putErr := r.p.Put(ctx, ns, "new", 1, bytes.NewReader(b), int64(len(b)))
		delErr := r.p.Delete(ctx, ns, "new", 1)
		stateErr := r.p.SetDeviceState(ctx, r.Disks[0].ID, alba.DeviceDraining)
		_, passErr := r.m.Pass(ctx)
		over := life.over()
		r.p.Close()
		r.Reg.SetHook(nil)

		// The next daemon, under the same name.
		r.p = r.Proxy(t, albatest.Preset(alba.Policy{K: 2, M: 1, C: 3, X: 1}), nil)
		r.m = r.maintainer(r.p, nil)
		switch size, err := r.p.Size(ctx, ns, "new"); {
		case err == nil && size == int64(len(b)) && delErr != nil:
			r.objects["new"] = b
		case errors.Is(err, proxy.ErrNoObject) && (putErr != nil || delErr == nil):
		default:
			t.Fatalf("died at commit %d: put %v, delete %v, then size %d: %v", at, putErr, delErr, size, err)
		}
		r.settle()
		r.expectAll(r.p)
		r.expectSafe(1)
		r.expectClean()
		if over {
			if err := errors.Join(putErr, delErr, stateErr, passErr); err != nil {
				t.Fatal(err)
			}
			return
		}
	}
}

// TestTwoMaintainers: two daemons that repair the same objects at once do no harm.
func TestTwoMaintainers(t *testing.T) {
	r := newRig(t, 7, albatest.Preset(alba.Policy{K: 3, M: 2, C: 5, X: 1}), nil)
	for i := range 20 {
		r.put(fmt.Sprint("o", i), 40_000)
	}
	q := r.Proxy(t, albatest.Preset(alba.Policy{}), func(o *proxy.Options) { o.Node = "other" })
	must(t, r.p.SetDeviceState(t.Context(), r.Disks[0].ID, alba.DeviceRemoved))
	must(t, r.p.SetDeviceState(t.Context(), r.Disks[1].ID, alba.DeviceDraining))
	must(t, q.Fleet().Reload(t.Context()))
	var wg sync.WaitGroup
	for _, p := range []*proxy.Proxy{r.p, q} {
		for i := range 20 {
			wg.Go(func() {
				m := r.maintainer(p, nil)
				err := m.MendForTest(t.Context(), ns, fmt.Sprint("o", i))
				if err != nil && !errors.Is(err, proxy.ErrInProgress) && !errors.Is(err, alba.ErrConflict) {
					t.Error(err)
				}
			})
		}
	}
	wg.Wait()
	r.settle()
	r.expectAll(r.p)
	r.expectAll(q)
	r.expectSafe(2)
	r.expectClean()
}

// TestP10RebuildRegistry: with the registry lost, the devices alone give everything
// back: objects, epochs, keys, presets; also with m devices lost too.
func TestP10RebuildRegistry(t *testing.T) {
	ps := albatest.Preset(alba.Policy{K: 2, M: 2, C: 4, X: 1})
	ps.Encryption, ps.Compression = alba.EncryptAES256GCM, alba.CompressLZ4
	for lost := range 3 {
		r := newRig(t, 5, ps, nil)
		for i := range 6 {
			r.put(fmt.Sprint("o", i), i*30_000)
		}
		must(t, r.p.Fence(t.Context(), ns, 7))
		must(t, r.p.Delete(t.Context(), ns, "o0", 7))
		delete(r.objects, "o0")
		must(t, r.p.SetDeviceState(t.Context(), r.Disks[0].ID, alba.DeviceDraining))
		r.settle()
		r.p.Close()

		r.Reg = albatest.NewRegistry()
		var devices []alba.Device
		for _, d := range r.Disks[lost:] {
			rec := r.Record(d)
			rec.ID = ""
			devices = append(devices, rec)
		}
		report, err := repair.RebuildRegistry(t.Context(), r.Reg, r.Dial, devices, zerolog.Nop())
		if err != nil || report.Objects != 5 || report.Namespaces != 1 || report.Presets != 1 || len(report.Lost)+len(report.Superseded)+len(report.Problems) > 0 {
			t.Fatalf("%+v: %v", report, err)
		}
		// The first one was drained; a manifest may be of before.
		if missing := slices.Contains(report.Missing, r.Disks[1].ID); missing != (lost == 2) || lost < 2 && len(report.Missing) > 0 {
			t.Fatalf("%d devices are lost, missing are %v", lost, report.Missing)
		}
		if _, err := repair.RebuildRegistry(t.Context(), r.Reg, r.Dial, devices, zerolog.Nop()); !errors.Is(err, repair.ErrNotEmpty) {
			t.Fatalf("rebuilt twice: %v", err)
		}
		r.p = r.Proxy(t, ps, func(o *proxy.Options) { o.Keys = albatest.Keys(t, "a") })
		r.m = r.maintainer(r.p, nil)
		r.expectAll(r.p)
		if err := r.p.Put(t.Context(), ns, "stale", 6, bytes.NewReader(nil), 0); !errors.Is(err, proxy.ErrStaleEpoch) {
			t.Fatalf("epoch after the rebuild: %v", err)
		}
		if _, err := r.p.Size(t.Context(), ns, "o0"); !errors.Is(err, proxy.ErrNoObject) {
			t.Fatalf("deleted object is back: %v", err)
		}
		_, err = r.m.Collect(t.Context())
		must(t, err)
		r.expectAll(r.p)
	}
}

// TestEmptyRegistryCollectsNothing: a registry that lost its memory does not take what
// the devices hold for orphans.
func TestEmptyRegistryCollectsNothing(t *testing.T) {
	ps := albatest.Preset(alba.Policy{K: 2, M: 1, C: 3, X: 1})
	r := newRig(t, 3, ps, nil)
	r.put("o", 50_000)
	before := r.keys(alba.FragmentPrefix, alba.ShardPrefix)
	old := r.Reg
	r.Reg = albatest.NewRegistry()
	for _, kv := range mustList(t, old, alba.DevicePrefix) {
		_, err := r.Reg.Commit(t.Context(), nil, []alba.Write{{Key: kv.Key, Value: kv.Value}})
		must(t, err)
	}
	_, err := r.Reg.Commit(t.Context(), nil, []alba.Write{{Key: alba.PresetKey("p"), Value: alba.Encode(ps)}})
	must(t, err)
	q := r.Proxy(t, ps, nil)
	if _, err := r.maintainer(q, nil).Collect(t.Context()); !errors.Is(err, proxy.ErrForeign) && !errors.Is(err, proxy.ErrOlder) {
		t.Fatalf("collected: %v", err)
	}
	if after := r.keys(alba.FragmentPrefix, alba.ShardPrefix); len(after) != len(before) {
		t.Fatalf("%d of %d keys are left", len(after), len(before))
	}
}

func mustList(t *testing.T, reg alba.Registry, prefix string) []alba.KV {
	t.Helper()
	kvs, err := reg.List(t.Context(), prefix)
	must(t, err)
	return kvs
}

// TestRebalance: shards go to devices that are added until all are about equally
// full, wherever they were at first.
func TestRebalance(t *testing.T) {
	for name, c := range map[string]struct {
		policy     alba.Policy
		old, fresh int
		domain     alba.Domain
		atLeast    float64 // shards that move per object
	}{
		"disks":            {alba.Policy{K: 2, M: 1, C: 3, X: 1}, 4, 2, alba.DomainDisk, 0.5},
		"several of each":  {alba.Policy{K: 1, M: 2, C: 3, X: 1}, 3, 6, alba.DomainDisk, 1.5},
		"within the hosts": {alba.Policy{K: 1, M: 2, C: 3, X: 1}, 3, 6, alba.DomainHost, 1.5},
	} {
		t.Run(name, func(t *testing.T) { rebalanceOnto(t, c.policy, c.domain, c.old, c.fresh, c.atLeast) })
	}
}

func rebalanceOnto(t *testing.T, policy alba.Policy, domain alba.Domain, old, fresh int, atLeast float64) {
	ps := albatest.Preset(policy)
	ps.Domain = domain
	r := newRig(t, old, ps, nil)
	const objects = 40
	for i := range objects {
		r.put(fmt.Sprint("o", i), 50_000*policy.K)
	}
	before := r.shards()
	for range fresh {
		_, err := r.p.AddDevice(t.Context(), r.Record(r.NewDisk()))
		must(t, err)
	}
	for _, d := range r.Disks {
		d.Capacity.Store(6 << 20)
	}
	must(t, r.m.Start(t.Context(), repair.JobRebalance))
	must(t, r.m.RunJob(t.Context(), repair.JobRebalance))
	r.p.Fleet().Poll(t.Context())
	low, high := 1.0, 0.0
	for _, d := range r.p.Fleet().States(t.Context()) {
		full := float64(d.Capacity-d.Free) / float64(d.Capacity)
		low, high = min(low, full), max(high, full)
	}
	if high-low > 0.06 { // 0.05 and what is stored besides the shards
		t.Errorf("devices are %.2f to %.2f full", low, high)
	}
	moved := 0
	for object, shards := range r.shards() {
		for i, id := range shards {
			if id != before[object][i] {
				moved++
			}
		}
	}
	if float64(moved) < atLeast*objects {
		t.Errorf("%d shards were moved", moved)
	}
	r.expectAll(r.p)
	r.settle()
	r.expectSafe(policy.M)
	r.expectClean()
}

// TestMendTo: a shard goes to the wanted device or, if the rules forbid that, stays.
func TestMendTo(t *testing.T) {
	ps := albatest.Preset(alba.Policy{K: 2, M: 1, C: 3, X: 1})
	ps.Domain = alba.DomainHost
	r := newRig(t, 3, ps, nil)
	r.put("o", 50_000)
	for range 3 { // disks 3, 4 and 5, one more for each host
		_, err := r.p.AddDevice(t.Context(), r.Record(r.NewDisk()))
		must(t, err)
	}
	before := r.shards()["o"]
	mend := func(to string) (proxy.Mended, []string) {
		done, err := r.p.Mend(t.Context(), ns, "o", proxy.Mend{Leave: func(id string) bool { return id == "disk-01" }, To: to})
		must(t, err)
		return done, r.shards()["o"]
	}
	if done, now := mend("disk-03"); done != (proxy.Mended{}) || !slices.Equal(now, before) {
		t.Errorf("to a host that has a shard: %+v, %v, was %v", done, now, before)
	}
	want := slices.Clone(before)
	want[slices.Index(want, "disk-01")] = "disk-04"
	if done, now := mend("disk-04"); done.Shards != 1 || !slices.Equal(now, want) {
		t.Errorf("to another disk of the host: %+v, %v, want %v", done, now, want)
	}
	r.expectAll(r.p)
	r.settle()
	r.expectClean()
}

// shards returns the devices of each object's shards.
func (r *rig) shards() map[string][]string {
	r.t.Helper()
	kvs, err := r.Reg.List(r.t.Context(), alba.ObjectPrefix)
	must(r.t, err)
	all := map[string][]string{}
	for _, kv := range kvs {
		m, err := alba.DecodeManifest(kv.Value)
		must(r.t, err)
		all[m.Object] = m.Shards
	}
	return all
}

// TestRun: the goroutines find by themselves what is to be done, and end.
func TestRun(t *testing.T) {
	r := newRig(t, 6, albatest.Preset(alba.Policy{K: 3, M: 2, C: 5, X: 1}), func(o *repair.Options) { o.Interval = 10 * time.Millisecond })
	for i := range 5 {
		r.put(fmt.Sprint("o", i), 30_000)
	}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan struct{})
	go func() { r.m.Run(ctx); close(ended) }()
	must(t, r.p.SetDeviceState(ctx, r.Disks[3].ID, alba.DeviceRemoved))
	must(t, r.m.Start(ctx, repair.JobVerify))
	must(t, r.m.Start(ctx, repair.JobRebalance))
	albatest.Eventually(t, "repaired, verified, balanced", func() bool {
		st, err := r.m.Status(ctx)
		must(t, err)
		jobs, err := r.m.Jobs(ctx)
		must(t, err)
		done := 0
		for _, j := range jobs {
			if j.State == repair.JobDone {
				done++
			}
		}
		return st.Classes[0].Disks[2] == 5 && done == 4
	})
	if err := r.m.Start(ctx, "nonsense"); !errors.Is(err, repair.ErrNoJob) {
		t.Errorf("started nonsense: %v", err)
	}
	cancel()
	albatest.Await(t, ended, "the end of Run")
	r.expectAll(r.p)
}
