package lba

import (
	"context"
	"errors"
	"math/rand/v2"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
)

// TestP2CheckpointUnderLoad has writers and readers run while checkpoints are
// written; only beginnings and discards exclude the writers, as the gate does.
func TestP2CheckpointUnderLoad(t *testing.T) {
	const clusters, writers, rounds = 64 * LeafClusters, 3, 30
	m, store := newMap(t, clusters), newPageStore()
	var gate sync.RWMutex
	var seq counter
	stop := make(chan struct{})
	var wg sync.WaitGroup
	for w := range writers {
		wg.Go(func() { hammer(t, m, &gate, &seq, rand.New(rand.NewPCG(uint64(w), 9)), stop) })
	}
	wg.Go(func() { watchGrowth(t, m, stop) })
	rng := rand.New(rand.NewPCG(77, 1))
	for round := range uint32(rounds) {
		gate.Lock()
		if round%3 == 0 {
			m.Clear(rng.Uint64N(clusters), rng.Uint64N(8*LeafClusters), nil)
		}
		asOf := contents(t, m, store)
		c := m.BeginCheckpoint()
		gate.Unlock()
		err := c.WritePages(func(leaf uint64, page []byte) (PageAddr, error) {
			if leaf%8 == 0 {
				gate.Lock()
				m.Clear(rng.Uint64N(clusters), 2*LeafClusters, nil)
				gate.Unlock()
			}
			return store.put(round+1, page), nil
		})
		if err != nil {
			t.Fatal(err)
		}
		saved := save(c)
		restored := newMap(t, clusters)
		if err := restored.RestoreDirectory(saved.entries, saved.mapped); err != nil {
			t.Fatal(err)
		}
		if d := diff(asOf, contents(t, restored, store)); d != "" {
			t.Fatalf("round %d: %s", round, d)
		}
		if uint64(len(asOf)) != saved.mapped {
			t.Fatalf("round %d: %d mapped, should be %d", round, saved.mapped, len(asOf))
		}
		if round%4 == 3 {
			c.Abort()
		} else {
			c.Commit()
		}
	}
	close(stop)
	wg.Wait()
	if got := contents(t, m, store); uint64(len(got)) != m.Mapped() {
		t.Fatalf("%d mapped, counted %d", len(got), m.Mapped())
	}
	checkBooks(t, m)
}

// hammer sets random clusters to growing locations and checks its own effect.
func hammer(t *testing.T, m *Map, gate *sync.RWMutex, seq *counter, rng *rand.Rand, stop chan struct{}) {
	for {
		select {
		case <-stop:
			return
		default:
		}
		gate.RLock()
		for range 20 {
			lba := rng.Uint64N(m.Clusters())
			// The low bits name the leaf, so that a reader can tell a stray value.
			loc := Location(seq.Add(1))<<20 | Location(lba/LeafClusters+1)
			garbage, ok := m.Set(lba, loc)
			if now, _ := m.Get(lba); !ok || garbage > loc || now < loc {
				t.Errorf("set %d to %d: garbage %d, now %d, %v", lba, loc, garbage, now, ok)
			}
		}
		gate.RUnlock()
	}
}

// watchGrowth reads without the gate: each value belongs to its leaf.
func watchGrowth(t *testing.T, m *Map, stop chan struct{}) {
	rng := rand.New(rand.NewPCG(5, 5))
	var dst [32]Location
	for {
		select {
		case <-stop:
			return
		default:
		}
		lba := rng.Uint64N(m.Clusters())
		dst[0], _ = m.Get(lba)
		n := max(m.GetRange(lba, dst[:rng.IntN(len(dst))]), 1)
		for i, loc := range dst[:n] {
			if leaf := (lba + uint64(i)) / LeafClusters; loc != 0 && uint64(loc&0xfffff) != leaf+1 {
				t.Errorf("leaf %d shows location %#x of leaf %d", leaf, uint64(loc), loc&0xfffff-1)
				return
			}
		}
	}
}

// TestReadersNeverSeeAnotherLeaf passes one page from leaf to leaf under the
// eyes of readers that hold no lock.
func TestReadersNeverSeeAnotherLeaf(t *testing.T) {
	const leaves = 3
	m := newMap(t, leaves*LeafClusters)
	stop := make(chan struct{})
	var wg sync.WaitGroup
	var reads atomic.Int64
	for r := range 2 {
		wg.Go(func() {
			var dst [LeafClusters]Location
			for lba := uint64(r); ; lba = (lba + 1) % m.Clusters() {
				select {
				case <-stop:
					return
				default:
				}
				leaf := lba / LeafClusters
				for range 64 {
					if loc, _ := m.Get(lba); loc != 0 && uint64(loc&0xff) != leaf+1 {
						t.Errorf("Get in leaf %d returned %#x", leaf, uint64(loc))
						return
					}
				}
				m.GetRange(leaf*LeafClusters, dst[:])
				for _, loc := range dst {
					if loc != 0 && uint64(loc&0xff) != leaf+1 {
						t.Errorf("GetRange in leaf %d returned %#x", leaf, uint64(loc))
						return
					}
				}
				reads.Add(1)
			}
		})
	}
	within(t, func() { passOnePageAround(m, func() bool { return reads.Load() < 100 && !t.Failed() }) })
	close(stop)
	wg.Wait()
}

