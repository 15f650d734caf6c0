package lba

import "context"

// Diff calls fn with consecutive runs of clusters that cover [lba, lba+n) as far as
// it lies in the map, until fn returns false: those that lie elsewhere than in old,
// a snapshot's map of the same volume (nil: nothing is mapped in it), and those that
// don't. Neighbouring runs differ in that. A leaf that both have in the same stored
// page costs nothing; others are read through r and stay absent. Safe from any
// goroutine, at any time; each leaf is seen as of some moment during the call.
func (m *Map) Diff(ctx context.Context, r PageReader, old *Map, lba, n uint64, fn func(lba, n uint64, differs bool) bool) error {
	d := &differ{m: m, old: old, r: r}
	end := m.clampEnd(lba, n)
	start, differs := lba, false
	for at := lba; at < end; {
		leaf := at / LeafClusters
		stop := min(end, (leaf+1)*LeafClusters)
		if next := d.nextUsed(leaf, (end+LeafClusters-1)/LeafClusters); next > leaf {
			stop = min(end, next*LeafClusters) // nothing is mapped up to there
			d.same = true
		} else if err := d.read(ctx, leaf); err != nil {
			return err
		}
		for at < stop {
			now := !d.same && d.a[at%LeafClusters] != d.b[at%LeafClusters]
			if now != differs {
				if at > start && !fn(start, at-start, differs) {
					return nil
				}
				start, differs = at, now
			}
			if d.same {
				at = stop
				break
			}
			at++
		}
	}
	if end > start {
		fn(start, end-start, differs)
	}
	return nil
}

// differ compares two maps leaf by leaf.
type differ struct {
	m, old *Map
	r      PageReader
	same   bool // the leaf that was read last is the same in both
	a, b   [LeafClusters]Location
	slots  [LeafClusters]uint64
}

// nextUsed returns the first leaf in [leaf, end) with anything in either map.
func (d *differ) nextUsed(leaf, end uint64) uint64 {
	next := d.m.nextUsed(leaf, end)
	if d.old != nil && leaf < d.old.leaves {
		next = min(next, d.old.nextUsedOr(leaf, min(end, d.old.leaves), end))
	}
	return next
}

// nextUsedOr is nextUsed that returns none if there is no leaf.
func (m *Map) nextUsedOr(leaf, end, none uint64) uint64 {
	if next := m.nextUsed(leaf, end); next < end {
		return next
	}
	return none
}

// read compares a leaf's addresses and, if need be, fetches both pages.
func (d *differ) read(ctx context.Context, leaf uint64) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	known := d.old != nil && leaf < d.old.leaves
	e := d.m.entry(leaf)
	d.same = known && e&flagDirty == 0 && d.m.stored(leaf).Load() == d.old.stored(leaf).Load() && d.m.entry(leaf) == e
	if d.same {
		return nil
	}
	clear(d.b[:])
	if known {
		if err := d.old.readLeaf(ctx, d.r, leaf, &d.slots, &d.b); err != nil {
			return err
		}
	}
	return d.m.readLeaf(ctx, d.r, leaf, &d.slots, &d.a)
}
