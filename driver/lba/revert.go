package lba

import (
	"errors"
	"iter"
)

// errReverted: the leaf was stored elsewhere by the time its page had been read.
var errReverted = errors.New("map was reverted meanwhile")

// Revert makes the map what a stored directory says, as if it had been restored
// from it: nothing is dirty afterwards. The directory has been decoded from a root,
// of no more clusters than the map has. Exclusive, and no checkpoint runs. Who reads
// meanwhile sees the old map, the new one, or nothing.
func (m *Map) Revert(entries iter.Seq2[uint64, PageAddr], mapped uint64) {
	if m.checkpoint.Load() != nil {
		panic("lba: Revert while a checkpoint runs")
	}
	m.objectsMu.Lock()
	defer m.objectsMu.Unlock()
	// A page that leaves its leaf must come back in a later generation only.
	m.setGeneration(uint64(entry(m.current.Load())&genMask>>genShift)%(1<<genBits-1) + 1)
	m.uncommitted = 0
	for leaf := m.nextUsed(0, m.leaves); leaf < m.leaves; leaf = m.nextUsed(leaf+1, m.leaves) {
		m.restoreLeaf(leaf, 0)
	}
	clear(m.objects)
	for leaf, addr := range entries {
		m.restoreLeaf(leaf, addr)
		m.count(addr, 1)
	}
	for i := range m.mapped {
		m.mapped[i].Store(0)
	}
	m.mapped[0].Store(int64(mapped))
}

// restoreLeaf makes a leaf one that is stored at addr and not in memory, or empty.
func (m *Map) restoreLeaf(leaf uint64, addr PageAddr) {
	s := m.stripe(leaf)
	s.mu.Lock()
	defer s.mu.Unlock()
	e := m.entry(leaf)
	changed := entry(0)
	if addr != 0 {
		changed = flagStored
	}
	m.stored(leaf).Store(uint64(addr))
	m.note(leaf, e, changed)
	m.setEntry(leaf, changed)
	if e&flagResident != 0 {
		m.arena.put(e.page(), false)
	}
}
