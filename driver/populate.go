package driver

import "golang.org/x/sys/unix"

// populate makes the pages of b present and keeps them so: a host that reclaims
// memory would otherwise take them out of the page tables again and again, and a
// writer would wait for each. Without the right to lock memory they are only made
// present. Both are optimisations.
func populate(b []byte) {
	if len(b) > 0 && unix.Mlock(b) != nil {
		_ = unix.Madvise(b, unix.MADV_POPULATE_WRITE)
	}
}
