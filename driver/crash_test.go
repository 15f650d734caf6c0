package driver_test

import (
	"math"
	"math/rand/v2"
	"sync"
	"testing"
	"time"

	"scoria/alba/vfs"
	"scoria/driver"
)

// raced reduces what tests do under the race detector.
func raced(n, under int) int {
	if raceEnabled {
		return under
	}
	return n
}

// trap kills a file system at one of the next calls to it.
type trap struct {
	mu        sync.Mutex // held while the clone is made: nothing else happens meanwhile
	countdown int
	dead      chan death
	sprung    chan struct{} // closed then
}

// death is what was left, and the clock just before.
type death struct {
	clone *vfs.Mem
	at    int64
}

// setTrap has the file system die at the countdown-th call from now.
func (r *rig) setTrap(countdown int, clone func(*vfs.Mem) *vfs.Mem) *trap {
	tr := &trap{countdown: countdown, dead: make(chan death, 1), sprung: make(chan struct{})}
	fsys := r.fs
	fsys.SetHook(func(vfs.Op, string) error {
		tr.mu.Lock()
		defer tr.mu.Unlock()
		if tr.countdown--; tr.countdown == 0 {
			at := r.clock.Add(1)
			tr.dead <- death{clone(fsys), at}
			close(tr.sprung)
		}
		return nil
	})
	return tr
}

// disarm makes sure that nothing dies any more and reports whether it has.
func (tr *trap) disarm() (d death, died bool) {
	tr.mu.Lock()
	defer tr.mu.Unlock()
	if tr.countdown <= 0 {
		return <-tr.dead, true
	}
	tr.countdown = math.MaxInt
	return d, false
}

func (r *rig) killClone(fsys *vfs.Mem) *vfs.Mem {
	clone, err := fsys.KillClone()
	if err != nil {
		r.t.Error(err)
	}
	return clone
}

// dieWhileWorking lets a crew work and kills the daemon (or, with power, the
// host) at a random moment or at a random call to the disk.
func (r *rig) dieWhileWorking(power bool) int64 {
	r.t.Helper()
	crashRNG := rand.New(rand.NewPCG(r.rng.Uint64(), 2))
	clone := r.killClone
	if power {
		clone = func(fsys *vfs.Mem) *vfs.Mem {
			c := fsys.CrashClone(crashRNG)
			fsys.Kill()
			return c
		}
		r.boot++
	}
	var d death
	if r.rng.IntN(2) == 0 {
		c := r.hire(power || r.rng.IntN(2) == 0)
		time.Sleep(time.Duration(1+r.rng.IntN(20)) * time.Millisecond)
		d.at = r.clock.Add(1)
		d.clone = clone(r.fs)
		r.bury(c)
	} else {
		tr := r.setTrap(1+r.rng.IntN(300), clone)
		c := r.hire(true)
		d = wait(r.t, "the disk call that kills", tr.dead)
		r.bury(c)
	}
	r.fs = d.clone
	return d.at
}

// bury ends a dead engine and its crew.
func (r *rig) bury(c *crew) {
	r.t.Helper()
	c.stop.Store(true)
	c.cancel()
	over := make(chan struct{})
	go func() { c.wg.Wait(); close(over) }()
	doomUntil(r.t, r.eng, over)
	r.eng.Abandon()
}

// doomUntil ends the requests of a dead engine until its users have noticed.
func doomUntil(t *testing.T, eng *driver.Engine, over <-chan struct{}) {
	t.Helper()
	deadline := time.Now().Add(waitLimit)
	for {
		eng.Doom()
		select {
		case <-over:
			return
		case <-time.After(time.Millisecond):
		}
		if time.Now().After(deadline) {
			wait(t, "the users of a dead engine", over)
		}
	}
}

// dieWhileOpening opens the volume on a disk that dies at one of the first
// calls. It reports whether it did; if not the volume is open.
func (r *rig) dieWhileOpening() bool {
	r.t.Helper()
	tr := r.setTrap(1+r.rng.IntN(60), r.killClone)
	r.eng = nil
	err := r.tryStart()
	if err == nil {
		err = r.tryOpen()
	}
	if err == nil {
		time.Sleep(time.Duration(r.rng.IntN(1000)) * time.Microsecond)
	}
	d, died := tr.disarm()
	if !died {
		r.must(err)
		return false
	}
	if r.eng != nil {
		r.eng.Abandon()
	}
	r.fs = d.clone
	return true
}

