package host

import (
	"context"
	"errors"
	"sync"
	"time"

	"github.com/google/uuid"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/rs/zerolog"
	"golang.org/x/sync/errgroup"

	"scoria/driver/control"
	"scoria/driver/registry"
	"scoria/driver/schedule"
)

const (
	// scheduleLook is how often the schedules are looked at when nothing is due: so
	// soon is it noticed that the clock was set.
	scheduleLook = time.Minute
	// parallelSchedules bounds how many volumes are dealt with at once.
	parallelSchedules = 4
)

// snapshotter is what the scheduler asks of the daemon. Volumes are POOL/VOLUME.
type snapshotter interface {
	scheduleSnapshots(ctx context.Context, volume string) ([]schedule.Snapshot, error)
	createScheduled(ctx context.Context, volume, name string, metadata map[string]string) error
	// deleteScheduled fails with control.CodeInUse if something reads the snapshot.
	deleteScheduled(ctx context.Context, volume, name string) error
}

// scheduler carries out what package schedule decides, for the volumes that this
// node owns. What it has done is recorded after it is done: a daemon that dies in
// between makes one snapshot more, which goes again by the same rules.
type scheduler struct {
	volumes *VolumeSet
	snaps   snapshotter
	now     func() time.Time
	log     zerolog.Logger
	events  *prometheus.CounterVec
	kick    chan struct{} // one token: look at once

	mu     sync.Mutex // a leaf
	states map[uuid.UUID]*scheduleState
	looked time.Time
}

// scheduleState is what the scheduler remembers of a volume.
type scheduleState struct {
	name  string
	since time.Time // of the schedule that the rest is about
	next  time.Time // when to look at the volume again
	due   time.Time // when the next snapshot is
	held  []string
	err   error
}

func newScheduler(v *VolumeSet, snaps snapshotter, log zerolog.Logger) *scheduler {
	return &scheduler{
		volumes: v, snaps: snaps, now: time.Now, log: log, kick: make(chan struct{}, 1), states: map[uuid.UUID]*scheduleState{},
		events: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "scoria_schedule_events_total", Help: "What schedules did for a volume: snapshots created, deleted and missed, and failures.",
		}, []string{"volume", "event"}),
	}
}

// run looks after the schedules until ctx ends.
func (s *scheduler) run(ctx context.Context) {
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-timer.C:
		case <-s.kick:
		case <-ctx.Done():
			return
		}
		next, err := s.look(ctx)
		if err != nil && ctx.Err() == nil {
			s.log.Error().Err(err).Msg("snapshot schedules can't be looked at; tried again in a minute")
		}
		pause := scheduleLook
		if !next.IsZero() {
			// A moment later, so that the slot is there also by a clock that is read
			// with less precision.
			pause = min(max(next.Sub(s.now()), 0)+time.Millisecond, scheduleLook)
		}
		timer.Reset(pause)
	}
}

// nudge makes the scheduler look at once.
func (s *scheduler) nudge() {
	select {
	case s.kick <- struct{}{}:
	default:
	}
}

// scheduled is a volume with the schedule that holds for it.
type scheduled struct {
	volume registry.Volume
	sched  registry.Schedule
	run    registry.Entry[registry.ScheduleRun] // revision 0: none yet
}

