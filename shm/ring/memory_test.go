package ring

import "reflect"

// alignedMemory returns n zero bytes at a multiple of 64.
func alignedMemory(n uint64) []byte {
	b := make([]byte, n+64)
	off := -reflect.ValueOf(b).Pointer() & 63
	return b[off:][:n:n]
}
