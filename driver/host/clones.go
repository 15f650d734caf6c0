package host

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/google/uuid"

	"scoria/driver/block"
	"scoria/driver/control"
	"scoria/driver/registry"
)

// templateSnapshot is what a template's clones begin as; one that becomes a
// template again gets another one, with a number.
const templateSnapshot = "template"

// source finds what a clone is to be made from.
func (h *VolumeSet) source(ctx context.Context, from string) (parent registry.Entry[registry.Volume], s registry.Entry[registry.Snapshot], err error) {
	volume, snapshot, found := strings.Cut(from, "@")
	if parent, err = h.load(ctx, volume); err != nil {
		return parent, s, err
	}
	if err := settled(&parent.Record); err != nil {
		return parent, s, err
	}
	if found {
		s, err = h.loadSnapshot(ctx, &parent.Record, snapshot)
		return parent, s, err
	}
	name := parent.Record.FullName()
	if !parent.Record.Template {
		return parent, s, control.Errorf(control.CodeInvalid, "clone of %s: name a snapshot, as in %s@SNAPSHOT; `scoria snapshot create` makes one", name, name)
	}
	list, err := registry.Snapshots(ctx, h.reg, parent.Record.ID)
	for i := range slices.Backward(list) {
		if list[i].Record.State == registry.StateReady && !list[i].Record.Temporary {
			return parent, list[i], nil
		}
	}
	if err == nil {
		err = control.Errorf(control.CodeNotFound, "template %s has no snapshot that could be cloned", name)
	}
	return parent, s, err
}

// clone makes a volume from a snapshot. Many run side by side: each holds the gate
// of its own new volume alone.
func (h *VolumeSet) clone(ctx context.Context, req control.CloneVolume) (registry.Volume, error) {
	pool, vol, err := registry.SplitName(req.Name)
	if err != nil {
		return registry.Volume{}, control.Errorf(control.CodeInvalid, "%v", err)
	}
	p, err := h.poolOf(ctx, pool)
	if err != nil {
		return registry.Volume{}, err
	}
	v, leave, err := h.enter(ctx, pool+"/"+vol)
	if err != nil {
		return registry.Volume{}, err
	}
	defer leave()
	e, parent, err := h.beginClone(ctx, req, pool, vol, &p)
	if err != nil {
		return e.Record, err
	}
	// From here on it is finished one way or the other, whatever becomes of ctx.
	ctx = context.WithoutCancel(ctx)
	if err := h.engine.CreateClone(ctx, h.config(&e.Record), parent, e.Record.Parent.Snapshot); err != nil {
		return e.Record, errors.Join(fmt.Errorf("clone %s to %s: %w", req.From, e.Record.FullName(), err), h.removeNow(ctx, e))
	}
	e.Record.State = registry.StateReady
	if e, err = registry.Replace(ctx, h.reg, registry.VolumeKey(pool, vol), e); err != nil {
		return e.Record, fmt.Errorf("clone %s to %s: %w", req.From, e.Record.FullName(), err)
	}
	h.serve(v)
	h.log.Info().Str("volume", e.Record.FullName()).Str("from", e.Record.Parent.Name).Stringer("id", e.Record.ID).Msg("volume cloned")
	return e.Record, nil
}

// beginClone writes the clone's record, with the parent open.
func (h *VolumeSet) beginClone(ctx context.Context, req control.CloneVolume, pool, vol string, p *registry.Pool) (registry.Entry[registry.Volume], Volume, error) {
	for range conflictRetries {
		parent, s, err := h.source(ctx, req.From)
		if err != nil {
			return registry.Entry[registry.Volume]{}, nil, err
		}
		dev, err := h.open(ctx, parent.Record.FullName())
		if err != nil {
			return registry.Entry[registry.Volume]{}, nil, err
		}
		// The opening may have changed the record (owner, epoch).
		if parent, err = h.load(ctx, parent.Record.FullName()); err != nil {
			return parent, nil, err
		}
		r := newRecord(control.CreateVolume{Size: req.Size, BlockSize: parent.Record.BlockSize, SCOSize: req.SCOSize, Serial: req.Serial}, pool, vol, p, h.node)
		if r.Size == 0 {
			r.Size = s.Record.Size
		}
		if req.SCOSize == 0 {
			r.SCOSize = parent.Record.SCOSize
		}
		switch err := h.checkRecord(&r); {
		case (r.Preset == "") != (parent.Record.Preset == ""):
			return registry.Entry[registry.Volume]{}, nil, control.Errorf(control.CodeInvalid, "clone %s of %s: one pool is in the object store and the other is not: must be both or neither, so clone within the pool and export, or name another pool", r.FullName(), req.From)
		case r.Size < s.Record.Size:
			return registry.Entry[registry.Volume]{}, nil, control.Errorf(control.CodeInvalid, "clone %s: size %d: must be at least the snapshot's, %d bytes (%s)", r.FullName(), r.Size, s.Record.Size, Size(s.Record.Size))
		case err != nil:
			return registry.Entry[registry.Volume]{}, nil, control.Errorf(control.CodeInvalid, "%v", err)
		}
		e, err := registry.BeginClone(ctx, h.reg, parent, s, r)
		switch {
		case errors.Is(err, registry.ErrConflict):
			continue
		case errors.Is(err, registry.ErrExist):
			err = control.Errorf(control.CodeExists, "volume %s exists already", r.FullName())
		case err != nil:
			err = refusal(err)
		}
		return e, dev, err
	}
	return registry.Entry[registry.Volume]{}, nil, fmt.Errorf("clone %s: %w %d times in a row", req.From, registry.ErrConflict, conflictRetries)
}

