package host

import (
	"context"

	"scoria/driver"
)

// realEngine makes a driver.Engine an Engine: its OpenVolume returns the
// interface.
type realEngine struct{ *driver.Engine }

func (e realEngine) OpenVolume(ctx context.Context, c driver.VolumeConfig) (Volume, error) {
	v, err := e.Engine.OpenVolume(ctx, c)
	if err != nil {
		return nil, err
	}
	return v, nil
}

func (e realEngine) CheckVolume(ctx context.Context, c driver.VolumeConfig, progress func(done, total int64)) (driver.CheckReport, error) {
	return e.Engine.CheckVolume(ctx, c, progress)
}

// OpenEngine opens the real engine.
func OpenEngine(ctx context.Context, c driver.Config) (Engine, error) {
	e, err := driver.OpenEngine(ctx, c)
	if err != nil {
		return nil, err
	}
	return realEngine{e}, nil
}
