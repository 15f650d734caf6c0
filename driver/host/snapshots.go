package host

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/google/uuid"

	"scoria/driver"
	"scoria/driver/block"
	"scoria/driver/control"
	"scoria/driver/registry"
)

// conflictRetries bounds how often a transaction is tried on records that others
// change meanwhile.
const conflictRetries = 100

// enterOpen opens a volume and takes its gate; the record is as of then.
func (h *VolumeSet) enterOpen(ctx context.Context, name string) (dev Volume, e registry.Entry[registry.Volume], leave func(), err error) {
	if name, err = fullName(name); err != nil {
		return nil, e, nil, &notFoundError{err.Error()}
	}
	for {
		if _, err = h.load(ctx, name); err != nil {
			return nil, e, nil, err
		}
		if _, err = h.open(ctx, name); err != nil {
			return nil, e, nil, err
		}
		if _, leave, err = h.enter(ctx, name); err != nil {
			return nil, e, nil, err
		}
		if dev = h.device(name); dev == nil {
			leave() // closed again since
			continue
		}
		if e, err = h.load(ctx, name); err == nil && e.Record.State == registry.StateReady && e.Record.RollingBack != nil {
			e, err = h.resumeRollback(ctx, dev, e)
		}
		if err == nil {
			err = settled(&e.Record)
		}
		if err != nil {
			leave()
			return nil, e, nil, err
		}
		if !h.settleNow(ctx, dev, e) {
			return dev, e, leave, nil // what is to be done may be what gives it room
		}
		if e, err = h.load(ctx, name); err != nil { // it may have fewer ancestors now
			leave()
			return nil, e, nil, err
		}
		return dev, e, leave, nil
	}
}

// settled refuses a volume that is being made, deleted or filled.
func settled(r *registry.Volume) error {
	switch {
	case r.State != registry.StateReady:
		return control.Errorf(control.CodeUnavailable, "volume %s is not ready: %s", r.FullName(), stateText(r.State))
	case r.RollingBack != nil:
		return control.Errorf(control.CodeUnavailable, "a rollback of volume %s is not finished: do it again", r.FullName())
	case r.Incomplete != nil && r.Incomplete.Kind == registry.IncompleteImport:
		return control.Errorf(control.CodeUnavailable, "volume %s is being imported", r.FullName())
	case r.Incomplete != nil:
		return control.Errorf(control.CodeUnavailable, "volume %s is being received: resume that, or undo it with `scoria volume receive --abort %s`", r.FullName(), r.FullName())
	}
	return nil
}

// engineSnapshot is what the engine is told of a snapshot.
func engineSnapshot(r *registry.Snapshot) driver.Snapshot {
	return driver.Snapshot{
		ID: r.ID, Name: r.Name, Created: r.Created, Metadata: r.Metadata, Size: r.Size,
		SCO: r.SCO, Sequence: r.Sequence, LastObject: r.LastObject,
	}
}

// fullConfig is config with the snapshots that are recorded, to open or check a
// volume.
func (h *VolumeSet) fullConfig(ctx context.Context, r *registry.Volume) (driver.VolumeConfig, error) {
	c := h.config(r)
	list, err := registry.Snapshots(ctx, h.reg, r.ID)
	if err != nil {
		return c, fmt.Errorf("snapshots of volume %s: %w", r.FullName(), err)
	}
	for i := range list {
		switch s := &list[i].Record; s.State {
		case registry.StateReady:
			c.Snapshots = append(c.Snapshots, engineSnapshot(s))
		case registry.StateDeleting:
			c.Deleting = append(c.Deleting, engineSnapshot(s))
		}
	}
	return c, nil
}

// openAncestors opens what a clone reads, oldest first.
func (h *VolumeSet) openAncestors(ctx context.Context, r *registry.Volume) error {
	if len(r.Ancestors) == 0 {
		return nil
	}
	all, err := registry.LoadAll[registry.Volume](ctx, h.reg, registry.VolumePrefix)
	if err != nil {
		return err
	}
	for _, a := range r.Ancestors {
		i := slices.IndexFunc(all, func(e registry.Entry[registry.Volume]) bool { return e.Record.ID == a.Volume })
		if i < 0 {
			return fmt.Errorf("volume %s reads from the volume with ID %s, which is not there", r.FullName(), a.Volume)
		}
		if _, err := h.open(ctx, all[i].Record.FullName()); err != nil {
			return fmt.Errorf("volume %s reads from another one: %w", r.FullName(), err)
		}
	}
	return nil
}

