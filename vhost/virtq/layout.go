// Package virtq is the split virtqueue of virtio 1.1 (section 2.6) over bytes
// of memory that is shared with another process: Queue is the device's side,
// which package vhost uses. It has no goroutine, does no I/O, knows nothing of
// sockets, and does not allocate after it is made.
//
// # Layout
//
//	descriptor table (16-byte aligned)   num × { addr u64 | len u32 | flags u16 | next u16 }
//	available ring (2)                   flags u16 | idx u16 | num × head u16 | used_event u16
//	used ring (4)                        flags u16 | idx u16 | num × { id u32 | len u32 } | avail_event u16
//
// All little-endian, as the processor.
//
// # Memory ordering
//
// The driver runs at the same time on another CPU. What publishes is stored
// with sync/atomic, which on amd64 is also a full barrier: used.idx after the
// used elements, and before used_event is looked at. What is published is
// loaded with sync/atomic before what it covers. 16-bit fields have no atomic
// operations in Go: avail.idx is loaded as part of an aligned 32-bit word,
// used.flags and used.idx, which only the device writes, are stored as one such
// word, avail_event is stored plainly and followed by a barrier.
//
// # Hostile drivers
//
// Everything read from the ring is copied before it is checked, and checked
// before it is used. An error means that the driver broke the protocol; the
// Queue must not be used any more. A fault (SIGBUS) on the memory is left to
// the caller, see package mem.
package virtq

// Sizes in bytes, and counts.
const (
	// MaxSize bounds the number of descriptors of a ring (section 2.6).
	MaxSize = 32768
	// MaxIndirect bounds the descriptors of one indirect table. The
	// specification says the queue's size; Linux drivers go beyond it on small
	// queues, and QEMU's devices allow 1024.
	MaxIndirect = 1024

	DescBytes     = 16
	usedElemBytes = 8
)

// Descriptor flags.
const (
	DescNext     uint16 = 1
	DescWrite    uint16 = 2
	DescIndirect uint16 = 4
)

// Flags in the rings' first words, without EVENT_IDX.
const (
	AvailNoInterrupt uint16 = 1
	UsedNoNotify     uint16 = 1
)

// Feature bits of virtio that concern the ring.
const (
	FeatureIndirect uint64 = 1 << 28 // VIRTIO_F_INDIRECT_DESC
	FeatureEventIdx uint64 = 1 << 29 // VIRTIO_F_EVENT_IDX
	FeatureVersion1 uint64 = 1 << 32 // VIRTIO_F_VERSION_1
)

// DescTableBytes is the length of the descriptor table of a ring of num.
func DescTableBytes(num int) int { return DescBytes * num }

// AvailBytes is the length of the available ring, used_event included.
func AvailBytes(num int) int { return 4 + 2*num + 2 }

// UsedBytes is the length of the used ring, avail_event included.
func UsedBytes(num int) int { return 4 + usedElemBytes*num + 2 }

// Desc is a descriptor.
type Desc struct {
	Addr  uint64 // guest-physical
	Len   uint32 // bytes
	Flags uint16
	Next  uint16
}

// NeedEvent reports whether a move of an index from old to new passes the
// event that the other side waits for (section 2.6.7.2).
func NeedEvent(event, new, old uint16) bool { return new-event-1 < new-old }
