package vhost

import (
	"errors"
	"fmt"
	"io"
	"net"
	"runtime/debug"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/rs/zerolog"
	"golang.org/x/sys/unix"

	"scoria/driver/block"
	"scoria/shm/mem"
	"scoria/vhost/wire"
)

const (
	// replyTimeout bounds the write of a reply to a front end that does not read.
	replyTimeout = 10 * time.Second
	// cancelInterval is how often a session that ends cancels its requests:
	// some may begin to wait for room only after the first time.
	cancelInterval = 50 * time.Millisecond
	// hangupInterval is how often a session that waits for its requests looks
	// whether the front end is still there.
	hangupInterval = 500 * time.Millisecond
)

// Errors that end sessions.
var (
	errProtocol = errors.New("protocol violation")
	errHangup   = errors.New("front end hung up")
)

// session is one connection. Its fields belong to the goroutine of run, but for
// those marked otherwise.
type session struct {
	ep   *Endpoint
	srv  *Server
	id   uint64
	pid  int32
	conn *net.UnixConn
	log  zerolog.Logger

	dev     block.Device
	unwatch func()
	release func() // of the claim; nil: none is held

	offered   uint64
	features  uint64
	protocol  uint64
	status    uint64
	wce       bool // write cache enabled, as the guest set it
	rings     []*ring
	table     *mem.Table
	dirty     *dirtyLog
	inflight  *inflightArea
	out, body []byte

	// Any goroutine.
	view   atomic.Pointer[deviceView]
	leak   atomic.Bool   // memory must not be unmapped
	born   time.Time     // constant
	ready  atomic.Bool   // a ring was started
	spoke  atomic.Bool   // a message came
	goesOn atomic.Bool   // nothing was negotiated; see resume
	dead   chan struct{} // closed by fail
	done   chan struct{} // closed when everything has been given back
	notice noticeState

	mu     sync.Mutex
	reason error
}

func newSession(e *Endpoint, conn *net.UnixConn) *session {
	s := &session{
		ep: e, srv: e.srv, id: e.srv.nextSession(), conn: conn, wce: true, born: time.Now(),
		dead: make(chan struct{}), done: make(chan struct{}),
	}
	if raw, err := conn.SyscallConn(); err == nil {
		_ = raw.Control(func(fd uintptr) {
			if cred, err := unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED); err == nil {
				s.pid = cred.Pid
			}
		})
	}
	s.log = e.log.With().Uint64("session", s.id).Int32("pid", s.pid).Logger()
	return s
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
		// Close may wait for the reader to let go, and a worker must not.
		go s.conn.Close()
	}
}

// settle waits until a young session has started a ring, or is none any more.
func (s *session) settle() {
	for !s.ready.Load() && time.Since(s.born) < settleTime {
		select {
		case <-s.dead:
			return
		case <-time.After(time.Millisecond):
		}
	}
}

func (s *session) failure() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.reason
}

// run serves the connection until it ends.
func (s *session) run() {
	defer s.teardown()
	debug.SetPanicOnFault(true)
	defer func() {
		if r := recover(); r != nil {
			addr, ok := mem.Fault(r)
			if !ok {
				panic(r)
			}
			s.fail(&mem.FaultError{Addr: addr})
		}
	}()
	for {
		if err := s.step(); err != nil {
			s.fail(err)
			return
		}
	}
}

// message is a request with the descriptors that came along. Who keeps one
// takes it out by take.
type message struct {
	wire.Header
	body []byte
	fds  []int
}

// take returns the i-th descriptor, which is the caller's now.
func (m *message) take(i int) int {
	fd := m.fds[i]
	m.fds[i] = -1
	return fd
}

