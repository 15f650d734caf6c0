package client

import (
	"sync/atomic"
	"unsafe"
)

// words views b, page aligned and a multiple of 8 long, as 64-bit words.
func words(b []byte) []uint64 {
	return unsafe.Slice((*uint64)(unsafe.Pointer(unsafe.SliceData(b))), len(b)/8)
}

// loadByte reads byte i of a bitmap that another process changes.
func loadByte(b []byte, i uint64) byte {
	return byte(atomic.LoadUint64(&words(b)[i/8]) >> (8 * (i % 8)))
}

// swapWords yields every word of a bitmap that is not zero, having cleared it.
func swapWords(b []byte) func(yield func(int, uint64) bool) {
	return func(yield func(int, uint64) bool) {
		w := words(b)
		for i := range w {
			if atomic.LoadUint64(&w[i]) == 0 {
				continue
			}
			if !yield(i, atomic.SwapUint64(&w[i], 0)) {
				return
			}
		}
	}
}
