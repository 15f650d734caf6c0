package vfs

import (
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Linux's asynchronous I/O (io_submit(2)), used for no more than having a few
// direct writes under way at the same time: whoever submits waits for them all.

// iocb is struct iocb of linux/aio_abi.h, little endian.
type iocb struct {
	data   uint64 // comes back in the event
	_      uint64 // key, flags of the single call
	opcode uint16
	_      int16 // priority
	fd     uint32
	buf    uintptr // of iovecs
	count  uint64  // of iovecs
	offset int64
	_      [2]uint64 // reserved, flags and descriptor of a notice
}

// ioEvent is struct io_event.
type ioEvent struct {
	data   uint64
	_      uint64 // the iocb
	result int64  // bytes, or a negative errno
	_      int64
}

const (
	iocbPwritev = 8
	aioDepth    = 4 // parts that one context has under way
)

// aioContexts holds contexts that nobody uses. Making one costs tens of
// microseconds.
var aioContexts = make(chan *aioContext, 16)

// aioContext is a kernel's context with what a submission needs; one caller at a
// time. It is on the heap, and so is what vecs point to: nothing moves while the
// kernel has it.
type aioContext struct {
	id     uintptr
	cbs    [aioDepth]iocb
	ptrs   [aioDepth]*iocb
	events [aioDepth]ioEvent
	vecs   [aioDepth][]unix.Iovec
}

// takeAIO returns a context, or nil where the kernel gives none.
func takeAIO() *aioContext {
	select {
	case c := <-aioContexts:
		return c
	default:
	}
	c := &aioContext{}
	if _, _, errno := unix.Syscall(unix.SYS_IO_SETUP, aioDepth, uintptr(unsafe.Pointer(&c.id)), 0); errno != 0 {
		return nil
	}
	return c
}

func (c *aioContext) giveBack() {
	for i := range c.vecs {
		clear(c.vecs[i])
	}
	select {
	case aioContexts <- c:
	default:
		_, _, _ = unix.Syscall(unix.SYS_IO_DESTROY, c.id, 0, 0)
	}
}

// write submits all parts, at most aioDepth, and waits until all that were
// submitted have ended. It returns how many those are and, for each, the bytes
// written or a negative errno.
func (c *aioContext) write(fd int, parts []Part) (submitted int, results [aioDepth]int64) {
	for i := range parts {
		vecs := c.vecs[i][:0]
		for _, b := range parts[i].Bufs {
			if len(b) == 0 {
				continue
			}
			v := unix.Iovec{Base: unsafe.SliceData(b)}
			v.SetLen(len(b))
			vecs = append(vecs, v)
		}
		c.vecs[i] = vecs
		c.cbs[i] = iocb{
			data: uint64(i), opcode: iocbPwritev, fd: uint32(fd), offset: parts[i].Off,
			buf: uintptr(unsafe.Pointer(unsafe.SliceData(vecs))), count: uint64(len(vecs)),
		}
		c.ptrs[i] = &c.cbs[i]
	}
	n, _, errno := unix.Syscall(unix.SYS_IO_SUBMIT, c.id, uintptr(len(parts)), uintptr(unsafe.Pointer(&c.ptrs[0])))
	if errno != 0 {
		return 0, results
	}
	submitted = int(n)
	// The buffers are the kernel's until each has ended: there is no way out of
	// this loop before.
	for ended := 0; ended < submitted; {
		got, _, errno := unix.Syscall6(unix.SYS_IO_GETEVENTS, c.id, uintptr(submitted-ended), uintptr(submitted-ended),
			uintptr(unsafe.Pointer(&c.events[0])), 0, 0)
		if errno == unix.EINTR {
			continue
		}
		if errno != 0 {
			panic("vfs: io_getevents: " + errno.Error())
		}
		for _, e := range c.events[:got] {
			results[e.data] = e.result
		}
		ended += int(got)
	}
	runtime.KeepAlive(c)
	return submitted, results
}
