package lba

import (
	"encoding/binary"
	"fmt"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"
)

// The tables and pages lie outside the Go heap: the garbage collector neither
// scans nor counts them, and untouched parts cost nothing. Addresses are kept
// as integers because nothing here is a Go object.

func init() {
	// Pages in memory are the bytes of a checkpoint, which are little-endian.
	if binary.NativeEndian.Uint16([]byte{1, 0}) != 1 {
		panic("lba: big-endian machines are not supported")
	}
}

// word returns the i-th 64-bit word from base on.
func word(base uintptr, i uint64) *atomic.Uint64 {
	return (*atomic.Uint64)(unsafe.Add(unsafe.Pointer(nil), base+uintptr(i)*8))
}

// plainWord is word for a map that nobody else sees yet.
func plainWord(base uintptr, i uint64) *uint64 {
	return (*uint64)(unsafe.Add(unsafe.Pointer(nil), base+uintptr(i)*8))
}

// word32 returns the i-th 32-bit word from base on.
func word32(base uintptr, i uint64) *atomic.Uint32 {
	return (*atomic.Uint32)(unsafe.Add(unsafe.Pointer(nil), base+uintptr(i)*4))
}

// pageWords is the page at addr as words, for callers that exclude writers.
func pageWords(addr uintptr) *[LeafClusters]uint64 {
	return (*[LeafClusters]uint64)(unsafe.Add(unsafe.Pointer(nil), addr))
}

// pageBytes is the page at addr as bytes, for callers that exclude writers.
func pageBytes(addr uintptr) []byte {
	return unsafe.Slice((*byte)(unsafe.Add(unsafe.Pointer(nil), addr)), PageBytes)
}

// heapBytes is a page held on the Go heap as bytes.
func heapBytes(page *[LeafClusters]uint64) []byte {
	return unsafe.Slice((*byte)(unsafe.Pointer(page)), PageBytes)
}

// reserve takes n bytes of address space that can't be accessed yet.
func reserve(n uintptr) (uintptr, error) {
	p, err := unix.MmapPtr(-1, 0, nil, n, unix.PROT_NONE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_NORESERVE)
	if err != nil {
		return 0, fmt.Errorf("%w: reserve %d bytes of address space: %w", ErrMemory, n, err)
	}
	return uintptr(p), nil
}

// enable makes [addr, addr+n) of a reservation readable and writable. Small
// pages: a touched entry must cost 4 KiB, not 2 MiB.
func enable(addr, n uintptr) error {
	b := unsafe.Slice((*byte)(unsafe.Add(unsafe.Pointer(nil), addr)), n)
	if err := unix.Mprotect(b, unix.PROT_READ|unix.PROT_WRITE); err != nil {
		return fmt.Errorf("%w: enable %d bytes: %w", ErrMemory, n, err)
	}
	adviseHuge(addr, n, false)
	return nil
}

// adviseHuge asks for or against huge pages. A kernel built without them
// refuses, which changes nothing but speed.
func adviseHuge(addr, n uintptr, huge bool) {
	advice := unix.MADV_NOHUGEPAGE
	if huge {
		advice = unix.MADV_HUGEPAGE
	}
	_ = unix.Madvise(unsafe.Slice((*byte)(unsafe.Add(unsafe.Pointer(nil), addr)), n), advice)
}

// release gives [addr, addr+n) back.
func release(addr, n uintptr) {
	if err := unix.MunmapPtr(unsafe.Add(unsafe.Pointer(nil), addr), n); err != nil {
		panic(fmt.Sprintf("lba: munmap: %v", err)) // only wrong arguments fail
	}
}

// mapAligned maps n bytes (a multiple of align) of zeroes at a multiple of
// align. It takes the upper end of what it is given because the kernel maps
// downwards: the next mapping then touches this one and shares its bookkeeping.
func mapAligned(n, align uintptr) (uintptr, error) {
	p, err := unix.MmapPtr(-1, 0, nil, n+align, unix.PROT_READ|unix.PROT_WRITE,
		unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_NORESERVE)
	if err != nil {
		return 0, fmt.Errorf("%w: map %d bytes: %w", ErrMemory, n, err)
	}
	start := (uintptr(p) + align) &^ (align - 1)
	if head := start - uintptr(p); head > 0 {
		release(uintptr(p), head)
	}
	if tail := uintptr(p) + align - start; tail > 0 {
		release(start+n, tail)
	}
	return start, nil
}
