package host

import (
	"context"
	"errors"
	"sync"
	"time"

	"github.com/google/uuid"

	"scoria/driver/block"
	"scoria/driver/control"
	"scoria/driver/registry"
)

// Pauses between two attempts to undo what a client left: its last connections may
// be ending yet.
const (
	minUndoPause = 100 * time.Millisecond
	maxUndoPause = 5 * time.Second
)

// held is something that was made for the time of a client's operation.
type held struct {
	volume   string    // POOL/VOLUME
	id       uuid.UUID // of the volume that is imported, or of the snapshot
	snapshot string    // empty: the volume itself
}

// holds are the clients that keep one, by name. They are not recorded: a start undoes
// what is unfinished anyhow. mu is a leaf.
type holds struct {
	mu sync.Mutex
	m  map[string][]held
}

// add reports whether the client is still there.
func (h *holds) add(owner string, x held) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	list, ok := h.m[owner]
	if ok {
		h.m[owner] = append(list, x)
	}
	return ok
}

func (h *holds) end(owner string) []held {
	h.mu.Lock()
	defer h.mu.Unlock()
	list := h.m[owner]
	delete(h.m, owner)
	return list
}

// BeginHold implements control.HoldBackend.
func (h *VolumeSet) BeginHold() (owner string) {
	owner = uuid.NewString()
	h.holds.mu.Lock()
	defer h.holds.mu.Unlock()
	if h.holds.m == nil {
		h.holds.m = map[string][]held{}
	}
	h.holds.m[owner] = nil
	return owner
}

// EndHold implements control.HoldBackend.
func (h *VolumeSet) EndHold(owner string) {
	for _, x := range h.holds.end(owner) {
		h.mu.Lock()
		if !h.closed {
			h.wg.Go(func() { h.keepUndoing(x) })
		}
		h.mu.Unlock()
	}
}

// hold puts what was made under a client's hold, and undoes it if that client is
// gone already.
func (h *VolumeSet) hold(ctx context.Context, owner string, x held) error {
	if owner == "" || h.holds.add(owner, x) {
		return nil
	}
	gone := control.Errorf(control.CodeCanceled, "%s: the client that asked for it is gone", x)
	return errors.Join(gone, h.undoHeld(context.WithoutCancel(ctx), x))
}

func (x held) String() string {
	if x.snapshot == "" {
		return "volume " + x.volume
	}
	return "snapshot " + x.volume + "@" + x.snapshot
}

// keepUndoing runs until it is done or the daemon stops, whose next start does it then.
func (h *VolumeSet) keepUndoing(x held) {
	said := false
	for pause := minUndoPause; ; pause = min(2*pause, maxUndoPause) {
		err := h.undoHeld(h.ctx, x)
		if err == nil || h.ctx.Err() != nil {
			return
		}
		if !said && pause == maxUndoPause {
			said = true
			h.log.Warn().Err(err).Stringer("what", x).Msg("what a client left unfinished can't be removed yet; tried again")
		}
		select {
		case <-time.After(pause):
		case <-h.ctx.Done():
			return
		}
	}
}

// undoHeld deletes what a client left. What it completed or deleted itself, and what
// has the name of that now, stays as it is.
func (h *VolumeSet) undoHeld(ctx context.Context, x held) error {
	var err error
	if x.snapshot == "" {
		err = h.removeOnly(ctx, x.volume, true, func(r *registry.Volume) bool {
			return r.ID == x.id && r.Incomplete != nil && r.Incomplete.Kind == registry.IncompleteImport
		})
	} else {
		err = h.dropSnapshot(ctx, x)
	}
	if errors.Is(err, block.ErrNotFound) {
		return nil
	}
	return err
}

func (h *VolumeSet) dropSnapshot(ctx context.Context, x held) error {
	dev, e, leave, err := h.enterOpen(ctx, x.volume)
	if err != nil {
		return err
	}
	defer leave()
	s, err := h.loadSnapshot(ctx, &e.Record, x.snapshot)
	if err != nil || s.Record.ID != x.id || !s.Record.Temporary {
		return err
	}
	return h.deleteSnapshotIn(ctx, dev, e, x.snapshot)
}
