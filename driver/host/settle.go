package host

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/google/uuid"

	"scoria/driver"
	"scoria/driver/control"
	"scoria/driver/registry"
)

// What the registry says of a volume's snapshots and what the engine has can come
// apart in two ways: the daemon died, or the registry failed, between two steps of an
// operation; or the registry was restored from an older copy. Settling makes them one
// again. The engine is right about which snapshots exist, the registry about which
// of them are to go; nothing is deleted because its record is missing.

// Bounds of the pause before what could not be recorded is tried again.
const (
	minSettlePause = 100 * time.Millisecond
	maxSettlePause = 10 * time.Second
)

// catchUp finishes, on a volume that has just been opened, what an earlier run
// left undone. The gate is held.
func (h *VolumeSet) catchUp(ctx context.Context, dev Volume, e registry.Entry[registry.Volume]) error {
	if e.Record.RollingBack != nil {
		var err error
		if e, err = h.finishRollback(ctx, dev, e); err != nil {
			return err
		}
	}
	err := h.settleSnapshots(ctx, dev, &e.Record)
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if err != nil {
		// Guests need not wait for it.
		h.log.Warn().Err(err).Str("volume", e.Record.FullName()).Msg("the records of its snapshots can't be settled yet")
		h.settleLater(e.Record.FullName(), err)
	}
	_, err = h.noteAncestors(ctx, dev, e)
	return err
}

// finishRollback carries a rollback of an earlier run out. It does not if the
// snapshot is gone, or if there is a later one that was made since the intent was
// recorded: such a registry is older than the volume.
func (h *VolumeSet) finishRollback(ctx context.Context, dev Volume, e registry.Entry[registry.Volume]) (registry.Entry[registry.Volume], error) {
	id, name := *e.Record.RollingBack, e.Record.FullName()
	why, err := h.rollbackIsOld(ctx, dev, &e.Record)
	if err != nil {
		return e, err
	}
	if why != "" {
		e.Record.RollingBack = nil
		if e, err = registry.Replace(ctx, h.reg, registry.VolumeKey(e.Record.Pool, e.Record.Name), e); err != nil {
			return e, fmt.Errorf("take back the rollback of an earlier run: %w", err)
		}
		h.notice(name, "rollback-not-finished", "the registry has an unfinished rollback to snapshot %s, which was not carried out because %s: the registry may have been restored from an older copy; roll back anew if that is still wanted", id, why)
		return e, nil
	}
	if err := dev.Rollback(ctx, id, true); err != nil {
		return e, fmt.Errorf("finish the rollback of an earlier run: %w", err)
	}
	if e, err = h.endRollback(ctx, dev, e); err != nil {
		return e, err
	}
	h.log.Info().Str("volume", name).Stringer("snapshot", id).Msg("rollback of an earlier run finished")
	return e, nil
}

// rollbackIsOld says why the intent of a rollback is older than the volume, if it is.
func (h *VolumeSet) rollbackIsOld(ctx context.Context, dev Volume, r *registry.Volume) (why string, err error) {
	list, err := registry.Snapshots(ctx, h.reg, r.ID)
	if err != nil {
		return "", err
	}
	made := dev.Snapshots()
	i := slices.IndexFunc(made, func(s driver.Snapshot) bool { return s.ID == *r.RollingBack })
	if i < 0 {
		return "there is no such snapshot", nil
	}
	for _, s := range made[i+1:] {
		if entryOf(list, s.ID) < 0 {
			return fmt.Sprintf("it would drop snapshot %s, which was made later and is not recorded", s.Name), nil
		}
	}
	return "", nil
}

func entryOf(list []registry.Entry[registry.Snapshot], id uuid.UUID) int {
	return slices.IndexFunc(list, func(e registry.Entry[registry.Snapshot]) bool { return e.Record.ID == id })
}

