package mem

import (
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// mmap returns length bytes of fd from the page boundary offset.
func mmap(fd int, offset int64, length uint64) ([]byte, error) {
	p, err := unix.MmapPtr(fd, offset, nil, uintptr(length), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_NORESERVE)
	if err != nil {
		return nil, os.NewSyscallError("mmap", err)
	}
	return unsafe.Slice((*byte)(p), length), nil
}

// munmap ends what mmap made. It can fail only on arguments that mmap did not return.
func munmap(b []byte) {
	if err := unix.MunmapPtr(unsafe.Pointer(unsafe.SliceData(b)), uintptr(len(b))); err != nil {
		panic("mem: munmap: " + err.Error())
	}
}

func contains(b []byte, addr uintptr) bool {
	return addr-uintptr(unsafe.Pointer(unsafe.SliceData(b))) < uintptr(len(b))
}

// Offset returns where in m the bytes b begin, and whether all of b lies in it.
func (m *Mapping) Offset(b []byte) (uint64, bool) {
	off := uint64(uintptr(unsafe.Pointer(unsafe.SliceData(b))) - uintptr(unsafe.Pointer(unsafe.SliceData(m.data))))
	size := uint64(len(m.data))
	return off, off <= size && uint64(len(b)) <= size-off
}

// AlignedTo reports whether b starts at a multiple of align, a power of two,
// in this process.
func AlignedTo(b []byte, align uintptr) bool {
	return uintptr(unsafe.Pointer(unsafe.SliceData(b)))&(align-1) == 0
}

// GuestAddr returns the guest address of b, a slice that t returned.
func (t *Table) GuestAddr(b []byte) (uint64, bool) {
	p := uintptr(unsafe.Pointer(unsafe.SliceData(b)))
	for i := range t.byGuest {
		r := &t.byGuest[i]
		off := p - uintptr(unsafe.Pointer(unsafe.SliceData(r.Data)))
		if off < uintptr(len(r.Data)) {
			return r.GuestAddr + uint64(off), true
		}
	}
	return 0, false
}
