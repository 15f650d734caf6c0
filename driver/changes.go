package driver

import (
	"context"

	"github.com/google/uuid"

	"scoria/driver/block"
	"scoria/driver/lba"
)

// Changes calls fn with consecutive extents that cover the part of [off, off+length)
// inside the volume, or inside snapshot upTo if that is not uuid.Nil, until fn
// returns false. Mapped says that an extent may differ from snapshot since; if that
// is uuid.Nil, that it is mapped. What the scrubber moved counts as different.
//
// It costs what has changed: parts of the map that both sides have in the same
// stored page are not read. A View of since that is open makes repeated calls
// cheap. From any goroutine.
func (v *Volume) Changes(ctx context.Context, since, upTo uuid.UUID, off, length uint64, fn func(block.Extent) bool) error {
	ctx, leave, err := v.enter(ctx)
	if err != nil {
		return err
	}
	defer leave()
	m, size := v.m, v.Info().Size
	if upTo != uuid.Nil {
		s, release, err := v.holdSnapshot(ctx, upTo)
		if err != nil {
			return err
		}
		defer release()
		m, size = s.m, s.Size
	}
	var old *lba.Map
	if since != uuid.Nil {
		s, release, err := v.holdSnapshot(ctx, since)
		if err != nil {
			return err
		}
		defer release()
		old = s.m
	}
	if off >= size {
		return nil
	}
	end := off + min(length, size-off)
	first, last := off/block.ClusterSize, (end+block.ClusterSize-1)/block.ClusterSize
	return m.Diff(ctx, v.ckpt, old, first, last-first, func(c, n uint64, differs bool) bool {
		a, b := max(off, c*block.ClusterSize), min(end, (c+n)*block.ClusterSize)
		return fn(block.Extent{Offset: a, Length: b - a, Mapped: differs})
	})
}
