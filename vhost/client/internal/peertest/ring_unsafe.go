package peertest

import (
	"fmt"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"
)

// ring is the device's half of a split virtqueue, in the fewest words: it trusts
// the driver, which is the client under test.
type ring struct {
	p                 *session
	size              uint64
	desc, avail, used uint64 // offsets in the region
	last              uint16
	call              int
	stop              atomic.Bool
	done              sync.WaitGroup
}

func (q *ring) at(off uint64) unsafe.Pointer {
	return unsafe.Pointer(&q.p.memory.Bytes()[off])
}

// pass ends all requests that are in the ring and returns their number.
func (q *ring) pass() int {
	idx := uint16(atomic.LoadUint32((*uint32)(q.at(q.avail))) >> 16)
	first := q.last
	for q.last != idx {
		slot := uint64(q.last) % q.size
		head := *(*uint16)(q.at(q.avail + 4 + 2*slot))
		*(*uint8)(q.at(q.status(head))) = 0
		e := (*[2]uint32)(q.at(q.used + 4 + 8*slot))
		e[0], e[1] = uint32(head), 1
		if q.p.s.Used != nil {
			e[0] = q.p.s.Used(e[0])
		}
		q.last++
	}
	if first == q.last {
		return 0
	}
	atomic.SwapUint32((*uint32)(q.at(q.used)), uint32(q.last)<<16) // a full barrier before the look at the event
	event := uint16(atomic.LoadUint32((*uint32)(q.at(q.avail + 4 + 2*q.size))))
	if q.last-event-1 < q.last-first {
		one := [8]byte{1}
		unix.Write(q.call, one[:])
	}
	return int(q.last - first)
}

// status is the offset of the status byte of the chain at head: its last buffer.
func (q *ring) status(head uint16) uint64 {
	type desc struct {
		addr  uint64
		len   uint32
		flags uint16
		next  uint16
	}
	d := *(*desc)(q.at(q.desc + 16*uint64(head)))
	table := q.desc
	if d.flags&4 != 0 {
		table = d.addr - q.p.region.GuestAddr
		d = *(*desc)(q.at(table))
	}
	for d.flags&1 != 0 {
		d = *(*desc)(q.at(table + 16*uint64(d.next)))
	}
	return d.addr - q.p.region.GuestAddr
}

func connOf(fd int) (*net.UnixConn, error) {
	f := os.NewFile(uintptr(fd), "backend")
	defer f.Close()
	c, err := net.FileConn(f)
	if err != nil {
		return nil, err
	}
	u, ok := c.(*net.UnixConn)
	if !ok {
		return nil, fmt.Errorf("%T is no unix socket", c)
	}
	return u, nil
}
