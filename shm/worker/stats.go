package worker

import (
	"math/bits"
	"sync/atomic"
	"time"

	"scoria/driver/block"
)

const (
	// OpCount is the number of operations.
	OpCount = int(block.OpWriteZeroes) + 1
	// latencyBuckets bounds the histograms: the last bucket holds everything
	// from 2^(latencyBuckets-2) ns, about 4.6 minutes, on.
	latencyBuckets = 40
	// sampleMask selects the requests whose latency is measured, 1 in 16.
	sampleMask = 15
)

// OpStats counts the requests of one kind.
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

// Stats is a snapshot of Counters. All but Rings and InFlight grow.
type Stats struct {
	Rings    int // started; whoever starts them counts them
	InFlight int // requests that the device has taken over

	Ops [OpCount]OpStats // by block.Op

	OtherRequests uint64 // answered without the device, such as malformed ones
	Kicks         uint64 // notifications taken from peers
	Calls         uint64 // notifications sent to peers
	PollHits      uint64 // waits that polling made short
	PollMisses    uint64 // waits that polling did not end
}

// WorkerStats is a snapshot of one worker's counters.
type WorkerStats struct {
	Queues   int           // that it serves now
	Sleeps   uint64        // times it slept in the kernel
	PollTime time.Duration // spent polling in vain
}

// Counters count the requests of queues, of one volume for example, that several
// workers may serve. A worker adds to them once per pass, not per request.
type Counters struct {
	// Rings counts those that are started, for whoever starts them.
	Rings atomic.Int64

	ops          [OpCount]OpCounters
	other        atomic.Uint64
	kicks, calls atomic.Uint64
	hits, misses atomic.Uint64
	inFlight     atomic.Int64
}

type OpCounters struct {
	requests, bytes, errors atomic.Uint64
	latencySum              atomic.Uint64 // ns
	latency                 [latencyBuckets]atomic.Uint64
}

func (c *OpCounters) observe(ns int64) {
	ns = max(ns, 0)
	c.latency[min(bits.Len64(uint64(ns)), latencyBuckets-1)].Add(1)
	c.latencySum.Add(uint64(ns))
}

// passCounters gather one pass of a queue.
type passCounters struct {
	requests, bytes, errors [OpCount]uint64
	other                   uint64
	dirty                   bool
}

func (p *passCounters) flush(c *Counters) {
	if !p.dirty {
		return
	}
	for i := range OpCount {
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

// Snapshot returns the counts so far.
func (c *Counters) Snapshot() Stats {
	s := Stats{
		OtherRequests: c.other.Load(), Kicks: c.kicks.Load(), Calls: c.calls.Load(),
		PollHits: c.hits.Load(), PollMisses: c.misses.Load(),
		Rings: int(c.Rings.Load()), InFlight: int(c.inFlight.Load()),
	}
	for i := range OpCount {
		o, d := &c.ops[i], &s.Ops[i]
		d.Requests, d.Bytes, d.Errors = o.requests.Load(), o.bytes.Load(), o.errors.Load()
		for b := range o.latency {
			n := o.latency[b].Load()
			d.Latency.Buckets[b] = n
			d.Latency.Count += n
		}
		d.Latency.Sum = time.Duration(o.latencySum.Load())
	}
	return s
}
