package ring

import "unsafe"

// alignedMemory returns n zero bytes at a multiple of 64.
func alignedMemory(n uint64) []byte {
	b := make([]byte, n+64)
	off := -uintptr(unsafe.Pointer(unsafe.SliceData(b))) & 63
	return b[off:][:n:n]
}
