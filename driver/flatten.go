package driver

import (
	"context"
	"errors"
	"fmt"
	"time"

	"scoria/driver/block"
	"scoria/driver/lba"
)

// Flatten copies what a clone has in its ancestors to the clone itself, while it is
// in use, and returns when a root that does without them is in the store: Ancestors
// then lists none. They stay as long as a snapshot of the clone refers to them;
// Flatten then returns when all is copied. It may be repeated after an error and
// goes on where it was. progress, which may be nil, is called with bytes. From any
// goroutine.
func (v *Volume) Flatten(ctx context.Context, progress func(done, total uint64)) error {
	ctx, leave, err := v.enter(ctx)
	if err == nil {
		defer leave()
		if err = v.copyInherited(ctx, progress); err == nil {
			err = v.awaitIndependence(ctx)
		}
	}
	if err != nil {
		return fmt.Errorf("volume %s: flatten: %w", v.cfg.Name, err)
	}
	return nil
}

func (v *Volume) inheritedNow() uint64 {
	v.gate.Lock()
	defer v.gate.Unlock()
	return v.inherited()
}

func (v *Volume) copyInherited(ctx context.Context, progress func(done, total uint64)) error {
	total := v.inheritedNow()
	for total > 0 {
		if err := v.writable(); err != nil {
			return err
		}
		var batch []moving
		var failed error
		flush := func() bool {
			failed = v.moveHere(ctx, batch)
			batch = batch[:0]
			if left := v.inheritedNow(); progress != nil {
				progress((total-min(left, total))*block.ClusterSize, total*block.ClusterSize)
			}
			return failed == nil
		}
		err := v.m.Walk(ctx, v.ckpt, 0, v.m.Clusters(), func(c uint64, loc lba.Location) bool {
			if loc.SCO() > v.origin.SCO {
				return true
			}
			batch = append(batch, moving{lba: c, from: loc, asOf: whenever})
			return len(batch) < moveBatch || flush()
		})
		if err == nil && failed == nil {
			flush()
		}
		if err := errors.Join(err, failed); err != nil {
			return err
		}
		if v.inheritedNow() == 0 {
			break
		}
	}
	return nil
}

// moveHere moves clusters to the head, however long that has to wait for room.
func (v *Volume) moveHere(ctx context.Context, batch []moving) error {
	for _, mv := range batch {
		if err := v.m.Load(ctx, v.ckpt, mv.lba, 1); err != nil {
			return err
		}
	}
	defer v.roomFound()
	for {
		err := errNoRoom // what it moves takes room for good, so the reserve is not for it
		if !v.lacksRoom(false) {
			err = v.move(ctx, batch)
		}
		if !errors.Is(err, errNoRoom) {
			return err
		}
		v.kickIO()
		v.eng.kickAll()
		select {
		case <-time.After(10 * time.Millisecond):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// awaitIndependence waits until the newest root in the store refers to no ancestor,
// unless a snapshot does.
func (v *Volume) awaitIndependence(ctx context.Context) error {
	for v.kin.Load() != nil {
		c := v.ckpt
		c.mu.Lock()
		alone := c.snapshotsAlone(ctx)
		c.mu.Unlock()
		if !alone {
			return ctx.Err()
		}
		if err := v.takeSoon(ctx, func(c *checkpoints) error { return c.take(ctx, nil, true) }); err != nil {
			return err
		}
		for try := 0; v.kin.Load() != nil && try < 500; try++ {
			v.kickIO()
			v.kickUpload()
			v.house.Lock()
			_, err := v.publish(ctx)
			v.house.Unlock()
			if err := ctx.Err(); err != nil {
				return err
			}
			if errors.Is(err, ErrStaleEpoch) {
				v.fence(err)
				return err
			}
			select {
			case <-time.After(20 * time.Millisecond):
			case <-ctx.Done():
			}
		}
		if err := v.writable(); err != nil {
			return err
		}
	}
	return nil
}
