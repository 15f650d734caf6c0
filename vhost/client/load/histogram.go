package load

import (
	"math/bits"
	"time"
)

// A Histogram counts durations in log-linear buckets: 64 per power of two, so a
// quantile is at most 1/64 too high. The zero value is empty. Recording does not
// allocate.
type Histogram struct {
	counts [histBuckets]uint64
	n      uint64
	sum    uint64 // ns
	max    uint64 // ns
}

const (
	histLinear  = 6 // log2 of buckets per power of two
	histOctaves = 36
	histBuckets = (histOctaves + 1) << histLinear // up to 2^42 ns, over an hour
)

func histIndex(ns uint64) int {
	if ns < 1<<histLinear {
		return int(ns)
	}
	shift := bits.Len64(ns) - 1 - histLinear
	return min((shift<<histLinear)+int(ns>>shift), histBuckets-1)
}

// histUpper is the largest value of bucket i.
func histUpper(i int) uint64 {
	shift := i>>histLinear - 1
	if shift <= 0 {
		return uint64(i)
	}
	return uint64(i-shift<<histLinear+1)<<shift - 1
}

// Record counts one duration of ns nanoseconds.
func (h *Histogram) Record(ns uint64) {
	h.counts[histIndex(ns)]++
	h.n++
	h.sum += ns
	h.max = max(h.max, ns)
}

// Add counts all that o counts.
func (h *Histogram) Add(o *Histogram) {
	for i, n := range o.counts {
		h.counts[i] += n
	}
	h.n += o.n
	h.sum += o.sum
	h.max = max(h.max, o.max)
}

// Count is the number of durations.
func (h *Histogram) Count() uint64 { return h.n }

// Mean is their average, 0 if there are none.
func (h *Histogram) Mean() time.Duration {
	if h.n == 0 {
		return 0
	}
	return time.Duration(h.sum / h.n)
}

// Max is the longest.
func (h *Histogram) Max() time.Duration { return time.Duration(h.max) }

// Quantile is the duration that the share q (0 to 1) of all does not exceed.
func (h *Histogram) Quantile(q float64) time.Duration {
	if h.n == 0 {
		return 0
	}
	rank := uint64(q * float64(h.n))
	var seen uint64
	for i, n := range h.counts {
		if seen += n; n > 0 && seen > rank {
			return time.Duration(min(histUpper(i), h.max))
		}
	}
	return time.Duration(h.max)
}
