package shm

import (
	"fmt"
	"unsafe"

	"golang.org/x/sys/unix"
)

// maxGroups is the kernel's limit (NGROUPS_MAX).
const maxGroups = 65536

// peerGroups returns the supplementary groups of a socket's peer.
func peerGroups(fd int) ([]uint32, error) {
	for n := 64; ; n = maxGroups {
		groups := make([]uint32, n)
		size := uint32(4 * n)
		_, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(fd), unix.SOL_SOCKET, unix.SO_PEERGROUPS,
			uintptr(unsafe.Pointer(unsafe.SliceData(groups))), uintptr(unsafe.Pointer(&size)), 0)
		switch {
		case errno == 0:
			return groups[:size/4], nil
		case errno != unix.ERANGE || n == maxGroups:
			return nil, fmt.Errorf("SO_PEERGROUPS: %w", errno)
		}
	}
}
