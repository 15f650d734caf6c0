package vfs

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

const (
	dirMode  = 0o700
	fileMode = 0o600
	// lockAttempts bounds how often Lock starts anew because the file it locked
	// was removed under it.
	lockAttempts = 16
)

// osFS implements FS on the host's file systems.
type osFS struct{}

// OS returns the host's file systems. Relative names are relative to the
// process's working directory.
func OS() FS { return osFS{} }

// retry repeats a system call that a signal interrupted.
func retry(call func() error) error {
	for {
		if err := call(); err != unix.EINTR {
			return err
		}
	}
}

func pathError(op, name string, err error) error {
	if err == nil {
		return nil
	}
	return &fs.PathError{Op: op, Path: name, Err: err}
}

// Open implements FS.
func (osFS) Open(name string, flags OpenFlag) (File, error) {
	mode := unix.O_CLOEXEC | unix.O_RDWR
	if flags&ReadOnly != 0 {
		mode = unix.O_CLOEXEC | unix.O_RDONLY
	}
	if flags&Create != 0 {
		mode |= unix.O_CREAT
		if flags&Exclusive != 0 {
			mode |= unix.O_EXCL
		}
	}
	var fd int
	err := retry(func() (err error) {
		fd, err = unix.Open(name, mode, fileMode)
		return err
	})
	if err != nil {
		return nil, pathError("open", name, err)
	}
	if flags&Direct != 0 {
		setDirect(fd)
	}
	return newOSFile(fd, name, flags&Direct != 0)
}

// setDirect switches direct I/O on where the file system can; elsewhere the
// file stays buffered, which is slower but right. Asking for it in open would
// leave the file behind, created, when the file system refuses.
func setDirect(fd int) {
	if fl, err := unix.FcntlInt(uintptr(fd), unix.F_GETFL, 0); err == nil {
		_, _ = unix.FcntlInt(uintptr(fd), unix.F_SETFL, fl|unix.O_DIRECT)
	}
}

// MkdirAll implements FS. Each directory is made durable before the next one
// is made in it. The parent of the deepest one that existed is synced too: an
// earlier process may have died between making and syncing it.
func (o osFS) MkdirAll(name string) error {
	name = filepath.Clean(name)
	info, err := os.Stat(name)
	if err == nil {
		if !info.IsDir() {
			return pathError("mkdir", name, unix.ENOTDIR)
		}
		// Not every directory above ours can be synced; those that can't are not
		// Scoria's making.
		err := o.SyncDir(filepath.Dir(name))
		if errors.Is(err, fs.ErrPermission) || errors.Is(err, unix.EINVAL) {
			return nil
		}
		return err
	}
	if !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	parent := filepath.Dir(name)
	if parent != name {
		if err := o.MkdirAll(parent); err != nil {
			return err
		}
	}
	if err := os.Mkdir(name, dirMode); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	return o.SyncDir(parent)
}

// Remove implements FS.
func (osFS) Remove(name string) error { return os.Remove(name) }

// RemoveAll implements FS.
func (osFS) RemoveAll(name string) error { return os.RemoveAll(name) }

// Rename implements FS.
func (osFS) Rename(oldName, newName string) error { return os.Rename(oldName, newName) }

// Link implements FS.
func (osFS) Link(oldName, newName string) error {
	err := retry(func() error { return unix.Linkat(unix.AT_FDCWD, oldName, unix.AT_FDCWD, newName, 0) })
	if err != nil {
		return &os.LinkError{Op: "link", Old: oldName, New: newName, Err: err}
	}
	return nil
}

// List implements FS.
func (osFS) List(name string) ([]string, error) {
	entries, err := os.ReadDir(name)
	if err != nil {
		return nil, err
	}
	names := make([]string, len(entries))
	for i, e := range entries {
		names[i] = e.Name()
	}
	return names, nil
}

// Stat implements FS.
func (osFS) Stat(name string) (fs.FileInfo, error) { return os.Stat(name) }

// SyncDir implements FS.
func (osFS) SyncDir(name string) error {
	d, err := os.Open(name)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}

// Free implements FS.
func (osFS) Free(name string) (uint64, error) {
	var st unix.Statfs_t
	if err := retry(func() error { return unix.Statfs(name, &st) }); err != nil {
		return 0, pathError("statfs", name, err)
	}
	unit := st.Frsize
	if unit == 0 {
		unit = st.Bsize
	}
	return st.Bavail * uint64(unit), nil
}

