package limit

import (
	"math"
	"math/bits"
)

// bucket is a token bucket. All times are in ns of one clock that never goes
// backwards.
type bucket struct {
	rate
	full int64  // when it was or will be full
	frac uint64 // what full lacks: so many perSecond-ths of a ns
}

// scale is a × b / c, rounded up; the largest int64 if that is more.
func scale(a, b, c uint64) int64 {
	hi, lo := bits.Mul64(a, b)
	if hi >= c {
		return math.MaxInt64
	}
	q, r := bits.Div64(hi, lo, c)
	if r > 0 {
		q++
	}
	return int64(min(q, math.MaxInt64))
}

// ready is when a request of that cost may pass, at the earliest; now at most if
// it may pass now.
func (b *bucket) ready(cost uint64) int64 {
	if b.perSecond == 0 {
		return math.MinInt64
	}
	full := b.full
	if b.frac > 0 {
		full++
	}
	return full - max(b.depth-scale(cost, uint64(second), b.perSecond), 0)
}

// take lets a request of that cost pass at now, ready or not: what it takes too
// early, later ones wait for.
func (b *bucket) take(now int64, cost uint64) {
	if b.perSecond == 0 {
		return
	}
	if b.full < now {
		b.full, b.frac = now, 0
	}
	hi, lo := bits.Mul64(cost, uint64(second))
	lo, carry := bits.Add64(lo, b.frac, 0)
	hi += carry
	if hi >= b.perSecond { // centuries
		b.full = math.MaxInt64 / 2
		return
	}
	q, r := bits.Div64(hi, lo, b.perSecond)
	b.full = int64(min(uint64(b.full)+min(q, math.MaxInt64/2), math.MaxInt64/2))
	b.frac = r
}

// set changes the rate at now and keeps what is missing from the bucket, in
// tokens. A new limit begins with a full bucket.
func (b *bucket) set(now int64, r rate) {
	missing := uint64(0)
	if b.full > now && b.perSecond > 0 {
		missing = uint64(scale(uint64(b.full-now), b.perSecond, uint64(second)))
	}
	b.rate = r
	b.full, b.frac = now, 0
	if missing > 0 && r.perSecond > 0 {
		b.full += min(scale(missing, uint64(second), r.perSecond), math.MaxInt64/4)
	}
}
