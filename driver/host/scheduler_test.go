package host

import (
	"bytes"
	"context"
	"errors"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/rs/zerolog"

	"scoria/driver/block"
	"scoria/driver/control"
	"scoria/driver/registry"
	"scoria/driver/schedule"
)

// fakeSnapshots keeps the snapshots of volumes and can be made to fail.
type fakeSnapshots struct {
	mu   sync.Mutex
	of   map[string][]schedule.Snapshot
	fail map[string]error // by operation
}

func (f *fakeSnapshots) scheduleSnapshots(_ context.Context, volume string) ([]schedule.Snapshot, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Clone(f.of[volume]), f.fail["list"]
}

func (f *fakeSnapshots) createScheduled(_ context.Context, volume, name string, metadata map[string]string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if err := f.fail["create"]; err != nil {
		return err
	}
	f.of[volume] = append(f.of[volume], schedule.Snapshot{Name: name, Metadata: metadata})
	return nil
}

func (f *fakeSnapshots) deleteScheduled(_ context.Context, volume, name string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if err := f.fail["delete "+name]; err != nil {
		return err
	}
	f.of[volume] = slices.DeleteFunc(f.of[volume], func(s schedule.Snapshot) bool { return s.Name == name })
	return nil
}

func (f *fakeSnapshots) names(volume string) string {
	f.mu.Lock()
	defer f.mu.Unlock()
	var names []string
	for _, s := range f.of[volume] {
		names = append(names, strings.TrimPrefix(s.Name, "auto-20300501-"))
	}
	return strings.Join(names, " ")
}

// clock is the scheduler's, moved by hand.
type clock struct{ t time.Time }

func (b *bench) clock(hour, minute int) *clock {
	c := &clock{time.Date(2030, 5, 1, hour, minute, 0, 0, time.UTC)}
	b.api.schedules.now = func() time.Time { return c.t }
	return c
}

// lookAt moves the clock and lets the scheduler look.
func (b *bench) lookAt(t *testing.T, c *clock, hour, minute int) (next time.Time) {
	t.Helper()
	c.t = time.Date(2030, 5, 1, hour, minute, 0, 0, time.UTC)
	next, err := b.api.schedules.look(testContext(t))
	if err != nil {
		t.Fatal(err)
	}
	return next
}

