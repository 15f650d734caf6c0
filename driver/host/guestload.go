package host

import (
	"math/bits"
	"sync"
	"time"

	"scoria/driver"
)

// guestLook is how long one answer of guestLoad counts: long enough that a p99 means
// something, short enough that a guest's burst is noticed.
const guestLook = 250 * time.Millisecond

// guestLoad judges whether guests wait for the disks, for the maintenance of the
// object store to give way: more than one in a hundred of their flushes, reads from
// disk or store, and writes that could not be logged at once took longer than the
// limit since the last look, writes wait now, or the write buffer is so full that
// writers are slowed down. Safe from any goroutine; the lock is a leaf.
type guestLoad struct {
	waits func() driver.GuestWaits
	limit time.Duration
	now   func() time.Time

	mu     sync.Mutex
	looked time.Time
	seen   driver.GuestWaits
	answer bool
}

func newGuestLoad(waits func() driver.GuestWaits, limit time.Duration, now func() time.Time) *guestLoad {
	g := &guestLoad{waits: waits, limit: limit, now: now, looked: now()}
	g.seen = waits()
	return g
}

// busy implements repair.Options.Busy.
func (g *guestLoad) busy() bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	now := g.now()
	if now.Sub(g.looked) < guestLook {
		return g.answer
	}
	w := g.waits()
	// After a rest of maintenance the counts are of all that time: a guest that waited
	// an hour ago says nothing.
	fresh := now.Sub(g.looked) < 4*guestLook
	all, slow := uint64(0), uint64(0)
	for _, l := range [][2]*driver.Latency{{&w.Log, &g.seen.Log}, {&w.Flush, &g.seen.Flush}, {&w.Read, &g.seen.Read}} {
		a, s := slower(l[0], l[1], g.limit)
		all, slow = all+a, slow+s
	}
	g.answer = w.Parked > 0 || w.Throttling || fresh && slow*100 > all
	g.looked, g.seen = now, w
	return g.answer
}

// slower counts the observations since an earlier look, and those of them that took at
// least the limit, up to the next power of two nanoseconds. Nothing if a volume was
// closed meanwhile, which takes its counts along.
func slower(now, before *driver.Latency, limit time.Duration) (all, slow uint64) {
	from := bits.Len64(uint64(limit-1)) + 1
	for i := range now.Buckets {
		if now.Buckets[i] < before.Buckets[i] {
			return 0, 0
		}
		n := now.Buckets[i] - before.Buckets[i]
		all += n
		if i >= from {
			slow += n
		}
	}
	return all, slow
}
