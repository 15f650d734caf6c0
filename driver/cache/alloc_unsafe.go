//go:build !race

package cache

import (
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// array is n zeroed elements of a type without pointers, outside the Go heap and
// aligned to pages.
type array[T any] struct {
	s   []T
	raw []byte
}

func newArray[T any](n int) (array[T], error) {
	if n == 0 {
		return array[T]{}, nil
	}
	var zero T
	raw, err := unix.Mmap(-1, 0, n*int(unsafe.Sizeof(zero)), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANON)
	if err != nil {
		return array[T]{}, os.NewSyscallError("mmap", err)
	}
	return array[T]{unsafe.Slice((*T)(unsafe.Pointer(unsafe.SliceData(raw))), n), raw}, nil
}

// free gives the memory back. Nobody may use the elements any more.
func (a *array[T]) free() {
	if a.raw != nil {
		_ = unix.Munmap(a.raw) // fails only for a range that was never mapped
	}
	*a = array[T]{}
}
