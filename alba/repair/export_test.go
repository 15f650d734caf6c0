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
