package vfs

import (
	"bytes"
	"io/fs"
	"os"
	"runtime"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// collectBytes is the mapped memory at which the garbage collector is asked to
// find mappings that nobody closed; it can't see their weight by itself.
const collectBytes = 2 << 30

var mappedBytes atomic.Int64

// memory is what a mapped file's contents lie in: an anonymous file of the
// host, so that mappings, reads and writes see each other as they do for OS.
type memory struct {
	file  *os.File
	areas map[*area]struct{} // under Mem.mu; none of them closed
}

func newMemory(size int64) (*memory, error) {
	fd, err := unix.MemfdCreate("vfs.Mem", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, os.NewSyscallError("memfd_create", err)
	}
	mem := &memory{file: os.NewFile(uintptr(fd), "vfs.Mem"), areas: make(map[*area]struct{})}
	if err := mem.file.Truncate(size); err != nil {
		mem.file.Close()
		return nil, err
	}
	return mem, nil
}

func (mem *memory) size() (int64, error) {
	info, err := mem.file.Stat()
	if err != nil {
		return 0, err
	}
	return info.Size(), nil
}

func (mem *memory) flip(off int64) error {
	var b [1]byte
	if _, err := mem.file.ReadAt(b[:], off); err != nil {
		return err
	}
	b[0] ^= 0x10
	_, err := mem.file.WriteAt(b[:], off)
	return err
}

func (mem *memory) allocate(off, length int64) error {
	return unix.Fallocate(int(mem.file.Fd()), 0, off, length)
}

func (mem *memory) punch(off, length int64) error {
	return unix.Fallocate(int(mem.file.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, off, length)
}

// copy returns a memory with the same bytes. Pages of zeroes become holes: most
// of a large mapping is populated and was never stored to.
func (mem *memory) copy() (*memory, error) {
	size, err := mem.size()
	if err != nil {
		return nil, err
	}
	out, err := newMemory(size)
	if err != nil || size == 0 {
		return out, err
	}
	b, err := unix.Mmap(int(mem.file.Fd()), 0, int(size), unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		return nil, os.NewSyscallError("mmap", err)
	}
	defer unix.Munmap(b)
	for off := int64(0); off < size; {
		end := off
		for end < size && !bytes.Equal(b[end:min(end+pageSize, size)], zeroPage.data[:min(pageSize, size-end)]) {
			end = min(end+pageSize, size)
		}
		if end > off {
			if _, err := out.file.WriteAt(b[off:end], off); err != nil {
				return nil, err
			}
		}
		off = end + pageSize // the page at end, if there is one, is zero
	}
	return out, nil
}

// cut detaches all areas from the memory: each keeps its address and its bytes.
func (mem *memory) cut() error {
	for a := range mem.areas {
		if err := remapPrivate(int(mem.file.Fd()), a.b); err != nil {
			return err
		}
	}
	return nil
}

// area is one Map of a Mem's file.
type area struct {
	m       *Mem
	mem     *memory
	b       []byte // nil once closed
	cleanup runtime.Cleanup
}

// Map implements FS.
func (m *Mem) Map(name string, size int64) (Mapping, bool, error) {
	if mappedBytes.Load() > collectBytes {
		runtime.GC()
	}
	if err := m.enter(OpMap, name); err != nil {
		return nil, false, err
	}
	defer m.mu.Unlock()
	if size <= 0 || int64(int(size)) != size {
		return nil, false, pathError("map", name, unix.EINVAL)
	}
	n, err := m.openNode(name, Create)
	if err != nil {
		return nil, false, pathError("map", name, err)
	}
	old, err := n.size()
	if err != nil {
		return nil, false, pathError("map", name, err)
	}
	if err := m.moveToMemory(n, max(old, size)); err != nil {
		return nil, false, pathError("map", name, err)
	}
	b, err := unix.Mmap(int(n.memory.file.Fd()), 0, int(size), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return nil, false, pathError("map", name, err)
	}
	mappedBytes.Add(size)
	a := &area{m: m, mem: n.memory, b: b}
	a.cleanup = runtime.AddCleanup(a, unmap, b)
	n.memory.areas[a] = struct{}{}
	return a, old != size, nil
}

// moveToMemory makes n a mapped file of the given size.
func (m *Mem) moveToMemory(n *node, size int64) error {
	if n.memory != nil {
		return n.memory.file.Truncate(size)
	}
	mem, err := newMemory(size)
	if err != nil {
		return err
	}
	for i, p := range n.cur.pages {
		if p == zeroPage {
			continue // reserved only
		}
		data := p.data[:min(pageSize, n.cur.size-i*pageSize)]
		if _, err := mem.file.WriteAt(data, i*pageSize); err != nil {
			return err
		}
	}
	m.used -= int64(len(n.cur.pages)) * pageSize
	*n = node{memory: mem, cur: newContent(), durable: newContent(), dirty: make(map[int64]struct{}),
		links: n.links, opens: n.opens, locked: n.locked}
	return nil
}

func unmap(b []byte) {
	mappedBytes.Add(-int64(len(b)))
	_ = unix.Munmap(b)
}

func (a *area) Bytes() []byte { return a.b }

// Close works on a killed instance too.
func (a *area) Close() error {
	a.m.mu.Lock()
	defer a.m.mu.Unlock()
	if a.b == nil {
		return fs.ErrClosed
	}
	a.cleanup.Stop()
	unmap(a.b)
	a.b = nil
	delete(a.mem.areas, a)
	if a.m.killed && len(a.mem.areas) == 0 {
		return a.mem.file.Close()
	}
	return nil
}
