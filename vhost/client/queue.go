package client

import (
	"errors"
	"fmt"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"scoria/vhost/virtq"
)

// Buffer is a piece of memory that the server can see.
type Buffer struct {
	Addr uint64 // guest physical, as Client.Addr returns it
	Len  uint32 // bytes
}

// Completion is a request that the server has ended.
type Completion struct {
	Tag     uint64 // as given when the request was added
	Written uint32 // bytes the server says it wrote, the status byte included
	Status  uint8  // StatusOK…
}

// ErrTimeout ends a Wait.
var ErrTimeout = errors.New("no completion in time")

// Queue is one virtqueue. It belongs to one goroutine at a time, apart from
// Wake. Nothing in it allocates after Connect.
//
// Requests are added (Read, Write, …), shown to the server by Kick, and returned
// by Poll. A request that finds no room is refused with false; Poll makes room.
type Queue struct {
	index    int
	ring     *virtq.DriverRing
	indirect bool
	maxSegs  int // data segments of one request

	slots    []slot
	slotAddr uint64
	tables   []virtq.DriverDesc // maxSegs+2 per slot, rounded up to stride
	tabAddr  uint64
	stride   int // descriptors

	tags []uint64 // by head
	segs []virtq.DriverSegment

	kickFD, callFD int
	one, got       [8]byte // for eventfd writes and reads
	fault          *atomic.Pointer[error]

	kicks, waits uint64
}

// queueShape says how much shared memory a queue needs and where its parts lie.
type queueShape struct {
	ring          virtq.DriverLayout
	size, maxSegs int
	stride        int
	slots, tables uint64 // offsets
	bytes         uint64
}

func shapeOf(size, maxSegs int) (queueShape, error) {
	l, err := virtq.DriverRingLayout(size)
	if err != nil {
		return queueShape{}, err
	}
	s := queueShape{ring: l, size: size, maxSegs: maxSegs}
	s.stride = (maxSegs + 2 + 3) &^ 3 // whole cache lines
	s.slots = pageAlign(l.Bytes)
	s.tables = s.slots + uint64(size)*slotBytes
	s.bytes = pageAlign(s.tables + uint64(size*s.stride*descBytes))
	return s, nil
}

func pageAlign(n uint64) uint64 { return (n + 4095) &^ 4095 }

// newQueue makes a queue in mem, which the server sees at addr.
func newQueue(index int, mem []byte, addr uint64, s queueShape, fault *atomic.Pointer[error]) (*Queue, error) {
	ring, err := virtq.NewDriverRing(mem[:s.ring.Bytes], s.size, false)
	if err != nil {
		return nil, err
	}
	q := &Queue{
		index: index, ring: ring, maxSegs: s.maxSegs, stride: s.stride,
		slots:    slotsOf(mem[s.slots : s.slots+uint64(s.size)*slotBytes]),
		slotAddr: addr + s.slots,
		tables:   descsOf(mem[s.tables : s.tables+uint64(s.size*s.stride*descBytes)]),
		tabAddr:  addr + s.tables,
		tags:     make([]uint64, s.size),
		segs:     make([]virtq.DriverSegment, s.maxSegs+2),
		fault:    fault,
		kickFD:   -1, callFD: -1,
	}
	q.one[0] = 1
	if q.kickFD, err = unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK); err != nil {
		return nil, fmt.Errorf("eventfd: %w", err)
	}
	// Blocking, so that one system call is enough to sleep; the server only
	// writes to it.
	if q.callFD, err = unix.Eventfd(0, unix.EFD_CLOEXEC); err != nil {
		unix.Close(q.kickFD)
		return nil, fmt.Errorf("eventfd: %w", err)
	}
	return q, nil
}

func (q *Queue) close() {
	unix.Close(q.kickFD)
	unix.Close(q.callFD)
}

// negotiated adopts the ring features of a session.
func (q *Queue) negotiated(features uint64) {
	q.indirect = features&FeatureIndirectDesc != 0
	q.ring.SetEventIdx(features&FeatureEventIdx != 0)
}

// Index is the queue's number.
func (q *Queue) Index() int { return q.index }

// Ring is the virtqueue itself, for tests that do what no driver would.
func (q *Queue) Ring() *virtq.DriverRing { return q.ring }

// Depth is how many requests with one data segment fit at once.
func (q *Queue) Depth() int {
	if q.indirect {
		return q.ring.Size()
	}
	return q.ring.Size() / 3
}

// InFlight is the number of requests added and not yet returned.
func (q *Queue) InFlight() int { return q.ring.InFlight() }

// Counts returns how many kicks the server asked for and how often Wait slept.
func (q *Queue) Counts() (kicks, waits uint64) { return q.kicks, q.waits }

