package cache

import (
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"math"
	"math/bits"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"scoria/alba/vfs"
)

const (
	// batchClusters are written with one call.
	batchClusters = 64
	batchBytes    = batchClusters * ClusterBytes
	// batchCount bounds what waits for the writer.
	batchCount = 4
	// readBuffers bounds the reads of the SSD under way.
	readBuffers = 32
	// failuresAllowed is how many calls may fail in a row.
	failuresAllowed = 16

	// MinSSDBytes is the smallest SSD tier.
	MinSSDBytes = batchBytes * batchCount
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// ssdEntry describes a slot of the file; ssd.mu guards it.
type ssdEntry struct {
	location uint64
	volume   uint32
	crc      uint32
	chain    uint32 // next slot of its bucket, plus 1
	used     bool
}

// batch collects clusters for one write. Whoever fills it has batchMu, and the writer
// looks at keys and dropped with mu held; drop has both.
type batch struct {
	keys    [batchClusters]Key
	dropped [batchClusters]bool // their volume was, meanwhile
	n       int
	data    []byte
}

// ssd is the tier on a file.
type ssd struct {
	file vfs.File
	seed uint64

	// life is held shared by whoever uses the memory or the file, and exclusively
	// to end them.
	life   sync.RWMutex
	closed bool

	batchMu sync.Mutex
	filling *batch // nil: none is free
	idle    chan *batch
	ready   chan *batch // as many as there are batches, so that sending never waits
	done    chan struct{}
	batches [batchCount]*batch
	memory  array[byte] // of batches and buffers

	buffers chan []byte // aligned for direct I/O

	mu      sync.Mutex
	entries array[ssdEntry]
	buckets array[uint32]
	head    uint32 // slot that the next batch begins at
	used    uint64
	failure string

	off      atomic.Bool // failed
	failures atomic.Uint32

	hits, misses, written, dropped, errs, corrupt atomic.Uint64
}

// AttachSSD adds a tier of this many bytes (rounded down to 256 KiB) in a file,
// which is made or cut to that size and whose contents are lost. It reserves the
// room, where the file system can.
func (c *Cache) AttachSSD(fsys vfs.FS, name string, bytes int64) error {
	slots := bytes / batchBytes * batchClusters
	if bytes < MinSSDBytes || slots > math.MaxInt32 {
		return fmt.Errorf("SSD cache %s: size %d: must be %d to %d bytes", name, bytes, MinSSDBytes, int64(math.MaxInt32)*ClusterBytes)
	}
	c.configMu.Lock()
	defer c.configMu.Unlock()
	switch {
	case c.closed:
		return ErrClosed
	case c.ssd.Load() != nil:
		return fmt.Errorf("SSD cache %s: another file is attached already", name)
	}
	f, err := openSSDFile(fsys, name, slots*ClusterBytes)
	if err != nil {
		return fmt.Errorf("SSD cache %s: %w", name, err)
	}
	tier, err := newSSD(f, uint32(slots), c.seed)
	if err != nil {
		return errors.Join(fmt.Errorf("SSD cache %s: %w", name, err), f.Close())
	}
	go tier.write()
	c.ssd.Store(tier)
	return nil
}

func openSSDFile(fsys vfs.FS, name string, bytes int64) (vfs.File, error) {
	f, err := fsys.Open(name, vfs.Create|vfs.Direct)
	if err != nil {
		return nil, err
	}
	if err = f.Truncate(bytes); err == nil {
		if err = f.Allocate(0, bytes); errors.Is(err, errors.ErrUnsupported) {
			err = nil
		}
	}
	if err != nil {
		if errors.Is(err, unix.ENOSPC) {
			err = fmt.Errorf("no room for %d bytes; choose a smaller cache or free space: %w", bytes, err)
			_ = f.Truncate(0) // what was reserved of it
		}
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

func newSSD(f vfs.File, slots uint32, seed uint64) (*ssd, error) {
	t := &ssd{
		file: f, seed: seed,
		idle: make(chan *batch, batchCount), ready: make(chan *batch, batchCount), done: make(chan struct{}),
		buffers: make(chan []byte, readBuffers),
	}
	var err error
	if t.entries, err = newArray[ssdEntry](int(slots)); err == nil {
		if t.buckets, err = newArray[uint32](1 << bits.Len32(slots-1)); err == nil {
			t.memory, err = newArray[byte](batchCount*batchBytes + readBuffers*ClusterBytes)
		}
	}
	if err != nil {
		t.release()
		return nil, err
	}
	mem := t.memory.s
	for i := range t.batches {
		t.batches[i] = &batch{data: mem[:batchBytes]}
		t.idle <- t.batches[i]
		mem = mem[batchBytes:]
	}
	for range readBuffers {
		t.buffers <- mem[:ClusterBytes]
		mem = mem[ClusterBytes:]
	}
	return t, nil
}

func (t *ssd) release() {
	t.entries.free()
	t.buckets.free()
	t.memory.free()
}

// close waits for readers and the writer. The tier is not reachable any more.
func (t *ssd) close() error {
	t.life.Lock()
	defer t.life.Unlock()
	t.closed = true
	close(t.ready)
	<-t.done
	t.mu.Lock()
	defer t.mu.Unlock()
	t.release()
	return t.file.Close()
}

// offer takes a copy of a cluster that leaves RAM, if there is room for it at
// once and it is not on the SSD yet. It never waits for the disk.
func (t *ssd) offer(k Key, data []byte) {
	if t.off.Load() {
		return
	}
	if !t.life.TryRLock() {
		return // being closed
	}
	defer t.life.RUnlock()
	if t.closed || t.holds(k) {
		return
	}
	// Whoever is copying a cluster in right now has one as good.
	if !t.batchMu.TryLock() {
		t.dropped.Add(1)
		return
	}
	defer t.batchMu.Unlock()
	if t.filling == nil {
		select {
		case t.filling = <-t.idle:
		default:
			t.dropped.Add(1)
			return
		}
	}
	b := t.filling
	b.keys[b.n], b.dropped[b.n] = k, false
	copy(b.data[b.n*ClusterBytes:], data)
	if b.n++; b.n == batchClusters {
		t.ready <- b
		t.filling = nil
	}
}

// write is the goroutine "ssd writer".
func (t *ssd) write() {
	defer close(t.done)
	for b := range t.ready {
		if !t.off.Load() {
			t.writeBatch(b)
		}
		b.n = 0
		t.idle <- b
	}
}

// writeBatch overwrites the oldest slots. They leave the index before their
// bytes change and the new ones enter it after, so whoever finds its key in the
// index before and after reading has read that key's bytes.
func (t *ssd) writeBatch(b *batch) {
	t.mu.Lock()
	first := t.head
	for i := first; i < first+batchClusters; i++ {
		t.forget(i)
	}
	t.head = (first + batchClusters) % uint32(len(t.entries.s))
	t.mu.Unlock()

	if _, err := t.file.WriteAt(b.data, int64(first)*ClusterBytes); err != nil {
		t.failed("write", err)
		return
	}
	t.failures.Store(0)
	t.written.Add(batchClusters)

	var crcs [batchClusters]uint32
	for i := range crcs {
		crcs[i] = crc32.Checksum(b.data[i*ClusterBytes:(i+1)*ClusterBytes], castagnoli)
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	for i, k := range b.keys {
		hash := hashKey(k, t.seed)
		if b.dropped[i] || t.find(k, hash) != none {
			continue // forgotten, or twice in one batch or in two that waited
		}
		slot := first + uint32(i)
		bucket := t.bucket(hash)
		t.entries.s[slot] = ssdEntry{location: k.Location, volume: k.Volume, crc: crcs[i], chain: *bucket, used: true}
		*bucket = slot + 1
		t.used++
	}
}

func (t *ssd) bucket(hash uint64) *uint32 {
	return &t.buckets.s[hash&uint64(len(t.buckets.s)-1)]
}

// find returns the slot of a key, or none. Under t.mu.
func (t *ssd) find(k Key, hash uint64) uint32 {
	for i := *t.bucket(hash) - 1; i != none; {
		e := &t.entries.s[i]
		if e.location == k.Location && e.volume == k.Volume {
			return i
		}
		i = e.chain - 1
	}
	return none
}

// forget takes a slot out of the index if it is there. Under t.mu.
func (t *ssd) forget(slot uint32) {
	e := &t.entries.s[slot]
	if !e.used {
		return
	}
	for p := t.bucket(hashKey(Key{e.volume, e.location}, t.seed)); ; p = &t.entries.s[*p-1].chain {
		if *p == slot+1 {
			*p = e.chain
			break
		}
	}
	e.used = false
	t.used--
}

func (t *ssd) holds(k Key) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.find(k, hashKey(k, t.seed)) != none
}

// read copies a cluster from the SSD to dst, blocking on the disk.
func (t *ssd) read(k Key, dst []byte) bool {
	t.life.RLock()
	defer t.life.RUnlock()
	if t.closed || t.off.Load() {
		return false
	}
	hash := hashKey(k, t.seed)
	slot, crc := t.lookup(k, hash)
	if slot == none {
		t.misses.Add(1)
		return false
	}
	buf := <-t.buffers
	defer func() { t.buffers <- buf }()
	n, err := t.file.ReadAt(buf, int64(slot)*ClusterBytes)
	if n < ClusterBytes {
		if err == nil || err == io.EOF {
			err = io.ErrUnexpectedEOF
		}
		t.failed("read", err)
		t.misses.Add(1)
		return false
	}
	ok := crc32.Checksum(buf, castagnoli) == crc
	t.mu.Lock()
	current := t.find(k, hash) == slot && t.entries.s[slot].crc == crc
	if current && !ok {
		t.forget(slot)
	}
	t.mu.Unlock()
	switch {
	case current && ok:
		t.failures.Store(0)
		copy(dst, buf)
		t.hits.Add(1)
		return true
	case current:
		t.corrupt.Add(1)
	}
	t.misses.Add(1)
	return false
}

func (t *ssd) lookup(k Key, hash uint64) (slot, crc uint32) {
	t.mu.Lock()
	defer t.mu.Unlock()
	slot = t.find(k, hash)
	if slot != none {
		crc = t.entries.s[slot].crc
	}
	return slot, crc
}

// failed counts an I/O error and switches the tier off when they don't end.
func (t *ssd) failed(op string, err error) {
	t.errs.Add(1)
	if t.failures.Add(1) != failuresAllowed {
		return
	}
	t.mu.Lock()
	t.failure = fmt.Sprintf("%d calls in a row failed, the last one: %s: %v", failuresAllowed, op, err)
	t.mu.Unlock()
	t.off.Store(true)
}

// drop forgets a volume's clusters, also those on their way to the SSD.
func (t *ssd) drop(tag uint32) {
	t.life.RLock()
	defer t.life.RUnlock()
	t.dropWaiting(tag)
	for from := 0; from < len(t.entries.s); from += dropSteps {
		t.mu.Lock()
		for i := from; i < min(from+dropSteps, len(t.entries.s)); i++ {
			if e := &t.entries.s[i]; e.used && e.volume == tag {
				t.forget(uint32(i))
			}
		}
		t.mu.Unlock()
	}
}

func (t *ssd) dropWaiting(tag uint32) {
	t.batchMu.Lock()
	defer t.batchMu.Unlock()
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, b := range t.batches {
		for i, k := range b.keys {
			if k.Volume == tag {
				b.dropped[i] = true
			}
		}
	}
}

func (t *ssd) stats() SSDStats {
	t.mu.Lock()
	defer t.mu.Unlock()
	return SSDStats{
		Hits: t.hits.Load(), Misses: t.misses.Load(), Written: t.written.Load(), Dropped: t.dropped.Load(),
		Errors: t.errs.Load(), Corrupt: t.corrupt.Load(), Entries: t.used,
		Bytes: int64(len(t.entries.s)) * ClusterBytes, Failed: t.failure,
	}
}
