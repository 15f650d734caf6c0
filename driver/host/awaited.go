package host

import (
	"context"
	"errors"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"scoria/driver/block"
	"scoria/driver/control"
)

// Bounds of the pause between two attempts to open an awaited volume.
const (
	minReopenPause = time.Second
	maxReopenPause = 10 * time.Second
)

// Guests that ran when the last daemon died connect again within a second. QEMU
// before 9.1 loses its device for good if that connection then ends while QEMU
// negotiates (see package vhost), as it would when the volume can't be opened, or
// when the daemon dies again during a long recovery. So the volumes that guests
// are expected to want, the awaited ones, are opened first and listened for then.

// await marks volumes as awaited. Before Serve.
func (h *VolumeSet) await(names []string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, name := range names {
		h.volumeLocked(name).awaited = true
	}
}

func (h *VolumeSet) isAwaited(v *volume) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return v.awaited
}

// openAwaited opens awaited volumes side by side and gives each to the front
// ends. Those that can't be opened are tried again and again, until ctx ends;
// failures are logged by the opening, and volumes show them. opened is called when
// all have been tried.
func (h *VolumeSet) openAwaited(ctx context.Context, names []string, opened func()) {
	var (
		g    errgroup.Group
		mu   sync.Mutex
		left []string
	)
	g.SetLimit(parallelOpenings)
	for _, name := range names {
		g.Go(func() error {
			if !h.openAndServe(ctx, name) {
				mu.Lock()
				left = append(left, name)
				mu.Unlock()
			}
			return nil
		})
	}
	_ = g.Wait() // none of them returns an error
	opened()
	for pause := minReopenPause; len(left) > 0; pause = min(2*pause, maxReopenPause) {
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return
		}
		var still []string
		for _, name := range left {
			if !h.openAndServe(ctx, name) {
				still = append(still, name)
			}
		}
		left = still
	}
}

// openAndServe reports whether there is nothing left to do for an awaited volume.
func (h *VolumeSet) openAndServe(ctx context.Context, name string) bool {
	if _, err := h.open(ctx, name); err != nil {
		return errors.Is(err, block.ErrNotFound) || ctx.Err() != nil
	}
	v, leave, err := h.enter(ctx, name)
	if err != nil {
		return true // ctx has ended
	}
	defer leave()
	h.mu.Lock()
	serve := v.awaited && v.dev != nil // else it was deleted meanwhile
	v.awaited = false
	h.mu.Unlock()
	if serve {
		h.serve(v)
	}
	return true
}

// troubled is a front end that knows of troubles of its users.
type troubled interface {
	Troubles(name string) []control.Condition
}
