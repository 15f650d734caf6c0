package vfs

import (
	"io"
	"io/fs"
	"reflect"

	"golang.org/x/sys/unix"
)

// directAlignment is what Direct files demand of offsets, lengths and buffers,
// in bytes.
const directAlignment = 4096

// memFile is an open file of a Mem.
type memFile struct {
	m      *Mem
	n      *node
	name   string
	flags  OpenFlag
	closed bool // under m.mu
}

// enter begins a call as Mem.enter does; writes says that it changes the file.
func (f *memFile) enter(op Op, writes bool) error {
	if err := f.m.enter(op, f.name); err != nil {
		return err
	}
	switch {
	case f.closed:
		f.m.mu.Unlock()
		return pathError(op.String(), f.name, fs.ErrClosed)
	case writes && f.flags&ReadOnly != 0:
		f.m.mu.Unlock()
		return pathError(op.String(), f.name, unix.EBADF)
	}
	return nil
}

// checkDirect refuses what a kernel refuses on a file opened with O_DIRECT.
func (f *memFile) checkDirect(p []byte, off int64) error {
	if f.flags&Direct == 0 || len(p) == 0 {
		return nil
	}
	addr := int64(reflect.ValueOf(p).Pointer())
	if (addr|int64(len(p))|off)%directAlignment != 0 {
		return unix.EINVAL
	}
	return nil
}

// ReadAt implements io.ReaderAt.
func (f *memFile) ReadAt(p []byte, off int64) (int, error) {
	if err := f.enter(OpRead, false); err != nil {
		return 0, err
	}
	defer f.m.mu.Unlock()
	if err := f.checkDirect(p, off); err != nil || off < 0 {
		return 0, pathError("read", f.name, unix.EINVAL)
	}
	if f.n.memory != nil {
		return f.n.memory.file.ReadAt(p, off)
	}
	n := int(max(0, min(int64(len(p)), f.n.cur.size-off)))
	f.n.cur.readAt(p[:n], off)
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

// WriteAt implements io.WriterAt. Without room it writes what fits.
func (f *memFile) WriteAt(p []byte, off int64) (int, error) {
	if err := f.enter(OpWrite, true); err != nil {
		return 0, err
	}
	defer f.m.mu.Unlock()
	if len(p) == 0 {
		return 0, nil
	}
	if f.checkDirect(p, off) != nil || validRange(off, int64(len(p))) != nil {
		return 0, pathError("write", f.name, unix.EINVAL)
	}
	n := f.n
	if n.memory != nil {
		return n.memory.file.WriteAt(p, off)
	}
	done := 0
	f.m.counted(n, func() { done = n.cur.writeData(p, off, f.m.roomPages()) })
	if done > 0 {
		end := off + int64(done)
		n.cur.size = max(n.cur.size, end)
		n.markDirty(off, end)
		n.record(change{kind: changeWrite, off: off, end: end, data: append([]byte(nil), p[:done]...)})
	}
	if done < len(p) {
		return done, pathError("write", f.name, unix.ENOSPC)
	}
	return done, nil
}

// WriteVecAt implements File. Each buffer is a write of its own.
func (f *memFile) WriteVecAt(bufs [][]byte, off int64) (int, error) {
	done := 0
	for _, p := range bufs {
		n, err := f.WriteAt(p, off+int64(done))
		done += n
		if err != nil {
			return done, err
		}
	}
	return done, nil
}

// WriteParts implements File, the last part first: whoever relies on an order
// relies on the other one.
func (f *memFile) WriteParts(parts []Part) (int, error) {
	done := 0
	for i := range parts {
		p := &parts[len(parts)-1-i]
		n, err := f.WriteVecAt(p.Bufs, p.Off)
		done += n
		if err != nil {
			return done, err
		}
	}
	return done, nil
}

// Close implements io.Closer. It works on a killed instance too.
func (f *memFile) Close() error {
	f.m.mu.Lock()
	defer f.m.mu.Unlock()
	if f.closed {
		return pathError("close", f.name, fs.ErrClosed)
	}
	f.closed = true
	f.n.opens--
	f.m.release(f.n)
	return nil
}

// Size implements File.
func (f *memFile) Size() (int64, error) {
	if err := f.enter(OpStat, false); err != nil {
		return 0, err
	}
	defer f.m.mu.Unlock()
	return f.n.size()
}

func (n *node) size() (int64, error) {
	if n.memory != nil {
		return n.memory.size()
	}
	return n.cur.size, nil
}

// Truncate implements File.
func (f *memFile) Truncate(size int64) error {
	if err := f.enter(OpTruncate, true); err != nil {
		return err
	}
	defer f.m.mu.Unlock()
	n := f.n
	if size < 0 || size > maxSize {
		return pathError("truncate", f.name, unix.EINVAL)
	}
	if n.memory != nil {
		return n.memory.file.Truncate(size)
	}
	f.m.counted(n, func() {
		n.markDirty(size, maxSize)
		n.cur.truncate(size)
	})
	n.record(change{kind: changeTruncate, end: size})
	return nil
}

// Allocate implements File.
func (f *memFile) Allocate(off, length int64) error {
	if err := f.enter(OpAllocate, true); err != nil {
		return err
	}
	defer f.m.mu.Unlock()
	n := f.n
	if err := validRange(off, length); err != nil {
		return pathError("allocate", f.name, err)
	}
	if n.memory != nil {
		return pathError("allocate", f.name, n.memory.allocate(off, length))
	}
	end, ok := off+length, false
	f.m.counted(n, func() { ok = n.cur.reserve(off, end, f.m.roomPages()) })
	if !ok {
		return pathError("allocate", f.name, unix.ENOSPC)
	}
	n.cur.size = max(n.cur.size, end)
	n.markDirty(off, end)
	n.record(change{kind: changeAllocate, off: off, end: end})
	return nil
}

// PunchHole implements File.
func (f *memFile) PunchHole(off, length int64) error {
	if err := f.enter(OpPunchHole, true); err != nil {
		return err
	}
	defer f.m.mu.Unlock()
	n := f.n
	if err := validRange(off, length); err != nil {
		return pathError("punch hole", f.name, err)
	}
	if n.memory != nil {
		return pathError("punch hole", f.name, n.memory.punch(off, length))
	}
	f.m.counted(n, func() {
		n.markDirty(off, off+length)
		n.cur.zero(off, off+length)
	})
	n.record(change{kind: changePunch, off: off, end: off + length})
	return nil
}

// Sync implements File.
func (f *memFile) Sync() error {
	hookErr := f.m.runHook(OpSync, f.name)
	f.m.mu.Lock()
	defer f.m.mu.Unlock()
	switch {
	case f.m.killed:
		return pathError("sync", f.name, ErrKilled)
	case f.closed:
		return pathError("sync", f.name, fs.ErrClosed)
	case hookErr != nil:
		f.m.counted(f.n, func() { f.n.failSync(f.m.rng) })
		return hookErr
	}
	f.n.sync()
	return nil
}

// StartWriteback implements File.
func (f *memFile) StartWriteback(off, length int64) error {
	if err := f.enter(OpStartWriteback, false); err != nil {
		return err
	}
	f.m.mu.Unlock()
	return nil
}

// Prefetch implements File.
func (f *memFile) Prefetch(off, length int64) error {
	if err := f.enter(OpPrefetch, false); err != nil {
		return err
	}
	f.m.mu.Unlock()
	return nil
}

// DropCache implements File.
func (f *memFile) DropCache(off, length int64) error {
	if err := f.enter(OpDropCache, false); err != nil {
		return err
	}
	f.m.mu.Unlock()
	return nil
}
