package driver

import (
	"context"
	"fmt"

	"scoria/driver/block"
	"scoria/driver/lba"
)

// Resize makes the volume larger. It takes effect at once and is announced to the
// watchers; the registry must know the new size first. For less see Shrink.
func (v *Volume) Resize(_ context.Context, size uint64) error {
	if !v.users.add() {
		return fmt.Errorf("volume %s: resize: %w", v.cfg.Name, block.ErrClosed)
	}
	defer v.users.done()
	v.resizeMu.Lock()
	defer v.resizeMu.Unlock()
	v.gate.Lock()
	defer v.gate.Unlock()
	c := v.cfg
	c.Size = size
	if err := c.Validate(); err != nil {
		return err
	}
	if size < v.cfg.Size {
		return fmt.Errorf("volume %s: new size %d is less than %d: shrinking has to be asked for", c.Name, size, v.cfg.Size)
	}
	if err := v.m.Resize(max(size/block.ClusterSize, v.m.Clusters())); err != nil {
		return fmt.Errorf("volume %s: resize to %d: %w", c.Name, size, err)
	}
	v.announceSize(size)
	return nil
}

// announceSize: caller holds the gate exclusively, so no write behind a smaller
// size is under way, and none begins.
func (v *Volume) announceSize(size uint64) {
	v.cfg.Size = size
	v.setInfo()
	info := v.Info()
	go v.watches.notify(info)
}

// ShrinkError refuses to cut off data.
type ShrinkError struct {
	Bytes uint64 // mapped behind the new end
	Last  uint64 // offset of the last byte of them
}

func (e *ShrinkError) Error() string {
	return fmt.Sprintf("%d bytes of data behind the new end would be lost, the last at offset %d", e.Bytes, e.Last)
}

// Shrink makes the volume smaller. It fails with *ShrinkError without force if
// anything is mapped behind the new end; with force that is discarded. Guests see
// the new size at once. The registry gets it when Shrink has returned: what was cut
// off is then gone for good. Snapshots keep their size. From any goroutine.
func (v *Volume) Shrink(ctx context.Context, size uint64, force bool) error {
	fail := func(err error) error {
		return fmt.Errorf("volume %s: shrink to %d: %w", v.cfg.Name, size, err)
	}
	ctx, leave, err := v.enter(ctx)
	if err != nil {
		return fail(err)
	}
	defer leave()
	v.resizeMu.Lock()
	defer v.resizeMu.Unlock()
	v.gate.RLock()
	c := v.cfg
	v.gate.RUnlock()
	c.Size = size
	if err := c.Validate(); err != nil {
		return err
	}
	before := v.Info().Size
	if size > before {
		return fail(fmt.Errorf("it has %d bytes", before))
	}
	if err := v.mayCut(ctx, size, force); err != nil {
		return fail(err)
	}
	v.gate.Lock()
	v.announceSize(size)
	v.gate.Unlock()
	if err := v.cut(ctx, size/block.ClusterSize); err != nil {
		v.gate.Lock()
		v.announceSize(before)
		v.gate.Unlock()
		return fail(fmt.Errorf("%w; what lay behind may have been discarded", err))
	}
	if err := v.takeSoon(ctx, func(c *checkpoints) error { return c.take(ctx, nil, true) }); err != nil {
		return fail(err)
	}
	return nil
}

// mayCut looks for data behind the new end.
func (v *Volume) mayCut(ctx context.Context, size uint64, force bool) error {
	if force {
		return nil
	}
	var found ShrinkError
	err := v.m.Walk(ctx, v.ckpt, size/block.ClusterSize, v.m.Clusters(), func(c uint64, _ lba.Location) bool {
		found.Bytes += block.ClusterSize
		found.Last = (c+1)*block.ClusterSize - 1
		return true
	})
	if err == nil && found.Bytes > 0 {
		return &found
	}
	return err
}

// cut discards everything from first on and makes the map smaller.
func (v *Volume) cut(ctx context.Context, first uint64) error {
	if err := v.clearWhole(&block.Request{Op: block.OpDiscard}, first, v.m.Clusters()); err != nil {
		return err
	}
	if err := v.m.Load(ctx, v.ckpt, first, v.m.Clusters()); err != nil {
		return err
	}
	v.gate.Lock()
	defer v.gate.Unlock()
	return v.m.Resize(first)
}
