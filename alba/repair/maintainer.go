package repair

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/rs/zerolog"

	"scoria/alba"
	"scoria/alba/place"
	"scoria/alba/proxy"
)

// Defaults of Options.
const (
	defaultInterval    = 5 * time.Second
	defaultDownAfter   = 10 * time.Minute
	defaultIntentAge   = 15 * time.Minute
	defaultOrphanEvery = time.Hour
	defaultTasks       = 10_000           // of one pass
	fullPass           = 10 * time.Minute // all objects are looked at that often, whatever happens
)

// Options of New.
type Options struct {
	Proxy  *proxy.Proxy
	Faults *Faults // what the proxy reports; may be nil
	// Interval between looks for something to do; 0 means 5 s.
	Interval time.Duration
	// DownAfter is when the shards of a device that is down are rebuilt elsewhere; 0
	// means 10 minutes: most devices come back, with all that they had.
	DownAfter time.Duration
	// IntentAge is when the intent of a daemon that is not this one is removed; 0
	// means 15 minutes. An upload that takes longer is begun anew.
	IntentAge time.Duration
	// OrphanEvery is how often all devices are searched for orphans; 0 means 1 hour.
	OrphanEvery time.Duration
	// BytesPerSecond bounds what maintenance moves; 0: no limit.
	BytesPerSecond int64
	// Busy says that guests wait for the disks: then maintenance slows down to a
	// floor, which is higher for objects that can lose fewer disks. Asked ten times a
	// second while maintenance is at work, from any goroutine. May be nil.
	Busy func() bool
	// Failed is told of each object that a pass could not repair, or of which there is too
	// little and no place for more, so that who has its content keeps it and can store it
	// anew. Called from the pass; it must not block. May be nil.
	Failed func(namespace, object string)
	Log    zerolog.Logger
}

// Maintainer does maintenance. Safe from any goroutine.
type Maintainer struct {
	o      Options
	p      *proxy.Proxy
	reg    alba.Registry
	node   string
	log    zerolog.Logger
	pace   pace
	wakeup map[string]chan struct{}
	tasks  int // of one pass
	look   int // shards of a device that a search for orphans compares at a time
}

// New returns a maintainer; Run sets it to work.
func New(o Options) *Maintainer {
	for _, d := range []struct {
		to    *time.Duration
		value time.Duration
	}{{&o.Interval, defaultInterval}, {&o.DownAfter, defaultDownAfter}, {&o.IntentAge, defaultIntentAge}, {&o.OrphanEvery, defaultOrphanEvery}} {
		if *d.to == 0 {
			*d.to = d.value
		}
	}
	if o.Faults == nil {
		o.Faults = NewFaults()
	}
	m := &Maintainer{o: o, p: o.Proxy, reg: o.Proxy.Registry(), node: o.Proxy.Node(), log: o.Log,
		pace: pace{rate: o.BytesPerSecond, busy: o.Busy, now: time.Now, sleep: sleep}, wakeup: map[string]chan struct{}{}, tasks: defaultTasks, look: lookShards}
	for _, name := range jobNames {
		m.wakeup[name] = make(chan struct{}, 1)
	}
	return m
}

// Run works until ctx ends.
func (m *Maintainer) Run(ctx context.Context) {
	var wg sync.WaitGroup
	wg.Go(func() { m.repairLoop(ctx) })
	wg.Go(func() { m.orphanLoop(ctx) })
	wg.Go(func() {
		m.loop(ctx, JobVerify, m.o.Interval, func() error { return m.job(ctx, JobVerify, false, m.verify) })
	})
	wg.Go(func() {
		m.loop(ctx, JobRebalance, m.o.Interval, func() error { return m.job(ctx, JobRebalance, false, m.rebalance) })
	})
	wg.Wait()
}

// loop calls fn now, every so often, and when it is woken.
func (m *Maintainer) loop(ctx context.Context, name string, every time.Duration, fn func() error) {
	said := false
	for {
		err := fn()
		older := errors.Is(err, proxy.ErrOlder) // which stays so: said once
		if err != nil && ctx.Err() == nil && !(older && said) {
			m.log.Error().Err(err).Str("job", name).Msg("maintenance failed; it will be tried again")
		}
		said = older
		t := time.NewTimer(every)
		select {
		case <-t.C:
		case <-m.wakeup[name]:
		case <-ctx.Done():
		}
		t.Stop()
		if ctx.Err() != nil {
			return
		}
	}
}

