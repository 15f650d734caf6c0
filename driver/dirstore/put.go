package dirstore

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"sync"

	"scoria/alba/vfs"
	"scoria/driver"
)

// copyBytes is the unit of copying: between two units a canceled context is
// noticed and the disk is asked to begin writing.
const copyBytes = 1 << 20

var copyBuffers = sync.Pool{New: func() any {
	b := make([]byte, copyBytes)
	return &b
}}

// Put implements driver.Store. See the package doc for the order of its steps.
func (s *Store) Put(ctx context.Context, ns, name string, epoch uint64, obj driver.Object) error {
	err := s.check(ctx, ns, name)
	if err == nil && (obj.Size < 0 || obj.Data == nil) {
		err = fmt.Errorf("object of %d bytes without data or with a negative size", obj.Size)
	}
	if err == nil {
		err = s.put(ctx, ns, name, epoch, obj)
	}
	return opError("put", ns, name, err)
}

func (s *Store) put(ctx context.Context, ns, name string, epoch uint64, obj driver.Object) error {
	// Checked again under the lock; here it saves the copy.
	if err := s.checkEpoch(ns, epoch); err != nil {
		return err
	}
	_, err := s.fs.Stat(s.object(ns, name))
	if err == nil {
		return s.confirm(ctx, ns, name, obj)
	}
	if !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	temp := s.tempName()
	if err := s.prepare(ctx, temp, obj); err != nil {
		_ = s.fs.Remove(temp)
		return err
	}
	exists := false
	err = s.locked(ctx, ns, func() error {
		if err := s.checkEpoch(ns, epoch); err != nil {
			return err
		}
		_, err := s.fs.Stat(s.object(ns, name))
		if err == nil {
			exists = true
			return nil
		}
		if !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		if err := s.fs.Rename(temp, s.object(ns, name)); err != nil {
			if errors.Is(err, fs.ErrNotExist) {
				return fmt.Errorf("%w, or this instance's temporary files were removed: %w", ErrNoNamespace, err)
			}
			return err
		}
		return s.fs.SyncDir(s.path(ns, "objects"))
	})
	if exists || err != nil {
		_ = s.fs.Remove(temp)
	}
	if exists && err == nil {
		err = s.confirm(ctx, ns, name, obj)
	}
	return err
}

// prepare makes the temporary file with the object's contents, synced.
func (s *Store) prepare(ctx context.Context, temp string, obj driver.Object) error {
	if obj.LocalPath != "" && !s.noLink.Load() && s.fs.Link(obj.LocalPath, temp) == nil {
		linked, err := s.syncLinked(temp, obj.Size)
		if linked || err != nil {
			return err
		}
		if err := s.fs.Remove(temp); err != nil {
			return err
		}
	}
	return s.copyTo(ctx, temp, obj)
}

// syncLinked makes a linked file's contents durable. It reports false for a file
// of another size, which can't be what the object says.
func (s *Store) syncLinked(temp string, size int64) (bool, error) {
	f, err := s.fs.Open(temp, 0)
	if err != nil {
		return false, err
	}
	actual, err := f.Size()
	if err == nil && actual == size {
		if err = f.Sync(); err != nil {
			s.noLink.Store(true)
		}
	}
	return actual == size, errors.Join(err, f.Close())
}

func (s *Store) copyTo(ctx context.Context, temp string, obj driver.Object) error {
	f, err := s.fs.Open(temp, vfs.Create|vfs.Exclusive)
	if err != nil {
		return err
	}
	buf := copyBuffers.Get().(*[]byte)
	defer copyBuffers.Put(buf)
	err = func() error {
		for off := int64(0); off < obj.Size; {
			p, err := readChunk(ctx, *buf, obj, off)
			if err != nil {
				return err
			}
			if _, err := f.WriteAt(p, off); err != nil {
				return err
			}
			if err := f.StartWriteback(off, int64(len(p))); err != nil {
				return err
			}
			off += int64(len(p))
		}
		if err := f.Sync(); err != nil {
			return err
		}
		return f.DropCache(0, obj.Size)
	}()
	return errors.Join(err, f.Close())
}

// readChunk reads the object's next bytes from off, at most len(buf).
func readChunk(ctx context.Context, buf []byte, obj driver.Object, off int64) ([]byte, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	p := buf[:min(int64(len(buf)), obj.Size-off)]
	n, err := obj.Data.ReadAt(p, off)
	if n == len(p) {
		return p, nil
	}
	if err == nil || err == io.EOF {
		err = io.ErrUnexpectedEOF
	}
	return nil, fmt.Errorf("read the data of %d bytes at %d: %w", obj.Size, off+int64(n), err)
}

// confirm is a Put of an object that exists: it succeeds if the contents are the
// same and then are durable.
func (s *Store) confirm(ctx context.Context, ns, name string, obj driver.Object) error {
	f, err := s.fs.Open(s.object(ns, name), vfs.ReadOnly)
	if err != nil {
		return err
	}
	defer f.Close()
	size, err := f.Size()
	if err != nil {
		return err
	}
	if size != obj.Size {
		return fmt.Errorf("%d bytes are stored, %d put: %w", size, obj.Size, driver.ErrExists)
	}
	put, stored := copyBuffers.Get().(*[]byte), copyBuffers.Get().(*[]byte)
	defer copyBuffers.Put(put)
	defer copyBuffers.Put(stored)
	for off := int64(0); off < size; off += copyBytes {
		p, err := readChunk(ctx, *put, obj, off)
		if err != nil {
			return err
		}
		q := (*stored)[:len(p)]
		if _, err := f.ReadAt(q, off); err != nil && err != io.EOF {
			return err
		}
		if !bytes.Equal(p, q) {
			return fmt.Errorf("contents differ in the %d bytes at %d: %w", len(p), off, driver.ErrExists)
		}
	}
	// Who put it may have died between renaming it and syncing the directory.
	return s.fs.SyncDir(s.path(ns, "objects"))
}
