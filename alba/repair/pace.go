package repair

import (
	"context"
	"sync"
	"time"
)

// How maintenance gives way to guests. While they wait, it moves no more than a
// floor that depends on what is at stake: an object that the next lost disk
// destroys is worth a guest's patience, a tidier distribution is not. The floors are
// what keeps a host that is always busy from never being repaired.
const (
	floorLast  = 64 << 20 // bytes per second: no more disk may be lost
	floorSpare = 16 << 20 // one more may be lost
	floorRest  = 2 << 20  // all else: moves, upgrades, verification, orphans

	busyLook = 100 * time.Millisecond // between looks whether guests still wait
	busyMost = 10 * time.Second       // of one pause, well within a job's lease
)

// unhurried is the spare of work that no lost disk makes urgent.
const unhurried = 1 << 10

// floor is the bytes per second that go on while guests wait, for objects that can
// lose so many more devices.
func floor(spare int) int64 {
	switch {
	case spare <= 0:
		return floorLast
	case spare == 1:
		return floorSpare
	}
	return floorRest
}

// pace limits the rate of maintenance. The lock is a leaf.
type pace struct {
	rate int64       // bytes per second; 0: no limit
	busy func() bool // nil: guests never wait
	now  func() time.Time
	// sleep returns early with an error when ctx ends.
	sleep func(ctx context.Context, d time.Duration) error

	mu     sync.Mutex
	free   time.Time // when what was moved so far is paid for
	paused time.Duration
}

// wait returns when n more bytes of an object with that spare may be moved.
func (p *pace) wait(ctx context.Context, n int64, spare int) error {
	var delay time.Duration
	if p.rate > 0 {
		p.mu.Lock()
		now := p.now()
		if p.free.Before(now) {
			p.free = now
		}
		delay = p.free.Sub(now)
		p.free = p.free.Add(time.Duration(float64(n) / float64(p.rate) * float64(time.Second)))
		p.mu.Unlock()
	}
	if delay > 0 {
		if err := p.sleep(ctx, delay); err != nil {
			return err
		}
	}
	if p.busy == nil {
		return ctx.Err()
	}
	longest := time.Duration(float64(n) / float64(floor(spare)) * float64(time.Second))
	longest = min(busyMost, max(busyLook, longest))
	for waited := time.Duration(0); waited < longest && p.busy(); {
		step := min(busyLook, longest-waited)
		if err := p.sleep(ctx, step); err != nil {
			return err
		}
		waited += step
		p.mu.Lock()
		p.paused += step
		p.mu.Unlock()
	}
	return ctx.Err()
}

// waited is how long maintenance has given way to guests, all jobs together.
func (p *pace) waited() time.Duration {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.paused
}

func sleep(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
