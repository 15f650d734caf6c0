package host

import (
	"context"
	"fmt"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"scoria/driver"
	"scoria/driver/block"
	"scoria/driver/control"
	"scoria/driver/limit"
	"scoria/driver/registry"
)

// limited is an open volume with its limits in front: what front ends get.
type limited struct {
	Volume
	limits *limit.Device
}

var _ block.Delayer = (*limited)(nil)

// Submit implements block.Device.
func (v *limited) Submit(batch []*block.Request) { v.limits.Submit(batch) }

// Cancel implements block.Device.
func (v *limited) Cancel(owner any) { v.limits.Cancel(owner) }

// Hasten implements block.Delayer.
func (v *limited) Hasten(owner any) { v.limits.Hasten(owner) }

// Stats adds to the engine's conditions that the limits hold requests up.
func (v *limited) Stats() driver.Stats {
	st := v.Volume.Stats()
	if l := v.limits.Stats(); l.Limited {
		st.Conditions = append(st.Conditions, limitedCondition(v.Info().Name, l, v.limits.Settings()))
	}
	return st
}

func limitedCondition(name string, st limit.Stats, s limit.Settings) driver.Condition {
	value, _ := s.Value(st.By)
	return driver.Condition{Code: "limited", Message: fmt.Sprintf(
		"requests wait for the volume's limit %s of %s (%d now, the longest for %s): `scoria volume limit %s` shows and changes its limits",
		st.By, value, st.Waiting, st.Oldest.Round(time.Millisecond), name)}
}

// limit puts the limits of a volume's record in front of it.
func (h *VolumeSet) limit(ctx context.Context, dev Volume, r *registry.Volume) Volume {
	v := &limited{Volume: dev, limits: limit.New(dev)}
	s, err := h.settings(ctx, r)
	if err != nil && ctx.Err() == nil && h.ctx.Err() == nil { // the daemon does not just stop
		h.log.Error().Err(err).Str("volume", r.FullName()).Msg("the limits of the volume's pool can't be read; only its own hold")
	}
	v.limits.Set(s)
	return v
}

// settings are the limits that hold for a volume. With an error, its own alone.
func (h *VolumeSet) settings(ctx context.Context, r *registry.Volume) (limit.Settings, error) {
	own := valueOf(r.Limits)
	p, err := registry.Load[registry.Pool](ctx, h.reg, registry.PoolKey(r.Pool))
	if err != nil {
		return own, err
	}
	return own.Over(valueOf(p.Record.Limits)), nil
}

func valueOf(s *limit.Settings) limit.Settings {
	if s == nil {
		return limit.Settings{}
	}
	return *s
}

// recordOf is what a record holds: nothing, if nothing is set.
func recordOf(s limit.Settings) *limit.Settings {
	if s.IsZero() {
		return nil
	}
	return &s
}

// limits returns the limits in front of an open volume, nil if it is not open.
func (h *VolumeSet) limits(name string) *limit.Device {
	if v, ok := h.device(name).(*limited); ok {
		return v.limits
	}
	return nil
}

// applyLimits makes what the registry says hold, if the volume is open. Whoever
// changes a record calls it afterwards, and whoever opens a volume once others
// can find it: so the later one sees what the other did.
func (h *VolumeSet) applyLimits(ctx context.Context, name string) {
	h.limitMu.Lock()
	defer h.limitMu.Unlock()
	l := h.limits(name)
	if l == nil {
		return
	}
	e, err := h.load(ctx, name)
	if err == nil {
		var s limit.Settings
		if s, err = h.settings(ctx, &e.Record); err == nil {
			l.Set(s)
			return
		}
	}
	if ctx.Err() == nil {
		h.log.Error().Err(err).Str("volume", name).Msg("the volume's limits can't be read; the former ones hold")
	}
}

// Limits implements control.SettingsBackend.
func (b *backend) Limits(ctx context.Context, name string) (control.Limits, error) {
	e, err := b.load(ctx, name)
	if err != nil {
		return control.Limits{}, err
	}
	return b.limitsAnswer(ctx, &e.Record)
}

func (b *backend) limitsAnswer(ctx context.Context, r *registry.Volume) (control.Limits, error) {
	p, err := registry.Load[registry.Pool](ctx, b.reg, registry.PoolKey(r.Pool))
	if err != nil {
		return control.Limits{}, err
	}
	own, pool := valueOf(r.Limits), valueOf(p.Record.Limits)
	answer := control.Limits{Name: r.FullName(), Own: own, Pool: pool, InForce: own.Over(pool)}
	if l := b.limits(r.FullName()); l != nil {
		st := l.Stats()
		answer.Stats = &control.LimitStats{
			Limited: st.Limited, By: st.By, Waiting: st.Waiting, OldestSeconds: st.Oldest.Seconds(),
			ReadsDelayed: st.ReadsDelayed, WritesDelayed: st.WritesDelayed,
			ReadWait: st.ReadWait.Seconds(), WriteWait: st.WriteWait.Seconds(),
		}
	}
	return answer, nil
}

