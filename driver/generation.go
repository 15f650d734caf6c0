package driver

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"

	"scoria/driver/block"
	"scoria/driver/sco"
)

// Generations. A compacted SCO is a new generation of it; generation numbers grow
// within a volume and none is used twice while it is open, so that an upload that
// nobody waits for any more can't be taken for a later one. The table of the newest
// root says which one counts. Another is there only around a crash, or until the root
// that names its successor is in the store.

// settleGeneration decides which generation of a SCO of the table counts: the one
// that the root with that sequence number names. If that is lost, an older one has
// all that it had; a newer one may. The others go when no root in the store can need
// them.
func (v *Volume) settleGeneration(ctx context.Context, e *tableEntry, inv *inventory, root uint64) error {
	wanted := e.generation()
	all := inv.generations(e.number)
	v.generation = max(v.generation, wanted)
	if inv.at(e.number, wanted) == (copies{}) && len(inv.chunks[e.number]) == 0 {
		m, err := v.anyGeneration(ctx, e.number, wanted, inv)
		if err != nil {
			return err
		}
		if m != nil {
			v.log.Warn().Uint64("sco", e.number).Uint32("generation", wanted).Uint32("instead", m.generation()).Msg("a compacted SCO is gone; another generation of it takes its place")
			e.scoMeta, e.sealed = *m, true
			root = v.ckpt.sequence + 1
		}
	}
	for _, g := range all {
		v.generation = max(v.generation, g)
		if g == e.generation() {
			continue
		}
		if err := v.retireFound(e.number, g, inv.at(e.number, g), root); err != nil {
			return err
		}
		delete(inv.compacted[e.number], g)
		if g == 0 {
			delete(inv.local, e.number)
			delete(inv.uploaded, e.number)
		}
	}
	return nil
}

// anyGeneration describes the generation of a SCO that replaces a lost one: the
// newest of those before it, else the oldest of those behind; nil if none is whole.
func (v *Volume) anyGeneration(ctx context.Context, n uint64, lost uint32, inv *inventory) (*scoMeta, error) {
	all := inv.generations(n)
	behind := slices.IndexFunc(all, func(g uint32) bool { return g < lost })
	if behind < 0 {
		behind = len(all)
	}
	order := slices.Clone(all[behind:])
	slices.Reverse(all[:behind])
	for _, g := range append(order, all[:behind]...) {
		m, err := v.readMeta(ctx, n, g, inv.at(n, g))
		if failed := (*storeError)(nil); errors.As(err, &failed) || ctx.Err() != nil {
			return nil, err
		}
		if err == nil {
			return m, nil
		}
		v.log.Warn().Uint64("sco", n).Uint32("generation", g).Err(err).Msg("generation is not readable")
	}
	return nil, nil
}

// readMeta reads the description of a sealed SCO from its trailer.
func (v *Volume) readMeta(ctx context.Context, n uint64, generation uint32, c copies) (*scoMeta, error) {
	read := func(r io.ReaderAt, size int64) (*scoMeta, error) {
		t, err := sco.ReadTrailer(r, size)
		if err == nil && (t.Volume != v.cfg.ID || t.Number != n || t.Generation != generation) {
			err = fmt.Errorf("its trailer is of SCO %d, generation %d, of volume %s: %w", t.Number, t.Generation, t.Volume, sco.ErrFormat)
		}
		if err != nil {
			return nil, err
		}
		return metaOf(&t), nil
	}
	if c.local {
		path := v.scoPath(n, generation)
		info, err := v.eng.cfg.FS.Stat(path)
		if err == nil {
			var m *scoMeta
			if m, err = read(localFile{v.eng.cfg.FS, path}, info.Size()); err == nil {
				return m, nil
			}
		}
		if !c.uploaded {
			return nil, err
		}
	}
	name := scoObject(n, generation)
	size, err := v.storeSize(ctx, name)
	if err != nil {
		return nil, err
	}
	return read(storeObject{ctx, v, name}, size)
}

// retireFound lets a generation go that was found at the opening: its local copy at
// once, since a root names only what is in the store.
func (v *Volume) retireFound(n uint64, generation uint32, c copies, root uint64) error {
	if c.local {
		if err := v.eng.cfg.FS.Remove(v.scoPath(n, generation)); err != nil {
			return err
		}
	}
	if c.uploaded {
		m := &scoMeta{number: n, uploaded: true}
		if generation > 0 {
			m.compact = &compacted{generation: generation}
		}
		v.retire(m, root)
	}
	return nil
}

// refuseCompacted sees to compacted SCOs behind the checkpoint: the root that knew of
// them could not be read. The log can be followed only through what they were.
func (v *Volume) refuseCompacted(inv *inventory, pos position) error {
	for n := range inv.compacted {
		if n <= pos.sco {
			continue
		}
		if !inv.local[n] && !inv.uploaded[n] {
			return fmt.Errorf("SCO %d is there compacted only, and the checkpoint that goes beyond it is not readable: %w", n, block.ErrCorrupt)
		}
		for _, g := range inv.generations(n) {
			v.generation = max(v.generation, g)
			if g == 0 {
				continue
			}
			if err := v.retireFound(n, g, inv.at(n, g), v.ckpt.sequence+1); err != nil {
				return err
			}
		}
		delete(inv.compacted, n)
	}
	return nil
}

// retiree is a generation that has a successor. It goes when the root with the
// sequence number since, or a later one, is in the store.
type retiree struct {
	*scoMeta
	since uint64
}

// retire lets a generation go. Caller holds checkpoints.mu or is alone.
func (v *Volume) retire(m *scoMeta, since uint64) {
	v.metaMu.Lock()
	defer v.metaMu.Unlock()
	m.lastRead = 0
	v.retired = append(v.retired, retiree{m, since})
	v.ckpt.owes.Store(true)
	v.rest.Store(nil)
}

// namesReplaced reports whether the newest root names a generation that has a
// successor. Caller holds checkpoints.mu.
func (c *checkpoints) namesReplaced() bool {
	c.v.metaMu.Lock()
	defer c.v.metaMu.Unlock()
	return slices.ContainsFunc(c.v.retired, func(r retiree) bool { return r.since > c.sequence })
}

// doomRetired marks the generations that only have to be deleted yet. Caller holds mu.
func (c *checkpoints) doomRetired() {
	c.v.metaMu.Lock()
	defer c.v.metaMu.Unlock()
	for _, r := range c.v.retired {
		if r.since <= c.published {
			r.doomed = true
		}
	}
}

// deleteRetired deletes them, as far as the store lets it.
func (v *Volume) deleteRetired(ctx context.Context) error {
	if !v.checkMu.TryLock() {
		return nil // a check reads them
	}
	defer v.checkMu.Unlock()
	v.metaMu.Lock()
	var doomed []*scoMeta
	for _, r := range v.retired {
		if r.doomed {
			doomed = append(doomed, r.scoMeta)
		}
	}
	v.metaMu.Unlock()
	for _, m := range doomed {
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := v.cfg.Store.Delete(ctx, v.namespace(), v.objectOf(m), v.cfg.Epoch); err != nil {
			return fmt.Errorf("SCO %d: generation %d: %w", m.number, m.generation(), err)
		}
		v.dropLocal(m)
		v.metaMu.Lock()
		v.retired = slices.DeleteFunc(v.retired, func(r retiree) bool { return r.scoMeta == m })
		v.spaceFreedBy(m.size)
		v.metaMu.Unlock()
		v.stats.reclaimed.Add(uint64(m.size))
		v.spaceProgress()
	}
	return nil
}