// load reads the schedules and which volumes follow them. What is left of volumes
// that are gone is removed.
func (s *scheduler) load(ctx context.Context) ([]scheduled, error) {
	reg := s.volumes.reg
	// Volumes last: what refers to one that is not among them is of one that is gone.
	scheds, err := registry.LoadAll[registry.Schedule](ctx, reg, registry.SchedulePrefix)
	if err != nil {
		return nil, err
	}
	runs, err := registry.LoadAll[registry.ScheduleRun](ctx, reg, registry.RunPrefix)
	if err != nil || len(scheds)+len(runs) == 0 {
		return nil, err
	}
	volumes, err := registry.LoadAll[registry.Volume](ctx, reg, registry.VolumePrefix)
	if err != nil {
		return nil, err
	}
	exists := map[uuid.UUID]bool{}
	for i := range volumes {
		exists[volumes[i].Record.ID] = true
	}
	ofPool, ofVolume := map[string]registry.Schedule{}, map[uuid.UUID]registry.Schedule{}
	var errs []error
	remove := func(key string, revision int64) {
		if err := registry.Remove(ctx, reg, key, revision); !errors.Is(err, registry.ErrConflict) {
			errs = append(errs, err)
		}
	}
	for _, e := range scheds {
		switch {
		case e.Record.Pool != "":
			ofPool[e.Record.Pool] = e.Record
		case exists[e.Record.Volume]:
			ofVolume[e.Record.Volume] = e.Record
		default:
			remove(registry.VolumeScheduleKey(e.Record.Volume), e.Revision)
		}
	}
	ofRun := map[uuid.UUID]registry.Entry[registry.ScheduleRun]{}
	for _, e := range runs {
		if ofRun[e.Record.Volume] = e; !exists[e.Record.Volume] {
			remove(registry.RunKey(e.Record.Volume), e.Revision)
		}
	}
	var list []scheduled
	for i := range volumes {
		v := volumes[i].Record
		sched, ok := ofVolume[v.ID]
		if !ok {
			sched, ok = ofPool[v.Pool]
		}
		if ok && v.State == registry.StateReady && !v.Template && v.Incomplete == nil {
			list = append(list, scheduled{v, sched, ofRun[v.ID]})
		}
	}
	return list, errors.Join(errs...)
}

// look does what is due and returns when something will be, zero if nothing.
func (s *scheduler) look(ctx context.Context) (next time.Time, err error) {
	list, err := s.load(ctx)
	now := s.now()
	var g errgroup.Group
	g.SetLimit(parallelSchedules)
	for i, st := range s.track(list, now) {
		if st != nil && ctx.Err() == nil {
			g.Go(func() error {
				s.step(ctx, &list[i], st, now)
				return nil
			})
		}
	}
	_ = g.Wait() // steps keep their errors
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, st := range s.states {
		if next.IsZero() || st.next.Before(next) {
			next = st.next
		}
	}
	return next, err
}

// track makes the states those of the volumes in list, and returns the ones to
// be looked at now, nil for the others.
func (s *scheduler) track(list []scheduled, now time.Time) []*scheduleState {
	s.mu.Lock()
	defer s.mu.Unlock()
	back := now.Before(s.looked)
	s.looked = now
	states := map[uuid.UUID]*scheduleState{}
	due := make([]*scheduleState, len(list))
	for i := range list {
		it := &list[i]
		if len(it.sched.Rules) == 0 || it.volume.Owner != s.volumes.node {
			continue
		}
		st := s.states[it.volume.ID]
		if st == nil || !st.since.Equal(it.sched.Since) {
			st = &scheduleState{since: it.sched.Since}
		}
		st.name = it.volume.FullName()
		states[it.volume.ID] = st
		if back || !now.Before(st.next) {
			due[i] = st
		}
	}
	s.states = states
	return due
}

// step deals with one volume.
func (s *scheduler) step(ctx context.Context, it *scheduled, st *scheduleState, now time.Time) {
	d, held, err := s.carryOut(ctx, it, now)
	if control.CodeOf(err) == control.CodeNotFound || ctx.Err() != nil {
		return // deleted meanwhile, or the daemon ends
	}
	s.mu.Lock()
	first := err != nil && (st.err == nil || st.err.Error() != err.Error())
	st.err, st.held, st.due, st.next = err, held, d.Next, d.Next
	if err != nil {
		st.next = now.Add(scheduleLook)
	}
	s.mu.Unlock()
	if err != nil {
		s.events.WithLabelValues(st.name, "failed").Inc()
	}
	if first {
		s.log.Error().Err(err).Str("volume", st.name).Msg("the volume's snapshot schedule can't be carried out; tried again every minute")
	}
}

