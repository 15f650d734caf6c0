package driver

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"sync"
	"sync/atomic"

	"github.com/google/uuid"

	"scoria/alba/vfs"
	"scoria/driver/block"
	"scoria/driver/tlog"
)

// The pool is the memory of the log's head: one file on tmpfs, mapped, cut into
// chunks that hold either clusters or records of one SCO. It outlives the
// daemon, which is what keeps P3.
//
//	0        4096                    chunk area (aligned to chunkBytes)
//	├────────┼───────────────────────┼──────────┬──────────┬──
//	│ header │ descriptors, 64 bytes │ chunk 1  │ chunk 2  │ …
//	└────────┴───────────────────────┴──────────┴──────────┴──
//
// header: "SCORIAPL", version u32, chunks u32, chunk bytes u64, boot id 36
// bytes, CRC32C u32. descriptor: volume UUID 16, SCO number u64, slot u32, kind
// u32 (0 free), zero, CRC32C u32 in the last four bytes. A descriptor is made
// valid before its chunk is used and invalid before the chunk is given to
// another; only a process that dies in between leaves it invalid, and then
// nothing has been written to the chunk.
const (
	chunkBytes    = 256 << 10
	chunkClusters = chunkBytes / block.ClusterSize
	chunkRecords  = chunkBytes / tlog.Size

	poolMagic     = "SCORIAPL"
	poolVersion   = 1
	poolHeader    = 4096
	descriptorLen = 64

	minPoolChunks = 16
)

type chunkKind uint32

