package disk

import (
	"fmt"
	"io"
	"io/fs"
	"sync"
	"sync/atomic"

	"scoria/alba/vfs"
)

// kvAccess is the key-value store's way to its files. A store whose log or manifest
// failed never ends (see kvLogger), and may still write; before its directory is
// opened again the way is closed, so that nothing that is left of it reaches the disk.
// Calls that come later never return: a store that got errors would try again at once,
// for ever.
type kvAccess struct {
	fs     vfs.FS
	failed func(error) // told of every sync that fails
	halt   func(error) // told of what Pebble would panic at; does not return
	// phase is what Pebble is at. When it has carried its log over it collects what tables
	// hold, beside the opening, and would not wait for that to end, but panic, if the
	// opening failed: it isn't told what makes it fail.
	phase atomic.Int32

	inside  sync.RWMutex // held for reading during each call
	revoked bool         // guarded by inside

	mu   sync.Mutex // a leaf; guards what follows
	open map[io.Closer]struct{}
}

// Phases of a kvAccess.
const (
	phaseOpen    = iota // it is open, or has not begun to be
	phaseOpening        // its log is not carried over yet
	phaseCarried        // it is opening still
)

var _ vfs.FS = (*kvAccess)(nil)

func newKVAccess(fsys vfs.FS, failed, halt func(error)) *kvAccess {
	return &kvAccess{fs: fsys, failed: failed, halt: halt, open: map[io.Closer]struct{}{}}
}

// enter begins a call; leave ends it.
func (a *kvAccess) enter() {
	a.inside.RLock()
	if a.revoked {
		a.inside.RUnlock()
		select {}
	}
}

func (a *kvAccess) leave() { a.inside.RUnlock() }

// call is a call that may fail.
func (a *kvAccess) call(fn func() error) error {
	a.enter()
	defer a.leave()
	return fn()
}

// sync is a call that makes something durable. A store that syncs a table in vain
// writes another one, but what failed was the disk.
func (a *kvAccess) sync(name string, fn func() error) error {
	err := a.call(fn)
	if err != nil {
		a.failed(fmt.Errorf("sync %s: %w", name, err))
	}
	return a.needed(err)
}

// needed passes on whether something was done that an opening needs. Not called inside.
func (a *kvAccess) needed(err error) error {
	if err != nil && a.phase.Load() == phaseCarried {
		a.halt(err)
	}
	return err
}

// opened records what revoke has to close.
func (a *kvAccess) opened(c io.Closer) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.open[c] = struct{}{}
}

// close closes what was opened.
func (a *kvAccess) close(c io.Closer) error {
	return a.call(func() error {
		a.mu.Lock()
		delete(a.open, c)
		a.mu.Unlock()
		return c.Close()
	})
}

// revoke waits for the calls under way, closes all files, gives the locks back and
// lets no call in any more.
func (a *kvAccess) revoke() {
	a.inside.Lock()
	a.revoked = true
	a.inside.Unlock()
	a.mu.Lock()
	defer a.mu.Unlock()
	for c := range a.open {
		_ = c.Close() // what it had not synced was not acknowledged
	}
	clear(a.open)
}

// Open implements vfs.FS.
func (a *kvAccess) Open(name string, flags vfs.OpenFlag) (vfs.File, error) {
	f, err := a.openFile(name, flags)
	if flags&vfs.Create != 0 && !isExist(err) {
		err = a.needed(err)
	}
	return f, err
}

func (a *kvAccess) openFile(name string, flags vfs.OpenFlag) (vfs.File, error) {
	a.enter()
	defer a.leave()
	f, err := a.fs.Open(name, flags)
	if err != nil {
		return nil, err
	}
	a.opened(f)
	return &accessFile{file: f, access: a, name: name}, nil
}

// MkdirAll implements vfs.FS.
func (a *kvAccess) MkdirAll(name string) error {
	return a.call(func() error { return a.fs.MkdirAll(name) })
}

// Remove implements vfs.FS.
func (a *kvAccess) Remove(name string) error {
	return a.call(func() error { return a.fs.Remove(name) })
}

// RemoveAll implements vfs.FS.
func (a *kvAccess) RemoveAll(name string) error {
	return a.call(func() error { return a.fs.RemoveAll(name) })
}

// Rename implements vfs.FS.
func (a *kvAccess) Rename(oldName, newName string) error {
	return a.needed(a.call(func() error { return a.fs.Rename(oldName, newName) }))
}

