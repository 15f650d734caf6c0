package asd

import (
	"context"
	"time"
)

// VerifyOptions of VerifyAll.
type VerifyOptions struct {
	Cursor         string // where to begin: "" or a Next of an earlier run
	BytesPerSecond int64  // 0: as fast as it goes
	// Progress, if set, is called after each stretch, from VerifyAll's goroutine,
	// with the sums so far; Bad holds only what the stretch found.
	Progress func(VerifyResult)
}

// verifyStretchBytes is what one call checks.
const verifyStretchBytes = 16 << 20

// VerifyAll reads and checks everything that an ASD stores from a cursor on and
// returns the sums, with all that is bad.
func VerifyAll(ctx context.Context, c Client, opts VerifyOptions) (VerifyResult, error) {
	sum := VerifyResult{Next: opts.Cursor}
	stretch := int64(verifyStretchBytes)
	if opts.BytesPerSecond > 0 {
		stretch = min(stretch, max(opts.BytesPerSecond/4, 1))
	}
	for {
		start := time.Now()
		res, err := c.Verify(ctx, VerifyRequest{Cursor: sum.Next, MaxBytes: stretch})
		if err != nil {
			return sum, err
		}
		sum.Next, sum.Done = res.Next, res.Done
		sum.Keys += res.Keys
		sum.Bytes += res.Bytes
		sum.Bad = append(sum.Bad, res.Bad...)
		if opts.Progress != nil {
			progress := sum
			progress.Bad = res.Bad
			opts.Progress(progress)
		}
		if res.Done {
			return sum, nil
		}
		if opts.BytesPerSecond > 0 {
			pause := time.Duration(float64(res.Bytes)/float64(opts.BytesPerSecond)*float64(time.Second)) - time.Since(start)
			if err := sleep(ctx, pause); err != nil {
				return sum, err
			}
		}
	}
}

func sleep(ctx context.Context, d time.Duration) error {
	if d <= 0 {
		return ctx.Err()
	}
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
