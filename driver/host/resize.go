package host

import (
	"context"
	"fmt"

	"scoria/driver/block"
	"scoria/driver/control"
	"scoria/driver/registry"
)

// resize grows a volume, or, with force, makes it smaller: then the engine comes
// first, as the record must not promise less than guests may have written.
func (h *VolumeSet) resize(ctx context.Context, name string, size uint64, force bool) (registry.Volume, error) {
	if e, err := h.load(ctx, name); err == nil && size < e.Record.Size {
		if _, err := h.open(ctx, e.Record.FullName()); err != nil {
			return e.Record, err
		}
	}
	v, e, leave, err := h.enterLoaded(ctx, name)
	if err != nil {
		return e.Record, err
	}
	defer leave()
	name = v.name
	grown := e.Record
	grown.Size = size
	if err := settled(&e.Record); err != nil {
		return e.Record, err
	}
	if err := h.checkRecord(&grown); err != nil {
		return e.Record, control.Errorf(control.CodeInvalid, "%v", err)
	}
	dev := h.device(v.name)
	if size < e.Record.Size {
		if dev == nil {
			return e.Record, fmt.Errorf("volume %s: %w", name, block.ErrClosed) // since it was opened above
		}
		return h.shrink(ctx, dev, e, size, force)
	}
	if size > e.Record.Size {
		before := e.Record.Size
		e.Record.Size = size
		if e, err = registry.Replace(ctx, h.reg, registry.VolumeKey(e.Record.Pool, e.Record.Name), e); err != nil {
			return e.Record, fmt.Errorf("resize volume %s: %w", name, err)
		}
		h.log.Info().Str("volume", name).Uint64("from", before).Uint64("to", size).Msg("volume resized")
	}
	if dev != nil && dev.Info().Size != size {
		if err := dev.Resize(context.WithoutCancel(ctx), size); err != nil {
			return e.Record, fmt.Errorf("resize volume %s: the new size is recorded, but the running volume did not take it: %w; call resize again", name, err)
		}
	}
	return e.Record, nil
}

// shrink makes a volume smaller, with force. The gate is held.
func (h *VolumeSet) shrink(ctx context.Context, dev Volume, e registry.Entry[registry.Volume], size uint64, force bool) (registry.Volume, error) {
	name := e.Record.FullName()
	lost, last, err := h.mappedBehind(ctx, dev, size, e.Record.Size)
	if err != nil {
		return e.Record, err
	}
	if !force {
		text := "nothing is written there"
		if lost > 0 {
			text = fmt.Sprintf("%s that are written there would be lost, the last at byte %d", Size(lost), last)
		}
		return e.Record, control.Errorf(control.CodeNeedsForce, "volume %s: %s is less than its size, %s: %s (--force does it)", name, Size(size), Size(e.Record.Size), text)
	}
	ctx = context.WithoutCancel(ctx)
	if err := dev.Shrink(ctx, size, true); err != nil {
		return e.Record, fmt.Errorf("resize volume %s: %w", name, err)
	}
	before := e.Record.Size
	e.Record.Size = size
	if e, err = registry.Replace(ctx, h.reg, registry.VolumeKey(e.Record.Pool, e.Record.Name), e); err != nil {
		return e.Record, fmt.Errorf("resize volume %s: %w; call resize again", name, err)
	}
	h.log.Warn().Str("volume", name).Uint64("from", before).Uint64("to", size).Uint64("lost", lost).Msg("volume made smaller")
	return e.Record, nil
}

// mappedBehind adds up what is mapped from size on, and says where the last of it
// ends.
func (h *VolumeSet) mappedBehind(ctx context.Context, dev Volume, size, end uint64) (bytes, last uint64, err error) {
	if size >= end {
		return 0, 0, nil
	}
	err = dev.BlockStatus(ctx, size, end-size, func(e block.Extent) bool {
		if e.Mapped {
			bytes += e.Length
			last = e.Offset + e.Length - 1
		}
		return true
	})
	return bytes, last, err
}
