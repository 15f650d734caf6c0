package worker

// giveWay decides when a worker lets others have its CPU before it asks for
// kicks. A client that shares the CPU and has just been signalled runs only then;
// what it adds meanwhile is found without a kick and without a sleep, which saves
// two of four system calls at depth 1. Where nobody waits for this CPU the call
// returns at once and has been in vain; where somebody uses it up, the worker is
// away from all its queues for too long. Both make the next attempts rarer.
// It belongs to the worker.
type giveWay struct {
	due   bool // a client was signalled since the last time
	tried bool // the CPU was given away and nothing has been found yet
	skip  int  // times that are left out
	pause int  // times left out after the last failure
}

const (
	// givenTooLong, in ns, is more than a client needs to take its answers and
	// to add new requests.
	givenTooLong = 50_000
	// maxGivePause bounds the times left out, so that a client that moves to
	// this CPU is noticed.
	maxGivePause = 1 << 12
)

// now reports whether to give the CPU away.
func (g *giveWay) now() bool {
	if !g.due {
		return false
	}
	g.due = false
	if g.skip > 0 {
		g.skip--
		return false
	}
	return true
}

// took says how many ns the CPU was away.
func (g *giveWay) took(ns int64) {
	if g.tried = true; ns > givenTooLong {
		g.failed()
	}
}

// found says that a queue had work.
func (g *giveWay) found() {
	if g.tried {
		g.tried, g.pause = false, 0
	}
}

// vain says that no queue had work.
func (g *giveWay) vain() {
	if g.tried {
		g.failed()
	}
}

func (g *giveWay) failed() {
	g.tried = false
	g.pause = min(2*g.pause+1, maxGivePause)
	g.skip = g.pause
}
