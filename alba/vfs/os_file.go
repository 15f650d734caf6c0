package vfs

import (
	"errors"
	"io"
	"io/fs"
	"slices"
	"sync"

	"golang.org/x/sys/unix"
)

// osFile is an open host file. The lock keeps Close from giving the descriptor's
// number to another file while a call is under way; calls share it.
type osFile struct {
	mu     sync.RWMutex
	fd     int // -1 once closed
	name   string
	direct bool // opened for direct I/O, whether or not the file system can
}

func newOSFile(fd int, name string, direct bool) (File, error) {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		unix.Close(fd)
		return nil, pathError("stat", name, err)
	}
	if st.Mode&unix.S_IFMT == unix.S_IFDIR {
		unix.Close(fd)
		return nil, pathError("open", name, unix.EISDIR)
	}
	return &osFile{fd: fd, name: name, direct: direct}, nil
}

// do runs a call on the descriptor.
func (f *osFile) do(op string, call func(fd int) error) error {
	f.mu.RLock()
	defer f.mu.RUnlock()
	if f.fd < 0 {
		return pathError(op, f.name, fs.ErrClosed)
	}
	for {
		err := call(f.fd)
		if err == nil {
			return nil
		}
		if err != unix.EINTR {
			return pathError(op, f.name, err)
		}
	}
}

// maxVec bounds the buffers of one pwritev (IOV_MAX).
const maxVec = 1024

// WriteVecAt implements File.
func (f *osFile) WriteVecAt(bufs [][]byte, off int64) (int, error) {
	f.mu.RLock()
	defer f.mu.RUnlock()
	if f.fd < 0 {
		return 0, pathError("write", f.name, fs.ErrClosed)
	}
	return f.writeVec(bufs, off)
}

// writeVec needs f.mu.
func (f *osFile) writeVec(bufs [][]byte, off int64) (int, error) {
	rest := slices.Clone(bufs)
	n := 0
	for len(rest) > 0 {
		m, err := unix.Pwritev(f.fd, rest[:min(len(rest), maxVec)], off+int64(n))
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return n, pathError("write", f.name, err)
		}
		n += m
		for len(rest) > 0 && m >= len(rest[0]) {
			m -= len(rest[0])
			rest = rest[1:]
		}
		if m > 0 {
			rest[0] = rest[0][m:]
		}
	}
	return n, nil
}

// WriteParts implements File. What could not be submitted, was interrupted or was
// written in part only is written again, one part after the other: that gives
// the error its usual meaning.
func (f *osFile) WriteParts(parts []Part) (int, error) {
	f.mu.RLock()
	defer f.mu.RUnlock()
	if f.fd < 0 {
		return 0, pathError("write", f.name, fs.ErrClosed)
	}
	total := 0
	for len(parts) > 0 {
		n := min(len(parts), aioDepth)
		results := f.writeTogether(parts[:n])
		for i := range parts[:n] {
			p := &parts[i]
			want := int64(0)
			for _, b := range p.Bufs {
				want += int64(len(b))
			}
			if results[i] == want {
				total += int(want)
				continue
			}
			k, err := f.writeVec(p.Bufs, p.Off)
			total += k
			if err != nil {
				return total, err
			}
		}
		parts = parts[n:]
	}
	return total, nil
}

// writeTogether has parts under way at the same time if that is of use. It
// returns, for each, the bytes written, or anything less than 1.
func (f *osFile) writeTogether(parts []Part) (results [aioDepth]int64) {
	if len(parts) < 2 || !f.direct {
		return results
	}
	c := takeAIO()
	if c == nil {
		return results
	}
	defer c.giveBack()
	_, results = c.write(f.fd, parts)
	return results
}

// ReadAt implements io.ReaderAt.
func (f *osFile) ReadAt(p []byte, off int64) (int, error) {
	f.mu.RLock()
	defer f.mu.RUnlock()
	if f.fd < 0 {
		return 0, pathError("read", f.name, fs.ErrClosed)
	}
	n := 0
	for n < len(p) {
		m, err := unix.Pread(f.fd, p[n:], off+int64(n))
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return n, pathError("read", f.name, err)
		}
		if m == 0 {
			return n, io.EOF
		}
		n += m
	}
	return n, nil
}

