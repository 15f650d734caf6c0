package integration

import (
	"io"
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// slowRelay is a TCP address through which another one is reached, as late as the test
// wants: each byte is passed on a delay after it came, in both directions.
type slowRelay struct {
	ln    net.Listener
	delay atomic.Int64 // nanoseconds
	wg    sync.WaitGroup

	mu     sync.Mutex
	target string
	conns  map[net.Conn]struct{} // both ends of each
	ended  bool
}

// Bytes under way in one direction are at most relayDepth times relayChunk.
const (
	relayChunk = 64 << 10
	relayDepth = 64
)

// relayTo serves an address of its own until the test ends.
func relayTo(t *testing.T, target string) *slowRelay {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	r := &slowRelay{ln: ln, target: target, conns: map[net.Conn]struct{}{}}
	r.wg.Go(r.accept)
	t.Cleanup(func() {
		r.mu.Lock()
		r.ended = true
		for c := range r.conns {
			c.Close()
		}
		r.mu.Unlock()
		ln.Close()
		r.wg.Wait()
	})
	return r
}

func (r *slowRelay) address() string { return r.ln.Addr().String() }

func (r *slowRelay) accept() {
	for {
		front, err := r.ln.Accept()
		if err != nil {
			return
		}
		r.mu.Lock()
		target := r.target
		r.mu.Unlock()
		back, err := net.Dial("tcp", target)
		if err != nil { // nobody listens there: that is what the caller sees, too
			front.Close()
			continue
		}
		if !r.keep(front, back) {
			return
		}
		r.wg.Go(func() { r.pass(front, back) })
		r.wg.Go(func() { r.pass(back, front) })
	}
}

// keep notes a connection's ends, or closes them if the test has ended.
func (r *slowRelay) keep(ends ...net.Conn) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, c := range ends {
		if r.ended {
			c.Close()
		} else {
			r.conns[c] = struct{}{}
		}
	}
	return !r.ended
}

// pass passes on what comes from one end, until either ends; then both do.
func (r *slowRelay) pass(from, to net.Conn) {
	type chunk struct {
		data []byte
		due  time.Time
	}
	chunks := make(chan chunk, relayDepth)
	r.wg.Go(func() {
		for c := range chunks {
			time.Sleep(time.Until(c.due))
			if _, err := to.Write(c.data); err != nil {
				from.Close()
			}
		}
		from.Close()
		to.Close()
		r.mu.Lock()
		defer r.mu.Unlock()
		delete(r.conns, from)
		delete(r.conns, to)
	})
	defer close(chunks)
	for {
		p := make([]byte, relayChunk)
		n, err := io.ReadAtLeast(from, p, 1)
		if err != nil {
			return
		}
		chunks <- chunk{p[:n], time.Now().Add(time.Duration(r.delay.Load()))}
	}
}
