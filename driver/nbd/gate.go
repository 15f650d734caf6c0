package nbd

import (
	"sync"
	"sync/atomic"
)

// gate keeps read-modify-write of parts of blocks apart from all other changes
// of the same volume: changes of whole blocks pass it shared, without a lock;
// read-modify-write passes it alone. Those who wait give up when their
// connection ends, which tells them by wake.
type gate struct {
	state atomic.Int64 // number of shared holders, plus gateShut
	mu    sync.Mutex
	cond  sync.Cond
	// alone is held by the one exclusive holder; wanted counts it and those who
	// wait to be. Guarded by mu.
	alone  bool
	wanted int
}

// gateShut in gate.state keeps new shared holders out.
const gateShut = 1 << 40

func (g *gate) init() { g.cond.L = &g.mu }

// tryShared takes the gate shared if nobody has or wants it alone.
func (g *gate) tryShared() bool {
	for {
		v := g.state.Load()
		if v >= gateShut {
			return false
		}
		if g.state.CompareAndSwap(v, v+1) {
			return true
		}
	}
}

// shared waits for the gate; false if giveUp said so.
func (g *gate) shared(giveUp func() bool) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	for !g.tryShared() {
		if giveUp() {
			return false
		}
		g.cond.Wait()
	}
	return true
}

func (g *gate) releaseShared() {
	if g.state.Add(-1) == gateShut {
		g.wake()
	}
}

// exclusive takes the gate alone; false if giveUp said so.
func (g *gate) exclusive(giveUp func() bool) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.wanted++; g.wanted == 1 {
		g.state.Add(gateShut)
	}
	for g.alone || g.state.Load() != gateShut {
		if giveUp() {
			g.unwant()
			return false
		}
		g.cond.Wait()
	}
	g.alone = true
	return true
}

func (g *gate) releaseExclusive() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.alone = false
	g.unwant()
}

// unwant opens the gate when the last who wanted it alone is gone. Call with mu
// held.
func (g *gate) unwant() {
	if g.wanted--; g.wanted == 0 {
		g.state.Add(-gateShut)
	}
	g.cond.Broadcast()
}

// wake makes all who wait look again.
func (g *gate) wake() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.cond.Broadcast()
}
