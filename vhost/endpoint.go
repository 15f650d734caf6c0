package vhost

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/rs/zerolog"
	"golang.org/x/sys/unix"

	"scoria/shm/mem"
	"scoria/shm/worker"
)

// quietTime is how long equal reasons of disconnects are not logged again: a
// front end that fails may come back every second.
const quietTime = time.Minute

const (
	// backlogTime is how long connections that the kernel has made already are
	// still accepted when an endpoint closes.
	backlogTime = 10 * time.Millisecond
	// settleTime bounds the wait for a new connection's first ring.
	settleTime = time.Second
	// silentTime is after how long a connection without a word is remarkable:
	// front ends speak as soon as they are connected.
	silentTime = 5 * time.Second
)

// errTooMany ends a connection that is one more than maxSessions.
var errTooMany = errors.New("more connections to one volume than are allowed")

// counters are an endpoint's.
type counters struct {
	worker.Counters
	connections, disconnects, resubmitted, dirtyPages atomic.Uint64
}

// Endpoint is one volume's socket.
type Endpoint struct {
	srv    *Server
	name   string
	path   string
	open   OpenFunc
	ln     *net.UnixListener
	log    zerolog.Logger
	ctx    context.Context
	cancel context.CancelFunc

	counters  counters
	budget    *mem.Budget   // of its front ends' memory
	accepting chan struct{} // closed when the accept loop has ended

	mu         sync.Mutex
	sessions   map[*session]struct{}
	closed     bool
	reason     string
	reasonTime time.Time
	loggedTime time.Time
}

// accept starts a session for each connection until the listener is closed.
func (e *Endpoint) accept() {
	defer close(e.accepting)
	defer e.ln.Close()
	for {
		conn, err := e.ln.AcceptUnix()
		if errors.Is(err, os.ErrDeadlineExceeded) { // Close
			return
		}
		if err != nil { // out of descriptors, likely: it passes
			e.log.Error().Err(err).Msg("accepting a vhost-user connection")
			time.Sleep(100 * time.Millisecond)
			continue
		}
		e.counters.connections.Add(1)
		s := newSession(e, conn)
		e.mu.Lock()
		n := len(e.sessions)
		if n < maxSessions {
			e.sessions[s] = struct{}{}
		}
		e.mu.Unlock()
		if n >= maxSessions {
			conn.Close()
			e.ended(s, fmt.Errorf("%d connections: %w", n+1, errTooMany))
			continue
		}
		go s.run()
	}
}

// Close removes the socket, ends the sessions and waits for them.
//
// QEMU before 9.1 is lost if its connection ends while it negotiates (see the
// package doc). So those that are about to connect are still let in, and those
// that negotiate get settleTime to finish.
func (e *Endpoint) Close() {
	e.mu.Lock()
	first := !e.closed
	e.closed = true
	e.mu.Unlock()
	if first {
		_ = os.Remove(e.path)
		_ = e.ln.SetDeadline(time.Now().Add(backlogTime))
	}
	<-e.accepting
	sessions := e.others(nil)
	for _, s := range sessions {
		s.settle()
	}
	e.cancel()
	for _, s := range sessions {
		s.fail(ErrServerClosed)
	}
	for _, s := range sessions {
		<-s.done
	}
	e.srv.mu.Lock()
	delete(e.srv.endpoints, e)
	e.srv.mu.Unlock()
}

// others returns all sessions but one.
func (e *Endpoint) others(but *session) []*session {
	e.mu.Lock()
	defer e.mu.Unlock()
	var all []*session
	for s := range e.sessions {
		if s != but {
			all = append(all, s)
		}
	}
	return all
}

// ended forgets a session and says why it ended.
func (e *Endpoint) ended(s *session, err error) {
	now := time.Now()
	e.mu.Lock()
	delete(e.sessions, s)
	quiet := false
	if blame(err) {
		text := err.Error()
		quiet = text == e.reason && now.Sub(e.loggedTime) < quietTime
		e.reason, e.reasonTime = text, now
		if !quiet {
			e.loggedTime = now
		}
	}
	e.mu.Unlock()
	switch {
	case !blame(err):
		s.log.Debug().AnErr("reason", err).Msg("vhost-user connection ended")
	case quiet:
		e.counters.disconnects.Add(1)
		s.log.Debug().Err(err).Msg("vhost-user front end disconnected again")
	default:
		e.counters.disconnects.Add(1)
		s.log.Warn().Err(err).Msg("vhost-user front end disconnected")
	}
}

// blame reports whether a session ended for a fault, and not because the front
// end or the daemon closed it, or was killed.
func blame(err error) bool {
	for _, harmless := range []error{io.EOF, ErrServerClosed, errHangup, unix.ECONNRESET, unix.EPIPE} {
		if errors.Is(err, harmless) {
			return false
		}
	}
	return true
}

// Name returns POOL/VOLUME.
func (e *Endpoint) Name() string { return e.name }

// Path returns the socket's path.
func (e *Endpoint) Path() string { return e.path }

// Stats returns a snapshot of the counters.
func (e *Endpoint) Stats() Stats {
	s := Stats{
		Name: e.name, Path: e.path, Stats: e.counters.Snapshot(),
		Connections: e.counters.connections.Load(), Disconnects: e.counters.disconnects.Load(),
		Resubmitted: e.counters.resubmitted.Load(), DirtyPages: e.counters.dirtyPages.Load(),
	}
	e.mu.Lock()
	s.Sessions = len(e.sessions)
	s.LastDisconnect, s.LastDisconnectTime = e.reason, e.reasonTime
	for c := range e.sessions {
		switch {
		case c.goesOn.Load():
			s.Resumed = append(s.Resumed, c.pid)
		case !c.spoke.Load() && time.Since(c.born) > silentTime:
			s.Silent = append(s.Silent, c.pid)
		}
	}
	e.mu.Unlock()
	return s
}
