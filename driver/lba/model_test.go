package lba

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"sync"
	"testing"

	"pgregory.net/rapid"
)

// pageStore keeps stored pages in memory and can be told to fail.
type pageStore struct {
	mu    sync.Mutex
	pages map[PageAddr][PageBytes]byte
	next  map[uint32]uint32
	fail  error
	reads int
	hook  func() // called by ReadPage without the lock
}

func newPageStore() *pageStore {
	return &pageStore{pages: map[PageAddr][PageBytes]byte{}, next: map[uint32]uint32{}}
}

func (s *pageStore) ReadPage(ctx context.Context, addr PageAddr, page []byte) error {
	if s.hook != nil {
		s.hook()
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.reads++
	if s.fail != nil {
		return s.fail
	}
	stored, ok := s.pages[addr]
	if !ok {
		return fmt.Errorf("no page at %v", addr)
	}
	copy(page, stored[:])
	return nil
}

func (s *pageStore) put(object uint32, page []byte) PageAddr {
	s.mu.Lock()
	defer s.mu.Unlock()
	addr := MakePageAddr(object, s.next[object])
	s.next[object]++
	s.pages[addr] = [PageBytes]byte(page)
	return addr
}

// deleteDead drops all objects that no live page is in.
func (s *pageStore) deleteDead(m *Map) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for addr := range s.pages {
		if m.LivePages(addr.Object()) == 0 {
			delete(s.pages, addr)
		}
	}
}

// savedMap is what a root object would hold.
type savedMap struct {
	directory map[uint64]PageAddr
	order     []uint64
	mapped    uint64
}

func save(c *Checkpoint) savedMap {
	s := savedMap{directory: map[uint64]PageAddr{}, mapped: c.Mapped()}
	for leaf, addr := range c.Directory() {
		s.directory[leaf] = addr
		s.order = append(s.order, leaf)
	}
	return s
}

func (s savedMap) entries(yield func(uint64, PageAddr) bool) {
	for _, leaf := range s.order {
		if !yield(leaf, s.directory[leaf]) {
			return
		}
	}
}

// contents reads a whole map through Walk.
func contents(t testing.TB, m *Map, r PageReader) map[uint64]Location {
	got := map[uint64]Location{}
	err := m.Walk(context.Background(), r, 0, m.Clusters(), func(lba uint64, loc Location) bool {
		got[lba] = loc
		return true
	})
	if err != nil {
		t.Fatal(err)
	}
	return got
}

// diff says where two maps differ first.
func diff(want, got map[uint64]Location) string {
	for lba, loc := range want {
		if got[lba] != loc {
			return fmt.Sprintf("cluster %d: is %v, should be %v", lba, got[lba], loc)
		}
	}
	for lba, loc := range got {
		if want[lba] == 0 {
			return fmt.Sprintf("cluster %d: is %v, should not be mapped", lba, loc)
		}
	}
	return ""
}

const modelLeaves = 3 * spanLeaves

// lbas draws clusters that gather in a few leaves, some in other spans.
func lbas(size uint64) *rapid.Generator[uint64] {
	leaf := rapid.SampledFrom([]uint64{0, 1, 2, 3, 17, spanLeaves - 1, spanLeaves, 2*spanLeaves + 5})
	return rapid.Custom(func(t *rapid.T) uint64 {
		return (leaf.Draw(t, "leaf")*LeafClusters + rapid.Uint64Range(0, LeafClusters-1).Draw(t, "slot")) % size
	})
}

// machine drives a Map and a flat model with the same operations, one at a time.
type machine struct {
	m     *Map
	store *pageStore
	model map[uint64]Location
	seq   uint64

	checkpoint *Checkpoint
	asOf       map[uint64]Location // the model at the checkpoint's beginning
	object     uint32
	writing    bool
	saved      savedMap // the last committed one
	savedModel map[uint64]Location
	lba        *rapid.Generator[uint64]
}

func (x *machine) location() Location {
	x.seq++
	return MakeLocation(1+x.seq>>8, uint32(x.seq&0xff))
}

// retry does f, loading leaves as long as it says that some are absent.
func (x *machine) retry(t *rapid.T, lba, n uint64, f func() bool) {
	for range 3 {
		if f() {
			return
		}
		if x.m.Resident(lba, n) {
			t.Fatal("refused although all leaves are resident")
		}
		if err := x.m.Load(context.Background(), x.store, lba, n); err != nil {
			t.Fatal(err)
		}
	}
	t.Fatal("refused again and again")
}

func (x *machine) Set(t *rapid.T) {
	lba, loc := x.lba.Draw(t, "lba"), x.location()
	if rapid.IntRange(0, 9).Draw(t, "late") == 0 {
		loc = 1 << locSCOShift // loses against everything
	}
	x.set(t, lba, loc)
}

