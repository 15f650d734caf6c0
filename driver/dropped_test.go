package driver

import (
	"math/rand/v2"
	"slices"
	"testing"
)

// TestDroppedRangesAreExact: whatever is dropped in whatever order, the ranges hold
// what was dropped and numbers that no snapshot has, never one that exists, and there
// are at most as many as there are gaps.
func TestDroppedRangesAreExact(t *testing.T) {
	rng := rand.New(rand.NewPCG(3, 9))
	for range 200 {
		c := &checkpoints{v: &Volume{}, gone: map[uint64]uint64{}, unclear: map[uint64]bool{}}
		for seq := uint64(1); seq < 60; seq += 1 + rng.Uint64N(3) {
			c.v.snaps = append(c.v.snaps, &snapshotState{Snapshot: Snapshot{Sequence: seq}})
		}
		c.unclear[60] = true
		var dropped []uint64
		for len(c.v.snaps) > 0 {
			from := rng.IntN(len(c.v.snaps))
			to := from + 1
			if rng.IntN(4) == 0 {
				to = len(c.v.snaps) // a rollback
			}
			r := seqRange{c.v.snaps[from].Sequence - 1, c.v.snaps[to-1].Sequence + 1}
			for _, s := range c.v.snaps[from:to] {
				dropped = append(dropped, s.Sequence)
			}
			c.v.snaps = slices.Delete(c.v.snaps, from, to)
			c.dropped = c.withDropped(r, len(c.v.snaps))
			for _, seq := range dropped {
				if !isDropped(c.dropped, seq) {
					t.Fatalf("%d was dropped, ranges %v", seq, c.dropped)
				}
			}
			for _, s := range c.v.snaps {
				if isDropped(c.dropped, s.Sequence) {
					t.Fatalf("%d exists, ranges %v", s.Sequence, c.dropped)
				}
			}
			if isDropped(c.dropped, 60) {
				t.Fatalf("nobody dropped 60, ranges %v", c.dropped)
			}
			if len(c.dropped) > len(c.v.snaps)+1 {
				t.Fatalf("%d ranges for %d snapshots: %v", len(c.dropped), len(c.v.snaps), c.dropped)
			}
		}
	}
}

// TestDroppedRangesAreBounded: the oldest are forgotten, but none whose root is still
// to be removed.
func TestDroppedRangesAreBounded(t *testing.T) {
	c := &checkpoints{v: &Volume{}, gone: map[uint64]uint64{2: 1}, unclear: map[uint64]bool{}}
	const n = maxDropped + 50
	for i := range uint64(n) {
		c.v.snaps = append(c.v.snaps, &snapshotState{Snapshot: Snapshot{Sequence: 2*i + 1}})
	}
	for i := range uint64(n) {
		c.dropped = c.withDropped(seqRange{2*i + 1, 2*i + 3}, n)
	}
	if len(c.dropped) != maxDropped || !isDropped(c.dropped, 2) || isDropped(c.dropped, 4) || !isDropped(c.dropped, 2*n) {
		t.Fatalf("%d ranges, from %v to %v", len(c.dropped), c.dropped[:3], c.dropped[len(c.dropped)-1])
	}
}
