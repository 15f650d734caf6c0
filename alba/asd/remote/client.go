package remote

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"time"

	"scoria/alba/asd"
	"scoria/alba/wire"

	"github.com/google/uuid"
	"github.com/rs/zerolog"
)

// Options of a Client. The zero value is usable.
type Options struct {
	// ID is the UUID of the ASD that must answer (asd.ErrWrongASD otherwise);
	// "" takes any.
	ID       string
	Security Security
	// DialTimeout bounds connecting and the handshake; 0 means 3 s.
	DialTimeout time.Duration
	// MinBackoff and MaxBackoff bound the pause between attempts to connect; 0
	// means 100 ms and 5 s.
	MinBackoff, MaxBackoff time.Duration
	// PingAfter and DeadAfter: see the package doc; 0 means 5 s and 10 s.
	PingAfter, DeadAfter time.Duration
	Log                  zerolog.Logger
}

func (o *Options) setDefaults() {
	set := func(d *time.Duration, v time.Duration) {
		if *d == 0 {
			*d = v
		}
	}
	set(&o.DialTimeout, 3*time.Second)
	set(&o.MinBackoff, 100*time.Millisecond)
	set(&o.MaxBackoff, 5*time.Second)
	set(&o.PingAfter, 5*time.Second)
	set(&o.DeadAfter, 10*time.Second)
}

// Client is an ASD on another host. It implements asd.Client.
type Client struct {
	addr  string
	want  uuid.UUID
	opts  Options
	lanes [2]lane // small, bulk
	ctx   context.Context
	close context.CancelFunc
	dials sync.WaitGroup
}

var _ asd.Client = (*Client)(nil)

// bulkBytes is from where on a request goes by the bulk lane.
const bulkBytes = 64 << 10

// New returns a client of the ASD at HOST:PORT. It connects when it is first
// used.
func New(addr string, opts Options) (*Client, error) {
	opts.setDefaults()
	if err := opts.Security.Check(); err != nil {
		return nil, err
	}
	if _, _, err := net.SplitHostPort(addr); err != nil {
		return nil, fmt.Errorf("%w: address of an ASD: %w, want HOST:PORT", asd.ErrInvalid, err)
	}
	c := &Client{addr: addr, opts: opts}
	if opts.ID != "" {
		id, err := uuid.Parse(opts.ID)
		if err != nil {
			return nil, fmt.Errorf("%w: id of an ASD: %w", asd.ErrInvalid, err)
		}
		c.want = id
	}
	c.ctx, c.close = context.WithCancel(context.Background())
	for i := range c.lanes {
		c.lanes[i].c = c
	}
	return c, nil
}

// Close implements asd.Client.
func (c *Client) Close() error {
	c.close()
	for i := range c.lanes {
		c.lanes[i].close()
	}
	c.dials.Wait()
	return nil
}

// lane is a connection that is made when it is needed.
type lane struct {
	c       *Client
	mu      sync.Mutex
	conn    *conn
	dialing chan struct{} // not nil while an attempt is under way; closed at its end
	err     error         // of the last attempt
	next    time.Time     // no attempt before
	backoff time.Duration
}