func (x *machine) set(t *rapid.T, lba uint64, loc Location) {
	x.retry(t, lba, 1, func() bool {
		garbage, ok := x.m.Set(lba, loc)
		if !ok {
			return false
		}
		want := x.model[lba]
		switch {
		case want == loc:
			want = 0
		case want > loc:
			want = loc
		default:
			x.model[lba] = loc
		}
		if garbage != want {
			t.Fatalf("set %d to %v: garbage %v, should be %v", lba, loc, garbage, want)
		}
		return true
	})
}

func (x *machine) SetRun(t *rapid.T) {
	lba, n := x.lba.Draw(t, "lba"), rapid.Uint64Range(1, 1200).Draw(t, "n")
	for i := lba; i < min(lba+n, x.m.Clusters()); i++ {
		x.set(t, i, x.location())
	}
}

func (x *machine) Get(t *rapid.T) {
	lba := x.lba.Draw(t, "lba")
	x.retry(t, lba, 1, func() bool {
		loc, ok := x.m.Get(lba)
		if ok && loc != x.model[lba] {
			t.Fatalf("cluster %d: is %v, should be %v", lba, loc, x.model[lba])
		}
		return ok
	})
}

func (x *machine) GetRange(t *rapid.T) {
	lba, n := x.lba.Draw(t, "lba"), rapid.Uint64Range(0, 1500).Draw(t, "n")
	dst := make([]Location, n)
	got := uint64(x.m.GetRange(lba, dst))
	for i, loc := range dst[:got] {
		if loc != x.model[lba+uint64(i)] {
			t.Fatalf("cluster %d: is %v, should be %v", lba+uint64(i), loc, x.model[lba+uint64(i)])
		}
	}
	if want := min(n, x.m.Clusters()-lba); got < want && x.m.Resident(lba+got, 1) {
		t.Fatalf("stopped after %d of %d clusters at a resident leaf", got, want)
	}
}

func (x *machine) Replace(t *rapid.T) {
	lba := x.lba.Draw(t, "lba")
	old, loc := x.model[lba], x.location()
	if rapid.Bool().Draw(t, "stale") {
		old ^= 1 << locClusterShift
	}
	x.retry(t, lba, 1, func() bool {
		done, ok := x.m.Replace(lba, old, loc)
		if ok && done != (old == x.model[lba]) {
			t.Fatalf("replace %v at %d where %v is: %v", old, lba, x.model[lba], done)
		}
		if done {
			x.model[lba] = loc
		}
		return ok
	})
}

func (x *machine) Clear(t *rapid.T) {
	lba := x.lba.Draw(t, "lba")
	n := rapid.SampledFrom([]uint64{1, 3, LeafClusters, 2*LeafClusters + 7, x.m.Clusters()}).Draw(t, "n")
	if rapid.Bool().Draw(t, "aligned") {
		lba &^= LeafClusters - 1
	}
	want := map[Location]int{}
	for at, loc := range x.model {
		if at >= lba && at-lba < n {
			want[loc]++
		}
	}
	x.retry(t, lba, n, func() bool {
		got := map[Location]int{}
		if !x.m.Clear(lba, n, func(loc Location) { got[loc]++ }) {
			if len(got) != 0 {
				t.Fatal("refused to clear, yet freed something")
			}
			return false
		}
		if !maps.Equal(want, got) {
			t.Fatalf("clear %d+%d freed %v, should be %v", lba, n, got, want)
		}
		maps.DeleteFunc(x.model, func(at uint64, _ Location) bool { return at >= lba && at-lba < n })
		return true
	})
}

func (x *machine) Begin(t *rapid.T) {
	if x.checkpoint != nil {
		t.Skip("one runs")
	}
	x.checkpoint, x.asOf, x.writing = x.m.BeginCheckpoint(), maps.Clone(x.model), false
	x.object++
}

// End writes the checkpoint, doing other operations between pages, and commits
// or aborts it.
func (x *machine) End(t *rapid.T) {
	if x.checkpoint == nil || x.writing {
		t.Skip("none runs")
	}
	x.writing = true
	failAfter := rapid.IntRange(-1, 4).Draw(t, "failAfter") // negative: never
	last := int64(-1)
	err := x.checkpoint.WritePages(func(leaf uint64, page []byte) (PageAddr, error) {
		if int64(leaf) <= last {
			t.Fatalf("leaf %d after leaf %d", leaf, last)
		}
		last = int64(leaf)
		if failAfter == 0 {
			return 0, errors.New("told to fail")
		}
		failAfter--
		addr := x.store.put(x.object, page)
		for range rapid.IntRange(0, 2).Draw(t, "meanwhile") {
			rapid.OneOf(rapid.Just(x.Set), rapid.Just(x.Clear), rapid.Just(x.Replace), rapid.Just(x.Get)).Draw(t, "op")(t)
		}
		return addr, nil
	})
	if err != nil {
		x.checkpoint.Abort()
		x.checkpoint = nil
		return
	}
	saved := save(x.checkpoint)
	if rapid.IntRange(0, 4).Draw(t, "abort") == 0 {
		x.checkpoint.Abort()
	} else {
		x.checkpoint.Commit()
		x.saved, x.savedModel = saved, x.asOf
		x.store.deleteDead(x.m)
		x.restored(t).Close()
	}
	x.checkpoint = nil
}

