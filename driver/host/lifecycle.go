package host

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/google/uuid"

	"scoria/driver"
	"scoria/driver/block"
	"scoria/driver/control"
	"scoria/driver/registry"
)

// parallelOpenings bounds how many volumes are opened at once at a start.
const parallelOpenings = 16

// Serve adds a front end and lets it serve every ready volume, those that are
// awaited as soon as they are open.
func (h *VolumeSet) Serve(ctx context.Context, f FrontEnd) error {
	h.mu.Lock()
	h.fronts = append(slices.Clone(h.fronts), f)
	h.mu.Unlock()
	names, err := h.Names(ctx)
	if err != nil {
		return err
	}
	for _, name := range names {
		if v := h.volume(name); !h.isAwaited(v) {
			h.serveWith(f, v)
		}
	}
	return nil
}

func (h *VolumeSet) serve(v *volume) {
	h.mu.Lock()
	v.frontErrors = nil
	fronts := h.fronts
	if v.incomplete != "" {
		fronts = nil // its contents are being brought in
	}
	h.mu.Unlock()
	for _, f := range fronts {
		h.serveWith(f, v)
	}
}

func (h *VolumeSet) serveWith(f FrontEnd, v *volume) {
	if err := f.Add(v.name); err != nil {
		if h.ctx.Err() != nil { // the daemon stops, and the front end with it
			return
		}
		h.log.Error().Err(err).Str("volume", v.name).Msg("volume is not served by a front end")
		h.mu.Lock()
		v.frontErrors = append(v.frontErrors, err.Error())
		h.mu.Unlock()
	}
}

// Finish finishes creations and deletions that an earlier run left undone. What
// can't be finished is logged and stays for the next start.
func (h *VolumeSet) Finish(ctx context.Context) error {
	if err := registry.ReviveParents(ctx, h.reg); err != nil {
		return err
	}
	if err := h.dropTemporary(ctx); err != nil {
		return err
	}
	entries, err := registry.LoadAll[registry.Volume](ctx, h.reg, registry.VolumePrefix)
	if err != nil {
		return err
	}
	for _, e := range entries {
		name := e.Record.FullName()
		if h.objectsOlder != nil && e.Record.Preset != "" {
			continue
		}
		if done, err := h.finishedBefore(ctx, e); err != nil {
			h.log.Error().Err(err).Str("volume", name).Msg("whether an unfinished volume was finished after all can't be told, and so nothing is done to it; will be tried at the next start")
			continue
		} else if done {
			continue
		}
		switch e.Record.State {
		case registry.StateCreating:
			if e.Record.Parent != nil || e.Record.Incomplete != nil {
				// Whoever wanted it is gone, and the parent is not open yet.
				err = h.removeNow(ctx, e)
			} else if err = h.engine.CreateVolume(ctx, h.config(&e.Record)); err == nil {
				e.Record.State = registry.StateReady
				_, err = registry.Replace(ctx, h.reg, registry.VolumeKey(e.Record.Pool, e.Record.Name), e)
			}
		case registry.StateDeleting:
			err = h.removeNow(ctx, e)
		default:
			if e.Record.Incomplete == nil || e.Record.Incomplete.Resumable {
				continue
			}
			err = h.undoUnfinished(ctx, e)
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if err != nil {
			h.log.Error().Err(err).Str("volume", name).Str("state", string(e.Record.State)).Msg("unfinished volume can't be finished; will be tried at the next start")
			continue
		}
		h.log.Info().Str("volume", name).Str("state", string(e.Record.State)).Msg("unfinished volume of an earlier run finished")
	}
	return nil
}

// dropTemporary makes the snapshots deleting that operations of an earlier run
// needed; the opening of their volumes removes them.
func (h *VolumeSet) dropTemporary(ctx context.Context) error {
	list, err := registry.LoadAll[registry.Snapshot](ctx, h.reg, registry.SnapshotPrefix)
	if err != nil {
		return err
	}
	volumes, err := registry.LoadAll[registry.Volume](ctx, h.reg, registry.VolumePrefix)
	if err != nil {
		return err
	}
	for _, e := range list {
		r := &e.Record
		if !r.Temporary || r.State == registry.StateDeleting || len(registry.ClonesAmong(volumes, r.Volume, r.ID)) > 0 {
			continue
		}
		r.State = registry.StateDeleting
		if _, err := registry.Replace(ctx, h.reg, registry.SnapshotKey(r.Volume, r.Name), e); err != nil {
			return err
		}
	}
	return nil
}

// removeNow takes a volume that is not open away: record in state deleting, what
// the engine has, record.
func (h *VolumeSet) removeNow(ctx context.Context, e registry.Entry[registry.Volume]) error {
	key := registry.VolumeKey(e.Record.Pool, e.Record.Name)
	var err error
	if e.Record.State != registry.StateDeleting {
		e.Record.State = registry.StateDeleting
		if e, err = registry.Replace(ctx, h.reg, key, e); err != nil {
			return fmt.Errorf("delete volume %s: %w", e.Record.FullName(), err)
		}
	}
	if err := h.engine.DeleteVolume(ctx, h.config(&e.Record)); err != nil {
		return fmt.Errorf("delete volume %s: %w", e.Record.FullName(), err)
	}
	if err := registry.RemoveSnapshots(ctx, h.reg, e.Record.ID); err != nil {
		return fmt.Errorf("delete the snapshots of volume %s: %w", e.Record.FullName(), err)
	}
	if err := registry.Remove(ctx, h.reg, key, e.Revision); err != nil {
		return fmt.Errorf("delete volume %s: %w", e.Record.FullName(), err)
	}
	return nil
}

// checkDelete says whether a deletion could begin now. A user on its way out (the
// connection of a tool that has just ended) is given a moment.
//
// checkIdle is its part that says whether anybody uses the volume.
func (h *VolumeSet) checkDelete(ctx context.Context, name string, force bool) (registry.Entry[registry.Volume], error) {
	e, err := h.checkIdle(ctx, name)
	if err != nil {
		return e, err
	}
	name = e.Record.FullName()
	clones, err := registry.Clones(ctx, h.reg, e.Record.ID, uuid.Nil)
	if err != nil {
		return e, err
	}
	if len(clones) > 0 {
		return e, refusal(&registry.ClonesError{What: "volume " + name, Clones: clones})
	}
	list, err := registry.Snapshots(ctx, h.reg, e.Record.ID)
	if err == nil && len(list) > 0 && !force {
		err = control.Errorf(control.CodeNeedsForce, "volume %s has %d snapshots, which would go with it: %s (--force does it)", name, len(list), nameSome(list))
	}
	return e, err
}

func (h *VolumeSet) checkIdle(ctx context.Context, name string) (registry.Entry[registry.Volume], error) {
	const pause, attempts = 20 * time.Millisecond, 50
	e, err := h.load(ctx, name)
	if err != nil {
		return e, err
	}
	name = e.Record.FullName()
	for i := 0; ; i++ {
		by := h.usedBy(name)
		if by == "" && h.volume(name).readers.Load() > 0 {
			by = "a reader of a snapshot"
		}
		if by == "" {
			return e, nil
		}
		if i == attempts {
			return e, inUse(name, by)
		}
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return e, ctx.Err()
		}
	}
}

