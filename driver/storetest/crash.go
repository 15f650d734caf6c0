package storetest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"

	"scoria/alba/vfs"
	"scoria/driver"
)

// RunCrash tests stores on a vfs.FS: open opens the one in the FS, made before or
// not. A sequence of puts, deletes and fences loses its power, or its process,
// before every single call on the file system; what was acknowledged must then
// be there and what was under way be there wholly or not at all.
func RunCrash(t *testing.T, open func(fsys vfs.FS) (driver.Store, error)) {
	RunCrashEvery(t, 1, open)
}

// RunCrashEvery is RunCrash for stores that take long to open: only every so many
// calls on the file system something happens, at others in each run. Stores that
// are io.Closers are closed.
func RunCrashEvery(t *testing.T, stride int, open func(fsys vfs.FS) (driver.Store, error)) {
	for seed := range uint64(6) {
		t.Run(fmt.Sprint("seed", seed), func(t *testing.T) { crashEverywhere(t, seed, stride, open) })
	}
	t.Run("FailingDisk", func(t *testing.T) { failEverywhere(t, stride, open) })
}

func closeStore(s driver.Store) {
	if c, ok := s.(io.Closer); ok {
		_ = c.Close() // of a dead file system, perhaps
	}
}

// promise is what a store has acknowledged so far. A store may use the file system
// from goroutines of its own, where the hook looks at it.
type promise struct {
	mu      sync.Mutex
	objects map[string][]byte // must be there
	absent  map[string]bool   // must not
	epoch   uint64
	// pending is the call under way: name may hold data, or be absent, and the
	// epoch may be pendingEpoch.
	name         string
	data         []byte
	pendingEpoch uint64
}