// Yielded is how long jobs have waited for guests since the start, together.
func (m *Maintainer) Yielded() time.Duration { return m.pace.waited() }

func (m *Maintainer) wake(name string) {
	select {
	case m.wakeup[name] <- struct{}{}:
	default:
	}
}

// job claims a job and works on it.
func (m *Maintainer) job(ctx context.Context, name string, always bool, fn func(ctx context.Context, r *run) error) error {
	r, err := m.claim(ctx, name, always)
	if err != nil || r == nil {
		return err
	}
	return r.end(ctx, fn(ctx, r))
}

// repairLoop makes a pass when it was started by the operator, when faults were
// reported, when a device's condition has changed, when the last pass left something,
// and once in a while.
func (m *Maintainer) repairLoop(ctx context.Context) {
	var seen string
	var last time.Time
	left := true
	m.loop(ctx, JobRepair, m.o.Interval, func() error {
		now := m.conditions(ctx)
		m.wake(JobOrphans) // which looks who has come back
		if err := m.p.Older(); err != nil {
			return err
		}
		asked := m.asked(ctx, JobRepair)
		if !asked && !left && now == seen && m.o.Faults.Empty() && time.Since(last) < fullPass {
			return nil
		}
		// With the same devices as at the last look at all objects, only those that
		// faults were reported of can need something.
		all := asked || left || now != seen || time.Since(last) >= fullPass
		var report Report
		err := m.job(ctx, JobRepair, true, func(ctx context.Context, r *run) error {
			var err error
			report, err = m.pass(ctx, r, all)
			return err
		})
		left = err != nil || report.Left > 0
		if all {
			seen, last = now, time.Now()
			err = errors.Join(err, m.forgetRemoved(ctx))
		}
		return err
	})
}

// asked says that a job was started and nobody has begun. If the registry can't tell,
// it is found out at the next look.
func (m *Maintainer) asked(ctx context.Context, name string) bool {
	j, _, err := loadJob(ctx, m.reg, name)
	return err == nil && j.State == JobRunning && j.By == ""
}

// conditions is a text that changes when what must be repaired may have changed.
func (m *Maintainer) conditions(ctx context.Context) string {
	text := ""
	for _, d := range m.p.Fleet().States(ctx) {
		text += fmt.Sprintln(d.ID, d.State, d.Usable, m.condition(d.ID))
	}
	return text
}

// condition of a device now.
func (m *Maintainer) condition(id string) Condition {
	d := m.p.Fleet().Member(id)
	if d == nil {
		return Gone
	}
	reason, since := d.Down()
	switch state := d.Record().State; {
	case state == alba.DeviceRemoved:
		return Gone
	case reason != "" && time.Since(since) > m.o.DownAfter:
		return Gone
	case reason != "":
		return Away
	case state == alba.DeviceDraining, d.Damaged() != "" && m.othersUsable(id):
		return Leaving
	}
	return Fine
}

// othersUsable says that there is another device that takes something new.
func (m *Maintainer) othersUsable(id string) bool {
	for _, d := range m.p.Fleet().Members() {
		if d.Record().ID != id && d.Damaged() == "" && d.State().Usable {
			return true
		}
	}
	return false
}

// Report is what a pass did.
type Report struct {
	Objects  int   // looked at
	Mended   int   // repaired or moved
	Upgraded int   // stored anew under a better policy
	Bytes    int64 // written
	Left     int   // that still need something, with those that could not be done
}

// Pass looks at all objects once and does what they need, riskiest first. Any number
// of daemons may do it at once.
func (m *Maintainer) Pass(ctx context.Context) (Report, error) {
	var report Report
	err := m.job(ctx, JobRepair, true, func(ctx context.Context, r *run) error {
		var err error
		report, err = m.pass(ctx, r, true)
		return err
	})
	return report, err
}

