package virtq

import (
	"fmt"
	"unsafe"
)

// driverShared is the part of a DriverRing that the device sees. The flags and
// index of both rings are accessed as one 32-bit word, because Go has no 16-bit
// atomics: flags are its low half, the index its high half (little endian).
type driverShared struct {
	mem        []byte
	desc       []DriverDesc
	avail      []uint16
	used       []driverUsedElem
	availHead  *uint32 // written by the driver
	usedEvent  *uint32 // written by the driver; low half
	usedHead   *uint32 // written by the device
	availEvent *uint32 // written by the device; low half
}

type driverUsedElem struct {
	id  uint32 // head of the chain
	len uint32 // bytes written
}

// attach points s into mem, which has been checked to be l.Bytes long. A size of
// at least two makes the event index of the available ring 32-bit aligned.
func (s *driverShared) attach(mem []byte, size int, l DriverLayout) error {
	base := unsafe.Pointer(unsafe.SliceData(mem))
	if uintptr(base)%driverRingAlign != 0 {
		return fmt.Errorf("%w: it starts at %p, which is not a multiple of %d", ErrDriverRingMemory, base, driverRingAlign)
	}
	at := func(off uint64) unsafe.Pointer { return unsafe.Add(base, off) }
	n := uint64(size)
	s.mem = mem[:l.Bytes]
	s.desc = unsafe.Slice((*DriverDesc)(at(l.Desc)), size)
	s.availHead = (*uint32)(at(l.Avail))
	s.avail = unsafe.Slice((*uint16)(at(l.Avail+4)), size)
	s.usedEvent = (*uint32)(at(l.Avail + 4 + 2*n))
	s.usedHead = (*uint32)(at(l.Used))
	s.used = unsafe.Slice((*driverUsedElem)(at(l.Used+4)), size)
	s.availEvent = (*uint32)(at(l.Used + 4 + driverUsedElemBytes*n))
	return nil
}
