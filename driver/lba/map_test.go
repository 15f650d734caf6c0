package lba

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"runtime"
	"strings"
	"testing"
	"time"
)

var background = context.Background()

func newMap(t testing.TB, clusters uint64) *Map {
	t.Helper()
	m, err := New(clusters)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(m.Close)
	return m
}

// within fails with all goroutines' stacks if f takes too long to be anything but stuck.
func within(t *testing.T, f func()) {
	t.Helper()
	done := make(chan struct{})
	go func() { defer close(done); f() }()
	select {
	case <-done:
	case <-time.After(2 * time.Minute):
		buf := make([]byte, 1<<20)
		t.Fatalf("stuck:\n%s", buf[:runtime.Stack(buf, true)])
	}
}

func set(t testing.TB, m *Map, lba uint64, loc Location) {
	t.Helper()
	if _, ok := m.Set(lba, loc); !ok {
		t.Fatalf("set %d: leaf is not resident", lba)
	}
}

// checkpointed commits a checkpoint of m as that object.
func checkpointed(t testing.TB, m *Map, store *pageStore, object uint32) savedMap {
	t.Helper()
	c := m.BeginCheckpoint()
	if err := c.WritePages(func(_ uint64, page []byte) (PageAddr, error) { return store.put(object, page), nil }); err != nil {
		t.Fatal(err)
	}
	saved := save(c)
	c.Commit()
	return saved
}

// reopened returns a map restored from a checkpoint of m.
func reopened(t testing.TB, m *Map, store *pageStore) *Map {
	t.Helper()
	saved := checkpointed(t, m, store, 1)
	again := newMap(t, m.Clusters())
	if err := again.RestoreDirectory(saved.entries, saved.mapped); err != nil {
		t.Fatal(err)
	}
	return again
}

func TestLocation(t *testing.T) {
	l := MakeLocation(MaxSCO, MaxCluster).WithLevel(MaxLevel)
	if l != ^Location(0) || l.SCO() != MaxSCO || l.Cluster() != MaxCluster || l.Level() != MaxLevel {
		t.Fatalf("largest location %#x", uint64(l))
	}
	l = MakeLocation(5, 6).WithLevel(7)
	if l.SCO() != 5 || l.Cluster() != 6 || l.Level() != 7 || l.WithLevel(0) != MakeLocation(5, 6) {
		t.Fatalf("location %v", l)
	}
	if !(MakeLocation(5, 6) < MakeLocation(5, 7) && MakeLocation(5, MaxCluster).WithLevel(MaxLevel) < MakeLocation(6, 0)) {
		t.Fatal("locations don't grow along the log")
	}
	for want, l := range map[string]Location{"unmapped": 0, "5:6": MakeLocation(5, 6), "5:6@7": l} {
		if l.String() != want {
			t.Fatalf("%q, should be %q", l.String(), want)
		}
	}
	for _, f := range []func(){
		func() { MakeLocation(MaxSCO+1, 0) }, func() { MakeLocation(1, MaxCluster+1) }, func() { l.WithLevel(MaxLevel + 1) },
	} {
		mustPanic(t, f)
	}
	if a := MakePageAddr(3, 4); a.Object() != 3 || a.Page() != 4 || a.String() != "3/4" {
		t.Fatalf("address %v", a)
	}
}

func mustPanic(t *testing.T, f func()) {
	t.Helper()
	defer func() {
		if recover() == nil {
			t.Fatal("no panic")
		}
	}()
	f()
}

func TestMisuseIsNoticed(t *testing.T) {
	m := newMap(t, 100)
	mustPanic(t, func() { m.Set(100, 1) })
	mustPanic(t, func() { m.Replace(1, 0, 0) })
	c := m.BeginCheckpoint()
	mustPanic(t, func() { m.BeginCheckpoint() })
	mustPanic(t, func() { c.Directory() })
	mustPanic(t, c.Commit)
	c.Abort()
	mustPanic(t, c.Abort)
	if loc, ok := m.Get(100); loc != 0 || !ok {
		t.Fatal("a cluster behind the end is mapped")
	}
	if m.GetRange(100, make([]Location, 3)) != 0 || m.GetRange(98, make([]Location, 3)) != 2 {
		t.Fatal("GetRange goes on behind the end")
	}
	for _, size := range []uint64{0, MaxClusters + 1} {
		if _, err := New(size); err == nil {
			t.Fatalf("a map of %d clusters", size)
		}
	}
}