// carryOut decides and acts. held are snapshots that should go and can't.
func (s *scheduler) carryOut(ctx context.Context, it *scheduled, now time.Time) (d schedule.Decision, held []string, err error) {
	rules, err := schedule.Parse(it.sched.Rules, it.sched.Zone)
	if err != nil {
		return d, nil, err
	}
	name := it.volume.FullName()
	have, err := s.snaps.scheduleSnapshots(ctx, name)
	if err != nil {
		return d, nil, err
	}
	d = schedule.Decide(now, &rules, it.done(), have)
	if d.Create != "" {
		if err := s.snaps.createScheduled(ctx, name, d.Create, d.Metadata); err != nil {
			return d, nil, err
		}
		s.events.WithLabelValues(name, "created").Inc()
	}
	if err := s.record(context.WithoutCancel(ctx), it, &d, now); err != nil {
		return d, nil, err
	}
	held = d.Held
	var errs []error
	for _, gone := range d.Delete {
		err := s.snaps.deleteScheduled(ctx, name, gone)
		switch {
		case err == nil:
			s.events.WithLabelValues(name, "deleted").Inc()
		case control.CodeOf(err) == control.CodeInUse:
			held = append(held, gone)
		case control.CodeOf(err) != control.CodeNotFound:
			errs = append(errs, err)
		}
		if ctx.Err() != nil {
			break
		}
	}
	return d, held, errors.Join(errs...)
}

// done is up to when the volume's slots have been dealt with.
func (it *scheduled) done() time.Time {
	done := it.run.Record.Done
	if it.run.Revision != 0 && it.run.Record.Since.Equal(it.sched.Since) {
		return done
	}
	for _, t := range []time.Time{it.sched.Since, it.volume.Created} {
		if t.After(done) {
			done = t
		}
	}
	return done
}

// record writes down what was done, and only then reports what was missed: once.
func (s *scheduler) record(ctx context.Context, it *scheduled, d *schedule.Decision, now time.Time) error {
	run := it.run
	r := &run.Record
	if run.Revision != 0 && r.Since.Equal(it.sched.Since) && r.Done.Equal(d.Done) && d.Create == "" {
		return nil
	}
	r.Volume, r.Since, r.Done = it.volume.ID, it.sched.Since, d.Done.UTC()
	if d.Create != "" {
		r.Made, r.MadeAt = d.Create, now.UTC().Truncate(time.Second)
	}
	if len(d.Missed) > 0 {
		r.Missed, r.MissedAt = nil, now.UTC().Truncate(time.Second)
		for _, m := range d.Missed {
			r.Missed = append(r.Missed, registry.MissedSlots{Rule: m.Rule, Count: m.Count, First: m.First.UTC(), Last: m.Last.UTC()})
		}
	}
	if _, err := registry.Replace(ctx, s.volumes.reg, registry.RunKey(it.volume.ID), run); err != nil {
		return err
	}
	name := it.volume.FullName()
	if d.ClockWentBack {
		s.log.Warn().Str("volume", name).Time("was", it.done()).Msg("the clock went back: snapshots are scheduled anew from now on")
	}
	for _, m := range d.Missed {
		s.events.WithLabelValues(name, "missed").Add(float64(m.Count))
		s.log.Warn().Str("volume", name).Str("rule", m.Rule).Int("count", m.Count).Time("first", m.First).Time("last", m.Last).
			Msg("scheduled snapshots were missed; one was made instead")
	}
	return nil
}

// conditions says what keeps a volume's schedule from being carried out.
func (s *scheduler) conditions(id uuid.UUID) []control.Condition {
	s.mu.Lock()
	defer s.mu.Unlock()
	if st := s.states[id]; st != nil && st.err != nil {
		return []control.Condition{{Code: "schedule-failed", Message: "scheduled snapshots are not made or not deleted: " + st.err.Error() + "; tried again every minute"}}
	}
	return nil
}
