package dirstore

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"hash/maphash"
	"io"
	"io/fs"
	"path"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"scoria/alba/vfs"
	"scoria/driver"
)

const (
	formatName = ".format"
	formatText = "scoria directory store 1\n"
	tempDir    = ".tmp"

	// MaxNameBytes bounds the names of namespaces and objects.
	MaxNameBytes = 200

	defaultOpenFiles = 256
	gateCount        = 64
	openAttempts     = 16

	lockWaitMin = 200 * time.Microsecond
	lockWaitMax = 20 * time.Millisecond
)

var (
	// ErrNoNamespace: the namespace was not created, or was deleted.
	ErrNoNamespace = errors.New("no such namespace")
	// ErrName: a name is not one that a store accepts.
	ErrName = errors.New("invalid name")
	// ErrFormat: the directory belongs to something else or to another version.
	ErrFormat = errors.New("not a directory store of this version")
	// ErrClosed: the Store was closed.
	ErrClosed = errors.New("directory store is closed")
)

// Options of Open; the zero value is good.
type Options struct {
	// OpenFiles bounds the objects kept open for reading; 0 means 256.
	OpenFiles int
}

// Store implements driver.Store.
type Store struct {
	fs   vfs.FS
	dir  string
	temp string // DIR/.tmp/INSTANCE
	lock io.Closer

	seed   maphash.Seed
	gates  [gateCount]chan struct{} // one token each
	files  *fdCache
	seq    atomic.Uint64
	noLink atomic.Bool // a linked file failed to sync
	closed atomic.Bool
	once   sync.Once
}

var _ driver.Store = (*Store)(nil)

// Open opens the store in dir, making it if there is none, and removes what
// instances that died left behind.
func Open(fsys vfs.FS, dir string, opts Options) (*Store, error) {
	if opts.OpenFiles < 0 {
		return nil, fmt.Errorf("open files %d: must be positive, or 0 for %d", opts.OpenFiles, defaultOpenFiles)
	}
	if opts.OpenFiles == 0 {
		opts.OpenFiles = defaultOpenFiles
	}
	s := &Store{fs: fsys, dir: dir, seed: maphash.MakeSeed(), files: newFDCache(opts.OpenFiles)}
	for i := range s.gates {
		s.gates[i] = make(chan struct{}, 1)
	}
	if err := fsys.MkdirAll(path.Join(dir, tempDir)); err != nil {
		return nil, fmt.Errorf("open store %s: %w", dir, err)
	}
	err := s.begin()
	if err == nil {
		err = s.checkFormat()
	}
	if err == nil {
		err = s.removeOrphans()
	}
	if err != nil {
		_ = s.Close()
		return nil, fmt.Errorf("open store %s: %w", dir, err)
	}
	return s, nil
}

// begin makes this instance's temporary directory and locks it. Another opener
// may take it for an orphan before it is locked; then a new one is tried.
func (s *Store) begin() error {
	var last error
	for range openAttempts {
		var id [8]byte
		_, _ = rand.Read(id[:])
		s.temp = path.Join(s.dir, tempDir, hex.EncodeToString(id[:]))
		if last = s.fs.MkdirAll(s.temp); last != nil {
			continue
		}
		if s.lock, last = s.fs.Lock(path.Join(s.temp, "lock")); last == nil {
			return nil
		}
		if !errors.Is(last, vfs.ErrLocked) && !errors.Is(last, fs.ErrNotExist) {
			return last
		}
	}
	return last
}

// checkFormat verifies the format file, or writes it into a directory that has
// nothing but our own temporary files.
func (s *Store) checkFormat() error {
	name := path.Join(s.dir, formatName)
	f, err := s.fs.Open(name, vfs.ReadOnly)
	if err == nil {
		defer f.Close()
		buf := make([]byte, len(formatText)+1)
		n, err := f.ReadAt(buf, 0)
		if err != nil && err != io.EOF {
			return err
		}
		if string(buf[:n]) != formatText {
			return fmt.Errorf("%s holds %q, want %q: %w", name, buf[:n], formatText, ErrFormat)
		}
		return s.fs.SyncDir(s.dir)
	}
	if !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	names, err := s.fs.List(s.dir)
	if err != nil {
		return err
	}
	for _, n := range names {
		// A second opener may have written the format file since we looked.
		if n != tempDir && n != formatName && n != "lost+found" {
			return fmt.Errorf("%s has no %s but holds %q; a new store needs an empty directory: %w", s.dir, formatName, n, ErrFormat)
		}
	}
	temp := s.tempName()
	if err := s.writeFile(temp, []byte(formatText)); err != nil {
		return err
	}
	if err := s.fs.Rename(temp, name); err != nil {
		return err
	}
	return s.fs.SyncDir(s.dir)
}

