package driver

import (
	"container/list"
	"fmt"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"

	"scoria/alba/vfs"
	"scoria/driver/lba"
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
	lost     bool // the store is said to have lost it: the local copy stays
	lastRead int64

	compact *compacted // nil unless it is compacted
}

// compacted is what a SCO of a later generation has besides. The table of kept
// clusters comes when somebody reads.
type compacted struct {
	generation uint32
	span       uint32 // clusters of generation 0
	keptCRC    uint32
	kept       atomic.Pointer[sco.Kept]
}

// generation is 0 unless the SCO was compacted.
func (m *scoMeta) generation() uint32 {
	if m.compact == nil {
		return 0
	}
	return m.compact.generation
}

// metaOf describes a sealed SCO by its trailer.
func metaOf(t *sco.Trailer) *scoMeta {
	m := &scoMeta{number: t.Number, clusters: t.Clusters, records: t.Records, crcOff: t.CRCOff, size: t.Size()}
	if t.Generation > 0 {
		m.compact = &compacted{generation: t.Generation, span: t.Span, keptCRC: t.KeptCRC}
	}
	return m
}

func dataOff(cluster uint32) int64 { return sco.DataOff(cluster) }

func (v *Volume) scoDir() string    { return v.dir + "/sco" }
func (v *Volume) namespace() string { return v.cfg.ID.String() }

// scoObject is the name in the store: of generation 0 the number, of others that,
// a dot and the generation.
func scoObject(n uint64, generation uint32) string {
	if generation > 0 {
		return fmt.Sprintf("%s%016x.%08x", scoPrefix, n, generation)
	}
	return fmt.Sprintf("%s%016x", scoPrefix, n)
}

// scoPath is the local file, likewise.
func (v *Volume) scoPath(n uint64, generation uint32) string {
	if generation > 0 {
		return fmt.Sprintf("%s/%016x.%08x%s", v.scoDir(), n, generation, scoSuffix)
	}
	return fmt.Sprintf("%s/%016x%s", v.scoDir(), n, scoSuffix)
}

func (v *Volume) objectOf(m *scoMeta) string { return scoObject(m.number, m.generation()) }
func (v *Volume) pathOf(m *scoMeta) string   { return v.scoPath(m.number, m.generation()) }
func (v *Volume) fileKey(m *scoMeta) fileKey { return fileKey{v.tag, m.generation(), m.number} }

// parseSCO reads what scoObject and scoPath make of a number and a generation.
func parseSCO(name string) (n uint64, generation uint32, ok bool) {
	number, gen, later := strings.Cut(name, ".")
	n, err := strconv.ParseUint(number, 16, 64)
	var g uint64
	if err == nil && later {
		g, err = strconv.ParseUint(gen, 16, 32)
	}
	return n, uint32(g), err == nil && n > 0 && n <= lba.MaxSCO && scoPrefix+name == scoObject(n, uint32(g))
}

const scoSuffix = ".sco"

type fileKey struct {
	tag        uint32
	generation uint32
	sco        uint64
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

// forget closes a file.
func (c *fileCache) forget(key fileKey) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if e, ok := c.m[key]; ok {
		c.drop(e)
	}
}

// forgetAll closes all files of a volume.
func (c *fileCache) forgetAll(tag uint32) {
	c.mu.Lock()
	defer c.mu.Unlock()
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
	tag        uint32
	page       uint32
	sco        uint64
	generation uint32
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