// settleSnapshots makes the records of a volume's snapshots agree with those that the
// engine has, as far as that is possible now. It may be repeated. The gate is held.
func (h *VolumeSet) settleSnapshots(ctx context.Context, dev Volume, r *registry.Volume) error {
	list, err := registry.Snapshots(ctx, h.reg, r.ID)
	if err != nil {
		return err
	}
	made := map[uuid.UUID]driver.Snapshot{}
	for _, s := range dev.Snapshots() {
		made[s.ID] = s
	}
	var errs []error
	known := map[uuid.UUID]bool{}
	for _, e := range list {
		known[e.Record.ID] = true
		s, exists := made[e.Record.ID]
		if err := h.settleSnapshot(ctx, dev, r, e, s, exists); err != nil {
			errs = append(errs, fmt.Errorf("snapshot %s@%s: %w", r.FullName(), e.Record.Name, err))
		}
	}
	for _, s := range dev.Snapshots() {
		if !known[s.ID] {
			if err := h.adopt(ctx, r, s); err != nil {
				errs = append(errs, fmt.Errorf("adopt snapshot %s of volume %s: %w", s.Name, r.FullName(), err))
			}
		}
	}
	return errors.Join(errs...)
}

// settleSnapshot does it for one record; s is what the engine has of it.
func (h *VolumeSet) settleSnapshot(ctx context.Context, dev Volume, r *registry.Volume, e registry.Entry[registry.Snapshot], s driver.Snapshot, exists bool) error {
	key, log := registry.SnapshotKey(r.ID, e.Record.Name), h.log.Info().Str("volume", r.FullName()).Str("snapshot", e.Record.Name)
	switch {
	case e.Record.State == registry.StateDeleting:
		// Also if it does not exist: on success a durable root says so.
		err := dev.DeleteSnapshot(ctx, e.Record.ID)
		if errors.Is(err, driver.ErrSnapshotInUse) {
			e.Record.State = registry.StateReady
			_, err = registry.Replace(ctx, h.reg, key, e)
			return err
		}
		if err != nil {
			return err
		}
		log.Msg("deletion of a snapshot finished")
	case e.Record.State == registry.StateCreating && exists:
		if _, err := h.recordMade(ctx, e, &s); err != nil {
			return err
		}
		log.Msg("creation of a snapshot finished")
		return nil
	case exists:
		return nil
	case e.Record.State == registry.StateReady:
		h.notice(r.FullName(), "snapshot-gone", "snapshot %s (%s) is in the registry, but the volume does not have it: it was deleted, or a rollback has dropped it, if the registry was restored from an older copy; its record is removed", e.Record.Name, e.Record.ID)
	}
	return registry.Remove(ctx, h.reg, key, e.Revision)
}

// recordMade records that a snapshot exists.
func (h *VolumeSet) recordMade(ctx context.Context, e registry.Entry[registry.Snapshot], s *driver.Snapshot) (registry.Entry[registry.Snapshot], error) {
	e.Record.Created, e.Record.Size, e.Record.SCO = s.Created, s.Size, s.SCO
	e.Record.Sequence, e.Record.LastObject, e.Record.State = s.Sequence, s.LastObject, registry.StateReady
	return registry.Replace(ctx, h.reg, registry.SnapshotKey(e.Record.Volume, e.Record.Name), e)
}

// adopt records a snapshot that only the engine knows, under a name that is free.
func (h *VolumeSet) adopt(ctx context.Context, r *registry.Volume, s driver.Snapshot) error {
	base := s.Name
	if registry.CheckName("snapshot", base) != nil {
		base = "adopted"
	}
	for range conflictRetries {
		name, err := h.freeName(ctx, r, base)
		if err != nil {
			return err
		}
		_, err = registry.Create(ctx, h.reg, registry.SnapshotKey(r.ID, name), registry.Snapshot{
			ID: s.ID, Volume: r.ID, Name: name, Created: s.Created, Metadata: s.Metadata, Size: s.Size, SCO: s.SCO,
			Sequence: s.Sequence, LastObject: s.LastObject, State: registry.StateReady, Adopted: true,
		})
		if errors.Is(err, registry.ErrExist) {
			continue
		}
		if err == nil {
			h.log.Warn().Str("volume", r.FullName()).Str("snapshot", name).Str("made_as", s.Name).Stringer("id", s.ID).
				Msg("the volume has a snapshot that the registry did not know, and it is recorded anew: the registry may have been restored from an older copy")
		}
		return err
	}
	return fmt.Errorf("%w %d times in a row", registry.ErrConflict, conflictRetries)
}

