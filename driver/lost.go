package driver

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"

	"scoria/driver/block"
)

// What the store has lost, requests do not wait for: it would be for ever. They fail
// (P5), the volume says so, and the store is asked from time to time whether somebody
// has brought it back.

// maxLost bounds the ranges that are asked for again, and maxLostRead one of them.
const (
	maxLost     = 64
	maxLostRead = 1 << 20
)

// lostRange is part of an object that a request did not get.
type lostRange struct {
	name string
	off  int64
	n    int
}

// lostData is what a volume's requests have met. Under mu only conds.mu is taken.
type lostData struct {
	mu     sync.Mutex
	ranges []lostRange
	asking bool // there is a goroutine
}

// readObject reads part of an object from the store.
func (v *Volume) readObject(ctx context.Context, name string, p []byte, off int64) error {
	err := askStore(ctx, func(ctx context.Context) error {
		return v.cfg.Store.ReadAt(ctx, v.namespace(), name, p, off)
	})
	if requestOf(ctx) != nil && errors.Is(err, ErrLost) {
		v.hasLost(lostRange{name, off, min(len(p), maxLostRead)}, err)
	}
	return err
}

// beyondRepair is what a request ends with for which the store has lost something; nil
// for other errors, and for other work.
func beyondRepair(ctx context.Context, err error) error {
	if requestOf(ctx) == nil || !errors.Is(err, ErrLost) {
		return nil
	}
	return fmt.Errorf("%w and can't be repaired: %w", block.ErrCorrupt, err)
}

// hasLost shows that data is lost, for as long as it is.
func (v *Volume) hasLost(r lostRange, err error) {
	l := &v.lost
	l.mu.Lock()
	v.raise("data-lost", "reads of what the store has lost fail (%s, %d bytes at %d: %v): bring back the disks that had it, write over it, or go back to a snapshot or a backup",
		r.name, r.n, r.off, err)
	if !slices.Contains(l.ranges, r) && len(l.ranges) < maxLost {
		l.ranges = append(l.ranges, r)
	}
	begin := !l.asking
	l.asking = true
	l.mu.Unlock()
	if begin {
		v.spawn(v.askForLost) // or the volume is closing
	}
}

// askForLost asks for what was lost, until all of it is back or no longer there.
func (v *Volume) askForLost() {
	for pauseFor(v.ckpt.work, maxStorePause) == nil {
		for over := false; v.askNext(&over); {
			if over {
				return
			}
		}
	}
}

// askNext asks for one range and says whether it is back, or not there any more; over
// that it was the last, and that this shows.
func (v *Volume) askNext(over *bool) (back bool) {
	l := &v.lost
	l.mu.Lock()
	r := l.ranges[0]
	l.mu.Unlock()
	err := v.cfg.Store.ReadAt(v.ckpt.work, v.namespace(), r.name, make([]byte, r.n), r.off)
	l.mu.Lock()
	defer l.mu.Unlock()
	l.ranges = slices.Delete(l.ranges, 0, 1)
	var failed *storeError
	if errors.As(unanswered(err), &failed) {
		l.ranges = append(l.ranges, r)
		return false
	}
	if *over = len(l.ranges) == 0; *over {
		l.asking = false
		v.settle("data-lost")
	}
	return true
}