// script carries random calls out and keeps the promise up to date. It stops at
// the first error.
func script(s driver.Store, p *promise, rng *rand.Rand, calls int) error {
	ctx := context.Background()
	p.objects, p.absent = make(map[string][]byte), make(map[string]bool)
	if err := s.CreateNamespace(ctx, namespace); err != nil {
		return err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	// The store's calls run without the lock.
	call := func(fn func() error) error {
		p.mu.Unlock()
		defer p.mu.Lock()
		return fn()
	}
	p.pendingEpoch = 1
	for i := range calls {
		var err error
		switch kind := rng.IntN(10); {
		case kind < 6 || len(p.objects) == 0:
			name := fmt.Sprintf("o%d", i)
			data := pattern(rng.Uint64(), rng.IntN(20_000))
			p.name, p.data = name, data
			epoch := p.epoch
			if err = call(func() error { return s.Put(ctx, namespace, name, epoch, object(data)) }); err == nil {
				p.objects[name] = data
			}
		case kind < 8:
			p.name = pick(p.objects, rng)
			p.data = p.objects[p.name]
			delete(p.objects, p.name)
			name, epoch := p.name, p.epoch
			if err = call(func() error { return s.Delete(ctx, namespace, name, epoch) }); err == nil {
				p.absent[p.name] = true
			}
		default:
			p.pendingEpoch = p.epoch + 1
			epoch := p.pendingEpoch
			if err = call(func() error { return s.Fence(ctx, namespace, epoch) }); err == nil {
				p.epoch = p.pendingEpoch
			}
		}
		if err != nil {
			return err
		}
		p.name, p.data, p.pendingEpoch = "", nil, p.epoch
	}
	return nil
}

func pick(objects map[string][]byte, rng *rand.Rand) string {
	names := make([]string, 0, len(objects))
	for name := range objects {
		names = append(names, name)
	}
	slices.Sort(names)
	return names[rng.IntN(len(names))]
}

func crashEverywhere(t *testing.T, seed uint64, stride int, open func(fsys vfs.FS) (driver.Store, error)) {
	const calls = 12
	m := vfs.NewMem()
	s, err := open(m)
	must(t, err)
	defer closeStore(s)
	p := new(promise)
	count := 0
	created := false
	m.SetHook(func(vfs.Op, string) error {
		p.mu.Lock()
		defer p.mu.Unlock()
		count++
		if created = created || p.pendingEpoch > 0; !created || (uint64(count)+seed)%uint64(stride) != 0 {
			return nil
		}
		rng := rand.New(rand.NewPCG(seed, uint64(count)))
		for range 2 {
			clone, where := m.CrashClone(rng), fmt.Sprintf("seed %d, power lost before call %d", seed, count)
			if t.Failed() {
				return nil
			}
			// The hook runs on whatever goroutine called; a failure ends this one.
			done := make(chan struct{})
			go func() { defer close(done); verify(t, clone, p, open, where) }()
			<-done
		}
		return nil
	})
	must(t, script(s, p, rand.New(rand.NewPCG(seed, 0)), calls))
	m.SetHook(nil)
	total := count
	verify(t, m.CrashClone(rand.New(rand.NewPCG(seed, 0))), p, open, "power lost at the end")

	for at := 1 + int(seed)%stride; at <= total; at += 3 * stride {
		killAt(t, seed, at, calls, open)
	}
}

// killAt kills the process before the at-th call on the file system, then lets
// the next one lose its power.
func killAt(t *testing.T, seed uint64, at, calls int, open func(fsys vfs.FS) (driver.Store, error)) {
	m := vfs.NewMem()
	s, err := open(m)
	must(t, err)
	defer closeStore(s)
	p := new(promise)
	count := 0
	var clone *vfs.Mem
	m.SetHook(func(vfs.Op, string) error {
		p.mu.Lock()
		defer p.mu.Unlock()
		if count++; count == at {
			clone, err = m.KillClone()
		}
		return nil
	})
	runErr := script(s, p, rand.New(rand.NewPCG(seed, 0)), calls)
	m.SetHook(nil)
	must(t, err)
	if clone == nil || p.pendingEpoch == 0 {
		return // the end, or not even the namespace was there
	}
	// No error: it was killed behind the last call, while it still had work of its own.
	if runErr != nil && !errors.Is(runErr, vfs.ErrKilled) {
		t.Fatalf("seed %d: killed before call %d, then: %v", seed, at, runErr)
	}
	where := fmt.Sprintf("seed %d, killed before call %d", seed, at)
	// Repeating what was under way must make it durable.
	if p.name != "" && p.objects[p.name] == nil && !p.absent[p.name] {
		s, err := open(clone)
		must(t, err)
		err = s.Put(context.Background(), namespace, p.name, p.pendingEpoch, object(p.data))
		closeStore(s)
		must(t, err)
		p.objects[p.name] = p.data
		p.name = ""
	}
	verify(t, clone.CrashClone(rand.New(rand.NewPCG(seed, uint64(at)))), p, open, where+", then power lost")
	verify(t, clone, p, open, where)
}

// verify opens what a crash left and holds it against the promise.
func verify(t *testing.T, m *vfs.Mem, p *promise, open func(fsys vfs.FS) (driver.Store, error), where string) {
	t.Helper()
	ctx := context.Background()
	s, err := open(m)
	if err != nil {
		t.Fatalf("%s: %v", where, err)
	}
	defer closeStore(s)
	want := func(err, target error) {
		t.Helper()
		if !errors.Is(err, target) {
			t.Fatalf("%s: error %v, want %v", where, err, target)
		}
	}
	names, err := s.List(ctx, namespace, "")
	want(err, nil)
	for name, data := range p.objects {
		got := make([]byte, len(data))
		want(s.ReadAt(ctx, namespace, name, got, 0), nil)
		if size, _ := s.Size(ctx, namespace, name); !bytes.Equal(got, data) || size != int64(len(data)) {
			t.Fatalf("%s: %s has %d wrong bytes, want %d", where, name, size, len(data))
		}
	}
	for _, name := range names {
		switch {
		case p.objects[name] != nil:
		case name != p.name:
			t.Fatalf("%s: %s is there", where, name)
		default:
			got := make([]byte, len(p.data))
			want(s.ReadAt(ctx, namespace, name, got, 0), nil)
			if size, _ := s.Size(ctx, namespace, name); !bytes.Equal(got, p.data) || size != int64(len(p.data)) {
				t.Fatalf("%s: %s is torn: %d bytes", where, name, size)
			}
		}
	}
	if p.epoch > 0 {
		want(s.Put(ctx, namespace, "stale", p.epoch-1, object(nil)), driver.ErrStaleEpoch)
	}
	want(s.Fence(ctx, namespace, max(p.pendingEpoch, 1)), nil)
	want(s.Put(ctx, namespace, "fresh", max(p.pendingEpoch, 1), object([]byte("fresh"))), nil)
}

// failEverywhere lets each single call on the file system fail once. The store's
// call fails then, or did not need it; nothing acknowledged is lost.
func failEverywhere(t *testing.T, stride int, open func(fsys vfs.FS) (driver.Store, error)) {
	bad := errors.New("injected failure")
	for at := 1; ; at += stride {
		m := vfs.NewMem()
		s, err := open(m)
		must(t, err)
		p := new(promise)
		count := 0
		m.SetHook(func(vfs.Op, string) error {
			p.mu.Lock()
			defer p.mu.Unlock()
			if count++; count == at {
				return bad
			}
			return nil
		})
		err = script(s, p, rand.New(rand.NewPCG(1, 1)), 8)
		m.SetHook(nil)
		closeStore(s)
		if err != nil && !errors.Is(err, bad) {
			t.Fatalf("call %d failed, the store says: %v", at, err)
		}
		if p.pendingEpoch > 0 {
			verify(t, m.CrashClone(rand.New(rand.NewPCG(1, uint64(at)))), p, open, fmt.Sprintf("call %d failed", at))
		}
		if count < at {
			return
		}
	}
}
