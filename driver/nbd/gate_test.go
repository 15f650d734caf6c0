package nbd

import (
	"sync"
	"sync/atomic"
	"testing"
)

func TestGateKeepsExclusiveApart(t *testing.T) {
	var g gate
	g.init()
	never := func() bool { return false }
	var shared, alone atomic.Int64
	var wg sync.WaitGroup
	defer watchdog("the end of all holders")()
	for i := range 8 {
		wg.Go(func() {
			for n := range 2000 {
				if (n+i)%10 == 0 {
					g.exclusive(never)
					if alone.Add(1) != 1 || shared.Load() != 0 {
						t.Error("not alone")
					}
					alone.Add(-1)
					g.releaseExclusive()
					continue
				}
				if !g.tryShared() {
					g.shared(never)
				}
				shared.Add(1)
				if alone.Load() != 0 {
					t.Error("shared with one who is alone")
				}
				shared.Add(-1)
				g.releaseShared()
			}
		})
	}
	wg.Wait()
	if v := g.state.Load(); v != 0 {
		t.Errorf("state %#x after all releases", v)
	}
}

func TestGateGivesUp(t *testing.T) {
	var g gate
	g.init()
	if !g.tryShared() {
		t.Fatal("a fresh gate is shut")
	}
	var stop atomic.Bool
	got := make(chan bool)
	go func() { got <- g.exclusive(stop.Load) }()
	await("the wish to be alone", func() bool { return g.state.Load() >= gateShut })
	if g.tryShared() {
		t.Error("shared while somebody waits to be alone")
	}
	go func() { got <- g.shared(stop.Load) }()
	stop.Store(true)
	defer watchdog("giving up")()
	g.wake()
	for range 2 {
		// The one that gives up last may find the gate open; it asked to share.
		if <-got {
			g.releaseShared()
		}
	}
	g.releaseShared()
	if v := g.state.Load(); v != 0 {
		t.Errorf("state %#x after all releases", v)
	}
}
