package lba

import (
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
)

// Errors of a Map.
var (
	// ErrMemory: the kernel refuses memory for the map.
	ErrMemory = errors.New("no memory for the volume's map")
	// ErrMapped: the map can't shrink because clusters behind the new end are
	// mapped, or in leaves that are not resident.
	ErrMapped = errors.New("clusters behind the new end are mapped")
	// ErrDirectory: a stored directory contradicts itself or the map.
	ErrDirectory = errors.New("invalid directory of map pages")
)

// Map maps the clusters of one volume to locations. See the package doc for
// who may call what when.
type Map struct {
	base     uintptr       // the reservation: directory, stored and shadow tables, spans
	clusters atomic.Uint64 // size of the volume
	current  atomic.Uint64 // what an entry that may be written in place looks like under currentMask

	checkpoint  atomic.Pointer[Checkpoint] // the running one
	arena       arena
	leaves      uint64 // entries that are accessible; only grows. Under exclusion
	uncommitted uint32 // checkpoints begun since the last one that was committed

	residentPages atomic.Int64
	dirtyLeaves   atomic.Int64
	mapped        [stripes]counter // clusters; the sum counts
	stripes       [stripes]stripe

	objectsMu sync.Mutex
	objects   map[uint32]int // live pages per checkpoint object
}

// New returns the empty map of a volume of so many clusters.
func New(clusters uint64) (*Map, error) {
	base, err := reserve(reserveBytes)
	if err != nil {
		return nil, err
	}
	m := &Map{base: base, objects: make(map[uint32]int)}
	m.setGeneration(1)
	if err := m.Resize(clusters); err != nil {
		m.Close()
		return nil, err
	}
	return m, nil
}

// Close gives all memory back. No other call may be running or follow.
func (m *Map) Close() {
	if m.base == 0 {
		return
	}
	m.clusters.Store(0)
	m.arena.close()
	release(m.base, reserveBytes)
	m.base = 0
}

func (m *Map) setGeneration(gen uint64) {
	m.current.Store(gen<<genShift | uint64(flagDirty|flagResident))
}

// Clusters returns the size of the volume.
func (m *Map) Clusters() uint64 { return m.clusters.Load() }

// Get returns where the cluster is, 0 if it is not mapped or behind the end.
// It returns false if the cluster's leaf must be loaded first. Safe from any
// goroutine, at any time.
func (m *Map) Get(lba uint64) (Location, bool) {
	if lba >= m.clusters.Load() {
		return 0, true
	}
	at := word(m.base+dirOffset, lba/LeafClusters)
	for {
		e := entry(at.Load())
		if e&flagResident == 0 {
			return 0, !e.absent()
		}
		loc := word(e.page(), lba%LeafClusters).Load()
		if entry(at.Load()) == e {
			return Location(loc), true
		}
	}
}

// Prefetch brings the cluster's slot closer to the CPU, for a Get or Set that follows
// within microseconds: in a large map it is in no cache, and the way there takes a few
// hundred nanoseconds. Safe from any goroutine, at any time before Close.
func (m *Map) Prefetch(lba uint64) {
	if lba >= m.clusters.Load() {
		return
	}
	if e := m.entry(lba / LeafClusters); e&flagResident != 0 {
		prefetchLine(e.page() + uintptr(lba%LeafClusters)*8)
	}
}

// Set records that the cluster is at loc, unless the map knows a larger, that
// is newer, location already. It returns the location that became garbage: the
// one replaced, loc itself if it lost, 0 if there is none. It returns false,
// and has done nothing, if the leaf must be loaded first (or memory for it is
// refused; then Load says so). Safe from any goroutine in shared mode. lba must
// be within the volume.
func (m *Map) Set(lba uint64, loc Location) (old Location, ok bool) {
	if lba >= m.clusters.Load() {
		panic(fmt.Sprintf("lba: cluster %d set behind the volume's end", lba))
	}
	leaf := lba / LeafClusters
	e := m.entry(leaf)
	if uint64(e&currentMask) != m.current.Load() {
		if e, ok = m.prepare(leaf); !ok {
			return 0, false
		}
	}
	slot := word(e.page(), lba%LeafClusters)
	for {
		old := slot.Load()
		if old >= uint64(loc) {
			if old == uint64(loc) {
				return 0, true
			}
			return loc, true
		}
		if slot.CompareAndSwap(old, uint64(loc)) {
			if old == 0 {
				m.mapped[leaf%stripes].Add(1)
			}
			return Location(old), true
		}
	}
}

// prepare is Set's slow path: the first write to a leaf in a generation.
//
//go:noinline
func (m *Map) prepare(leaf uint64) (entry, bool) {
	s := m.stripe(leaf)
	s.mu.Lock()
	defer s.mu.Unlock()
	e := m.entry(leaf)
	if e.absent() {
		return e, false
	}
	return m.touch(leaf, e)
}

