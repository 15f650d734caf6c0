package host

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"scoria/driver/block"
	"scoria/driver/control"
	"scoria/driver/registry"
)

// SetVolume implements control.SettingsBackend.
func (b *backend) SetVolume(ctx context.Context, name string, req control.SetVolume) (control.Volume, error) {
	r, err := b.setVolume(ctx, name, req)
	if err != nil {
		return control.Volume{}, err
	}
	return b.answer(&r), nil
}

// setVolume changes what guests see of a volume that nobody uses: a running one
// would not notice another serial number, and would fail writes that it believes
// it may do. The record changes first; then the volume is closed and opens anew
// when it is next wanted.
func (h *VolumeSet) setVolume(ctx context.Context, name string, req control.SetVolume) (registry.Volume, error) {
	name, err := fullName(name)
	if err != nil {
		return registry.Volume{}, &notFoundError{err.Error()}
	}
	v, leave, err := h.enter(ctx, name)
	if err != nil {
		return registry.Volume{}, err
	}
	defer leave()
	e, err := h.checkIdle(ctx, name)
	if err != nil {
		return e.Record, err
	}
	if err := settled(&e.Record); err != nil {
		return e.Record, err
	}
	// A volume can't be closed under its clones.
	if clones, err := h.openClones(ctx, e.Record.ID); err != nil || len(clones) > 0 {
		if err == nil {
			err = inUse(name, "its clones "+strings.Join(clones, ", "))
		}
		return e.Record, err
	}
	before := e.Record
	if req.Serial != nil {
		e.Record.Serial = *req.Serial
	}
	if req.ReadOnly != nil {
		e.Record.ReadOnly = *req.ReadOnly
	}
	switch err := h.checkRecord(&e.Record); {
	case e.Record.Serial == "":
		return before, control.Errorf(control.CodeInvalid, "volume %s: serial is empty: must be 1 to 20 printable ASCII characters without spaces", name)
	case err != nil:
		return before, control.Errorf(control.CodeInvalid, "%v", err)
	case e.Record.Serial == before.Serial && e.Record.ReadOnly == before.ReadOnly:
		return before, nil
	}
	dev := h.device(name)
	if dev != nil {
		// Whoever would begin to write now is refused until the change is made.
		release, err := dev.Claim(block.Claimant{Kind: "control", ID: "set"})
		var held *block.InUseError
		if errors.As(err, &held) {
			return before, inUse(name, held.Holder.String())
		}
		if err != nil {
			return before, err
		}
		defer release()
	}
	if e, err = registry.Replace(ctx, h.reg, registry.VolumeKey(e.Record.Pool, e.Record.Name), e); err != nil {
		return before, fmt.Errorf("change volume %s: %w", name, err)
	}
	h.log.Info().Str("volume", name).Str("serial", e.Record.Serial).Bool("read_only", e.Record.ReadOnly).Msg("volume changed")
	if dev == nil {
		return e.Record, nil
	}
	h.withdraw(v)
	err = dev.Close(context.WithoutCancel(ctx))
	h.serve(v)
	if err != nil {
		return e.Record, fmt.Errorf("change volume %s: the change is recorded, but the volume did not close in order: %w; it holds after the daemon's next start", name, err)
	}
	return e.Record, nil
}
