package host

import (
	"context"
	"fmt"
	"slices"

	"github.com/google/uuid"

	"scoria/driver/control"
	"scoria/driver/registry"
)

// setIncomplete says what is brought into a volume, or, with nothing, that it is
// whole.
func (h *VolumeSet) setIncomplete(v *volume, kind string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	v.incomplete = kind
}

// endIncomplete records that a volume is whole.
func (h *VolumeSet) endIncomplete(ctx context.Context, e registry.Entry[registry.Volume], size uint64) (registry.Entry[registry.Volume], error) {
	e.Record.Incomplete = nil
	if size > 0 {
		e.Record.Size = size
	}
	return registry.Replace(ctx, h.reg, registry.VolumeKey(e.Record.Pool, e.Record.Name), e)
}

// undoIncomplete makes an incomplete volume what it was before: a new one is
// deleted, an old one goes back to the snapshot that the stream built on.
func (h *VolumeSet) undoIncomplete(ctx context.Context, name string) error {
	e, err := h.load(ctx, name)
	if err != nil {
		return err
	}
	switch {
	case e.Record.Incomplete == nil:
		return control.Errorf(control.CodeInvalid, "volume %s is not being received", e.Record.FullName())
	case e.Record.Incomplete.Base == uuid.Nil:
		return h.remove(ctx, name, true)
	}
	if _, err := h.open(ctx, name); err != nil {
		return err
	}
	v, e, leave, err := h.enterLoaded(ctx, name)
	if err != nil {
		return err
	}
	defer leave()
	dev := h.device(v.name)
	if dev == nil || e.Record.Incomplete == nil {
		return nil
	}
	if e, err = h.beginUndo(ctx, e); err != nil {
		return err
	}
	if err := dev.Rollback(ctx, *e.Record.RollingBack, true); err != nil {
		return fmt.Errorf("volume %s: undo of a receive: %w; it will be finished when the volume is next opened", v.name, err)
	}
	if _, err := h.endRollback(ctx, dev, e); err != nil {
		return err
	}
	h.setIncomplete(v, "")
	h.serve(v)
	return nil
}

// beginUndo turns an incomplete receive into a rollback to its base.
func (h *VolumeSet) beginUndo(ctx context.Context, e registry.Entry[registry.Volume]) (registry.Entry[registry.Volume], error) {
	e.Record.RollingBack, e.Record.Incomplete = &e.Record.Incomplete.Base, nil
	return registry.Replace(ctx, h.reg, registry.VolumeKey(e.Record.Pool, e.Record.Name), e)
}

// abortReceive undoes a receive that nobody carries out.
func (h *VolumeSet) abortReceive(ctx context.Context, name string) error {
	name, err := fullName(name)
	if err != nil {
		return &notFoundError{err.Error()}
	}
	e, err := h.load(ctx, name)
	if err != nil {
		return err
	}
	if e.Record.Incomplete == nil || e.Record.Incomplete.Kind != registry.IncompleteReceive {
		return control.Errorf(control.CodeInvalid, "volume %s is not being received", name)
	}
	if !h.beginTransfer(name) {
		return control.Errorf(control.CodeInUse, "volume %s is being received now: end that first", name)
	}
	defer h.endTransfer(name)
	return h.undoIncomplete(context.WithoutCancel(ctx), name)
}

// complete ends an import.
func (h *VolumeSet) complete(ctx context.Context, name string) (registry.Volume, error) {
	v, e, leave, err := h.enterLoaded(ctx, name)
	if err != nil {
		return e.Record, err
	}
	defer leave()
	if e.Record.Incomplete == nil || e.Record.Incomplete.Kind != registry.IncompleteImport {
		return e.Record, control.Errorf(control.CodeInvalid, "volume %s is not being imported", v.name)
	}
	if e, err = h.endIncomplete(ctx, e, 0); err != nil {
		return e.Record, err
	}
	h.setIncomplete(v, "")
	h.serve(v)
	return e.Record, nil
}

// undoUnfinished undoes, at a start, the imports and receives that can't go on,
// before any volume is opened.
func (h *VolumeSet) undoUnfinished(ctx context.Context, e registry.Entry[registry.Volume]) error {
	i := e.Record.Incomplete
	switch {
	case i == nil || i.Resumable:
		return nil
	case i.Base != uuid.Nil:
		_, err := h.beginUndo(ctx, e)
		return err
	}
	return h.removeNow(ctx, e)
}

// finishedBefore puts the record of a volume right that is to be undone, but was
// finished: the store has a copy of its record, which only a whole volume gets
// (copies.go), so that the registry is older than the volume. A volume whose daemon died
// in the moment in which it was finished has none; and the object store finds its
// objects by the registry, so that one from before the copy does not lead to it. An error says that the store could not be asked: nothing may be undone then.
func (h *VolumeSet) finishedBefore(ctx context.Context, e registry.Entry[registry.Volume]) (bool, error) {
	r := &e.Record
	undone := r.State == registry.StateCreating && (r.Parent != nil || r.Incomplete != nil) ||
		r.State == registry.StateReady && r.Incomplete != nil && !r.Incomplete.Resumable && r.Incomplete.Base == uuid.Nil
	s := h.storeOf(r)
	if !undone || s == nil {
		return false, nil
	}
	ns := r.ID.String()
	all, err := s.Namespaces(ctx)
	if err != nil || !slices.Contains(all, ns) {
		return false, err
	}
	numbers, err := copies(ctx, s, ns)
	if err != nil || len(numbers) == 0 {
		return false, err
	}
	_, c, err := readCopy(ctx, s, ns, numbers[len(numbers)-1])
	if err != nil {
		return false, err
	}
	pool, name, epoch := r.Pool, r.Name, r.Epoch
	e.Record = c.Volume
	e.Record.Pool, e.Record.Name, e.Record.Epoch = pool, name, max(epoch, c.Volume.Epoch)
	if _, err := registry.Replace(ctx, h.reg, registry.VolumeKey(pool, name), e); err != nil {
		return false, err
	}
	h.notice(e.Record.FullName(), "registry-is-older", "the registry had the volume as unfinished, to be removed, but the copy of its record beside its data says that it was finished: it is kept as that copy says; the registry may have been restored from an older copy")
	return true, nil
}
