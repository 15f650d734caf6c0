package host

import (
	"net/http"
	"regexp"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"scoria/driver"
	"scoria/driver/block"
)

// collector turns the volumes' counters into metrics at each scrape.
type collector struct {
	volumes *VolumeSet

	info, conditions, ops, bytes, errors, space, size, inUse, counters, open, stages *prometheus.Desc
	version, instance                                                                string
}

func newCollector(v *VolumeSet, version, instance string) *collector {
	desc := func(name, help string, labels ...string) *prometheus.Desc {
		return prometheus.NewDesc("scoria_"+name, help, labels, nil)
	}
	return &collector{
		volumes: v, version: version, instance: instance,
		info:       desc("info", "The daemon; always 1.", "version", "instance"),
		open:       desc("volumes_open", "Volumes that the daemon has in memory."),
		conditions: desc("volume_condition", "1 for everything that slows, pauses or degrades a volume now.", "volume", "code"),
		ops:        desc("volume_requests_total", "Requests that have ended.", "volume", "op"),
		bytes:      desc("volume_bytes_total", "Bytes of requests that have ended.", "volume", "op"),
		errors:     desc("volume_errors_total", "Requests that have failed.", "volume", "op"),
		space:      desc("volume_space_bytes", "What a volume occupies, by kind.", "volume", "kind"),
		stages:     desc("stage_seconds", "Time in the engine by stage: log (a write that had to wait), flush, sync, spill, read (not from RAM), store.", "volume", "stage"),
		size:       desc("volume_size_bytes", "Size of a volume as the guest sees it.", "volume"),
		inUse:      desc("volume_in_use", "1 if a front end writes to the volume.", "volume"),
		counters:   desc("volume_counter", "Everything else that the engine counts, by the names of `scoria volume stats`.", "volume", "name"),
	}
}

// Describe implements prometheus.Collector.
func (c *collector) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{c.info, c.conditions, c.ops, c.bytes, c.errors, c.space, c.size, c.inUse, c.counters, c.open, c.stages} {
		ch <- d
	}
}

// Collect implements prometheus.Collector.
func (c *collector) Collect(ch chan<- prometheus.Metric) {
	ch <- prometheus.MustNewConstMetric(c.info, prometheus.GaugeValue, 1, c.version, c.instance)
	open := 0
	c.volumes.each(func(name string, dev Volume) {
		open++
		c.volume(ch, name, dev)
	})
	ch <- prometheus.MustNewConstMetric(c.open, prometheus.GaugeValue, float64(open))
}

func (c *collector) volume(ch chan<- prometheus.Metric, name string, dev Volume) {
	gauge := func(d *prometheus.Desc, v float64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, append([]string{name}, labels...)...)
	}
	count := func(d *prometheus.Desc, v uint64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.CounterValue, float64(v), append([]string{name}, labels...)...)
	}
	st := dev.Stats()
	for op, o := range st.Ops {
		count(c.ops, o.Count, block.Op(op).String())
		count(c.bytes, o.Bytes, block.Op(op).String())
		count(c.errors, o.Errors, block.Op(op).String())
	}
	gauge(c.size, float64(dev.Info().Size))
	_, held := dev.Holder()
	gauge(c.inUse, map[bool]float64{true: 1}[held])
	for kind, n := range spaceKinds(st.Space) {
		gauge(c.space, float64(n), kind)
	}
	for i := range st.Latencies {
		l := &st.Latencies[i]
		ch <- prometheus.MustNewConstHistogram(c.stages, l.Count, l.Sum.Seconds(), cumulate(l.Buckets[:]), name, l.Stage.String())
	}
	seen := map[string]bool{} // a code twice would be a duplicate metric
	for _, cond := range st.Conditions {
		if !seen[cond.Code] {
			seen[cond.Code] = true
			gauge(c.conditions, 1, cond.Code)
		}
	}
	counters, err := statCounters(st)
	if err != nil {
		ch <- prometheus.NewInvalidMetric(c.counters, err)
		return
	}
	for n, v := range counters {
		// Some are totals, some are levels; which is said where they are defined.
		ch <- prometheus.MustNewConstMetric(c.counters, prometheus.UntypedValue, float64(v), name, n)
	}
}

// cumulate turns buckets by powers of two of a nanosecond into Prometheus's
// totals up to each bound. From 1 µs to 17 s is enough.
func cumulate(buckets []uint64) map[float64]uint64 {
	out := map[float64]uint64{}
	var sum uint64
	for i, n := range buckets {
		sum += n
		if i >= 10 && i <= 34 {
			out[(time.Duration(1) << i).Seconds()] = sum
		}
	}
	return out
}

func spaceKinds(s driver.Space) map[string]uint64 {
	return map[string]uint64{
		"live": s.Live, "garbage": s.Garbage, "overhead": s.Overhead, "local": s.Local, "store": s.Store,
	}
}

// metricsHandler serves the collectors and those of Go and of the process.
func metricsHandler(list ...prometheus.Collector) http.Handler {
	r := prometheus.NewRegistry()
	// The collector's CPU time shows what it costs the threads that serve guests.
	gc := collectors.GoRuntimeMetricsRule{Matcher: regexp.MustCompile(`^/cpu/classes/gc/total:cpu-seconds$`)}
	r.MustRegister(collectors.NewGoCollector(collectors.WithGoCollectorRuntimeMetrics(gc)), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	r.MustRegister(list...)
	return promhttp.HandlerFor(r, promhttp.HandlerOpts{ErrorHandling: promhttp.ContinueOnError})
}
