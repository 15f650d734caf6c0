package virtq

import (
	"errors"
	"fmt"
	"sync/atomic"
)

// This file and driver_ring_unsafe.go are the driver's half of a split
// virtqueue (virtio 1.2, 2.7): what a guest kernel does. Tests and the load
// generator use it; the daemon doesn't. A DriverRing belongs to one goroutine at
// a time.
//
// What the driver must remember is kept in private memory, so that a broken
// device can confuse it but not corrupt it: Poll checks every element it is
// given.

// Flags of a descriptor (virtio 1.2, 2.7.5).
const (
	DriverDescNext     uint16 = 1
	DriverDescWrite    uint16 = 2 // the device writes to the buffer
	DriverDescIndirect uint16 = 4
)

// DriverMaxRingSize is the largest size of a split virtqueue.
const DriverMaxRingSize = 32768

const (
	driverDescBytes     = 16
	driverUsedElemBytes = 8
	driverRingAlign     = 64 // a cache line, more than the 16, 2 and 4 bytes asked for

	driverAvailNoInterrupt = 1 // avail.flags
	driverUsedNoNotify     = 1 // used.flags
)

// Errors of a DriverRing.
var (
	// ErrDriverRingSize: the size is no power of two from 2 to 32768.
	ErrDriverRingSize = errors.New("virtqueue size must be a power of two from 2 to 32768")
	// ErrDriverRingMemory: the memory is too small or badly aligned.
	ErrDriverRingMemory = errors.New("virtqueue memory does not fit")
	// ErrDriverBadUsed: the device returned something that was not in flight.
	ErrDriverBadUsed = errors.New("device returned a chain that was not in flight")
)

// DriverDesc is a descriptor as it lies in memory, native (little) endian.
type DriverDesc struct {
	Addr  uint64 // guest physical
	Len   uint32 // bytes
	Flags uint16 // DriverDesc…
	Next  uint16 // valid with DriverDescNext
}

// DriverSegment is a buffer of a chain.
type DriverSegment struct {
	Addr  uint64 // guest physical
	Len   uint32 // bytes
	Write bool   // the device writes to it
}

// DriverLayout says where the parts of a ring lie, in bytes from the start of
// its memory.
type DriverLayout struct {
	Desc, Avail, Used uint64
	Bytes             uint64 // of the whole, a multiple of 64
}

// DriverRingLayout returns the layout that NewDriverRing uses for a ring of size
// descriptors. The parts start at cache lines of their own.
func DriverRingLayout(size int) (DriverLayout, error) {
	if size < 2 || size > DriverMaxRingSize || size&(size-1) != 0 {
		return DriverLayout{}, fmt.Errorf("%w, not %d", ErrDriverRingSize, size)
	}
	n := uint64(size)
	var l DriverLayout
	l.Avail = driverAlign(driverDescBytes * n)
	// Behind both rings there are two bytes more than the standard asks for, so
	// that the event index can be accessed as 32 bits.
	l.Used = driverAlign(l.Avail + 4 + 2*n + 4)
	l.Bytes = driverAlign(l.Used + 4 + driverUsedElemBytes*n + 4)
	return l, nil
}

func driverAlign(n uint64) uint64 { return (n + driverRingAlign - 1) &^ (driverRingAlign - 1) }

// DriverRing is the driver's half of one split virtqueue.
type DriverRing struct {
	driverShared

	mask     uint16
	eventIdx bool

	availIdx  uint16 // the next one to fill
	published uint16 // avail.idx as the device sees it
	lastUsed  uint16 // the next one to take
	seenUsed  uint16 // used.idx when last looked at: looking moves the cache line between CPUs
	flags     uint16 // avail.flags

	free      uint16   // head of the free descriptors
	freeCount int      //
	next      []uint16 // links of the free list and of chains in flight
	chain     []uint16 // by head: descriptors of the chain in flight, 0 for none
}