// adoptedCondition names the snapshots of a volume that were adopted and that nobody
// has looked at yet.
func adoptedCondition(full string, list []registry.Entry[registry.Snapshot]) []control.Condition {
	list = slices.DeleteFunc(slices.Clone(list), func(e registry.Entry[registry.Snapshot]) bool { return !e.Record.Adopted })
	if len(list) == 0 {
		return nil
	}
	return []control.Condition{{Code: "snapshots-adopted", Message: fmt.Sprintf(
		"%d snapshots were not in the registry, which may have been restored from an older copy, and are recorded anew: %s; give those that are wanted a name with `scoria snapshot rename %s@SNAPSHOT NAME`, which ends this, and delete the others",
		len(list), nameSome(list), full)}}
}

// notice shows something in the volume's conditions until the daemon ends, and logs
// it.
func (h *VolumeSet) notice(name, code, format string, args ...any) {
	const most = 16 // of a volume
	c := control.Condition{Code: code, Message: fmt.Sprintf(format, args...)}
	h.log.Warn().Str("volume", name).Str("condition", code).Msg(c.Message)
	h.mu.Lock()
	defer h.mu.Unlock()
	v := h.volumeLocked(name)
	if len(v.notices) < most && !slices.Contains(v.notices, c) {
		v.notices = append(v.notices, c)
	}
}

// settleLater sees to it that the records of a volume's snapshots are settled as soon
// as that is possible, if the volume stays open; its next opening does it otherwise.
func (h *VolumeSet) settleLater(name string, cause error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	v := h.volumeLocked(name)
	if v.unsettled == "" && !h.closed {
		h.wg.Go(func() { h.keepSettling(v) })
	}
	v.unsettled = cause.Error()
}

// keepSettling runs until the volume is settled or closed, or the daemon stops.
func (h *VolumeSet) keepSettling(v *volume) {
	for pause := minSettlePause; ; pause = min(2*pause, maxSettlePause) {
		select {
		case <-time.After(pause):
		case <-h.ctx.Done():
			return
		}
		select {
		case v.gate <- struct{}{}:
		case <-h.ctx.Done():
			return
		}
		done := h.trySettling(v)
		<-v.gate
		if done {
			return
		}
	}
}

// trySettling reports whether there is nothing left to try. The gate is held.
func (h *VolumeSet) trySettling(v *volume) bool {
	h.mu.Lock()
	dev, opening := v.dev, v.opening != nil
	gone := h.volumes[v.name] != v || dev == nil && !opening
	h.mu.Unlock()
	if gone {
		h.setUnsettled(v, "")
		return true
	}
	if dev == nil {
		return false
	}
	e, err := h.load(h.ctx, v.name)
	return err == nil && h.settleNow(h.ctx, dev, e)
}

// settleNow settles a volume's snapshots if that is due, and reports whether they are
// settled. The gate is held.
func (h *VolumeSet) settleNow(ctx context.Context, dev Volume, e registry.Entry[registry.Volume]) bool {
	v := h.volume(e.Record.FullName())
	h.mu.Lock()
	due := v.unsettled != ""
	h.mu.Unlock()
	if !due {
		return true
	}
	err := h.settleSnapshots(ctx, dev, &e.Record)
	if err == nil {
		_, err = h.noteAncestors(ctx, dev, e)
	}
	why := ""
	if err != nil {
		why = err.Error()
		h.log.Warn().Err(err).Str("volume", v.name).Msg("the records of its snapshots can't be settled yet")
	}
	h.setUnsettled(v, why)
	return err == nil
}

func (h *VolumeSet) setUnsettled(v *volume, why string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	v.unsettled = why
}
