package repair

import (
	"context"

	"scoria/alba/proxy"
)

// RunJob works on a job that was started, once.
func (m *Maintainer) RunJob(ctx context.Context, name string) error {
	fn := map[string]func(context.Context, *run) error{JobVerify: m.verify, JobRebalance: m.rebalance}[name]
	return m.job(ctx, name, false, fn)
}

// MendForTest does for one object what a pass does, without the job's lease.
func (m *Maintainer) MendForTest(ctx context.Context, ns, object string) error {
	_, err := m.p.Mend(ctx, ns, object, proxy.Mend{
		Gone:  func(id string) bool { return m.condition(id) == Gone },
		Leave: func(id string) bool { return m.condition(id) == Leaving },
	})
	return err
}

// SetTasks limits what a pass does.
func (m *Maintainer) SetTasks(n int) { m.tasks = n }

// SetLook limits how many shards a search for orphans compares at a time.
func (m *Maintainer) SetLook(n int) { m.look = n }

// PassFaults is a pass over what faults name.
func (m *Maintainer) PassFaults(ctx context.Context) (Report, error) {
	var report Report
	err := m.job(ctx, JobRepair, true, func(ctx context.Context, r *run) error {
		var err error
		report, err = m.pass(ctx, r, false)
		return err
	})
	return report, err
}

// ForgetRemoved is forgetRemoved.
func (m *Maintainer) ForgetRemoved(ctx context.Context) error { return m.forgetRemoved(ctx) }
