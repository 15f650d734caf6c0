package control_test

import (
	"context"
	"reflect"
	"testing"

	"scoria/driver/control"
	"scoria/driver/limit"
)

func (b *backend) RenameVolume(ctx context.Context, name string, req control.RenameVolume) (control.Volume, error) {
	v, err := b.Volume(ctx, name)
	v.Name = "default/" + req.Name
	return v, err
}

func (b *backend) SetVolume(ctx context.Context, name string, req control.SetVolume) (control.Volume, error) {
	v, err := b.Volume(ctx, name)
	if req.Serial != nil {
		v.Serial = *req.Serial
	}
	if req.ReadOnly != nil {
		v.ReadOnly = *req.ReadOnly
	}
	return v, err
}

func (b *backend) Limits(ctx context.Context, name string) (control.Limits, error) {
	_, err := b.Volume(ctx, name)
	return control.Limits{Name: name, Own: limit.Settings{ReadIOPS: ptr(uint64(5))}, Stats: &control.LimitStats{Waiting: 2}}, err
}

func (b *backend) ChangeLimits(ctx context.Context, name string, req control.ChangeLimits) (control.Limits, error) {
	l, err := b.Limits(ctx, name)
	if err == nil {
		l.Own, err = req.Apply(l.Own)
	}
	return l, err
}

func (b *backend) PoolLimits(ctx context.Context, pool string) (control.Limits, error) {
	_, err := b.Pool(ctx, pool)
	return control.Limits{Name: pool, Own: limit.Settings{Burst: ptr(1.5)}}, err
}

func (b *backend) ChangePoolLimits(ctx context.Context, pool string, req control.ChangeLimits) (control.Limits, error) {
	l, err := b.PoolLimits(ctx, pool)
	if err == nil {
		l.Own, err = req.Apply(l.Own)
	}
	return l, err
}

func ptr[T any](v T) *T { return &v }

func TestSettingsRoundTrips(t *testing.T) {
	b := newBackend()
	c, _ := serve(t, b)
	ctx := t.Context()
	if _, err := c.CreateVolume(ctx, control.CreateVolume{Name: "default/v", Size: 4096}); err != nil {
		t.Fatal(err)
	}
	if v, err := c.SetVolume(ctx, "default/v", control.SetVolume{Serial: ptr("S9"), ReadOnly: ptr(true)}); err != nil || v.Serial != "S9" || !v.ReadOnly {
		t.Fatalf("SetVolume: %+v, %v", v, err)
	}
	if v, err := c.RenameVolume(ctx, "default/v", control.RenameVolume{Name: "w"}); err != nil || v.Name != "default/w" {
		t.Fatalf("RenameVolume: %+v, %v", v, err)
	}
	l, err := c.Limits(ctx, "default/v")
	if err != nil || *l.Own.ReadIOPS != 5 || l.Stats.Waiting != 2 {
		t.Fatalf("Limits: %+v, %v", l, err)
	}
	l, err = c.ChangeLimits(ctx, "default/v", control.ChangeLimits{Unset: []string{"read_iops"}, Set: limit.Settings{WriteBPS: ptr(uint64(0)), BurstBytes: ptr(uint64(9))}})
	if want := (limit.Settings{WriteBPS: ptr(uint64(0)), BurstBytes: ptr(uint64(9))}); err != nil || !reflect.DeepEqual(l.Own, want) {
		t.Fatalf("ChangeLimits: %+v, %v", l, err)
	}
	if l, err = c.ChangePoolLimits(ctx, "default", control.ChangeLimits{Clear: true}); err != nil || !l.Own.IsZero() {
		t.Fatalf("ChangePoolLimits: %+v, %v", l, err)
	}
	if l, err = c.PoolLimits(ctx, "default"); err != nil || *l.Own.Burst != 1.5 {
		t.Fatalf("PoolLimits: %+v, %v", l, err)
	}
	for name, err := range map[string]error{
		"not valid": second(c.ChangeLimits(ctx, "default/v", control.ChangeLimits{Set: limit.Settings{ReadBPS: ptr(uint64(1))}})),
		"no such":   second(c.ChangePoolLimits(ctx, "default", control.ChangeLimits{Unset: []string{"colour"}})),
	} {
		if control.CodeOf(err) != control.CodeInvalid {
			t.Errorf("%s: %v; want %s", name, err, control.CodeInvalid)
		}
	}
	if err := second(c.Limits(ctx, "default/none")); control.CodeOf(err) != control.CodeNotFound {
		t.Errorf("no volume: %v", err)
	}
}

func second[T any](_ T, err error) error { return err }
