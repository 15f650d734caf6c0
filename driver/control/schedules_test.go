package control_test

import (
	"context"
	"reflect"
	"strings"
	"testing"

	"scoria/driver/control"
)

func (b *backend) Schedules(context.Context) ([]control.Schedule, error) {
	return []control.Schedule{{Target: "default", Rules: []string{"daily keep 7"}, Volumes: []control.ScheduledVolume{{Name: "default/v", Held: []string{"s"}}}}}, nil
}

func (b *backend) Schedule(_ context.Context, target string) (control.Schedule, error) {
	return control.Schedule{Target: target, Rules: []string{}, Volumes: []control.ScheduledVolume{}}, nil
}

func (b *backend) SetSchedule(_ context.Context, target string, req control.SetSchedule) (control.Schedule, error) {
	return control.Schedule{Target: target, Rules: req.Rules, Zone: req.Zone, Volumes: []control.ScheduledVolume{}}, nil
}

func (b *backend) DeleteSchedule(_ context.Context, target string) error {
	if !strings.Contains(target, "/") {
		return control.Errorf(control.CodeNotFound, "pool %s has no schedule", target)
	}
	return nil
}

func TestScheduleRoundTrips(t *testing.T) {
	b := newBackend()
	c, _ := serve(t, b)
	ctx := t.Context()
	want, _ := b.Schedules(ctx)
	if list, err := c.Schedules(ctx); err != nil || !reflect.DeepEqual(list, want) {
		t.Errorf("Schedules: %+v, %v", list, err)
	}
	for _, target := range []string{"default", "default/v"} {
		if s, err := c.Schedule(ctx, target); err != nil || s.Target != target {
			t.Errorf("Schedule: %+v, %v", s, err)
		}
		s, err := c.SetSchedule(ctx, target, control.SetSchedule{Rules: []string{"daily keep 7"}, Zone: "UTC"})
		if err != nil || s.Target != target || s.Rules[0] != "daily keep 7" || s.Zone != "UTC" {
			t.Errorf("SetSchedule: %+v, %v", s, err)
		}
	}
	if err := c.DeleteSchedule(ctx, "default"); control.CodeOf(err) != control.CodeNotFound {
		t.Errorf("DeleteSchedule of the pool: %v", err)
	}
	if err := c.DeleteSchedule(ctx, "default/v"); err != nil {
		t.Error(err)
	}
}