func (m *Maintainer) pass(ctx context.Context, r *run, all bool) (Report, error) {
	faults := m.o.Faults.take()
	report, tasks, err := m.survey(ctx, faults, all)
	if err != nil {
		m.o.Faults.putBack(faults)
		return report, err
	}
	r.job.Done, r.job.Total, r.job.Problems = 0, int64(len(tasks)+report.Left), 0
	if err := r.save(ctx, true); err != nil {
		m.o.Faults.putBack(faults)
		return report, err
	}
	for i := range tasks {
		left, err := m.do(ctx, r, &tasks[i], &report)
		if ctx.Err() != nil || errors.Is(err, errLost) {
			m.o.Faults.putBack(faults)
			return report, err
		}
		if err != nil {
			left = true
			r.job.Problems++
			r.job.Message = err.Error()
			m.log.Warn().Err(err).Str("namespace", tasks[i].namespace).Str("object", tasks[i].object).Msg("object is not repaired yet")
		}
		if m.o.Failed != nil && (err != nil || left && tasks[i].Spare < 0) {
			m.o.Failed(tasks[i].namespace, tasks[i].object)
		}
		if left {
			report.Left++
			for _, f := range faults {
				if f.Namespace == tasks[i].namespace && f.Object == tasks[i].object && err != nil {
					m.o.Faults.Add(f)
				}
			}
		}
		r.job.Done++
		if err := r.save(ctx, false); err != nil {
			return report, err
		}
	}
	return report, nil
}

// survey lists the objects that need something: the riskiest ones, up to a limit, and
// Report.Left counts the others. With all it looks at every object, else only at
// those that faults name.
func (m *Maintainer) survey(ctx context.Context, faults []proxy.Fault, all bool) (Report, []task, error) {
	var report Report
	bad := map[[2]string][]proxy.Fault{}
	for _, f := range faults {
		k := [2]string{f.Namespace, f.Object}
		bad[k] = append(bad[k], f)
	}
	presets := map[string]*alba.Preset{}
	devices := m.p.Fleet().States(ctx)
	var tasks []task
	each := m.eachObject
	if !all {
		each = func(ctx context.Context, fn func(*alba.Manifest) error) error { return m.eachFaulty(ctx, faults, fn) }
	}
	err := each(ctx, func(man *alba.Manifest) error {
		report.Objects++
		t := task{namespace: man.Namespace, object: man.Object, Assessment: Assess(man, m.condition)}
		for _, f := range bad[[2]string{man.Namespace, man.Object}] {
			// A shard that has moved since is another one, as is that of a later upload.
			if (f.Upload == alba.ID{} || f.Upload == man.Upload) && f.Shard != proxy.NoShard && f.Shard < len(man.Shards) && man.Shards[f.Shard] == f.Device && f.Device != "" {
				if t.bad == nil {
					t.bad = map[int]bool{}
				}
				t.bad[f.Shard] = true
			}
		}
		t.Spare -= len(t.bad)
		t.upgrade = m.upgradable(ctx, man, presets, devices)
		if t.Needs() || len(t.bad) > 0 || t.upgrade {
			tasks = append(tasks, t)
		}
		if len(tasks) >= 2*m.tasks {
			order(tasks)
			report.Left += len(tasks) - m.tasks
			clear(tasks[m.tasks:])
			tasks = tasks[:m.tasks]
		}
		return nil
	})
	order(tasks)
	if len(tasks) > m.tasks {
		report.Left += len(tasks) - m.tasks
		tasks = tasks[:m.tasks]
	}
	return report, tasks, err
}

// upgradable says that the devices can meet a better policy than the object's.
func (m *Maintainer) upgradable(ctx context.Context, man *alba.Manifest, presets map[string]*alba.Preset, devices []place.Device) bool {
	ps, ok := presets[man.Preset]
	if !ok {
		if p, err := proxy.LoadPreset(ctx, m.reg, man.Preset); err == nil {
			ps = &p
		}
		presets[man.Preset] = ps
	}
	if ps == nil || ps.Policies[0] == man.Policy {
		return false
	}
	c, err := place.Choose(ps, devices, man.Upload)
	return err == nil && Better(ps, man.Policy, c.Index)
}