// TestP3KillWhileWriting: whatever had been answered before the daemon was
// killed is there afterwards, again and again on the same disk, also when it is
// killed while it recovers, and survives a later flush and loss of power.
func TestP3KillWhileWriting(t *testing.T) {
	forStores(t, raced(12, 3), raced(3, 1), func(t *testing.T, k storeKind, rng *rand.Rand) {
		r := newRig(t, k, rng, 1024, int64(4+4*rng.IntN(3))).create()
		for range k.fewer(8, raced(8, 3)) {
			at := r.dieWhileWorking(false)
			open := false
			for range rng.IntN(4) {
				if open = !r.dieWhileOpening(); open {
					break
				}
			}
			if !open {
				r.reopen()
			}
			r.verify("P3", func(e *effect) bool { return e.end < at })
			r.check()
			if rng.IntN(2) == 0 {
				r.must(r.flush())
				cut := r.clock.Add(1)
				r.crash().reopen()
				r.verify("P1 after a kill", func(e *effect) bool { return e.end < cut })
				r.check()
			}
		}
		r.close()
	})
}

// TestP2PowerLossWhileWriting: with writers side by side, after a loss of power
// what was flushed is there, no cluster is torn, and no old value lies over a
// newer flushed one.
func TestP2PowerLossWhileWriting(t *testing.T) {
	forStores(t, raced(12, 3), raced(3, 1), func(t *testing.T, k storeKind, rng *rand.Rand) {
		r := newRig(t, k, rng, 1024, int64(4+4*rng.IntN(3))).create()
		for range 8 {
			at := r.dieWhileWorking(true)
			flushed := r.flushedBefore(at)
			r.reopen()
			r.verify("P1/P2", func(e *effect) bool { return e.end < flushed || e.fua && e.end < at })
			r.check()
		}
		r.close()
	})
}

// TestP3PoolFull: with a pool far smaller than what is written, on a slow disk,
// writers wait and nothing that was answered is lost by a kill.
func TestP3PoolFull(t *testing.T) {
	forStores(t, raced(4, 1), 1, func(t *testing.T, k storeKind, rng *rand.Rand) {
		r := newRig(t, k, rng, 4096, 4).create()
		for range 4 {
			r.fs.SetHook(func(op vfs.Op, _ string) error {
				if op == vfs.OpWrite {
					time.Sleep(200 * time.Microsecond)
				}
				return nil
			})
			c := r.newCrew()
			for range 4 {
				c.run("writer", rng.Uint64(), func(rng *rand.Rand) error {
					first, n := span(rng, 0, 4096, 300)
					return r.write(first, n, 0)
				})
			}
			eventually(t, "the pool is full", func() bool { return r.has("write-buffer-full") || r.has("throttled") })
			time.Sleep(time.Duration(rng.IntN(10)) * time.Millisecond)
			at := r.clock.Add(1)
			clone := r.killClone(r.fs)
			r.bury(c)
			r.fs = clone
			r.reopen()
			r.verify("P3", func(e *effect) bool { return e.end < at })
			r.check()
		}
		r.close()
	})
}

// killedAt kills the daemon at a call to the disk while life goes on, and leaves the rig on
// what it left. If life ends before, it was to take at least that many calls, and the rig
// is closed.
func (r *rig) killedAt(call, atLeast int, life func() error) (d death, died bool) {
	r.t.Helper()
	tr := r.setTrap(call, r.killClone)
	ended := make(chan struct{})
	var err error
	go func() { err = life(); close(ended) }()
	select {
	case <-ended:
	case <-tr.sprung:
		doomUntil(r.t, r.eng, ended)
	}
	d, died = tr.disarm()
	if !died {
		r.must(err)
		r.close()
		if call < atLeast {
			r.t.Fatalf("only %d calls were tried", call)
		}
		return d, false
	}
	r.eng.Abandon()
	r.fs = d.clone
	return d, true
}
