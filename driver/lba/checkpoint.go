package lba

import (
	"context"
	"fmt"
	"iter"
	"maps"
	"slices"
	"sync/atomic"
)

// maxUncommitted bounds how many generations may lie between the oldest dirty leaf
// and now; far below 1<<genBits, so that no old generation looks current.
const maxUncommitted = 1 << 16

// Checkpoint is the map as it was at one BeginCheckpoint. Its methods are
// called from one goroutine, outside the gate, in the order WritePages,
// Directory, Commit; Abort may come at any point instead.
type Checkpoint struct {
	m      *Map
	next   entry         // generation bits that came with the beginning: later writes bear them
	cursor atomic.Uint64 // leaves below have been seen to. Changed under the leaf's stripe lock
	mapped uint64
	leaves uint64 // that existed at the beginning

	written  []storedLeaf // dirty leaves in ascending order, with their new addresses
	complete bool         // WritePages has succeeded
}

type storedLeaf struct {
	leaf uint64
	addr PageAddr // 0: the leaf is empty
}

// BeginCheckpoint takes a snapshot of the map. Exclusive; takes constant time.
// At most one checkpoint runs at a time.
func (m *Map) BeginCheckpoint() *Checkpoint {
	if m.checkpoint.Load() != nil {
		panic("lba: a checkpoint is running already")
	}
	if m.uncommitted++; m.uncommitted > maxUncommitted {
		m.renumber()
	}
	gen := uint64(entry(m.current.Load())&genMask>>genShift)%(1<<genBits-1) + 1
	c := &Checkpoint{m: m, next: entry(gen) << genShift, mapped: m.Mapped(), leaves: m.leaves}
	m.checkpoint.Store(c)
	m.setGeneration(gen)
	return c
}

// renumber gives all dirty leaves the current generation. Exclusive.
func (m *Map) renumber() {
	current := entry(m.current.Load())
	for leaf := m.nextUsed(0, m.leaves); leaf < m.leaves; leaf = m.nextUsed(leaf+1, m.leaves) {
		s := m.stripe(leaf)
		s.mu.Lock()
		if e := m.entry(leaf); e&flagDirty != 0 {
			m.setEntry(leaf, e&^genMask|current.gen())
		}
		s.mu.Unlock()
	}
	m.uncommitted = 1
}

// Mapped returns how many clusters were mapped at the beginning.
func (c *Checkpoint) Mapped() uint64 { return c.mapped }

// WritePages calls fn, in ascending order, with each leaf that was dirty at the
// beginning and not empty, and its page as it was then. fn stores the page and
// returns where. It may block and must not keep page. The map may be changed
// meanwhile. After an error the only thing left is Abort.
func (c *Checkpoint) WritePages(fn func(leaf uint64, page []byte) (PageAddr, error)) error {
	if c.complete || c.cursor.Load() != 0 {
		panic("lba: WritePages called twice")
	}
	var page [LeafClusters]uint64
	for leaf := c.m.nextUsed(0, c.leaves); leaf < c.leaves; leaf = c.m.nextUsed(leaf+1, c.leaves) {
		dirty := c.capture(leaf, &page)
		if !dirty {
			continue
		}
		var addr PageAddr
		if page != [LeafClusters]uint64{} {
			var err error
			if addr, err = fn(leaf, heapBytes(&page)); err != nil {
				return fmt.Errorf("store map leaf %d: %w", leaf, err)
			}
			if addr.Object() == 0 {
				panic("lba: a page was stored at no address")
			}
		}
		c.written = append(c.written, storedLeaf{leaf, addr})
	}
	c.cursor.Store(c.leaves)
	c.complete = true
	return nil
}

