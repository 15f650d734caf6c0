package host

import (
	"context"
	"fmt"

	"scoria/driver/block"
)

// Bounds of what an export or receive has under way on a device.
const (
	transferBytes = 1 << 20 // of one request
	transferDepth = 8       // requests
)

// transfer runs requests on a device, several at a time, for one goroutine, and
// hands them back in the order in which they were submitted.
type transfer struct {
	dev   block.Device
	queue []*pending // submitted, oldest first
	spare []*pending
}

// pending is a request under way with its buffer.
type pending struct {
	block.Request
	buf  []byte
	done chan struct{} // has room for the one completion
}

func newTransfer(dev block.Device) *transfer { return &transfer{dev: dev} }

// get returns a request to fill in, with room for a buffer of transferBytes. If
// transferDepth are under way, the oldest is awaited and given to finish first.
func (t *transfer) get(ctx context.Context, finish func(*pending) error) (*pending, error) {
	if len(t.queue) >= transferDepth {
		if err := t.next(ctx, finish); err != nil {
			return nil, err
		}
	}
	if n := len(t.spare); n > 0 {
		p := t.spare[n-1]
		t.spare = t.spare[:n-1]
		return p, nil
	}
	p := &pending{done: make(chan struct{}, 1)}
	p.Complete = func(*block.Request) { p.done <- struct{}{} }
	return p, nil
}

// buffer makes p's one segment n bytes long.
func (p *pending) buffer(n uint64) []byte {
	if p.buf == nil {
		p.buf = make([]byte, transferBytes)
	}
	p.Segments = [][]byte{p.buf[:n]}
	return p.buf[:n]
}

// submit starts p.
func (t *transfer) submit(p *pending, op block.Op, off, length uint64) {
	p.Op, p.Offset, p.Length, p.Err, p.Ended, p.Owner = op, off, length, nil, false, t
	if op != block.OpRead && op != block.OpWrite {
		p.Segments = nil
	}
	t.dev.Submit([]*block.Request{&p.Request})
	t.queue = append(t.queue, p)
}

// next awaits the oldest request and gives it to finish, if not nil. When ctx ends,
// what waits for room is canceled.
func (t *transfer) next(ctx context.Context, finish func(*pending) error) error {
	p := t.queue[0]
	if !p.Ended {
		select {
		case <-p.done:
		case <-ctx.Done():
			t.dev.Cancel(t)
			<-p.done
		}
	}
	t.queue = append(t.queue[:0], t.queue[1:]...)
	t.spare = append(t.spare, p)
	switch {
	case ctx.Err() != nil:
		return ctx.Err()
	case p.Err != nil:
		return fmt.Errorf("%s of %d bytes at %d: %w", p.Op, p.Length, p.Offset, p.Err)
	case finish != nil:
		return finish(p)
	}
	return nil
}

// drain awaits all that is under way; the first error counts.
func (t *transfer) drain(ctx context.Context, finish func(*pending) error) (err error) {
	for len(t.queue) > 0 {
		if e := t.next(ctx, finish); err == nil && e != nil {
			err, finish = e, nil
		}
	}
	return err
}
