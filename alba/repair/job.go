package repair

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"time"

	"scoria/alba"
)

// JobVersion is the version of the jobs' records.
const JobVersion = 1

const (
	heartbeat    = time.Second
	leaseTimeout = 30 * time.Second
)

// Names of jobs.
const (
	JobRepair    = "repair"    // always on
	JobOrphans   = "orphans"   // always on
	JobVerify    = "verify"    // when started
	JobRebalance = "rebalance" // when started
)

var jobNames = []string{JobRepair, JobOrphans, JobVerify, JobRebalance}

// JobState is how a job is.
type JobState string

// States of a job.
const (
	JobRunning JobState = "running"
	JobDone    JobState = "done"
	JobStopped JobState = "stopped" // by the operator
	JobFailed  JobState = "failed"
)

// Errors of jobs.
var (
	ErrNoJob = errors.New("no such job")
	// errLost: the job is another daemon's now, or was stopped.
	errLost = errors.New("job was taken over or stopped")
)

// Job is the record of a job in the registry.
type Job struct {
	Version  int       `json:"version"`
	Name     string    `json:"name"`
	State    JobState  `json:"state"`
	By       string    `json:"by"` // the daemon that works on it; "" if none has begun
	Started  time.Time `json:"started"`
	Updated  time.Time `json:"updated"`
	Done     int64     `json:"done"`  // objects; bytes for verify
	Total    int64     `json:"total"` // 0: not known yet
	Bytes    int64     `json:"bytes"` // read or written
	Problems int64     `json:"problems"`
	Cursor   string    `json:"cursor,omitempty"` // where to go on after a crash
	Message  string    `json:"message,omitempty"`
}

// ETA is how long the rest takes at the rate so far; false if that can't be told.
func (j *Job) ETA() (time.Duration, bool) {
	if j.State != JobRunning || j.Done <= 0 || j.Total <= 0 {
		return 0, false
	}
	rest := float64(max(0, j.Total-j.Done)) / float64(j.Done)
	return time.Duration(rest * float64(j.Updated.Sub(j.Started))), true
}

func decodeJob(b []byte) (Job, error) {
	var j Job
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	if err := d.Decode(&j); err != nil {
		return j, fmt.Errorf("job: %w: %v", alba.ErrRecord, err)
	}
	if j.Version < 1 || j.Version > JobVersion {
		return j, fmt.Errorf("job of version %d, this program knows %d: %w", j.Version, JobVersion, alba.ErrVersion)
	}
	return j, nil
}

func (j *Job) encode() []byte {
	j.Version = JobVersion
	b, err := json.Marshal(j)
	if err != nil {
		panic(fmt.Sprintf("repair: job can't be encoded: %v", err)) // strings, numbers and times can
	}
	return b
}

func loadJob(ctx context.Context, reg alba.Registry, name string) (Job, int64, error) {
	kv, ok, err := reg.Get(ctx, alba.JobPrefix+name)
	if err != nil || !ok {
		return Job{Name: name}, 0, err
	}
	j, err := decodeJob(kv.Value)
	return j, kv.Revision, err
}

// Jobs returns the records of all jobs that were ever begun.
func (m *Maintainer) Jobs(ctx context.Context) ([]Job, error) {
	kvs, err := m.reg.List(ctx, alba.JobPrefix)
	if err != nil {
		return nil, err
	}
	list := make([]Job, len(kvs))
	for i, kv := range kvs {
		if list[i], err = decodeJob(kv.Value); err != nil {
			return nil, fmt.Errorf("%s: %w", kv.Key, err)
		}
	}
	return list, nil
}

// Start begins a job anew, or goes on with one that was stopped; some daemon takes it
// up. No error if it is running.
func (m *Maintainer) Start(ctx context.Context, name string) error {
	return m.change(ctx, name, func(j *Job) bool {
		switch j.State {
		case JobRunning:
			return false
		case JobStopped:
			j.State, j.By = JobRunning, ""
		default:
			*j = Job{Name: name, State: JobRunning, Started: time.Now().UTC()}
		}
		return true
	})
}

// Stop ends a job at its next step; repair and collection of orphans pause until they
// are started. No error if it is not running.
func (m *Maintainer) Stop(ctx context.Context, name string) error {
	return m.change(ctx, name, func(j *Job) bool {
		if j.State == JobStopped || j.State == JobDone && name != JobRepair && name != JobOrphans {
			return false
		}
		j.State, j.By = JobStopped, ""
		return true
	})
}

