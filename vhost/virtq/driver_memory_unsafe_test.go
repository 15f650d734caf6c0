package virtq

import "unsafe"

// driverTestMemory returns n bytes that start at a cache line.
func driverTestMemory(n int) []byte {
	b := make([]byte, n+driverRingAlign)
	off := -uintptr(unsafe.Pointer(unsafe.SliceData(b))) % driverRingAlign
	return b[off : off+uintptr(n)]
}
