package control

import (
	"context"
	"errors"

	"slices"
	"strconv"
	"sync"
	"time"
)

// Limits of the job table.
const (
	maxRunningJobs = 64
	maxEndedJobs   = 256 // the oldest are forgotten
	maxJobWait     = 60 * time.Second
)

// Progress tells how far a job is; total 0 means not known. It never blocks and
// may be called as often as one likes, from any goroutine.
type Progress func(done, total int64)

// jobTable runs jobs and remembers how they ended. One goroutine per running
// job, which ends when the job does; stop cancels and awaits them.
type jobTable struct {
	ctx    context.Context
	cancel context.CancelFunc
	wg     sync.WaitGroup

	mu      sync.Mutex
	nextID  int
	jobs    []*job // oldest first
	stopped bool
}

type job struct {
	cancel context.CancelFunc

	// Guarded by jobTable.mu.
	Job
	changed chan struct{} // closed and replaced at each change
}

func newJobTable() *jobTable {
	ctx, cancel := context.WithCancel(context.Background())
	return &jobTable{ctx: ctx, cancel: cancel}
}

// start runs fn as a job and returns its first state.
func (t *jobTable) start(kind, volume string, fn func(context.Context, Progress) (*CheckReport, error)) (Job, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.stopped {
		return Job{}, Errorf(CodeUnavailable, "the daemon is stopping")
	}
	running := 0
	for _, j := range t.jobs {
		if j.State == JobRunning {
			running++
		}
	}
	if running >= maxRunningJobs {
		return Job{}, Errorf(CodeUnavailable, "%d jobs are running, which is the limit: try again when one has ended", running)
	}
	t.forgetOldest()
	t.nextID++
	ctx, cancel := context.WithCancel(t.ctx)
	j := &job{cancel: cancel, changed: make(chan struct{})}
	j.Job = Job{ID: strconv.Itoa(t.nextID), Kind: kind, Volume: volume, State: JobRunning, Started: time.Now().UTC()}
	t.jobs = append(t.jobs, j)
	t.wg.Go(func() { t.run(ctx, j, fn) })
	return j.Job, nil
}

func (t *jobTable) run(ctx context.Context, j *job, fn func(context.Context, Progress) (*CheckReport, error)) {
	defer j.cancel()
	report, err := fn(ctx, func(done, total int64) {
		t.change(j, func(j *Job) {
			if j.State == JobRunning {
				j.Done, j.Total = done, total
			}
		})
	})
	t.change(j, func(job *Job) {
		job.Ended = time.Now().UTC()
		job.Report = report
		switch {
		case err == nil:
			job.State = JobDone
		case errors.Is(err, context.Canceled) && ctx.Err() != nil:
			job.State = JobCanceled
			job.Error = Errorf(CodeCanceled, "%s of %s was canceled", job.Kind, job.Volume)
		default:
			job.State = JobFailed
			job.Error = &Error{Code: CodeOf(err), Message: err.Error()}
		}
	})
}

func (t *jobTable) change(j *job, fn func(*Job)) {
	t.mu.Lock()
	defer t.mu.Unlock()
	fn(&j.Job)
	close(j.changed)
	j.changed = make(chan struct{})
}

// forgetOldest makes room for one more ended job. mu is held.
func (t *jobTable) forgetOldest() {
	if len(t.jobs) < maxEndedJobs {
		return
	}
	if i := slices.IndexFunc(t.jobs, func(j *job) bool { return j.State != JobRunning }); i >= 0 {
		t.jobs = slices.Delete(t.jobs, i, i+1)
	}
}

func (t *jobTable) find(id string) (*job, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, j := range t.jobs {
		if j.ID == id {
			return j, nil
		}
	}
	return nil, Errorf(CodeNotFound, "no job %q: it never was, or ended so long ago that it is forgotten", id)
}

func (t *jobTable) list() []Job {
	t.mu.Lock()
	defer t.mu.Unlock()
	jobs := make([]Job, len(t.jobs))
	for i, j := range t.jobs {
		jobs[i] = j.Job
	}
	return jobs
}

// wait returns a job's state, after its next change if it is running and wait is
// not zero.
func (t *jobTable) wait(ctx context.Context, id string, wait time.Duration) (Job, error) {
	j, err := t.find(id)
	if err != nil {
		return Job{}, err
	}
	t.mu.Lock()
	now, changed := j.Job, j.changed
	t.mu.Unlock()
	if now.State != JobRunning || wait <= 0 {
		return now, nil
	}
	deadline := time.NewTimer(min(wait, maxJobWait))
	defer deadline.Stop()
	select {
	case <-changed:
	case <-deadline.C:
	case <-ctx.Done():
		return Job{}, ctx.Err()
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	return j.Job, nil
}

func (t *jobTable) cancelJob(id string) (Job, error) {
	j, err := t.find(id)
	if err != nil {
		return Job{}, err
	}
	j.cancel()
	t.mu.Lock()
	defer t.mu.Unlock()
	return j.Job, nil
}

// stop cancels all jobs, refuses new ones and waits until they have ended.
func (t *jobTable) stop() {
	t.mu.Lock()
	t.stopped = true
	t.mu.Unlock()
	t.cancel()
	t.wg.Wait()
}
