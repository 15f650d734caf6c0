package driver

import "golang.org/x/sys/unix"

// populate makes the pages of b present. It is an optimisation: on failure the
// first writer of a page waits for it.
func populate(b []byte) {
	if len(b) > 0 {
		_ = unix.Madvise(b, unix.MADV_POPULATE_WRITE)
	}
}