// removeOrphans removes the temporary directories of instances that died.
func (s *Store) removeOrphans() error {
	parent := path.Join(s.dir, tempDir)
	names, err := s.fs.List(parent)
	if err != nil {
		return err
	}
	for _, n := range names {
		dir := path.Join(parent, n)
		if dir == s.temp {
			continue
		}
		l, err := s.fs.Lock(path.Join(dir, "lock"))
		if errors.Is(err, vfs.ErrLocked) || errors.Is(err, fs.ErrNotExist) {
			continue // alive, or being removed by another opener
		}
		if err != nil {
			return err
		}
		err = s.fs.RemoveAll(dir)
		if err := errors.Join(err, l.Close()); err != nil {
			return err
		}
	}
	return nil
}

// Close ends the instance. Calls that are under way may fail.
func (s *Store) Close() (err error) {
	s.once.Do(func() {
		s.closed.Store(true)
		err = s.files.close()
		if s.lock != nil {
			err = errors.Join(err, s.fs.RemoveAll(s.temp), s.lock.Close())
		}
	})
	return err
}

func (s *Store) path(ns string, parts ...string) string {
	return path.Join(append([]string{s.dir, ns}, parts...)...)
}

func (s *Store) object(ns, name string) string { return s.path(ns, "objects", name) }

func (s *Store) tempName() string {
	return path.Join(s.temp, strconv.FormatUint(s.seq.Add(1), 10))
}