func (b *bench) setSchedule(t *testing.T, target string, rules ...string) control.Schedule {
	t.Helper()
	s, err := b.api.SetSchedule(testContext(t), target, control.SetSchedule{Rules: rules, Zone: "UTC"})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func TestScheduleOfAPool(t *testing.T) {
	b := newBench(t)
	ctx := testContext(t)
	c := b.clock(10, 30)
	for _, name := range []string{"a", "own", "none"} {
		b.mustCreate(t, name)
	}
	if s := b.setSchedule(t, "default", "every 60m keep 2"); s.Target != "default" || s.Rules[0] != "every 1h keep 2" || len(s.Volumes) != 3 {
		t.Fatalf("%+v", s)
	}
	b.setSchedule(t, "default/own", "every 30m keep 9")
	b.setSchedule(t, "default/none")
	if next := b.lookAt(t, c, 10, 31); !next.Equal(time.Date(2030, 5, 1, 11, 0, 0, 0, time.UTC)) {
		t.Fatalf("next look at %s", next)
	}
	b.snaps.of["default/a"] = []schedule.Snapshot{{Name: "mine"}}
	for _, at := range [][2]int{{11, 0}, {11, 1}, {11, 30}, {12, 0}, {13, 0}, {13, 0}} {
		b.lookAt(t, c, at[0], at[1])
	}
	if a, own, none := b.snaps.names("default/a"), b.snaps.names("default/own"), b.snaps.names("default/none"); a != "mine 120000 130000" || own != "110000 113000 120000 130000" || none != "" {
		t.Fatalf("a %q, own %q, none %q", a, own, none)
	}
	list, err := b.api.Schedules(ctx)
	if err != nil || len(list) != 3 || list[0].Target != "default" || len(list[0].Volumes) != 1 || list[0].Volumes[0].Last != "auto-20300501-130000" ||
		!list[0].Volumes[0].Next.Equal(time.Date(2030, 5, 1, 14, 0, 0, 0, time.UTC)) || len(list[1].Volumes) != 0 || list[2].Volumes[0].Missed[0].Count != 1 {
		t.Fatalf("%+v, %v", list, err)
	}
	if err := b.api.DeleteSchedule(ctx, "default"); err != nil {
		t.Fatal(err)
	}
	b.lookAt(t, c, 14, 0)
	if a := b.snaps.names("default/a"); a != "mine 120000 130000" {
		t.Fatalf("without a schedule: %q", a)
	}
}

// TestP3MissedAreReportedOnce: a daemon that was down makes one snapshot for all
// that it missed, says so once, and the next daemon does not say it again.
func TestP3MissedAreReportedOnce(t *testing.T) {
	b := newBench(t)
	c := b.clock(9, 30)
	b.mustCreate(t, "v")
	b.setSchedule(t, "default/v", "every 1h keep 9")
	b.lookAt(t, c, 10, 0)

	restart := func(log *bytes.Buffer) *bench {
		next := attach(t, b.reg, b.engine, "node-1")
		next.snaps = b.snaps
		next.api.schedules = newScheduler(next.VolumeSet, b.snaps, zerolog.New(log))
		return next
	}
	var log bytes.Buffer
	next := restart(&log)
	next.lookAt(t, next.clock(14, 10), 14, 10)
	if got := next.snaps.names("default/v"); got != "100000 141000" {
		t.Fatalf("snapshots %q", got)
	}
	if n := strings.Count(log.String(), "missed"); n != 1 || !strings.Contains(log.String(), `"count":4`) {
		t.Fatalf("reported %d times: %s", n, &log)
	}
	s, err := next.api.Schedule(testContext(t), "default/v")
	if err != nil || len(s.Volumes[0].Missed) != 1 || s.Volumes[0].Missed[0].Count != 4 || s.Volumes[0].MissedAt.IsZero() {
		t.Fatalf("%+v, %v", s, err)
	}
	log.Reset()
	again := restart(&log)
	again.lookAt(t, again.clock(14, 20), 14, 20)
	if again.snaps.names("default/v") != "100000 141000" || strings.Contains(log.String(), "missed") {
		t.Fatalf("after another restart: %q, %s", again.snaps.names("default/v"), &log)
	}
}

// TestScheduleFailuresShow: what fails is a condition, is tried again, and in the
// end counts as missed if it was late.
func TestScheduleFailuresShow(t *testing.T) {
	b := newBench(t)
	ctx := testContext(t)
	c := b.clock(9, 30)
	b.mustCreate(t, "v")
	b.setSchedule(t, "default/v", "every 1h keep 1")
	b.snaps.fail["create"] = errors.New("injected: no room")
	b.lookAt(t, c, 9, 31)
	if next := b.lookAt(t, c, 10, 0); !next.Equal(c.t.Add(scheduleLook)) {
		t.Fatalf("tried again at %s", next)
	}
	v, err := b.api.Volume(ctx, "default/v")
	if err != nil || len(v.Conditions) != 1 || v.Conditions[0].Code != "schedule-failed" || !strings.Contains(v.Conditions[0].Message, "no room") {
		t.Fatalf("%+v, %v", v.Conditions, err)
	}
	delete(b.snaps.fail, "create")
	b.lookAt(t, c, 10, 20)
	if v, err = b.api.Volume(ctx, "default/v"); err != nil || len(v.Conditions) != 0 || b.snaps.names("default/v") != "102000" {
		t.Fatalf("%+v, %v, %q", v.Conditions, err, b.snaps.names("default/v"))
	}
	b.snaps.fail["delete auto-20300501-102000"] = control.Errorf(control.CodeInUse, "clones read it")
	b.lookAt(t, c, 11, 0)
	s, err := b.api.Schedule(ctx, "default/v")
	if err != nil || !slices.Equal(s.Volumes[0].Held, []string{"auto-20300501-102000"}) || s.Volumes[0].Error != "" || s.Volumes[0].Missed[0].Count != 1 {
		t.Fatalf("%+v, %v", s, err)
	}
	b.snaps.fail = map[string]error{"delete auto-20300501-102000": errors.New("injected: disk"), "delete auto-20300501-110000": errors.New("injected: disk")}
	b.lookAt(t, c, 12, 0)
	if s, err = b.api.Schedule(ctx, "default/v"); err != nil || !strings.Contains(s.Volumes[0].Error, "disk") {
		t.Fatalf("%+v, %v", s, err)
	}
	b.snaps.fail = map[string]error{}
	b.lookAt(t, c, 12, 1)
	if got := b.snaps.names("default/v"); got != "120000" {
		t.Fatalf("left %q", got)
	}
}

// TestScheduleLeavesNothing: with a volume or pool its schedule goes.
func TestScheduleLeavesNothing(t *testing.T) {
	b := newBench(t)
	ctx := testContext(t)
	c := b.clock(9, 30)
	if _, err := b.api.CreatePool(ctx, control.CreatePool{Name: "p", Store: control.StoreDirectory}); err != nil {
		t.Fatal(err)
	}
	b.mustCreate(t, "p/v")
	b.setSchedule(t, "p/v", "hourly keep 1")
	b.setSchedule(t, "p", "hourly keep 1")
	b.lookAt(t, c, 10, 0)
	if err := b.api.DeleteVolume(ctx, "p/v", false, nil); err != nil {
		t.Fatal(err)
	}
	b.lookAt(t, c, 11, 0)
	if err := b.api.DeletePool(ctx, "p"); err != nil {
		t.Fatal(err)
	}
	for _, prefix := range []string{registry.SchedulePrefix, registry.RunPrefix} {
		if kvs, err := b.reg.List(ctx, prefix); err != nil || len(kvs) != 0 {
			t.Errorf("left %v, %v", kvs, err)
		}
	}
	b.mustCreate(t, "v")
	for what, tt := range map[string]struct {
		err  error
		code control.Code
	}{
		"no schedule":     {second(b.api.Schedule(ctx, "default/v")), control.CodeNotFound},
		"no volume":       {second(b.api.Schedule(ctx, "default/w")), control.CodeNotFound},
		"no pool":         {second(b.api.SetSchedule(ctx, "w", control.SetSchedule{Rules: []string{"daily keep 1"}})), control.CodeNotFound},
		"no rule":         {second(b.api.SetSchedule(ctx, "default/v", control.SetSchedule{Rules: []string{"never keep 1"}})), control.CodeInvalid},
		"no zone":         {second(b.api.SetSchedule(ctx, "default/v", control.SetSchedule{Rules: []string{"daily keep 1"}, Zone: "Mars"})), control.CodeInvalid},
		"pool, no rules":  {second(b.api.SetSchedule(ctx, "default", control.SetSchedule{})), control.CodeInvalid},
		"delete of none":  {b.api.DeleteSchedule(ctx, "default/v"), control.CodeNotFound},
		"delete, no pool": {b.api.DeleteSchedule(ctx, "w"), control.CodeNotFound},
	} {
		if control.CodeOf(tt.err) != tt.code {
			t.Errorf("%s: %v; want %s", what, tt.err, tt.code)
		}
	}
}

// TestClockSetBack: the scheduler looks again although nothing was due for hours.
func TestClockSetBack(t *testing.T) {
	b := newBench(t)
	c := b.clock(20, 30)
	b.mustCreate(t, "v")
	b.setSchedule(t, "default/v", "every 1h keep 5")
	b.lookAt(t, c, 21, 0)
	b.lookAt(t, c, 10, 30)
	b.lookAt(t, c, 11, 0)
	b.lookAt(t, c, 12, 0)
	if got := b.snaps.names("default/v"); got != "210000 110000 120000" {
		t.Fatalf("snapshots %q", got)
	}
}

// TestSchedulerRuns: the goroutine looks when it is told of a change, and ends.
func TestSchedulerRuns(t *testing.T) {
	b := newBench(t)
	b.clock(9, 30)
	b.mustCreate(t, "v")
	ctx, cancel := context.WithCancel(testContext(t))
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		b.api.schedules.run(ctx)
	}()
	b.setSchedule(t, "default/v", "every 1h keep 5")
	await(t, "the look", func() bool {
		s, err := b.api.Schedule(ctx, "default/v")
		return err == nil && !s.Volumes[0].Next.IsZero()
	})
	cancel()
	<-ended
}

