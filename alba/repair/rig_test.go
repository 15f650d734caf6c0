package repair_test

import (
	"bytes"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/rs/zerolog"

	"scoria/alba"
	"scoria/alba/albatest"
	"scoria/alba/proxy"
	"scoria/alba/repair"
)

const ns = "9b2f0c4e-5d1a-4a63-8f5e-2f1f4f1f7a10"

// dying is a daemon that dies at a step: that one fails, and all that follow.
type dying struct {
	at int

	mu    sync.Mutex
	steps int
}

func (d *dying) step() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.steps++; d.steps >= d.at {
		return errors.New("died")
	}
	return nil
}

// over says that there were fewer steps: all of them were tried.
func (d *dying) over() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.steps < d.at
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// rig is a cluster with a proxy, its maintainer, and objects that are known.
type rig struct {
	t testing.TB
	*albatest.Cluster
	p       *proxy.Proxy
	m       *repair.Maintainer
	faults  *repair.Faults
	objects map[string][]byte
}

func newRig(t testing.TB, disks int, ps alba.Preset, change func(o *repair.Options)) *rig {
	r := &rig{t: t, Cluster: albatest.NewCluster(disks, disks), faults: repair.NewFaults(), objects: map[string][]byte{}}
	r.p = r.Proxy(t, ps, func(o *proxy.Options) { o.Report, o.Keys = r.faults.Add, albatest.Keys(t, "a") })
	r.m = r.maintainer(r.p, change)
	must(t, r.p.CreateNamespace(t.Context(), ns))
	return r
}

func (r *rig) maintainer(p *proxy.Proxy, change func(o *repair.Options)) *repair.Maintainer {
	o := repair.Options{Proxy: p, Faults: r.faults, DownAfter: time.Hour, Log: zerolog.Nop()}
	if change != nil {
		change(&o)
	}
	return repair.New(o)
}

func (r *rig) put(name string, size int) {
	r.t.Helper()
	b := albatest.Pattern(uint64(len(r.objects)+1), size)
	must(r.t, r.p.Put(r.t.Context(), ns, name, 1, bytes.NewReader(b), int64(len(b))))
	r.objects[name] = b
}

func (r *rig) expectAll(p *proxy.Proxy) {
	r.t.Helper()
	for name, b := range r.objects {
		got := make([]byte, len(b))
		if err := p.ReadAt(r.t.Context(), ns, name, got, 0); err != nil {
			r.t.Fatal(err)
		}
		if !bytes.Equal(got, b) {
			r.t.Fatalf("%s: wrong bytes", name)
		}
	}
}

// pass repairs until nothing is left to do.
func (r *rig) pass() {
	r.t.Helper()
	albatest.Eventually(r.t, "all is repaired", func() bool {
		r.p.Fleet().Poll(r.t.Context())
		report, err := r.m.Pass(r.t.Context())
		must(r.t, err)
		return report.Left == 0
	})
}

// expectSafe: every object can lose so many more disks, once those that were healed
// are known to be.
func (r *rig) expectSafe(spare int) {
	r.t.Helper()
	var st repair.Status
	albatest.Eventually(r.t, fmt.Sprintf("all objects can lose %d disks", spare), func() bool {
		r.p.Fleet().Poll(r.t.Context())
		var err error
		st, err = r.m.Status(r.t.Context())
		must(r.t, err)
		var n int64
		for _, c := range st.Classes {
			n += c.Disks[spare]
		}
		return n == int64(len(r.objects))
	})
}

// expectClean: what lies on the devices is what manifests speak of, and all of it.
func (r *rig) expectClean() {
	r.t.Helper()
	kvs, err := r.Reg.List(r.t.Context(), alba.ObjectPrefix)
	must(r.t, err)
	want := map[string]bool{}
	for _, kv := range kvs {
		m, err := alba.DecodeManifest(kv.Value)
		must(r.t, err)
		for i, id := range m.Shards {
			if id == "" {
				continue
			}
			want[id+" "+alba.ShardKey(m.NamespaceID, m.Upload, i)] = true
			for c := range m.Layout().Chunks() {
				want[id+" "+alba.FragmentKey(m.NamespaceID, m.Upload, i, c)] = true
			}
		}
	}
	for _, key := range r.keys(alba.FragmentPrefix, alba.ShardPrefix, alba.TombstonePrefix) {
		if !want[key] {
			r.t.Errorf("%s is left", key)
		}
		delete(want, key)
	}
	for key := range want {
		r.t.Errorf("%s is missing", key)
	}
	for _, prefix := range []string{alba.IntentPrefix, alba.TrashPrefix} {
		if kvs, err := r.Reg.List(r.t.Context(), prefix); err != nil || len(kvs) > 0 {
			r.t.Errorf("%d of %s are left: %v", len(kvs), prefix, err)
		}
	}
}

// keys of all devices that are in use, with the device before each.
func (r *rig) keys(prefixes ...string) []string {
	var list []string
	for _, d := range r.p.Fleet().Members() {
		id := d.Record().ID
		if d.Record().State == alba.DeviceRemoved {
			continue
		}
		for _, info := range r.Disk(id).Keys(r.t) {
			for _, p := range prefixes {
				if strings.HasPrefix(info, p) {
					list = append(list, id+" "+info)
				}
			}
		}
	}
	return list
}

// settle waits for uploads and purges in the background.
func (r *rig) settle() {
	r.t.Helper()
	albatest.Eventually(r.t, "background work is done", func() bool {
		_, err := r.m.Collect(r.t.Context())
		must(r.t, err)
		for _, prefix := range []string{alba.IntentPrefix, alba.TrashPrefix} {
			if kvs, err := r.Reg.List(r.t.Context(), prefix); err != nil || len(kvs) > 0 {
				return false
			}
		}
		return true
	})
	r.pass()
	_, err := r.m.Collect(r.t.Context())
	must(r.t, err)
}
