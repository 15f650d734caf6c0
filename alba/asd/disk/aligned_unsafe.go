package disk

import "unsafe"

// isAligned says that direct writes accept the memory of p.
func isAligned(p []byte) bool {
	return uintptr(unsafe.Pointer(unsafe.SliceData(p)))%filePage == 0
}

// alignedBytes returns n bytes that direct writes accept.
func alignedBytes(n int) []byte {
	b := make([]byte, n+filePage)
	off := (filePage - int(uintptr(unsafe.Pointer(unsafe.SliceData(b)))%filePage)) % filePage
	return b[off : off+n : off+n]
}
