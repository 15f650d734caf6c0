package host

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"scoria/driver/block"
	"scoria/driver/control"
	"scoria/driver/registry"
)

// RenameVolume implements control.SettingsBackend.
func (b *backend) RenameVolume(ctx context.Context, name string, req control.RenameVolume) (control.Volume, error) {
	r, err := b.rename(ctx, name, req.Name)
	if err != nil {
		return control.Volume{}, err
	}
	return b.Volume(ctx, r.FullName())
}

// rename gives a volume that nobody uses another name in its pool. Everything that
// belongs to it is recorded under its ID, so that one record changes its key, in one
// transaction. The sockets of the old name go before it, those of the new one come
// after; a start serves what the registry says.
func (h *VolumeSet) rename(ctx context.Context, name, to string) (registry.Volume, error) {
	from, to, err := renameNames(name, to)
	if err != nil {
		return registry.Volume{}, err
	}
	v, next, leave, err := h.enterBoth(ctx, from, to)
	if err != nil {
		return registry.Volume{}, err
	}
	defer leave()
	defer h.forgetUnused(next)
	e, err := h.load(ctx, from)
	if err != nil {
		return e.Record, err
	}
	renamed := e.Record
	_, renamed.Name, _ = strings.Cut(to, "/")
	if err := h.checkRecord(&renamed); err != nil {
		return e.Record, control.Errorf(control.CodeInvalid, "%v", err)
	}
	dev, release, err := h.takeIdle(ctx, e, "rename")
	if err != nil {
		return e.Record, err
	}
	defer release()
	// From here on it ends one way or the other, whatever becomes of ctx.
	ctx = context.WithoutCancel(ctx)
	h.unserve(v)
	if e, err = h.recordName(ctx, e, &renamed); err != nil {
		h.serve(v)
		return e.Record, err
	}
	h.withdraw(v)
	if dev != nil {
		err = dev.Close(ctx)
	}
	h.moveEntry(v, next)
	h.serve(next)
	h.log.Info().Str("volume", to).Str("from", from).Stringer("id", e.Record.ID).Msg("volume renamed")
	if err != nil {
		return e.Record, fmt.Errorf("rename volume %s: it is recorded as %s, but did not close in order: %w; it can be used after the daemon's next start", from, to, err)
	}
	return e.Record, nil
}

// renameNames validates both names of a renaming; the new one is in the old one's
// pool if it names none.
func renameNames(name, to string) (from, full string, err error) {
	if from, err = fullName(name); err != nil {
		return "", "", &notFoundError{err.Error()}
	}
	pool, _, _ := strings.Cut(from, "/")
	if !strings.Contains(to, "/") {
		to = pool + "/" + to
	}
	newPool, _, err := registry.SplitName(to)
	switch {
	case err != nil:
		return "", "", control.Errorf(control.CodeInvalid, "%v", err)
	case newPool != pool:
		return "", "", control.Errorf(control.CodeInvalid, "rename volume %s to %s: a volume stays in its pool: name one in pool %s, or make a copy with `scoria volume export` and `receive`", from, to, pool)
	case to == from:
		return "", "", control.Errorf(control.CodeInvalid, "rename volume %s: that is its name already", from)
	}
	return from, to, nil
}

// enterBoth takes the gates of two volumes, in the order of their names.
func (h *VolumeSet) enterBoth(ctx context.Context, a, b string) (va, vb *volume, leave func(), err error) {
	first, second := min(a, b), max(a, b)
	v1, leave1, err := h.enter(ctx, first)
	if err != nil {
		return nil, nil, nil, err
	}
	v2, leave2, err := h.enter(ctx, second)
	if err != nil {
		leave1()
		return nil, nil, nil, err
	}
	if first != a {
		v1, v2 = v2, v1
	}
	return v1, v2, func() { leave2(); leave1() }, nil
}

// takeIdle sees that nobody uses a volume that is whole, nor can begin to write to it
// until release. dev is nil if it is not open. The gate is held.
func (h *VolumeSet) takeIdle(ctx context.Context, e registry.Entry[registry.Volume], what string) (dev Volume, release func(), err error) {
	name := e.Record.FullName()
	if _, err := h.checkIdle(ctx, name); err != nil {
		return nil, nil, err
	}
	if err := settled(&e.Record); err != nil {
		return nil, nil, err
	}
	// A volume can't be closed under its clones.
	clones, err := h.openClones(ctx, e.Record.ID)
	if err != nil {
		return nil, nil, err
	}
	if len(clones) > 0 {
		return nil, nil, inUse(name, "its clones "+strings.Join(clones, ", "))
	}
	if dev = h.device(name); dev == nil {
		return nil, func() {}, nil
	}
	release, err = dev.Claim(block.Claimant{Kind: "control", ID: what})
	var held *block.InUseError
	if errors.As(err, &held) {
		return nil, nil, inUse(name, held.Holder.String())
	}
	return dev, release, err
}

// recordName changes the name in the registry. If it is not known whether that has
// happened, the registry says so.
func (h *VolumeSet) recordName(ctx context.Context, e registry.Entry[registry.Volume], renamed *registry.Volume) (registry.Entry[registry.Volume], error) {
	from, to := e.Record.FullName(), renamed.FullName()
	now, err := registry.RenameVolume(ctx, h.reg, e, renamed.Name)
	if errors.Is(err, registry.ErrExist) {
		return e, control.Errorf(control.CodeExists, "volume %s exists already", to)
	}
	if err == nil {
		return now, nil
	}
	if now, lerr := h.load(ctx, to); lerr == nil && now.Record.ID == e.Record.ID {
		return now, nil
	}
	return e, fmt.Errorf("rename volume %s to %s: %w", from, to, err)
}

// moveEntry lets the entry of the new name take the place of the old one's. Both
// gates are held.
func (h *VolumeSet) moveEntry(from, to *volume) {
	h.mu.Lock()
	defer h.mu.Unlock()
	delete(h.volumes, from.name)
	if h.used[from.name] {
		delete(h.used, from.name)
		h.used[to.name] = true // it is opened at the next start, too
	}
	to.notices = slices.Clone(from.notices)
}

// forgetUnused drops the entry of a name that no volume has. Its gate is held.
func (h *VolumeSet) forgetUnused(v *volume) {
	if _, err := h.load(context.WithoutCancel(h.ctx), v.name); !errors.Is(err, block.ErrNotFound) {
		return
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.volumes[v.name] == v && v.dev == nil && v.opening == nil {
		delete(h.volumes, v.name)
	}
}
