package lba

import (
	"errors"
	"math/rand/v2"
	"sync"
	"testing"
)

// TestDiff: what Diff reports is what differs, it reads no page that both sides have
// in common, and it covers the range without gaps.
func TestDiff(t *testing.T) {
	const clusters = 40*LeafClusters + 17
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 1))
	m, store := newMap(t, clusters), newPageStore()
	next := uint64(1)
	change := func(n int) {
		for range n {
			at := rng.Uint64N(clusters)
			if rng.IntN(8) == 0 {
				m.Clear(at, rng.Uint64N(LeafClusters*2), nil)
				continue
			}
			for i := range min(1+rng.Uint64N(700), clusters-at) {
				set(t, m, at+i, MakeLocation(next, uint32(i)))
			}
			next++
		}
	}
	change(20)
	for round := range uint32(12) {
		old := reopened(t, m, store)
		if rng.IntN(3) > 0 {
			change(rng.IntN(6))
		}
		if rng.IntN(2) == 0 {
			checkpointed(t, m, store, 2*round+2)
		}
		a, b := contents(t, old, store), contents(t, m, store)
		from := rng.Uint64N(clusters)
		n := rng.Uint64N(clusters)
		at, last := from, false
		err := m.Diff(t.Context(), store, old, from, n, func(lba, n uint64, differs bool) bool {
			if lba != at || n == 0 || lba > from && differs == last {
				t.Fatalf("round %d: run of %d at %d (%v) behind %d (%v)", round, n, lba, differs, at, last)
			}
			for c := lba; c < lba+n; c++ {
				if (a[c] != b[c]) != differs {
					t.Fatalf("round %d: cluster %d: %v and %v, differs %v", round, c, a[c], b[c], differs)
				}
			}
			at, last = lba+n, differs
			return true
		})
		if want := min(from+n, clusters); err != nil || at != want {
			t.Fatalf("round %d: %v, ended at %d, want %d", round, err, at, want)
		}
		calls := 0
		if err := m.Diff(t.Context(), store, nil, 0, clusters, func(_, _ uint64, differs bool) bool { calls++; return false }); err != nil || calls != 1 {
			t.Fatalf("%d calls, %v", calls, err)
		}
		old.Close()
	}
	old := reopened(t, m, store)
	store.fail = errors.New("it was read")
	if err := m.Diff(t.Context(), store, old, 0, clusters, func(_, _ uint64, differs bool) bool { return !differs }); err != nil {
		t.Errorf("pages of a map that has not changed were read: %v", err)
	}
}

// TestRevert: a map becomes what a directory says while others read and load.
func TestRevert(t *testing.T) {
	const clusters = 30 * LeafClusters
	m, store := newMap(t, clusters), newPageStore()
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 1))
	next := uint64(1)
	scribble := func() {
		for range 30 {
			at := rng.Uint64N(clusters)
			for i := range min(1+rng.Uint64N(900), clusters-at) {
				for {
					if _, ok := m.Set(at+i, MakeLocation(next, uint32(i))); ok {
						break
					}
					if err := m.Load(t.Context(), store, at+i, 1); err != nil {
						t.Fatal(err)
					}
				}
			}
			next++
		}
	}
	scribble()
	saved := checkpointed(t, m, store, 1)
	want := contents(t, m, store)
	stop := make(chan struct{})
	var wg sync.WaitGroup
	for i := range 3 {
		wg.Go(func() {
			rng := rand.New(rand.NewPCG(seed, uint64(i)+2))
			for {
				select {
				case <-stop:
					return
				default:
				}
				c := rng.Uint64N(clusters)
				if _, ok := m.Get(c); !ok {
					if err := m.Load(t.Context(), store, c, 1+rng.Uint64N(2000)); err != nil {
						t.Error(err)
						return
					}
				}
			}
		})
	}
	for round := range uint32(40) {
		scribble()
		if round%2 == 0 {
			checkpointed(t, m, store, round+2)
		}
		m.Revert(saved.entries, saved.mapped)
		if d := diff(want, contents(t, m, store)); d != "" {
			t.Fatalf("round %d: %s", round, d)
		}
		if m.Mapped() != saved.mapped || m.Stats().DirtyPages != 0 {
			t.Fatalf("round %d: %d mapped, %+v", round, m.Mapped(), m.Stats())
		}
	}
	close(stop)
	wg.Wait()
	checkBooks(t, m)
}
