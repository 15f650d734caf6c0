package driver

import "unsafe"

// prefetch asks the CPU to bring the beginning of b closer. It never faults.
func prefetch(b []byte) {
	if len(b) > 0 {
		prefetchLines(unsafe.SliceData(b))
	}
}

// aligned returns p, or a copy of it, at an address that direct writes accept.
func aligned(p []byte) []byte {
	const align = 4096
	addr := uintptr(unsafe.Pointer(unsafe.SliceData(p)))
	if addr%align == 0 {
		return p
	}
	b := make([]byte, len(p)+align)
	off := (align - uintptr(unsafe.Pointer(unsafe.SliceData(b)))%align) % align
	b = b[off : off+uintptr(len(p))]
	copy(b, p)
	return b
}