func (m *Maintainer) change(ctx context.Context, name string, fn func(j *Job) bool) error {
	if !slices.Contains(jobNames, name) {
		return fmt.Errorf("job %q: must be one of %q: %w", name, jobNames, ErrNoJob)
	}
	const tries = 16
	for range tries {
		j, rev, err := loadJob(ctx, m.reg, name)
		if err != nil || !fn(&j) {
			return err
		}
		j.Updated = time.Now().UTC()
		_, err = m.reg.Commit(ctx, []alba.Compare{{Key: alba.JobPrefix + name, Revision: rev}},
			[]alba.Write{{Key: alba.JobPrefix + name, Value: j.encode()}})
		if !errors.Is(err, alba.ErrConflict) {
			m.wake(name)
			return err
		}
	}
	return fmt.Errorf("job %s: %w", name, alba.ErrConflict)
}

// run is a job that this daemon works on.
type run struct {
	m    *Maintainer
	job  Job
	rev  int64
	sent time.Time
}

// claim takes a job if it is to be done (always, or only once it was started) and
// no other daemon is at it: nil if not. A job whose daemon died goes on. With a registry
// that went back nothing is done that deletes anything.
func (m *Maintainer) claim(ctx context.Context, name string, always bool) (*run, error) {
	if err := m.p.Older(); err != nil && name != JobVerify {
		return nil, err
	}
	j, rev, err := loadJob(ctx, m.reg, name)
	if err != nil {
		return nil, err
	}
	now := time.Now().UTC()
	switch {
	case j.State == JobRunning && j.By != "" && j.By != m.node && now.Sub(j.Updated) < leaseTimeout && j.Updated.Before(now.Add(leaseTimeout)):
		return nil, nil
	case j.State == JobStopped, j.State != JobRunning && !always:
		return nil, nil
	case j.State != JobRunning:
		j = Job{Name: name, Started: now}
	}
	j.State, j.By, j.Updated = JobRunning, m.node, now
	r := &run{m: m, job: j}
	r.rev, err = m.reg.Commit(ctx, []alba.Compare{{Key: alba.JobPrefix + name, Revision: rev}},
		[]alba.Write{{Key: alba.JobPrefix + name, Value: j.encode()}})
	if errors.Is(err, alba.ErrConflict) {
		return nil, nil
	}
	return r, err
}

// save writes the job's record, at most once per heartbeat unless it must: errLost if
// the job is not ours any more.
func (r *run) save(ctx context.Context, must bool) error {
	now := time.Now().UTC()
	if !must && now.Sub(r.sent) < heartbeat {
		return nil
	}
	r.sent, r.job.Updated = now, now
	rev, err := r.m.reg.Commit(ctx, []alba.Compare{{Key: alba.JobPrefix + r.job.Name, Revision: r.rev}},
		[]alba.Write{{Key: alba.JobPrefix + r.job.Name, Value: r.job.encode()}})
	if errors.Is(err, alba.ErrConflict) {
		return errLost
	}
	if err == nil {
		r.rev = rev
	}
	return err
}

// end records the outcome. A job that ends because the daemon stops stays running:
// it goes on at the next start, or elsewhere.
func (r *run) end(ctx context.Context, err error) error {
	switch {
	case errors.Is(err, errLost):
		return nil
	case ctx.Err() != nil:
		return ctx.Err()
	case err != nil:
		r.job.State, r.job.Message = JobFailed, err.Error()
	default:
		r.job.State, r.job.Cursor = JobDone, ""
	}
	if serr := r.save(ctx, true); !errors.Is(serr, errLost) {
		return errors.Join(err, serr)
	}
	return err
}

// wait returns when so many more bytes may be moved of what can lose that many more
// devices, and keeps the lease.
func (r *run) wait(ctx context.Context, n int64, spare int) error {
	r.job.Bytes += n
	if err := r.save(ctx, false); err != nil {
		return err
	}
	return r.m.pace.wait(ctx, n, spare)
}

// throttle is wait for the chunks of one object.
func (r *run) throttle(spare int) func(ctx context.Context, n int64) error {
	return func(ctx context.Context, n int64) error { return r.wait(ctx, n, spare) }
}
