package mem

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strconv"

	"golang.org/x/sys/unix"
)

// ErrFDs: more descriptors came with a message than it may carry.
var ErrFDs = errors.New("too many file descriptors in one message")

// ErrPacket: a packet is longer than any message.
var ErrPacket = errors.New("packet is too long")

// CloseAll closes the descriptors.
func CloseAll(fds []int) {
	for _, fd := range fds {
		unix.Close(fd)
	}
}

// CloseFD closes a descriptor and marks it closed, with -1; -1 is left alone.
func CloseFD(fd *int) {
	if *fd >= 0 {
		unix.Close(*fd)
		*fd = -1
	}
}

// ReadFull fills p from the socket and returns the descriptors that came with
// these bytes, close-on-exec. They belong to the caller unless err is set. It
// fails with io.EOF at an end before the first byte, io.ErrUnexpectedEOF at a
// later one, and ErrFDs if more than maxFDs descriptors came.
func ReadFull(conn *net.UnixConn, p []byte, maxFDs int) (fds []int, err error) {
	defer func() {
		if err != nil {
			CloseAll(fds)
			fds = nil
		}
	}()
	oob := make([]byte, unix.CmsgSpace(4*maxFDs))
	for n := 0; n < len(p); {
		got, oobn, flags, _, err := conn.ReadMsgUnix(p[n:], oob)
		// Descriptors are installed even where the read is an error for us.
		more, perr := parseRights(oob[:oobn])
		fds = append(fds, more...)
		switch {
		case errors.Is(err, io.EOF) && n > 0:
			return fds, io.ErrUnexpectedEOF
		case err != nil:
			return fds, err
		case perr != nil:
			return fds, perr
		case flags&unix.MSG_CTRUNC != 0 || len(fds) > maxFDs:
			return fds, fmt.Errorf("want at most %d: %w", maxFDs, ErrFDs)
		case got == 0 && n == 0:
			return fds, io.EOF
		case got == 0:
			return fds, io.ErrUnexpectedEOF
		}
		n += got
	}
	return fds, nil
}

// ReadPacket reads one packet of a SOCK_SEQPACKET socket with its descriptors,
// close-on-exec, which belong to the caller unless err is set. It fails with
// io.EOF at the end, ErrFDs if more than maxFDs descriptors came, and ErrPacket
// if the packet is longer than p.
func ReadPacket(conn *net.UnixConn, p []byte, maxFDs int) (n int, fds []int, err error) {
	oob := make([]byte, unix.CmsgSpace(4*maxFDs))
	n, oobn, flags, _, err := conn.ReadMsgUnix(p, oob)
	// Descriptors are installed even where the read is an error for us.
	fds, perr := parseRights(oob[:oobn])
	switch {
	case err != nil:
	case perr != nil:
		err = perr
	case flags&unix.MSG_CTRUNC != 0 || len(fds) > maxFDs:
		err = fmt.Errorf("want at most %d: %w", maxFDs, ErrFDs)
	case flags&unix.MSG_TRUNC != 0:
		err = fmt.Errorf("more than %d bytes: %w", len(p), ErrPacket)
	case n == 0:
		err = io.EOF
	}
	if err != nil {
		CloseAll(fds)
		return 0, nil, err
	}
	return n, fds, nil
}

func parseRights(oob []byte) ([]int, error) {
	if len(oob) == 0 {
		return nil, nil
	}
	msgs, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return nil, os.NewSyscallError("parsing control message", err)
	}
	var fds []int
	for i := range msgs {
		if msgs[i].Header.Level != unix.SOL_SOCKET || msgs[i].Header.Type != unix.SCM_RIGHTS {
			continue
		}
		more, err := unix.ParseUnixRights(&msgs[i])
		if err != nil {
			return fds, os.NewSyscallError("parsing passed descriptors", err)
		}
		fds = append(fds, more...)
	}
	return fds, nil
}

// WriteFull writes p with the descriptors, which stay the caller's.
func WriteFull(conn *net.UnixConn, p []byte, fds ...int) error {
	var oob []byte
	if len(fds) > 0 {
		oob = unix.UnixRights(fds...)
	}
	n, _, err := conn.WriteMsgUnix(p, oob, nil)
	if err != nil {
		return err
	}
	// Descriptors go with the first byte; the rest, if any, goes without.
	if n < len(p) {
		_, err = conn.Write(p[n:])
	}
	return err
}

// NewEventFD returns a non-blocking, close-on-exec eventfd with count 0.
func NewEventFD() (int, error) {
	fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		return -1, os.NewSyscallError("eventfd", err)
	}
	return fd, nil
}

// CheckEventFD fails with ErrNotEventFD if fd, received from a peer, is
// anything else: writing to a pipe or a file could block or do harm.
func CheckEventFD(fd int) error {
	link, err := os.Readlink("/proc/self/fd/" + strconv.Itoa(fd))
	if err != nil {
		return err
	}
	if link != "anon_inode:[eventfd]" {
		return fmt.Errorf("%s: %w", link, ErrNotEventFD)
	}
	return nil
}

var one = binary.NativeEndian.AppendUint64(nil, 1)

// SignalEventFD adds 1 to the count. The descriptor may come from a peer, who
// may have made it blocking and filled its count: the call then blocks until
// somebody reads it, but lets the scheduler go on. A full non-blocking one is
// no error: it is signalled already.
func SignalEventFD(fd int) error {
	for {
		_, err := unix.Write(fd, one)
		switch err {
		case nil, unix.EAGAIN:
			return nil
		case unix.EINTR:
		default:
			return os.NewSyscallError("write to eventfd", err)
		}
	}
}

// DrainEventFD sets the count to 0 and reports whether it was not. It never
// blocks, whatever the descriptor's flags are.
func DrainEventFD(fd int) (bool, error) {
	var b [8]byte
	_, err := unix.Preadv2(fd, [][]byte{b[:]}, -1, unix.RWF_NOWAIT)
	switch err {
	case nil:
		return true, nil
	case unix.EAGAIN:
		return false, nil
	}
	return false, os.NewSyscallError("read from eventfd", err)
}

// HungUp reports whether the other end of a connection is closed. Any goroutine.
func HungUp(conn *net.UnixConn) bool {
	raw, err := conn.SyscallConn()
	if err != nil {
		return true
	}
	hup := false
	err = raw.Control(func(fd uintptr) {
		p := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLRDHUP}}
		n, err := unix.Poll(p, 0)
		hup = err == nil && n > 0 && p[0].Revents&(unix.POLLHUP|unix.POLLRDHUP|unix.POLLERR) != 0
	})
	return err != nil || hup
}