// Lock implements FS with flock, so that two openings within one process
// exclude each other as two processes do. The file holds the holder's pid.
func (osFS) Lock(name string) (io.Closer, error) {
	for range lockAttempts {
		l, err := openLock(name)
		if err != nil {
			return nil, pathError("lock", name, err)
		}
		err = retry(func() error { return unix.Flock(l.fd, unix.LOCK_EX|unix.LOCK_NB) })
		if err == unix.EWOULDBLOCK {
			err = lockedError(name, l.holder())
			l.Close()
			return nil, err
		}
		stale := false
		if err == nil {
			stale, err = l.stale(name)
		}
		if err == nil && !stale {
			err = l.writePid()
		}
		if err != nil || stale {
			l.Close()
		}
		if err != nil {
			return nil, pathError("lock", name, err)
		}
		if !stale {
			return l, nil
		}
	}
	return nil, fmt.Errorf("lock %s: the file was removed %d times while it was being locked", name, lockAttempts)
}

// osLock is a bare descriptor: a lock whose holder forgets to keep the value
// alive must not end with the garbage collector.
type osLock struct {
	once sync.Once
	fd   int
}

func openLock(name string) (*osLock, error) {
	l := new(osLock)
	return l, retry(func() (err error) {
		l.fd, err = unix.Open(name, unix.O_RDWR|unix.O_CREAT|unix.O_CLOEXEC, fileMode)
		return err
	})
}

// Close gives the lock back. Closing twice is harmless.
func (l *osLock) Close() (err error) {
	l.once.Do(func() { err = unix.Close(l.fd) })
	return err
}

// stale says that the name was removed, and perhaps made anew by somebody who
// locked the new file, between our open and our lock.
func (l *osLock) stale(name string) (bool, error) {
	var held, named unix.Stat_t
	if err := unix.Fstat(l.fd, &held); err != nil {
		return false, err
	}
	err := unix.Stat(name, &named)
	if err == unix.ENOENT {
		return true, nil
	}
	return held.Ino != named.Ino || held.Dev != named.Dev, err
}

func (l *osLock) writePid() error {
	pid := strconv.Itoa(os.Getpid()) + "\n"
	if err := unix.Ftruncate(l.fd, int64(len(pid))); err != nil {
		return err
	}
	_, err := unix.Pwrite(l.fd, []byte(pid), 0)
	return err
}

// holder returns the pid in a lock file that another one holds, or "".
func (l *osLock) holder() string {
	var buf [16]byte
	n, _ := unix.Pread(l.fd, buf[:], 0)
	return strings.TrimSpace(string(buf[:max(n, 0)]))
}

func lockedError(name, pid string) error {
	if pid == "" {
		return fmt.Errorf("lock %s: %w", name, ErrLocked)
	}
	return fmt.Errorf("lock %s: %w (pid %s)", name, ErrLocked, pid)
}

// osMapping is a shared mapping of a host file.
type osMapping struct{ b []byte }

// Map implements FS. The pages are not populated: the caller does that (with
// MADV_POPULATE_WRITE, which reports a full tmpfs as an error) before it relies
// on stores that neither fault nor raise SIGBUS.
func (osFS) Map(name string, size int64) (Mapping, bool, error) {
	if size <= 0 || int64(int(size)) != size {
		return nil, false, pathError("map", name, fmt.Errorf("size %d: %w", size, unix.EINVAL))
	}
	f, err := os.OpenFile(name, os.O_RDWR|os.O_CREATE, fileMode)
	if err != nil {
		return nil, false, err
	}
	defer f.Close() // the mapping keeps the file
	info, err := f.Stat()
	if err != nil {
		return nil, false, err
	}
	if info.Size() < size {
		if err := f.Truncate(size); err != nil {
			return nil, false, err
		}
	}
	b, err := mapShared(int(f.Fd()), int(size))
	if err != nil {
		return nil, false, pathError("mmap", name, err)
	}
	return &osMapping{b}, info.Size() != size, nil
}

func (m *osMapping) Bytes() []byte { return m.b }

func (m *osMapping) Close() error {
	if m.b == nil {
		return fs.ErrClosed
	}
	b := m.b
	m.b = nil
	return unmapShared(b)
}