func TestExtents(t *testing.T) {
	const size = 3*spanLeaves*LeafClusters + 100
	m := newMap(t, size)
	for _, run := range [][2]uint64{{5, 1}, {100, 1000}, {2*spanLeaves*LeafClusters - 1, 2}, {size - 1, 1}} {
		for i := range run[1] {
			set(t, m, run[0]+i, Location(run[0]+i+1))
		}
	}
	store := newPageStore()
	for _, m := range []*Map{m, reopened(t, m, store)} {
		for _, r := range [][2]uint64{{0, size}, {5, 1}, {6, 10}, {5, 96}, {50, 200}, {size - 1, 7}, {size, 5}, {0, 0}} {
			end, next, last := m.clampEnd(r[0], r[1]), r[0], -1
			err := m.Extents(background, store, r[0], r[1], func(lba, n uint64, mapped bool) bool {
				if lba != next || n == 0 || last == b2i(mapped) {
					t.Fatalf("extent %d+%d %v behind %d", lba, n, mapped, next)
				}
				next, last = lba+n, b2i(mapped)
				for i := lba; i < min(next, lba+2000); i++ {
					if err := m.Walk(background, store, i, 1, func(uint64, Location) bool { mapped = !mapped; return true }); err != nil {
						t.Fatal(err)
					}
					if mapped {
						t.Fatalf("cluster %d is in the wrong extent", i)
					}
					mapped = last == 1
				}
				return true
			})
			if err != nil || next != max(end, r[0]) {
				t.Fatalf("extents of %d+%d end at %d: %v", r[0], r[1], next, err)
			}
		}
		for stop := range 8 {
			calls := 0
			_ = m.Extents(background, store, 0, size, func(uint64, uint64, bool) bool { calls++; return calls <= stop })
			if calls != stop+1 {
				t.Fatalf("%d calls, told to stop at %d", calls, stop+1)
			}
		}
	}
}

func b2i(b bool) int {
	if b {
		return 1
	}
	return 0
}

func TestResize(t *testing.T) {
	m, store := newMap(t, 10), newPageStore()
	set(t, m, 9, 1)
	if err := m.Resize(4 << 30 / PageBytes); err != nil {
		t.Fatal(err)
	}
	last := m.Clusters() - 1
	set(t, m, last, 2)
	if err := m.Resize(last); !errors.Is(err, ErrMapped) || m.Clusters() != last+1 {
		t.Fatalf("shrunk over a mapped cluster: %v", err)
	}
	again := reopened(t, m, store)
	if err := again.Resize(last); !errors.Is(err, ErrMapped) {
		t.Fatalf("shrunk over a leaf that is not loaded: %v", err)
	}
	m.Clear(10, last, nil)
	if err := m.Resize(11); err != nil {
		t.Fatal(err)
	}
	if loc, _ := m.Get(last); loc != 0 {
		t.Fatal("a cluster behind the end is mapped")
	}
	if saved := checkpointed(t, m, store, 2); len(saved.order) != 1 || saved.mapped != 1 {
		t.Fatalf("the checkpoint after shrinking holds leaves %v", saved.order)
	}
	if err := m.Resize(MaxClusters); err != nil {
		t.Fatal(err)
	}
	set(t, m, MaxClusters-1, 3)
	if loc, _ := m.Get(last); loc != 0 {
		t.Fatal("shrinking and growing brought a cluster back")
	}
	if m.Mapped() != 2 {
		t.Fatalf("%d clusters mapped", m.Mapped())
	}
}

func TestReadErrorsAreReported(t *testing.T) {
	store := newPageStore()
	first := newMap(t, 10*LeafClusters)
	for leaf := range uint64(10) {
		set(t, first, leaf*LeafClusters, 1)
	}
	m := reopened(t, first, store)
	store.fail = errDisk
	for name, err := range map[string]error{
		"load one": m.Load(background, store, 0, 1),
		"load all": m.Load(background, store, 0, 10*LeafClusters),
		"walk":     m.Walk(background, store, 0, 10, func(uint64, Location) bool { return true }),
		"extents":  m.Extents(background, store, 0, 10, func(uint64, uint64, bool) bool { return true }),
		"mark":     m.MarkObjectDirty(background, store, 1),
	} {
		if !errors.Is(err, errDisk) {
			t.Errorf("%s: %v", name, err)
		}
	}
	store.fail = nil
	if err := m.Load(background, store, 0, 10*LeafClusters); err != nil {
		t.Fatal(err)
	}
	checkBooks(t, m)
}