// NewDriverRing clears mem and makes an empty ring of size descriptors in it.
// mem is laid out as DriverRingLayout says and must be aligned to 64 bytes.
func NewDriverRing(mem []byte, size int, eventIdx bool) (*DriverRing, error) {
	layout, err := DriverRingLayout(size)
	if err != nil {
		return nil, err
	}
	if uint64(len(mem)) < layout.Bytes {
		return nil, fmt.Errorf("%w: %d bytes given, %d needed", ErrDriverRingMemory, len(mem), layout.Bytes)
	}
	r := &DriverRing{mask: uint16(size - 1), eventIdx: eventIdx, next: make([]uint16, size), chain: make([]uint16, size)}
	if err := r.attach(mem, size, layout); err != nil {
		return nil, err
	}
	r.Reset()
	return r, nil
}

// Reset makes the ring empty again, as a driver does after it has reset the
// device. The device must have stopped the ring.
func (r *DriverRing) Reset() {
	clear(r.mem)
	r.availIdx, r.published, r.lastUsed, r.seenUsed, r.flags = 0, 0, 0, 0, 0
	clear(r.chain)
	for i := range r.next {
		r.next[i] = uint16(i + 1)
	}
	r.free, r.freeCount = 0, len(r.next)
}

// SetEventIdx tells whether VIRTIO_F_EVENT_IDX was negotiated. Only for a ring
// that the device has stopped.
func (r *DriverRing) SetEventIdx(on bool) { r.eventIdx = on }

// Size is the number of descriptors.
func (r *DriverRing) Size() int { return len(r.desc) }

// Free is the number of descriptors that no chain uses.
func (r *DriverRing) Free() int { return r.freeCount }

// InFlight is the number of chains added and not yet returned by Poll.
func (r *DriverRing) InFlight() int { return int(r.availIdx - r.lastUsed) }

// NextHead is the head that the next chain gets. Callers that keep memory per
// head fill it before they add. Meaningless when Free is 0.
func (r *DriverRing) NextHead() uint16 { return r.free }

// Add puts a chain of segs into the ring, to be seen by the device after the
// next Publish, and returns its head; false if there are too few descriptors.
// Segments that the device reads must come before those that it writes.
func (r *DriverRing) Add(segs []DriverSegment) (head uint16, ok bool) {
	n := len(segs)
	if n == 0 || n > r.freeCount {
		return 0, false
	}
	head = r.free
	i := head
	for k := range segs {
		s := &segs[k]
		d := &r.desc[i&r.mask]
		d.Addr, d.Len = s.Addr, s.Len
		var flags uint16
		if s.Write {
			flags = DriverDescWrite
		}
		next := r.next[i&r.mask]
		if k+1 < n {
			flags |= DriverDescNext
			d.Next = next
		}
		d.Flags = flags
		i = next
	}
	r.take(head, i, n)
	return head, true
}

// AddIndirect is Add for a chain that lies in an indirect table of length bytes
// at addr; it takes one descriptor.
func (r *DriverRing) AddIndirect(addr uint64, length uint32) (head uint16, ok bool) {
	if r.freeCount == 0 {
		return 0, false
	}
	head = r.free
	d := &r.desc[head&r.mask]
	d.Addr, d.Len, d.Flags = addr, length, DriverDescIndirect
	r.take(head, r.next[head&r.mask], 1)
	return head, true
}

// take accounts for a chain of n descriptors and offers it.
func (r *DriverRing) take(head, free uint16, n int) {
	r.free = free
	r.freeCount -= n
	r.chain[head&r.mask] = uint16(n)
	r.avail[r.availIdx&r.mask] = head
	r.availIdx++
}

// Publish shows the device what was added and says whether it wants a kick
// (virtio 1.2, 2.7.13).
func (r *DriverRing) Publish() (kick bool) {
	old, now := r.published, r.availIdx
	if old == now {
		return false
	}
	r.published = now
	// An exchange: the full barrier between the index and the look at what the
	// device wants. (A store would do, were it not weaker under the race detector.)
	atomic.SwapUint32(r.availHead, uint32(now)<<16|uint32(r.flags))
	if r.eventIdx {
		event := uint16(atomic.LoadUint32(r.availEvent))
		return now-event-1 < now-old
	}
	return uint16(atomic.LoadUint32(r.usedHead))&driverUsedNoNotify == 0
}