// GetRange fills dst with the locations of the clusters from lba on and returns
// how many it could: it stops at the first leaf that must be loaded and at the
// volume's end. Each location is as Get would have returned it at some moment
// during the call. Safe from any goroutine, at any time.
func (m *Map) GetRange(lba uint64, dst []Location) (n int) {
	end := m.clusters.Load()
	if lba >= end {
		return 0
	}
	dst = dst[:min(uint64(len(dst)), end-lba)]
	for n < len(dst) {
		first := lba % LeafClusters
		part := dst[n:min(len(dst), n+int(LeafClusters-first))]
		if !m.getLeaf(lba/LeafClusters, first, part) {
			return n
		}
		n += len(part)
		lba += uint64(len(part))
	}
	return n
}

// getLeaf fills dst from the leaf's slots from first on; false if it is absent.
func (m *Map) getLeaf(leaf, first uint64, dst []Location) bool {
	for {
		e := m.entry(leaf)
		if e&flagResident == 0 {
			clear(dst)
			return !e.absent()
		}
		page := e.page()
		for i := range dst {
			dst[i] = Location(word(page, first+uint64(i)).Load())
		}
		if m.entry(leaf) == e {
			return true
		}
	}
}

// Replace sets the cluster's location to new if it still is old; done says
// whether it did. It returns ok false, and has done nothing, if the leaf must be
// loaded first. The driver calls it in exclusive mode to relocate clusters;
// shared mode is safe as well. new is not 0.
func (m *Map) Replace(lba uint64, old, new Location) (done, ok bool) {
	if new == 0 {
		panic("lba: Replace by no location")
	}
	if now, ok := m.Get(lba); !ok || now != old || lba >= m.clusters.Load() {
		return false, ok
	}
	e, ok := m.prepare(lba / LeafClusters)
	if !ok {
		return false, false
	}
	done = word(e.page(), lba%LeafClusters).CompareAndSwap(uint64(old), uint64(new))
	if done && old == 0 {
		m.mapped[lba/LeafClusters%stripes].Add(1)
	}
	return done, true
}

// Resize changes the volume's size, in clusters. Exclusive. A smaller size
// needs the clusters behind it cleared (ErrMapped).
func (m *Map) Resize(clusters uint64) error {
	if clusters == 0 || clusters > MaxClusters {
		return fmt.Errorf("map of %d clusters: must be 1 to %d", clusters, uint64(MaxClusters))
	}
	if clusters < m.clusters.Load() {
		if at := m.firstMapped(clusters); at < m.clusters.Load() {
			return fmt.Errorf("resize map to %d clusters: %w: cluster %d", clusters, ErrMapped, at)
		}
	}
	leaves := (clusters + LeafClusters - 1) / LeafClusters
	if leaves > m.leaves {
		for _, table := range []uintptr{dirOffset, storedOffset, shadowOffset} {
			if err := enable(m.base+table, roundPage(leaves*8)); err != nil {
				return err
			}
		}
		spans := (leaves + spanLeaves - 1) / spanLeaves
		if err := enable(m.base+spanOffset, roundPage(spans*4)); err != nil {
			return err
		}
		m.leaves = leaves
	}
	m.clusters.Store(clusters)
	return nil
}

func roundPage(n uint64) uintptr { return uintptr(n+PageBytes-1) &^ (PageBytes - 1) }

// firstMapped returns the first cluster from lba on that is mapped or in an
// absent leaf, or the volume's size.
func (m *Map) firstMapped(lba uint64) uint64 {
	var slots [LeafClusters]Location
	end := m.clusters.Load()
	last := (end + LeafClusters - 1) / LeafClusters
	for leaf := m.nextUsed(lba/LeafClusters, last); leaf < last; leaf = m.nextUsed(leaf+1, last) {
		from := max(lba, leaf*LeafClusters)
		if !m.getLeaf(leaf, from%LeafClusters, slots[from%LeafClusters:]) {
			return from
		}
		for i := from % LeafClusters; i < LeafClusters; i++ {
			if slots[i] != 0 {
				return leaf*LeafClusters + i
			}
		}
	}
	return end
}

// Mapped returns how many clusters are mapped, stored leaves included. It is
// exact while no call changes the map.
func (m *Map) Mapped() uint64 {
	var n int64
	for i := range m.mapped {
		n += m.mapped[i].Load()
	}
	return uint64(max(n, 0))
}

// Stats describes what a map costs.
type Stats struct {
	Mapped        uint64 // clusters
	ResidentPages uint64 // leaves in memory
	DirtyPages    uint64 // leaves that the last committed checkpoint doesn't hold as they are
	Bytes         uint64 // of memory for pages, free ones included; the directory adds up to 24 per leaf in use
}

// Stats returns current figures. Safe from any goroutine.
func (m *Map) Stats() Stats {
	return Stats{
		Mapped:        m.Mapped(),
		ResidentPages: uint64(max(m.residentPages.Load(), 0)),
		DirtyPages:    uint64(max(m.dirtyLeaves.Load(), 0)),
		Bytes:         m.arena.touched(),
	}
}
