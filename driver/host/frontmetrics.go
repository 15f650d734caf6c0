package host

import (
	"github.com/prometheus/client_golang/prometheus"

	"scoria/driver/block"
	"scoria/driver/nbd"
	"scoria/shm"
	"scoria/shm/worker"
)

// frontCollector turns the front ends' counters into metrics. The latency of
// stage "ring" is from the ring to its answer, sampled.
type frontCollector struct {
	workers *worker.Set
	vhost   *vhostFront
	nbd     *nbd.Server // nil: off
	shm     *shm.Server // nil: off

	latency, sessions, rings, disconnects, resubmitted, dirtyPages, notes, polled, sleeps, nbdConns, nbdRefused, nbdOps *prometheus.Desc

	shmConns, shmRefused, shmMemory, shmSessions, shmRings, shmDisconnects, shmNotes *prometheus.Desc
}

func newFrontCollector(w *worker.Set, v *vhostFront, n *nbd.Server, s *shm.Server) *frontCollector {
	desc := func(name, help string, labels ...string) *prometheus.Desc {
		return prometheus.NewDesc("scoria_"+name, help, labels, nil)
	}
	return &frontCollector{
		workers: w, vhost: v, nbd: n, shm: s,
		latency:     desc("request_seconds", "Time of sampled requests by stage: ring is from the guest's ring to its answer there, shm_ring the same of a shared-memory client's.", "volume", "op", "stage"),
		sessions:    desc("vhost_sessions", "Open vhost-user connections.", "volume"),
		rings:       desc("vhost_rings", "Started rings.", "volume"),
		disconnects: desc("vhost_disconnects_total", "Connections ended for a fault.", "volume"),
		resubmitted: desc("vhost_resubmitted_total", "Requests that an earlier connection or daemon had taken and not answered, carried out when the ring started again.", "volume"),
		dirtyPages:  desc("vhost_dirty_log_pages_total", "Pages of guest memory marked for a live migration to copy again, counted each time.", "volume"),
		notes:       desc("vhost_notifications_total", "Kicks taken from and calls sent to guests.", "volume", "kind"),
		polled:      desc("vhost_worker_poll_seconds_total", "Time that worker threads polled in vain."),
		sleeps:      desc("vhost_worker_sleeps_total", "Times that worker threads slept."),
		shmConns:    desc("shm_connections", "Open shared-memory connections."),
		shmRefused:  desc("shm_refused_total", "Shared-memory connections refused over a limit."),
		shmMemory:   desc("shm_memory_bytes", "Memory that shared-memory rings take."),
		shmSessions: desc("shm_sessions", "Shared-memory connections to a volume.", "volume"),
		shmRings:    desc("shm_rings", "Shared-memory rings that are served.", "volume"),

		shmDisconnects: desc("shm_disconnects_total", "Shared-memory connections ended for a fault.", "volume"),
		shmNotes:       desc("shm_notifications_total", "Kicks taken from and calls sent to shared-memory clients.", "volume", "kind"),

		nbdConns:   desc("nbd_connections", "Open NBD connections."),
		nbdRefused: desc("nbd_refused_total", "NBD connections refused over a limit, or ended for breaking the protocol."),
		nbdOps:     desc("nbd_requests_total", "NBD commands that have ended.", "op"),
	}
}

// Describe implements prometheus.Collector.
func (c *frontCollector) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{c.latency, c.sessions, c.rings, c.disconnects, c.resubmitted, c.dirtyPages, c.notes, c.polled, c.sleeps, c.nbdConns, c.nbdRefused, c.nbdOps,
		c.shmConns, c.shmRefused, c.shmMemory, c.shmSessions, c.shmRings, c.shmDisconnects, c.shmNotes} {
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
		metric(c.resubmitted, prometheus.CounterValue, float64(st.Resubmitted), st.Name)
		metric(c.dirtyPages, prometheus.CounterValue, float64(st.DirtyPages), st.Name)
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
	if c.shm != nil {
		c.collectShm(ch)
	}
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

func (c *frontCollector) collectShm(ch chan<- prometheus.Metric) {
	metric := func(d *prometheus.Desc, t prometheus.ValueType, v float64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, t, v, labels...)
	}
	all := c.shm.Totals()
	metric(c.shmConns, prometheus.GaugeValue, float64(all.Connections))
	metric(c.shmRefused, prometheus.CounterValue, float64(all.Refused))
	metric(c.shmMemory, prometheus.GaugeValue, float64(all.MemoryBytes))
	for _, st := range c.shm.Stats() {
		metric(c.shmSessions, prometheus.GaugeValue, float64(st.Sessions), st.Name)
		metric(c.shmRings, prometheus.GaugeValue, float64(st.Rings), st.Name)
		metric(c.shmDisconnects, prometheus.CounterValue, float64(st.Disconnects), st.Name)
		metric(c.shmNotes, prometheus.CounterValue, float64(st.Kicks), st.Name, "kick")
		metric(c.shmNotes, prometheus.CounterValue, float64(st.Calls), st.Name, "call")
		for op := range st.Ops {
			h := &st.Ops[op].Latency
			if h.Count != 0 {
				ch <- prometheus.MustNewConstHistogram(c.latency, h.Count, h.Sum.Seconds(), cumulate(h.Buckets[:]), st.Name, block.Op(op).String(), "shm_ring")
			}
		}
	}
}