// restored opens the last committed checkpoint as a map of its own.
func (x *machine) restored(t *rapid.T) *Map {
	m, err := New(x.m.Clusters())
	if err != nil {
		t.Fatal(err)
	}
	if err := m.RestoreDirectory(x.saved.entries, x.saved.mapped); err != nil {
		t.Fatal(err)
	}
	if m.Mapped() != uint64(len(x.savedModel)) {
		t.Fatalf("checkpoint of %d mapped clusters, should be %d", m.Mapped(), len(x.savedModel))
	}
	got := map[uint64]Location{}
	if err := m.Walk(context.Background(), x.store, 0, m.Clusters(), func(lba uint64, loc Location) bool {
		got[lba] = loc
		return true
	}); err != nil {
		t.Fatal(err)
	}
	if d := diff(x.savedModel, got); d != "" {
		t.Fatalf("checkpoint: %s", d)
	}
	return m
}

// Reopen goes on with the last committed checkpoint, as after a crash.
func (x *machine) Reopen(t *rapid.T) {
	if x.checkpoint != nil || x.savedModel == nil {
		t.Skip("nothing to reopen")
	}
	m := x.restored(t)
	x.m.Close()
	x.m, x.model = m, maps.Clone(x.savedModel)
}

func (x *machine) MarkObjectDirty(t *rapid.T) {
	objects := x.m.Objects()
	if len(objects) == 0 {
		t.Skip("nothing is stored")
	}
	if err := x.m.MarkObjectDirty(context.Background(), x.store, objects[0]); err != nil {
		t.Fatal(err)
	}
}

func (x *machine) Check(t *rapid.T) {
	if got := x.m.Mapped(); got != uint64(len(x.model)) {
		t.Fatalf("%d clusters mapped, should be %d", got, len(x.model))
	}
}

func TestP2MapAgreesWithAFlatModel(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		size := rapid.Uint64Range(1, 7).Draw(t, "odd") + (modelLeaves-1)*LeafClusters
		m, err := New(size)
		if err != nil {
			t.Fatal(err)
		}
		x := &machine{m: m, store: newPageStore(), model: map[uint64]Location{}, lba: lbas(size)}
		defer func() { x.m.Close() }()
		t.Repeat(map[string]func(*rapid.T){
			"": x.Check, "Set": x.Set, "SetRun": x.SetRun, "Get": x.Get, "GetRange": x.GetRange,
			"Replace": x.Replace, "Clear": x.Clear, "Begin": x.Begin, "End": x.End, "Reopen": x.Reopen,
			"MarkObjectDirty": x.MarkObjectDirty,
		})
		if x.checkpoint != nil {
			x.checkpoint.Abort()
		}
		got := map[uint64]Location{}
		if err := x.m.Walk(context.Background(), x.store, 0, size, func(lba uint64, loc Location) bool {
			got[lba] = loc
			return true
		}); err != nil {
			t.Fatal(err)
		}
		if d := diff(x.model, got); d != "" {
			t.Fatal(d)
		}
		checkBooks(t, x.m)
	})
}

// checkBooks recounts what a map without a running checkpoint counts as it goes.
func checkBooks(t interface{ Fatalf(string, ...any) }, m *Map) {
	var resident, dirty uint64
	spans := map[uint64]uint32{}
	pages := map[uint32]int{}
	for leaf := range m.leaves {
		e := m.entry(leaf)
		if e != 0 && e&(flagStored|flagDirty|flagResident) == 0 {
			t.Fatalf("leaf %d: entry %#x says nothing", leaf, uint64(e))
		}
		if e != 0 {
			spans[leaf/spanLeaves]++
		}
		if e&flagResident != 0 {
			resident++
		}
		if e&flagDirty != 0 {
			dirty++
		}
		addr := PageAddr(m.stored(leaf).Load())
		if (addr != 0) != (e&flagStored != 0) {
			t.Fatalf("leaf %d: entry %#x with stored address %v", leaf, uint64(e), addr)
		}
		if addr != 0 {
			pages[addr.Object()]++
		}
		if m.shadow(leaf).Load() != 0 {
			t.Fatalf("leaf %d: a shadow was left behind", leaf)
		}
	}
	for leaf := uint64(0); leaf < m.leaves; leaf += spanLeaves {
		if got, want := m.span(leaf).Load(), spans[leaf/spanLeaves]; got != want {
			t.Fatalf("span of leaf %d counts %d, should be %d", leaf, got, want)
		}
	}
	if s := m.Stats(); s.ResidentPages != resident || s.DirtyPages != dirty || m.arena.used != resident {
		t.Fatalf("stats %+v, %d pages handed out; should be %d resident, %d dirty", s, m.arena.used, resident, dirty)
	}
	if !maps.Equal(pages, m.objects) {
		t.Fatalf("live pages %v, should be %v", m.objects, pages)
	}
}
