package disk

import (
	"container/list"
	"errors"
	"fmt"
	"io"
	"path"
	"sync"

	"scoria/alba/asd"
	"scoria/alba/vfs"
)

// errRetry: the file is gone; the key may have a newer value.
var errRetry = errors.New("value file is gone")

// handle is an open value file with its checksums, verified against its record.
type handle struct {
	id    uint64
	file  vfs.File
	head  fileHeader
	err   error
	ready chan struct{} // closed when file, head and err are set
	refs  int           // users, and one for the cache; guarded by handles.mu
	elem  *list.Element // nil: no longer in the cache
}

// handles caches open value files, the least recently used go first. Ids are
// never reused, so a handle never turns stale: that of a removed file only
// stays until it is pushed out or dropped.
type handles struct {
	d   *Disk
	max int

	mu   sync.Mutex
	byID map[uint64]*handle
	lru  *list.List // of *handle, the most recent in front
}

func newHandles(d *Disk, limit int) *handles {
	return &handles{d: d, max: limit, byID: make(map[uint64]*handle), lru: list.New()}
}

// get returns the open file of a record, of which want bytes at off of the value will
// be read next; put gives it back. errRetry if there is no such file; a
// *asd.CorruptError if its head is damaged.
func (c *handles) get(key string, rec *record, off, want int64) (*handle, error) {
	c.mu.Lock()
	h := c.byID[rec.fileID]
	if h != nil {
		h.refs++
		c.lru.MoveToFront(h.elem)
		c.mu.Unlock()
		<-h.ready
	} else {
		h = &handle{id: rec.fileID, refs: 2, ready: make(chan struct{})}
		h.elem = c.lru.PushFront(h)
		c.byID[h.id] = h
		evicted := c.evict()
		c.mu.Unlock()
		closeAll(evicted)
		h.file, h.head, h.err = c.d.openValueFile(key, rec, off, want)
		close(h.ready)
	}
	if h.err != nil {
		err := h.err
		c.drop(h.id) // the next one tries again
		c.put(h)
		return nil, err
	}
	return h, nil
}

func (c *handles) put(h *handle) {
	c.mu.Lock()
	h.refs--
	last := h.refs == 0
	c.mu.Unlock()
	if last {
		closeAll([]*handle{h})
	}
}

// drop forgets a file; those who use it may go on.
func (c *handles) drop(id uint64) {
	c.mu.Lock()
	h := c.byID[id]
	var last bool
	if h != nil {
		last = c.forget(h)
	}
	c.mu.Unlock()
	if last {
		closeAll([]*handle{h})
	}
}

func (c *handles) forget(h *handle) (last bool) {
	delete(c.byID, h.id)
	c.lru.Remove(h.elem)
	h.elem = nil
	h.refs--
	return h.refs == 0
}

func (c *handles) evict() (closing []*handle) {
	for c.lru.Len() > c.max {
		if h := c.lru.Back().Value.(*handle); c.forget(h) {
			closing = append(closing, h)
		}
	}
	return closing
}

func (c *handles) close() {
	c.mu.Lock()
	c.max = 0
	closing := c.evict()
	c.mu.Unlock()
	closeAll(closing)
}

func closeAll(hs []*handle) {
	for _, h := range hs {
		if h.file != nil {
			_ = h.file.Close() // read-only: nothing can be lost
		}
	}
}

func (d *Disk) valueDir(id uint64) string {
	return path.Join(d.dir, "values", fmt.Sprintf("%012x", id/idsPerDir))
}

func (d *Disk) valueName(id uint64) string {
	return path.Join(d.valueDir(id), fmt.Sprintf("%016x", id))
}

// maxPrefetch bounds what is asked for ahead of a value file's head, bytes.
const maxPrefetch = 256 << 10

// openValueFile opens the file of a record and reads its head, which must be
// the one that the record means. The disk reads want bytes at off of the value at the
// same time, so that the first read of a file waits for it once, not twice; if they
// lie elsewhere after all, that was in vain.
func (d *Disk) openValueFile(key string, rec *record, off, want int64) (vfs.File, fileHeader, error) {
	f, err := d.fs.Open(d.valueName(rec.fileID), vfs.ReadOnly)
	if isNotExist(err) {
		return nil, fileHeader{}, errRetry
	}
	if err != nil {
		return nil, fileHeader{}, fmt.Errorf("key %q: %w", key, err)
	}
	if want > 0 && !rec.adopted {
		at := int64(fileHeadBytes(key, asd.Blocks(rec.size, rec.blockSize))) + off
		_ = f.Prefetch(at, min(want, maxPrefetch)) // a hint: the read shows what is wrong
	}
	h, err := d.fileHead(f, key, rec)
	if err != nil {
		_ = f.Close()
		return nil, fileHeader{}, err
	}
	return f, h, nil
}

// fileHead returns what describes the data of a value file.
func (d *Disk) fileHead(f vfs.File, key string, rec *record) (fileHeader, error) {
	if !rec.adopted {
		return d.readFileHead(f, key, rec)
	}
	h := fileHeader{key: key, id: rec.fileID, size: rec.size, blockSize: rec.blockSize, sum: rec.sum, dataOff: rec.fileOff, crcs: decodeCRCs(rec.crcs)}
	if asd.SumOf(h.size, h.blockSize, h.crcs) != rec.sum {
		return fileHeader{}, d.corrupt(key, 0, 0, "its checksums are not the ones that were put")
	}
	return h, nil
}

func (d *Disk) readFileHead(f vfs.File, key string, rec *record) (fileHeader, error) {
	b := make([]byte, fileHeadBytes(key, asd.Blocks(rec.size, rec.blockSize)))
	n, err := f.ReadAt(b, 0)
	d.n.diskReadBytes.Add(uint64(n))
	if err != nil && err != io.EOF {
		return fileHeader{}, fmt.Errorf("key %q: read the head of its file: %w", key, err)
	}
	h, err := decodeFileHead(b[:n])
	if err != nil {
		return fileHeader{}, d.corrupt(key, 0, 0, err.Error())
	}
	if h.key != key || h.id != rec.fileID || h.size != rec.size || h.blockSize != rec.blockSize || asd.SumOf(h.size, h.blockSize, h.crcs) != rec.sum {
		return fileHeader{}, d.corrupt(key, 0, 0, "its file's head is that of another value")
	}
	return h, nil
}

// corrupt counts and makes a CorruptError.
func (d *Disk) corrupt(key string, off, size int64, reason string) error {
	d.n.corruptBlocks.Add(1)
	d.log.Error().Str("key", key).Int64("offset", off).Int64("size", size).Str("reason", reason).Msg("corrupt value")
	return &asd.CorruptError{Key: key, Off: off, Size: size, Reason: reason}
}
