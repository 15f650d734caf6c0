package driver

import (
	"cmp"
	"slices"
)

// Which snapshots are gone for good is part of the volume's own root, so that it
// does not hang on what the registry knows: a registry that was restored from an
// older copy names some that were deleted, and lacks some that were made. Of roots
// of snapshots, those that the newest root calls dropped are removed, and all
// others exist. A root says it before the first file of a snapshot goes.
//
// Ranges with no snapshot between them are one, so there is at most one more of
// them than there are snapshots.

// maxDropped bounds the ranges that roots carry along. The oldest whose roots are
// removed are forgotten beyond that: such a snapshot then counts as missing, not
// as deleted, if a registry still names it.
const maxDropped = 1024

// seqRange is the sequence numbers between after and before, both exclusive.
type seqRange struct{ after, before uint64 }

func (r seqRange) contains(seq uint64) bool { return seq > r.after && seq < r.before }

func isDropped(ranges []seqRange, seq uint64) bool {
	return slices.ContainsFunc(ranges, func(r seqRange) bool { return r.contains(seq) })
}

// withDropped returns the ranges with one more, for the next root of a volume that
// then has the first kept of its snapshots. Caller holds mu.
func (c *checkpoints) withDropped(r seqRange, kept int) []seqRange {
	barriers := make([]uint64, 0, kept+len(c.unclear))
	for _, s := range c.v.snaps[:kept] {
		barriers = append(barriers, s.Sequence)
	}
	for seq := range c.unclear {
		if !r.contains(seq) {
			barriers = append(barriers, seq)
		}
	}
	slices.Sort(barriers)
	ranges := joinRanges(append(slices.Clone(c.dropped), r), barriers)
	for i := 0; i < len(ranges) && len(ranges) > maxDropped; {
		if c.needsRange(ranges[i]) {
			i++
			continue
		}
		ranges = slices.Delete(ranges, i, i+1)
	}
	return ranges
}

// needsRange reports whether roots of snapshots in it are still to be removed.
// Caller holds mu.
func (c *checkpoints) needsRange(r seqRange) bool {
	for seq := range c.gone {
		if r.contains(seq) {
			return true
		}
	}
	return false
}

// joinRanges sorts ranges and makes those one that no barrier separates.
func joinRanges(ranges []seqRange, barriers []uint64) []seqRange {
	slices.SortFunc(ranges, func(a, b seqRange) int { return cmp.Compare(a.after, b.after) })
	out := ranges[:0]
	for _, r := range ranges {
		if n := len(out); n > 0 && !separated(&out[n-1], r, barriers) {
			out[n-1].before = max(out[n-1].before, r.before)
			continue
		}
		out = append(out, r)
	}
	return out
}

// separated reports whether a barrier lies between two ranges, the first of which
// does not begin later.
func separated(a *seqRange, b seqRange, barriers []uint64) bool {
	if b.after < a.before {
		return false
	}
	i, _ := slices.BinarySearch(barriers, a.before)
	return i < len(barriers) && barriers[i] <= b.after
}
