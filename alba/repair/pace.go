package repair

import (
	"context"
	"sync"
	"time"
)

const (
	busyWait = 100 * time.Millisecond
	busyMost = 2 * time.Second // a busy host gets its disks repaired too, slowly
)

// pace limits the rate of maintenance. The lock is a leaf.
type pace struct {
	rate int64 // bytes per second; 0: no limit
	busy func() bool

	mu   sync.Mutex
	free time.Time // when what was moved so far is paid for
}

// wait returns when n more bytes may be moved.
func (p *pace) wait(ctx context.Context, n int64) error {
	var delay time.Duration
	if p.rate > 0 {
		p.mu.Lock()
		now := time.Now()
		if p.free.Before(now) {
			p.free = now
		}
		delay = p.free.Sub(now)
		p.free = p.free.Add(time.Duration(float64(n) / float64(p.rate) * float64(time.Second)))
		p.mu.Unlock()
	}
	if err := sleep(ctx, delay); err != nil {
		return err
	}
	for waited := time.Duration(0); p.busy != nil && waited < busyMost && p.busy(); waited += busyWait {
		if err := sleep(ctx, busyWait); err != nil {
			return err
		}
	}
	return ctx.Err()
}

func sleep(ctx context.Context, d time.Duration) error {
	if d <= 0 {
		return ctx.Err()
	}
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
