package driver

import (
	"context"
	"fmt"

	"scoria/driver/block"
	"scoria/driver/lba"
)

// BlockStatus implements block.Device.
func (v *Volume) BlockStatus(ctx context.Context, off, length uint64, fn func(block.Extent) bool) error {
	ctx, leave, err := v.enter(ctx)
	if err != nil {
		return err
	}
	defer leave()
	return v.blockStatus(ctx, v.m, v.Info().Size, off, length, fn)
}

// blockStatus reports what a map of a device of that size maps.
func (v *Volume) blockStatus(ctx context.Context, m *lba.Map, size, off, length uint64, fn func(block.Extent) bool) error {
	if off >= size {
		return nil
	}
	end := off + min(length, size-off)
	const step = 512 * block.ClusterSize // a leaf at a time
	var cur block.Extent
	for pos := off; pos < end; {
		stop := min(end, (pos/step+1)*step)
		first, last := pos/block.ClusterSize, (stop+block.ClusterSize-1)/block.ClusterSize
		locs := make([]lba.Location, last-first)
		for n, tried := 0, false; n < len(locs); {
			k := m.GetRange(first+uint64(n), locs[n:])
			n += k
			if tried = tried && k == 0; k > 0 {
				continue
			}
			if tried {
				return fmt.Errorf("map page of cluster %d: %w", first+uint64(n), errNotLoaded)
			}
			tried = true
			if err := v.loadPatiently(ctx, m, first+uint64(n), 1); err != nil {
				return err
			}
		}
		for i, loc := range locs {
			a := max(pos, (first+uint64(i))*block.ClusterSize)
			b := min(stop, (first+uint64(i)+1)*block.ClusterSize)
			if cur.Length > 0 && cur.Mapped == (loc != 0) {
				cur.Length += b - a
				continue
			}
			if cur.Length > 0 && !fn(cur) {
				return nil
			}
			cur = block.Extent{Offset: a, Length: b - a, Mapped: loc != 0}
		}
		pos = stop
		if err := ctx.Err(); err != nil {
			return err
		}
	}
	if cur.Length > 0 {
		fn(cur)
	}
	return nil
}
