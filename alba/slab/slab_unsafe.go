package slab

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// mapHuge maps n bytes, a multiple of hugePage, that begin at one. nil if the kernel has
// no mapping or no address left.
func mapHuge(n int) []byte {
	b, err := unix.Mmap(-1, 0, n+hugePage, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANON|unix.MAP_NORESERVE)
	if err != nil {
		return nil
	}
	at := uintptr(unsafe.Pointer(unsafe.SliceData(b)))
	begin := int(-at % hugePage)
	b = b[begin : begin+n : begin+n]
	// A kernel without huge pages refuses this, and small ones do as well.
	_ = unix.Madvise(b, unix.MADV_HUGEPAGE)
	return b
}
