package remote

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"time"

	"scoria/alba/asd"
	"scoria/alba/wire"

	"golang.org/x/sync/semaphore"
)

// serverConn is one connection of a Server.
type serverConn struct {
	s        *Server
	c        net.Conn
	in       *waitReader
	r        *bufio.Reader // of in; the reader's
	ctx      context.Context
	stop     context.CancelFunc
	slots    chan struct{} // one per request under way
	requests *semaphore.Weighted
	answers  *semaphore.Weighted
	out      *sender
	handlers sync.WaitGroup // readers and handlers
	ended    chan error     // of capacity 1: why nothing is read any more
	inline   inline

	mu     sync.Mutex
	cancel map[uint64]context.CancelFunc // requests under way
}

// serve does the handshake, then serves requests until the connection ends. The
// error is nil if the peer closed it between frames.
func (s *Server) serve(c net.Conn, crowded bool) error {
	if err := c.SetDeadline(time.Now().Add(s.opts.FrameTimeout)); err != nil {
		return err
	}
	if err := s.handshake(c, crowded); err != nil {
		return err
	}
	if err := c.SetDeadline(time.Time{}); err != nil {
		return err
	}
	ctx, stop := context.WithCancel(s.ctx)
	sc := &serverConn{
		s: s, c: c, in: newWaitReader(c), ctx: ctx, stop: stop,
		slots:    make(chan struct{}, s.opts.MaxRequests),
		requests: semaphore.NewWeighted(s.opts.ConnBytes), answers: semaphore.NewWeighted(s.opts.ConnBytes),
		out:    newSender(c, s.opts.MaxRequests, s.opts.WriteTimeout),
		ended:  make(chan error, 1),
		cancel: make(map[uint64]context.CancelFunc),
	}
	sc.r = bufio.NewReaderSize(sc.in, 64<<10)
	sc.inline.timer = time.AfterFunc(time.Hour, sc.watch)
	sc.inline.timer.Stop()
	var writer sync.WaitGroup
	writer.Go(func() {
		if err := sc.out.run(ctx.Done()); err != nil {
			sc.fail(err)
		}
	})
	sc.handlers.Go(sc.read)
	err := <-sc.ended
	stop()
	_ = c.Close()
	sc.inline.end()
	sc.handlers.Wait()
	writer.Wait()
	if errors.Is(err, io.EOF) {
		return nil
	}
	return err
}

// fail ends the connection, which the reader notices.
func (sc *serverConn) fail(error) {
	_ = sc.c.Close()
	sc.stop()
}

func (s *Server) handshake(c net.Conn, crowded bool) error {
	b := make([]byte, wire.HelloBytes)
	if _, err := io.ReadFull(c, b); err != nil {
		return fmt.Errorf("hello: %w", err)
	}
	hello, err := wire.DecodeHello(b)
	if err != nil {
		return err
	}
	w := wire.Welcome{MaxRequests: uint32(s.opts.MaxRequests), ID: s.id, Version: min(hello.Highest, wire.MaxVersion)}
	switch {
	case w.Version < wire.MinVersion || w.Version < hello.Lowest:
		w.Version, w.Status = 0, wire.NoCommonVersion
	case hello.Want != [16]byte{} && hello.Want != s.id:
		w.Status = wire.OtherASD
	case crowded:
		w.Status = wire.TooManyConnections
	}
	if _, err := c.Write(w.Encode()); err != nil {
		return fmt.Errorf("welcome: %w", err)
	}
	if w.Status != wire.Welcomed {
		return fmt.Errorf("not welcome: %v", w.Status)
	}
	return nil
}

// read is the reader: it takes requests from the connection, as fast as the limits
// allow, until that ends or, while it was busy with a request, another took its place.
func (sc *serverConn) read() {
	head := make([]byte, wire.HeaderBytes)
	for {
		sc.in.waited = false
		h, err := readHeader(sc.r, head)
		if err == nil {
			sc.inline.arrived(sc.in.waited)
			cost := int64(wire.HeaderBytes) + int64(h.Body) + int64(h.Data)
			if err = sc.admit(cost); err == nil {
				if err = sc.take(&h, cost); err != nil && err != errReplaced {
					sc.dismiss(cost)
				}
			}
		}
		switch err {
		case nil:
		case errReplaced:
			return
		default:
			sc.ended <- err
			return
		}
	}
}

// take reads the rest of an admitted request and begins it. On an error other than
// errReplaced the caller dismisses it.
func (sc *serverConn) take(h *wire.Header, cost int64) error {
	// What is here already needs no deadline.
	here := int64(sc.r.Buffered()) >= int64(h.Body)+int64(h.Data)
	if !here {
		if err := sc.c.SetReadDeadline(time.Now().Add(sc.s.opts.FrameTimeout)); err != nil {
			return err
		}
	}
	req, data, err := readRequest(sc.r, h)
	if err != nil {
		return fmt.Errorf("frame of %d bytes: %w", cost, err)
	}
	if !here {
		if err := sc.c.SetReadDeadline(time.Time{}); err != nil {
			return err
		}
	}
	return sc.begin(&req, data, cost)
}

// admit waits for room for a request.
func (sc *serverConn) admit(cost int64) error {
	select {
	case sc.slots <- struct{}{}:
	case <-sc.ctx.Done():
		return sc.ctx.Err()
	}
	if err := sc.requests.Acquire(sc.ctx, cost); err != nil {
		return err
	}
	return sc.s.requests.Acquire(sc.ctx, cost)
}

func (sc *serverConn) dismiss(cost int64) {
	sc.s.requests.Release(cost)
	sc.requests.Release(cost)
	<-sc.slots
}