// passOnePageAround fills and empties random leaves, at least 20 000 times.
func passOnePageAround(m *Map, more func() bool) {
	rng := rand.New(rand.NewPCG(8, 8))
	for i := Location(1); i < 20_000 || more(); i++ {
		leaf := rng.Uint64N(m.Clusters() / LeafClusters)
		for range 8 {
			m.Set(leaf*LeafClusters+rng.Uint64N(LeafClusters), i<<8|Location(leaf+1))
		}
		m.BeginCheckpoint().Abort()
		m.Clear(leaf*LeafClusters, LeafClusters, nil)
		if i%64 == 0 {
			runtime.Gosched()
		}
	}
}

func TestConcurrentLoadsOfALeafAreShared(t *testing.T) {
	store := newPageStore()
	first := newMap(t, 100*LeafClusters)
	for leaf := range uint64(100) {
		set(t, first, leaf*LeafClusters, Location(leaf+1))
	}
	m := reopened(t, first, store)
	if _, ok := m.Set(0, 9); ok || m.GetRange(0, make([]Location, 5)) != 0 || m.Clear(0, 1, nil) {
		t.Fatal("a leaf that is not loaded was used")
	}
	within(t, func() {
		var wg sync.WaitGroup
		for range 5 {
			wg.Go(func() {
				if err := m.Load(background, store, 0, 100*LeafClusters); err != nil {
					t.Error(err)
				}
			})
		}
		wg.Wait()
	})
	if store.reads != 100 || !m.Resident(0, 100*LeafClusters) {
		t.Fatalf("%d reads for 100 leaves", store.reads)
	}
	if d := diff(contents(t, first, store), contents(t, m, store)); d != "" {
		t.Fatal(d)
	}
	if m.Stats().DirtyPages != 0 || m.Stats().ResidentPages != 100 {
		t.Fatalf("after loading: %+v", m.Stats())
	}
}

// TestLoadCanceledByAnother: who waits for a load that its owner cancels does
// the load itself.
func TestLoadCanceledByAnother(t *testing.T) {
	store := newPageStore()
	first := newMap(t, 2*LeafClusters)
	set(t, first, 0, 5)
	m := reopened(t, first, store)
	owner, cancel := context.WithCancel(background)
	entered := make(chan struct{})
	var once sync.Once
	store.hook = func() {
		once.Do(func() { close(entered); <-owner.Done() })
	}
	within(t, func() {
		var wg sync.WaitGroup
		wg.Go(func() {
			if err := m.Load(owner, store, 0, 1); !errors.Is(err, context.Canceled) {
				t.Errorf("canceled load: %v", err)
			}
		})
		<-entered
		impatient, giveUp := context.WithCancel(background)
		giveUp()
		if err := m.Load(impatient, store, 0, 1); !errors.Is(err, context.Canceled) {
			t.Errorf("a canceled wait: %v", err)
		}
		wg.Go(func() {
			if err := m.Load(background, store, 0, 1); err != nil {
				t.Errorf("patient load: %v", err)
			}
		})
		cancel()
		wg.Wait()
	})
	if loc, ok := m.Get(0); loc != 5 || !ok {
		t.Fatalf("loaded %v, %v", loc, ok)
	}
}

// TestMarkObjectDirtyUnderLoad empties objects while writers and checkpoints go on.
func TestMarkObjectDirtyUnderLoad(t *testing.T) {
	const leaves = 200
	store := newPageStore()
	first := newMap(t, leaves*LeafClusters)
	for leaf := range uint64(leaves) {
		set(t, first, leaf*LeafClusters+leaf, Location(leaf+1))
	}
	m := reopened(t, first, store)
	if m.LivePages(1) != leaves {
		t.Fatalf("%d live pages", m.LivePages(1))
	}
	rng := rand.New(rand.NewPCG(1, 1))
	want := contents(t, first, store)
	var gate sync.RWMutex
	within(t, func() {
		var wg sync.WaitGroup
		wg.Go(func() {
			for object := uint32(1); object < 20; object++ {
				if err := m.MarkObjectDirty(background, store, object); err != nil {
					t.Error(err)
				}
			}
		})
		for object := uint32(2); object < 20; object++ {
			for range 50 {
				lba, loc := rng.Uint64N(m.Clusters()), Location(object)<<32|Location(rng.Uint32())
				if err := m.Load(background, store, lba, 1); err != nil {
					t.Error(err)
					return
				}
				gate.RLock()
				if m.Set(lba, loc); want[lba] < loc {
					want[lba] = loc
				}
				gate.RUnlock()
			}
			gate.Lock()
			c := m.BeginCheckpoint()
			gate.Unlock()
			_ = c.WritePages(func(_ uint64, page []byte) (PageAddr, error) { return store.put(object, page), nil })
			c.Commit()
		}
		wg.Wait()
	})
	if err := m.MarkObjectDirty(background, store, 1); err != nil {
		t.Fatal(err)
	}
	checkpointed(t, m, store, 30)
	if m.LivePages(1) != 0 {
		t.Fatalf("%d live pages in the object that was emptied", m.LivePages(1))
	}
	store.deleteDead(m)
	if d := diff(want, contents(t, reopened(t, m, store), store)); d != "" {
		t.Fatal(d)
	}
}