const (
	chunkFree chunkKind = iota
	chunkData
	chunkRecs
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// chunkOwner is whom a chunk belongs to.
type chunkOwner struct {
	log   *logSCO // nil: free, or found at start and not yet claimed by its volume
	slot  uint32
	kind  chunkKind
	clean bool // its bytes are in the SCO's file
}

// foundChunk is a chunk that a dead daemon left.
type foundChunk struct {
	id   uint32
	sco  uint64
	slot uint32
	kind chunkKind
}

// pool hands out chunks. Chunk numbers start at 1; 0 means none. mu is a leaf
// lock: nothing is called under it.
type pool struct {
	mapping vfs.Mapping
	bytes   []byte
	base    int
	n       uint32

	// gen changes when a chunk changes hands: a reader that copied from a chunk
	// and finds the same gen afterwards has copied the right bytes.
	gen []atomic.Uint32

	mu     sync.Mutex
	owners []chunkOwner
	free   []uint32
	clean  []uint64 // fifo of id<<32|gen; stale entries are skipped
	nclean uint32
	found  map[uuid.UUID][]foundChunk
	room   chan struct{} // closed and replaced when a chunk becomes free or clean

	dirty   atomic.Uint32 // chunks that hold bytes which are nowhere else
	holders atomic.Uint32 // volumes that have such chunks; changed under mu
}

// reservePart of the pool is kept for volumes that have no more than their fair
// share of it: so one that writes faster than the disk can't take the room for
// the few chunks that another one needs.
const reservePart = 16

// gained and lost count a volume's dirty chunks. Caller holds mu.
func (p *pool) gained(l *logSCO) {
	p.dirty.Add(1)
	if l.vol.dirtyChunks.Add(1) == 1 {
		p.holders.Add(1)
	}
}

func (p *pool) lost(l *logSCO) {
	p.dirty.Add(^uint32(0))
	if l.vol.dirtyChunks.Add(^uint32(0)) == 0 {
		p.holders.Add(^uint32(0))
	}
}

// share is how much of its fair share of the pool a volume has in use: more than
// 1 is too much if others want room.
func (p *pool) share(v *Volume) float64 {
	return float64(v.dirtyChunks.Load()) * float64(p.holders.Load()) / float64(p.n)
}

func poolBase(n uint32) int {
	return (poolHeader + int(n)*descriptorLen + chunkBytes - 1) / chunkBytes * chunkBytes
}

func encodePoolHeader(n uint32, bootID string) []byte {
	b := make([]byte, poolHeader)
	copy(b, poolMagic)
	binary.LittleEndian.PutUint32(b[8:], poolVersion)
	binary.LittleEndian.PutUint32(b[12:], n)
	binary.LittleEndian.PutUint64(b[16:], chunkBytes)
	copy(b[24:60], bootID)
	binary.LittleEndian.PutUint32(b[60:], crc32.Checksum(b[:60], castagnoli))
	return b
}

// decodePoolHeader returns the number of chunks of a pool that this boot made.
func decodePoolHeader(b []byte, bootID string) (n uint32, err error) {
	if len(b) < 64 || string(b[:8]) != poolMagic ||
		crc32.Checksum(b[:60], castagnoli) != binary.LittleEndian.Uint32(b[60:]) {
		return 0, errors.New("not a pool file")
	}
	if v := binary.LittleEndian.Uint32(b[8:]); v != poolVersion {
		return 0, fmt.Errorf("pool file version %d, this program reads %d", v, poolVersion)
	}
	if binary.LittleEndian.Uint64(b[16:]) != chunkBytes {
		return 0, fmt.Errorf("pool file has chunks of %d bytes", binary.LittleEndian.Uint64(b[16:]))
	}
	var id [36]byte
	copy(id[:], bootID)
	if string(b[24:60]) != string(id[:]) {
		return 0, errors.New("pool file is from before the host's last start")
	}
	return binary.LittleEndian.Uint32(b[12:]), nil
}

// openPool maps the pool file. A valid one of this boot is adopted with its
// chunks and its size; anything else is made anew. adopted says which.
func openPool(fs vfs.FS, name string, size int64, bootID string) (p *pool, adopted bool, err error) {
	n := uint32(size / chunkBytes)
	if n < minPoolChunks {
		return nil, false, fmt.Errorf("write buffer of %d bytes: must be at least %d", size, minPoolChunks*chunkBytes)
	}
	f, err := fs.Open(name, vfs.Create)
	if err != nil {
		return nil, false, fmt.Errorf("write buffer: %w", err)
	}
	defer f.Close()
	have, err := f.Size()
	if err != nil {
		return nil, false, fmt.Errorf("write buffer: %w", err)
	}
	if have >= poolHeader {
		head := make([]byte, poolHeader)
		if _, err := f.ReadAt(head, 0); err != nil {
			return nil, false, fmt.Errorf("write buffer: %w", err)
		}
		if old, err := decodePoolHeader(head, bootID); err == nil && old >= minPoolChunks &&
			have >= int64(poolBase(old))+int64(old)*chunkBytes {
			used, err := chunksInUse(f, old)
			if err != nil {
				return nil, false, fmt.Errorf("write buffer: %w", err)
			}
			if used || old == n { // else it is made anew in the size that is wanted now
				n, adopted = old, true
			}
		}
	}
	total := int64(poolBase(n)) + int64(n)*chunkBytes
	if !adopted {
		if err := f.Truncate(0); err != nil {
			return nil, false, fmt.Errorf("write buffer: %w", err)
		}
		// Reserving the memory now turns a full tmpfs into an error here instead
		// of a SIGBUS later.
		if err := f.Allocate(0, total); err != nil {
			return nil, false, fmt.Errorf("write buffer: %d bytes in %s: %w", total, name, err)
		}
	}
	m, _, err := fs.Map(name, total)
	if err != nil {
		return nil, false, fmt.Errorf("write buffer: %w", err)
	}
	p = &pool{
		mapping: m, bytes: m.Bytes(), base: poolBase(n), n: n,
		gen: make([]atomic.Uint32, n+1), owners: make([]chunkOwner, n+1),
		found: map[uuid.UUID][]foundChunk{}, room: make(chan struct{}),
	}
	if adopted {
		p.scan()
	} else {
		clear(p.bytes[poolHeader:p.base])
		copy(p.bytes, encodePoolHeader(n, bootID))
		for id := n; id >= 1; id-- {
			p.free = append(p.free, id)
		}
	}
	return p, adopted, nil
}

// chunksInUse reports whether a pool file of n chunks holds anything.
func chunksInUse(f vfs.File, n uint32) (bool, error) {
	b := make([]byte, int(n)*descriptorLen)
	if _, err := f.ReadAt(b, poolHeader); err != nil {
		return false, err
	}
	for ; len(b) > 0; b = b[descriptorLen:] {
		if binary.LittleEndian.Uint32(b[28:]) != uint32(chunkFree) {
			return true, nil
		}
	}
	return false, nil
}

// scan sorts the chunks of an adopted pool into free and found ones.
func (p *pool) scan() {
	for id := p.n; id >= 1; id-- {
		d := p.descriptor(id)
		kind := chunkKind(binary.LittleEndian.Uint32(d[28:]))
		if kind == chunkFree || kind > chunkRecs || crc32.Checksum(d[:60], castagnoli) != binary.LittleEndian.Uint32(d[60:]) {
			p.free = append(p.free, id)
			continue
		}
		var vol uuid.UUID
		copy(vol[:], d)
		p.found[vol] = append(p.found[vol], foundChunk{
			id: id, sco: binary.LittleEndian.Uint64(d[16:]), slot: binary.LittleEndian.Uint32(d[24:]), kind: kind,
		})
		p.dirty.Add(1)
	}
}

func (p *pool) descriptor(id uint32) []byte {
	off := poolHeader + int(id-1)*descriptorLen
	return p.bytes[off : off+descriptorLen : off+descriptorLen]
}

// chunk returns the bytes of chunk id.
func (p *pool) chunk(id uint32) []byte {
	off := p.base + int(id-1)*chunkBytes
	return p.bytes[off : off+chunkBytes : off+chunkBytes]
}

// alloc gives a chunk to slot of l, taking the oldest clean one from its owner
// if none is free. It returns 0 if all chunks are dirty, or all but the reserve
// and the volume has more than its fair share. Chunks for records come
// zeroed.
func (p *pool) alloc(l *logSCO, slot uint32, kind chunkKind) uint32 {
	p.mu.Lock()
	if uint32(len(p.free))+p.nclean <= p.n/reservePart && p.share(l.vol) > 1 {
		p.mu.Unlock()
		return 0
	}
	var id uint32
	if k := len(p.free); k > 0 {
		id = p.free[k-1]
		p.free = p.free[:k-1]
	} else if id = p.popClean(); id == 0 {
		p.mu.Unlock()
		return 0
	}
	p.owners[id] = chunkOwner{log: l, slot: slot, kind: kind}
	p.gained(l)
	p.mu.Unlock()

	if kind == chunkRecs {
		clear(p.chunk(id))
	}
	d := p.descriptor(id)
	copy(d, l.hdr.Volume[:])
	binary.LittleEndian.PutUint64(d[16:], l.hdr.Number)
	binary.LittleEndian.PutUint32(d[24:], slot)
	binary.LittleEndian.PutUint32(d[28:], uint32(kind))
	clear(d[32:60])
	binary.LittleEndian.PutUint32(d[60:], crc32.Checksum(d[:60], castagnoli))
	return id
}

// popClean takes the oldest clean chunk from its owner. Caller holds mu.
func (p *pool) popClean() uint32 {
	for len(p.clean) > 0 {
		e := p.clean[0]
		p.clean = p.clean[1:]
		id := uint32(e >> 32)
		if p.gen[id].Load() != uint32(e) || !p.owners[id].clean {
			continue
		}
		p.nclean--
		p.detach(id)
		return id
	}
	return 0
}

// detach takes chunk id from its owner. Caller holds mu.
func (p *pool) detach(id uint32) {
	binary.LittleEndian.PutUint32(p.descriptor(id)[28:], uint32(chunkFree))
	o := &p.owners[id]
	if o.log != nil {
		o.log.slots(o.kind)[o.slot].Store(0)
	}
	p.gen[id].Add(1)
	*o = chunkOwner{}
}

// markClean says that the bytes of the data chunk in a slot of l are in its
// file: it stays readable until somebody needs the room. The chunk may have
// another owner by now if it was clean already.
func (p *pool) markClean(l *logSCO, slot uint32) {
	p.mu.Lock()
	defer p.mu.Unlock()
	id := l.data[slot].Load()
	if id == 0 || p.owners[id].log != l || p.owners[id].clean {
		return
	}
	p.owners[id].clean = true
	p.clean = append(p.clean, uint64(id)<<32|uint64(p.gen[id].Load()))
	p.nclean++
	p.lost(l)
	p.signalRoom()
}

// markDirty takes markClean back and reports whether the slot's chunk is still
// there: its bytes may not be in the file after all.
func (p *pool) markDirty(l *logSCO, slot uint32) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	id := l.data[slot].Load()
	if id == 0 || p.owners[id].log != l {
		return false
	}
	if p.owners[id].clean { // its entry in the fifo is skipped
		p.owners[id].clean = false
		p.nclean--
		p.gained(l)
	}
	return true
}

