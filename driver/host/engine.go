package host

import (
	"context"

	"github.com/google/uuid"

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

func (e realEngine) CreateClone(ctx context.Context, c driver.VolumeConfig, parent Volume, snapshot uuid.UUID) error {
	return e.Engine.CreateClone(ctx, c, engineVolume(parent), snapshot)
}

func (e realEngine) OpenSnapshot(ctx context.Context, v Volume, snapshot uuid.UUID) (View, error) {
	view, err := engineVolume(v).OpenSnapshot(ctx, snapshot)
	if err != nil {
		return nil, err
	}
	return view, nil
}

// engineVolume is the engine's own part of what its OpenVolume returned, whatever
// stands in front of it.
func engineVolume(v Volume) *driver.Volume {
	if l, ok := v.(*limited); ok {
		v = l.Volume
	}
	return v.(*driver.Volume)
}

// OpenEngine opens the real engine.
func OpenEngine(ctx context.Context, c driver.Config) (Engine, error) {
	e, err := driver.OpenEngine(ctx, c)
	if err != nil {
		return nil, err
	}
	return realEngine{e}, nil
}
