package host

import (
	"cmp"
	"context"
	"errors"
	"slices"
	"strings"
	"time"

	"github.com/google/uuid"

	"scoria/driver/control"
	"scoria/driver/registry"
	"scoria/driver/schedule"
)

var _ snapshotter = (*VolumeSet)(nil)

func (h *VolumeSet) scheduleSnapshots(ctx context.Context, volume string) ([]schedule.Snapshot, error) {
	e, err := h.load(ctx, volume)
	if err != nil {
		return nil, err
	}
	entries, err := registry.Snapshots(ctx, h.reg, e.Record.ID)
	if err != nil {
		return nil, err
	}
	volumes, err := registry.LoadAll[registry.Volume](ctx, h.reg, registry.VolumePrefix)
	if err != nil {
		return nil, err
	}
	var list []schedule.Snapshot
	for i := range entries {
		r := &entries[i].Record
		if r.State != registry.StateReady || r.Temporary {
			continue
		}
		s := schedule.Snapshot{Name: r.Name, Metadata: r.Metadata}
		if _, made := s.Made(); made {
			s.Clones = len(registry.ClonesAmong(volumes, r.Volume, r.ID))
		}
		list = append(list, s)
	}
	return list, nil
}

func (h *VolumeSet) createScheduled(ctx context.Context, volume, name string, metadata map[string]string) error {
	_, _, err := h.createSnapshot(ctx, volume, uuid.New(), control.CreateSnapshot{Name: name, Metadata: metadata})
	return err
}

func (h *VolumeSet) deleteScheduled(ctx context.Context, volume, name string) error {
	return h.deleteSnapshot(ctx, volume, name)
}

// scheduleTarget finds what a schedule is or may be for: a pool, or a volume.
func (b *backend) scheduleTarget(ctx context.Context, target string) (key string, r registry.Schedule, err error) {
	if !strings.Contains(target, "/") {
		if _, err := b.loadPool(ctx, target); err != nil {
			return "", r, err
		}
		return registry.PoolScheduleKey(target), registry.Schedule{Pool: target}, nil
	}
	e, err := b.load(ctx, target)
	if err != nil {
		return "", r, err
	}
	return registry.VolumeScheduleKey(e.Record.ID), registry.Schedule{Volume: e.Record.ID}, nil
}

// Schedules implements control.ScheduleBackend.
func (b *backend) Schedules(ctx context.Context) ([]control.Schedule, error) {
	records, err := registry.LoadAll[registry.Schedule](ctx, b.reg, registry.SchedulePrefix)
	if err != nil {
		return nil, err
	}
	following, err := b.schedules.load(ctx)
	if err != nil {
		return nil, err
	}
	volumes, err := registry.LoadAll[registry.Volume](ctx, b.reg, registry.VolumePrefix)
	if err != nil {
		return nil, err
	}
	list := []control.Schedule{}
	for i := range records {
		r := &records[i].Record
		target := r.Pool
		if target == "" {
			at := slices.IndexFunc(volumes, func(e registry.Entry[registry.Volume]) bool { return e.Record.ID == r.Volume })
			if at < 0 {
				continue // its volume is gone
			}
			target = volumes[at].Record.FullName()
		}
		list = append(list, b.scheduleAnswer(target, r, following))
	}
	slices.SortFunc(list, func(x, y control.Schedule) int { return cmp.Compare(x.Target, y.Target) })
	return list, nil
}

