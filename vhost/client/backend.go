package client

import (
	"fmt"
	"net"

	"golang.org/x/sys/unix"

	"scoria/shm/mem"
	"scoria/vhost/wire"
)

// openBackend gives the server a channel for requests of its own and follows it.
func (c *Client) openBackend(s *session) error {
	conn, fd, err := socketpair()
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if err := s.conn.Do(wire.SetBackendReqFD, nil, fd); err != nil {
		conn.Close()
		return err
	}
	s.backend = conn
	c.wg.Go(func() {
		c.serveBackend(s.conn, conn)
		conn.Close()
	})
	return nil
}

// serveBackend answers the server's requests until the channel ends.
func (c *Client) serveBackend(main *Conn, conn *net.UnixConn) {
	for {
		m, err := readMessage(conn)
		if err != nil {
			return
		}
		mem.CloseAll(m.fds)
		status := uint64(0)
		if err := c.handleBackend(main, m); err != nil {
			status = 1
		}
		if !m.header.NeedReply() {
			continue
		}
		answer := wire.AppendMessage(nil, m.header.Request, wire.FlagReply, wire.AppendU64(nil, status))
		if err := mem.WriteFull(conn, answer); err != nil {
			return
		}
	}
}

// handleBackend carries out one request. As in QEMU the config space is read
// before the request is answered: a server that stops serving its main
// connection while it waits for that answer hangs.
func (c *Client) handleBackend(main *Conn, m reply) error {
	if m.header.Request != wire.BackendConfigChange {
		return fmt.Errorf("backend request %d: %w", uint32(m.header.Request), wire.ErrUnknown)
	}
	if err := c.loadConfig(main); err != nil {
		return err
	}
	if c.opts.OnConfigChange != nil {
		c.opts.OnConfigChange(c.Config())
	}
	return nil
}
