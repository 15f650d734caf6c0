package nbd

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"sync"
	"time"

	"github.com/rs/zerolog"
	"golang.org/x/sys/unix"

	"scoria/driver/block"
)

// Limits that are not configurable.
const (
	maxPayload = block.MaxRequestBytes // bytes of one read or write
	maxOps     = 128                   // operations under way per connection
	maxBatch   = 32                    // requests of one Submit
	maxOptions = 1024                  // options of one handshake
	maxOption  = 64 << 10              // bytes of one option's data
	maxQueries = 32                    // of one metadata context option
	maxExtents = 8192                  // of one block status reply
	maxChunks  = 256                   // of one read reply

	// acceptPause is how long Serve waits after accept has failed, for instance
	// for want of file descriptors.
	acceptPause = 100 * time.Millisecond
	// drainTime is how long a connection that ends in an orderly way waits for
	// requests under way before those that wait for room are canceled, and how
	// long the last replies may take to be written; closeTime is the latter when
	// the server closes.
	drainTime = 5 * time.Second
	closeTime = time.Second
	// pollTime is how often a connection that waits for something else than
	// its socket looks whether the client has hung up.
	pollTime = time.Second
)

// ErrServerClosed is what Serve returns after Close.
var ErrServerClosed = errors.New("nbd: server closed")

// errProtocol: the client broke the protocol or a limit.
var errProtocol = errors.New("protocol violation")

// Server serves the devices of an Opener to NBD clients. Fields are set before
// Serve and not changed afterwards.
type Server struct {
	Opener block.Opener
	Log    zerolog.Logger

	// HandshakeTime bounds the whole handshake of a connection; default 30 s.
	HandshakeTime time.Duration
	// MaxConns bounds the connections of all clients together (default 256),
	// MaxConnsPerPeer those of one process (default 32). More are closed at once.
	MaxConns, MaxConnsPerPeer int
	// BytesPerConn bounds the payload in memory per connection; default and
	// minimum 32 MiB, the largest request.
	BytesPerConn int64

	buffers bufferPool
	stats   counters

	mu        sync.Mutex
	closed    bool
	done      chan struct{} // closed by Close; made by start
	listeners map[net.Listener]struct{}
	conns     map[*conn]struct{}
	exports   map[string]*export // by POOL/VOLUME, while connections use them
	connSeq   uint64
	lastLog   time.Time // of a refused connection
	wg        sync.WaitGroup
}

// peer is who is at the other end of a connection.
type peer struct {
	pid int // 0 if unknown
	uid int
}

// export is what connections to one volume share.
type export struct {
	name  string
	users int // guarded by Server.mu
	gate  gate
}

// start sets up what the zero Server lacks. Call with mu held.
func (s *Server) start() {
	if s.done != nil {
		return
	}
	s.done = make(chan struct{})
	s.listeners = make(map[net.Listener]struct{})
	s.conns = make(map[*conn]struct{})
	s.exports = make(map[string]*export)
	s.HandshakeTime = cmp.Or(s.HandshakeTime, 30*time.Second)
	s.MaxConns = cmp.Or(s.MaxConns, 256)
	s.MaxConnsPerPeer = cmp.Or(s.MaxConnsPerPeer, 32)
	s.BytesPerConn = max(s.BytesPerConn, maxPayload)
}

// Serve accepts connections until ctx ends or Close is called, closes the
// listener, waits for the connections that it accepted to end, and returns
// ctx's error or ErrServerClosed. When ctx ends, so do the connections, in the
// orderly way that Close describes. Several listeners may be served at once.
func (s *Server) Serve(ctx context.Context, ln net.Listener) error {
	s.mu.Lock()
	s.start()
	if s.closed {
		s.mu.Unlock()
		ln.Close()
		return ErrServerClosed
	}
	s.listeners[ln] = struct{}{}
	s.mu.Unlock()
	var conns sync.WaitGroup
	defer func() {
		ln.Close()
		s.mu.Lock()
		delete(s.listeners, ln)
		s.mu.Unlock()
		conns.Wait()
	}()
	stop := context.AfterFunc(ctx, func() { ln.Close() })
	defer stop()
	for {
		nc, err := ln.Accept()
		switch {
		case ctx.Err() != nil:
			if err == nil {
				nc.Close()
			}
			return ctx.Err()
		case s.closing():
			if err == nil {
				nc.Close()
			}
			return ErrServerClosed
		case errors.Is(err, net.ErrClosed):
			return fmt.Errorf("nbd: accept: %w", err)
		case err != nil:
			s.Log.Warn().Err(err).Msg("accept on the helper socket failed; will try again")
			select {
			case <-time.After(acceptPause):
			case <-ctx.Done():
			case <-s.done:
			}
			continue
		}
		conns.Go(func() { s.ServeConn(ctx, nc) })
	}
}

func (s *Server) closing() bool {
	select {
	case <-s.done:
		return true
	default:
		return false
	}
}

