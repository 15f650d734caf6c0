package main

import (
	"fmt"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// discard tells the disk that a range's contents don't matter (linux/fs.h,
// BLKDISCARD: a pointer to offset and length in bytes). x/sys has no wrapper
// that takes two words.
func discard(f *os.File, off, length uint64) error {
	arg := [2]uint64{off, length}
	if _, _, e := unix.Syscall(unix.SYS_IOCTL, f.Fd(), unix.BLKDISCARD, uintptr(unsafe.Pointer(&arg))); e != 0 {
		return fmt.Errorf("discard %d bytes at %d: %w", length, off, e)
	}
	return nil
}
