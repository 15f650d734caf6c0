package repair

import (
	"cmp"
	"context"
	"errors"
	"slices"

	"scoria/alba"
	"scoria/alba/place"
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

// move is a shard's way from one device to another.
type move struct{ from, to *fill }

// apart says that from is so much fuller than to that it shall give shards to it.
func apart(from, to *fill) bool { return from.ratio()-to.ratio() >= balanced }

// chooseMove returns the move of one of the object's shards that helps most: from the
// fullest of its devices to the emptiest that its policy allows; false if none helps.
// A move that would only swap the two devices' parts does not: so the sum of the
// squares of the ratios, weighted with the capacities, falls with every move.
func chooseMove(man *alba.Manifest, list []fill, devices []place.Device) (move, bool) {
	size := shardBytes(man.Layout())
	byRatio := make([]*fill, len(list))
	for i := range list {
		byRatio[i] = &list[i]
	}
	slices.SortFunc(byRatio, func(a, b *fill) int {
		return cmp.Or(cmp.Compare(a.ratio(), b.ratio()), cmp.Compare(a.id, b.id))
	})
	for _, from := range slices.Backward(byRatio) {
		shard := slices.Index(man.Shards, from.id)
		if shard < 0 {
			continue
		}
		for _, to := range byRatio {
			if !apart(from, to) {
				break
			}
			after, then := *from, *to
			after.used -= size
			then.used += size
			if after.ratio() < then.ratio() || slices.Contains(man.Shards, to.id) {
				continue
			}
			shards := slices.Clone(man.Shards)
			shards[shard] = to.id
			if place.Valid(man.Policy, man.Domain, shards, devices) {
				return move{from, to}, true
			}
		}
	}
	return move{}, false
}

// shardBytes is what one shard takes.
func shardBytes(l alba.Layout) int64 {
	n := l.Chunks()
	if n == 0 {
		return 0
	}
	return int64(n-1)*int64(l.FragmentBytes) + int64(l.FragmentLen(n-1))
}

// maxRebalancePasses bounds the passes of one job. An object moves one shard in each, so
// about as many as an object has shards are needed at most.
const maxRebalancePasses = 32

// rebalance moves shards from full devices to empty ones, as far as the policies
// allow, until all are about equally full: passes over all objects, until one finds
// nothing to move.
func (m *Maintainer) rebalance(ctx context.Context, r *run) error {
	m.p.Fleet().Poll(ctx)
	b := &balance{m: m, r: r, devices: m.p.Fleet().States(ctx)}
	for _, d := range b.devices {
		if d.Usable {
			b.list = append(b.list, fill{d.ID, d.Capacity - d.Free, d.Capacity})
		}
	}
	if len(b.list) < 2 {
		return nil
	}
	r.job.Done, r.job.Total = 0, 0
	var objects int64
	if err := m.eachObject(ctx, func(*alba.Manifest) error { objects++; return nil }); err != nil {
		return err
	}
	var err error
	for range maxRebalancePasses {
		if low, high := spread(b.list); !apart(high, low) {
			break
		}
		r.job.Total += objects
		b.moved = 0
		if err = m.eachObject(ctx, func(man *alba.Manifest) error { return b.object(ctx, man) }); err != nil || b.moved == 0 {
			break
		}
	}
	return errors.Join(append(b.errs, err)...)
}

// balance is a rebalancing under way.
type balance struct {
	m       *Maintainer
	r       *run
	devices []place.Device // as they were at the begin
	list    []fill         // the usable ones, with what was moved since
	moved   int            // shards, in this pass
	errs    []error
}

// object moves a shard of one object, if that helps.
func (b *balance) object(ctx context.Context, man *alba.Manifest) error {
	b.r.job.Done++
	mv, ok := chooseMove(man, b.list, b.devices)
	if !ok {
		return b.r.save(ctx, false)
	}
	done, err := b.m.p.Mend(ctx, man.Namespace, man.Object, proxy.Mend{
		Leave: func(id string) bool { return id == mv.from.id }, To: mv.to.id, Throttle: b.r.throttle(unhurried),
	})
	if ctx.Err() != nil || errors.Is(err, errLost) {
		return err
	}
	if err != nil && !errors.Is(err, proxy.ErrInProgress) && !errors.Is(err, proxy.ErrNoObject) && !errors.Is(err, proxy.ErrNoNamespace) {
		b.r.job.Problems++
		b.errs = append(b.errs, err)
		if len(b.errs) > 100 {
			return errors.New("too many objects can't be moved")
		}
		return nil
	}
	if done.Shards > 0 {
		mv.from.used -= done.Bytes
		mv.to.used += done.Bytes
		b.moved++
	}
	return nil
}