// step reads and handles one message.
func (s *session) step() error {
	var head [wire.HeaderSize]byte
	fds, err := mem.ReadFull(s.conn, head[:], wire.MaxFDs)
	if err != nil {
		return err
	}
	m := message{fds: fds}
	defer func() {
		for _, fd := range m.fds {
			if fd >= 0 {
				unix.Close(fd)
			}
		}
	}()
	if m.Header, err = wire.ParseHeader(head[:]); err != nil {
		return err
	}
	if err := wire.CheckRequest(m.Header); err != nil {
		return err
	}
	if m.Size > 0 {
		s.body = append(s.body[:0], make([]byte, m.Size)...)
		m.body = s.body
		more, err := mem.ReadFull(s.conn, m.body, wire.MaxFDs-len(m.fds))
		m.fds = append(m.fds, more...)
		if errors.Is(err, io.EOF) {
			err = io.ErrUnexpectedEOF
		}
		if err != nil {
			return fmt.Errorf("%v: reading %d bytes of payload: %w", m.Request, m.Size, err)
		}
	}
	if err := wire.CheckFDs(m.Request, len(m.fds)); err != nil {
		return err
	}
	if s.dev == nil {
		if err := s.openDevice(); err != nil {
			return err
		}
	}
	if !s.spoke.Swap(true) {
		s.resume(m.Request)
	}
	return s.handle(&m)
}

// resume looks at the first message. A front end that does not negotiate goes on
// from an earlier connection, as QEMU before 9.1 does (see the package doc): it
// holds what it was offered then, and waits for acknowledgements.
func (s *session) resume(first wire.Request) {
	switch first {
	case wire.GetFeatures, wire.GetProtocolFeatures, wire.SetProtocolFeatures, wire.SetOwner, wire.ResetOwner:
		return
	}
	s.protocol = protocolFeatures
	s.goesOn.Store(true)
	s.log.Warn().Stringer("first_message", first).Msg("front end goes on from an earlier connection without negotiating: it is served, but will not come back after the next end of a connection")
}

// openDevice gets the device at the first message.
func (s *session) openDevice() error {
	dev, err := s.ep.open(s.ep.ctx)
	if err != nil {
		return fmt.Errorf("opening the volume: %w", err)
	}
	s.dev = dev
	info := dev.Info()
	s.offered = deviceFeatures(&info)
	s.updateView(info)
	s.unwatch = dev.Watch(func(info block.Info) { s.noteResize(info.Size) })
	return nil
}

// handle does what a message asks for and answers it. An error ends the
// session; it is acknowledged before, where the front end asked for that.
func (s *session) handle(m *message) error {
	payload, reply, err := s.dispatch(m)
	s.log.Trace().Stringer("request", m.Request).Hex("payload", m.body).Err(err).Msg("vhost-user message")
	if err != nil {
		err = fmt.Errorf("%v: %w", m.Request, err)
	}
	ack := m.NeedReply() && s.protocol&wire.ProtocolReplyAck != 0 && !m.Request.HasReply()
	switch {
	case reply && err == nil:
		return s.reply(m.Request, payload)
	case ack && err != nil:
		_ = s.reply(m.Request, wire.AppendU64(nil, 1))
		return err
	case ack:
		return s.reply(m.Request, wire.AppendU64(nil, 0))
	}
	return err
}

func (s *session) reply(r wire.Request, payload []byte, fds ...int) error {
	s.out = wire.AppendMessage(s.out[:0], r, wire.FlagReply, payload)
	if err := s.conn.SetWriteDeadline(time.Now().Add(s.srv.cfg.replyTimeout)); err != nil {
		return fmt.Errorf("%v: reply: %w", r, err)
	}
	if err := mem.WriteFull(s.conn, s.out, fds...); err != nil {
		return fmt.Errorf("%v: reply: %w", r, err)
	}
	return nil
}

// dispatch returns the payload of the reply, if the message has one of its own.
func (s *session) dispatch(m *message) (payload []byte, reply bool, err error) {
	u64 := func(v uint64) ([]byte, bool, error) { return wire.AppendU64(nil, v), true, nil }
	switch m.Request {
	case wire.GetFeatures:
		return u64(s.offered)
	case wire.GetProtocolFeatures:
		return u64(protocolFeatures)
	case wire.GetQueueNum:
		return u64(uint64(s.srv.cfg.MaxQueues))
	case wire.GetMaxMemSlots:
		return u64(mem.MaxRegions)
	case wire.GetStatus:
		return u64(s.status)
	case wire.GetConfig:
		payload, err = s.getConfig(m)
		return payload, true, err
	case wire.GetVringBase:
		payload, err = s.getVringBase(m)
		return payload, true, err
	case wire.SetLogBase:
		return wire.AppendU64(nil, 0), true, s.setLogBase(m)
	case wire.GetInflightFD:
		return nil, false, s.getInflight(m)
	}
	return nil, false, s.change(m)
}

