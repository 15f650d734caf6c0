package proxy

import (
	"os"
	"runtime/pprof"
	"testing"
	"time"
)

// TestHedges: what is not stopped is begun, not before its time, earliest first in
// whatever order it comes; what is stopped never is.
func TestHedges(t *testing.T) {
	var l hedges
	type begun struct {
		n  int
		at time.Time
	}
	c := make(chan begun, 100)
	start := time.Now()
	delay := func(n int) time.Duration { return time.Duration(n) * 3 * time.Millisecond }
	kept := 0
	var stopped []*hedge
	for _, n := range []int{9, 3, 6, 1, 8, 2, 7, 4, 5, 0} {
		h := l.after(delay(n), func() { c <- begun{n, time.Now()} })
		if n%3 == 2 {
			if l.stop(h) {
				stopped = append(stopped, h)
				continue
			}
		}
		kept++
	}
	limit := time.After(2 * time.Minute)
	for range kept {
		select {
		case b := <-c:
			if b.at.Sub(start) < delay(b.n) {
				t.Errorf("hedge %d was begun %v after the start, want %v at least", b.n, b.at.Sub(start), delay(b.n))
			}
		case <-limit:
			_ = pprof.Lookup("goroutine").WriteTo(os.Stderr, 2)
			t.Fatal("a hedge was not begun")
		}
	}
	// By the time of a later one, an earlier one that was stopped would be begun.
	last := make(chan struct{})
	l.after(30*time.Millisecond, func() { close(last) })
	select {
	case <-last:
	case <-limit:
		t.Fatal("the last hedge was not begun")
	}
	if len(c) > 0 {
		t.Error("a hedge that was stopped was begun")
	}
	for _, h := range stopped {
		if l.stop(h) {
			t.Error("a hedge was stopped twice")
		}
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.list) > 0 || !l.next.IsZero() {
		t.Errorf("%d hedges are left, the timer runs at %v", len(l.list), l.next)
	}
}
