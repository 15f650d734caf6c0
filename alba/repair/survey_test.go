package repair_test

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"scoria/alba"
	"scoria/alba/albatest"
	"scoria/alba/proxy"
	"scoria/alba/repair"
)

// paged is a registry that lists in parts of at most three keys, and counts.
type paged struct {
	alba.Registry
	largest, lists atomic.Int64 // of objects
}

func (p *paged) List(ctx context.Context, prefix string) ([]alba.KV, error) {
	if strings.HasPrefix(prefix, alba.ObjectPrefix) {
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

// TestSurveyByPages: a pass sees every object although it never lists all of them.
func TestSurveyByPages(t *testing.T) {
	r := newRig(t, 5, albatest.Preset(alba.Policy{K: 2, M: 2, C: 4, X: 1}), nil)
	for i := range 10 {
		r.put(fmt.Sprint("o", i), 20_000)
	}
	reg := &paged{Registry: r.Reg}
	p, err := proxy.New(t.Context(), proxy.Options{Registry: reg, Dial: r.Dial, Node: "other", Preset: "p", Keys: albatest.Keys(t, "a")})
	must(t, err)
	t.Cleanup(p.Close)
	m := repair.New(repair.Options{Proxy: p, DownAfter: time.Hour})
	must(t, p.SetDeviceState(t.Context(), r.Disks[0].ID, alba.DeviceRemoved))
	albatest.Eventually(t, "all is repaired", func() bool {
		report, err := m.Pass(t.Context())
		must(t, err)
		if report.Objects != 10 {
			t.Fatalf("a pass looked at %d objects of 10", report.Objects)
		}
		return report.Left == 0
	})
	if reg.lists.Load() > 0 || reg.largest.Load() == 0 {
		t.Errorf("%d lists of all objects, pages of up to %d", reg.lists.Load(), reg.largest.Load())
	}
	r.expectSafe(2)
	r.expectAll(r.p)
}
