package worker

import "testing"

// A worker gives its CPU away after each signal as long as that brings work, and
// hardly ever when it is in vain or takes the worker away for long.
func TestGiveWayAdapts(t *testing.T) {
	var g giveWay
	run := func(times int, after func()) (given int) {
		for range times {
			g.due = true // a queue has signalled
			if g.now() {
				given++
				g.took(1000)
				after()
			}
			g.vain() // the next pass that finds nothing
		}
		return given
	}
	if g.now() {
		t.Fatal("gives its CPU away although nobody was signalled")
	}
	if given := run(1000, g.found); given != 1000 {
		t.Fatalf("gave way %d times of 1000 although it always paid", given)
	}
	if given := run(100_000, func() {}); given > 50 {
		t.Fatalf("gave way %d times of 100000 in vain", given)
	}
	if given := run(10*maxGivePause, g.found); given < 8*maxGivePause {
		t.Fatalf("gave way %d times of %d after it had become worth it", given, 10*maxGivePause)
	}
	given := run(100_000, func() { g.took(givenTooLong + 1); g.found() })
	if given > 50 {
		t.Fatalf("gave way %d times of 100000 although it took the CPU for long", given)
	}
}
