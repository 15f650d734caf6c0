package virtq

import "reflect"

// driverTestMemory returns n bytes that start at a cache line.
func driverTestMemory(n int) []byte {
	b := make([]byte, n+driverRingAlign)
	off := -reflect.ValueOf(b).Pointer() % driverRingAlign
	return b[off : off+uintptr(n)]
}