// noteAncestors records that a volume needs fewer ancestors than before.
func (h *VolumeSet) noteAncestors(ctx context.Context, dev Volume, e registry.Entry[registry.Volume]) (registry.Entry[registry.Volume], error) {
	now := dev.Ancestors()
	if len(now) >= len(e.Record.Ancestors) {
		return e, nil
	}
	if len(now) == 0 {
		e.Record.Parent = nil
	}
	e.Record.Ancestors = nil
	for _, a := range now {
		e.Record.Ancestors = append(e.Record.Ancestors, registry.Ancestor{Volume: a.Volume, Snapshot: a.Snapshot})
	}
	return registry.Replace(ctx, h.reg, registry.VolumeKey(e.Record.Pool, e.Record.Name), e)
}

// unfinished names the volumes that opening brings into order.
func (h *VolumeSet) unfinished(ctx context.Context) ([]string, error) {
	volumes, err := registry.LoadAll[registry.Volume](ctx, h.reg, registry.VolumePrefix)
	if err != nil {
		return nil, err
	}
	snapshots, err := registry.LoadAll[registry.Snapshot](ctx, h.reg, registry.SnapshotPrefix)
	if err != nil {
		return nil, err
	}
	loose := map[uuid.UUID]bool{}
	for i := range snapshots {
		if snapshots[i].Record.State != registry.StateReady {
			loose[snapshots[i].Record.Volume] = true
		}
	}
	var names []string
	for i := range volumes {
		if r := &volumes[i].Record; r.State == registry.StateReady && (loose[r.ID] || r.RollingBack != nil) {
			names = append(names, r.FullName())
		}
	}
	return names, nil
}

func (h *VolumeSet) createSnapshot(ctx context.Context, name string, id uuid.UUID, req control.CreateSnapshot) (registry.Volume, registry.Snapshot, error) {
	dev, e, leave, err := h.enterOpen(ctx, name)
	if err != nil {
		return e.Record, registry.Snapshot{}, err
	}
	defer leave()
	s, err := h.createSnapshotIn(ctx, dev, e, id, req)
	return e.Record, s, err
}

// createSnapshotIn makes a snapshot of an open volume. The gate is held.
func (h *VolumeSet) createSnapshotIn(ctx context.Context, dev Volume, e registry.Entry[registry.Volume], id uuid.UUID, req control.CreateSnapshot) (registry.Snapshot, error) {
	if err := registry.CheckName("snapshot", req.Name); err != nil {
		return registry.Snapshot{}, control.Errorf(control.CodeInvalid, "%v", err)
	}
	full := e.Record.FullName() + "@" + req.Name
	r := registry.Snapshot{ID: id, Volume: e.Record.ID, Name: req.Name, Metadata: req.Metadata, Temporary: req.Temporary}
	s, err := registry.BeginSnapshot(ctx, h.reg, e, r)
	if errors.Is(err, registry.ErrExist) {
		return r, control.Errorf(control.CodeExists, "snapshot %s exists already", full)
	}
	if err != nil {
		return r, fmt.Errorf("create snapshot %s: %w", full, err)
	}
	key := registry.SnapshotKey(e.Record.ID, req.Name)
	made, err := dev.CreateSnapshot(ctx, id, req.Name, req.Metadata)
	// From here on it is finished one way or the other, whatever becomes of ctx.
	ctx = context.WithoutCancel(ctx)
	if err != nil {
		undone := registry.Remove(ctx, h.reg, key, s.Revision)
		if undone != nil {
			h.settleLater(e.Record.FullName(), undone)
		}
		return r, errors.Join(fmt.Errorf("create snapshot %s: %w", full, err), undone)
	}
	if s, err = h.recordMade(ctx, s, &made); err != nil {
		h.settleLater(e.Record.FullName(), err)
		return r, fmt.Errorf("create snapshot %s: it is made, but could not be recorded, which is tried again: %w", full, err)
	}
	h.log.Info().Str("volume", e.Record.FullName()).Str("snapshot", req.Name).Stringer("id", id).Msg("snapshot created")
	return s.Record, nil
}

// loadSnapshot reads the record of a snapshot.
func (h *VolumeSet) loadSnapshot(ctx context.Context, r *registry.Volume, name string) (registry.Entry[registry.Snapshot], error) {
	missing := func(why string) error {
		return &notFoundError{fmt.Sprintf("no snapshot %s@%s%s", r.FullName(), name, why)}
	}
	if err := registry.CheckName("snapshot", name); err != nil {
		return registry.Entry[registry.Snapshot]{}, missing(": " + err.Error())
	}
	s, err := registry.Load[registry.Snapshot](ctx, h.reg, registry.SnapshotKey(r.ID, name))
	if errors.Is(err, registry.ErrNotFound) {
		return s, missing("")
	}
	return s, err
}

func (h *VolumeSet) deleteSnapshot(ctx context.Context, name, snapshot string) error {
	dev, e, leave, err := h.enterOpen(ctx, name)
	if err != nil {
		return err
	}
	defer leave()
	if _, err := h.loadSnapshot(ctx, &e.Record, snapshot); err != nil {
		return err
	}
	return h.deleteSnapshotIn(ctx, dev, e, snapshot)
}