// change handles the messages without a reply of their own.
func (s *session) change(m *message) error {
	switch m.Request {
	case wire.SetOwner, wire.ResetOwner, wire.SetLogFD:
		// RESET_OWNER is to be ignored. The descriptor of SET_LOG_FD, to tell of
		// changes of the log, is optional; QEMU never sends one.
		return nil
	case wire.SetFeatures:
		return s.setFeatures(m)
	case wire.SetProtocolFeatures:
		return s.setProtocolFeatures(m)
	case wire.SetMemTable:
		return s.setMemTable(m)
	case wire.AddMemReg:
		return s.addMemReg(m)
	case wire.RemMemReg:
		return s.remMemReg(m)
	case wire.SetVringNum:
		return s.setVringNum(m)
	case wire.SetVringAddr:
		return s.setVringAddr(m)
	case wire.SetVringBase:
		return s.setVringBase(m)
	case wire.SetVringKick, wire.SetVringCall, wire.SetVringErr:
		return s.setVringFD(m)
	case wire.SetVringEnable:
		return s.setVringEnable(m)
	case wire.SetBackendReqFD:
		return s.setBackendFD(m.take(0))
	case wire.SetConfig:
		return s.setConfig(m)
	case wire.SetInflightFD:
		return s.setInflight(m)
	case wire.ResetDevice:
		return s.reset()
	case wire.SetStatus:
		v, err := wire.DecodeU64(m.Request, m.body)
		if err != nil {
			return err
		}
		s.status = v
		if v == 0 { // virtio 1.1, 2.1.1: a reset
			return s.stopAll()
		}
		return nil
	}
	return wire.ErrUnknown
}

func (s *session) setFeatures(m *message) error {
	v, err := wire.DecodeU64(m.Request, m.body)
	if err != nil {
		return err
	}
	if extra := v &^ s.offered; extra != 0 {
		return fmt.Errorf("bits %#x were not offered: %w", extra, errProtocol)
	}
	s.features = v
	s.updateView(s.dev.Info())
	if err := s.applyLog(); err != nil {
		return err
	}
	return s.startReady()
}

func (s *session) setProtocolFeatures(m *message) error {
	v, err := wire.DecodeU64(m.Request, m.body)
	if err != nil {
		return err
	}
	if extra := v &^ protocolFeatures; extra != 0 {
		return fmt.Errorf("bits %#x were not offered: %w", extra, errProtocol)
	}
	s.protocol = v
	s.notice.enable(v&wire.ProtocolConfig != 0)
	return nil
}

// await waits for done while the front end is there.
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

// claim makes this session the volume's writer before its first ring starts. A
// session whose front end is gone but which has not given back the claim yet is
// waited for.
func (s *session) claim() error {
	if s.release != nil || s.dev.Info().ReadOnly {
		return nil
	}
	for _, other := range s.ep.others(s) {
		if mem.HungUp(other.conn) {
			if err := s.await(other.done); err != nil {
				return err
			}
		}
	}
	release, err := s.dev.Claim(block.Claimant{
		Kind: "vhost", ID: "session " + strconv.FormatUint(s.id, 10) + " of pid " + strconv.Itoa(int(s.pid)),
	})
	if err != nil {
		return fmt.Errorf("claiming the volume: %w", err)
	}
	s.release = release
	return nil
}

func (s *session) unclaim() {
	if s.release != nil {
		s.release()
		s.release = nil
	}
}

// teardown gives everything back. Memory is unmapped only when no request in
// flight can touch it any more.
func (s *session) teardown() {
	s.conn.Close()
	s.notice.close()
	if s.unwatch != nil {
		s.unwatch()
	}
	for _, r := range s.rings {
		r.beginStop()
	}
	for _, r := range s.rings {
		for r.queue != nil {
			s.dev.Cancel(s)
			select {
			case <-r.queue.Drained():
				r.endStop()
			case <-time.After(cancelInterval):
			}
		}
	}
	s.unclaim()
	for _, r := range s.rings {
		r.close()
	}
	if !s.leak.Load() {
		if s.table != nil {
			s.table.Release()
		}
		if s.dirty != nil {
			s.dirty.mapping.Release()
		}
		s.inflight.close()
	} else {
		s.log.Error().Msg("the device did not survive a fault on guest memory; the memory stays mapped")
	}
	s.ep.ended(s, s.failure())
	close(s.done)
}
