package driver

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"

	"scoria/driver/block"
	"scoria/driver/lba"
)

// A request that needs what only the store has waits for a store that fails or
// does not answer, as long as it takes (P8): it is asked again and again. It ends
// early when its owner cancels it or the volume begins to close. What the store
// answers, that an object is not there, is too short or is lost (lost.go), is not
// waited for; nor does background work wait, which comes round by itself.

// Pauses between two attempts; slowRead is after how long an answer that does not
// come is reported.
const (
	minStorePause = 100 * time.Millisecond
	maxStorePause = 5 * time.Second
	slowRead      = 5 * time.Second
)

// storeError is a store's failure to answer: asking again may help.
type storeError struct{ err error }

func (e *storeError) Error() string { return "store: " + e.err.Error() }
func (e *storeError) Unwrap() error { return e.err }

// unanswered marks what a read of the store failed with, unless it is an answer.
func unanswered(err error) error {
	for _, answer := range []error{nil, ErrNoObject, ErrStaleEpoch, io.ErrUnexpectedEOF, io.EOF} {
		if errors.Is(err, answer) {
			return err
		}
	}
	return &storeError{err}
}

// forRequest is the context of the work for a request of owner. It ends when the
// volume begins to close.
func (v *Volume) forRequest(owner any) context.Context {
	return &requestCtx{v.ckpt.work, v, owner}
}

type requestCtx struct {
	context.Context
	v     *Volume // that the request came to; the work may be an ancestor's
	owner any
}

type requestKey struct{}

func (c *requestCtx) Value(key any) any {
	if key == (requestKey{}) {
		return c
	}
	return c.Context.Value(key)
}

func requestOf(ctx context.Context) *requestCtx {
	c, _ := ctx.Value(requestKey{}).(*requestCtx)
	return c
}

// interruptible returns a context that also ends when the owner of the request
// gives up. It is for the time of a wait; outside one a request costs no
// bookkeeping. For other work it is ctx itself.
func interruptible(ctx context.Context) (context.Context, func()) {
	c := requestOf(ctx)
	if c == nil {
		return ctx, func() {}
	}
	ctx, cancel := context.WithCancelCause(ctx)
	w := &storeWaiter{c.owner, cancel}
	c.v.storeWaits.enter(w)
	return ctx, func() {
		c.v.storeWaits.leave(w)
		cancel(nil)
	}
}

// interrupted says why a wait ended with an error: because of the context, which
// interruptible made, or because of err. It is a context.Canceled besides, so that
// others who shared what was waited for go on.
func interrupted(ctx context.Context, err error) error {
	switch {
	case err == nil || ctx.Err() == nil || requestOf(ctx) == nil:
		return err
	case errors.Is(context.Cause(ctx), block.ErrCanceled):
		return fmt.Errorf("%w: %w", block.ErrCanceled, context.Canceled)
	}
	return fmt.Errorf("%w: %w", block.ErrClosed, context.Canceled)
}

// storeWaiter is a request that waits.
type storeWaiter struct {
	owner  any
	cancel context.CancelCauseFunc
}

// storeWaits are the requests of a volume that wait for the store. mu is a leaf.
type storeWaits struct {
	mu       sync.Mutex
	m        map[*storeWaiter]struct{}
	troubled int // how many know that something is wrong
}

func (s *storeWaits) enter(w *storeWaiter) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.m == nil {
		s.m = map[*storeWaiter]struct{}{}
	}
	s.m[w] = struct{}{}
}

func (s *storeWaits) leave(w *storeWaiter) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.m, w)
}

func (s *storeWaits) cancel(owner any) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for w := range s.m {
		if w.owner == owner {
			w.cancel(block.ErrCanceled)
		}
	}
}

// trouble raises the condition that requests wait, for one of them; calm takes it
// back when none is left that knows of any.
func (v *Volume) trouble(why string) (calm func()) {
	s := &v.storeWaits
	s.mu.Lock()
	s.troubled++
	s.mu.Unlock()
	v.waitsForStore(why)
	return func() {
		s.mu.Lock()
		s.troubled--
		last := s.troubled == 0
		s.mu.Unlock()
		if last {
			v.settle("store-unreadable")
		}
	}
}

func (v *Volume) waitsForStore(why string) {
	v.raise("store-unreadable", "requests wait for data that only the store has: %s; it is asked again until it answers", why)
}

// askStore is one read of the store. For a request, one that takes long shows.
func askStore(ctx context.Context, read func(ctx context.Context) error) error {
	c := requestOf(ctx)
	if c == nil {
		return unanswered(read(ctx))
	}
	ctx, leave := interruptible(ctx)
	defer leave()
	var calm func()
	reported := make(chan struct{})
	timer := time.AfterFunc(slowRead, func() {
		defer close(reported)
		calm = c.v.trouble(fmt.Sprintf("it has not answered for %v", slowRead))
	})
	err := read(ctx)
	if !timer.Stop() {
		<-reported
		calm()
	}
	if err != nil && ctx.Err() != nil {
		return interrupted(ctx, err)
	}
	return unanswered(err)
}

// patiently carries out work for a request, again and again while the store does
// not answer. For other contexts it does so until they end.
func (v *Volume) patiently(ctx context.Context, work func(ctx context.Context) error) error {
	err := work(ctx)
	var failed *storeError
	if !errors.As(err, &failed) {
		return err
	}
	if lost := beyondRepair(ctx, err); lost != nil {
		return lost
	}
	calm := v.trouble(failed.Error())
	defer calm()
	for pause := minStorePause; ; pause = min(2*pause, maxStorePause) {
		if err := pauseFor(ctx, pause); err != nil {
			return err
		}
		if err := v.usable(); err != nil {
			return err
		}
		if err = work(ctx); !errors.As(err, &failed) {
			return err
		}
		if lost := beyondRepair(ctx, err); lost != nil {
			return lost
		}
		v.waitsForStore(failed.Error())
	}
}

// loadPatiently is load, waiting for the store.
func (v *Volume) loadPatiently(ctx context.Context, m *lba.Map, first, n uint64) error {
	return v.patiently(ctx, func(ctx context.Context) error { return v.load(ctx, m, first, n) })
}

// pauseFor sleeps, unless ctx ends or the request is given up.
func pauseFor(ctx context.Context, pause time.Duration) error {
	ctx, leave := interruptible(ctx)
	defer leave()
	timer := time.NewTimer(pause)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return interrupted(ctx, ctx.Err())
	}
}
