package remote

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sync"
	"time"

	"scoria/alba/asd"
	"scoria/alba/wire"

	"github.com/google/uuid"
	"github.com/rs/zerolog"
	"golang.org/x/sync/semaphore"
)

// Backend is what a Server serves.
type Backend interface {
	asd.Client
	asd.BlockReader
}

// ServerOptions of a Server. The zero value is usable.
type ServerOptions struct {
	MaxConns    int   // connections at once; 0 means 256
	MaxRequests int   // under way per connection; 0 means 128
	ConnBytes   int64 // of requests, and of answers, per connection; 0 means 96 MiB
	TotalBytes  int64 // of requests, and of answers, in all; 0 means 256 MiB
	// WriteTimeout: a connection that takes nothing of its answers for so long is
	// closed; 0 means 30 s. FrameTimeout: so is one that sends no more of a frame
	// that it began; 0 means 30 s.
	WriteTimeout, FrameTimeout time.Duration
	Log                        zerolog.Logger
}

// maxFrameBytes is the largest frame; every pool must have room for it.
const maxFrameBytes = wire.HeaderBytes + wire.MaxBodyBytes + asd.MaxValueBytes + 2*asd.MaxBlockSize

func (o *ServerOptions) setDefaults() {
	if o.MaxConns == 0 {
		o.MaxConns = 256
	}
	if o.MaxRequests == 0 {
		o.MaxRequests = 128
	}
	if o.ConnBytes == 0 {
		o.ConnBytes = 96 << 20
	}
	if o.TotalBytes == 0 {
		o.TotalBytes = 256 << 20
	}
	if o.WriteTimeout == 0 {
		o.WriteTimeout = 30 * time.Second
	}
	if o.FrameTimeout == 0 {
		o.FrameTimeout = 30 * time.Second
	}
	o.ConnBytes = max(o.ConnBytes, maxFrameBytes)
	o.TotalBytes = max(o.TotalBytes, maxFrameBytes)
}

// Server serves an ASD to any number of connections.
type Server struct {
	backend  Backend
	id       uuid.UUID
	opts     ServerOptions
	requests *semaphore.Weighted // bytes, all connections
	answers  *semaphore.Weighted
	ctx      context.Context // ends when the Server is closed
	cancel   context.CancelFunc

	mu     sync.Mutex
	closed bool
	conns  map[net.Conn]struct{}
	lns    map[net.Listener]struct{}
	wg     sync.WaitGroup // connections
}

// NewServer returns a Server of a backend, which remains the caller's to close.
func NewServer(b Backend, opts ServerOptions) (*Server, error) {
	opts.setDefaults()
	stats, err := b.Stats(context.Background())
	if err != nil {
		return nil, fmt.Errorf("serve ASD: %w", err)
	}
	id, err := uuid.Parse(stats.ID)
	if err != nil {
		return nil, fmt.Errorf("serve ASD: its id %q: %w", stats.ID, err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	return &Server{
		backend: b, id: id, opts: opts, ctx: ctx, cancel: cancel,
		requests: semaphore.NewWeighted(opts.TotalBytes), answers: semaphore.NewWeighted(opts.TotalBytes),
		conns: make(map[net.Conn]struct{}), lns: make(map[net.Listener]struct{}),
	}, nil
}

// Serve accepts connections until the listener or the Server is closed; then it
// returns nil.
func (s *Server) Serve(ln net.Listener) error {
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		return ln.Close()
	}
	s.lns[ln] = struct{}{}
	s.mu.Unlock()
	for {
		c, err := ln.Accept()
		switch {
		case err == nil:
			s.start(c)
			continue
		case errors.Is(err, net.ErrClosed):
			return nil
		}
		// Out of descriptors, most likely: others may give some back.
		s.opts.Log.Warn().Err(err).Msg("a connection could not be accepted")
		select {
		case <-time.After(100 * time.Millisecond):
		case <-s.ctx.Done():
			return nil
		}
	}
}

// start serves a connection in goroutines of its own.
func (s *Server) start(c net.Conn) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		_ = c.Close()
		return
	}
	crowded := len(s.conns) >= s.opts.MaxConns
	if crowded && len(s.conns) >= 2*s.opts.MaxConns {
		_ = c.Close() // without even saying why
		return
	}
	s.conns[c] = struct{}{}
	s.wg.Go(func() {
		err := s.serve(c, crowded)
		_ = c.Close()
		s.mu.Lock()
		delete(s.conns, c)
		s.mu.Unlock()
		if err != nil && s.ctx.Err() == nil {
			s.opts.Log.Info().Err(err).Stringer("peer", c.RemoteAddr()).Msg("connection ended")
		}
	})
}

// Close ends the listeners and connections at once, and waits for the requests
// under way: those that were being applied are done whole or not at all, and
// nobody is told.
func (s *Server) Close() error {
	s.mu.Lock()
	s.closed = true
	s.cancel()
	for ln := range s.lns {
		_ = ln.Close()
	}
	for c := range s.conns {
		_ = c.Close()
	}
	s.mu.Unlock()
	s.wg.Wait()
	return nil
}

// Connections returns how many there are.
func (s *Server) Connections() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.conns)
}
