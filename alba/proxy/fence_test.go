package proxy_test

import (
	"bytes"
	"errors"
	"strings"
	"sync/atomic"
	"testing"

	"scoria/alba"
	"scoria/alba/albatest"
	"scoria/alba/proxy"
)

// TestP4FencedAtTheCommit: an owner that is fenced between its last look at the epoch
// and its commit can neither store nor delete, and a namespace that is deleted then
// stays so.
func TestP4FencedAtTheCommit(t *testing.T) {
	for what, call := range map[string]func(p *proxy.Proxy) error{
		"put": func(p *proxy.Proxy) error {
			return p.Put(t.Context(), ns, "new", 1, bytes.NewReader([]byte("x")), 1)
		},
		"delete": func(p *proxy.Proxy) error { return p.Delete(t.Context(), ns, "old", 1) },
	} {
		t.Run(what, func(t *testing.T) {
			c := albatest.NewCluster(3, 3)
			ps := albatest.Preset(alba.Policy{K: 2, M: 1, C: 3, X: 1})
			p, next := c.Proxy(t, ps, nil), c.Proxy(t, ps, nil)
			must(t, p.CreateNamespace(t.Context(), ns))
			put(t, p, "old", []byte("x"))
			var fenced atomic.Bool
			c.Reg.SetHook(func(writes []alba.Write) error {
				for _, w := range writes {
					if strings.HasPrefix(w.Key, alba.ObjectPrefix) && fenced.CompareAndSwap(false, true) {
						return next.Fence(t.Context(), ns, 2)
					}
				}
				return nil
			})
			if err := call(p); !errors.Is(err, proxy.ErrStaleEpoch) || !fenced.Load() {
				t.Fatalf("fenced %v, then: %v", fenced.Load(), err)
			}
			expect(t, next, "old", []byte("x"))
			if _, err := next.Size(t.Context(), ns, "new"); !errors.Is(err, proxy.ErrNoObject) {
				t.Fatalf("the stale owner's object: %v", err)
			}
			noLeftovers(t, c, next)
		})
	}
}

// TestDeletedAtTheCommit: an upload into a namespace that is deleted, and made again,
// before it commits is refused.
func TestDeletedAtTheCommit(t *testing.T) {
	c := albatest.NewCluster(3, 3)
	ps := albatest.Preset(alba.Policy{K: 2, M: 1, C: 3, X: 1})
	p, next := c.Proxy(t, ps, nil), c.Proxy(t, ps, nil)
	must(t, p.CreateNamespace(t.Context(), ns))
	var deleted atomic.Bool
	c.Reg.SetHook(func(writes []alba.Write) error {
		for _, w := range writes {
			if strings.HasPrefix(w.Key, alba.ObjectPrefix) && deleted.CompareAndSwap(false, true) {
				return errors.Join(next.DeleteNamespace(t.Context(), ns), next.CreateNamespace(t.Context(), ns))
			}
		}
		return nil
	})
	if err := p.Put(t.Context(), ns, "o", 1, bytes.NewReader([]byte("x")), 1); !errors.Is(err, proxy.ErrNoNamespace) {
		t.Fatalf("put into a namespace that was deleted: %v", err)
	}
	if names, err := next.List(t.Context(), ns, ""); err != nil || len(names) != 0 {
		t.Fatalf("objects %q: %v", names, err)
	}
	noLeftovers(t, c, next)
}
