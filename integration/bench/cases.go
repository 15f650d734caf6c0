package main

import (
	"time"

	"scoria/vhost/client/load"
)

// Placements.
const (
	placementA = "A" // client and server on different CPUs, both poll
	placementD = "D" // both on one CPU, both sleep
)

// A workload is one kind of measurement; it is run on each server in each round.
type workload struct {
	name      string // as -rows selects it
	placement string
	spec      load.Spec
	scoria    bool // not run on the peer: it is compared with something else
}

func workloads() []workload {
	w := func(depth int) load.Spec { return load.Spec{Random: true, Depth: depth} }
	r := func(depth int) load.Spec { return load.Spec{Random: true, Depth: depth, ReadPercent: 100} }
	seq := func(percent int) load.Spec {
		return load.Spec{BlockBytes: 64 << 10, Depth: 8, ReadPercent: percent}
	}
	mixed := load.Spec{Random: true, Depth: 32, ReadPercent: 70}
	flush := func(depth int) load.Spec { return load.Spec{Random: true, Depth: depth, FlushEach: true} }
	return []workload{
		{name: "A-write-d32", placement: placementA, spec: w(32)},
		{name: "A-read-d32", placement: placementA, spec: r(32)},
		{name: "A-mixed-d32", placement: placementA, spec: mixed},
		{name: "A-write-d1", placement: placementA, spec: w(1)},
		{name: "A-read-d1", placement: placementA, spec: r(1)},
		{name: "A-seqwrite-64k-d8", placement: placementA, spec: seq(0)},
		{name: "A-seqread-64k-d8", placement: placementA, spec: seq(100)},
		{name: "A-flush-d1", placement: placementA, spec: flush(1), scoria: true},
		{name: "A-flush-d8", placement: placementA, spec: flush(8), scoria: true},
		{name: "D-write-d32", placement: placementD, spec: w(32)},
		{name: "D-read-d32", placement: placementD, spec: r(32)},
		{name: "D-write-d1", placement: placementD, spec: w(1)},
		{name: "D-read-d1", placement: placementD, spec: r(1)},
	}
}

// Names of measurements that are not workloads of a server.
const (
	diskName      = "disk"           // the server of results that a bare loop on the disk gave
	inPlaceName   = "disk-in-place"  // the same, overwriting
	rowTailWrite  = "A-tail-write"   // half of A-write-d32's rate
	rowTailRead   = "A-tail-read"    // half of A-read-d32's rate
	rowFlush1     = "A-flush-d1"     // also the bare loop's
	rowSustained  = "A-sustained"    // random writes, write buffer full
	rowIdle       = "idle"           // many attached volumes
	rowNeighbour  = "neighbour"      // a quiet volume beside a busy one
	rowRestart    = "restart"        // pause of an attached client
	rowRestartTiB = "restart-1t"     // the same with 1 TiB mapped
	settleLimit   = 40 * time.Second // between a measurement and the next
)

// A target is one line of DESIGN.md §13.
type target struct {
	title    string
	workload string
	unit     string
	value    func(*sample) float64 // of one measurement
	against  string                // the server whose value divides Scoria's; "": the value itself counts
	limit    float64
	goal     float64 // 0: none
	atMost   bool    // smaller is better
}

func iops(r *sample) float64 { return r.IOPS }
func mbps(r *sample) float64 { return r.MBps }
func p50(r *sample) float64  { return float64(r.P50) / 1e3 }
func p999(r *sample) float64 { return float64(r.P999) / 1e3 }
func cpu(r *sample) float64  { return r.ServerCPUPerMOps }
func all(r *sample) float64  { return r.cpuAll }
func tail(r *sample) float64 {
	if r.P50 == 0 {
		return 0
	}
	return float64(r.P999) / float64(r.P50)
}

func targets() []target {
	peer := func(title, workload, unit string, value func(*sample) float64, limit, goal float64, atMost bool) target {
		return target{title: title, workload: workload, unit: unit, value: value, against: peerName, limit: limit, goal: goal, atMost: atMost}
	}
	return append([]target{
		peer("4 KiB random write, depth 32, A", "A-write-d32", "IOPS", iops, 3.5, 5.5, false),
		peer("4 KiB random read, depth 32, A", "A-read-d32", "IOPS", iops, 3.5, 5, false),
		peer("4 KiB random write, depth 32, D", "D-write-d32", "IOPS", iops, 3, 5, false),
		peer("4 KiB random read, depth 32, D", "D-read-d32", "IOPS", iops, 3, 5, false),
		peer("4 KiB write, depth 1, p50, A", "A-write-d1", "µs", p50, 0.3, 0, true),
		peer("4 KiB read, depth 1, p50, A", "A-read-d1", "µs", p50, 0.3, 0, true),
		peer("4 KiB write, depth 1, D", "D-write-d1", "IOPS", iops, 2, 3, false),
		peer("4 KiB read, depth 1, D", "D-read-d1", "IOPS", iops, 2, 3, false),
		peer("server CPU per write, depth 32, A", "A-write-d32", "s/M", cpu, 0.35, 0.2, true),
		peer("the same, with what it puts off", "A-write-d32", "s/M", all, 0, 0, true),
		peer("server CPU per read, depth 32, A", "A-read-d32", "s/M", cpu, 0.35, 0.2, true),
		peer("64 KiB sequential write, depth 8, A", "A-seqwrite-64k-d8", "MB/s", mbps, 1.5, 2.2, false),
		peer("64 KiB sequential read, depth 8, A", "A-seqread-64k-d8", "MB/s", mbps, 1.5, 2.2, false),
		peer("4 KiB mixed 70/30, depth 32, A", "A-mixed-d32", "IOPS", iops, 0, 0, false),
		{title: "4 KiB write right after a snapshot, depth 32, A", workload: rowSnapWrite, unit: "IOPS", value: iops, against: qcowName, limit: 30},
		{title: "the same, against a plain volume", workload: rowSnapWrite, unit: "IOPS", value: iops, against: plainName, limit: 0.9},
		{title: "server CPU per such write, against a plain volume", workload: rowSnapWrite, unit: "s/M", value: cpu, against: plainName, atMost: true},
		{title: "4 KiB write to a fresh clone, depth 32, A", workload: rowCloneWrite, unit: "IOPS", value: iops, against: plainName, limit: 0.9},
		{title: "server CPU per such write, against a plain volume", workload: rowCloneWrite, unit: "s/M", value: cpu, against: plainName, atMost: true},
		{title: "write + flush, against append + fdatasync", workload: rowFlush1, unit: "IOPS", value: iops, against: diskName, limit: 0.9},
		{title: "the same, against overwriting in place + fdatasync", workload: rowFlush1, unit: "IOPS", value: iops, against: inPlaceName},
		{title: "write + flush, 8 at once, against the same", workload: "A-flush-d8", unit: "IOPS", value: iops, against: diskName, limit: 1},
		{title: "sustained random write, against the disk", workload: rowSustained, unit: "MB/s", value: mbps, against: diskName, limit: 0.7, goal: 0.9},
		{title: "write, half load: p99.9 / p50", workload: rowTailWrite, unit: "×", value: tail, limit: 10, atMost: true},
		{title: "the same p99.9, against an ideal server's", workload: rowTailWrite, unit: "µs", value: p999, against: idealName, atMost: true},
		{title: "read, half load: p99.9 / p50", workload: rowTailRead, unit: "×", value: tail, limit: 10, atMost: true},
		{title: "the same p99.9, against an ideal server's", workload: rowTailRead, unit: "µs", value: p999, against: idealName, atMost: true},
	}, objectTargets()...)
}
