package vfs

import (
	_ "unsafe" // for linkname

	"golang.org/x/sys/unix"
)

// A goroutine in a system call keeps its processor (a P of Go's scheduler) until the
// runtime's monitor finds that it blocks: after 20 µs at best, after two times 10 ms when
// the monitor has found nothing for a while. With two processors, two syncs at once
// stop the whole process for that long, though other goroutines could run. A sync
// nearly always blocks; so it gives the processor back before, as the runtime's own
// waits do. These two functions are among those whose signatures the runtime
// promises to keep (go.dev/issue/67401).

//go:linkname entersyscallblock runtime.entersyscallblock
func entersyscallblock()

//go:linkname exitsyscall runtime.exitsyscall
func exitsyscall()

// syncCall makes a call that takes numbers only, no pointers. Between the runtime's two
// functions the stack may not grow, and nothing that could be preempted is called.
//
//go:nosplit
//go:norace
func syncCall(trap, fd, arg uintptr) unix.Errno {
	entersyscallblock()
	_, _, errno := unix.RawSyscall(trap, fd, arg, 0)
	exitsyscall()
	return errno
}

// fdatasync is unix.Fdatasync for a descriptor whose sync waits for a disk.
func fdatasync(fd int) error { return syncError(syncCall(unix.SYS_FDATASYNC, uintptr(fd), 0)) }

// fsync is unix.Fsync likewise.
func fsync(fd int) error { return syncError(syncCall(unix.SYS_FSYNC, uintptr(fd), 0)) }

func syncError(errno unix.Errno) error {
	if errno != 0 {
		return errno
	}
	return nil
}
