package lba

// Clear unmaps the clusters [lba, lba+n) and calls freed, if not nil, with each
// location that became garbage. Exclusive. It costs nothing per empty leaf in
// an empty 1 GiB of volume, and one look per empty leaf elsewhere. It returns
// false, and has cleared nothing, if some leaf in the range must be loaded
// first. freed must not call the map.
func (m *Map) Clear(lba, n uint64, freed func(Location)) (ok bool) {
	end := m.clampEnd(lba, n)
	if lba >= end {
		return true
	}
	if !m.Resident(lba, end-lba) {
		return false
	}
	// The leaves at the two ends stay in part and may need memory; they come
	// first, because nothing behind them can fail.
	first, last := lba/LeafClusters, (end-1)/LeafClusters
	if !m.prepareClear(first, lba, end) || !m.prepareClear(last, lba, end) {
		return false
	}
	for leaf := m.nextUsed(first, last+1); leaf <= last; leaf = m.nextUsed(leaf+1, last+1) {
		m.clearLeaf(leaf, max(lba, leaf*LeafClusters), min(end, (leaf+1)*LeafClusters), freed)
	}
	return true
}

// clampEnd returns the end of [lba, lba+n) within the volume.
func (m *Map) clampEnd(lba, n uint64) uint64 {
	size := m.clusters.Load()
	if lba >= size {
		return lba
	}
	return lba + min(n, size-lba)
}

// prepareClear makes a leaf of which [lba, end) covers only a part writable, if
// there is something to clear in it.
func (m *Map) prepareClear(leaf, lba, end uint64) bool {
	from, to := max(lba, leaf*LeafClusters), min(end, (leaf+1)*LeafClusters)
	if to-from == LeafClusters {
		return true
	}
	var slots [LeafClusters]Location
	part := slots[:to-from]
	m.getLeaf(leaf, from%LeafClusters, part)
	for _, loc := range part {
		if loc != 0 {
			_, ok := m.prepare(leaf)
			return ok
		}
	}
	return true
}

// clearLeaf clears [from, to), which lies in the leaf.
func (m *Map) clearLeaf(leaf, from, to uint64, freed func(Location)) {
	var gone [LeafClusters]Location
	n := m.takeSlots(leaf, from, to, &gone)
	if n == 0 {
		return
	}
	m.mapped[leaf%stripes].Add(-int64(n))
	if freed != nil {
		for _, loc := range gone[:n] {
			freed(loc)
		}
	}
}

// takeSlots removes and returns what is mapped in [from, to).
func (m *Map) takeSlots(leaf, from, to uint64, gone *[LeafClusters]Location) (n int) {
	s := m.stripe(leaf)
	s.mu.Lock()
	defer s.mu.Unlock()
	e := m.entry(leaf)
	if e&flagResident == 0 {
		return 0
	}
	current := entry(m.current.Load())
	page := e.page()
	whole := to-from == LeafClusters
	if whole && e.gen() != current.gen() {
		for _, loc := range pageWords(page) {
			if loc != 0 {
				gone[n] = Location(loc)
				n++
			}
		}
		m.detach(leaf, e, makeEntry(0, current.gen(), e&flagStored|flagDirty))
		return n
	}
	// A leaf that came into this generation's hands keeps its page until the
	// next one (see entry); only its slots are emptied. It needs no copy put
	// aside, or prepareClear has seen to it.
	if whole && e&flagDirty == 0 {
		changed := e | flagDirty
		m.note(leaf, e, changed)
		m.setEntry(leaf, changed)
	}
	for i := from; i < to; i++ {
		slot := word(page, i%LeafClusters)
		if slot.Load() == 0 {
			continue
		}
		gone[n] = Location(slot.Swap(0))
		n++
	}
	return n
}

// detach takes the page from a leaf that becomes empty; a running checkpoint
// inherits it if it still has to write the leaf. Callers hold the stripe lock.
func (m *Map) detach(leaf uint64, e, empty entry) {
	owed := m.owed(leaf, e)
	m.note(leaf, e, empty)
	m.setEntry(leaf, empty)
	if owed {
		m.shadow(leaf).Store(uint64(e.page()))
		return
	}
	m.arena.put(e.page(), false)
}
