package lba

import (
	"context"
	"errors"
	"fmt"

	"golang.org/x/sync/errgroup"
)

// PageReader reads stored leaf pages.
type PageReader interface {
	// ReadPage fills page, PageBytes long, with the page at addr, verified
	// against its checksum. It doesn't keep page. Called from the goroutines
	// of Load, Walk, Extents and MarkObjectDirty, several at once.
	ReadPage(ctx context.Context, addr PageAddr, page []byte) error
}

// loadParallel bounds the page reads of one Load.
const loadParallel = 8

// loadCall is one load of a leaf, shared by all who want it.
type loadCall struct {
	done chan struct{}
	err  error // valid once done is closed
}

// Resident reports whether Get, Set and Clear can work on [lba, lba+n) without
// a Load.
func (m *Map) Resident(lba, n uint64) bool {
	_, absent := m.nextAbsent(lba, m.clampEnd(lba, n))
	return !absent
}

// nextAbsent returns the first leaf with clusters in [lba, end) that must be loaded.
func (m *Map) nextAbsent(lba, end uint64) (leaf uint64, found bool) {
	if lba >= end {
		return 0, false
	}
	last := (end-1)/LeafClusters + 1
	for leaf := m.nextUsed(lba/LeafClusters, last); leaf < last; leaf = m.nextUsed(leaf+1, last) {
		if m.entry(leaf).absent() {
			return leaf, true
		}
	}
	return 0, false
}

// Load makes the leaves of [lba, lba+n) resident. It blocks on r, so it is
// called outside the gate, from any goroutine; loads of one leaf are shared. It
// also is what tells why a Set is refused although its leaf is resident: the
// kernel refuses memory (ErrMemory).
func (m *Map) Load(ctx context.Context, r PageReader, lba, n uint64) error {
	if err := m.arena.ensure(); err != nil {
		return err
	}
	end := m.clampEnd(lba, n)
	leaf, found := m.nextAbsent(lba, end)
	if !found {
		return nil
	}
	if next := (leaf + 1) * LeafClusters; next >= end {
		return m.loadLeaf(ctx, r, leaf)
	}
	group, loads := errgroup.WithContext(ctx)
	group.SetLimit(loadParallel)
	for found && loads.Err() == nil {
		wanted := leaf
		group.Go(func() error { return m.loadLeaf(loads, r, wanted) })
		leaf, found = m.nextAbsent((leaf+1)*LeafClusters, end)
	}
	if err := group.Wait(); err != nil {
		return err
	}
	return ctx.Err()
}

// loadLeaf makes one leaf resident.
func (m *Map) loadLeaf(ctx context.Context, r PageReader, leaf uint64) error {
	s := m.stripe(leaf)
	for {
		s.mu.Lock()
		if !m.entry(leaf).absent() {
			s.mu.Unlock()
			return nil
		}
		call := s.loads[leaf]
		if call == nil {
			call = &loadCall{done: make(chan struct{})}
			if s.loads == nil {
				s.loads = make(map[uint64]*loadCall)
			}
			s.loads[leaf] = call
			s.mu.Unlock()
			call.err = m.install(ctx, r, leaf)
			close(call.done)
			if errors.Is(call.err, errReverted) {
				continue
			}
			return call.err
		}
		s.mu.Unlock()
		select {
		case <-call.done:
		case <-ctx.Done():
			return ctx.Err()
		}
		// The other's context may have ended; that is no reason for us to fail.
		if call.err != nil && !errors.Is(call.err, errReverted) && !errors.Is(call.err, context.Canceled) && !errors.Is(call.err, context.DeadlineExceeded) {
			return call.err
		}
	}
}

// install reads an absent leaf's page and enters it in the directory. Nobody
// else can change an absent leaf meanwhile, except Revert (errReverted).
func (m *Map) install(ctx context.Context, r PageReader, leaf uint64) error {
	addr := PageAddr(m.stored(leaf).Load())
	page := m.arena.alloc()
	err := error(nil)
	if page == 0 {
		err = ErrMemory
	} else if err = r.ReadPage(ctx, addr, pageBytes(page)); err != nil {
		m.arena.put(page, false)
	}
	s := m.stripe(leaf)
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.loads, leaf)
	if !m.entry(leaf).absent() || PageAddr(m.stored(leaf).Load()) != addr {
		if err == nil {
			m.arena.put(page, false)
		}
		return errReverted
	}
	if err != nil {
		return fmt.Errorf("load map leaf %d from page %v: %w", leaf, addr, err)
	}
	loaded := makeEntry(page, entry(m.current.Load()).gen(), flagStored|flagResident)
	m.note(leaf, flagStored, loaded)
	m.setEntry(leaf, loaded)
	return nil
}

// readLeaf copies a leaf's slots; one that is absent is read through r and
// stays absent, so that a walk over a whole volume costs no memory.
func (m *Map) readLeaf(ctx context.Context, r PageReader, leaf uint64, slots *[LeafClusters]uint64, dst *[LeafClusters]Location) error {
	for {
		if m.getLeaf(leaf, 0, dst[:]) {
			return nil
		}
		addr := PageAddr(m.stored(leaf).Load())
		err := r.ReadPage(ctx, addr, heapBytes(slots))
		if !m.entry(leaf).absent() || PageAddr(m.stored(leaf).Load()) != addr {
			continue // loaded, and perhaps changed and stored elsewhere, meanwhile
		}
		if err != nil {
			return fmt.Errorf("read map leaf %d from page %v: %w", leaf, addr, err)
		}
		for i, loc := range slots {
			dst[i] = Location(loc)
		}
		return nil
	}
}

// Walk calls fn for each mapped cluster of [lba, lba+n), ascending, until it
// returns false. Each leaf is seen as of some moment during the walk. Safe from
// any goroutine, at any time; it blocks on r for leaves that are not resident,
// which it leaves so. fn may call the map.
func (m *Map) Walk(ctx context.Context, r PageReader, lba, n uint64, fn func(lba uint64, loc Location) bool) error {
	end := m.clampEnd(lba, n)
	last := (end + LeafClusters - 1) / LeafClusters
	var dst [LeafClusters]Location
	var slots [LeafClusters]uint64
	for leaf := m.nextUsed(lba/LeafClusters, last); leaf < last; leaf = m.nextUsed(leaf+1, last) {
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := m.readLeaf(ctx, r, leaf, &slots, &dst); err != nil {
			return err
		}
		from, to := max(lba, leaf*LeafClusters), min(end, (leaf+1)*LeafClusters)
		for at := from; at < to; at++ {
			if loc := dst[at%LeafClusters]; loc != 0 && !fn(at, loc) {
				return nil
			}
		}
	}
	return nil
}

// Extents calls fn with consecutive runs of clusters, mapped or not, that cover
// [lba, lba+n) as far as it lies in the volume, until fn returns false.
// Neighbouring runs differ in mapped. Otherwise like Walk.
func (m *Map) Extents(ctx context.Context, r PageReader, lba, n uint64, fn func(lba, n uint64, mapped bool) bool) error {
	end := m.clampEnd(lba, n)
	// [start, next) is the mapped run being gathered; before start all is reported.
	start, next, stopped := lba, lba, false
	err := m.Walk(ctx, r, lba, n, func(at uint64, _ Location) bool {
		if at == next {
			next++
			return true
		}
		stopped = next > start && !fn(start, next-start, true) || !fn(next, at-next, false)
		start, next = at, at+1
		return !stopped
	})
	if err != nil || stopped {
		return err
	}
	if next > start && !fn(start, next-start, true) {
		return nil
	}
	if end > next {
		fn(next, end-next, false)
	}
	return nil
}
