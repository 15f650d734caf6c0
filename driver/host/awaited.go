package host

import (
	"context"
	"errors"
	"sync"
	"time"

	"scoria/driver"
	"scoria/driver/block"
	"scoria/driver/control"
	"scoria/driver/lba"
	"scoria/driver/registry"
	"scoria/driver/sco"
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
// ends. Those that can't be opened are tried again and again, each for itself, until
// ctx ends; failures are logged by the opening, and volumes show them. opened is
// called when all have been tried.
func (h *VolumeSet) openAwaited(ctx context.Context, names []string, opened func()) {
	var tried, ended sync.WaitGroup
	slots := make(chan struct{}, parallelOpenings)
	for _, name := range names {
		tried.Add(1)
		ended.Go(func() {
			done := h.openFirst(ctx, name, slots)
			tried.Done()
			if !done {
				h.openAgain(ctx, name)
			}
		})
	}
	tried.Wait()
	opened()
	ended.Wait()
}

// openFirst is openAndServe in one of the slots. An opening that takes long, as what it
// needs does not answer, gives its slot up.
func (h *VolumeSet) openFirst(ctx context.Context, name string, slots chan struct{}) bool {
	select {
	case slots <- struct{}{}:
	case <-ctx.Done():
		return true
	}
	leave := sync.OnceFunc(func() { <-slots })
	late := time.AfterFunc(maxReopenPause, leave)
	defer func() {
		late.Stop()
		leave()
	}()
	return h.openAndServe(ctx, name)
}

// openAgain tries until there is nothing left to do.
func (h *VolumeSet) openAgain(ctx context.Context, name string) {
	for pause := minReopenPause; ; pause = min(2*pause, maxReopenPause) {
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return
		}
		if h.openAndServe(ctx, name) {
			return
		}
	}
}

// hopeless says that an opening failed for something that no waiting mends: what the
// store has is damaged, or another daemon owns the volume. Whoever wants the volume has
// it tried again all the same.
func hopeless(err error) bool {
	for _, why := range []error{block.ErrCorrupt, driver.ErrStaleEpoch, lba.ErrFormat, sco.ErrFormat, registry.ErrVersion} {
		if errors.Is(err, why) {
			return true
		}
	}
	return false
}

// engineError is an opening's failure in the engine: in the store, or on the disk.
type engineError struct{ err error }

func (e *engineError) Error() string { return e.err.Error() }
func (e *engineError) Unwrap() error { return e.err }

// insist has a volume whose opening failed tried again in the background, if that may
// help: nobody has to ask for it again. Those that are awaited are tried anyway.
// Caller holds mu.
func (h *VolumeSet) insist(v *volume, err error) {
	var engine *engineError
	if h.closed || v.awaited || v.insisting || !errors.As(err, &engine) || hopeless(err) {
		return
	}
	v.insisting = true
	h.wg.Go(func() {
		h.openAgain(h.ctx, v.name)
		h.mu.Lock()
		v.insisting = false
		h.mu.Unlock()
	})
}

// openAndServe reports whether there is nothing left to do for a volume: it is open and
// served, or gone, or no further attempt could help.
func (h *VolumeSet) openAndServe(ctx context.Context, name string) bool {
	if _, err := h.open(ctx, name); err != nil {
		return errors.Is(err, block.ErrNotFound) || hopeless(err) || ctx.Err() != nil
	}
	h.serveAwaited(ctx, name)
	return true
}

// serveAwaited gives a volume that was awaited and is open to the front ends.
func (h *VolumeSet) serveAwaited(ctx context.Context, name string) {
	h.mu.Lock()
	v := h.volumes[name]
	nothing := v == nil || !v.awaited && len(v.gate) == 0 // else somebody may be serving it
	h.mu.Unlock()
	if nothing {
		return
	}
	v, leave, err := h.enter(ctx, name)
	if err != nil {
		return // ctx has ended
	}
	defer leave()
	h.mu.Lock()
	serve := v.awaited && v.dev != nil // else it was deleted meanwhile
	v.awaited = false
	h.mu.Unlock()
	if serve {
		h.serve(v)
	}
}

// troubled is a front end that knows of troubles of its users.
type troubled interface {
	Troubles(name string) []control.Condition
}
