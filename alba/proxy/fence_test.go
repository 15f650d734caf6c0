package proxy_test

import (
	"bytes"
	"errors"
	"io"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"scoria/alba"
	"scoria/alba/albatest"
	"scoria/alba/asd"
	"scoria/alba/asd/asdtest"
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

// TestP4Fence: a stale owner is refused by the registry and by each device, also
// when it is paused in the middle of an upload.
func TestP4Fence(t *testing.T) {
	c := albatest.NewCluster(4, 4)
	ps := albatest.Preset(alba.Policy{K: 2, M: 1, C: 3, X: 1})
	old, next := c.Proxy(t, ps, nil), c.Proxy(t, ps, nil)
	must(t, old.CreateNamespace(t.Context(), ns))
	must(t, old.Fence(t.Context(), ns, 1))
	put(t, old, "o", []byte("x"))
	src, resume, result := pausedPut(t, old, "paused")
	must(t, next.Fence(t.Context(), ns, 2))
	close(resume)
	if err := albatest.Await(t, result, "paused put"); !errors.Is(err, proxy.ErrStaleEpoch) {
		t.Fatalf("put of the stale owner: %v", err)
	}
	for _, d := range c.Disks {
		m := manifest(t, c, "o")
		epochs, _, err := d.Model.Epochs(t.Context(), "")
		epochs = slices.DeleteFunc(epochs, func(e asd.NamespaceEpoch) bool { return e.Namespace[0] == '~' })
		if err != nil || len(epochs) != 1 || epochs[0].Epoch != 2 || epochs[0].Namespace != m.NamespaceID.String() {
			t.Errorf("%s has epochs %v: %v", d.ID, epochs, err)
		}
	}
	if err := old.Delete(t.Context(), ns, "o", 1); !errors.Is(err, proxy.ErrStaleEpoch) {
		t.Fatalf("delete by the stale owner: %v", err)
	}
	expect(t, next, "o", []byte("x"))
	must(t, next.Put(t.Context(), ns, "paused", 2, bytes.NewReader(src.b), int64(len(src.b))))
	expect(t, old, "paused", src.b)
	noLeftovers(t, c, next)
}

type pausing struct {
	b              []byte
	at             int64
	once           sync.Once
	paused, resume chan struct{}
}

func (s *pausing) ReadAt(p []byte, off int64) (int, error) {
	if off >= s.at {
		s.once.Do(func() { close(s.paused); <-s.resume })
	}
	n := copy(p, s.b[off:])
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

// pausedPut begins an upload by the owner of epoch 1 and returns when it stands in its
// middle: what it uploads, what to close for it to go on, and where its result comes.
func pausedPut(t *testing.T, p *proxy.Proxy, name string) (src *pausing, resume chan<- struct{}, result <-chan error) {
	t.Helper()
	paused, goOn, done := make(chan struct{}), make(chan struct{}), make(chan error, 1)
	src = &pausing{b: albatest.Pattern(1, 2<<20), at: 1 << 20, paused: paused, resume: goOn}
	go func() { done <- p.Put(t.Context(), ns, name, 1, src, int64(len(src.b))) }()
	albatest.Await(t, paused, "the upload's middle")
	return src, goOn, done
}

// TestP4StaleOwnerOverwrites: a stale owner can't put other contents in the place of an
// object, nor an object of a name that is free, although a device was away when it was
// fenced and takes its fragments; nothing of them is left.
func TestP4StaleOwnerOverwrites(t *testing.T) {
	c := albatest.NewCluster(4, 4)
	ps := albatest.Preset(alba.Policy{K: 2, M: 1, C: 3, X: 1})
	old, next := c.Proxy(t, ps, nil), c.Proxy(t, ps, nil)
	must(t, old.CreateNamespace(t.Context(), ns))
	must(t, old.Fence(t.Context(), ns, 1))
	put(t, old, "o", []byte("x"))
	_, resume, result := pausedPut(t, old, "free")
	c.Disks[0].Faulty.Set(asdtest.Fault{Down: true})
	must(t, next.Fence(t.Context(), ns, 2))
	c.Disks[0].Faulty.Set(asdtest.Fault{})
	close(resume)
	if err := albatest.Await(t, result, "paused put"); !errors.Is(err, proxy.ErrStaleEpoch) {
		t.Fatalf("put of a stale owner: %v", err)
	}
	for _, name := range []string{"o", "free"} {
		if err := old.Put(t.Context(), ns, name, 1, bytes.NewReader([]byte("y")), 1); !errors.Is(err, proxy.ErrStaleEpoch) {
			t.Fatalf("put of %s by the stale owner: %v", name, err)
		}
	}
	expect(t, next, "o", []byte("x"))
	if _, err := next.Size(t.Context(), ns, "free"); !errors.Is(err, proxy.ErrNoObject) {
		t.Fatalf("the stale owner's object: %v", err)
	}
	noLeftovers(t, c, next)
}