// Read adds a read at off, in bytes, into buf.
func (q *Queue) Read(off uint64, buf Buffer, tag uint64) bool {
	q.segs[1] = virtq.DriverSegment{Addr: buf.Addr, Len: buf.Len, Write: true}
	return q.add(TypeIn, off/sectorSize, 1, tag)
}

// Write adds a write at off, in bytes, from buf.
func (q *Queue) Write(off uint64, buf Buffer, tag uint64) bool {
	q.segs[1] = virtq.DriverSegment{Addr: buf.Addr, Len: buf.Len}
	return q.add(TypeOut, off/sectorSize, 1, tag)
}

// ReadV and WriteV take several buffers, at most Options.MaxSegments.
func (q *Queue) ReadV(off uint64, bufs []Buffer, tag uint64) bool {
	return q.addV(TypeIn, off, bufs, true, tag)
}

// WriteV is explained at ReadV.
func (q *Queue) WriteV(off uint64, bufs []Buffer, tag uint64) bool {
	return q.addV(TypeOut, off, bufs, false, tag)
}

func (q *Queue) addV(typ uint32, off uint64, bufs []Buffer, write bool, tag uint64) bool {
	if len(bufs) > q.maxSegs {
		return false
	}
	for i, b := range bufs {
		q.segs[1+i] = virtq.DriverSegment{Addr: b.Addr, Len: b.Len, Write: write}
	}
	return q.add(typ, off/sectorSize, len(bufs), tag)
}

// Flush adds a flush.
func (q *Queue) Flush(tag uint64) bool { return q.add(TypeFlush, 0, 0, tag) }

// Discard adds a discard of length bytes at off.
func (q *Queue) Discard(off, length, tag uint64) bool {
	return q.addRange(TypeDiscard, off, length, 0, tag)
}

// WriteZeroes adds a write-zeroes request of length bytes at off; unmap allows
// the server to deallocate.
func (q *Queue) WriteZeroes(off, length uint64, unmap bool, tag uint64) bool {
	var flags uint32
	if unmap {
		flags = 1
	}
	return q.addRange(TypeWriteZeroes, off, length, flags, tag)
}

func (q *Queue) addRange(typ uint32, off, length uint64, flags uint32, tag uint64) bool {
	if q.ring.Free() == 0 {
		return false
	}
	head := q.ring.NextHead()
	s := &q.slots[head]
	s.rangeSector, s.rangeCount, s.rangeFlags = off/sectorSize, uint32(length/sectorSize), flags
	q.segs[1] = virtq.DriverSegment{Addr: q.slotAddr + uint64(head)*slotBytes + slotRangeOffset, Len: slotRangeBytes}
	return q.add(typ, 0, 1, tag)
}

// GetID adds a request for the device's identity; TakeID returns it.
func (q *Queue) GetID(tag uint64) bool {
	if q.ring.Free() == 0 {
		return false
	}
	head := q.ring.NextHead()
	q.segs[1] = virtq.DriverSegment{Addr: q.slotAddr + uint64(head)*slotBytes + slotIDOffset, Len: idBytes, Write: true}
	return q.add(TypeGetID, 0, 1, tag)
}

// AddRaw adds a request of any type with any data segments, for tests. Segments
// with Write must come last.
func (q *Queue) AddRaw(typ uint32, sector uint64, data []virtq.DriverSegment, tag uint64) bool {
	if len(data) > q.maxSegs {
		return false
	}
	copy(q.segs[1:], data)
	return q.add(typ, sector, len(data), tag)
}

// add offers a request with the n data segments in q.segs[1:].
func (q *Queue) add(typ uint32, sector uint64, n int, tag uint64) bool {
	if q.ring.Free() == 0 {
		return false
	}
	head := q.ring.NextHead()
	s := &q.slots[head]
	at := q.slotAddr + uint64(head)*slotBytes
	s.typ, s.ioprio, s.sector, s.status = typ, 0, sector, StatusNone
	if q.indirect {
		t := q.tables[int(head)*q.stride:][: n+2 : n+2]
		t[0] = virtq.DriverDesc{Addr: at, Len: slotHeaderBytes, Flags: virtq.DriverDescNext, Next: 1}
		for i := 1; i <= n; i++ {
			d := &q.segs[i]
			flags := virtq.DriverDescNext
			if d.Write {
				flags |= virtq.DriverDescWrite
			}
			t[i] = virtq.DriverDesc{Addr: d.Addr, Len: d.Len, Flags: flags, Next: uint16(i + 1)}
		}
		t[n+1] = virtq.DriverDesc{Addr: at + slotStatusOffset, Len: 1, Flags: virtq.DriverDescWrite}
		q.tags[head] = tag
		_, ok := q.ring.AddIndirect(q.tabAddr+uint64(int(head)*q.stride*descBytes), uint32(n+2)*descBytes)
		return ok
	}
	q.segs[0] = virtq.DriverSegment{Addr: at, Len: slotHeaderBytes}
	q.segs[n+1] = virtq.DriverSegment{Addr: at + slotStatusOffset, Len: 1, Write: true}
	if _, ok := q.ring.Add(q.segs[:n+2]); !ok {
		return false
	}
	q.tags[head] = tag
	return true
}

