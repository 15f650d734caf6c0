package driver

import (
	"context"
	"errors"
	"fmt"

	"scoria/driver/lba"
	"scoria/driver/sco"
)

// checkSnapshots verifies that each snapshot's root and map pages are readable, that
// the live counts in its root are those of its pages, and that the pins are what
// the roots say. Each page is read once: what a snapshot has in common with the one
// before it was verified there. It locks the checkpoints for one snapshot at a time.
func (v *Volume) checkSnapshots(ctx context.Context, rep *CheckReport) {
	for _, s := range v.Snapshots() {
		if ctx.Err() != nil {
			return
		}
		if err := v.checkSnapshot(ctx, s, rep); err != nil && ctx.Err() == nil {
			rep.problem("snapshot %s: %v", s.Name, err)
		}
	}
}

func (v *Volume) checkSnapshot(ctx context.Context, s Snapshot, rep *CheckReport) error {
	c := v.ckpt
	c.mu.Lock()
	defer c.mu.Unlock()
	i := v.findSnapshot(s.ID)
	if i < 0 {
		return nil // deleted meanwhile
	}
	before := c.before(i)
	root, blob, err := v.readSnapshotRoot(ctx, &s)
	if err != nil {
		return err
	}
	v.checkSnapshotCopies(ctx, &s, rep)
	live := liveCounts(blob.scos)
	counted := map[uint64]uint32{}
	has := v.keptTables(ctx, before.SCO, s.SCO, rep)
	page := make([]byte, lba.PageBytes)
	for leaf, addr := range root.Directory {
		o := addr.Object()
		if o <= before.LastObject {
			continue
		}
		if !c.pinned[o] {
			rep.problem("snapshot %s: page object %d is not pinned", s.Name, o)
		}
		if err := v.ckpt.ReadPage(ctx, addr, page); err != nil {
			return fmt.Errorf("map leaf %d: %w", leaf, err)
		}
		for at := range uint64(lba.LeafClusters) {
			loc := lba.SlotOf(page, at)
			if loc.SCO() <= before.SCO {
				continue
			}
			counted[loc.SCO()]++
			if kept := has[loc.SCO()]; kept != nil && !kept.Has(loc.Cluster()) {
				rep.problem("snapshot %s: %s is reached and was not kept when the SCO was compacted", s.Name, loc)
			}
		}
	}
	v.metaMu.Lock()
	defer v.metaMu.Unlock()
	for n := before.SCO + 1; n <= s.SCO; n++ {
		if counted[n] != live[n] {
			rep.problem("snapshot %s: SCO %d: %d clusters are reached, %d are accounted for", s.Name, n, counted[n], live[n])
		}
		if v.pins[n] != live[n] {
			rep.problem("snapshot %s: SCO %d: %d clusters are pinned, it reaches %d", s.Name, n, v.pins[n], live[n])
		}
		if live[n] > 0 && v.scos[n] == nil && !v.isUnsealed(n) {
			rep.problem("snapshot %s: SCO %d is gone", s.Name, n)
		}
	}
	if i+1 == len(v.snaps) {
		for n := range v.pins {
			if n > s.SCO {
				rep.problem("SCO %d is pinned and younger than all snapshots", n)
			}
		}
	}
	return nil
}

// keptTables reads which clusters compacted SCOs behind a position, up to another,
// have.
func (v *Volume) keptTables(ctx context.Context, after, upTo uint64, rep *CheckReport) map[uint64]*sco.Kept {
	v.metaMu.Lock()
	var metas []*scoMeta
	for n, m := range v.scos {
		if n > after && n <= upTo && m.compact != nil {
			metas = append(metas, m)
		}
	}
	v.metaMu.Unlock()
	out := make(map[uint64]*sco.Kept, len(metas))
	for _, m := range metas {
		t, r, done, err := v.openSealed(ctx, m)
		if err == nil {
			out[m.number], err = t.ReadKept(r)
			done()
		}
		if err != nil {
			rep.problem("SCO %d: kept clusters: %v", m.number, err)
		}
	}
	return out
}

// isUnsealed: caller holds metaMu.
func (v *Volume) isUnsealed(n uint64) bool {
	for _, l := range v.unsealed {
		if l.hdr.Number == n {
			return true
		}
	}
	return false
}

// checkSnapshotCopies verifies the root where it was not looked at yet. Caller
// holds ckpt.mu.
func (v *Volume) checkSnapshotCopies(ctx context.Context, s *Snapshot, rep *CheckReport) {
	for _, p := range v.ckpt.queue {
		if p.sequence == s.Sequence {
			return // it is on the local disk only
		}
	}
	name := snapName(s.Sequence)
	_, err := v.storedRoot(ctx, name)
	if err != nil && !errors.Is(err, context.Canceled) {
		rep.problem("snapshot %s: %s: store's copy: %v", s.Name, name, err)
	}
}
