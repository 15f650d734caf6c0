package repair

import (
	"context"
	"errors"
	"slices"

	"scoria/alba"
	"scoria/alba/proxy"
)

// balanced is how far apart the fullest and the emptiest device may be, as parts of
// their capacity, before shards are moved.
const balanced = 0.05

// fill is how full a device is, with what was moved since its statistics.
type fill struct {
	id             string
	used, capacity int64
}

func (f *fill) ratio() float64 { return float64(f.used) / float64(max(1, f.capacity)) }

// spread returns the emptiest and the fullest of the devices.
func spread(list []fill) (low, high *fill) {
	for i := range list {
		if low == nil || list[i].ratio() < low.ratio() {
			low = &list[i]
		}
		if high == nil || list[i].ratio() > high.ratio() {
			high = &list[i]
		}
	}
	return low, high
}

// rebalance moves shards from the fullest device to the emptiest, as far as the
// policies allow, until all are about equally full.
func (m *Maintainer) rebalance(ctx context.Context, r *run) error {
	m.p.Fleet().Poll(ctx)
	var list []fill
	for _, d := range m.p.Fleet().States(ctx) {
		if d.Usable {
			list = append(list, fill{d.ID, d.Capacity - d.Free, d.Capacity})
		}
	}
	if len(list) < 2 {
		return nil
	}
	r.job.Done, r.job.Total = 0, 0
	var errs []error
	err := m.eachObject(ctx, func(*alba.Manifest) error { r.job.Total++; return nil })
	if err != nil {
		return err
	}
	err = m.eachObject(ctx, func(man *alba.Manifest) error {
		r.job.Done++
		low, high := spread(list)
		if high.ratio()-low.ratio() < balanced {
			return r.save(ctx, false)
		}
		if !slices.Contains(man.Shards, high.id) || slices.Contains(man.Shards, low.id) {
			return r.save(ctx, false)
		}
		done, err := m.p.Mend(ctx, man.Namespace, man.Object, proxy.Mend{
			Leave: func(id string) bool { return id == high.id }, To: low.id, Throttle: r.throttle(unhurried),
		})
		if ctx.Err() != nil || errors.Is(err, errLost) {
			return err
		}
		if err != nil && !errors.Is(err, proxy.ErrInProgress) && !errors.Is(err, proxy.ErrNoObject) && !errors.Is(err, proxy.ErrNoNamespace) {
			r.job.Problems++
			errs = append(errs, err)
			if len(errs) > 100 {
				return errors.New("too many objects can't be moved")
			}
			return nil
		}
		high.used -= done.Bytes
		low.used += done.Bytes
		return nil
	})
	return errors.Join(append(errs, err)...)
}