// deleteSnapshotIn deletes a snapshot that exists. The gate is held.
func (h *VolumeSet) deleteSnapshotIn(ctx context.Context, dev Volume, e registry.Entry[registry.Volume], snapshot string) error {
	full := e.Record.FullName() + "@" + snapshot
	s, err := registry.BeginDeleteSnapshot(ctx, h.reg, &e.Record, snapshot)
	if err != nil {
		return refusal(err)
	}
	key := registry.SnapshotKey(e.Record.ID, snapshot)
	// It ends in any case: the record must not stay behind in state deleting as long
	// as the engine has the snapshot.
	ctx = context.WithoutCancel(ctx)
	if err := dev.DeleteSnapshot(ctx, s.Record.ID); err != nil {
		if !slices.ContainsFunc(dev.Snapshots(), func(has driver.Snapshot) bool { return has.ID == s.Record.ID }) {
			// Nothing keeps its data any more.
			h.settleLater(e.Record.FullName(), err)
			return fmt.Errorf("delete snapshot %s: %w; it is gone, but not its space, which is tried again", full, err)
		}
		s.Record.State = registry.StateReady
		_, back := registry.Replace(ctx, h.reg, key, s)
		if back != nil {
			h.settleLater(e.Record.FullName(), back)
		}
		if errors.Is(err, driver.ErrSnapshotInUse) {
			return errors.Join(control.Errorf(control.CodeInUse, "snapshot %s is being read: disconnect its readers first", full), back)
		}
		return errors.Join(fmt.Errorf("delete snapshot %s: %w", full, err), back)
	}
	if err := registry.Remove(ctx, h.reg, key, s.Revision); err != nil {
		h.settleLater(e.Record.FullName(), err)
		return fmt.Errorf("delete snapshot %s: it is gone, but its record could not be removed, which is tried again: %w", full, err)
	}
	h.log.Info().Str("volume", e.Record.FullName()).Str("snapshot", snapshot).Stringer("id", s.Record.ID).Msg("snapshot deleted")
	_, err = h.noteAncestors(ctx, dev, e)
	return err
}

// refusal gives what the registry's rules refuse its code.
func refusal(err error) error {
	var clones *registry.ClonesError
	var state *registry.StateError
	switch {
	case errors.As(err, &clones):
		return control.Errorf(control.CodeInUse, "%v", err)
	case errors.As(err, &state):
		return control.Errorf(control.CodeUnavailable, "%v", err)
	}
	return err
}

func (h *VolumeSet) renameSnapshot(ctx context.Context, name, from, to string) (registry.Volume, registry.Snapshot, error) {
	v, e, leave, err := h.enterLoaded(ctx, name)
	if err != nil {
		return e.Record, registry.Snapshot{}, err
	}
	defer leave()
	if err := registry.CheckName("snapshot", to); err != nil {
		return e.Record, registry.Snapshot{}, control.Errorf(control.CodeInvalid, "%v", err)
	}
	if _, err := h.loadSnapshot(ctx, &e.Record, from); err != nil {
		return e.Record, registry.Snapshot{}, err
	}
	s, err := registry.RenameSnapshot(ctx, h.reg, e.Record.ID, from, to)
	if errors.Is(err, registry.ErrExist) {
		return e.Record, s.Record, control.Errorf(control.CodeExists, "snapshot %s@%s exists already", v.name, to)
	}
	return e.Record, s.Record, refusal(err)
}

// later lists the snapshots behind one, oldest first.
func (h *VolumeSet) later(ctx context.Context, s *registry.Snapshot) ([]registry.Entry[registry.Snapshot], error) {
	list, err := registry.Snapshots(ctx, h.reg, s.Volume)
	return slices.DeleteFunc(list, func(e registry.Entry[registry.Snapshot]) bool { return e.Record.Sequence <= s.Sequence }), err
}

// unfinishedRollback is what volume.incomplete says while the record has the intent
// of a rollback: the next opening carries that out, so nothing may be written before.
const unfinishedRollback = "rollback"

// resumeRollback finishes a rollback of this run that could not be recorded or was
// refused by a disk. The gate is held.
func (h *VolumeSet) resumeRollback(ctx context.Context, dev Volume, e registry.Entry[registry.Volume]) (registry.Entry[registry.Volume], error) {
	ctx = context.WithoutCancel(ctx)
	if err := h.catchUp(ctx, dev, e); err != nil {
		return e, fmt.Errorf("volume %s: %w", e.Record.FullName(), err)
	}
	v := h.volume(e.Record.FullName())
	h.setIncomplete(v, "")
	h.serve(v)
	return h.load(ctx, v.name)
}

