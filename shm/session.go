package shm

import (
	"errors"
	"fmt"
	"io"
	"net"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/rs/zerolog"
	"golang.org/x/sys/unix"

	"scoria/driver/block"
	"scoria/shm/mem"
	"scoria/shm/wire"
)

const (
	// helloTimeout bounds the time from the connection to the end of hello.
	helloTimeout = 10 * time.Second
	// replyTimeout bounds the write of an answer to a client that does not read.
	replyTimeout = 10 * time.Second
	// cancelInterval is how often a session that ends cancels its requests:
	// some may begin to wait for room only after the first time.
	cancelInterval = 50 * time.Millisecond
	// hangupInterval is how often a session that waits looks whether its client is
	// still there.
	hangupInterval = 100 * time.Millisecond
)

// Errors that end sessions.
var (
	errProtocol = errors.New("protocol violation")
	errHangup   = errors.New("client hung up")
)

// session is one connection. Its fields belong to the goroutine of run, but for
// those marked otherwise.
type session struct {
	// Constant.
	srv  *Server
	id   uint64
	peer Peer
	conn *net.UnixConn
	log  zerolog.Logger

	greeted  bool
	dev      block.Device
	vol      *volume
	readOnly bool
	unwatch  func()
	release  func() // of the claim; nil: none is held
	rings    map[uint64]*queue
	nextRing uint64
	in       [wire.MaxMessage]byte
	out      []byte

	// Any goroutine.
	leak    atomic.Bool            // memory must not be unmapped
	opened  atomic.Pointer[volume] // vol
	writing atomic.Pointer[string] // name of the volume that it has claimed or is about to
	changed chan struct{}          // the open volume's size changed
	dead    chan struct{}          // closed by fail
	done    chan struct{}          // closed when everything has been given back
	noticed chan struct{}          // closed when the goroutine that sends notices has ended; nil: none

	writeMu sync.Mutex // of the socket

	mu     sync.Mutex
	reason error
}

func newSession(srv *Server, conn *net.UnixConn, peer Peer) *session {
	return &session{
		srv: srv, conn: conn, peer: peer, rings: map[uint64]*queue{},
		changed: make(chan struct{}, 1), dead: make(chan struct{}), done: make(chan struct{}),
	}
}

func (s *session) begin(id uint64) {
	s.id = id
	s.log = s.srv.cfg.Log.With().Uint64("session", id).Int32("pid", s.peer.PID).Logger()
}

func (s *session) writes(name string) bool {
	w := s.writing.Load()
	return w != nil && *w == name
}

// fail ends the session with a reason; only the first one counts. Any goroutine.
func (s *session) fail(err error) {
	s.mu.Lock()
	first := s.reason == nil
	if first {
		s.reason = err
	}
	s.mu.Unlock()
	if first {
		close(s.dead)
		// This ends what the session reads or writes. The client sees the end of
		// the connection only when nothing touches its memory any more.
		_ = s.conn.SetDeadline(time.Unix(1, 0))
	}
}

func (s *session) failure() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.reason
}

// blame reports whether a session ended for a fault, and not because the client
// or the daemon closed it, or was killed.
func blame(err error) bool {
	for _, harmless := range []error{io.EOF, ErrServerClosed, errHangup, unix.ECONNRESET, unix.EPIPE, net.ErrClosed} {
		if errors.Is(err, harmless) {
			return false
		}
	}
	return true
}

// run serves the connection until it ends.
func (s *session) run() {
	defer s.teardown()
	_ = s.conn.SetReadDeadline(time.Now().Add(helloTimeout))
	for {
		if err := s.step(); err != nil {
			s.fail(err)
			return
		}
	}
}

// message is a request with the descriptors that came along.
type message struct {
	wire.Header
	body []byte
	fds  []int
}

// answer is what is sent back.
type answer struct {
	body []byte
	fds  []int
}

// step reads and handles one message.
func (s *session) step() error {
	n, fds, err := mem.ReadPacket(s.conn, s.in[:], wire.MaxFDs)
	if err != nil {
		return err
	}
	m := &message{fds: fds}
	defer func() { mem.CloseAll(m.fds) }()
	if m.Header, m.body, err = wire.Parse(s.in[:n]); err != nil {
		return err
	}
	if m.Status != 0 || m.Type&wire.Answer != 0 {
		return fmt.Errorf("%v with status %d is no request: %w", m.Type, m.Status, errProtocol)
	}
	if len(fds) > 0 && m.Type != wire.Ring {
		return fmt.Errorf("%v with descriptors: %w", m.Type, errProtocol)
	}
	if !s.greeted && m.Type != wire.Hello {
		return fmt.Errorf("%v before hello: %w", m.Type, errProtocol)
	}
	a, err := s.dispatch(m)
	s.log.Trace().Stringer("request", m.Type).Err(err).Msg("shared-memory message")
	if err != nil {
		return s.refuse(m, err)
	}
	return s.send(wire.Header{Type: m.Type | wire.Answer, Tag: m.Tag}, a.body, a.fds...)
}

