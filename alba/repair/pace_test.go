package repair

import (
	"context"
	"testing"
	"time"
)

// fakePace is a pace whose clock moves only when it sleeps.
func fakePace(rate int64, busy func(now time.Time) bool) (*pace, *time.Time) {
	now := time.Unix(1000, 0)
	p := &pace{rate: rate, now: func() time.Time { return now }}
	p.sleep = func(ctx context.Context, d time.Duration) error {
		now = now.Add(d)
		return ctx.Err()
	}
	if busy != nil {
		p.busy = func() bool { return busy(now) }
	}
	return p, &now
}

// TestPaceRate: at a rate the time that was granted adds up to what was moved.
func TestPaceRate(t *testing.T) {
	p, now := fakePace(1<<20, nil)
	begun := *now
	for range 4 {
		if err := p.wait(t.Context(), 1<<14, unhurried); err != nil {
			t.Fatal(err)
		}
	}
	// The last one waits for the three before it.
	if took := now.Sub(begun); took != 3*time.Second/64 {
		t.Errorf("64 KiB at 1 MiB/s were granted after %v", took)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := p.wait(ctx, 1<<30, unhurried); err == nil {
		t.Error("granted after the end")
	}
}

// TestPaceYields: while guests wait, maintenance moves its floor and no more, the
// more the fewer disks an object can lose; it goes on at once when they don't.
func TestPaceYields(t *testing.T) {
	const chunk, chunks = 8 << 20, 100
	took := map[int]time.Duration{}
	for _, spare := range []int{-1, 0, 1, 2, unhurried} {
		p, now := fakePace(0, func(time.Time) bool { return true })
		begun := *now
		for range chunks {
			if err := p.wait(t.Context(), chunk, spare); err != nil {
				t.Fatal(err)
			}
		}
		took[spare] = now.Sub(begun)
		if want := time.Duration(float64(chunks*chunk) / float64(floor(spare)) * float64(time.Second)); took[spare] != want {
			t.Errorf("spare %d: %v for %d bytes, want %v: the floor's rate", spare, took[spare], chunks*chunk, want)
		}
		if p.waited() != took[spare] {
			t.Errorf("spare %d: waited %v by its own account, %v by the clock", spare, p.waited(), took[spare])
		}
	}
	if !(took[0] < took[1] && took[1] < took[2] && took[-1] == took[0] && took[2] == took[unhurried]) {
		t.Errorf("the riskiest are not the fastest: %v", took)
	}
}

// TestPaceEnds: a pause ends when guests no longer wait, and is never longer than
// busyMost, whatever is to be moved and however long they wait.
func TestPaceEnds(t *testing.T) {
	until := time.Unix(1001, 0)
	p, now := fakePace(0, func(now time.Time) bool { return now.Before(until) })
	if err := p.wait(t.Context(), 1<<30, unhurried); err != nil || now.Sub(until) > busyLook || now.Before(until) {
		t.Errorf("went on at %v, guests waited until %v: %v", now, until, err)
	}
	at := *now
	if err := p.wait(t.Context(), 1<<30, unhurried); err != nil || *now != at {
		t.Errorf("waited %v for guests that don't: %v", now.Sub(at), err)
	}
	p, now = fakePace(0, func(time.Time) bool { return true })
	at = *now
	if err := p.wait(t.Context(), 1<<40, unhurried); err != nil || now.Sub(at) != busyMost {
		t.Errorf("a terabyte was granted after %v, want %v: %v", now.Sub(at), busyMost, err)
	}
	at = *now
	if err := p.wait(t.Context(), 0, unhurried); err != nil || now.Sub(at) != busyLook {
		t.Errorf("a step without data was granted after %v, want %v: %v", now.Sub(at), busyLook, err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := p.wait(ctx, 1<<30, 0); err == nil {
		t.Error("granted after the end")
	}
}