// Pending says whether the device has returned chains that Poll has not.
func (r *DriverRing) Pending() bool {
	return uint16(atomic.LoadUint32(r.usedHead)>>16) != r.lastUsed
}

// Poll takes the next chain that the device has returned and frees its
// descriptors. written is what the device says it wrote, in bytes. ok is false
// if there is none. After an error the ring is unusable until Reset.
func (r *DriverRing) Poll() (head uint16, written uint32, ok bool, err error) {
	if r.seenUsed == r.lastUsed {
		idx := uint16(atomic.LoadUint32(r.usedHead) >> 16)
		if idx == r.lastUsed {
			return 0, 0, false, nil
		}
		if idx-r.lastUsed > r.published-r.lastUsed {
			return 0, 0, false, fmt.Errorf("%w: used index %d is beyond the available index %d", ErrDriverBadUsed, idx, r.published)
		}
		r.seenUsed = idx
	}
	e := &r.used[r.lastUsed&r.mask]
	id, n := e.id, e.len
	if id >= uint32(len(r.chain)) || r.chain[id] == 0 {
		return 0, 0, false, fmt.Errorf("%w: descriptor %d at used index %d", ErrDriverBadUsed, id, r.lastUsed)
	}
	r.lastUsed++
	r.release(uint16(id))
	return uint16(id), n, true, nil
}

// release gives the descriptors of the chain at head back to the free list.
func (r *DriverRing) release(head uint16) {
	n := r.chain[head]
	last := head
	for range n - 1 {
		last = r.next[last]
	}
	r.next[last] = r.free
	r.free = head
	r.freeCount += int(n)
	r.chain[head] = 0
}

// EnableCall asks for a call at the next returned chain. It reports true if
// there is one already: then no call may come, and the caller polls again.
func (r *DriverRing) EnableCall() (pending bool) {
	if r.eventIdx {
		atomic.SwapUint32(r.usedEvent, uint32(r.lastUsed)) // a full barrier, as in Publish
	} else {
		r.storeFlags(0)
	}
	return r.Pending()
}

// EnableCallAfter asks for one call when n more chains have been returned
// (n ≥ 1); without EVENT_IDX it is EnableCall. It reports true if they have been
// already.
func (r *DriverRing) EnableCallAfter(n uint16) (pending bool) {
	if !r.eventIdx || n <= 1 {
		return r.EnableCall()
	}
	atomic.SwapUint32(r.usedEvent, uint32(r.lastUsed+n-1))
	return uint16(atomic.LoadUint32(r.usedHead)>>16)-r.lastUsed >= n
}

// DisableCall tells the device that nobody sleeps. It is a hint: with EVENT_IDX
// a call still comes once in 65 536 chains.
func (r *DriverRing) DisableCall() {
	if r.eventIdx {
		atomic.StoreUint32(r.usedEvent, uint32(r.lastUsed-1))
		return
	}
	r.storeFlags(driverAvailNoInterrupt)
}

func (r *DriverRing) storeFlags(flags uint16) {
	if r.flags != flags {
		r.flags = flags
		atomic.SwapUint32(r.availHead, uint32(r.published)<<16|uint32(flags))
	}
}

// UsedIndex is used.idx as the device last wrote it: the base from which a
// device that died without answering GET_VRING_BASE has to go on.
func (r *DriverRing) UsedIndex() uint16 { return uint16(atomic.LoadUint32(r.usedHead) >> 16) }

// AvailIndex is avail.idx as last published.
func (r *DriverRing) AvailIndex() uint16 { return r.published }

// Descriptors is the descriptor table itself, for tests that write what no
// driver would.
func (r *DriverRing) Descriptors() []DriverDesc { return r.desc }

// PushRaw offers head, whatever it is, at the next Publish, for such tests: a
// chain offered this way is unknown to the ring, and Poll will say so.
func (r *DriverRing) PushRaw(head uint16) {
	r.avail[r.availIdx&r.mask] = head
	r.availIdx++
}

// SetAvailIndexRaw stores avail.idx as it is, for such tests.
func (r *DriverRing) SetAvailIndexRaw(idx uint16) {
	r.availIdx, r.published = idx, idx
	atomic.StoreUint32(r.availHead, uint32(idx)<<16|uint32(r.flags))
}
