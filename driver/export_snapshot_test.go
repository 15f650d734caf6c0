package driver

import (
	"context"

	"github.com/google/uuid"

	"scoria/driver/lba"
)

// CheckpointAnew writes a checkpoint even if nothing was logged.
func (v *Volume) CheckpointAnew(ctx context.Context) error {
	return v.takeSoon(ctx, func(c *checkpoints) error { return c.take(ctx, nil, true) })
}

// Settled reports whether nothing is left to be published or deleted.
func (v *Volume) Settled() bool {
	c := v.ckpt
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.pending != nil || len(c.queue) > 0 || len(c.gone) > 0 || len(c.doomed) > 0 {
		return false
	}
	v.metaMu.Lock()
	defer v.metaMu.Unlock()
	if len(v.retired) > 0 {
		return false
	}
	for n, m := range v.scos {
		if !m.uploaded || v.live.at(n).Load() == 0 && v.pins[n] == 0 {
			return false
		}
	}
	for _, l := range v.unsealed {
		if r, _ := unpack(l.head.Load()); r > 0 {
			return false
		}
	}
	return true
}

// maps calls fn with the map of the volume (no id) and of each of its snapshots.
func (v *Volume) maps(ctx context.Context, fn func(id uuid.UUID, m *lba.Map) error) error {
	if err := fn(uuid.Nil, v.m); err != nil {
		return err
	}
	for _, s := range v.Snapshots() {
		h, release, err := v.holdSnapshot(ctx, s.ID)
		if err != nil {
			return err
		}
		err = fn(s.ID, h.m)
		release()
		if err != nil {
			return err
		}
	}
	return nil
}

// Reached walks all maps: how many clusters of each own SCO are reached, the same
// one by several maps counted as often, and which page objects of its own.
func (v *Volume) Reached(ctx context.Context) (scos map[uint64]int, objects map[uint32]bool, err error) {
	scos, objects = map[uint64]int{}, map[uint32]bool{}
	first := v.ckpt.beginning()
	err = v.maps(ctx, func(_ uuid.UUID, m *lba.Map) error {
		for _, o := range m.Objects() {
			if o > first.LastObject {
				objects[o] = true
			}
		}
		return m.Walk(ctx, v.ckpt, 0, m.Clusters(), func(_ uint64, loc lba.Location) bool {
			if loc.SCO() > first.SCO {
				scos[loc.SCO()]++
			}
			return true
		})
	})
	return scos, objects, err
}

// ReachedAlone walks all maps: how many clusters of the volume's own each snapshot
// reaches and no other map does, and how many only snapshots reach.
func (v *Volume) ReachedAlone(ctx context.Context) (alone map[uuid.UUID]uint64, notLive uint64, err error) {
	by := map[lba.Location]map[uuid.UUID]bool{}
	first := v.ckpt.beginning()
	err = v.maps(ctx, func(id uuid.UUID, m *lba.Map) error {
		return m.Walk(ctx, v.ckpt, 0, m.Clusters(), func(_ uint64, loc lba.Location) bool {
			if loc.SCO() > first.SCO {
				if by[loc] == nil {
					by[loc] = map[uuid.UUID]bool{}
				}
				by[loc][id] = true
			}
			return true
		})
	})
	alone = map[uuid.UUID]uint64{}
	for _, ids := range by {
		if !ids[uuid.Nil] {
			notLive++
		}
		if len(ids) == 1 {
			for id := range ids {
				alone[id]++
			}
		}
	}
	return alone, notLive, err
}

// Held is the SCOs that take space.
func (v *Volume) Held() map[uint64]bool {
	v.metaMu.Lock()
	defer v.metaMu.Unlock()
	out := map[uint64]bool{}
	for n := range v.scos {
		out[n] = true
	}
	return out
}

// ForgetRAM makes sealed SCOs be read from their files.
func (e *Engine) ForgetRAM() {
	for _, v := range e.list() {
		for i := range v.ram {
			if l := v.ram[i].Load(); l != nil && l.sealed.Load() && v.ram[i].CompareAndSwap(l, nil) {
				l.releaseChunks()
			}
		}
	}
}
