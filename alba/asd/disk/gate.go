package disk

import (
	"context"
	"sync"

	"scoria/alba/asd"
)

// repairShare is how many guests' requests pass a waiting repair request before
// it gets its turn all the same.
const repairShare = 16

// gate bounds the requests that use the disk at once, guests' before repair's.
// A repair request never takes the last quarter of the slots, so that a guest's
// rarely finds all of them taken by something that it can't interrupt.
type gate struct {
	mu      sync.Mutex
	free    int
	repairs int // running
	maxRep  int
	guest   waitList
	repair  waitList
	passed  int // guests since the last repair, while one waits
}

type waiter struct {
	ready chan struct{}
	gone  bool // its context ended
}

// waitList is a FIFO; its length is bounded by the callers' own goroutines.
type waitList struct {
	q    []*waiter
	live int
}

func newGate(slots int) *gate {
	return &gate{free: slots, maxRep: max(1, slots*3/4)}
}

// acquire waits for a slot; release gives it back.
func (g *gate) acquire(ctx context.Context, pri asd.Priority) error {
	g.mu.Lock()
	if g.free > 0 && g.guest.live == 0 && (pri == asd.PriorityGuest || g.repairs < g.maxRep && g.repair.live == 0) {
		g.take(pri)
		g.mu.Unlock()
		return nil
	}
	w := &waiter{ready: make(chan struct{})}
	list := g.list(pri)
	list.q = append(list.q, w)
	list.live++
	g.mu.Unlock()
	select {
	case <-w.ready:
		return nil
	case <-ctx.Done():
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	select {
	case <-w.ready: // it was granted meanwhile: pass it on
		g.put(pri)
	default:
		w.gone = true
		list.live--
	}
	return ctx.Err()
}

func (g *gate) release(pri asd.Priority) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.put(pri)
}

// waiting returns how many requests wait or run, by priority. Guests that run
// are not told from each other's slots, so slots is what the gate began with.
func (g *gate) waiting(slots int) (guest, repair int64) {
	g.mu.Lock()
	defer g.mu.Unlock()
	return int64(g.guest.live + slots - g.free - g.repairs), int64(g.repair.live + g.repairs)
}

func (g *gate) list(pri asd.Priority) *waitList {
	if pri == asd.PriorityRepair {
		return &g.repair
	}
	return &g.guest
}

func (g *gate) take(pri asd.Priority) {
	g.free--
	if pri == asd.PriorityRepair {
		g.repairs++
	}
}

func (g *gate) put(pri asd.Priority) {
	g.free++
	if pri == asd.PriorityRepair {
		g.repairs--
	}
	for g.free > 0 && g.grantOne() {
	}
}

func (g *gate) grantOne() bool {
	repair := g.repair.live > 0 && g.repairs < g.maxRep
	switch {
	case repair && (g.guest.live == 0 || g.passed >= repairShare):
		g.passed = 0
		g.take(asd.PriorityRepair)
		g.repair.grant()
	case g.guest.live > 0:
		if repair {
			g.passed++
		}
		g.take(asd.PriorityGuest)
		g.guest.grant()
	default:
		return false
	}
	return true
}

// grant wakes the first that still waits; there is one.
func (l *waitList) grant() {
	for {
		w := l.q[0]
		l.q[0] = nil
		l.q = l.q[1:]
		if !w.gone {
			l.live--
			close(w.ready)
			return
		}
	}
}
