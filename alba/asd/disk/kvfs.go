package disk

import (
	"io"
	"io/fs"
	"maps"
	"path"
	"slices"
	"strings"
	"sync"

	"scoria/alba/vfs"

	pebblevfs "github.com/cockroachdb/pebble/v2/vfs"
)

// kvFS gives Pebble the file system that Scoria's tests can crash. Names have
// forward slashes, as both sides want them. Manifests get a twin (see kvtwin.go),
// durable, if set, is told how far logs and manifests are durable, and replay, if set,
// looks at each log before it is read.
type kvFS struct {
	fs      vfs.FS
	durable *durableSizes
	replay  *kvReplay
}

var _ pebblevfs.FS = kvFS{}

// Create implements pebble's vfs.FS: an existing file is removed first.
//
// Pebble names its current manifest by an empty file, a marker. It creates the
// manifest, the new marker, removes the old marker and then syncs the directory
// once. That needs a file system that keeps the order of names; ours promises
// less (see vfs), so the manifest's name is made durable before the marker, and
// the new marker before the old one goes.
func (k kvFS) Create(name string, _ pebblevfs.DiskWriteCategory) (pebblevfs.File, error) {
	marker := strings.HasPrefix(path.Base(name), "marker.")
	if marker {
		if err := k.fs.SyncDir(path.Dir(name)); err != nil {
			return nil, err
		}
	}
	f, err := k.fs.Open(name, vfs.Create|vfs.Exclusive)
	if isExist(err) {
		if err := k.fs.Remove(name); err != nil && !isNotExist(err) {
			return nil, err
		}
		f, err = k.fs.Open(name, vfs.Create|vfs.Exclusive)
	}
	if err == nil && marker {
		if err = k.fs.SyncDir(path.Dir(name)); err != nil {
			_ = f.Close()
		}
	}
	var twin vfs.File
	if err == nil && isManifest(name) {
		if twin, err = k.fs.Open(name+twinSuffix, vfs.Create); err == nil {
			err = twin.Truncate(0)
		}
		if err != nil {
			_ = f.Close()
		}
	}
	opened, err := k.wrap(f, name, err)
	if err == nil {
		opened.(*kvFile).twin = twin
	}
	return opened, err
}

func (k kvFS) wrap(f vfs.File, name string, err error) (pebblevfs.File, error) {
	if err != nil {
		return nil, err
	}
	return &kvFile{File: f, fs: k, name: name}, nil
}

// Link implements pebble's vfs.FS.
func (k kvFS) Link(oldName, newName string) error { return k.fs.Link(oldName, newName) }

// Open implements pebble's vfs.FS. The options are advice about reading ahead. Pebble
// opens a log for nothing but to replay it.
func (k kvFS) Open(name string, _ ...pebblevfs.OpenOption) (pebblevfs.File, error) {
	if err := k.replay.check(k.fs, name); err != nil {
		return nil, err
	}
	f, err := k.fs.Open(name, vfs.ReadOnly)
	return k.wrap(f, name, err)
}

// OpenReadWrite implements pebble's vfs.FS.
func (k kvFS) OpenReadWrite(name string, _ pebblevfs.DiskWriteCategory, _ ...pebblevfs.OpenOption) (pebblevfs.File, error) {
	f, err := k.fs.Open(name, vfs.Create)
	return k.wrap(f, name, err)
}

// OpenDir implements pebble's vfs.FS.
func (k kvFS) OpenDir(name string) (pebblevfs.File, error) {
	if _, err := k.fs.Stat(name); err != nil {
		return nil, err
	}
	return &kvDir{fs: k.fs, name: name}, nil
}

// Remove implements pebble's vfs.FS. A twin that a crash leaves behind is removed at
// the next start.
func (k kvFS) Remove(name string) error {
	k.durable.forget(name)
	if err := k.fs.Remove(name); err != nil || !isManifest(name) {
		return err
	}
	if err := k.fs.Remove(name + twinSuffix); err != nil && !isNotExist(err) {
		return err
	}
	return nil
}

// RemoveAll implements pebble's vfs.FS.
func (k kvFS) RemoveAll(name string) error { return k.fs.RemoveAll(name) }

// Rename implements pebble's vfs.FS.
func (k kvFS) Rename(oldName, newName string) error { return k.fs.Rename(oldName, newName) }

// ReuseForWrite implements pebble's vfs.FS.
func (k kvFS) ReuseForWrite(oldName, newName string, _ pebblevfs.DiskWriteCategory) (pebblevfs.File, error) {
	k.durable.forget(oldName)
	if err := k.fs.Rename(oldName, newName); err != nil {
		return nil, err
	}
	f, err := k.fs.Open(newName, 0)
	return k.wrap(f, newName, err)
}

// MkdirAll implements pebble's vfs.FS.
func (k kvFS) MkdirAll(name string, _ fs.FileMode) error { return k.fs.MkdirAll(name) }

// Lock implements pebble's vfs.FS.
func (k kvFS) Lock(name string) (io.Closer, error) { return k.fs.Lock(name) }

// List implements pebble's vfs.FS.
func (k kvFS) List(name string) ([]string, error) { return k.fs.List(name) }

// Stat implements pebble's vfs.FS.
func (k kvFS) Stat(name string) (pebblevfs.FileInfo, error) {
	info, err := k.fs.Stat(name)
	if err != nil {
		return nil, err
	}
	return kvInfo{info}, nil
}

// PathBase implements pebble's vfs.FS.
func (kvFS) PathBase(name string) string { return path.Base(name) }

// PathJoin implements pebble's vfs.FS.
func (kvFS) PathJoin(elem ...string) string { return path.Join(elem...) }