// refuse answers a request that failed. It returns an error where the session
// has to end.
func (s *session) refuse(m *message, err error) error {
	code, final := codeOf(err)
	text := err.Error()
	if max := wire.MaxMessage - wire.HeaderBytes; len(text) > max {
		text = text[:max]
	}
	sent := s.send(wire.Header{Type: m.Type | wire.Answer, Tag: m.Tag, Status: code}, []byte(text))
	if final {
		return fmt.Errorf("%v: %w", m.Type, err)
	}
	return sent
}

// send writes a message whole, or fails after a while if the client does not
// read. Any goroutine.
func (s *session) send(h wire.Header, body []byte, fds ...int) error {
	s.writeMu.Lock()
	defer s.writeMu.Unlock()
	s.out = wire.Append(s.out[:0], h, body)
	if err := s.conn.SetWriteDeadline(time.Now().Add(replyTimeout)); err != nil {
		return fmt.Errorf("%v: %w", h.Type, err)
	}
	if reason := s.failure(); reason != nil { // fail's deadline may have come before
		return reason
	}
	if err := mem.WriteFull(s.conn, s.out, fds...); err != nil {
		return fmt.Errorf("%v: %w", h.Type, err)
	}
	return nil
}

// refusal is an error with the code that the client is told.
type refusal struct {
	code wire.Code
	err  error
}

func (r *refusal) Error() string { return r.err.Error() }
func (r *refusal) Unwrap() error { return r.err }

func refusef(code wire.Code, format string, args ...any) error {
	return &refusal{code, fmt.Errorf(format, args...)}
}

// codeOf maps an error to the code that the client is told. final: the client
// broke the protocol, or the session has failed, and ends.
func codeOf(err error) (code wire.Code, final bool) {
	var r *refusal
	var inUse *block.InUseError
	switch {
	case errors.As(err, &r):
		return r.code, false
	case errors.As(err, &inUse):
		return wire.InUse, false
	case errors.Is(err, ErrDenied):
		return wire.Denied, false
	case errors.Is(err, block.ErrNotFound):
		return wire.NotFound, false
	case errors.Is(err, ErrServerClosed):
		return wire.Closing, true
	case errors.Is(err, errHangup):
		return wire.Failed, true
	}
	for _, broken := range []error{
		errProtocol, wire.ErrShort, wire.ErrMagic, wire.ErrVersion, wire.ErrName, wire.ErrFlags,
	} {
		if errors.Is(err, broken) {
			return wire.Invalid, true
		}
	}
	return wire.Failed, false
}

// await waits for done while the client is there.
func (s *session) await(done <-chan struct{}) error {
	tick := time.NewTicker(hangupInterval)
	defer tick.Stop()
	for {
		select {
		case <-done:
			return nil
		case <-s.dead:
			return s.failure()
		case <-tick.C:
			if mem.HungUp(s.conn) {
				return errHangup
			}
		}
	}
}

// claim makes this session the volume's writer. A session whose client is gone
// but which has not given back the claim yet is waited for.
func (s *session) claim(dev block.Device, name string) error {
	s.writing.Store(&name)
	for _, other := range s.srv.writers(s, name) {
		if mem.HungUp(other.conn) {
			if err := s.await(other.done); err != nil {
				return err
			}
		}
	}
	release, err := dev.Claim(block.Claimant{
		Kind: "shm", ID: "connection " + strconv.FormatUint(s.id, 10) + " of pid " + strconv.Itoa(int(s.peer.PID)),
	})
	if err != nil {
		s.writing.Store(nil)
		return err
	}
	s.release = release
	return nil
}

// notify sends a notice after each change of the open volume until the session
// ends. A client that does not read them loses the connection.
func (s *session) notify() {
	defer close(s.noticed)
	for {
		select {
		case <-s.dead:
			return
		case <-s.changed:
		}
		if err := s.send(wire.Header{Type: wire.Changed}, s.describe(s.dev.Info(), s.readOnly).Append(nil)); err != nil {
			s.fail(err)
			return
		}
	}
}

// teardown gives everything back. Memory is unmapped only when no request in
// flight can touch it any more. The socket is closed last: a client that sees it
// closed may give its memory to another server.
func (s *session) teardown() {
	if s.unwatch != nil {
		s.unwatch()
		<-s.noticed
	}
	for _, q := range s.rings {
		q.Stop()
	}
	for _, q := range s.rings {
		s.drain(q)
	}
	if s.release != nil {
		s.release()
	}
	if s.leak.Load() {
		s.log.Error().Msg("the device did not survive a fault on shared memory; the memory stays mapped")
	}
	s.srv.ended(s, s.failure())
	s.conn.Close()
	close(s.done)
}

// drain waits until a stopped ring's requests have ended, and gives back what it
// has.
func (s *session) drain(q *queue) {
	for {
		s.dev.Cancel(q)
		select {
		case <-q.Drained():
			s.vol.Rings.Add(-1)
			q.release()
			return
		case <-time.After(cancelInterval):
		}
	}
}