// release frees chunk id at once.
func (p *pool) release(id uint32) {
	p.mu.Lock()
	p.releaseLocked(id)
	p.mu.Unlock()
}

func (p *pool) releaseLocked(id uint32) {
	switch o := &p.owners[id]; {
	case o.clean:
		p.nclean--
	case o.log != nil:
		p.lost(o.log)
	default: // found at the start
		p.dirty.Add(^uint32(0))
	}
	p.detach(id)
	p.free = append(p.free, id)
	p.signalRoom()
}

// releaseOf frees the chunk in a slot of l, if it has one.
func (p *pool) releaseOf(l *logSCO, kind chunkKind, slot uint32) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if id := l.slots(kind)[slot].Load(); id != 0 && p.owners[id].log == l {
		p.releaseLocked(id)
	}
}

// signalRoom wakes whoever waits for room. Caller holds mu.
func (p *pool) signalRoom() {
	close(p.room)
	p.room = make(chan struct{})
}

// roomChan is closed at the next release or markClean.
func (p *pool) roomChan() <-chan struct{} {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.room
}

// takeFound returns the chunks that a dead daemon left for a volume; the caller
// adopts or releases each.
func (p *pool) takeFound(vol uuid.UUID) []foundChunk {
	p.mu.Lock()
	defer p.mu.Unlock()
	f := p.found[vol]
	delete(p.found, vol)
	return f
}