// TestScheduleOnARealVolume: what schedules make are snapshots like any other, of
// the state at that moment, and those that clones read stay.
func TestScheduleOnARealVolume(t *testing.T) {
	h, c := startHost(t, testConfig(t))
	defer stopHost(t, h)
	ctx := testContext(t)
	if _, err := c.CreateVolume(ctx, control.CreateVolume{Name: "default/v", Size: 64 << 20}); err != nil {
		t.Fatal(err)
	}
	if _, err := c.SetSchedule(ctx, "default/v", control.SetSchedule{Rules: []string{"every 366d keep 2"}, Zone: "UTC"}); err != nil {
		t.Fatal(err)
	}
	// The daemon's own scheduler, by the real clock, has nothing to do for long.
	s := newScheduler(h.volumes, h.volumes, zerolog.Nop())
	rule, err := schedule.ParseRule("every 366d keep 2")
	if err != nil {
		t.Fatal(err)
	}
	base := rule.Last(time.Now(), time.UTC)
	at := func(slot int) string {
		t.Helper()
		now := base.Add(time.Duration(slot) * 366 * 24 * time.Hour)
		s.now = func() time.Time { return now }
		if _, err := s.look(ctx); err != nil {
			t.Fatal(err)
		}
		return now.Format("auto-20060102-150405")
	}
	var names []string
	for i := range 4 {
		write(t, h, "default/v", byte(i+1))
		names = append(names, at(i+1))
		if i == 0 {
			if _, err := c.CloneVolume(ctx, control.CloneVolume{From: "default/v@" + names[0], Name: "default/clone"}); err != nil {
				t.Fatal(err)
			}
		}
	}
	list, err := c.Snapshots(ctx, "default/v")
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, snap := range list {
		got = append(got, snap.Name)
	}
	if want := []string{names[0], names[2], names[3]}; !slices.Equal(got, want) {
		t.Fatalf("snapshots %v; want %v: the first is cloned, the last two are kept", got, want)
	}
	dev, err := snapshotOpener{h.volumes}.Open(ctx, "default/v@"+names[2])
	if err != nil {
		t.Fatal(err)
	}
	if r, ok := dev.(interface{ Release() }); ok {
		defer r.Release()
	}
	p, ended := make([]byte, 4096), make(chan struct{})
	r := &block.Request{Op: block.OpRead, Length: 4096, Segments: [][]byte{p}, Complete: func(*block.Request) { close(ended) }}
	dev.Submit([]*block.Request{r})
	if !r.Ended {
		<-ended
	}
	if r.Err != nil || p[0] != 3 {
		t.Fatalf("the third snapshot reads %d, %v; want 3", p[0], r.Err)
	}
}