// Kick shows the server what was added and wakes it if it wants to be.
func (q *Queue) Kick() {
	if q.ring.Publish() {
		q.ForceKick()
	}
}

// ForceKick wakes the server whether or not it asked for it.
func (q *Queue) ForceKick() {
	q.kicks++
	unix.Write(q.kickFD, q.one[:]) // can fail only when the counter is full, and then it is set anyway
}

// Poll moves completions to out and returns how many. It never blocks. The
// error is that of a server that broke the ring's rules.
func (q *Queue) Poll(out []Completion) (int, error) {
	for n := range out {
		head, written, ok, err := q.ring.Poll()
		if err != nil {
			return n, fmt.Errorf("queue %d: %w", q.index, err)
		}
		if !ok {
			return n, nil
		}
		out[n] = Completion{Tag: q.tags[head], Written: written, Status: q.slots[head].status}
	}
	return len(out), nil
}

// PollID is Poll for a single completion of GetID and returns the answer.
func (q *Queue) PollID() (c Completion, id [idBytes]byte, ok bool, err error) {
	head, written, ok, err := q.ring.Poll()
	if err != nil || !ok {
		return c, id, false, err
	}
	s := &q.slots[head]
	return Completion{Tag: q.tags[head], Written: written, Status: s.status}, s.id, true, nil
}

// Polling tells the server that nobody sleeps on the call eventfd, so that it
// saves the system call.
func (q *Queue) Polling() { q.ring.DisableCall() }

// Wait sleeps until Poll has something to return, at most timeout (negative:
// without limit). It may return early, and returns the reason at once when the
// connection is lost.
func (q *Queue) Wait(timeout time.Duration) error {
	if q.ring.EnableCall() {
		return nil
	}
	return q.sleep(timeout)
}

// WaitSeveral is Wait until n requests have ended, if the server knows
// EVENT_IDX.
func (q *Queue) WaitSeveral(n int, timeout time.Duration) error {
	if q.ring.EnableCallAfter(uint16(min(n, q.ring.InFlight()))) {
		return nil
	}
	return q.sleep(timeout)
}

// sleep blocks on the call eventfd, which Wake also writes to.
func (q *Queue) sleep(timeout time.Duration) error {
	if fault := q.fault.Load(); fault != nil {
		return *fault
	}
	if timeout >= 0 {
		ready, err := pollIn(q.callFD, timeout)
		if err != nil {
			return err
		}
		if !ready {
			return ErrTimeout
		}
	}
	q.waits++
	if err := q.drainCall(); err != nil {
		return err
	}
	if fault := q.fault.Load(); fault != nil && !q.ring.Pending() {
		return *fault
	}
	return nil
}

// drainCall sleeps until the call eventfd is written to, for any reason. Some
// servers (QEMU's) make every descriptor that they are given non-blocking, which
// this end then is too; that is undone, so that one system call remains enough.
func (q *Queue) drainCall() error {
	for {
		_, err := unix.Read(q.callFD, q.got[:])
		switch {
		case err == nil:
			return nil
		case errors.Is(err, unix.EAGAIN):
			err = unix.SetNonblock(q.callFD, false)
		}
		if err != nil && !errors.Is(err, unix.EINTR) {
			return fmt.Errorf("call eventfd: %w", err)
		}
	}
}

// Wake ends a Wait from any goroutine.
func (q *Queue) Wake() {
	one := [8]byte{1}
	unix.Write(q.callFD, one[:])
}

// pollIn waits until fd is readable; false after timeout.
func pollIn(fd int, timeout time.Duration) (bool, error) {
	end := time.Now().Add(timeout)
	fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
	for {
		ts := unix.NsecToTimespec(max(0, time.Until(end).Nanoseconds()))
		n, err := unix.Ppoll(fds, &ts, nil)
		if err == nil {
			return n > 0, nil
		}
		if !errors.Is(err, unix.EINTR) {
			return false, fmt.Errorf("poll eventfd: %w", err)
		}
	}
}