func (b *backend) scheduleAnswer(target string, r *registry.Schedule, following []scheduled) control.Schedule {
	answer := control.Schedule{Target: target, Rules: append([]string{}, r.Rules...), Zone: r.Zone, Since: r.Since, Volumes: []control.ScheduledVolume{}}
	for i := range following {
		it := &following[i]
		if it.sched.Pool != r.Pool || it.sched.Volume != r.Volume || len(r.Rules) == 0 {
			continue
		}
		run := &it.run.Record
		v := control.ScheduledVolume{Name: it.volume.FullName(), Last: run.Made, LastTime: run.MadeAt, MissedAt: run.MissedAt}
		for _, m := range run.Missed {
			v.Missed = append(v.Missed, control.Missed{Rule: m.Rule, Count: m.Count, First: m.First, Last: m.Last})
		}
		b.schedules.mu.Lock()
		if st := b.schedules.states[it.volume.ID]; st != nil {
			v.Next, v.Held = st.due, slices.Clone(st.held)
			if st.err != nil {
				v.Error = st.err.Error()
			}
		}
		b.schedules.mu.Unlock()
		answer.Volumes = append(answer.Volumes, v)
	}
	return answer
}

// Schedule implements control.ScheduleBackend.
func (b *backend) Schedule(ctx context.Context, target string) (control.Schedule, error) {
	key, _, err := b.scheduleTarget(ctx, target)
	if err != nil {
		return control.Schedule{}, err
	}
	e, err := registry.Load[registry.Schedule](ctx, b.reg, key)
	if errors.Is(err, registry.ErrNotFound) {
		return control.Schedule{}, control.Errorf(control.CodeNotFound, "%s has no schedule of its own; `scoria schedule list` shows all", target)
	}
	if err != nil {
		return control.Schedule{}, err
	}
	following, err := b.schedules.load(ctx)
	return b.scheduleAnswer(target, &e.Record, following), err
}

// SetSchedule implements control.ScheduleBackend.
func (b *backend) SetSchedule(ctx context.Context, target string, req control.SetSchedule) (control.Schedule, error) {
	parsed, err := schedule.Parse(req.Rules, req.Zone)
	if err != nil {
		return control.Schedule{}, control.Errorf(control.CodeInvalid, "%v", err)
	}
	key, r, err := b.scheduleTarget(ctx, target)
	if err != nil {
		return control.Schedule{}, err
	}
	if len(req.Rules) == 0 && r.Pool != "" {
		return control.Schedule{}, control.Errorf(control.CodeInvalid, "pool %s: a schedule without rules: delete it instead", r.Pool)
	}
	r.Rules, r.Zone, r.Since = []string{}, req.Zone, b.schedules.now().UTC().Truncate(time.Second)
	for i := range parsed.Rules {
		r.Rules = append(r.Rules, parsed.Rules[i].String())
	}
	for {
		e, err := registry.Load[registry.Schedule](ctx, b.reg, key)
		if err != nil && !errors.Is(err, registry.ErrNotFound) {
			return control.Schedule{}, err
		}
		e.Record = r
		if _, err = registry.Replace(ctx, b.reg, key, e); err == nil {
			break
		}
		if !errors.Is(err, registry.ErrConflict) || ctx.Err() != nil {
			return control.Schedule{}, err
		}
	}
	b.log.Info().Str("target", target).Strs("rules", r.Rules).Msg("snapshot schedule set")
	b.schedules.nudge()
	return b.Schedule(ctx, target)
}

// DeleteSchedule implements control.ScheduleBackend.
func (b *backend) DeleteSchedule(ctx context.Context, target string) error {
	key, _, err := b.scheduleTarget(ctx, target)
	if err != nil {
		return err
	}
	return b.deleteSchedule(ctx, target, key)
}

func (b *backend) deleteSchedule(ctx context.Context, target, key string) error {
	e, err := registry.Load[registry.Schedule](ctx, b.reg, key)
	if errors.Is(err, registry.ErrNotFound) {
		return control.Errorf(control.CodeNotFound, "%s has no schedule of its own", target)
	}
	if err == nil {
		err = registry.Remove(ctx, b.reg, key, e.Revision)
	}
	if err != nil {
		return err
	}
	b.log.Info().Str("target", target).Msg("snapshot schedule deleted")
	b.schedules.nudge()
	return nil
}
