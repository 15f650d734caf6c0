package client

import (
	"unsafe"

	"scoria/vhost/virtq"
)

// slot is the private part of one request in shared memory: everything but the
// data. There is one per descriptor of a queue, used by the chain whose head is
// that descriptor. It fills one cache line:
//
//	 0  type u32, ioprio u32, sector u64     the request's header
//	16  sector u64, sectors u32, flags u32   discard and write-zeroes
//	32  id [20]byte                          GET_ID's answer
//	52  unused
//	63  status u8
type slot struct {
	typ, ioprio uint32
	sector      uint64
	rangeSector uint64
	rangeCount  uint32
	rangeFlags  uint32
	id          [idBytes]byte
	_           [11]byte
	status      uint8
}

const (
	slotBytes        = 64
	slotHeaderBytes  = 16
	slotRangeOffset  = 16
	slotRangeBytes   = 16
	slotIDOffset     = 32
	slotStatusOffset = 63
	descBytes        = 16
)

var _ [slotBytes]byte = [unsafe.Sizeof(slot{})]byte{}

// slotsOf views mem, aligned to 64 bytes, as slots.
func slotsOf(mem []byte) []slot {
	return unsafe.Slice((*slot)(unsafe.Pointer(unsafe.SliceData(mem))), len(mem)/slotBytes)
}

// descsOf views mem, aligned to 64 bytes, as descriptors of indirect tables.
func descsOf(mem []byte) []virtq.DriverDesc {
	return unsafe.Slice((*virtq.DriverDesc)(unsafe.Pointer(unsafe.SliceData(mem))), len(mem)/descBytes)
}
