package driver

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/google/uuid"

	"scoria/driver/lba"
	"scoria/driver/sco"
)

// putTimeout bounds one upload of a map object: a store that hangs must not keep
// the volume from its local checkpoints.
const putTimeout = time.Minute

// publish puts the pending root into the store when all SCOs that it builds on
// are there, and then gives the space of dead SCOs back, now or, as far as that
// fails, at the next call. It reports whether it published.
func (v *Volume) publish(ctx context.Context) (bool, error) {
	c := v.ckpt
	done, err := c.publishRoot(ctx)
	c.mu.Lock()
	c.doomRetired()
	doomed := c.takeDoomed()
	c.mu.Unlock()
	var left, unsure []uint64
	looks := newLastLooks(doomed)
	errs := []error{err}
	for i, n := range doomed {
		if ctx.Err() != nil {
			left = append(left, doomed[i:]...)
			break
		}
		gone, err := v.deleteSCO(ctx, n, looks)
		if errors.Is(err, ErrLost) {
			// What refers to it can't be read: nobody can vouch that nothing does.
			v.log.Warn().Err(err).Uint64("sco", n).Msg("an empty SCO is kept for now: part of a map is lost")
			unsure = append(unsure, n)
			continue
		}
		if !gone {
			left = append(left, n)
		}
		errs = append(errs, err)
	}
	c.mu.Lock()
	c.doomed = append(c.doomed, left...)
	c.keepUnsure(unsure)
	c.mu.Unlock()
	errs = append(errs, v.deleteRetired(ctx))
	return done, errors.Join(errs...)
}

// someDoomed reports whether SCOs are left that should have been deleted.
func (c *checkpoints) someDoomed() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.doomed) > 0
}

// publishRoot reports whether it has published a root. Those of snapshots go
// first, in the order of their making.
func (c *checkpoints) publishRoot(ctx context.Context) (bool, error) {
	v := c.v
	c.mu.Lock()
	defer c.mu.Unlock()
	defer c.settleAccount()
	for len(c.queue) > 0 && v.uploadedUpTo(c.queue[0].pos.sco, c.queue[0].dead) {
		p := c.queue[0]
		if err := c.putAll(ctx, p, snapName(p.sequence)); err != nil {
			return false, fmt.Errorf("publish snapshot: %w", err)
		}
		c.queue = c.queue[1:]
		c.removeMapFile(snapName(p.sequence))
	}
	p := c.pending
	if p == nil || !v.uploadedUpTo(p.pos.sco, p.dead) {
		return false, nil
	}
	if err := c.putAll(ctx, p, rootName(p.sequence)); err != nil {
		return false, fmt.Errorf("publish checkpoint: %w", err)
	}
	if p.alone {
		v.unlink()
	}
	err := c.removeGone(ctx, p.sequence)
	if err == nil {
		c.published = p.sequence
		c.doomed = append(c.doomed, v.doom(p.dead)...)
	}
	next := c.newest
	c.newest = nil
	c.await(next)
	if err != nil {
		c.overdue = true // another root tries again, before any SCO is deleted
		return true, err
	}
	return true, c.removeStaleInStore(ctx, p)
}

// settleAccount notes whether the store lacks anything. Caller holds mu.
func (c *checkpoints) settleAccount() {
	c.v.metaMu.Lock()
	defer c.v.metaMu.Unlock()
	c.owes.Store(c.pending != nil || len(c.queue) > 0 || len(c.gone) > 0 || len(c.v.retired) > 0)
}

// putAll uploads page objects and then the root that needs them.
func (c *checkpoints) putAll(ctx context.Context, p *publication, root string) error {
	for _, o := range p.objects {
		if c.inStore[o] {
			continue
		}
		if err := c.put(ctx, pagesName(o)); err != nil {
			return err
		}
		c.inStore[o] = true
	}
	return c.put(ctx, root)
}

// removeGone deletes the roots of snapshots that the published root with that
// sequence number does without.
func (c *checkpoints) removeGone(ctx context.Context, sequence uint64) error {
	for seq, since := range c.gone {
		if since > sequence {
			continue
		}
		if err := c.v.cfg.Store.Delete(ctx, c.v.namespace(), snapName(seq), c.v.cfg.Epoch); err != nil {
			return fmt.Errorf("delete snapshot: %w", err)
		}
		delete(c.gone, seq)
	}
	return nil
}

// await makes p, which may be nil, the root that goes to the store next. SCOs that
// were dead at its position need not be uploaded any more: a store that is slower
// than the writers would otherwise be busy with garbage for ever. Caller holds mu.
func (c *checkpoints) await(p *publication) {
	c.pending = p
	if p == nil {
		return
	}
	c.v.metaMu.Lock()
	defer c.v.metaMu.Unlock()
	for _, n := range p.dead {
		if m := c.v.scos[n]; m != nil {
			m.unwanted = true
		}
	}
}

// put uploads a file of the map directory.
func (c *checkpoints) put(ctx context.Context, name string) error {
	v := c.v
	ctx, cancel := context.WithTimeout(ctx, putTimeout)
	defer cancel()
	path := v.mapPath(name)
	info, err := v.eng.cfg.FS.Stat(path)
	if err != nil {
		return err
	}
	file := localFile{v.eng.cfg.FS, path}
	obj := Object{Data: file, Size: info.Size(), LocalPath: path}
	if object, ok := parsePages(name); ok {
		obj.Sums = func() ([]uint32, error) { return v.pageObjectSums(file, obj.Size, object) }
	}
	err = v.cfg.Store.Put(ctx, v.namespace(), name, v.cfg.Epoch, obj)
	if err == nil {
		v.stats.uploaded.Add(uint64(info.Size()))
	}
	return err
}

