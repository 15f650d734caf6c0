package integration

import (
	"errors"
	"fmt"
	"net"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"scoria/shm/mem"
	"scoria/vhost/wire"
)

// cut says where a connection is to end, as it does for QEMU when the daemon is
// killed there.
type cut struct {
	message  int    // counted from 1; 0: nowhere
	answered bool   // the daemon got the message, and QEMU the answer if it has one
	reached  func() // called there before the connection ends, if answered; may be nil
}

func (c cut) String() string {
	if c.answered {
		return fmt.Sprintf("after the answer to message %d", c.message)
	}
	return fmt.Sprintf("instead of the answer to message %d", c.message)
}

// middleman is a vhost-user socket between QEMU and the daemon that can end a
// connection at an exact place.
type middleman struct {
	path, daemon string
	ln           *net.UnixListener
	wg           sync.WaitGroup

	// driverOK, if not nil, is called when the daemon has been told, for the n-th
	// time counted from 1, that the guest's driver is ready: all rings are started
	// and the guest has made no request yet. Set before QEMU starts.
	driverOK func(n int)

	mu    sync.Mutex
	oks   int
	cut   cut // of the next connection
	conns []*relay
	ended bool
}

// relay is one connection of QEMU's, passed on to the daemon.
type relay struct {
	man         *middleman
	front, back *net.UnixConn
	born        time.Time
	cut

	mu   sync.Mutex
	seen []wire.Request
	done bool
}

// between serves a socket of its own until the test ends.
func between(t *testing.T, daemon string) *middleman {
	t.Helper()
	m := &middleman{path: filepath.Join(scratch(t, true), "disk.sock"), daemon: daemon}
	ln, err := net.ListenUnix("unix", &net.UnixAddr{Name: m.path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	m.ln = ln
	m.wg.Go(m.accept)
	t.Cleanup(func() {
		m.mu.Lock()
		m.ended = true
		m.mu.Unlock()
		ln.Close()
		m.drop(cut{})
		m.wg.Wait()
	})
	return m
}

func (m *middleman) accept() {
	for {
		front, err := m.ln.AcceptUnix()
		if err != nil {
			return // closed
		}
		back := m.dial()
		if back == nil {
			front.Close()
			return
		}
		m.mu.Lock()
		r := &relay{man: m, front: front, back: back, born: time.Now(), cut: m.cut}
		m.cut = cut{}
		m.conns = append(m.conns, r)
		if m.ended {
			r.close()
		}
		m.mu.Unlock()
		m.wg.Go(r.run)
	}
}

// dial waits for the daemon: between two of them QEMU would not have been
// connected. It returns nil when the test ends.
func (m *middleman) dial() *net.UnixConn {
	for {
		back, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: m.daemon, Net: "unix"})
		if err == nil {
			return back
		}
		m.mu.Lock()
		ended := m.ended
		m.mu.Unlock()
		if ended {
			return nil
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// drop ends the present connection; the next one is to end at c. It returns the
// number of connections so far.
func (m *middleman) drop(c cut) int {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.cut = c
	for _, r := range m.conns {
		r.close()
	}
	return len(m.conns)
}

// connection returns the n-th one, counted from 0; nil: not yet.
func (m *middleman) connection(n int) *relay {
	m.mu.Lock()
	defer m.mu.Unlock()
	if n < len(m.conns) {
		return m.conns[n]
	}
	return nil
}

func (r *relay) close() {
	r.front.Close()
	r.back.Close()
}

// messages returns what QEMU has said so far, and whether the connection has ended.
func (r *relay) messages() ([]wire.Request, bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return append([]wire.Request{}, r.seen...), r.done
}

// run passes on messages, and answers to those that have one, until either side
// ends the connection or the place of the cut is reached.
func (r *relay) run() {
	defer func() {
		r.close()
		r.mu.Lock()
		r.done = true
		r.mu.Unlock()
	}()
	acks := false
	for n := 1; ; n++ {
		h, msg, fds, err := readMessage(r.front)
		if err != nil {
			return
		}
		r.mu.Lock()
		r.seen = append(r.seen, h.Request)
		r.mu.Unlock()
		if r.cut.message == n && !r.cut.answered {
			mem.CloseAll(fds)
			return
		}
		if !pass(r.back, msg, fds) {
			return
		}
		switch {
		case h.Request == wire.SetProtocolFeatures:
			v, err := wire.DecodeU64(h.Request, msg[wire.HeaderSize:])
			acks = err == nil && v&wire.ProtocolReplyAck != 0
		case n == 1 && h.Request != wire.GetFeatures:
			acks = true // negotiated before
		}
		if h.Request.HasReply() || h.NeedReply() && acks {
			_, msg, fds, err := readMessage(r.back)
			if err != nil || !pass(r.front, msg, fds) {
				return
			}
		}
		if h.Request == wire.SetStatus && msg[wire.HeaderSize]&statusDriverOK != 0 {
			r.man.ready()
		}
		if r.cut.message == n {
			if r.reached != nil {
				r.reached()
			}
			return
		}
	}
}

// statusDriverOK is DRIVER_OK (virtio 1.1, 2.1).
const statusDriverOK = 4

func (m *middleman) ready() {
	if m.driverOK == nil {
		return
	}
	m.mu.Lock()
	m.oks++
	n := m.oks
	m.mu.Unlock()
	m.driverOK(n)
}

func pass(to *net.UnixConn, msg []byte, fds []int) bool {
	err := mem.WriteFull(to, msg, fds...)
	mem.CloseAll(fds)
	return err == nil
}

// readMessage reads a whole message.
func readMessage(c *net.UnixConn) (h wire.Header, msg []byte, fds []int, err error) {
	msg = make([]byte, wire.HeaderSize)
	if fds, err = mem.ReadFull(c, msg, wire.MaxFDs); err != nil {
		return h, nil, nil, err
	}
	if h, err = wire.ParseHeader(msg); err == nil {
		body := make([]byte, h.Size)
		var more []int
		if h.Size > 0 {
			more, err = mem.ReadFull(c, body, wire.MaxFDs)
		}
		msg, fds = append(msg, body...), append(fds, more...)
	}
	if err != nil {
		mem.CloseAll(fds)
		return h, nil, nil, errors.Join(err, c.Close())
	}
	return h, msg, fds, nil
}
