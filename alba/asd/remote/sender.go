package remote

import (
	"net"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// outgoing is a frame on its way into a connection.
type outgoing struct {
	frame []byte
	data  [][]byte
	// claim, if set, is asked before run writes the first byte; with false the frame is
	// left out. It may refuse only when send has returned.
	claim func() bool
	// written, if set, is called when data is no longer needed.
	written func()
}

// bytes is what the frame has in all.
func (o *outgoing) bytes() int {
	n := len(o.frame)
	for _, p := range o.data {
		n += len(p)
	}
	return n
}

const (
	// maxBatch bounds the frames of one write.
	maxBatch = 64
	// directBytes bounds what send writes itself.
	directBytes = 32 << 10
	// directPieces bounds the slices of such a frame.
	directPieces = 4
)

// owner says who may write to a connection.
type owner int

const (
	ownerNone   owner = iota
	ownerCaller       // a call of send
	ownerLoop         // run, which has been or is being woken for it
)

// sender writes frames to a connection. A small one, while nothing else is being
// written, is written by whoever has it, as far as the socket takes it at once: that
// spares a small request two changes of goroutines, there and back. All else, and what
// the socket did not take, is left to one goroutine, run, which writes as many frames
// per system call as wait; so nobody ever waits in send.
type sender struct {
	c       net.Conn
	raw     syscall.RawConn // nil with TLS: then run writes everything
	timeout time.Duration   // each write must make progress within it
	kick    chan struct{}   // of capacity 1: run is the owner

	mu     sync.Mutex
	owner  owner
	queue  []*outgoing // bounded by the callers: by the requests under way, and limit
	limit  int         // of the queue for what may be left out
	rest   net.Buffers // of the frame restOf, written in part
	restOf *outgoing
	closed bool

	// Of an ownerCaller.
	write  func(fd uintptr) bool // writes pieces
	pieces [directPieces][]byte
	n      int
	err    error
}

// newSender returns a sender whose queue is at most limit long when something is offered
// to it.
func newSender(c net.Conn, limit int, timeout time.Duration) *sender {
	s := &sender{c: c, timeout: timeout, limit: limit, kick: make(chan struct{}, 1)}
	if sc, ok := c.(syscall.Conn); ok { // TLS has none
		if raw, err := sc.SyscallConn(); err == nil {
			s.raw = raw
		}
	}
	s.write = func(fd uintptr) bool {
		n := 0
		for n < directPieces && s.pieces[n] != nil {
			n++
		}
		s.n, s.err = unix.Writev(int(fd), s.pieces[:n])
		return true // never waits
	}
	return s
}

// send writes a frame or has it written; its written is called in any case, perhaps
// before send returns. The error is that of a write by this call: the connection is of
// no more use.
func (s *sender) send(o *outgoing) error {
	small := s.raw != nil && len(o.data) < directPieces && o.bytes() <= directBytes
	s.mu.Lock()
	switch {
	case s.closed:
		s.mu.Unlock()
		o.done()
		return nil
	case s.owner != ownerNone || !small:
		s.queue = append(s.queue, o)
		if s.owner == ownerNone {
			s.giveToLoop()
		}
		s.mu.Unlock()
		return nil
	}
	s.owner = ownerCaller
	s.mu.Unlock()
	return s.sendDirect(o)
}

// offer is send for what may be left out if too much waits already.
func (s *sender) offer(o *outgoing) error {
	s.mu.Lock()
	full := len(s.queue) >= s.limit
	s.mu.Unlock()
	if full {
		return nil
	}
	return s.send(o)
}

// giveToLoop makes run the owner. Called with mu.
func (s *sender) giveToLoop() {
	s.owner = ownerLoop
	select {
	case s.kick <- struct{}{}:
	default:
	}
}

// sendDirect writes a frame without waiting, and leaves to run what the socket doesn't
// take. The caller is the owner.
func (s *sender) sendDirect(o *outgoing) error {
	s.pieces = [directPieces][]byte{o.frame}
	copy(s.pieces[1:], o.data)
	err := s.raw.Write(s.write)
	n := max(s.n, 0)
	if err == nil {
		err = s.err
	}
	s.n, s.err, s.pieces = 0, nil, [directPieces][]byte{}
	if err == unix.EAGAIN || err == unix.EINTR {
		n, err = 0, nil
	}
	if n > 0 && o.claim != nil {
		o.claim() // who could have refused it is in here
	}
	all := err == nil && n == o.bytes()
	s.mu.Lock()
	done := err != nil || all || s.closed
	switch {
	case done:
	case n == 0:
		s.queue = append([]*outgoing{o}, s.queue...)
	default:
		s.restOf, s.rest = o, rest(o, n)
	}
	if len(s.queue) > 0 || s.restOf != nil {
		s.giveToLoop()
	} else {
		s.owner = ownerNone
	}
	s.mu.Unlock()
	if done {
		o.done()
	}
	return err
}

// rest returns what is left of a frame behind its first n bytes.
func rest(o *outgoing, n int) net.Buffers {
	bufs := append(net.Buffers{o.frame}, o.data...)
	for n > 0 {
		c := min(n, len(bufs[0]))
		bufs[0] = bufs[0][c:]
		if n -= c; len(bufs[0]) == 0 {
			bufs = bufs[1:]
		}
	}
	return bufs
}

// run writes what send leaves to it, until stop is closed or a write fails; then it is
// done with everything that is left, and send leaves out what comes later.
func (s *sender) run(stop <-chan struct{}) error {
	defer s.close()
	var batch []*outgoing
	for {
		select {
		case <-s.kick:
		case <-stop:
			return nil
		}
		for {
			var begun *outgoing
			var bufs net.Buffers
			begun, bufs, batch = s.take(batch[:0])
			if begun == nil && len(batch) == 0 {
				break
			}
			err := s.writeBatch(bufs, batch)
			for _, o := range append(batch, begun) {
				if o != nil {
					o.done()
				}
			}
			clear(batch)
			if err != nil {
				return err
			}
			select {
			case <-stop:
				return nil
			default:
			}
		}
	}
}

// take moves frames from the queue to batch, and the rest of one that was begun; if
// there is nothing, run is no longer the owner.
func (s *sender) take(batch []*outgoing) (*outgoing, net.Buffers, []*outgoing) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.owner != ownerLoop { // an old kick
		return nil, nil, batch
	}
	begun, bufs := s.restOf, s.rest
	s.restOf, s.rest = nil, nil
	n := min(len(s.queue), maxBatch)
	batch = append(batch, s.queue[:n]...)
	left := copy(s.queue, s.queue[n:])
	clear(s.queue[left:])
	s.queue = s.queue[:left]
	if begun == nil && n == 0 {
		s.owner = ownerNone
	}
	return begun, bufs, batch
}

// writeBatch writes the rest of a frame, if there is one, and a batch.
func (s *sender) writeBatch(bufs net.Buffers, batch []*outgoing) error {
	for _, o := range batch {
		if o.claim == nil || o.claim() {
			bufs = append(append(bufs, o.frame), o.data...)
		}
	}
	if len(bufs) == 0 {
		return nil
	}
	if err := s.c.SetWriteDeadline(time.Now().Add(s.timeout)); err != nil {
		return err
	}
	if _, err := bufs.WriteTo(s.c); err != nil {
		return err
	}
	return s.c.SetWriteDeadline(time.Time{}) // which sendDirect would meet
}

// close makes send leave everything out, and is done with what waits.
func (s *sender) close() {
	s.mu.Lock()
	left := s.queue
	if s.restOf != nil {
		left = append(left, s.restOf)
	}
	s.queue, s.restOf, s.rest, s.closed = nil, nil, nil, true
	s.mu.Unlock()
	for _, o := range left {
		o.done()
	}
}

func (o *outgoing) done() {
	if o.written != nil {
		o.written()
	}
}