func TestRestoreDirectoryRefusesNonsense(t *testing.T) {
	for name, p := range map[string][]pair{
		"descending":     {{2, 1 << 32}, {1, 1 << 32}},
		"twice":          {{2, 1 << 32}, {2, 1 << 32}},
		"behind the end": {{10, 1 << 32}},
		"object 0":       {{1, 7}},
		"too few mapped": {{1, 1 << 32}, {2, 1 << 32}, {3, 1 << 32}, {4, 1 << 32}, {5, 1 << 32}},
		"too many":       {},
	} {
		m := newMap(t, 10*LeafClusters)
		if err := m.RestoreDirectory(testRoot(p...).Directory, 4); !errors.Is(err, ErrDirectory) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestAbortsWithoutEnd: leaves stay dirty however many checkpoints fail.
func TestAbortsWithoutEnd(t *testing.T) {
	m, store := newMap(t, 10*LeafClusters), newPageStore()
	set(t, m, 1, 1)
	for i := range 2*maxUncommitted + 10 {
		if i == maxUncommitted/2 {
			set(t, m, LeafClusters, 2)
		}
		m.BeginCheckpoint().Abort()
	}
	m.uncommitted = maxUncommitted
	before := entry(m.current.Load()).gen()
	m.BeginCheckpoint().Abort()
	if m.entry(0).gen() != before || m.entry(1).gen() != before || before == 0 {
		t.Fatal("dirty leaves still bear a generation that may come round")
	}
	saved := checkpointed(t, m, store, 1)
	if len(saved.order) != 2 || m.Stats().DirtyPages != 0 {
		t.Fatalf("the checkpoint holds leaves %v", saved.order)
	}
}

// TestGenerationsWrap: a clean leaf whose generation comes round again is not
// taken for a dirty one.
func TestGenerationsWrap(t *testing.T) {
	m, store := newMap(t, 10*LeafClusters), newPageStore()
	m.setGeneration(1<<genBits - 1)
	set(t, m, 1, 1)
	checkpointed(t, m, store, 1)
	if m.current.Load() != 1<<genShift|uint64(flagDirty|flagResident) {
		t.Fatalf("the generation after the last is %#x", m.current.Load())
	}
	m.setGeneration(1<<genBits - 1)
	set(t, m, 2, 2)
	if saved := checkpointed(t, m, store, 2); saved.directory[0].Object() != 2 {
		t.Fatalf("a write of a generation that came round was not checkpointed: %v", saved.directory)
	}
}

func TestPagesAreUsedAgain(t *testing.T) {
	const leaves = 2000
	m, store := newMap(t, leaves*LeafClusters), newPageStore()
	for round := range uint32(6) {
		for leaf := range uint64(leaves) {
			set(t, m, leaf*LeafClusters+uint64(round), Location(round)*10000+Location(leaf)+1)
		}
		if round%2 == 0 {
			checkpointed(t, m, store, round+1)
		}
		m.Clear(0, leaves*LeafClusters, nil)
		if round%2 == 1 {
			checkpointed(t, m, store, round+1)
		}
	}
	if s := m.Stats(); s.Bytes > leaves*PageBytes || s.ResidentPages != 0 || s.Mapped != 0 || s.DirtyPages != 0 {
		t.Fatalf("after discarding everything 6 times: %+v", s)
	}
	checkBooks(t, m)
}

// TestIdleMapsCostLittle: 64 TiB, empty, walked and discarded whole, then one write.
func TestIdleMapsCostLittle(t *testing.T) {
	m := newMap(t, MaxClusters)
	if !m.Clear(0, MaxClusters, nil) {
		t.Fatal("an empty map can't be cleared")
	}
	if err := m.Extents(background, nil, 0, MaxClusters, func(_, n uint64, mapped bool) bool {
		if n != MaxClusters || mapped {
			t.Fatalf("extent of %d, mapped %v", n, mapped)
		}
		return true
	}); err != nil {
		t.Fatal(err)
	}
	set(t, m, MaxClusters/2, 1)
	checkpointed(t, m, newPageStore(), 1)
	if kib := residentKiB(t, m); kib == 0 || kib > 64 {
		t.Fatalf("%d KiB resident", kib)
	}
}

// residentKiB sums what the kernel says is in memory of the map's mappings.
func residentKiB(t *testing.T, m *Map) (kib uint64) {
	f, err := os.Open("/proc/self/smaps")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	ours := false
	for lines := bufio.NewScanner(f); lines.Scan(); {
		var from, to uintptr
		var n uint64
		line := lines.Text()
		if k, _ := fmt.Sscanf(line, "%x-%x ", &from, &to); k == 2 {
			ours = from >= m.base && to <= m.base+reserveBytes
			for _, c := range m.arena.chunks {
				ours = ours || from <= c.addr && c.addr < to && to-from <= 4*hugeBytes
			}
		} else if ours && strings.HasPrefix(line, "Rss:") {
			if _, err := fmt.Sscanf(line, "Rss: %d", &n); err != nil {
				t.Fatal(err)
			}
			kib += n
		}
	}
	return kib
}

// TestWalkOverALeafThatMoves: while a walk reads a stored page, the leaf is
// loaded, changed and stored elsewhere, and the old page deleted.
func TestWalkOverALeafThatMoves(t *testing.T) {
	store := newPageStore()
	first := newMap(t, LeafClusters)
	set(t, first, 3, 7)
	m := reopened(t, first, store)
	store.hook = func() {
		store.hook = nil
		if err := m.Load(background, store, 0, 1); err != nil {
			t.Error(err)
		}
		set(t, m, 3, 8)
		checkpointed(t, m, store, 2)
		store.deleteDead(m)
	}
	if got := contents(t, m, store); len(got) != 1 || got[3] != 8 {
		t.Fatalf("walk saw %v", got)
	}
}

// TestAPageStaysForAGeneration: a leaf emptied in the generation in which it
// got its page keeps it, so that an entry never comes back with the page having
// been another leaf's in between (see entry).
func TestAPageStaysForAGeneration(t *testing.T) {
	m := newMap(t, 2*LeafClusters)
	set(t, m, 0, 1)
	before := m.entry(0)
	m.Clear(0, LeafClusters, nil)
	set(t, m, LeafClusters, 2)
	if m.entry(1).page() == before.page() {
		t.Fatal("a page passed to another leaf within a generation")
	}
	m.BeginCheckpoint().Abort()
	m.Clear(0, 2*LeafClusters, nil)
	if m.Stats().ResidentPages != 0 {
		t.Fatal("an empty leaf of an older generation keeps its page")
	}
	set(t, m, 0, 3)
	if m.entry(0) == before {
		t.Fatal("an entry came back")
	}
}

// TestDiscardOfALeafJustLoaded: it is empty in the next checkpoint, although
// nothing but the discard has touched it.
func TestDiscardOfALeafJustLoaded(t *testing.T) {
	store := newPageStore()
	first := newMap(t, 2*LeafClusters)
	set(t, first, 0, 7)
	set(t, first, LeafClusters, 8)
	m := reopened(t, first, store)
	if err := m.Load(background, store, 0, 1); err != nil {
		t.Fatal(err)
	}
	if m.Clear(0, m.Clusters(), nil) {
		t.Fatal("cleared a leaf that is not loaded")
	}
	if !m.Clear(0, LeafClusters, nil) {
		t.Fatal("did not clear a leaf that is loaded")
	}
	if saved := checkpointed(t, m, store, 2); len(saved.order) != 1 || saved.order[0] != 1 || saved.mapped != 1 {
		t.Fatalf("the checkpoint holds leaves %v, %d clusters", saved.order, saved.mapped)
	}
	checkBooks(t, m)
}

// TestPrefetchChangesNothing: of what is mapped, was never touched, is not resident or lies
// behind the end.
func TestPrefetchChangesNothing(t *testing.T) {
	m := newMap(t, 3*LeafClusters)
	set(t, m, 5, MakeLocation(1, 7))
	before := m.Stats()
	for _, c := range []uint64{0, 5, LeafClusters, 3*LeafClusters - 1, 3 * LeafClusters, MaxClusters, ^uint64(0)} {
		m.Prefetch(c)
	}
	if m.Stats() != before {
		t.Errorf("%+v became %+v", before, m.Stats())
	}
	if loc, ok := m.Get(5); !ok || loc != MakeLocation(1, 7) {
		t.Errorf("cluster 5 is at %v, %v", loc, ok)
	}
}
