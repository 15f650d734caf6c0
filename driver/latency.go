package driver

import (
	"math/bits"
	"sync/atomic"
	"time"
)

// Stage is a part of a request's way, for the latency histograms. The front ends
// measure the whole ("ring").
type Stage uint8

// The stages that the driver measures.
const (
	StageLog   Stage = iota // a write that could not be logged at once: until it was
	StageFlush              // a flush or FUA write: until everything before it is durable
	StageSync               // one sync of a SCO's file
	StageSpill              // one write of clusters to a SCO's file
	StageRead               // a read that RAM could not answer
	StageStore              // one read or upload through the store
	stageCount
)

// String returns the stage's name as the metrics show it.
func (s Stage) String() string {
	return [stageCount]string{"log", "flush", "sync", "spill", "read", "store"}[s]
}

// latencyBuckets bounds the histograms; the last bucket is open.
const latencyBuckets = 40

// Latency is a histogram of one stage: Buckets[i] counts times below 2^i ns that
// are in no earlier bucket.
type Latency struct {
	Stage   Stage
	Buckets [latencyBuckets]uint64
	Count   uint64
	Sum     time.Duration
}

type latency struct {
	buckets [latencyBuckets]atomic.Uint64
	sum     atomic.Int64
}

func (l *latency) observe(d time.Duration) {
	d = max(d, 0)
	l.buckets[min(bits.Len64(uint64(d)), latencyBuckets-1)].Add(1)
	l.sum.Add(int64(d))
}

// since observes the time that has passed; for defer.
func (l *latency) since(start time.Time) { l.observe(time.Since(start)) }

func (l *latency) snapshot(s Stage) Latency {
	out := Latency{Stage: s, Sum: time.Duration(l.sum.Load())}
	for i := range l.buckets {
		out.Buckets[i] = l.buckets[i].Load()
		out.Count += out.Buckets[i]
	}
	return out
}
