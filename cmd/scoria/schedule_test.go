package main

import (
	"context"
	"time"

	"scoria/driver/control"
)

func (d daemon) Schedules(ctx context.Context) ([]control.Schedule, error) {
	pool, _ := d.Schedule(ctx, "default")
	return []control.Schedule{pool, {Target: "default/scratch", Rules: []string{}, Since: created, Volumes: []control.ScheduledVolume{}}}, nil
}

func (d daemon) Schedule(_ context.Context, target string) (control.Schedule, error) {
	if target == "default/none" {
		return control.Schedule{}, control.Errorf(control.CodeNotFound, "%s has no schedule of its own", target)
	}
	return control.Schedule{
		Target: target, Rules: []string{"every 1h keep 24", "daily at 02:30 keep 7"}, Zone: "Europe/Brussels", Since: created,
		Volumes: []control.ScheduledVolume{
			{Name: "default/vm1", Last: "auto-20260102-030000", LastTime: created, Next: created.Add(time.Hour)},
			{
				Name: "fast/db", Next: created.Add(time.Hour), Error: "disk full", Held: []string{"auto-20250101-000000"}, MissedAt: created,
				Missed: []control.Missed{{Rule: "every 1h keep 24", Count: 3, First: created.Add(-3 * time.Hour), Last: created.Add(-time.Hour)}},
			},
		},
	}, nil
}

func (d daemon) SetSchedule(_ context.Context, target string, req control.SetSchedule) (control.Schedule, error) {
	return control.Schedule{Target: target, Rules: req.Rules, Zone: req.Zone, Since: created, Volumes: []control.ScheduledVolume{}}, nil
}

func (daemon) DeleteSchedule(_ context.Context, target string) error {
	if target == "nosuch" {
		return control.Errorf(control.CodeNotFound, "no pool %s", target)
	}
	return nil
}