func inUse(name, by string) error {
	return control.Errorf(control.CodeInUse, "volume %s is in use by %s: shut that down or detach the disk first", name, by)
}

// findSnapshots opens a volume that is to be deleted, as the registry may have lost
// records of its snapshots. One that can't be opened can be deleted all the same.
func (h *VolumeSet) findSnapshots(ctx context.Context, name string) {
	e, err := h.load(ctx, name)
	if err != nil || e.Record.State != registry.StateReady || e.Record.Incomplete != nil {
		return
	}
	if _, err := h.open(ctx, name); err != nil && ctx.Err() == nil {
		h.log.Warn().Err(err).Str("volume", name).Msg("the volume is to be deleted and can't be opened: whether it has snapshots that are not recorded is not known")
	}
}

// remove deletes a volume that nobody uses.
func (h *VolumeSet) remove(ctx context.Context, name string, force bool) error {
	return h.removeOnly(ctx, name, force, func(*registry.Volume) bool { return true })
}

// removeOnly does so if the record, as it is when nobody else can change it, is what
// the caller means; else it does nothing.
func (h *VolumeSet) removeOnly(ctx context.Context, name string, force bool, meant func(*registry.Volume) bool) error {
	name, err := fullName(name)
	if err != nil {
		return &notFoundError{err.Error()}
	}
	if !force {
		h.findSnapshots(ctx, name)
	}
	v, leave, err := h.enter(ctx, name)
	if err != nil {
		return err
	}
	defer leave()
	e, err := h.load(ctx, name)
	if err != nil || !meant(&e.Record) {
		return err
	}
	if e, err = h.checkDelete(ctx, name, force); err != nil {
		return err
	}
	dev := h.device(name)
	if dev != nil {
		// Whoever would write now is refused, for good.
		release, err := dev.Claim(block.Claimant{Kind: "control", ID: "delete"})
		var held *block.InUseError
		if errors.As(err, &held) {
			return inUse(name, held.Holder.String())
		}
		if err != nil {
			return err
		}
		defer release()
	}
	if e, err = registry.BeginDeleteVolume(ctx, h.reg, e); err != nil {
		return refusal(fmt.Errorf("delete volume %s: %w", name, err))
	}
	h.withdraw(v)
	if dev != nil {
		if err := dev.Close(ctx); err != nil {
			// Its contents are of no use any more.
			h.log.Warn().Err(err).Str("volume", name).Msg("closing the volume for its deletion failed")
		}
	}
	if err := h.removeNow(ctx, e); err != nil {
		return err
	}
	h.mu.Lock()
	delete(h.volumes, name)
	delete(h.used, name)
	h.mu.Unlock()
	h.log.Info().Str("volume", name).Stringer("id", e.Record.ID).Msg("volume deleted")
	return nil
}

