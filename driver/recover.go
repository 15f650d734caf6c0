package driver

import (
	"context"
	"errors"
	"fmt"
	"io/fs"

	"scoria/driver/block"
	"scoria/driver/lba"
)

// Recovery. The checkpoint gives the map up to a position; the log behind it is
// a chain of SCOs, each of which names its predecessor and the number of records
// that the predecessor ended with (record Open). The chain is followed as far as
// it goes and its records are applied in order. What comes after a break was
// never durable as a whole and is thrown away: that is the prefix of P2.
//
// A SCO is read from the first of these that exists: its sealed file, its
// records in the pool (the daemon died; nothing is missing and holes are
// reservations that nobody was told about), its open file (power was lost; the
// tail may be torn and is cut at the first record or cluster that fails its
// checksum, but never below what is known to have been synced).

// recover brings the volume to the state of its log. The caller is alone.
func (v *Volume) recover(ctx context.Context) error {
	if err := v.cfg.Store.Fence(ctx, v.namespace(), v.cfg.Epoch); err != nil {
		return err
	}
	inv, err := v.takeInventory(ctx)
	if err != nil {
		return err
	}
	if err := v.recoverFrom(ctx, inv); err != nil {
		inv.giveBack(v)
		return err
	}
	return nil
}

func (v *Volume) recoverFrom(ctx context.Context, inv *inventory) error {
	if err := v.restoreCheckpoint(ctx, inv); err != nil {
		return err
	}
	pos := v.ckpt.pos
	inv.highest = max(inv.highest, pos.sco)
	chain, err := v.followChain(ctx, inv, pos)
	if err != nil {
		return err
	}
	last := pos
	for _, s := range chain {
		if err := v.replay(ctx, s); err != nil {
			return fmt.Errorf("replay of SCO %d: %w", s.number, err)
		}
		last = position{s.number, s.cut}
	}
	for _, s := range chain {
		if err := v.settleReplayed(s); err != nil {
			return err
		}
	}
	// The names of files that a dead daemon made, and removals of ours.
	if err := v.eng.cfg.FS.SyncDir(v.scoDir()); err != nil {
		return err
	}
	v.cur = newLogSCO(v, inv.highest+1, last.sco, last.records)
	if !v.install(v.cur) {
		return fmt.Errorf("too many SCOs are not sealed")
	}
	return nil
}

// restoreCheckpoint loads the newest root, from the local disk or the store,
// and what belongs to the SCOs up to its position.
func (v *Volume) restoreCheckpoint(ctx context.Context, inv *inventory) error {
	found := &foundSnaps{local: map[uint64]bool{}, stored: map[uint64]bool{}}
	root, err := v.findRoot(ctx, found)
	if err != nil {
		return err
	}
	if root == nil {
		v.forgetUnmade(found)
		return nil
	}
	blob, err := decodeBlob(root.Blob)
	if err != nil {
		return err
	}
	if err := v.link(blob.ancestry); err != nil {
		return err
	}
	v.inheritedAtStart = int64(root.Mapped) - int64(sumLive(blob.scos))
	if root.Clusters > v.m.Clusters() {
		// It was shrunk, or a rollback made it larger and the registry doesn't know.
		if err := v.m.Resize(root.Clusters); err != nil {
			return err
		}
	}
	if err := v.m.RestoreDirectory(root.Directory, root.Mapped); err != nil {
		return err
	}
	// findRoot has seen newer ones if this is one that it fell back to.
	v.ckpt.sequence = max(v.ckpt.sequence, root.Sequence)
	v.ckpt.pos = position{root.LogSCO, uint32(root.LogRecord)}
	for _, o := range blob.objects {
		v.ckpt.pinned[o] = true
	}
	for i := range blob.scos {
		if e := &blob.scos[i]; e.pinned > 0 {
			v.pins[e.number] = e.pinned
		}
	}
	if err := v.restoreSnapshots(ctx, root, blob, found); err != nil {
		return err
	}
	if v.ckpt.rootStored && len(v.ckpt.gone) == 0 {
		v.ckpt.published = root.Sequence
	}
	known := map[uint64]bool{}
	for i := range blob.scos {
		e := &blob.scos[i]
		known[e.number] = true
		v.live.ensure(e.number)
		v.live.at(e.number).Store(int32(e.live))
		if err := v.restoreSCO(ctx, e, inv, root.Sequence); err != nil {
			return err
		}
	}
	v.republish(root, blob)
	return v.removeUnknown(ctx, root, known, inv)
}

// removeUnknown removes what the position covers and the table does not name: it was
// dead, and its deletion did not finish.
func (v *Volume) removeUnknown(ctx context.Context, root *lba.Root, known map[uint64]bool, inv *inventory) error {
	remove := func(n uint64, generation uint32, c copies) error {
		if c.local {
			if err := v.eng.cfg.FS.Remove(v.scoPath(n, generation)); err != nil {
				return err
			}
		}
		if c.uploaded {
			return v.cfg.Store.Delete(ctx, v.namespace(), scoObject(n, generation), v.cfg.Epoch)
		}
		return nil
	}
	for _, n := range inv.numbers() {
		if n > root.LogSCO || known[n] {
			continue
		}
		for _, g := range inv.generations(n) {
			if err := remove(n, g, inv.at(n, g)); err != nil {
				return err
			}
		}
		delete(inv.local, n)
		delete(inv.uploaded, n)
		delete(inv.compacted, n)
	}
	for n, chunks := range inv.chunks {
		if n <= root.LogSCO {
			v.releaseFound(chunks)
			delete(inv.chunks, n)
		}
	}
	return nil
}

