package limit

import (
	"math"

	"scoria/driver/block"
)

// class is what a limit is on.
type class uint8

const (
	reads class = iota
	writes
	both
)

type unit uint8

const (
	inRequests unit = iota
	inBytes
)

// kind names a bucket.
type kind struct {
	class
	unit
}

const kinds = 6

func (k kind) index() int { return int(k.class)*2 + int(k.unit) }

// bucketNames are the settings behind the buckets, by index.
var bucketNames = [kinds]string{"read_iops", "read_bps", "write_iops", "write_bps", "total_iops", "total_bps"}

// classOf says which line a request waits in and what it costs in bytes.
func classOf(r *block.Request) (class, uint64) {
	switch r.Op {
	case block.OpRead:
		return reads, r.Length
	case block.OpWrite:
		return writes, r.Length
	}
	return writes, 0
}

// gate decides which requests may pass. It has no clock: callers say what time it
// is, in ns. Not safe for use by several goroutines.
type gate struct {
	buckets [kinds]bucket
	limited bool // any bucket has a rate
	shared  bool // one of both classes together has
	counted bool // one on requests of writes has: flushes count
	lines   [2]line
	seq     uint64
	blocked int // bucket that held up a request last
}

// set changes the limits at now.
func (g *gate) set(now int64, rates [kinds]rate) {
	g.limited, g.shared, g.counted = false, false, false
	for i := range g.buckets {
		g.buckets[i].set(now, rates[i])
		if rates[i].perSecond > 0 {
			g.limited = true
			g.shared = g.shared || class(i/2) == both
			g.counted = g.counted || class(i/2) != reads && unit(i%2) == inRequests
		}
	}
}

// ready is when a request may pass by the limits on c alone.
func (g *gate) ready(c class, n uint64) int64 {
	at := int64(math.MinInt64)
	for u, cost := range [...]uint64{inRequests: 1, inBytes: n} {
		i := kind{c, unit(u)}.index()
		if t := g.buckets[i].ready(cost); t > at {
			at, g.blocked = t, i
		}
	}
	return at
}

func (g *gate) take(now int64, c class, n uint64) {
	for _, c := range [...]class{c, both} {
		g.buckets[kind{c, inRequests}.index()].take(now, 1)
		g.buckets[kind{c, inBytes}.index()].take(now, n)
	}
}

// pass lets a new request pass at now, if it may: nothing waits before it and the
// buckets hold its cost.
func (g *gate) pass(now int64, c class, n uint64) bool {
	if g.lines[c].first != nil {
		return false
	}
	if w := g.lines[1-c].first; w != nil && g.shared && g.ready(w.class, w.bytes) <= now {
		return false // it waits for what both take from
	}
	if g.ready(both, n) > now || g.ready(c, n) > now {
		return false
	}
	g.take(now, c, n)
	return true
}

// wait puts a request at the end of its line.
func (g *gate) wait(w *waiter) {
	g.seq++
	w.seq = g.seq
	g.lines[w.class].push(w)
}

// next takes the request that may pass at now out of its line. If there is none,
// at is when to ask again; never, if nothing waits.
func (g *gate) next(now int64) (w *waiter, at int64) {
	at = math.MaxInt64
	older, younger := g.lines[reads].first, g.lines[writes].first
	if older == nil || younger != nil && younger.seq < older.seq {
		older, younger = younger, older
	}
	for _, w := range [...]*waiter{older, younger} {
		if w == nil {
			continue
		}
		// The limit that is named as the one to blame is the last that was asked.
		shared := g.ready(both, w.bytes)
		byShared := g.blocked
		own := g.ready(w.class, w.bytes)
		if own <= now && shared <= now {
			g.lines[w.class].pop()
			g.take(now, w.class, w.bytes)
			return w, now
		}
		if at = min(at, max(own, shared)); own <= now {
			g.blocked = byShared
			break // the younger takes from the same bucket: not before this one
		}
	}
	return nil, at
}

// remove takes the requests that match out of both lines, oldest of each first.
func (g *gate) remove(match func(*waiter) bool) (out []*waiter) {
	for i := range g.lines {
		out = g.lines[i].remove(match, out)
	}
	return out
}

func (g *gate) waiting() int { return g.lines[reads].n + g.lines[writes].n }

// oldest is when the request that has waited longest began to; now if none waits.
func (g *gate) oldest(now int64) int64 {
	for i := range g.lines {
		if w := g.lines[i].first; w != nil {
			now = min(now, w.since)
		}
	}
	return now
}

// line is a queue of waiters, linked through them. It is bounded by what the
// front ends' queues hold.
type line struct {
	first, last *waiter
	n           int
}

func (l *line) push(w *waiter) {
	w.next = nil
	if l.first == nil {
		l.first = w
	} else {
		l.last.next = w
	}
	l.last = w
	l.n++
}

func (l *line) pop() *waiter {
	w := l.first
	l.first = w.next
	l.n--
	return w
}

func (l *line) remove(match func(*waiter) bool, out []*waiter) []*waiter {
	w := l.first
	*l = line{}
	for w != nil {
		next := w.next
		if match(w) {
			out = append(out, w)
		} else {
			l.push(w)
		}
		w = next
	}
	return out
}