// Close ends all connections: no further command is read, commands that wait
// for room are canceled, the others answered, and the claims released. It
// returns when that is done; further calls do nothing.
func (s *Server) Close() {
	s.mu.Lock()
	s.start()
	if !s.closed {
		s.closed = true
		close(s.done)
	}
	for ln := range s.listeners {
		ln.Close()
	}
	for c := range s.conns {
		c.cancel()
	}
	s.mu.Unlock()
	s.wg.Wait()
}

// ServeConn serves one connection from its handshake to its end, in the calling
// goroutine, and closes it.
func (s *Server) ServeConn(ctx context.Context, nc net.Conn) {
	defer nc.Close()
	p := peerOf(nc)
	c, err := s.admit(ctx, nc, p)
	if err != nil {
		s.stats.refused.Add(1)
		s.logRefused(p, err)
		return
	}
	defer s.dismiss(c)
	c.log.Debug().Msg("nbd client connected")
	err = c.serve()
	switch {
	case errors.Is(err, errProtocol):
		s.stats.violations.Add(1)
		c.log.Warn().Err(err).Str("export", c.exportName()).Msg("nbd client was disconnected")
	case err == nil || c.ctx.Err() != nil:
		c.log.Debug().Str("export", c.exportName()).Msg("nbd client disconnected")
	default:
		c.log.Info().Err(err).Str("export", c.exportName()).Msg("nbd client is gone")
	}
}

// admit registers a connection, if there is room for it.
func (s *Server) admit(ctx context.Context, nc net.Conn, p peer) (*conn, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.start()
	if s.closed {
		return nil, ErrServerClosed
	}
	if len(s.conns) >= s.MaxConns {
		return nil, fmt.Errorf("%d connections are open, no more are allowed", len(s.conns))
	}
	mine := 0
	for c := range s.conns {
		if c.peer == p {
			mine++
		}
	}
	if mine >= s.MaxConnsPerPeer {
		return nil, fmt.Errorf("process %d has %d connections open, no more are allowed", p.pid, mine)
	}
	s.connSeq++
	c := newConn(ctx, s, nc, p, s.connSeq)
	s.conns[c] = struct{}{}
	s.wg.Add(1)
	s.stats.accepted.Add(1)
	return c, nil
}

func (s *Server) dismiss(c *conn) {
	c.cancel()
	s.mu.Lock()
	delete(s.conns, c)
	s.mu.Unlock()
	s.wg.Done()
}

// writers lists the other connections that write to the volume of c.
func (s *Server) writers(c *conn) (list []*conn) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for other := range s.conns {
		if other != c && other.writer.Load() && other.exportName() == c.exportName() {
			list = append(list, other)
		}
	}
	return list
}

// logRefused logs at most once per second, so that a client which connects in a
// loop does not fill the log.
func (s *Server) logRefused(p peer, err error) {
	s.mu.Lock()
	quiet := time.Since(s.lastLog) < time.Second
	if !quiet {
		s.lastLog = time.Now()
	}
	s.mu.Unlock()
	if !quiet {
		s.Log.Warn().Err(err).Int("pid", p.pid).Int("uid", p.uid).Msg("nbd connection refused")
	}
}

// acquire returns what connections to a volume share; release ends its use.
func (s *Server) acquire(name string) *export {
	s.mu.Lock()
	defer s.mu.Unlock()
	e := s.exports[name]
	if e == nil {
		e = &export{name: name}
		e.gate.init()
		s.exports[name] = e
	}
	e.users++
	return e
}

func (s *Server) release(e *export) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if e.users--; e.users == 0 {
		delete(s.exports, e.name)
	}
}

// peerOf asks the kernel who connected; the answer is as of connect(2).
func peerOf(nc net.Conn) peer {
	uc, ok := nc.(*net.UnixConn)
	if !ok {
		return peer{uid: -1}
	}
	p := peer{uid: -1}
	raw, err := uc.SyscallConn()
	if err != nil {
		return p
	}
	_ = raw.Control(func(fd uintptr) {
		if cred, err := unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED); err == nil {
			p = peer{pid: int(cred.Pid), uid: int(cred.Uid)}
		}
	})
	return p
}

// hungUp says whether the client has closed its end, without reading.
func hungUp(nc net.Conn) bool {
	uc, ok := nc.(*net.UnixConn)
	if !ok {
		return false
	}
	raw, err := uc.SyscallConn()
	if err != nil {
		return true
	}
	gone := false
	if err := raw.Control(func(fd uintptr) {
		// Not POLLRDHUP: a client may close its sending half and wait for replies.
		p := []unix.PollFd{{Fd: int32(fd)}}
		n, err := unix.Poll(p, 0)
		gone = err == nil && n > 0 && p[0].Revents&(unix.POLLHUP|unix.POLLERR|unix.POLLNVAL) != 0
	}); err != nil {
		return true
	}
	return gone
}