// republish lets the root go to the store if it is not there: one that was written
// at a clean stop, or just before the daemon died.
func (v *Volume) republish(root *lba.Root, blob *rootBlob) {
	c := v.ckpt
	if c.rootStored || root.Sequence != c.sequence {
		return
	}
	p := &publication{sequence: root.Sequence, pos: c.pos, objects: c.own(v.m.Objects())}
	for i := range blob.scos {
		if e := &blob.scos[i]; e.sealed && e.live == 0 && e.pinned == 0 {
			p.dead = append(p.dead, e.number)
		}
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.enqueue(p)
}

// restoreSCO makes a SCO of the table known. One that was not sealed at the time
// was durable, all the same: the checkpoint saw to that.
func (v *Volume) restoreSCO(ctx context.Context, e *tableEntry, inv *inventory, root uint64) error {
	if inv.compacted[e.number] != nil || e.generation() > 0 {
		if err := v.settleGeneration(ctx, e, inv, root); err != nil {
			return err
		}
	}
	m := e.scoMeta
	if e.sealed {
		c := inv.at(m.number, m.generation())
		m.local, m.uploaded = c.local, c.uploaded
		if e.live == 0 && v.pins[m.number] == 0 && !m.local && !m.uploaded {
			return nil // its space was given back after the checkpoint
		}
		v.addSealed(&m)
		if !m.local && !m.uploaded {
			v.raise("missing-data", "SCO %d is neither on the local disk nor in the store: reads of its %d live clusters fail", m.number, max(e.live, v.pins[m.number]))
		}
		return nil
	}
	s, err := v.loadSCO(ctx, m.number, inv)
	if err != nil {
		return err
	}
	if s == nil || uint32(len(s.records)) < m.records {
		v.raise("missing-data", "SCO %d: %d records were durable, fewer are left: reads of their clusters fail", m.number, m.records)
		if s == nil {
			return nil
		}
	}
	s.cut = min(m.records, uint32(len(s.records)))
	delete(inv.chunks, m.number)
	return v.settleReplayed(s)
}

func (v *Volume) addSealed(m *scoMeta) {
	v.metaMu.Lock()
	v.scos[m.number] = m
	v.metaMu.Unlock()
	if m.local {
		v.eng.addLocal(m.size)
	}
}

func (v *Volume) releaseFound(chunks []foundChunk) {
	for _, c := range chunks {
		v.eng.pool.release(c.id)
	}
}

// followChain loads the SCOs behind pos, in order, as far as they belong
// together, and removes what comes after.
func (v *Volume) followChain(ctx context.Context, inv *inventory, pos position) ([]*replaySCO, error) {
	if err := v.refuseCompacted(inv, pos); err != nil {
		return nil, err
	}
	numbers := inv.numbers()
	for len(numbers) > 0 && numbers[0] <= pos.sco {
		numbers = numbers[1:]
	}
	var chain []*replaySCO
	for i, n := range numbers {
		s, err := v.loadSCO(ctx, n, inv)
		if err != nil {
			return nil, fmt.Errorf("SCO %d: %w", n, err)
		}
		if s != nil && v.joins(chain, pos, s) {
			chain = append(chain, s)
			continue
		}
		tail := []*replaySCO{s}
		for _, later := range numbers[i+1:] {
			s, err := v.loadSCO(ctx, later, inv)
			if err != nil {
				return nil, fmt.Errorf("SCO %d: %w", later, err)
			}
			tail = append(tail, s)
		}
		return chain, v.dropTail(numbers[i:], tail, inv)
	}
	return chain, nil
}

// joins decides whether s continues the chain, and cuts its predecessor where s
// says that it ended.
func (v *Volume) joins(chain []*replaySCO, pos position, s *replaySCO) bool {
	open := s.records[0]
	s.cut = uint32(len(s.records))
	if len(chain) == 0 {
		return open.LBA == pos.sco && uint32(open.Arg) == pos.records
	}
	before := chain[len(chain)-1]
	if open.LBA != before.number || uint32(open.Arg) > before.cut {
		return false
	}
	before.cut = uint32(open.Arg)
	return true
}

// dropTail removes SCOs that are not part of the log. It refuses if any of them
// was ever synced: all before it was then durable too, so the break is damage.
func (v *Volume) dropTail(numbers []uint64, tail []*replaySCO, inv *inventory) error {
	for i, n := range numbers {
		if s := tail[i]; inv.uploaded[n] || s != nil && (s.meta != nil || s.bound > 0) {
			return fmt.Errorf("the log breaks before SCO %d, and SCO %d, which was synced, lies behind the break: %w", numbers[0], n, block.ErrCorrupt)
		}
	}
	for i, n := range numbers {
		v.log.Warn().Uint64("sco", n).Msg("the log ends before this SCO; what was never flushed is dropped")
		if tail[i] != nil {
			tail[i].discard()
		}
		v.releaseFound(inv.chunks[n])
		delete(inv.chunks, n)
		if inv.local[n] {
			if err := v.eng.cfg.FS.Remove(v.scoPath(n, 0)); err != nil && !errors.Is(err, fs.ErrNotExist) {
				return err
			}
		}
	}
	return nil
}
