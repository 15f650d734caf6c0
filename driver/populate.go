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

// populateStep is the size of a huge page.
const populateStep = 2 << 20

// collapse makes b, one aligned stretch of populateStep bytes, a huge page:
// writing out from it takes a fifth of the CPU time, and copies meet fewer misses of
// the page tables. It copies, during which stores to b wait, so it is done in the
// background. It reports whether the kernel could; an optimisation.
func collapse(b []byte) bool { return unix.Madvise(b, unix.MADV_COLLAPSE) == nil }
