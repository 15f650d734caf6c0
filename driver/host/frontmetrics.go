package host

import (
	"github.com/prometheus/client_golang/prometheus"

	"scoria/driver/block"
	"scoria/driver/nbd"
	"scoria/shm/worker"
)

// frontCollector turns the front ends' counters into metrics. The latency of
// stage "ring" is from the ring to its answer, sampled.
type frontCollector struct {
	workers *worker.Set
	vhost   *vhostFront
	nbd     *nbd.Server // nil: off

	latency, sessions, rings, disconnects, notes, polled, sleeps, nbdConns, nbdRefused, nbdOps *prometheus.Desc
}

func newFrontCollector(w *worker.Set, v *vhostFront, n *nbd.Server) *frontCollector {
	desc := func(name, help string, labels ...string) *prometheus.Desc {
		return prometheus.NewDesc("scoria_"+name, help, labels, nil)
	}
	return &frontCollector{
		workers: w, vhost: v, nbd: n,
		latency:     desc("request_seconds", "Time of sampled requests by stage: ring is from the guest's ring to its answer there.", "volume", "op", "stage"),
		sessions:    desc("vhost_sessions", "Open vhost-user connections.", "volume"),
		rings:       desc("vhost_rings", "Started rings.", "volume"),
		disconnects: desc("vhost_disconnects_total", "Connections ended for a fault.", "volume"),
		notes:       desc("vhost_notifications_total", "Kicks taken from and calls sent to guests.", "volume", "kind"),
		polled:      desc("vhost_worker_poll_seconds_total", "Time that worker threads polled in vain."),
		sleeps:      desc("vhost_worker_sleeps_total", "Times that worker threads slept."),
		nbdConns:    desc("nbd_connections", "Open NBD connections."),
		nbdRefused:  desc("nbd_refused_total", "NBD connections refused over a limit, or ended for breaking the protocol."),
		nbdOps:      desc("nbd_requests_total", "NBD commands that have ended.", "op"),
	}
}

// Describe implements prometheus.Collector.
func (c *frontCollector) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{c.latency, c.sessions, c.rings, c.disconnects, c.notes, c.polled, c.sleeps, c.nbdConns, c.nbdRefused, c.nbdOps} {
		ch <- d
	}
}

// Collect implements prometheus.Collector.
func (c *frontCollector) Collect(ch chan<- prometheus.Metric) {
	metric := func(d *prometheus.Desc, t prometheus.ValueType, v float64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, t, v, labels...)
	}
	for _, st := range c.vhost.stats() {
		metric(c.sessions, prometheus.GaugeValue, float64(st.Sessions), st.Name)
		metric(c.rings, prometheus.GaugeValue, float64(st.Rings), st.Name)
		if st.Connections == 0 {
			continue // a thousand volumes that nobody uses need no histograms
		}
		metric(c.disconnects, prometheus.CounterValue, float64(st.Disconnects), st.Name)
		metric(c.notes, prometheus.CounterValue, float64(st.Kicks), st.Name, "kick")
		metric(c.notes, prometheus.CounterValue, float64(st.Calls), st.Name, "call")
		for op := range st.Ops {
			h := &st.Ops[op].Latency
			if h.Count == 0 {
				continue
			}
			ch <- prometheus.MustNewConstHistogram(c.latency, h.Count, h.Sum.Seconds(), cumulate(h.Buckets[:]), st.Name, block.Op(op).String(), "ring")
		}
	}
	var polled float64
	var sleeps uint64
	for _, w := range c.workers.Stats() {
		polled += w.PollTime.Seconds()
		sleeps += w.Sleeps
	}
	metric(c.polled, prometheus.CounterValue, polled)
	metric(c.sleeps, prometheus.CounterValue, float64(sleeps))
	if c.nbd == nil {
		return
	}
	st := c.nbd.Stats()
	metric(c.nbdConns, prometheus.GaugeValue, float64(st.Connections))
	metric(c.nbdRefused, prometheus.CounterValue, float64(st.Refused+st.Violations))
	for op, o := range st.Ops {
		metric(c.nbdOps, prometheus.CounterValue, float64(o.Count), op)
	}
}