// capture copies the leaf as of the beginning and lets writers have it from
// here on. It returns false if the leaf was not dirty then.
func (c *Checkpoint) capture(leaf uint64, page *[LeafClusters]uint64) (dirty bool) {
	m := c.m
	s := m.stripe(leaf)
	s.mu.Lock()
	defer s.mu.Unlock()
	c.cursor.Store(leaf + 1)
	if shadow := uintptr(m.shadow(leaf).Load()); shadow != 0 {
		m.shadow(leaf).Store(0)
		clear(page[:])
		if shadow != shadowEmpty {
			*page = *pageWords(shadow)
			m.arena.put(shadow, false)
		}
		return true
	}
	e := m.entry(leaf)
	if e&flagDirty == 0 || e.gen() == c.next {
		return false
	}
	clear(page[:])
	if e&flagResident != 0 {
		*page = *pageWords(e.page())
		if *page == [LeafClusters]uint64{} {
			// Nobody writes to a leaf of an older generation without this lock.
			empty := makeEntry(0, e.gen(), e&flagStored|flagDirty)
			m.note(leaf, e, empty)
			m.setEntry(leaf, empty)
			m.arena.put(e.page(), true)
		}
	}
	return true
}

// Directory yields, in ascending order, all leaves that were not empty at the
// beginning and where they are stored: the dirty ones where WritePages put
// them, the others where they were. For the root object.
func (c *Checkpoint) Directory() iter.Seq2[uint64, PageAddr] {
	if !c.complete {
		panic("lba: Directory before WritePages is done")
	}
	return func(yield func(uint64, PageAddr) bool) {
		written := c.written
		for leaf := c.m.nextUsed(0, c.leaves); leaf < c.leaves; leaf = c.m.nextUsed(leaf+1, c.leaves) {
			addr := PageAddr(c.m.stored(leaf).Load())
			if len(written) > 0 && written[0].leaf == leaf {
				addr, written = written[0].addr, written[1:]
			}
			if addr != 0 && !yield(leaf, addr) {
				return
			}
		}
	}
}

// Commit makes the stored pages the leaves' own, once the root object that
// names them is durable. Leaves that were not touched since the beginning are
// clean from here on.
func (c *Checkpoint) Commit() {
	if !c.complete {
		panic("lba: Commit before WritePages is done")
	}
	m := c.m
	m.objectsMu.Lock()
	defer m.objectsMu.Unlock()
	for _, w := range c.written {
		c.commitLeaf(w)
	}
	m.uncommitted = 0
	m.checkpoint.Store(nil)
}

// commitLeaf enters one leaf's new address. Callers hold objectsMu.
func (c *Checkpoint) commitLeaf(w storedLeaf) {
	m := c.m
	s := m.stripe(w.leaf)
	s.mu.Lock()
	defer s.mu.Unlock()
	m.count(PageAddr(m.stored(w.leaf).Swap(uint64(w.addr))), -1)
	m.count(w.addr, 1)
	e := m.entry(w.leaf)
	changed := e &^ flagStored
	if w.addr != 0 {
		changed |= flagStored
	}
	if e.gen() != c.next {
		changed &^= flagDirty
		if w.addr == 0 {
			changed = 0
		}
	}
	m.note(w.leaf, e, changed)
	m.setEntry(w.leaf, changed)
}

// Abort gives the checkpoint up: all it would have cleaned stays dirty, and
// pages it has stored are nobody's.
func (c *Checkpoint) Abort() {
	m := c.m
	if m.checkpoint.Load() != c {
		panic("lba: Abort of a checkpoint that doesn't run")
	}
	m.checkpoint.Store(nil)
	for leaf := m.nextUsed(0, c.leaves); leaf < c.leaves; leaf = m.nextUsed(leaf+1, c.leaves) {
		s := m.stripe(leaf)
		s.mu.Lock()
		if shadow := uintptr(m.shadow(leaf).Load()); shadow != 0 {
			m.shadow(leaf).Store(0)
			if shadow != shadowEmpty {
				m.arena.put(shadow, false)
			}
		}
		s.mu.Unlock()
	}
}

