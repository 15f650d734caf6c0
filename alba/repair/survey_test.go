package repair_test

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync/atomic"
	"testing"

	"scoria/alba"
	"scoria/alba/albatest"
	"scoria/alba/asd/asdtest"
	"scoria/alba/proxy"
)

// paged is a registry that lists in parts of at most three keys, and counts.
type paged struct {
	alba.Registry
	largest, lists atomic.Int64 // of objects and trash
}

func (p *paged) List(ctx context.Context, prefix string) ([]alba.KV, error) {
	if strings.HasPrefix(prefix, alba.ObjectPrefix) || strings.HasPrefix(prefix, alba.TrashPrefix) {
		p.lists.Add(1)
	}
	return p.Registry.List(ctx, prefix)
}

func (p *paged) Page(ctx context.Context, prefix, after string, limit int) ([]alba.KV, bool, error) {
	kvs, err := p.Registry.List(ctx, prefix)
	kvs = slices.DeleteFunc(kvs, func(kv alba.KV) bool { return kv.Key <= after })
	n := min(len(kvs), limit, 3)
	p.largest.Store(max(p.largest.Load(), int64(n)))
	return kvs[:n], n < len(kvs), err
}

// pagedRig is a rig with ten objects, which sees its registry by pages.
func pagedRig(t *testing.T, disks int, policy alba.Policy) (*rig, *paged) {
	r := newRig(t, disks, albatest.Preset(policy), nil)
	for i := range 10 {
		r.put(fmt.Sprint("o", i), 20_000)
	}
	reg := &paged{Registry: r.Reg}
	p, err := proxy.New(t.Context(), proxy.Options{Registry: reg, Dial: r.Dial, Node: "other", Preset: "p", Keys: albatest.Keys(t, "a")})
	must(t, err)
	t.Cleanup(p.Close)
	r.p, r.m = p, r.maintainer(p, nil)
	return r, reg
}

// expectPages: nobody has listed all at once.
func (p *paged) expectPages(t *testing.T) {
	t.Helper()
	if p.lists.Load() > 0 || p.largest.Load() == 0 {
		t.Errorf("%d lists of all objects, pages of up to %d", p.lists.Load(), p.largest.Load())
	}
}

// TestSurveyByPages: a pass sees every object although it never lists all of them.
func TestSurveyByPages(t *testing.T) {
	r, reg := pagedRig(t, 5, alba.Policy{K: 2, M: 2, C: 4, X: 1})
	must(t, r.p.SetDeviceState(t.Context(), r.Disks[0].ID, alba.DeviceRemoved))
	albatest.Eventually(t, "all is repaired", func() bool {
		report, err := r.m.Pass(t.Context())
		must(t, err)
		if report.Objects != 10 {
			t.Fatalf("a pass looked at %d objects of 10", report.Objects)
		}
		return report.Left == 0
	})
	reg.expectPages(t)
	r.expectSafe(2)
	r.expectAll(r.p)
}

// TestDeletedByPages: a namespace of more objects than one transaction takes is deleted
// with all that it has on devices, and what is left in the trash counted, by pages.
func TestDeletedByPages(t *testing.T) {
	r, reg := pagedRig(t, 3, alba.Policy{K: 2, M: 1, C: 3, X: 1})
	kv := mustList(t, r.Reg, alba.ObjectPrefix)[0]
	man, err := alba.DecodeManifest(kv.Value)
	must(t, err)
	const more = alba.MaxCommitWrites + 20
	for i := range more { // as if they had been put
		m := man.Clone()
		m.Upload, m.Object = alba.NewID(), fmt.Sprint("more", i)
		_, err := r.Reg.Commit(t.Context(), nil, []alba.Write{{Key: alba.ObjectKey(m.NamespaceID, m.Object), Value: m.Encode()}})
		must(t, err)
	}
	r.Disks[0].Faulty.Set(asdtest.Fault{Down: true})
	must(t, r.p.DeleteNamespace(t.Context(), ns))
	if list := mustList(t, r.Reg, alba.NamespacePrefix); len(list) > 0 {
		t.Errorf("%s is left", list[0].Key)
	}
	st, err := r.m.Status(t.Context())
	must(t, err)
	if st.Trash != 10+more || st.Intents != 0 || len(st.Classes) != 0 {
		t.Errorf("%d in the trash, %d intents, %d classes of objects", st.Trash, st.Intents, len(st.Classes))
	}
	r.Disks[0].Faulty.Set(asdtest.Fault{})
	clear(r.objects)
	albatest.Eventually(t, "the trash is empty", func() bool {
		r.p.Fleet().Poll(t.Context())
		_, err := r.m.Collect(t.Context())
		must(t, err)
		return len(mustList(t, r.Reg, alba.TrashPrefix)) == 0
	})
	reg.expectPages(t)
	r.expectClean()
}
