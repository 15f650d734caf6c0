package remote

import (
	"crypto/tls"
	"errors"
	"io"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"scoria/alba/asd"
	"scoria/alba/wire"

	"golang.org/x/sys/unix"
)

// A reader does a small read itself while it seems to be the only request: that spares
// it two changes of goroutines, which cost more than the rest of its way through the
// daemon. Meanwhile nothing else is read from the connection. So that nobody waits
// behind a disk, one that has taken inlineLimit is left to itself and another goroutine
// goes on reading (see watch); and when requests turn out to have waited inlineWaits
// times in a row, the next inlineRest go to goroutines of their own.
const (
	inlineLimit = time.Millisecond
	inlineWaits = 2
	inlineRest  = 32
)

// errReplaced: another goroutine is the connection's reader now.
var errReplaced = errors.New("another reader has taken over")

// inline is the state of that. Without a comment, a field is the reader's.
type inline struct {
	waits int // requests in a row that were here before they were read
	rest  int // how many more go to goroutines

	last int64 // the last value of begun: no two are equal

	// begun is when the reader began the request that it does itself, in ns since base,
	// and 0 while it reads. Whoever sets it back to 0, reader or watch, decides who
	// reads on.
	begun atomic.Int64
	used  atomic.Bool // since watch ran
	armed atomic.Bool // watch will run
	timer *time.Timer // runs watch

	mu    sync.Mutex // held by watch
	ended bool       // watch does nothing any more
}

// base is what begun counts from.
var base = time.Now()

// quick says that a request can be done by the reader.
func quick(req *wire.Request) bool {
	return req.Op == wire.OpReadAt && req.Priority == asd.PriorityGuest && req.Size < bulkBytes
}

// arrived notes whether the reader waited for a request.
func (l *inline) arrived(waited bool) {
	if waited {
		l.waits = 0
	} else if l.waits++; l.waits >= inlineWaits {
		l.waits, l.rest = 0, inlineRest
	}
}

// may says whether the reader does the next quick request itself; alone: there is no
// other under way.
func (l *inline) may(alone bool) bool {
	if l.rest > 0 && alone {
		l.rest--
	}
	return l.rest == 0 && alone
}

// doInline does a request; errReplaced if that took so long that there is another
// reader.
func (sc *serverConn) doInline(do func()) error {
	l := &sc.inline
	begun := max(int64(time.Since(base)), l.last+1)
	l.last = begun
	l.begun.Store(begun)
	l.used.Store(true)
	l.arm(inlineLimit)
	do()
	if !l.begun.CompareAndSwap(begun, 0) {
		return errReplaced
	}
	return nil
}

// arm has watch run after d if it is not going to.
func (l *inline) arm(d time.Duration) {
	if !l.armed.Load() && l.armed.CompareAndSwap(false, true) {
		l.timer.Reset(d)
	}
}

// watch starts another reader if the one there is has been with a request for too long,
// and runs again as long as there are such requests: a timer per request would wake a
// thread for each.
func (sc *serverConn) watch() {
	l := &sc.inline
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.ended {
		return
	}
	l.armed.Store(false)
	begun, wait := l.begun.Load(), inlineLimit
	if begun != 0 {
		if wait -= time.Since(base) - time.Duration(begun); wait > 0 {
			l.arm(wait)
			return
		}
		if l.begun.CompareAndSwap(begun, 0) {
			sc.handlers.Go(sc.read) // the one whose place it takes is among them still
		}
		wait = inlineLimit
	}
	if l.used.Swap(false) {
		l.arm(wait)
	}
}

// end returns when watch does nothing any more.
func (l *inline) end() {
	l.mu.Lock()
	l.ended = true
	l.mu.Unlock()
	l.timer.Stop()
}

// waitReader reads from a connection and notes whether it had to wait.
type waitReader struct {
	c      net.Conn
	raw    syscall.RawConn // of c, or of what is below its TLS
	plain  bool            // of c
	waited bool

	// Of a Read.
	read func(fd uintptr) bool
	peek func(fd uintptr)
	p    []byte
	n    int
	err  error
}

func newWaitReader(c net.Conn) *waitReader {
	r := &waitReader{c: c}
	below := c
	if t, ok := c.(*tls.Conn); ok {
		below = t.NetConn()
	}
	if sc, ok := below.(syscall.Conn); ok {
		if raw, err := sc.SyscallConn(); err == nil {
			r.raw, r.plain = raw, below == c
		}
	}
	r.read = func(fd uintptr) bool {
		for {
			r.n, r.err = unix.Read(int(fd), r.p)
			switch r.err {
			case unix.EINTR:
				continue
			case unix.EAGAIN:
				r.waited = true
				return false
			}
			return true
		}
	}
	r.peek = func(fd uintptr) {
		var b [1]byte
		_, _, err := unix.Recvfrom(int(fd), b[:], unix.MSG_PEEK|unix.MSG_DONTWAIT)
		r.waited = r.waited || err == unix.EAGAIN
	}
	return r
}

// Read implements io.Reader.
func (r *waitReader) Read(p []byte) (int, error) {
	if !r.plain {
		if r.raw != nil {
			_ = r.raw.Control(r.peek) // Read says what is wrong
		}
		return r.c.Read(p)
	}
	r.p = p
	err := r.raw.Read(r.read)
	n, rerr := max(r.n, 0), r.err
	r.p, r.n, r.err = nil, 0, nil
	switch {
	case err != nil:
		return 0, err
	case rerr != nil:
		return 0, os.NewSyscallError("read", rerr)
	case n == 0 && len(p) > 0:
		return 0, io.EOF
	}
	return n, nil
}