// eachObject calls fn with every manifest of the registry.
func (m *Maintainer) eachObject(ctx context.Context, fn func(man *alba.Manifest) error) error {
	namespaces, err := m.reg.List(ctx, alba.NamespacePrefix)
	if err != nil {
		return err
	}
	for _, kv := range namespaces {
		n, err := alba.Decode[alba.Namespace](kv.Value)
		if err != nil {
			return fmt.Errorf("%s: %w", kv.Key, err)
		}
		err = alba.Each(ctx, m.reg, alba.ObjectKey(n.ID, ""), func(kv alba.KV) error {
			man, err := alba.DecodeManifest(kv.Value)
			if err != nil {
				return fmt.Errorf("%s: %w", kv.Key, err)
			}
			return fn(man)
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// eachFaulty calls fn with the manifests of the objects that faults name.
func (m *Maintainer) eachFaulty(ctx context.Context, faults []proxy.Fault, fn func(man *alba.Manifest) error) error {
	seen := map[[2]string]bool{}
	for _, f := range faults {
		key := [2]string{f.Namespace, f.Object}
		if seen[key] {
			continue
		}
		seen[key] = true
		kv, ok, err := m.reg.Get(ctx, alba.NamespaceKey(f.Namespace))
		if err != nil {
			return err
		}
		if !ok {
			continue // deleted meanwhile
		}
		n, err := alba.Decode[alba.Namespace](kv.Value)
		if err != nil {
			return fmt.Errorf("%s: %w", kv.Key, err)
		}
		kv, ok, err = m.reg.Get(ctx, alba.ObjectKey(n.ID, f.Object))
		if err != nil {
			return err
		}
		if !ok {
			continue
		}
		man, err := alba.DecodeManifest(kv.Value)
		if err != nil {
			return fmt.Errorf("%s: %w", kv.Key, err)
		}
		if err := fn(man); err != nil {
			return err
		}
	}
	return nil
}

// do does what one object needs; left says that it needs more than could be done now.
func (m *Maintainer) do(ctx context.Context, r *run, t *task, report *Report) (left bool, err error) {
	if t.Needs() || len(t.bad) > 0 {
		done, err := m.p.Mend(ctx, t.namespace, t.object, proxy.Mend{
			Gone:     func(id string) bool { return m.condition(id) == Gone },
			Leave:    func(id string) bool { return m.condition(id) == Leaving },
			Bad:      t.bad,
			Throttle: r.throttle(t.urgency()),
		})
		switch {
		case errors.Is(err, proxy.ErrNoObject), errors.Is(err, proxy.ErrNoNamespace):
			return false, nil // deleted meanwhile
		case errors.Is(err, proxy.ErrInProgress) && !t.upgrade:
			return true, nil
		case err != nil:
			return true, err
		}
		report.Bytes += done.Bytes
		if done.Shards > 0 {
			report.Mended++
			m.log.Info().Str("namespace", t.namespace).Str("object", t.object).Int("shards", done.Shards).Int("still_missing", done.Missing).Msg("object repaired")
		}
		left = done.Missing > 0
	}
	if !t.upgrade {
		return left, nil
	}
	switch err := m.p.Restore(ctx, t.namespace, t.object, r.throttle(t.Spare+1)); { // it is as safe as it was
	case err == nil:
		report.Upgraded++
		return false, nil
	case errors.Is(err, proxy.ErrNoObject), errors.Is(err, proxy.ErrNoNamespace):
		return false, nil
	default:
		return true, err
	}
}

// Faults collects what proxies report until a pass takes it. Bounded: a fault that
// does not fit is found again by the next read or verification.
type Faults struct {
	mu   sync.Mutex
	list map[proxy.Fault]struct{}
}

const maxFaults = 10_000

// NewFaults returns an empty collection; its Add is for proxy.Options.Report.
func NewFaults() *Faults { return &Faults{list: map[proxy.Fault]struct{}{}} }

// Add records a fault. It does not block.
func (f *Faults) Add(x proxy.Fault) {
	x.Reason = "" // one entry per shard
	f.mu.Lock()
	defer f.mu.Unlock()
	if len(f.list) < maxFaults {
		f.list[x] = struct{}{}
	}
}

// Empty says that nothing was reported.
func (f *Faults) Empty() bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return len(f.list) == 0
}

func (f *Faults) take() []proxy.Fault {
	f.mu.Lock()
	defer f.mu.Unlock()
	var all []proxy.Fault
	for x := range f.list {
		all = append(all, x)
	}
	clear(f.list)
	return all
}

func (f *Faults) putBack(list []proxy.Fault) {
	for _, x := range list {
		f.Add(x)
	}
}
