package remote

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"scoria/alba/asd"
	"scoria/alba/wire"
)

// The life of a call. Whoever moves it out of callQueued decides whether its
// request is sent.
const (
	callQueued int32 = iota
	callSent         // or being sent
	callCanceled
)

// call is a request under way.
type call struct {
	out     outgoing
	state   atomic.Int32
	answer  wire.Answer
	data    *buffer // that answer refers to
	err     error   // of the connection
	done    chan struct{}
	written chan struct{} // the sender is done with the caller's memory; nil: it has none
}

// errNotSent: the connection ended before the request was sent.
var errNotSent = errors.New("not sent")

// conn is a connection of a client.
type conn struct {
	c     *meteredConn
	opts  *Options
	slots chan struct{} // one per request under way, as many as the server takes
	out   *sender
	dead  chan struct{} // closed by end
	loops sync.WaitGroup

	mu      sync.Mutex
	err     error // set before dead is closed
	nextID  uint64
	pending map[uint64]*call
}

// meteredConn notes when something last came.
type meteredConn struct {
	net.Conn
	last atomic.Int64 // UnixNano
}

// Read implements net.Conn.
func (m *meteredConn) Read(p []byte) (int, error) {
	n, err := m.Conn.Read(p)
	if n > 0 {
		m.last.Store(time.Now().UnixNano())
	}
	return n, err
}

// newConn starts a connection whose welcome has come.
func newConn(nc net.Conn, w *wire.Welcome, opts *Options) *conn {
	k := &conn{
		c: &meteredConn{Conn: nc}, opts: opts,
		slots:   make(chan struct{}, max(1, min(w.MaxRequests, maxPerConn))),
		pending: make(map[uint64]*call),
		dead:    make(chan struct{}),
	}
	k.out = newSender(nc, cap(k.slots)+2, opts.PingAfter+opts.DeadAfter)
	k.c.last.Store(time.Now().UnixNano())
	k.loops.Go(func() { k.end(k.readLoop()) })
	k.loops.Go(func() {
		if err := k.out.run(k.dead); err != nil {
			k.end(err)
		}
	})
	k.loops.Go(k.pingLoop)
	return k
}

// maxPerConn bounds what a server may allow a client.
const maxPerConn = 4096

// end makes the connection fail everything, once.
func (k *conn) end(err error) {
	k.mu.Lock()
	if k.err != nil {
		k.mu.Unlock()
		return
	}
	if err == nil {
		err = net.ErrClosed
	}
	err = severed(err)
	k.err = err
	pending := k.pending
	k.pending = nil
	close(k.dead)
	k.mu.Unlock()
	_ = k.c.Close()
	for _, c := range pending {
		c.err = err
		close(c.done)
	}
}

// severed is an error of a connection as callers may see it: io.EOF and
// io.ErrUnexpectedEOF would tell them that a value ends, where it is the connection
// that did.
func severed(err error) error {
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return fmt.Errorf("the connection was closed: %v", err)
	}
	return err
}

func (k *conn) alive() bool {
	select {
	case <-k.dead:
		return false
	default:
		return true
	}
}

// register gives a call its number.
func (k *conn) register(c *call) (id uint64, err error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.err != nil {
		return 0, k.err
	}
	k.nextID++
	k.pending[k.nextID] = c
	return k.nextID, nil
}

// forget takes a call that nobody waits for any more out of the table.
func (k *conn) forget(id uint64) {
	k.mu.Lock()
	defer k.mu.Unlock()
	delete(k.pending, id)
}

