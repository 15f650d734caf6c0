package worker

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// pollEpoll is epoll_wait with a timeout of zero. It can't block, so the
// scheduler need not be told, which saves most of the call's cost.
func pollEpoll(epfd int, events []unix.EpollEvent) int {
	n, _, errno := unix.RawSyscall6(unix.SYS_EPOLL_PWAIT, uintptr(epfd),
		uintptr(unsafe.Pointer(unsafe.SliceData(events))), uintptr(len(events)), 0, 0, 0)
	if errno != 0 {
		return 0
	}
	return int(n)
}

// yieldCPU lets other threads of this CPU run, if there are any.
func yieldCPU() { _, _, _ = unix.RawSyscall(unix.SYS_SCHED_YIELD, 0, 0, 0) }