// withdraw takes a volume from the front ends and forgets its device.
func (h *VolumeSet) withdraw(v *volume) {
	h.mu.Lock()
	v.dev = nil
	fronts := h.fronts
	h.mu.Unlock()
	for _, f := range fronts {
		f.Remove(v.name)
	}
}

// check verifies a volume: where it is open, under load; else offline, unless
// somebody wants to open it meanwhile, and then online from the beginning.
func (h *VolumeSet) check(ctx context.Context, name string, progress func(done, total int64)) (driver.CheckReport, error) {
	name, err := fullName(name)
	if err != nil {
		return driver.CheckReport{}, &notFoundError{err.Error()}
	}
	report, again, err := h.checkOffline(ctx, name, progress)
	if !again {
		return report, err
	}
	dev, err := h.open(ctx, name)
	if err != nil {
		return driver.CheckReport{}, err
	}
	return dev.Check(ctx, progress)
}

func (h *VolumeSet) checkOffline(ctx context.Context, name string, progress func(done, total int64)) (report driver.CheckReport, again bool, err error) {
	v, leave, err := h.enter(ctx, name)
	if err != nil {
		return report, false, err
	}
	defer leave()
	e, err := h.load(ctx, name)
	if err != nil {
		return report, false, err
	}
	if e.Record.State != registry.StateReady {
		return report, false, control.Errorf(control.CodeUnavailable, "volume %s can't be checked: %s", name, stateText(e.Record.State))
	}
	if len(e.Record.Ancestors) > 0 {
		return report, true, nil // those have to be open
	}
	config, err := h.fullConfig(ctx, &e.Record)
	if err != nil {
		return report, false, err
	}
	offline, cancel := context.WithCancel(ctx)
	defer cancel()
	h.mu.Lock()
	if v.dev != nil || v.opening != nil || h.closed {
		h.mu.Unlock()
		return report, true, nil
	}
	v.offline = cancel
	h.mu.Unlock()
	report, err = h.engine.CheckVolume(offline, config, progress)
	h.mu.Lock()
	v.offline = nil
	h.mu.Unlock()
	return report, err != nil && offline.Err() != nil && ctx.Err() == nil, err
}

// attached lists the volumes that front ends opened in this run, sorted.
func (h *VolumeSet) attached() []string {
	h.mu.Lock()
	defer h.mu.Unlock()
	names := make([]string, 0, len(h.used))
	for name := range h.used {
		names = append(names, name)
	}
	slices.Sort(names)
	return names
}

// each calls fn for every open volume.
func (h *VolumeSet) each(fn func(name string, dev Volume)) {
	type open struct {
		name string
		dev  Volume
	}
	h.mu.Lock()
	var list []open
	for name, v := range h.volumes {
		if v.dev != nil {
			list = append(list, open{name, v.dev})
		}
	}
	h.mu.Unlock()
	for _, o := range list {
		fn(o.name, o.dev)
	}
}

// Close closes the front ends and waits for openings under way; the engine then
// has no user any more. ctx bounds the draining.
func (h *VolumeSet) Close(ctx context.Context) error {
	h.mu.Lock()
	h.closed = true
	fronts := h.fronts
	h.mu.Unlock()
	h.cancel()
	errs := make([]error, len(fronts))
	var wg sync.WaitGroup
	for i, f := range fronts {
		wg.Go(func() { errs[i] = f.Close(ctx) })
	}
	wg.Wait()
	h.wg.Wait()
	return errors.Join(errs...)
}