// ChangeLimits implements control.SettingsBackend.
func (b *backend) ChangeLimits(ctx context.Context, name string, req control.ChangeLimits) (control.Limits, error) {
	e, err := b.load(ctx, name)
	if err != nil {
		return control.Limits{}, err
	}
	name = e.Record.FullName()
	e, err = registry.Update(ctx, b.reg, registry.VolumeKey(e.Record.Pool, e.Record.Name), func(r *registry.Volume) error {
		s, err := req.Apply(valueOf(r.Limits))
		r.Limits = recordOf(s)
		return err
	})
	if err != nil {
		return control.Limits{}, fmt.Errorf("limits of volume %s: %w", name, err)
	}
	b.applyLimits(context.WithoutCancel(ctx), name)
	b.log.Info().Str("volume", name).Interface("limits", e.Record.Limits).Msg("limits changed")
	return b.limitsAnswer(ctx, &e.Record)
}

// PoolLimits implements control.SettingsBackend.
func (b *backend) PoolLimits(ctx context.Context, pool string) (control.Limits, error) {
	e, err := b.loadPool(ctx, pool)
	if err != nil {
		return control.Limits{}, err
	}
	return control.Limits{Name: pool, Own: valueOf(e.Record.Limits)}, nil
}

// ChangePoolLimits implements control.SettingsBackend.
func (b *backend) ChangePoolLimits(ctx context.Context, pool string, req control.ChangeLimits) (control.Limits, error) {
	if _, err := b.loadPool(ctx, pool); err != nil {
		return control.Limits{}, err
	}
	e, err := registry.Update(ctx, b.reg, registry.PoolKey(pool), func(r *registry.Pool) error {
		s, err := req.Apply(valueOf(r.Limits))
		r.Limits = recordOf(s)
		return err
	})
	if err != nil {
		return control.Limits{}, fmt.Errorf("limits of pool %s: %w", pool, err)
	}
	var names []string
	b.each(func(name string, _ Volume) { names = append(names, name) })
	for _, name := range names {
		if p, _, err := registry.SplitName(name); err == nil && p == pool {
			b.applyLimits(context.WithoutCancel(ctx), name)
		}
	}
	b.log.Info().Str("pool", pool).Interface("limits", e.Record.Limits).Msg("limits changed")
	return control.Limits{Name: pool, Own: valueOf(e.Record.Limits)}, nil
}

// addLimitCounters adds what the limits count to the engine's counters.
func addLimitCounters(counters map[string]uint64, st limit.Stats) {
	counters["reads_delayed"] = st.ReadsDelayed
	counters["writes_delayed"] = st.WritesDelayed
	counters["read_delay_ns"] = uint64(st.ReadWait)
	counters["write_delay_ns"] = uint64(st.WriteWait)
	counters["delayed_now"] = uint64(st.Waiting)
}

// limitCollector makes metrics of the limits and of what they delay.
type limitCollector struct {
	volumes                       *VolumeSet
	limit, delayed, seconds, wait *prometheus.Desc
}

func newLimitCollector(v *VolumeSet) *limitCollector {
	desc := func(name, help string, labels ...string) *prometheus.Desc {
		return prometheus.NewDesc("scoria_volume_"+name, help, labels, nil)
	}
	return &limitCollector{
		volumes: v,
		limit:   desc("limit", "Limits that hold for a volume, per second or in seconds; those that are not there do not hold.", "volume", "limit"),
		delayed: desc("delayed_requests_total", "Requests that had to wait for a limit.", "volume", "op"),
		seconds: desc("delay_seconds_total", "Time that requests have waited for limits.", "volume", "op"),
		wait:    desc("delayed_requests", "Requests that wait for a limit now.", "volume"),
	}
}

// Describe implements prometheus.Collector.
func (c *limitCollector) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{c.limit, c.delayed, c.seconds, c.wait} {
		ch <- d
	}
}

// Collect implements prometheus.Collector.
func (c *limitCollector) Collect(ch chan<- prometheus.Metric) {
	c.volumes.each(func(name string, dev Volume) {
		l, ok := dev.(*limited)
		if !ok {
			return
		}
		s, st := l.limits.Settings(), l.limits.Stats()
		for limit, v := range s.Numbers() {
			ch <- prometheus.MustNewConstMetric(c.limit, prometheus.GaugeValue, v, name, limit)
		}
		ch <- prometheus.MustNewConstMetric(c.delayed, prometheus.CounterValue, float64(st.ReadsDelayed), name, "read")
		ch <- prometheus.MustNewConstMetric(c.delayed, prometheus.CounterValue, float64(st.WritesDelayed), name, "write")
		ch <- prometheus.MustNewConstMetric(c.seconds, prometheus.CounterValue, st.ReadWait.Seconds(), name, "read")
		ch <- prometheus.MustNewConstMetric(c.seconds, prometheus.CounterValue, st.WriteWait.Seconds(), name, "write")
		ch <- prometheus.MustNewConstMetric(c.wait, prometheus.GaugeValue, float64(st.Waiting), name)
	})
}