// WriteAt implements io.WriterAt.
func (f *osFile) WriteAt(p []byte, off int64) (int, error) {
	f.mu.RLock()
	defer f.mu.RUnlock()
	if f.fd < 0 {
		return 0, pathError("write", f.name, fs.ErrClosed)
	}
	n := 0
	for n < len(p) {
		m, err := unix.Pwrite(f.fd, p[n:], off+int64(n))
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return n, pathError("write", f.name, err)
		}
		if m == 0 {
			return n, pathError("write", f.name, io.ErrShortWrite)
		}
		n += m
	}
	return n, nil
}

// Close implements io.Closer. It waits for calls that are under way.
func (f *osFile) Close() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.fd < 0 {
		return pathError("close", f.name, fs.ErrClosed)
	}
	fd := f.fd
	f.fd = -1
	// Linux frees the number even when close is interrupted: no retry.
	if err := unix.Close(fd); err != nil && err != unix.EINTR {
		return pathError("close", f.name, err)
	}
	return nil
}

// Size implements File.
func (f *osFile) Size() (int64, error) {
	var st unix.Stat_t
	err := f.do("stat", func(fd int) error { return unix.Fstat(fd, &st) })
	return st.Size, err
}

// Truncate implements File.
func (f *osFile) Truncate(size int64) error {
	return f.do("truncate", func(fd int) error { return unix.Ftruncate(fd, size) })
}

// Allocate implements File. On a file system that can't reserve room it fails
// with an error that is errors.ErrUnsupported.
func (f *osFile) Allocate(off, length int64) error {
	return f.do("allocate", func(fd int) error { return unix.Fallocate(fd, 0, off, length) })
}

// PunchHole implements File. Where the file system has no holes, zeroes are
// written and the room stays taken.
func (f *osFile) PunchHole(off, length int64) error {
	err := f.do("punch hole", func(fd int) error {
		return unix.Fallocate(fd, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, off, length)
	})
	if errors.Is(err, unix.EOPNOTSUPP) {
		return f.writeZeroes(off, length)
	}
	return err
}

// writeZeroes overwrites the part of [off, off+length) inside the file.
func (f *osFile) writeZeroes(off, length int64) error {
	size, err := f.Size()
	if err != nil {
		return err
	}
	zeroes := make([]byte, 64<<10)
	for end := min(off+length, size); off < end; {
		n, err := f.WriteAt(zeroes[:min(int64(len(zeroes)), end-off)], off)
		if err != nil {
			return err
		}
		off += int64(n)
	}
	return nil
}

// Sync implements File with fdatasync, which includes the size.
func (f *osFile) Sync() error {
	return f.do("sync", unix.Fdatasync)
}

// StartWriteback implements File with sync_file_range. File systems without it
// are left to write back by themselves.
func (f *osFile) StartWriteback(off, length int64) error {
	return f.do("start writeback", func(fd int) error {
		return ignoreUnsupported(unix.SyncFileRange(fd, off, length, unix.SYNC_FILE_RANGE_WRITE))
	})
}

// Prefetch implements File.
func (f *osFile) Prefetch(off, length int64) error {
	return f.do("prefetch", func(fd int) error {
		return ignoreUnsupported(unix.Fadvise(fd, off, length, unix.FADV_WILLNEED))
	})
}

// DropCache implements File.
func (f *osFile) DropCache(off, length int64) error {
	return f.do("drop cache", func(fd int) error {
		return ignoreUnsupported(unix.Fadvise(fd, off, length, unix.FADV_DONTNEED))
	})
}

// ignoreUnsupported turns the refusal of a mere hint into success.
func ignoreUnsupported(err error) error {
	if err == unix.EOPNOTSUPP || err == unix.ENOSYS || err == unix.ESPIPE {
		return nil
	}
	return err
}
