package repair_test

import (
	"context"
	"testing"
	"time"

	"scoria/alba"
	"scoria/alba/albatest"
	"scoria/alba/asd/asdtest"
	"scoria/alba/repair"
)

// running runs the rig's maintainer until the end of the test, and waits until it has
// looked at everything once.
func (r *rig) running(t *testing.T) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { defer close(done); r.m.Run(ctx) }()
	t.Cleanup(func() { cancel(); albatest.Await(t, done, "the maintainer ends") })
	albatest.Eventually(t, "the first pass is over", func() bool { return r.jobState(repair.JobRepair) == repair.JobDone })
}

func (r *rig) jobState(name string) repair.JobState {
	r.t.Helper()
	jobs, err := r.m.Jobs(r.t.Context())
	must(r.t, err)
	for _, j := range jobs {
		if j.Name == name {
			return j.State
		}
	}
	return ""
}

// TestRepairWhenAsked: a repair that the operator starts is made, also where nothing has
// happened since the last look.
func TestRepairWhenAsked(t *testing.T) {
	r := newRig(t, 4, albatest.Preset(alba.Policy{K: 2, M: 1, C: 3, X: 1}), func(o *repair.Options) { o.Interval = time.Millisecond })
	r.put("a", 50_000)
	r.running(t)
	must(t, r.m.Start(t.Context(), repair.JobRepair))
	albatest.Eventually(t, "the repair is done", func() bool { return r.jobState(repair.JobRepair) == repair.JobDone })
	must(t, r.m.Stop(t.Context(), repair.JobRepair))
	must(t, r.p.SetDeviceState(t.Context(), r.Disks[0].ID, alba.DeviceRemoved))
	must(t, r.m.Start(t.Context(), repair.JobRepair))
	r.expectSafe(1)
	r.expectAll(r.p)
}

// TestLesserPolicyIsNotForgotten: an object that was stored under a lesser policy while
// a device was full for a moment, in which nobody looked, is stored anew at the next look.
func TestLesserPolicyIsNotForgotten(t *testing.T) {
	r := newRig(t, 3, albatest.Preset(alba.Policy{K: 2, M: 1, C: 3, X: 1}, alba.Policy{K: 1, M: 1, C: 2, X: 1}), nil)
	r.put("a", 50_000)
	r.Disks[0].Faulty.Set(asdtest.Fault{Full: true})
	r.p.Fleet().Poll(t.Context())
	r.put("b", 50_000)
	r.Disks[0].Faulty.Set(asdtest.Fault{})
	r.p.Fleet().Poll(t.Context())
	report, err := r.m.PassFaults(t.Context())
	must(t, err)
	if report.Objects != 1 || report.Upgraded != 1 {
		t.Fatalf("%+v, want one object upgraded", report)
	}
	r.expectAll(r.p)
	r.settle()
	r.expectSafe(1)
	r.expectClean()
}
