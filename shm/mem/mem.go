// Package mem deals with memory that is shared with another process: memfds
// and their mappings, the table of guest memory regions that translates
// addresses, descriptors passed over unix sockets, and eventfds.
//
// The peer is taken as hostile. Every address and length that comes from it is
// checked against overflow and against the regions; the contents may change at
// any time; the file behind a mapping must lie on a file system that does not let
// the peer delay a page fault; and it may be truncated, so that touching the
// mapping raises SIGBUS. Whoever touches it runs with
// debug.SetPanicOnFault and recovers (see Fault).
//
// A Mapping is counted: it is made with one reference, and the last Release
// unmaps it. A Table holds one reference on each of its regions' mappings and
// is counted itself, so that requests in flight keep a table, and with it the
// memory that their slices point to, beyond its replacement.
package mem

import (
	"errors"
	"fmt"
	"math"
	"os"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// Errors, wrapped with what was asked for.
var (
	ErrFileTooShort = errors.New("file is shorter than the range to map")
	ErrRange        = errors.New("range is empty or overflows")
	ErrNotEventFD   = errors.New("file descriptor is not an eventfd")
)

// CreateMemfd returns a new sealable memfd of size bytes, filled with zeroes.
func CreateMemfd(name string, size int64) (int, error) {
	fd, err := unix.MemfdCreate(name, unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		return -1, os.NewSyscallError("memfd_create", err)
	}
	if err := unix.Ftruncate(fd, size); err != nil {
		unix.Close(fd)
		return -1, fmt.Errorf("memfd %s of %d bytes: %w", name, size, os.NewSyscallError("ftruncate", err))
	}
	return fd, nil
}

// SealSize forbids everybody, for good, to shrink or grow the memfd, so that a
// mapping of it never faults, and to add further seals.
func SealSize(fd int) error {
	const seals = unix.F_SEAL_SHRINK | unix.F_SEAL_GROW | unix.F_SEAL_SEAL
	if _, err := unix.FcntlInt(uintptr(fd), unix.F_ADD_SEALS, seals); err != nil {
		return os.NewSyscallError("fcntl(F_ADD_SEALS)", err)
	}
	return nil
}

// SizeSealed reports whether the file can't shrink any more. A file that knows
// no seals (hugetlbfs, a plain file) is not sealed.
func SizeSealed(fd int) bool {
	seals, err := unix.FcntlInt(uintptr(fd), unix.F_GET_SEALS, 0)
	return err == nil && seals&unix.F_SEAL_SHRINK != 0
}

// Mapping is a counted shared mapping of a part of a file.
type Mapping struct {
	refs  atomic.Int64
	whole []byte // from page boundary to page boundary
	data  []byte

	budget *Budget // nil: none
}

// Map maps [offset, offset+size) of the file, shared, readable and writable.
// Neither needs to be aligned. The descriptor may be closed afterwards. A file
// that is too short at this moment is refused with ErrFileTooShort; it may
// still shrink later. One that could make us wait for ever is refused with
// ErrFileSystem (see checkFile).
func Map(fd int, offset, size uint64) (*Mapping, error) {
	start, length, err := extent(fd, offset, size)
	if err != nil {
		return nil, err
	}
	return mapExtent(fd, start, length, offset, size)
}

// extent checks a range of a file and returns the whole pages around it.
func extent(fd int, offset, size uint64) (start, length uint64, err error) {
	if size == 0 || offset > math.MaxInt64 || size > math.MaxInt64-offset {
		return 0, 0, fmt.Errorf("mapping %d bytes at %d: %w", size, offset, ErrRange)
	}
	if err := checkFile(fd); err != nil {
		return 0, 0, fmt.Errorf("mapping %d bytes at %d: %w", size, offset, err)
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return 0, 0, fmt.Errorf("mapping %d bytes at %d: %w", size, offset, os.NewSyscallError("fstat", err))
	}
	if uint64(st.Size) < offset+size {
		return 0, 0, fmt.Errorf("mapping %d bytes at %d of a file of %d bytes: %w", size, offset, st.Size, ErrFileTooShort)
	}
	// The block size of a hugetlbfs file is its page size; offsets into it must
	// be aligned to that.
	page := uint64(os.Getpagesize())
	if b := uint64(st.Blksize); b > page && b&(b-1) == 0 {
		page = b
	}
	start = offset &^ (page - 1)
	return start, (offset + size - start + page - 1) &^ (page - 1), nil
}

func mapExtent(fd int, start, length, offset, size uint64) (*Mapping, error) {
	whole, err := mmap(fd, int64(start), length)
	if err != nil {
		return nil, fmt.Errorf("mapping %d bytes at %d: %w", size, offset, err)
	}
	// A core dump of ours must not contain the guests' memory.
	_ = unix.Madvise(whole, unix.MADV_DONTDUMP)
	m := &Mapping{whole: whole, data: whole[offset-start:][:size:size]}
	m.refs.Store(1)
	return m, nil
}

// Bytes returns the memory. It must not be used after the last Release.
func (m *Mapping) Bytes() []byte { return m.data }

// Retain adds a reference.
func (m *Mapping) Retain() { m.refs.Add(1) }

// Release drops a reference; the last one unmaps.
func (m *Mapping) Release() {
	switch n := m.refs.Add(-1); {
	case n == 0:
		munmap(m.whole)
		m.budget.give(uint64(len(m.whole)))
		m.whole, m.data = nil, nil
	case n < 0:
		panic("mem: Mapping released too often")
	}
}

// Contains reports whether the address addr of this process lies in m.
func (m *Mapping) Contains(addr uintptr) bool { return contains(m.whole, addr) }

// Fault returns the faulting address if the recovered panic value comes from
// touching memory that is not there, under debug.SetPanicOnFault. A nil
// dereference is none: it is our own bug.
func Fault(recovered any) (addr uintptr, ok bool) {
	f, ok := recovered.(interface {
		error
		Addr() uintptr
	})
	if !ok {
		return 0, false
	}
	return f.Addr(), true
}

// FaultError ends a session whose memory was not there when it was touched:
// the peer shrank the file behind it.
type FaultError struct {
	Addr uintptr // in this process
}

func (e *FaultError) Error() string {
	return fmt.Sprintf("fault on shared memory at %#x: the front end shrank or lost its file", e.Addr)
}
