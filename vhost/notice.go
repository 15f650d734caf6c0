package vhost

import (
	"fmt"
	"net"
	"os"
	"sync"
	"time"

	"scoria/vhost/wire"
)

// noticeTimeout bounds the write of a notice to a front end that does not read.
const noticeTimeout = time.Second

// noticeState tells the front end of a resize over the channel that it gave.
// QEMU listens only while the device is started, and compares only the
// capacity; so a change is told when it comes and again when rings start, as
// long as the front end has not read the new size. Any goroutine.
type noticeState struct {
	mu      sync.Mutex
	conn    *net.UnixConn
	enabled bool // CONFIG was negotiated
	rings   int  // started
	size    uint64
	told    uint64 // size that the front end last read
	sending bool
	closed  bool
}

// setBackendFD takes the channel for the back end's own requests.
func (s *session) setBackendFD(fd int) error {
	f := os.NewFile(uintptr(fd), "vhost-user back-end channel")
	defer f.Close()
	c, err := net.FileConn(f)
	if err != nil {
		return fmt.Errorf("back-end channel: %w", err)
	}
	u, ok := c.(*net.UnixConn)
	if !ok {
		c.Close()
		return fmt.Errorf("back-end channel is no unix socket: %w", errProtocol)
	}
	n := &s.notice
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.conn != nil {
		n.conn.Close()
	}
	n.conn = u
	return nil
}

func (n *noticeState) enable(on bool) {
	n.mu.Lock()
	n.enabled = on
	n.mu.Unlock()
}

// reported notes that the front end has read size.
func (n *noticeState) reported(size uint64) {
	n.mu.Lock()
	n.size, n.told = size, size
	n.mu.Unlock()
}

// noteResize is the device's call after each change.
func (s *session) noteResize(size uint64) {
	s.notice.mu.Lock()
	s.notice.size = size
	s.notice.mu.Unlock()
	s.notice.send(s)
}

func (n *noticeState) ringStarted(s *session) {
	n.mu.Lock()
	n.rings++
	n.mu.Unlock()
	n.send(s)
}

func (n *noticeState) ringStopped() {
	n.mu.Lock()
	n.rings--
	n.mu.Unlock()
}

// send tells the front end, if there is something to tell, from a goroutine of
// its own: neither the device nor the session may wait for it.
func (n *noticeState) send(s *session) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.conn == nil || !n.enabled || n.rings == 0 || n.told == 0 || n.told == n.size || n.sending || n.closed {
		return
	}
	n.sending = true
	conn, size := n.conn, n.size
	go func() {
		_ = conn.SetWriteDeadline(time.Now().Add(noticeTimeout))
		_, err := conn.Write(wire.AppendMessage(nil, wire.BackendConfigChange, 0, nil))
		if err != nil {
			s.log.Warn().Err(err).Msg("telling the front end of the new size")
		}
		n.mu.Lock()
		n.sending = false
		again := n.size != size
		n.mu.Unlock()
		if again && err == nil {
			n.send(s)
		}
	}()
}

func (n *noticeState) close() {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.closed = true
	if n.conn != nil {
		n.conn.Close()
	}
}