// get returns a live connection, and makes one if it may.
func (l *lane) get(ctx context.Context) (*conn, error) {
	for {
		l.mu.Lock()
		switch {
		case l.c.ctx.Err() != nil:
			l.mu.Unlock()
			return nil, asd.ErrClosed
		case l.conn != nil && l.conn.alive():
			defer l.mu.Unlock()
			return l.conn, nil
		case l.dialing == nil && time.Now().Before(l.next):
			defer l.mu.Unlock()
			return nil, fmt.Errorf("%w: %w", asd.ErrUnavailable, l.err)
		case l.dialing == nil:
			l.conn = nil
			l.dialing = make(chan struct{})
			l.c.dials.Go(l.dial)
		}
		dialing := l.dialing
		l.mu.Unlock()
		select {
		case <-dialing:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
		l.mu.Lock()
		err := l.err
		l.mu.Unlock()
		if err != nil && l.c.ctx.Err() == nil {
			return nil, fmt.Errorf("%w: %w", asd.ErrUnavailable, err)
		}
	}
}

// dial tries once to connect and publishes what came of it.
func (l *lane) dial() {
	ctx, cancel := context.WithTimeout(l.c.ctx, l.c.opts.DialTimeout)
	defer cancel()
	k, err := l.c.connect(ctx)
	err = severed(err)
	l.mu.Lock()
	defer l.mu.Unlock()
	close(l.dialing)
	l.dialing = nil
	l.err = err
	if err != nil {
		l.backoff = min(max(2*l.backoff, l.c.opts.MinBackoff), l.c.opts.MaxBackoff)
		l.next = time.Now().Add(l.backoff)
		return
	}
	if l.c.ctx.Err() != nil {
		k.end(net.ErrClosed)
		return
	}
	l.conn, l.backoff = k, 0
}

func (l *lane) close() {
	l.mu.Lock()
	k := l.conn
	l.conn = nil
	l.mu.Unlock()
	if k != nil {
		k.end(net.ErrClosed)
		k.loops.Wait()
	}
}

// connect makes a connection and does the handshakes.
func (c *Client) connect(ctx context.Context) (*conn, error) {
	nc, err := (&net.Dialer{}).DialContext(ctx, "tcp", c.addr)
	if err != nil {
		return nil, err
	}
	// The context bounds what follows too.
	stop := context.AfterFunc(ctx, func() { _ = nc.SetDeadline(time.Unix(1, 0)) })
	w, secured, err := c.handshake(ctx, nc)
	if !stop() && err == nil {
		err = ctx.Err()
	}
	if err != nil {
		_ = nc.Close()
		return nil, fmt.Errorf("connect to ASD at %s: %w", c.addr, err)
	}
	return newConn(secured, w, &c.opts), nil
}

func (c *Client) handshake(ctx context.Context, nc net.Conn) (*wire.Welcome, net.Conn, error) {
	if c.opts.Security.tls() {
		host, _, _ := net.SplitHostPort(c.addr)
		config, err := c.opts.Security.clientConfig(host)
		if err != nil {
			return nil, nil, err
		}
		secured := tls.Client(nc, config)
		if err := secured.HandshakeContext(ctx); err != nil {
			return nil, nil, err
		}
		nc = secured
	} else if err := c.opts.Security.plaintextOK(nc.RemoteAddr()); err != nil {
		return nil, nil, err
	}
	hello := wire.Hello{Lowest: wire.MinVersion, Highest: wire.MaxVersion, Want: c.want}
	if _, err := nc.Write(hello.Encode()); err != nil {
		return nil, nil, err
	}
	b := make([]byte, wire.HelloBytes)
	if _, err := io.ReadFull(nc, b); err != nil {
		return nil, nil, err
	}
	w, err := wire.DecodeWelcome(b)
	switch {
	case err != nil:
		return nil, nil, err
	case w.Status == wire.OtherASD, w.Status == wire.Welcomed && c.want != uuid.Nil && c.want != w.ID:
		return nil, nil, fmt.Errorf("%w: %s, want %s", asd.ErrWrongASD, uuid.UUID(w.ID), c.want)
	case w.Status != wire.Welcomed:
		return nil, nil, errors.New(w.Status.String())
	case w.Version < wire.MinVersion || w.Version > wire.MaxVersion:
		return nil, nil, fmt.Errorf("%w: version %d", wire.ErrProtocol, w.Version)
	}
	return &w, nc, nil
}

// call does a request by a lane and checks what came over the network. use, if
// set, takes what it needs from the answer, whose data is only valid during the
// call. Errors are those of asd.Client.
func (c *Client) call(ctx context.Context, l *lane, req *wire.Request, use func(*wire.Answer) error) error {
	if deadline, ok := ctx.Deadline(); ok {
		req.Deadline = uint32(min(max(time.Until(deadline).Milliseconds(), 1), 1<<31))
	}
	for attempt := 0; ; attempt++ {
		sent, err := c.try(ctx, l, req, use)
		switch {
		case err == nil:
			return nil
		case c.ctx.Err() != nil:
			if sent && req.Op == wire.OpApply {
				return fmt.Errorf("%w: %w", asd.ErrUnknownOutcome, asd.ErrClosed)
			}
			return asd.ErrClosed
		}
		var lost *lostError
		if !errors.As(err, &lost) {
			return err
		}
		again := attempt == 0 && ctx.Err() == nil && (!sent || req.Op != wire.OpApply)
		switch {
		case again:
		case sent && req.Op == wire.OpApply:
			return fmt.Errorf("%w: %w", asd.ErrUnknownOutcome, lost.err)
		case ctx.Err() != nil && errors.Is(lost.err, ctx.Err()):
			return lost.err
		default:
			return fmt.Errorf("%w: ASD at %s: %w", asd.ErrUnavailable, c.addr, lost.err)
		}
	}
}

// lostError: the answer did not come, or came damaged.
type lostError struct{ err error }

func (e *lostError) Error() string { return e.err.Error() }

// try does a request once. A *lostError is about the way there and back, any
// other error is the ASD's answer.
func (c *Client) try(ctx context.Context, l *lane, req *wire.Request, use func(*wire.Answer) error) (sent bool, err error) {
	k, err := l.get(ctx)
	if err != nil {
		return false, err
	}
	call, sent, err := k.do(ctx, req)
	if err != nil {
		if errors.Is(err, asd.ErrInvalid) {
			return false, err
		}
		return sent, &lostError{err}
	}
	defer call.data.free()
	a := &call.answer
	if a.Op != req.Op {
		err = fmt.Errorf("%w: answer to operation %d, want %d", wire.ErrProtocol, a.Op, req.Op)
	} else if a.Err != nil {
		return true, fmt.Errorf("ASD at %s: %w", c.addr, a.Err)
	} else if use != nil {
		err = use(a)
	}
	if errors.Is(err, errDamaged) || errors.Is(err, wire.ErrProtocol) {
		k.end(err)
		return true, &lostError{err}
	}
	return true, err
}

// errDamaged: bytes changed on the way; the stored ones were sound.
var errDamaged = errors.New("damaged on the way")
