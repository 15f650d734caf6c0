package proxy

import (
	"errors"
	"testing"
	"time"
)

// TestHedgeAdapts: how long a read waits before others are asked follows the device's
// own small reads, within bounds.
func TestHedgeAdapts(t *testing.T) {
	var h health
	if got := h.hedge(); got != hedgeStart {
		t.Errorf("%v before the first read, want %v", got, hedgeStart)
	}
	settle := func(took time.Duration) time.Duration {
		for range 200 {
			h.ok(took)
		}
		return h.hedge()
	}
	if got := settle(10 * time.Microsecond); got != hedgeMin {
		t.Errorf("%v for a device that always answers in 10 µs, want the least, %v", got, hedgeMin)
	}
	slow := settle(40 * time.Millisecond)
	if slow < 40*time.Millisecond || slow > 50*time.Millisecond {
		t.Errorf("%v for a device that always answers in 40 ms", slow)
	}
	for range 200 {
		h.ok(20 * time.Millisecond)
		h.ok(60 * time.Millisecond)
	}
	if got := h.hedge(); got < 90*time.Millisecond {
		t.Errorf("%v for 20 or 60 ms in turns: must allow for the spread, steady it was %v", got, slow)
	}
	if got := settle(time.Minute); got != hedgeMax {
		t.Errorf("%v for a device that takes a minute, want the most, %v", got, hedgeMax)
	}
	h.ok(0) // no small read
	if got := h.latency(); got < 59*time.Second {
		t.Errorf("what is no small read changed the mean to %v", got)
	}
}

// TestBackOff: a device that fails is left alone for a time that doubles up to a bound,
// failures at the same time count once, late answers count when several come in a row,
// and one success makes up for all.
func TestBackOff(t *testing.T) {
	var h health
	now := time.Unix(1000, 0)
	began := now
	gone := errors.New("gone")
	for wait := firstBackoff; ; wait = min(2*wait, maxBackoff) {
		h.failed(now, gone)
		h.failed(now, gone) // of a request that was under way
		if h.up(now.Add(wait-1)) || !h.up(now.Add(wait)) {
			t.Fatalf("after a failure it is not left alone for %v", wait)
		}
		now = now.Add(wait)
		if wait == maxBackoff {
			break
		}
	}
	if reason, since := h.down(); reason != "gone" || !since.Equal(began) || !errors.Is(h.lastError(), gone) {
		t.Errorf("down because of %q since %v", reason, since)
	}
	h.ok(0)
	if reason, _ := h.down(); reason != "" || !h.up(now) {
		t.Errorf("after a success it is down: %q", reason)
	}
	for i := range lateLimit {
		if reason, _ := h.down(); reason != "" {
			t.Fatalf("down after %d late answers", i)
		}
		h.hedged(now)
	}
	if reason, _ := h.down(); reason == "" || h.up(now) {
		t.Error("up after many late answers")
	}
}