// do sends a request and waits for its answer. The answer's data is in c.data,
// which the caller frees. Errors: errNotSent (wrapped), the context's, or that
// of the connection; sent says whether the server may have got the request.
func (k *conn) do(ctx context.Context, req *wire.Request) (done *call, sent bool, err error) {
	select {
	case k.slots <- struct{}{}:
		defer func() { <-k.slots }()
	case <-k.dead:
		return nil, false, fmt.Errorf("%w: %w", errNotSent, k.err)
	case <-ctx.Done():
		return nil, false, ctx.Err()
	}
	c := &call{done: make(chan struct{})}
	id, err := k.register(c)
	if err != nil {
		return nil, false, fmt.Errorf("%w: %w", errNotSent, err)
	}
	req.ID = id
	if c.out.frame, c.out.data, err = req.Encode(); err != nil {
		k.forget(id)
		return nil, false, err
	}
	c.out.claim = func() bool { return c.state.CompareAndSwap(callQueued, callSent) }
	if len(c.out.data) > 0 {
		c.written = make(chan struct{})
		c.out.written = func() { close(c.written) }
	}
	if err := k.out.send(&c.out); err != nil {
		k.end(err)
	}
	select {
	case <-c.done:
	case <-ctx.Done():
		k.forget(id)
		if c.state.CompareAndSwap(callQueued, callCanceled) {
			return nil, false, ctx.Err()
		}
		k.waitWritten(c)
		k.cancel(id)
		return nil, true, ctx.Err()
	}
	if c.err == nil {
		return c, true, nil
	}
	if c.state.CompareAndSwap(callQueued, callCanceled) {
		return nil, false, fmt.Errorf("%w: %w", errNotSent, c.err)
	}
	k.waitWritten(c)
	return nil, true, c.err
}

// waitWritten returns when the sender no longer uses the caller's memory. It
// takes no longer than a write may.
func (k *conn) waitWritten(c *call) {
	if c.written != nil {
		<-c.written
	}
}

// cancel tells the server, if that needs no waiting, that nobody waits.
func (k *conn) cancel(id uint64) {
	frame, _, err := (&wire.Request{ID: id, Op: wire.OpCancel}).Encode()
	if err != nil {
		return
	}
	if err := k.out.offer(&outgoing{frame: frame}); err != nil {
		k.end(err)
	}
}

// readLoop takes answers until the connection fails.
func (k *conn) readLoop() error {
	r := bufio.NewReaderSize(k.c, 64<<10)
	head := make([]byte, wire.HeaderBytes)
	for {
		h, err := readHeader(r, head)
		if err != nil {
			return err
		}
		body, data, err := readRest(r, &h)
		if err != nil {
			return err
		}
		a, err := wire.DecodeAnswer(&h, body, data.b)
		if err != nil {
			return err
		}
		k.mu.Lock()
		c := k.pending[h.ID]
		delete(k.pending, h.ID)
		k.mu.Unlock()
		if c == nil { // to a ping, or canceled
			data.free()
			continue
		}
		c.answer, c.data = a, data
		close(c.done)
	}
}

// pingLoop ends a connection whose server owes answers and is silent.
func (k *conn) pingLoop() {
	tick := time.NewTicker(k.opts.PingAfter / 2)
	defer tick.Stop()
	var since time.Time // the first look that found something owed
	for {
		select {
		case <-tick.C:
		case <-k.dead:
			return
		}
		k.mu.Lock()
		owed := len(k.pending)
		k.nextID++
		id := k.nextID
		k.mu.Unlock()
		now := time.Now()
		if owed == 0 {
			since = time.Time{}
			continue
		}
		if since.IsZero() {
			since = now
		}
		last := time.Unix(0, k.c.last.Load())
		if since.After(last) {
			last = since
		}
		switch silent := now.Sub(last); {
		case silent > k.opts.PingAfter+k.opts.DeadAfter:
			k.end(fmt.Errorf("%w: nothing came for %v", asd.ErrUnavailable, silent.Round(time.Millisecond)))
			return
		case silent > k.opts.PingAfter:
			k.ping(id)
		}
	}
}

// ping asks for a sign of life; if the queue is full, what is in it is sign
// enough.
func (k *conn) ping(id uint64) {
	frame, _, err := (&wire.Request{ID: id, Op: wire.OpPing}).Encode()
	if err != nil {
		return
	}
	if err := k.out.offer(&outgoing{frame: frame}); err != nil {
		k.end(err)
	}
}