// putBack returns found chunks that nobody adopted, for the next opening.
func (p *pool) putBack(vol uuid.UUID, chunks []foundChunk) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.found[vol] = append(p.found[vol], chunks...)
}

// abandon takes the chunks of a SCO that is not sealed away from l and keeps
// them as found ones: what they hold may exist nowhere else.
func (p *pool) abandon(l *logSCO) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, kind := range []chunkKind{chunkData, chunkRecs} {
		for slot := range l.slots(kind) {
			id := l.slots(kind)[slot].Load()
			if id == 0 || p.owners[id].log != l {
				continue
			}
			l.slots(kind)[slot].Store(0)
			p.gen[id].Add(1)
			if p.owners[id].clean {
				p.nclean--
			} else {
				p.lost(l)
			}
			p.dirty.Add(1)
			p.owners[id] = chunkOwner{}
			p.found[l.hdr.Volume] = append(p.found[l.hdr.Volume],
				foundChunk{id: id, sco: l.hdr.Number, slot: uint32(slot), kind: kind})
		}
	}
}

// adopt makes l the owner of a found chunk.
func (p *pool) adopt(c foundChunk, l *logSCO) {
	p.mu.Lock()
	p.owners[c.id] = chunkOwner{log: l, slot: c.slot, kind: c.kind}
	p.dirty.Add(^uint32(0)) // as a found one
	p.gained(l)
	p.mu.Unlock()
	l.slots(c.kind)[c.slot].Store(c.id)
}

// fill is the part of the pool that is dirty, 0 to 1.
func (p *pool) fill() float64 { return float64(p.dirty.Load()) / float64(p.n) }
