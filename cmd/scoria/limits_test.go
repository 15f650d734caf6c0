package main

import (
	"context"

	"scoria/driver/control"
	"scoria/driver/limit"
)

func (d daemon) SetVolume(ctx context.Context, name string, req control.SetVolume) (control.Volume, error) {
	v, err := d.Volume(ctx, name)
	if v.UsedBy != "" {
		return v, control.Errorf(control.CodeInUse, "volume %s is in use by %s", name, v.UsedBy)
	}
	if req.Serial != nil {
		v.Serial = *req.Serial
	}
	if req.ReadOnly != nil {
		v.ReadOnly = *req.ReadOnly
	}
	return v, err
}

func (d daemon) RenameVolume(ctx context.Context, name string, req control.RenameVolume) (control.Volume, error) {
	v, err := d.Volume(ctx, name)
	if v.UsedBy != "" {
		return v, control.Errorf(control.CodeInUse, "volume %s is in use by %s", name, v.UsedBy)
	}
	v.Name = "default/" + req.Name
	return v, err
}

func number(v uint64) *uint64 { return &v }

func (d daemon) Limits(ctx context.Context, name string) (control.Limits, error) {
	if _, err := d.Volume(ctx, name); err != nil {
		return control.Limits{}, err
	}
	own := limit.Settings{WriteIOPS: number(100), TotalIOPS: number(500), BurstBytes: number(1 << 30)}
	pool := limit.Settings{TotalBPS: number(200 << 20)}
	return control.Limits{
		Name: name, Own: own, Pool: pool, InForce: own.Over(pool),
		Stats: &control.LimitStats{Limited: true, By: "write_iops", Waiting: 3, OldestSeconds: 0.25, ReadsDelayed: 1, WritesDelayed: 20, ReadWait: 0.5, WriteWait: 12.5},
	}, nil
}

func (d daemon) ChangeLimits(ctx context.Context, name string, req control.ChangeLimits) (control.Limits, error) {
	l, err := d.Limits(ctx, name)
	if err != nil {
		return l, err
	}
	l.Own, err = req.Apply(l.Own)
	l.InForce, l.Stats = l.Own.Over(l.Pool), nil
	return l, err
}

func (d daemon) PoolLimits(ctx context.Context, pool string) (control.Limits, error) {
	_, err := d.Pool(ctx, pool)
	return control.Limits{Name: pool}, err
}

func (d daemon) ChangePoolLimits(ctx context.Context, pool string, req control.ChangeLimits) (l control.Limits, err error) {
	if l, err = d.PoolLimits(ctx, pool); err == nil {
		l.Own, err = req.Apply(l.Own)
	}
	return l, err
}
