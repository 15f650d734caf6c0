package tlog

import (
	"sync/atomic"
	"unsafe"
)

// publish and load treat 8 bytes of a record as one little-endian word. The
// daemon runs on little-endian machines only (amd64, arm64), as vhost does.

func publish(b []byte, w uint64) {
	_ = b[7]
	atomic.StoreUint64((*uint64)(unsafe.Pointer(unsafe.SliceData(b))), w)
}

func load(b []byte) uint64 {
	_ = b[7]
	return atomic.LoadUint64((*uint64)(unsafe.Pointer(unsafe.SliceData(b))))
}
