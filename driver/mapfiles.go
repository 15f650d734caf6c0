package driver

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"sync"

	"scoria/alba/vfs"
	"scoria/driver/block"
	"scoria/driver/lba"
	"scoria/driver/sco"
)

const (
	rootPrefix  = "root-"
	snapPrefix  = "snap-"
	pagesPrefix = "pages-"
	scoPrefix   = "sco-"
)

func snapName(seq uint64) string     { return fmt.Sprintf("%s%016x", snapPrefix, seq) }
func rootName(seq uint64) string     { return fmt.Sprintf("%s%016x", rootPrefix, seq) }
func pagesName(object uint32) string { return fmt.Sprintf("%s%08x", pagesPrefix, object) }

// parsePages returns the number of the page object of that name.
func parsePages(name string) (object uint32, ok bool) {
	_, err := fmt.Sscanf(name, pagesPrefix+"%08x", &object)
	return object, err == nil && name == pagesName(object)
}

func (v *Volume) mapDir() string          { return v.dir + "/map" }
func (v *Volume) mapPath(n string) string { return v.mapDir() + "/" + n }

// localFile reads a file that is opened for each access: map pages are read
// once and then stay in RAM.
type localFile struct {
	fs   vfs.FS
	name string
}

func (l localFile) ReadAt(p []byte, off int64) (int, error) {
	f, err := l.fs.Open(l.name, vfs.ReadOnly)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	return f.ReadAt(p, off)
}

// storeObject reads an object through the store.
type storeObject struct {
	ctx context.Context
	v   *Volume
	n   string
}

func (s storeObject) ReadAt(p []byte, off int64) (int, error) {
	s.v.stats.storeRead.Add(uint64(len(p)))
	if err := s.v.readObject(s.ctx, s.n, p, off); err != nil {
		return 0, err
	}
	return len(p), nil
}

// WithContext implements lba.ContextReader.
func (s storeObject) WithContext(ctx context.Context) io.ReaderAt {
	s.ctx = ctx
	return s
}

// mapFile is a root or page object on the local disk that goes when the store has it,
// which may be between any two reads: then it is read there.
type mapFile struct {
	localFile
	stored storeObject
}

func (m mapFile) ReadAt(p []byte, off int64) (int, error) {
	n, err := m.localFile.ReadAt(p, off)
	if !errors.Is(err, fs.ErrNotExist) {
		return n, err
	}
	n, serr := m.stored.ReadAt(p, off)
	if errors.Is(serr, ErrNoObject) || errors.Is(serr, ErrStaleEpoch) {
		return n, err // there was the local one only
	}
	return n, serr
}

// WithContext implements lba.ContextReader.
func (m mapFile) WithContext(ctx context.Context) io.ReaderAt {
	m.stored.ctx = ctx
	return m
}

// storeSize is the size of an object in the store.
func (v *Volume) storeSize(ctx context.Context, name string) (size int64, err error) {
	err = askStore(ctx, func(ctx context.Context) (err error) {
		size, err = v.cfg.Store.Size(ctx, v.namespace(), name)
		return err
	})
	return size, err
}

func (c *checkpoints) openStoredPages(ctx context.Context, object uint32) (io.ReaderAt, int64, error) {
	size, err := c.v.storeSize(ctx, pagesName(object))
	if err != nil {
		return nil, 0, err
	}
	return storeObject{ctx, c.v, pagesName(object)}, size, nil
}

func (c *checkpoints) openPages(ctx context.Context, object uint32) (io.ReaderAt, int64, error) {
	return c.v.openMapObject(ctx, pagesName(object))
}

// openMapObject finds a root or page object, on the local disk if it is there.
func (v *Volume) openMapObject(ctx context.Context, name string) (io.ReaderAt, int64, error) {
	info, err := v.eng.cfg.FS.Stat(v.mapPath(name))
	if err == nil {
		return mapFile{localFile{v.eng.cfg.FS, v.mapPath(name)}, storeObject{ctx, v, name}}, info.Size(), nil
	}
	if !errors.Is(err, fs.ErrNotExist) {
		return nil, 0, err
	}
	size, err := v.storeSize(ctx, name)
	if err != nil {
		return nil, 0, fmt.Errorf("%s: %w", name, err)
	}
	return storeObject{ctx, v, name}, size, nil
}

// stageMapFile makes the contents of a map file durable under a temporary name,
// which nameMapFile changes. It leaves nothing behind if it fails. Page objects, which
// are whole blocks, are written directly: nobody reads them soon, and the page cache that
// they would fill costs as much CPU time as all the rest of a checkpoint.
func (v *Volume) stageMapFile(name string, r io.ReaderAt, size int64) error {
	fsys := v.eng.cfg.FS
	tmp := v.mapPath(name) + ".tmp"
	flags := vfs.Create
	if size%block.ClusterSize == 0 {
		flags |= vfs.Direct
	}
	f, err := fsys.Open(tmp, flags)
	if err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	err = f.Truncate(0)
	scratch := mapBuffers.Get().(*[]byte)
	defer mapBuffers.Put(scratch)
	buf := *scratch
	for off := int64(0); off < size && err == nil; {
		p := buf[:min(int64(len(buf)), size-off)]
		if _, err = r.ReadAt(p, off); err == nil || errors.Is(err, io.EOF) {
			_, err = f.WriteAt(p, off)
		}
		off += int64(len(p))
	}
	if err == nil {
		err = f.Sync()
	}
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err != nil {
		v.removeStaged(name)
		return fmt.Errorf("%s: %w", name, err)
	}
	return nil
}

var mapBuffers = sync.Pool{New: func() any {
	b := aligned(make([]byte, 1<<20))
	return &b
}}

// pageObjectSums returns the checksums of an object's blocks (Object.Sums). A header that
// is damaged does not keep it from the store, where the root that needs it waits for it.
func (v *Volume) pageObjectSums(r io.ReaderAt, size int64, object uint32) ([]uint32, error) {
	o, err := lba.OpenPageObject(r, size, v.cfg.ID, object)
	if err == nil {
		var sums []uint32
		if sums, err = o.Sums(r); err == nil {
			return sums, nil
		}
	}
	if !errors.Is(err, lba.ErrFormat) {
		return nil, err
	}
	return sco.PageSums(r, size)
}

func (v *Volume) removeStaged(name string) {
	if err := v.eng.cfg.FS.Remove(v.mapPath(name) + ".tmp"); err != nil && !errors.Is(err, fs.ErrNotExist) {
		v.log.Warn().Err(err).Str("file", name).Msg("temporary checkpoint file can't be removed")
	}
}

// nameMapFile gives a staged file its name, durably. After an error the file may
// be under either name.
func (v *Volume) nameMapFile(name string) error {
	err := v.eng.cfg.FS.Rename(v.mapPath(name)+".tmp", v.mapPath(name))
	if err != nil {
		v.removeStaged(name)
	} else {
		err = v.eng.cfg.FS.SyncDir(v.mapDir())
	}
	if err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	return nil
}

func (c *checkpoints) removeMapFile(name string) {
	if err := c.v.eng.cfg.FS.Remove(c.v.mapPath(name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		c.v.log.Warn().Err(err).Str("file", name).Msg("old checkpoint file can't be removed")
	}
}
