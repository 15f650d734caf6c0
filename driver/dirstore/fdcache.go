package dirstore

import (
	"container/list"
	"errors"
	"sync"

	"scoria/alba/vfs"
)

type fileKey struct{ ns, name string }

// fdCache keeps recently read objects open, a bounded number of them. Objects
// never change, so an open file is as good as its name until that is deleted.
type fdCache struct {
	mu     sync.Mutex
	max    int
	files  map[fileKey]*openFile
	recent list.List // of *openFile, most recently used first; those in files
	// drops counts deletions: a file opened before one may be of the deleted
	// object, so it is not kept.
	drops  uint64
	closed bool
}

// openFile is an object open for reading; the cache's mutex guards all but file.
type openFile struct {
	key   fileKey
	file  vfs.File
	users int
	elem  *list.Element // nil once out of the cache: the last user closes it
}

func newFDCache(files int) *fdCache {
	return &fdCache{max: files, files: make(map[fileKey]*openFile)}
}

// acquire returns the open file of key, calling open outside the lock if need
// be. The caller releases it.
func (c *fdCache) acquire(key fileKey, open func() (vfs.File, error)) (*openFile, error) {
	c.mu.Lock()
	if f := c.use(key); f != nil {
		c.mu.Unlock()
		return f, nil
	}
	drops := c.drops
	c.mu.Unlock()

	file, err := open()
	if err != nil {
		return nil, err
	}
	c.mu.Lock()
	if f := c.use(key); f != nil { // another goroutine was faster
		c.mu.Unlock()
		_ = file.Close()
		return f, nil
	}
	f := &openFile{key: key, file: file, users: 1}
	var unused []*openFile
	if c.drops == drops && !c.closed {
		c.files[key] = f
		f.elem = c.recent.PushFront(f)
		unused = c.trim()
	}
	c.mu.Unlock()
	for _, u := range unused {
		_ = u.file.Close() // was only read
	}
	return f, nil
}

// use returns a cached file, with one more user. Under c.mu.
func (c *fdCache) use(key fileKey) *openFile {
	f := c.files[key]
	if f != nil {
		f.users++
		c.recent.MoveToFront(f.elem)
	}
	return f
}

// trim takes the least recently used files out until the bound holds and returns
// those that nobody uses. Under c.mu.
func (c *fdCache) trim() (unused []*openFile) {
	for c.recent.Len() > c.max {
		if f := c.recent.Back().Value.(*openFile); c.takeOut(f) {
			unused = append(unused, f)
		}
	}
	return unused
}

// takeOut removes a file from the cache and reports whether the caller has to
// close it. Under c.mu.
func (c *fdCache) takeOut(f *openFile) bool {
	delete(c.files, f.key)
	c.recent.Remove(f.elem)
	f.elem = nil
	return f.users == 0
}

// release ends one use.
func (c *fdCache) release(f *openFile) {
	c.mu.Lock()
	f.users--
	last := f.users == 0 && f.elem == nil
	c.mu.Unlock()
	if last {
		_ = f.file.Close()
	}
}

// drop forgets a deleted object.
func (c *fdCache) drop(key fileKey) {
	c.mu.Lock()
	c.drops++
	f := c.files[key]
	unused := f != nil && c.takeOut(f)
	c.mu.Unlock()
	if unused {
		_ = f.file.Close()
	}
}

// dropNamespace forgets all objects of a deleted namespace.
func (c *fdCache) dropNamespace(ns string) {
	_ = c.dropWhere(func(key fileKey) bool { return key.ns == ns })
}

// close closes all files; later ones are closed by their users.
func (c *fdCache) close() error {
	c.mu.Lock()
	c.closed = true
	c.mu.Unlock()
	return c.dropWhere(func(fileKey) bool { return true })
}

func (c *fdCache) dropWhere(match func(fileKey) bool) error {
	var unused []*openFile
	c.mu.Lock()
	c.drops++
	for key, f := range c.files {
		if match(key) && c.takeOut(f) {
			unused = append(unused, f)
		}
	}
	c.mu.Unlock()
	var err error
	for _, f := range unused {
		err = errors.Join(err, f.file.Close())
	}
	return err
}
