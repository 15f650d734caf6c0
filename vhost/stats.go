package vhost

import (
	"math/bits"
	"sync/atomic"
	"time"

	"scoria/driver/block"
)

const (
	opCount = int(block.OpWriteZeroes) + 1
	// latencyBuckets bounds the histograms: the last bucket holds everything
	// from 2^(latencyBuckets-2) ns, about 4.6 minutes, on.
	latencyBuckets = 40
	// sampleMask selects the requests whose latency is measured, 1 in 16.
	sampleMask = 15
)

// OpStats counts the requests of one kind since the endpoint began to listen.
type OpStats struct {
	Requests uint64
	Bytes    uint64
	Errors   uint64
	// Latency counts sampled requests by the time from the ring to its answer,
	// in the ring, which includes the device.
	Latency Histogram
}

// Histogram is a snapshot with buckets by powers of two.
type Histogram struct {
	// Buckets[i] counts samples below 2^i ns that are in no earlier bucket; the
	// last one has no bound.
	Buckets [latencyBuckets]uint64
	Count   uint64
	Sum     time.Duration
}

// UpperBound returns the bound of bucket i; the last bucket has none and
// returns a negative duration.
func (h *Histogram) UpperBound(i int) time.Duration {
	if i >= latencyBuckets-1 {
		return -1
	}
	return time.Duration(1) << i
}

// Stats is a snapshot of an endpoint's counters. They grow while the endpoint
// listens; Sessions, Rings and InFlight are current.
type Stats struct {
	Name string // POOL/VOLUME
	Path string // of the socket

	Sessions int // open connections
	Rings    int // started rings
	InFlight int // requests that the device has taken over

	Ops [opCount]OpStats // by block.Op

	OtherRequests uint64 // GET_ID and requests refused as malformed or unsupported
	Connections   uint64 // accepted
	Disconnects   uint64 // sessions ended for a fault of the front end or the device
	Kicks         uint64 // notifications taken from drivers
	Calls         uint64 // notifications sent to drivers
	PollHits      uint64 // waits that polling made short
	PollMisses    uint64 // waits that polling did not end

	// LastDisconnect is the reason of the last such end, with its time; empty if
	// there was none.
	LastDisconnect     string
	LastDisconnectTime time.Time
}

// WorkerStats is a snapshot of one worker's counters.
type WorkerStats struct {
	Queues   int           // that it serves now
	Sleeps   uint64        // times it slept in the kernel
	PollTime time.Duration // spent polling in vain
}

// counters are an endpoint's, shared by the workers that serve its queues. A
// worker adds to them once per pass, not per request.
type counters struct {
	ops          [opCount]opCounters
	other        atomic.Uint64
	connections  atomic.Uint64
	disconnects  atomic.Uint64
	kicks, calls atomic.Uint64
	hits, misses atomic.Uint64
	rings        atomic.Int64
	inFlight     atomic.Int64
}

type opCounters struct {
	requests, bytes, errors atomic.Uint64
	latencySum              atomic.Uint64 // ns
	latency                 [latencyBuckets]atomic.Uint64
}

func (c *opCounters) observe(ns int64) {
	ns = max(ns, 0)
	c.latency[min(bits.Len64(uint64(ns)), latencyBuckets-1)].Add(1)
	c.latencySum.Add(uint64(ns))
}

// passCounters gather one pass of a queue.
type passCounters struct {
	requests, bytes, errors [opCount]uint64
	other                   uint64
	dirty                   bool
}

func (p *passCounters) flush(c *counters) {
	if !p.dirty {
		return
	}
	for i := range opCount {
		if p.requests[i] != 0 {
			c.ops[i].requests.Add(p.requests[i])
			c.ops[i].bytes.Add(p.bytes[i])
			if p.errors[i] != 0 {
				c.ops[i].errors.Add(p.errors[i])
			}
		}
	}
	if p.other != 0 {
		c.other.Add(p.other)
	}
	*p = passCounters{}
}

func (c *counters) snapshot(s *Stats) {
	for i := range opCount {
		o, d := &c.ops[i], &s.Ops[i]
		d.Requests, d.Bytes, d.Errors = o.requests.Load(), o.bytes.Load(), o.errors.Load()
		for b := range o.latency {
			n := o.latency[b].Load()
			d.Latency.Buckets[b] = n
			d.Latency.Count += n
		}
		d.Latency.Sum = time.Duration(o.latencySum.Load())
	}
	s.OtherRequests = c.other.Load()
	s.Connections, s.Disconnects = c.connections.Load(), c.disconnects.Load()
	s.Kicks, s.Calls = c.kicks.Load(), c.calls.Load()
	s.PollHits, s.PollMisses = c.hits.Load(), c.misses.Load()
	s.Rings, s.InFlight = int(c.rings.Load()), int(c.inFlight.Load())
}
