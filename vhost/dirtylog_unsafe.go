package vhost

import (
	"sync/atomic"
	"unsafe"
)

// orWord sets bits in the i-th 32-bit word of b, which is aligned to 4 and long
// enough: mark has checked. It is a full barrier, so it can't be seen before
// the writes that precede it. It must not be skipped where the bit is set
// already: the front end may be about to clear it.
func orWord(b []byte, i uint64, bits uint32) {
	atomic.OrUint32((*uint32)(unsafe.Add(unsafe.Pointer(unsafe.SliceData(b)), 4*i)), bits)
}
