package repair_test

import (
	"encoding/json"
	"fmt"
	"slices"
	"sync"
	"testing"
	"time"

	"scoria/alba"
	"scoria/alba/albatest"
	"scoria/alba/asd/asdtest"
	"scoria/alba/repair"
)

// verified collects which devices are asked to verify.
type verified struct {
	mu  sync.Mutex
	ids []string
}

func (v *verified) watch(r *rig) {
	for _, d := range r.Disks {
		d.Faulty.Set(asdtest.Fault{Hook: func(op, _ string) error {
			if op == "Verify" {
				v.mu.Lock()
				defer v.mu.Unlock()
				v.ids = append(v.ids, d.ID)
			}
			return nil
		}})
	}
}

func (v *verified) take() []string {
	v.mu.Lock()
	defer v.mu.Unlock()
	list := slices.Compact(v.ids)
	v.ids = nil
	return list
}

func (r *rig) jobRecord(j repair.Job) {
	r.t.Helper()
	j.Version = repair.JobVersion
	b, err := json.Marshal(j)
	must(r.t, err)
	_, err = r.Reg.Commit(r.t.Context(), nil, []alba.Write{{Key: alba.JobPrefix + j.Name, Value: b}})
	must(r.t, err)
}

func (r *rig) job(name string) repair.Job {
	r.t.Helper()
	jobs, err := r.m.Jobs(r.t.Context())
	must(r.t, err)
	for _, j := range jobs {
		if j.Name == name {
			return j
		}
	}
	r.t.Fatalf("no job %s", name)
	return repair.Job{}
}

// TestJobGoesOnAfterItsDaemonDied: a job is left to the daemon that was at it a moment
// ago; when that has not been heard of for long, another goes on where it was.
func TestJobGoesOnAfterItsDaemonDied(t *testing.T) {
	r := newRig(t, 4, albatest.Preset(alba.Policy{K: 2, M: 1, C: 3, X: 1}), nil)
	r.put("o", 50_000)
	var seen verified
	seen.watch(r)
	now := time.Now().UTC()
	// Its clock is a little ahead; the test may take so much longer.
	ahead := now.Add(25 * time.Second)
	job := repair.Job{Name: repair.JobVerify, State: repair.JobRunning, By: "another", Started: now.Add(-time.Hour), Updated: ahead,
		Done: 1000, Problems: 2, Cursor: r.Disks[2].ID + "\n"}
	r.jobRecord(job)
	must(t, r.m.RunJob(t.Context(), repair.JobVerify))
	if list := seen.take(); len(list) > 0 || r.job(repair.JobVerify).By != "another" {
		t.Fatalf("took the job of a daemon that is at work: %q, %+v", list, r.job(repair.JobVerify))
	}
	job.Updated = now.Add(-time.Hour)
	r.jobRecord(job)
	must(t, r.m.RunJob(t.Context(), repair.JobVerify))
	if list := seen.take(); fmt.Sprint(list) != fmt.Sprint([]string{r.Disks[2].ID, r.Disks[3].ID}) {
		t.Fatalf("went on with devices %q", list)
	}
	if got := r.job(repair.JobVerify); got.State != repair.JobDone || got.Problems != 2 || got.Done <= 1000 || !got.Started.Equal(job.Started) || got.Cursor != "" {
		t.Fatalf("job %+v", got)
	}
}

// TestStoppedJob: a job that was stopped does nothing until it is started, and then goes
// on where it was.
func TestStoppedJob(t *testing.T) {
	r := newRig(t, 3, albatest.Preset(alba.Policy{K: 2, M: 1, C: 3, X: 1}), nil)
	r.put("o", 50_000)
	var seen verified
	seen.watch(r)
	r.jobRecord(repair.Job{Name: repair.JobVerify, State: repair.JobRunning, By: "another", Updated: time.Now().UTC(), Cursor: r.Disks[1].ID + "\n"})
	must(t, r.m.Stop(t.Context(), repair.JobVerify))
	must(t, r.m.RunJob(t.Context(), repair.JobVerify))
	if list := seen.take(); len(list) > 0 {
		t.Fatalf("a stopped job read %q", list)
	}
	must(t, r.m.Start(t.Context(), repair.JobVerify))
	must(t, r.m.RunJob(t.Context(), repair.JobVerify))
	if list := seen.take(); fmt.Sprint(list) != fmt.Sprint([]string{r.Disks[1].ID, r.Disks[2].ID}) {
		t.Fatalf("went on with devices %q", list)
	}
}

func TestETA(t *testing.T) {
	start := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	j := repair.Job{State: repair.JobRunning, Started: start, Updated: start.Add(time.Minute), Done: 25, Total: 100}
	if left, ok := j.ETA(); !ok || left != 3*time.Minute {
		t.Errorf("%v, %v; want 3m", left, ok)
	}
	for _, change := range []func(*repair.Job){
		func(j *repair.Job) { j.Done = 0 }, func(j *repair.Job) { j.Total = 0 }, func(j *repair.Job) { j.State = repair.JobDone },
	} {
		k := j
		if change(&k); func() bool { _, ok := k.ETA(); return ok }() {
			t.Errorf("%+v has an ETA", k)
		}
	}
	j.Done = 150 // more than was expected
	if left, ok := j.ETA(); !ok || left != 0 {
		t.Errorf("%v, %v; want 0", left, ok)
	}
}