// begin starts a request's goroutine, or does what needs none.
func (sc *serverConn) begin(req *wire.Request, data *buffer, cost int64) error {
	switch req.Op {
	case wire.OpCancel:
		sc.mu.Lock()
		if cancel := sc.cancel[req.ID]; cancel != nil {
			cancel()
		}
		sc.mu.Unlock()
		data.free()
		sc.dismiss(cost)
		return nil
	case wire.OpPing:
		data.free()
		sc.send(&wire.Answer{ID: req.ID, Op: req.Op}, func() { sc.dismiss(cost) })
		return nil
	}
	var ctx context.Context
	var cancel context.CancelFunc
	if req.Deadline > 0 {
		ctx, cancel = context.WithTimeout(sc.ctx, time.Duration(req.Deadline)*time.Millisecond)
	} else {
		ctx, cancel = context.WithCancel(sc.ctx)
	}
	sc.mu.Lock()
	_, twice := sc.cancel[req.ID]
	if !twice {
		sc.cancel[req.ID] = cancel
	}
	sc.mu.Unlock()
	if twice {
		cancel()
		return fmt.Errorf("%w: two requests of number %d at once", wire.ErrProtocol, req.ID)
	}
	do := func() {
		answer, release := sc.handle(ctx, req)
		sc.mu.Lock()
		delete(sc.cancel, req.ID)
		sc.mu.Unlock()
		cancel()
		data.free() // the backend is done with it
		sc.send(answer, func() {
			release()
			sc.dismiss(cost)
		})
	}
	alone := len(sc.slots) == 1
	if quick(req) && sc.inline.may(alone) {
		return sc.doInline(do)
	}
	sc.handlers.Go(do)
	return nil
}

// send hands an answer to the sender; release is called when it is written or
// never will be.
func (sc *serverConn) send(a *wire.Answer, release func()) {
	frame, data := a.Encode()
	if err := sc.out.send(&outgoing{frame: frame, data: data, written: release}); err != nil {
		sc.fail(err)
	}
}

// reserve takes bytes for an answer from both pools.
func (sc *serverConn) reserve(ctx context.Context, n int64) (release func(), err error) {
	if err := sc.answers.Acquire(ctx, n); err != nil {
		return nil, err
	}
	if err := sc.s.answers.Acquire(ctx, n); err != nil {
		sc.answers.Release(n)
		return nil, err
	}
	return func() {
		sc.s.answers.Release(n)
		sc.answers.Release(n)
	}, nil
}

// handle does a request. release gives back what the answer holds.
func (sc *serverConn) handle(ctx context.Context, req *wire.Request) (a *wire.Answer, release func()) {
	a = &wire.Answer{ID: req.ID, Op: req.Op}
	release = func() {}
	b := sc.s.backend
	switch req.Op {
	case wire.OpReadAt:
		return a, sc.readBlocks(ctx, req, a)
	case wire.OpGet, wire.OpMultiGet:
		return a, sc.get(ctx, req, a)
	case wire.OpExists:
		a.Infos, a.Err = b.Exists(ctx, req.Keys, req.Priority)
	case wire.OpRange:
		var res asd.RangeResult
		res, a.Err = b.Range(ctx, req.Range, req.Priority)
		a.Infos, a.More = res.Infos, res.More
	case wire.OpApply:
		a.Err = b.Apply(ctx, req.Asserts, req.Updates, req.Priority)
	case wire.OpEpochs:
		a.Epochs, a.More, a.Err = b.Epochs(ctx, req.After)
	case wire.OpVerify:
		a.Verify, a.Err = b.Verify(ctx, req.Verify)
	case wire.OpStats:
		a.Stats, a.Err = b.Stats(ctx)
	}
	return a, release
}

// readBlocks answers a read.
func (sc *serverConn) readBlocks(ctx context.Context, req *wire.Request, a *wire.Answer) (release func()) {
	if a.Err = asd.CheckSpan(req.Keys[0], req.Off, req.Size); a.Err != nil {
		return func() {}
	}
	// The blocks at both ends may be larger than what was asked for, most have
	// the usual size.
	room := min(req.Size+2*asd.DefaultBlockSize, asd.MaxValueBytes)
	unreserve, err := sc.reserve(ctx, room+2*asd.DefaultBlockSize)
	if err != nil {
		a.Err = err
		return func() {}
	}
	buf := newBuffer(int(room))
	a.Data, a.Read, a.Err = sc.s.backend.ReadBlocks(ctx, req.Keys[0], buf.b, req.Off, req.Size, req.Priority)
	return func() {
		buf.free()
		unreserve()
	}
}

// get answers a get or multi-get: it looks up the sizes first, to make room. A
// value that is replaced by a larger one between the two exceeds it once.
func (sc *serverConn) get(ctx context.Context, req *wire.Request, a *wire.Answer) (release func()) {
	b := sc.s.backend
	infos, err := b.Exists(ctx, req.Keys, req.Priority)
	if err != nil && !errors.Is(err, asd.ErrCorrupt) {
		a.Err = err
		return func() {}
	}
	room := int64(4096)
	for i := range infos {
		room = min(room+infos[i].Size, asd.MaxValueBytes)
	}
	if err != nil {
		room = asd.MaxValueBytes
	}
	if release, a.Err = sc.reserve(ctx, room); a.Err != nil {
		return func() {}
	}
	if req.Op == wire.OpGet {
		a.Value, a.Err = b.Get(ctx, req.Keys[0], req.Priority)
	} else {
		a.Results, a.Err = b.MultiGet(ctx, req.Keys, req.Priority)
	}
	return release
}