// RestoreDirectory enters the leaves of a stored checkpoint, ascending, and its
// mapped count into a new map. They are loaded when needed. After an error
// (ErrDirectory) the map can only be closed.
func (m *Map) RestoreDirectory(entries iter.Seq2[uint64, PageAddr], mapped uint64) error {
	if m.Mapped() != 0 || m.nextUsed(0, m.leaves) != m.leaves {
		panic("lba: RestoreDirectory into a map that is in use")
	}
	m.objectsMu.Lock()
	defer m.objectsMu.Unlock()
	next, leaves := uint64(0), uint64(0)
	// Counts are gathered per stretch; nobody else sees the map yet.
	object, pages := uint32(0), 0
	span, used := uint64(0), uint32(0)
	for leaf, addr := range entries {
		switch {
		case leaf < next:
			return fmt.Errorf("%w: leaf %d does not ascend", ErrDirectory, leaf)
		case leaf >= m.leaves:
			return fmt.Errorf("%w: leaf %d: the volume has %d", ErrDirectory, leaf, m.leaves)
		case addr.Object() == 0:
			return fmt.Errorf("%w: leaf %d has object number 0", ErrDirectory, leaf)
		}
		if addr.Object() != object {
			m.count(MakePageAddr(object, 0), pages)
			object, pages = addr.Object(), 0
		}
		if leaf/spanLeaves != span {
			m.span(span * spanLeaves).Store(used)
			span, used = leaf/spanLeaves, 0
		}
		*plainWord(m.base+storedOffset, leaf) = uint64(addr)
		*plainWord(m.base+dirOffset, leaf) = uint64(flagStored)
		pages++
		used++
		leaves++
		next = leaf + 1
	}
	m.count(MakePageAddr(object, 0), pages)
	m.span(span * spanLeaves).Store(used)
	if mapped < leaves || mapped > min(leaves*LeafClusters, m.clusters.Load()) {
		return fmt.Errorf("%w: %d clusters mapped in %d leaves", ErrDirectory, mapped, leaves)
	}
	m.mapped[0].Store(int64(mapped))
	return nil
}

// count adds to the live pages of an address's object. Callers hold objectsMu.
func (m *Map) count(addr PageAddr, pages int) {
	object := addr.Object()
	if object == 0 || pages == 0 {
		return
	}
	if m.objects[object] += pages; m.objects[object] == 0 {
		delete(m.objects, object)
	}
}

// LivePages returns how many pages of a checkpoint object the last committed
// checkpoint refers to. An object with none may be deleted.
func (m *Map) LivePages(object uint32) int {
	m.objectsMu.Lock()
	defer m.objectsMu.Unlock()
	return m.objects[object]
}

// Objects returns, ascending, the checkpoint objects that have live pages.
func (m *Map) Objects() []uint32 {
	m.objectsMu.Lock()
	defer m.objectsMu.Unlock()
	return slices.Sorted(maps.Keys(m.objects))
}

// MarkObjectDirty makes every leaf stored in the object dirty, loading it if
// need be, so that the next checkpoint to begin stores it anew and the object can
// go. It blocks on r and is called outside the gate.
func (m *Map) MarkObjectDirty(ctx context.Context, r PageReader, object uint32) error {
	end := (m.clusters.Load() + LeafClusters - 1) / LeafClusters
	for leaf := m.nextUsed(0, end); leaf < end; leaf = m.nextUsed(leaf+1, end) {
		if PageAddr(m.stored(leaf).Load()).Object() != object {
			continue
		}
		if err := m.loadLeaf(ctx, r, leaf); err != nil {
			return err
		}
		if !m.markDirty(leaf, object) {
			return fmt.Errorf("mark map leaf %d dirty: %w", leaf, ErrMemory)
		}
	}
	return nil
}

// markDirty makes the leaf dirty if it still is stored in the object.
func (m *Map) markDirty(leaf uint64, object uint32) bool {
	s := m.stripe(leaf)
	s.mu.Lock()
	defer s.mu.Unlock()
	e := m.entry(leaf)
	if e&flagDirty != 0 || PageAddr(m.stored(leaf).Load()).Object() != object {
		return true
	}
	_, ok := m.touch(leaf, e)
	return ok
}
