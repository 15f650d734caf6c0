package shm

import (
	"fmt"
	"net"

	"golang.org/x/sys/unix"
)

// Peer is who is at the other end of a connection, as the kernel noted it when
// the connection was made.
type Peer struct {
	PID      int32
	UID, GID uint32
	Groups   []uint32 // supplementary
}

// In reports whether the peer belongs to a group.
func (p *Peer) In(gid uint32) bool {
	if p.GID == gid {
		return true
	}
	for _, g := range p.Groups {
		if g == gid {
			return true
		}
	}
	return false
}

func peerOf(conn *net.UnixConn) (p Peer, err error) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return p, err
	}
	cerr := raw.Control(func(fd uintptr) {
		var cred *unix.Ucred
		if cred, err = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED); err != nil {
			err = fmt.Errorf("SO_PEERCRED: %w", err)
			return
		}
		p = Peer{PID: cred.Pid, UID: cred.Uid, GID: cred.Gid}
		p.Groups, err = peerGroups(int(fd))
	})
	if cerr != nil {
		return p, cerr
	}
	return p, err
}
