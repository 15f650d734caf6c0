package vfs

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// hugePage is the size and alignment of the pages that MADV_COLLAPSE makes.
const hugePage = 2 << 20

// mapShared maps size bytes of a file at an address at which its pages can be
// huge ones: the kernel aligns a mapping for that only where the file system was
// mounted so.
func mapShared(fd int, size int) ([]byte, error) {
	whole := (uintptr(size) + 4095) &^ 4095
	reserved, err := unix.MmapPtr(-1, 0, nil, whole+hugePage, unix.PROT_NONE, unix.MAP_PRIVATE|unix.MAP_ANON|unix.MAP_NORESERVE)
	if err != nil {
		return nil, err
	}
	before := (hugePage - uintptr(reserved)%hugePage) % hugePage
	start := unsafe.Add(reserved, before)
	if _, err := unix.MmapPtr(fd, 0, start, whole, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_FIXED); err != nil {
		_ = unix.MunmapPtr(reserved, whole+hugePage)
		return nil, err
	}
	if before > 0 {
		_ = unix.MunmapPtr(reserved, before)
	}
	_ = unix.MunmapPtr(unsafe.Add(start, whole), hugePage-before)
	return unsafe.Slice((*byte)(start), size), nil
}

// unmapShared undoes mapShared.
func unmapShared(b []byte) error {
	whole := (uintptr(len(b)) + 4095) &^ 4095
	return unix.MunmapPtr(unsafe.Pointer(unsafe.SliceData(b)), whole)
}