func (h *VolumeSet) poolOf(ctx context.Context, name string) (registry.Pool, error) {
	p, err := registry.Load[registry.Pool](ctx, h.reg, registry.PoolKey(name))
	if errors.Is(err, registry.ErrNotFound) {
		return p.Record, control.Errorf(control.CodeNotFound, "no pool %s: make it with `scoria pool create %s`, or name another in POOL/VOLUME", name, name)
	}
	return p.Record, err
}

// setTemplate makes a volume that nobody writes to a template, with a snapshot to
// clone, or an ordinary volume again. Front ends get it anew.
func (h *VolumeSet) setTemplate(ctx context.Context, name string, template bool) (registry.Volume, error) {
	dev, e, leave, err := h.enterOpen(ctx, name)
	if err != nil {
		return e.Record, err
	}
	defer leave()
	name = e.Record.FullName()
	if e.Record.Template == template {
		return e.Record, nil
	}
	if by := h.usedBy(name); by != "" {
		return e.Record, inUse(name, by)
	}
	release, err := h.claim(dev, name, "template")
	if err != nil {
		return e.Record, err
	}
	defer release()
	if template {
		snapshot, err := h.freeName(ctx, &e.Record, templateSnapshot)
		if err != nil {
			return e.Record, err
		}
		if _, err := h.createSnapshotIn(ctx, dev, e, uuid.New(), control.CreateSnapshot{Name: snapshot}); err != nil {
			return e.Record, err
		}
	}
	e.Record.Template = template
	if e, err = registry.Replace(ctx, h.reg, registry.VolumeKey(e.Record.Pool, e.Record.Name), e); err != nil {
		return e.Record, fmt.Errorf("template %s: %w", name, err)
	}
	v := h.volume(name)
	h.mu.Lock()
	v.template = template
	h.mu.Unlock()
	h.unserve(v)
	h.serve(v)
	h.log.Info().Str("volume", name).Bool("template", template).Msg("volume changed")
	return e.Record, nil
}

// freeName is a name that no snapshot of the volume has: base, or base-2, ….
func (h *VolumeSet) freeName(ctx context.Context, r *registry.Volume, base string) (string, error) {
	list, err := registry.Snapshots(ctx, h.reg, r.ID)
	if err != nil {
		return "", err
	}
	name := base
	for i := 2; slices.ContainsFunc(list, func(s registry.Entry[registry.Snapshot]) bool { return s.Record.Name == name }); i++ {
		name = fmt.Sprintf("%s-%d", base, i)
	}
	return name, nil
}

// claim makes the daemon the volume's one writer.
func (h *VolumeSet) claim(dev Volume, name, what string) (release func(), err error) {
	release, err = dev.Claim(block.Claimant{Kind: "control", ID: what})
	var held *block.InUseError
	if errors.As(err, &held) {
		return nil, inUse(name, held.Holder.String())
	}
	return release, err
}

// unserve takes a volume from the front ends, which disconnects its users.
func (h *VolumeSet) unserve(v *volume) {
	h.mu.Lock()
	fronts := h.fronts
	h.mu.Unlock()
	for _, f := range fronts {
		f.Remove(v.name)
	}
}

// flatten makes a clone independent of its ancestors. It may be in use; the gate
// is free meanwhile.
func (h *VolumeSet) flatten(ctx context.Context, name string, progress func(done, total int64)) error {
	dev, e, leave, err := h.enterOpen(ctx, name)
	if err != nil {
		return err
	}
	leave()
	name = e.Record.FullName()
	if len(e.Record.Ancestors) == 0 {
		return control.Errorf(control.CodeInvalid, "volume %s is no clone: it reads from no other volume", name)
	}
	if err := dev.Flatten(ctx, func(done, total uint64) { progress(int64(done), int64(total)) }); err != nil {
		return fmt.Errorf("flatten volume %s: %w", name, err)
	}
	_, leave, err = h.enter(ctx, name)
	if err != nil {
		return err
	}
	defer leave()
	now, err := h.load(ctx, name)
	if err != nil || now.Record.ID != e.Record.ID {
		return err
	}
	now.Record.Parent = nil
	if now, err = registry.Replace(ctx, h.reg, registry.VolumeKey(now.Record.Pool, now.Record.Name), now); err != nil {
		return fmt.Errorf("flatten volume %s: %w", name, err)
	}
	now, err = h.noteAncestors(ctx, dev, now)
	if err == nil && len(now.Record.Ancestors) > 0 {
		h.log.Info().Str("volume", name).Msg("volume is flattened, but its older snapshots still read from its ancestors; those stay until the snapshots are deleted")
	}
	return err
}

// openClones lists the clones of a volume that are open.
func (h *VolumeSet) openClones(ctx context.Context, id uuid.UUID) ([]string, error) {
	clones, err := registry.Clones(ctx, h.reg, id, uuid.Nil)
	return slices.DeleteFunc(clones, func(name string) bool { return h.device(name) == nil }), err
}