// PathDir implements pebble's vfs.FS.
func (kvFS) PathDir(name string) string { return path.Dir(name) }

// GetDiskUsage implements pebble's vfs.FS. Pebble paces deletions by it.
func (k kvFS) GetDiskUsage(name string) (pebblevfs.DiskUsage, error) {
	free, err := k.fs.Free(name)
	return pebblevfs.DiskUsage{AvailBytes: free, TotalBytes: free}, err
}

// Unwrap implements pebble's vfs.FS.
func (kvFS) Unwrap() pebblevfs.FS { return nil }

// kvInfo adds the device to a fs.FileInfo; all files of an ASD lie on one.
type kvInfo struct{ fs.FileInfo }

// DeviceID implements pebble's vfs.FileInfo.
func (kvInfo) DeviceID() pebblevfs.DeviceID { return pebblevfs.DeviceID{} }

// kvFile is a file with the position that Read and Write go on from. Pebble
// calls those from one goroutine at a time.
type kvFile struct {
	vfs.File
	fs       kvFS
	name     string
	twin     vfs.File // of a manifest that is being written; else nil
	position int64
}

// Read implements pebble's vfs.File.
func (f *kvFile) Read(p []byte) (int, error) {
	n, err := f.ReadAt(p, f.position)
	f.position += int64(n)
	if n > 0 && err == io.EOF {
		err = nil
	}
	return n, err
}

// Write implements pebble's vfs.File.
func (f *kvFile) Write(p []byte) (int, error) {
	n, err := f.WriteAt(p, f.position)
	if err == nil && f.twin != nil {
		_, err = f.twin.WriteAt(p, f.position)
	}
	f.position += int64(n)
	return n, err
}

// Sync implements pebble's vfs.File.
func (f *kvFile) Sync() error {
	size := f.position
	err := f.File.Sync()
	if err == nil && f.twin != nil {
		err = f.twin.Sync()
	}
	if err == nil {
		f.fs.durable.note(f.name, size)
	}
	return err
}

// Close implements pebble's vfs.File.
func (f *kvFile) Close() error {
	err := f.File.Close()
	if f.twin != nil {
		if twinErr := f.twin.Close(); err == nil {
			err = twinErr
		}
	}
	return err
}

// Preallocate implements pebble's vfs.File.
func (f *kvFile) Preallocate(offset, length int64) error { return f.Allocate(offset, length) }

// Stat implements pebble's vfs.File. Nobody stats a file that was renamed while open.
func (f *kvFile) Stat() (pebblevfs.FileInfo, error) { return f.fs.Stat(f.name) }

// SyncTo implements pebble's vfs.File.
func (f *kvFile) SyncTo(length int64) (bool, error) { return false, f.StartWriteback(0, length) }

// SyncData implements pebble's vfs.File.
func (f *kvFile) SyncData() error { return f.Sync() }

// Prefetch implements pebble's vfs.File.
func (f *kvFile) Prefetch(int64, int64) error { return nil }

// Fd implements pebble's vfs.File.
func (f *kvFile) Fd() uintptr { return pebblevfs.InvalidFd }

// durableSizes are how many bytes of each log and manifest are durable and are not
// changed any more. Safe from any goroutine; a nil one knows nothing. The lock is a
// leaf.
type durableSizes struct {
	mu    sync.Mutex
	files map[string]int64
}

func (s *durableSizes) note(name string, size int64) {
	if _, log := walNumber(name); s == nil || !log && !isManifest(name) {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.files[name] = max(size, s.files[name])
}

func (s *durableSizes) forget(name string) {
	if s == nil {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.files, name)
}

// list returns the files' names, sorted.
func (s *durableSizes) list() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Sorted(maps.Keys(s.files))
}

// of returns a file's size; false if the key-value store has removed it.
func (s *durableSizes) of(name string) (int64, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	size, ok := s.files[name]
	return size, ok
}

// kvDir is a directory opened for Sync.
type kvDir struct {
	fs   vfs.FS
	name string
}

func (d *kvDir) refuse(op string) error {
	return &fs.PathError{Op: op, Path: d.name, Err: fs.ErrInvalid}
}

// Close implements pebble's vfs.File.
func (*kvDir) Close() error { return nil }

// Read implements pebble's vfs.File.
func (d *kvDir) Read([]byte) (int, error) { return 0, d.refuse("read") }

// ReadAt implements pebble's vfs.File.
func (d *kvDir) ReadAt([]byte, int64) (int, error) { return 0, d.refuse("read") }

// Write implements pebble's vfs.File.
func (d *kvDir) Write([]byte) (int, error) { return 0, d.refuse("write") }

// WriteAt implements pebble's vfs.File.
func (d *kvDir) WriteAt([]byte, int64) (int, error) { return 0, d.refuse("write") }

// Preallocate implements pebble's vfs.File.
func (*kvDir) Preallocate(int64, int64) error { return nil }

// Stat implements pebble's vfs.File.
func (d *kvDir) Stat() (pebblevfs.FileInfo, error) { return kvFS{fs: d.fs}.Stat(d.name) }

// Sync implements pebble's vfs.File.
func (d *kvDir) Sync() error { return d.fs.SyncDir(d.name) }

// SyncTo implements pebble's vfs.File.
func (*kvDir) SyncTo(int64) (bool, error) { return false, nil }

// SyncData implements pebble's vfs.File.
func (d *kvDir) SyncData() error { return d.Sync() }

// Prefetch implements pebble's vfs.File.
func (*kvDir) Prefetch(int64, int64) error { return nil }

// Fd implements pebble's vfs.File.
func (*kvDir) Fd() uintptr { return pebblevfs.InvalidFd }