// check begins every call: it validates the names ("" is skipped for name).
func (s *Store) check(ctx context.Context, ns, name string) error {
	if s.closed.Load() {
		return ErrClosed
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	if err := checkName("namespace", ns); err != nil {
		return err
	}
	return checkName("object", name)
}

// checkName accepts what is a plain file name everywhere.
func checkName(field, name string) error {
	switch {
	case name == "" || len(name) > MaxNameBytes:
		return fmt.Errorf("%s name %.40q has %d bytes, must have 1 to %d: %w", field, name, len(name), MaxNameBytes, ErrName)
	case name[0] == '.':
		return fmt.Errorf("%s name %q must not begin with a dot: %w", field, name, ErrName)
	}
	for i := range len(name) {
		c := name[i]
		if c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || c == '.' || c == '-' || c == '_' {
			continue
		}
		return fmt.Errorf("%s name %q: byte %#02x at %d; letters, digits, '.', '-' and '_' are allowed: %w", field, name, c, i, ErrName)
	}
	return nil
}

// locked runs fn while it holds the namespace's lock, against other goroutines
// and other processes.
func (s *Store) locked(ctx context.Context, ns string, fn func() error) error {
	gate := s.gates[maphash.String(s.seed, ns)%gateCount]
	select {
	case gate <- struct{}{}:
		defer func() { <-gate }()
	case <-ctx.Done():
		return ctx.Err()
	}
	for wait := lockWaitMin; ; wait = min(2*wait, lockWaitMax) {
		l, err := s.fs.Lock(s.path(ns, "lock"))
		if err == nil {
			err = fn()
			return errors.Join(err, l.Close())
		}
		if errors.Is(err, fs.ErrNotExist) {
			return ErrNoNamespace
		}
		if !errors.Is(err, vfs.ErrLocked) {
			return err
		}
		select {
		case <-time.After(wait):
		case <-ctx.Done():
			return fmt.Errorf("%w: %w", ctx.Err(), err)
		}
	}
}

// checkEpoch refuses a stale owner.
func (s *Store) checkEpoch(ns string, epoch uint64) error {
	current, err := s.readEpoch(ns)
	if err != nil {
		return err
	}
	if epoch < current {
		return fmt.Errorf("epoch %d, the namespace is at %d: %w", epoch, current, driver.ErrStaleEpoch)
	}
	return nil
}

// opError names the operation and what it was about.
func opError(op, ns, name string, err error) error {
	if err == nil {
		return nil
	}
	if name != "" {
		ns += "/" + name
	}
	return fmt.Errorf("store: %s %s: %w", op, ns, err)
}

// CreateNamespace implements driver.Store.
func (s *Store) CreateNamespace(ctx context.Context, ns string) error {
	err := s.check(ctx, ns, "-")
	if err == nil {
		err = s.fs.MkdirAll(s.path(ns, "objects"))
	}
	return opError("create namespace", ns, "", err)
}

// DeleteNamespace implements driver.Store. The namespace is gone at once and for
// good; its room comes back until the call returns.
func (s *Store) DeleteNamespace(ctx context.Context, ns string) error {
	err := s.check(ctx, ns, "-")
	if err != nil {
		return opError("delete namespace", ns, "", err)
	}
	temp := s.tempName()
	err = s.locked(ctx, ns, func() error {
		if err := s.fs.Rename(s.path(ns), temp); err != nil {
			return err
		}
		s.files.dropNamespace(ns)
		return s.fs.SyncDir(s.dir)
	})
	if errors.Is(err, ErrNoNamespace) {
		// An earlier call may have died before it synced.
		return opError("delete namespace", ns, "", s.fs.SyncDir(s.dir))
	}
	if err == nil {
		err = s.fs.RemoveAll(temp)
	}
	return opError("delete namespace", ns, "", err)
}

// Namespaces implements driver.Store.
func (s *Store) Namespaces(ctx context.Context) ([]string, error) {
	if err := s.check(ctx, "-", "-"); err != nil {
		return nil, fmt.Errorf("store: list namespaces: %w", err)
	}
	names, err := s.fs.List(s.dir)
	if err != nil {
		return nil, fmt.Errorf("store: list namespaces: %w", err)
	}
	out := names[:0]
	for _, n := range names {
		if checkName("namespace", n) == nil {
			out = append(out, n)
		}
	}
	return out, nil
}

// Fence implements driver.Store.
func (s *Store) Fence(ctx context.Context, ns string, epoch uint64) error {
	err := s.check(ctx, ns, "-")
	if err == nil {
		err = s.locked(ctx, ns, func() error {
			current, err := s.readEpoch(ns)
			switch {
			case err != nil:
				return err
			case current > epoch:
				return fmt.Errorf("epoch %d, the namespace is at %d: %w", epoch, current, driver.ErrStaleEpoch)
			case current < epoch:
				if err := s.writeEpoch(ns, epoch); err != nil {
					return err
				}
			}
			// Also when it is equal: who wrote it may have died before syncing.
			return s.fs.SyncDir(s.path(ns))
		})
	}
	return opError("fence", ns, "", err)
}

// Delete implements driver.Store.
func (s *Store) Delete(ctx context.Context, ns, name string, epoch uint64) error {
	err := s.check(ctx, ns, name)
	if err == nil {
		err = s.locked(ctx, ns, func() error {
			if err := s.checkEpoch(ns, epoch); err != nil {
				return err
			}
			err := s.fs.Remove(s.object(ns, name))
			if err != nil && !errors.Is(err, fs.ErrNotExist) {
				return err
			}
			s.files.drop(fileKey{ns, name})
			err = s.fs.SyncDir(s.path(ns, "objects"))
			if errors.Is(err, fs.ErrNotExist) {
				return nil // a namespace that was never completed has no objects
			}
			return err
		})
	}
	if errors.Is(err, ErrNoNamespace) {
		return nil
	}
	return opError("delete", ns, name, err)
}

// Size implements driver.Store.
func (s *Store) Size(ctx context.Context, ns, name string) (int64, error) {
	if err := s.check(ctx, ns, name); err != nil {
		return 0, opError("size", ns, name, err)
	}
	info, err := s.fs.Stat(s.object(ns, name))
	if errors.Is(err, fs.ErrNotExist) {
		err = driver.ErrNoObject
	}
	if err != nil {
		return 0, opError("size", ns, name, err)
	}
	return info.Size(), nil
}

// List implements driver.Store.
func (s *Store) List(ctx context.Context, ns, prefix string) ([]string, error) {
	if err := s.check(ctx, ns, "-"); err != nil {
		return nil, opError("list", ns, "", err)
	}
	names, err := s.fs.List(s.path(ns, "objects"))
	if errors.Is(err, fs.ErrNotExist) {
		err = ErrNoNamespace
	}
	if err != nil {
		return nil, opError("list", ns, "", err)
	}
	out := names[:0]
	for _, n := range names {
		if strings.HasPrefix(n, prefix) {
			out = append(out, n)
		}
	}
	return out, nil
}

// ReadAt implements driver.Store. An object that another process deleted may
// still be read through a file that is open here.
func (s *Store) ReadAt(ctx context.Context, ns, name string, p []byte, off int64) error {
	err := s.check(ctx, ns, name)
	if err == nil && off < 0 {
		err = fmt.Errorf("offset %d: must not be negative", off)
	}
	if err == nil {
		err = s.readAt(fileKey{ns, name}, p, off)
	}
	if err != nil {
		return fmt.Errorf("store: read %s/%s, %d bytes at %d: %w", ns, name, len(p), off, err)
	}
	return nil
}

func (s *Store) readAt(key fileKey, p []byte, off int64) error {
	f, err := s.files.acquire(key, func() (vfs.File, error) {
		return s.fs.Open(s.object(key.ns, key.name), vfs.ReadOnly)
	})
	if errors.Is(err, fs.ErrNotExist) {
		return driver.ErrNoObject
	}
	if err != nil {
		return err
	}
	n, err := f.file.ReadAt(p, off)
	s.files.release(f)
	if n == len(p) {
		return nil
	}
	if err == io.EOF {
		return io.ErrUnexpectedEOF
	}
	return err
}
