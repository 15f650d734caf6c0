package driver

import (
	"container/list"
	"fmt"
	"sync"
	"sync/atomic"

	"scoria/alba/vfs"
	"scoria/driver/sco"
)

// maxOpenFiles bounds the descriptors that sealed SCOs keep open, all volumes
// together.
const maxOpenFiles = 512

// scoMeta is what is known about a sealed SCO. All but the constants belong to
// Volume.metaMu.
type scoMeta struct {
	number   uint64
	clusters uint32
	records  uint32
	crcOff   int64
	size     int64
	local    bool // a local copy exists
	uploaded bool // it is in the store
	unwanted bool // the root that is published next does not need it: no upload
	doomed   bool // a root without it is in the store: it has only to be deleted
	dropping bool // its deletion has begun
	lastRead int64
}

func dataOff(cluster uint32) int64 { return sco.DataOff(cluster) }

func scoObject(n uint64) string           { return fmt.Sprintf("sco-%016x", n) }
func (v *Volume) scoDir() string          { return v.dir + "/sco" }
func (v *Volume) scoPath(n uint64) string { return fmt.Sprintf("%s/%016x.sco", v.scoDir(), n) }
func (v *Volume) namespace() string       { return v.cfg.ID.String() }

type fileKey struct {
	tag uint32
	sco uint64
}

type openFile struct {
	key  fileKey
	f    vfs.File
	refs int
	gone bool
}

// fileCache keeps the files of sealed SCOs open, the least recently used ones
// are closed.
type fileCache struct {
	mu  sync.Mutex
	lru *list.List // of *openFile, newest first
	m   map[fileKey]*list.Element
}

func newFileCache() *fileCache {
	return &fileCache{lru: list.New(), m: map[fileKey]*list.Element{}}
}

// put hands f over to the cache.
func (c *fileCache) put(key fileKey, f vfs.File) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if _, ok := c.m[key]; ok {
		f.Close()
		return
	}
	c.m[key] = c.lru.PushFront(&openFile{key: key, f: f})
	for c.lru.Len() > maxOpenFiles {
		c.drop(c.lru.Back())
	}
}

// get returns an open file, which open makes if need be, until release.
func (c *fileCache) get(key fileKey, open func() (vfs.File, error)) (f vfs.File, release func(), err error) {
	c.mu.Lock()
	_, ok := c.m[key]
	c.mu.Unlock()
	if !ok {
		f, err := open()
		if err != nil {
			return nil, nil, err
		}
		c.put(key, f)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	e, ok := c.m[key]
	if !ok {
		return nil, nil, fmt.Errorf("SCO %d: file was closed meanwhile", key.sco)
	}
	c.lru.MoveToFront(e)
	o := e.Value.(*openFile)
	o.refs++
	return o.f, func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		if o.refs--; o.refs == 0 && o.gone {
			o.f.Close()
		}
	}, nil
}

// drop takes an element out; the file is closed when nobody uses it. Caller
// holds mu.
func (c *fileCache) drop(e *list.Element) {
	o := e.Value.(*openFile)
	c.lru.Remove(e)
	delete(c.m, o.key)
	o.gone = true
	if o.refs == 0 {
		o.f.Close()
	}
}

// forget closes a file, or all of a volume's if sco is 0.
func (c *fileCache) forget(tag uint32, sco uint64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if sco != 0 {
		if e, ok := c.m[fileKey{tag, sco}]; ok {
			c.drop(e)
		}
		return
	}
	for key, e := range c.m {
		if key.tag == tag {
			c.drop(e)
		}
	}
}

// crcCachePages bounds the pages of CRC tables in RAM: 64 MiB.
const crcCachePages = 16384

const crcsPerPage = sco.Page / 4

type crcKey struct {
	tag  uint32
	page uint32
	sco  uint64
}

// crcCache keeps pages of CRC tables, so that verifying a partial read rarely
// costs a second access. Two generations: when the young one is full it becomes
// the old one.
type crcCache struct {
	mu         sync.Mutex
	young, old map[crcKey]*[crcsPerPage]uint32
}

func (c *crcCache) get(k crcKey) *[crcsPerPage]uint32 {
	c.mu.Lock()
	defer c.mu.Unlock()
	if p := c.young[k]; p != nil {
		return p
	}
	p := c.old[k]
	if p != nil {
		c.insert(k, p)
	}
	return p
}

func (c *crcCache) put(k crcKey, p *[crcsPerPage]uint32) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.insert(k, p)
}

func (c *crcCache) insert(k crcKey, p *[crcsPerPage]uint32) {
	if c.young == nil || len(c.young) >= crcCachePages/2 {
		c.old, c.young = c.young, map[crcKey]*[crcsPerPage]uint32{}
	}
	c.young[k] = p
}

// seqReader notices sequential streams among the reads that reach the disk.
type seqReader struct {
	next [4]atomic.Uint64
	turn atomic.Uint32
}

// saw records a read and reports whether it continues an earlier one.
func (s *seqReader) saw(off, length uint64) bool {
	for i := range s.next {
		if n := s.next[i].Load(); n == off && off != 0 {
			s.next[i].Store(off + length)
			return true
		}
	}
	s.next[s.turn.Add(1)%uint32(len(s.next))].Store(off + length)
	return false
}

// maxRunClusters is how many clusters one access to disk or store reads.
const maxRunClusters = 32