// Link implements vfs.FS.
func (a *kvAccess) Link(oldName, newName string) error {
	return a.call(func() error { return a.fs.Link(oldName, newName) })
}

// List implements vfs.FS.
func (a *kvAccess) List(name string) (names []string, err error) {
	err = a.call(func() error {
		names, err = a.fs.List(name)
		return err
	})
	return names, a.needed(err)
}

// Stat implements vfs.FS.
func (a *kvAccess) Stat(name string) (fs.FileInfo, error) {
	a.enter()
	defer a.leave()
	return a.fs.Stat(name)
}

// SyncDir implements vfs.FS. A directory that can't be synced makes Pebble panic, and the
// process may serve other disks: it isn't told.
func (a *kvAccess) SyncDir(name string) error {
	if err := a.sync(name, func() error { return a.fs.SyncDir(name) }); err != nil {
		a.halt(err)
	}
	return nil
}

// Lock implements vfs.FS.
func (a *kvAccess) Lock(name string) (io.Closer, error) {
	a.enter()
	defer a.leave()
	c, err := a.fs.Lock(name)
	if err != nil {
		return nil, err
	}
	a.opened(c)
	return accessLock{c, a}, nil
}

// Free implements vfs.FS.
func (a *kvAccess) Free(name string) (uint64, error) {
	a.enter()
	defer a.leave()
	return a.fs.Free(name)
}

// Map implements vfs.FS. A mapping could not be taken back; Pebble makes none.
func (a *kvAccess) Map(name string, _ int64) (vfs.Mapping, bool, error) {
	return nil, false, &fs.PathError{Op: "map", Path: name, Err: fs.ErrInvalid}
}

// accessLock is a lock that can be taken back.
type accessLock struct {
	lock   io.Closer
	access *kvAccess
}

// Close implements io.Closer.
func (l accessLock) Close() error { return l.access.close(l.lock) }

// accessFile is a file that can be taken back.
type accessFile struct {
	file   vfs.File
	access *kvAccess
	name   string
}

// Close implements vfs.File.
func (f *accessFile) Close() error { return f.access.close(f.file) }

// ReadAt implements vfs.File.
func (f *accessFile) ReadAt(p []byte, off int64) (int, error) {
	f.access.enter()
	defer f.access.leave()
	return f.file.ReadAt(p, off)
}

func (f *accessFile) write(fn func() (int, error)) (n int, err error) {
	f.access.enter()
	n, err = fn()
	f.access.leave()
	return n, f.access.needed(err)
}

// WriteAt implements vfs.File.
func (f *accessFile) WriteAt(p []byte, off int64) (int, error) {
	return f.write(func() (int, error) { return f.file.WriteAt(p, off) })
}

// WriteVecAt implements vfs.File.
func (f *accessFile) WriteVecAt(bufs [][]byte, off int64) (int, error) {
	return f.write(func() (int, error) { return f.file.WriteVecAt(bufs, off) })
}

// WriteParts implements vfs.File.
func (f *accessFile) WriteParts(parts []vfs.Part) (int, error) {
	return f.write(func() (int, error) { return f.file.WriteParts(parts) })
}

// Size implements vfs.File.
func (f *accessFile) Size() (int64, error) {
	f.access.enter()
	defer f.access.leave()
	return f.file.Size()
}

// Truncate implements vfs.File.
func (f *accessFile) Truncate(size int64) error {
	return f.access.call(func() error { return f.file.Truncate(size) })
}

// Allocate implements vfs.File.
func (f *accessFile) Allocate(off, length int64) error {
	return f.access.call(func() error { return f.file.Allocate(off, length) })
}

// PunchHole implements vfs.File.
func (f *accessFile) PunchHole(off, length int64) error {
	return f.access.call(func() error { return f.file.PunchHole(off, length) })
}

// Sync implements vfs.File.
func (f *accessFile) Sync() error { return f.access.sync(f.name, f.file.Sync) }

// StartWriteback implements vfs.File.
func (f *accessFile) StartWriteback(off, length int64) error {
	return f.access.call(func() error { return f.file.StartWriteback(off, length) })
}

// Prefetch implements vfs.File.
func (f *accessFile) Prefetch(off, length int64) error {
	return f.access.call(func() error { return f.file.Prefetch(off, length) })
}

// DropCache implements vfs.File.
func (f *accessFile) DropCache(off, length int64) error {
	return f.access.call(func() error { return f.file.DropCache(off, length) })
}
