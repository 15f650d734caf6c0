package shm

import (
	"context"
	"fmt"
	"net"
	"time"

	"golang.org/x/sys/unix"

	"scoria/shm/mem"
	"scoria/shm/wire"
)

const (
	// ringDescriptors is what the daemon keeps open of a ring: its two eventfds.
	ringDescriptors = 2
	// maxRefusals bounds the refused clients that are told why at once. Others are
	// hung up on.
	maxRefusals = 64
)

// usage is what clients take of the daemon's.
type usage struct {
	connections int
	descriptors int
	memory      int64 // bytes, of rings
}

func (u *usage) add(v usage) {
	u.connections += v.connections
	u.descriptors += v.descriptors
	u.memory += v.memory
}

func (u *usage) sub(v usage) {
	u.connections -= v.connections
	u.descriptors -= v.descriptors
	u.memory -= v.memory
}

// oneConnection is what a connection takes.
var oneConnection = usage{connections: 1, descriptors: 1}

// half is what one user but root may have.
func (u usage) half() usage {
	return usage{(u.connections + 1) / 2, (u.descriptors + 1) / 2, (u.memory + 1) / 2}
}

// check fails, naming what is short, if want does not fit into limit any more.
func (u usage) check(want, limit usage) error {
	switch {
	case want.connections > limit.connections-u.connections:
		return fmt.Errorf("%d of at most %d connections are open", u.connections, limit.connections)
	case want.descriptors > limit.descriptors-u.descriptors:
		return fmt.Errorf("%d of at most %d descriptors are taken by connections and rings", u.descriptors, limit.descriptors)
	case want.memory > limit.memory-u.memory:
		return fmt.Errorf("rings take %d of at most %d bytes of memory, and this needs %d", u.memory, limit.memory, want.memory)
	}
	return nil
}

// defaultDescriptors leaves half of what the process may have to everything else.
func defaultDescriptors() int {
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		return 512
	}
	return int(min(limit.Cur, 1<<20) / 2)
}

// take counts what one more connection or ring of a user takes, or fails, naming
// the limit that it is over. s.mu is held.
func (s *Server) take(uid uint32, want usage) error {
	limit := usage{s.cfg.MaxConnections, s.cfg.MaxDescriptors, s.cfg.MemoryBytes}
	if err := s.used.check(want, limit); err != nil {
		return err
	}
	user := s.users[uid]
	if user == nil {
		user = &usage{}
	}
	if uid != 0 {
		if err := user.check(want, limit.half()); err != nil {
			return fmt.Errorf("user %d: %w", uid, err)
		}
	}
	s.users[uid] = user
	s.used.add(want)
	user.add(want)
	return nil
}

// give counts it no more. s.mu is held.
func (s *Server) give(uid uint32, what usage) {
	s.used.sub(what)
	user := s.users[uid]
	if user.sub(what); *user == (usage{}) {
		delete(s.users, uid)
	}
}

func (s *Server) takeRing(uid uint32, want usage) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.take(uid, want)
}

func (s *Server) giveRing(uid uint32, what usage) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.give(uid, what)
}

// refuse ends a connection over a limit. The client is told why in the answer to
// its hello, unless there are too many such clients.
func (s *Server) refuse(conn *net.UnixConn, reason error) {
	select {
	case s.refusing <- struct{}{}:
	default:
		conn.Close()
		return
	}
	_ = conn.SetDeadline(time.Now().Add(helloTimeout))
	stop := context.AfterFunc(s.ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })
	s.refusals.Go(func() {
		defer func() { <-s.refusing }()
		defer conn.Close()
		defer stop()
		var p [128]byte
		n, _, err := mem.ReadPacket(conn, p[:], 0)
		if err != nil {
			return
		}
		if h, _, err := wire.Parse(p[:n]); err == nil && h.Type == wire.Hello {
			_ = mem.WriteFull(conn, wire.Append(nil, wire.Header{Type: h.Type | wire.Answer, Tag: h.Tag, Status: wire.Limit}, []byte(reason.Error())))
		}
	})
}