// doom marks SCOs as those that only have to be deleted yet, and returns those
// that are new.
func (v *Volume) doom(dead []uint64) (fresh []uint64) {
	v.metaMu.Lock()
	defer v.metaMu.Unlock()
	for _, n := range dead {
		if m := v.scos[n]; m != nil && !m.doomed {
			m.doomed = true
			fresh = append(fresh, n)
		}
	}
	return fresh
}

// removeStaleInStore removes what neither the root just published needs nor anything
// later. Caller holds mu.
func (c *checkpoints) removeStaleInStore(ctx context.Context, p *publication) error {
	v := c.v
	keep := map[string]bool{rootName(p.sequence): true}
	for _, o := range p.objects {
		keep[pagesName(o)] = true
	}
	for o := range c.pinned {
		keep[pagesName(o)] = true
	}
	// A rollback may have gone back, since p was made, to pages to which p does not
	// refer and which no snapshot keeps any more: only the store has them.
	for _, o := range c.own(v.m.Objects()) {
		keep[pagesName(o)] = true
	}
	if c.pending != nil {
		for _, o := range c.pending.objects {
			keep[pagesName(o)] = true
		}
	}
	for _, prefix := range []string{rootPrefix, pagesPrefix} {
		names, err := v.cfg.Store.List(ctx, v.namespace(), prefix)
		if err != nil {
			return err
		}
		for _, n := range names {
			if keep[n] {
				continue
			}
			if err := v.cfg.Store.Delete(ctx, v.namespace(), n, v.cfg.Epoch); err != nil {
				return err
			}
			var object uint32
			if _, err := fmt.Sscanf(n, pagesPrefix+"%08x", &object); err == nil {
				delete(c.inStore, object)
			}
		}
	}
	return nil
}

// uploadedUpTo reports whether every SCO up to n, but the dead ones, is in the
// store.
func (v *Volume) uploadedUpTo(n uint64, dead []uint64) bool {
	isDead := map[uint64]bool{}
	for _, d := range dead {
		isDead[d] = true
	}
	v.metaMu.Lock()
	defer v.metaMu.Unlock()
	for _, l := range v.unsealed {
		if r, _ := unpack(l.head.Load()); l.hdr.Number <= n && r > 0 {
			return false
		}
	}
	for _, m := range v.scos {
		if m.number <= n && !m.uploaded && !m.dropping && !isDead[m.number] {
			return false
		}
	}
	return true
}

// deleteSCO gives the space of a dead SCO back, after a last look: no record of
// it may be current, whatever the counter says. gone says that there is nothing
// left to try; ErrLost, that part of a map can't be read for it any more.
func (v *Volume) deleteSCO(ctx context.Context, n uint64, looks *lastLooks) (gone bool, err error) {
	// A check may take hours; everything else must not wait for it.
	if !v.checkMu.TryLock() {
		return false, nil
	}
	defer v.checkMu.Unlock()
	v.metaMu.Lock()
	m := v.scos[n]
	var dropping bool
	if m != nil {
		dropping = m.dropping
	}
	v.metaMu.Unlock()
	if m == nil {
		return true, nil
	}
	if !dropping {
		current, err := v.anyCurrent(ctx, m, looks)
		if err == nil && !current {
			current, err = v.anyInSnapshot(ctx, m, looks)
		}
		switch {
		case errors.Is(err, sco.ErrFormat):
			// Nobody reads it and nobody can vouch for it: it stays.
			v.log.Error().Err(err).Uint64("sco", n).Msg("an empty SCO is damaged; it is kept")
			return true, nil
		case err != nil:
			return false, fmt.Errorf("SCO %d: %w", n, err)
		case current:
			return true, nil
		}
	}
	v.metaMu.Lock()
	m.dropping = true
	v.metaMu.Unlock()
	if err := v.cfg.Store.Delete(ctx, v.namespace(), v.objectOf(m), v.cfg.Epoch); err != nil {
		return false, fmt.Errorf("SCO %d: %w", n, err)
	}
	if l := v.ramSCO(n); l != nil && v.ram[n&uint64(len(v.ram)-1)].CompareAndSwap(l, nil) {
		l.releaseChunks()
	}
	v.dropLocal(m)
	v.metaMu.Lock()
	delete(v.scos, n)
	v.spaceFreedBy(m.size)
	v.metaMu.Unlock()
	v.stats.reclaimed.Add(uint64(m.size))
	v.spaceProgress()
	return true, nil
}

// anyCurrent reports whether the map refers to a SCO that counts as empty, and
// corrects the count.
func (v *Volume) anyCurrent(ctx context.Context, m *scoMeta, looks *lastLooks) (bool, error) {
	records, err := v.sealedRecords(ctx, m)
	if errors.Is(err, ErrLost) {
		cluster, current, err := v.clusterIn(ctx, looks, m.number, uuid.Nil, v.m)
		if current {
			v.keepCurrent(m, cluster)
		}
		return current, err
	}
	if err != nil {
		return false, err
	}
	for i := range records {
		r := &records[i]
		if !r.HasData() {
			continue
		}
		now, err := v.locateIn(ctx, r.LBA)
		if err != nil {
			return false, err
		}
		if now == lba.MakeLocation(m.number, r.Cluster) {
			v.keepCurrent(m, r.LBA)
			return true, nil
		}
	}
	return false, nil
}