// rollback makes a volume that nobody uses what it was at a snapshot. From the
// record of the intent on it is carried out, by the next opening if need be.
func (h *VolumeSet) rollback(ctx context.Context, name, snapshot string, force bool) (registry.Volume, error) {
	dev, e, leave, err := h.enterOpen(ctx, name)
	if err != nil {
		return e.Record, err
	}
	defer leave()
	name = e.Record.FullName()
	s, err := h.loadSnapshot(ctx, &e.Record, snapshot)
	if err != nil {
		return e.Record, err
	}
	if s.Record.State != registry.StateReady {
		return e.Record, refusal(&registry.StateError{What: "snapshot " + name + "@" + snapshot, State: s.Record.State})
	}
	if by := h.usedBy(name); by != "" {
		return e.Record, inUse(name, by)
	}
	later, err := h.later(ctx, &s.Record)
	if err != nil {
		return e.Record, err
	}
	if len(later) > 0 && !force {
		return e.Record, control.Errorf(control.CodeNeedsForce, "rollback of %s to %s would drop %d later snapshots: %s (--force does)", name, snapshot, len(later), nameSome(later))
	}
	if e, err = registry.BeginRollback(ctx, h.reg, e, s.Record.ID, later); err != nil {
		return e.Record, refusal(err)
	}
	ctx = context.WithoutCancel(ctx)
	v := h.volume(name)
	h.setIncomplete(v, unfinishedRollback)
	if err := dev.Rollback(ctx, s.Record.ID, true); err != nil {
		return e.Record, h.abandonRollback(ctx, v, e, err)
	}
	if e, err = h.endRollback(ctx, dev, e); err != nil {
		h.unserve(v)
		return e.Record, fmt.Errorf("%w; the volume is not served until the rollback is recorded: do it again", err)
	}
	h.setIncomplete(v, "")
	h.log.Info().Str("volume", name).Str("snapshot", snapshot).Int("dropped", len(later)).Msg("volume rolled back")
	return e.Record, nil
}

// nameSome names the first few snapshots of a list.
func nameSome(list []registry.Entry[registry.Snapshot]) string {
	const shown = 5
	var names []string
	for i := range list[:min(len(list), shown)] {
		names = append(names, list[i].Record.Name)
	}
	text := strings.Join(names, ", ")
	if len(list) > shown {
		text += fmt.Sprintf(" and %d more", len(list)-shown)
	}
	return text
}

// abandonRollback takes the intent back after the engine refused: it has changed
// nothing then, and guests go on writing, which a later opening must not undo. Only
// a volume that has failed may be either way; it takes no writes, and the intent
// stays. Whoever opened it and has not claimed it yet is disconnected.
func (h *VolumeSet) abandonRollback(ctx context.Context, v *volume, e registry.Entry[registry.Volume], cause error) error {
	if errors.Is(cause, block.ErrFailed) {
		h.unserve(v)
		return fmt.Errorf("rollback of %s: %w; it will be finished when the volume is next opened", v.name, cause)
	}
	e.Record.RollingBack = nil
	_, err := registry.Replace(ctx, h.reg, registry.VolumeKey(e.Record.Pool, e.Record.Name), e)
	if err == nil {
		h.setIncomplete(v, "")
	} else {
		h.unserve(v)
	}
	var held *block.InUseError
	switch {
	case errors.As(cause, &held):
		return errors.Join(inUse(v.name, held.Holder.String()), err)
	case errors.Is(cause, driver.ErrSnapshotInUse):
		return errors.Join(control.Errorf(control.CodeInUse, "rollback of %s: a snapshot that it would drop is being read: disconnect its readers first", v.name), err)
	}
	return errors.Join(fmt.Errorf("rollback of %s: %w", v.name, cause), err)
}

// endRollback records what the engine has done.
func (h *VolumeSet) endRollback(ctx context.Context, dev Volume, e registry.Entry[registry.Volume]) (registry.Entry[registry.Volume], error) {
	has := map[uuid.UUID]bool{}
	for _, s := range dev.Snapshots() {
		has[s.ID] = true
	}
	list, err := registry.Snapshots(ctx, h.reg, e.Record.ID)
	if err != nil {
		return e, err
	}
	for i := range list {
		if s := &list[i].Record; !has[s.ID] {
			if err := registry.Remove(ctx, h.reg, registry.SnapshotKey(s.Volume, s.Name), list[i].Revision); err != nil {
				return e, fmt.Errorf("rollback of %s: %w", e.Record.FullName(), err)
			}
		}
	}
	e.Record.RollingBack = nil
	e.Record.Size = dev.Info().Size
	if e, err = registry.Replace(ctx, h.reg, registry.VolumeKey(e.Record.Pool, e.Record.Name), e); err != nil {
		return e, fmt.Errorf("rollback of %s: %w", e.Record.FullName(), err)
	}
	return h.noteAncestors(ctx, dev, e)
}
