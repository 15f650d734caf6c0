package host

import (
	"context"
	"fmt"

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
	v, e, leave, err := h.enterLoaded(ctx, name)
	if err != nil {
		return e.Record, err
	}
	defer leave()
	name = v.name
	dev, release, err := h.takeIdle(ctx, e, "set")
	if err != nil {
		return e.Record, err
	}
	defer release()
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
