package asdtest

import (
	"context"
	"fmt"
	"sync"
	"time"

	"scoria/alba/asd"
)

// Fault is how a Faulty treats calls. The zero value lets them pass.
type Fault struct {
	// Down: every call fails with asd.ErrUnavailable and has no effect.
	Down bool
	// Stopped: calls wait, without effect, until the fault changes or their
	// context ends, like those to a process that got SIGSTOP.
	Stopped bool
	// Full: an Apply that puts fails with asd.ErrFull.
	Full bool
	// Delay before each call.
	Delay time.Duration
	// LoseAnswers: an Apply is done and then fails with asd.ErrUnknownOutcome.
	LoseAnswers bool
	// Hook, if set, runs before each call that the above let pass; an error
	// becomes the call's. op is the method's name, key its (first) key.
	Hook func(op, key string) error
}

// Faulty wraps a Client and makes it misbehave as told. Safe from any goroutine.
type Faulty struct {
	asd.Client
	mu      sync.Mutex
	fault   Fault
	changed chan struct{}
}

// NewFaulty wraps a Client; it behaves at first.
func NewFaulty(c asd.Client) *Faulty { return &Faulty{Client: c, changed: make(chan struct{})} }

// Set changes the fault; calls that a Stopped holds look at the new one.
func (f *Faulty) Set(fault Fault) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.fault = fault
	close(f.changed)
	f.changed = make(chan struct{})
}

func (f *Faulty) current() (Fault, <-chan struct{}) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.fault, f.changed
}

// pass returns once the call may go on, with the fault that then held.
func (f *Faulty) pass(ctx context.Context, op, key string) (Fault, error) {
	for {
		fault, changed := f.current()
		switch {
		case fault.Down:
			return fault, fmt.Errorf("%s: %w: down", op, asd.ErrUnavailable)
		case fault.Stopped:
			select {
			case <-changed:
				continue
			case <-ctx.Done():
				return fault, ctx.Err()
			}
		}
		if fault.Delay > 0 {
			timer := time.NewTimer(fault.Delay)
			select {
			case <-timer.C:
			case <-ctx.Done():
				timer.Stop()
				return fault, ctx.Err()
			}
		}
		if fault.Hook != nil {
			return fault, fault.Hook(op, key)
		}
		return fault, nil
	}
}

func first(keys []string) string {
	if len(keys) == 0 {
		return ""
	}
	return keys[0]
}

// Get implements asd.Client.
func (f *Faulty) Get(ctx context.Context, key string, pri asd.Priority) (asd.Value, error) {
	if _, err := f.pass(ctx, "Get", key); err != nil {
		return asd.Value{}, err
	}
	return f.Client.Get(ctx, key, pri)
}

// MultiGet implements asd.Client.
func (f *Faulty) MultiGet(ctx context.Context, keys []string, pri asd.Priority) ([]asd.Result, error) {
	if _, err := f.pass(ctx, "MultiGet", first(keys)); err != nil {
		return nil, err
	}
	return f.Client.MultiGet(ctx, keys, pri)
}

// ReadAt implements asd.Client.
func (f *Faulty) ReadAt(ctx context.Context, key string, p []byte, off int64, pri asd.Priority) (asd.ReadInfo, error) {
	if _, err := f.pass(ctx, "ReadAt", key); err != nil {
		return asd.ReadInfo{}, err
	}
	return f.Client.ReadAt(ctx, key, p, off, pri)
}

// Range implements asd.Client.
func (f *Faulty) Range(ctx context.Context, req asd.RangeRequest, pri asd.Priority) (asd.RangeResult, error) {
	if _, err := f.pass(ctx, "Range", req.From); err != nil {
		return asd.RangeResult{}, err
	}
	return f.Client.Range(ctx, req, pri)
}

// Exists implements asd.Client.
func (f *Faulty) Exists(ctx context.Context, keys []string, pri asd.Priority) ([]asd.Info, error) {
	if _, err := f.pass(ctx, "Exists", first(keys)); err != nil {
		return nil, err
	}
	return f.Client.Exists(ctx, keys, pri)
}

// Apply implements asd.Client.
func (f *Faulty) Apply(ctx context.Context, asserts []asd.Assert, updates []asd.Update, pri asd.Priority) error {
	key, puts := "", false
	for i := range updates {
		if i == 0 {
			key = updates[i].Key
		}
		puts = puts || updates[i].Kind == asd.KindPut
	}
	fault, err := f.pass(ctx, "Apply", key)
	if err != nil {
		return err
	}
	if fault.Full && puts {
		return fmt.Errorf("apply: %w", asd.ErrFull)
	}
	err = f.Client.Apply(ctx, asserts, updates, pri)
	if err == nil && fault.LoseAnswers {
		return fmt.Errorf("apply: %w: the answer was lost", asd.ErrUnknownOutcome)
	}
	return err
}

// Epochs implements asd.Client.
func (f *Faulty) Epochs(ctx context.Context, after string) ([]asd.NamespaceEpoch, bool, error) {
	if _, err := f.pass(ctx, "Epochs", after); err != nil {
		return nil, false, err
	}
	return f.Client.Epochs(ctx, after)
}

// Verify implements asd.Client.
func (f *Faulty) Verify(ctx context.Context, req asd.VerifyRequest) (asd.VerifyResult, error) {
	if _, err := f.pass(ctx, "Verify", req.Cursor); err != nil {
		return asd.VerifyResult{}, err
	}
	return f.Client.Verify(ctx, req)
}

// Stats implements asd.Client.
func (f *Faulty) Stats(ctx context.Context) (asd.Stats, error) {
	fault, err := f.pass(ctx, "Stats", "")
	if err != nil {
		return asd.Stats{}, err
	}
	s, err := f.Client.Stats(ctx)
	s.Full = s.Full || fault.Full
	return s, err
}
