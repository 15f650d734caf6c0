package lba

import (
	"sync"
	"sync/atomic"
)

// An entry of the directory, one word per leaf:
//
//	63                    28 27               4  3    2        1      0
//	| page address >> 12    | generation       | 0 | resident | dirty | stored |
//
// A word of 0 is a leaf without any mapping, here or in the last checkpoint.
//
//	stored    a checkpoint holds the leaf, at the address in the stored table
//	dirty     memory differs from that checkpoint, or there is none
//	resident  the page address is valid
//
// The generation is the one in which the leaf was last made dirty or loaded; a
// leaf's page may be written in place only while the entry says dirty,
// resident and the current generation. An entry that is just `stored` is a
// leaf that has to be loaded; one that is dirty and not resident is empty,
// which the checkpoint doesn't know yet.
//
// Entries change only under the leaf's stripe lock. A page leaves a leaf only
// in a later generation than the one it came in, so the pair (page,
// generation) names one tenancy: who reads an entry, then a slot, then the
// same entry again, has read a slot of that leaf.
type entry uint64

const (
	flagStored entry = 1 << iota
	flagDirty
	flagResident

	genShift  = 4
	genBits   = 24
	genMask   = entry(1<<genBits-1) << genShift
	pageShift = genShift + genBits

	// currentMask selects what must match Map.current for a write in place.
	currentMask = genMask | flagDirty | flagResident
)

func makeEntry(page uintptr, gen, flags entry) entry {
	return entry(page)<<(pageShift-12) | gen | flags
}

func (e entry) page() uintptr { return uintptr(e>>(pageShift-12)) &^ (PageBytes - 1) }
func (e entry) gen() entry    { return e & genMask }

// absent: the leaf has mappings but only in a checkpoint.
func (e entry) absent() bool { return e == flagStored }

// A span is the stretch of leaves whose entries share a page of the directory:
// 1 GiB of volume. It counts its entries that are not 0, so that walks skip
// empty stretches.
const spanLeaves = PageBytes / 8

// Offsets in a map's reservation, which is made for the largest volume, so
// that a map grows without moving; only the part in use is accessible.
const (
	dirOffset    = 0
	storedOffset = dirOffset + MaxLeaves*8
	shadowOffset = storedOffset + MaxLeaves*8
	spanOffset   = shadowOffset + MaxLeaves*8
	reserveBytes = spanOffset + MaxLeaves/spanLeaves*4
)

// shadowEmpty in the shadow table stands for a page of zeroes.
const shadowEmpty = 1

func (m *Map) entry(leaf uint64) entry           { return entry(word(m.base+dirOffset, leaf).Load()) }
func (m *Map) setEntry(leaf uint64, e entry)     { word(m.base+dirOffset, leaf).Store(uint64(e)) }
func (m *Map) stored(leaf uint64) *atomic.Uint64 { return word(m.base+storedOffset, leaf) }
func (m *Map) shadow(leaf uint64) *atomic.Uint64 { return word(m.base+shadowOffset, leaf) }
func (m *Map) span(leaf uint64) *atomic.Uint32   { return word32(m.base+spanOffset, leaf/spanLeaves) }

// stripes is the number of locks and counters that leaves share.
const stripes = 16

type stripe struct {
	mu    sync.Mutex
	loads map[uint64]*loadCall // under mu; leaves being loaded
	_     [64 - 16]byte
}

type counter struct {
	atomic.Int64
	_ [64 - 8]byte
}

func (m *Map) stripe(leaf uint64) *stripe { return &m.stripes[leaf%stripes] }

// nextUsed returns the first leaf in [leaf, end) whose entry is not 0, or end.
func (m *Map) nextUsed(leaf, end uint64) uint64 {
	for leaf < end {
		next := min((leaf/spanLeaves+1)*spanLeaves, end)
		if m.span(leaf).Load() != 0 {
			for ; leaf < next; leaf++ {
				if m.entry(leaf) != 0 {
					return leaf
				}
			}
		}
		leaf = next
	}
	return end
}

// touch makes the leaf writable in place: resident, dirty, of the current
// generation. If a running checkpoint still needs the present contents, they
// are put aside first. Callers hold the leaf's stripe lock; the leaf is not
// absent. It fails only when the kernel refuses memory, and then has done nothing.
func (m *Map) touch(leaf uint64, e entry) (entry, bool) {
	current := entry(m.current.Load())
	if e&currentMask == current {
		return e, true
	}
	owed := m.owed(leaf, e)
	page, fresh := e.page(), false
	if e&flagResident == 0 {
		if page, fresh = m.arena.alloc(), true; page == 0 {
			return e, false
		}
	}
	switch {
	case owed && fresh:
		m.shadow(leaf).Store(shadowEmpty)
	case owed:
		copied := m.arena.alloc()
		if copied == 0 {
			return e, false
		}
		*pageWords(copied) = *pageWords(page)
		m.shadow(leaf).Store(uint64(copied))
	}
	changed := makeEntry(page, current.gen(), e&flagStored|flagDirty|flagResident)
	m.note(leaf, e, changed)
	m.setEntry(leaf, changed)
	return changed, true
}

// owed: a running checkpoint has yet to write the leaf as entry e describes it.
func (m *Map) owed(leaf uint64, e entry) bool {
	c := m.checkpoint.Load()
	return c != nil && e&flagDirty != 0 && e.gen() != c.next && leaf >= c.cursor.Load()
}

// note keeps the counters and the span in step with a change of an entry.
func (m *Map) note(leaf uint64, from, to entry) {
	if from == 0 && to != 0 {
		m.span(leaf).Add(1)
	}
	if from != 0 && to == 0 {
		m.span(leaf).Add(^uint32(0))
	}
	m.residentPages.Add(int64(to&flagResident/flagResident) - int64(from&flagResident/flagResident))
	m.dirtyLeaves.Add(int64(to&flagDirty/flagDirty) - int64(from&flagDirty/flagDirty))
}
