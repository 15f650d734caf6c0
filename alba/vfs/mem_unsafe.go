package vfs

import (
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// remapPrivate replaces the shared mapping of fd at b by a private one in one
// step. Stores that are under way either were made to the shared pages or wait
// in a page fault until the private ones are there.
func remapPrivate(fd int, b []byte) error {
	_, err := unix.MmapPtr(fd, 0, unsafe.Pointer(unsafe.SliceData(b)), uintptr(len(b)),
		unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_FIXED)
	return os.NewSyscallError("mmap", err)
}
