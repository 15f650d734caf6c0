package erasure

import (
	"fmt"
	"io"
	"sync"

	"scoria/alba"
)

// Object reads byte ranges of a stored object from ranges of its stream. It keeps
// the pages of the index that it has met. Safe from any goroutine.
type Object struct {
	size   int64
	stored int64
	block  int64
	unit   int64 // of an encrypted block in the stream
	blocks *Blocks

	mu    sync.Mutex
	pages map[int64][]byte // of the index; never changed
}

// Fetch fills p with the stream's bytes from off on; from several goroutines.
type Fetch func(p []byte, off int64) error

// NewObject returns a reader of what the manifest describes; key is the namespace's.
func NewObject(m *alba.Manifest, key []byte) (*Object, error) {
	b, err := NewBlocks(m.Compression, m.Encryption, key, m.Upload)
	if err != nil {
		return nil, err
	}
	o := &Object{size: m.Size, stored: m.Stored, block: int64(m.BlockBytes), unit: int64(m.BlockBytes + b.Overhead()), blocks: b}
	if want := MaxStored(m.Compression, m.Encryption, m.Size); m.Compression == alba.CompressNone && m.Stored != want || m.Stored > want {
		return nil, fmt.Errorf("stream of %d bytes, want %d: %w", m.Stored, want, ErrDamaged)
	}
	return o, nil
}

// Size of the object in bytes.
func (o *Object) Size() int64 { return o.size }

// ReadAt fills p from the object's offset: io.ErrUnexpectedEOF if it ends before,
// ErrDamaged if what fetch returned is not what was stored (and encryption or
// compression could tell).
func (o *Object) ReadAt(p []byte, off int64, fetch Fetch) error {
	switch {
	case off < 0:
		return fmt.Errorf("offset %d is negative", off)
	case off > o.size || int64(len(p)) > o.size-off:
		return fmt.Errorf("%d bytes at %d of %d: %w", len(p), off, o.size, io.ErrUnexpectedEOF)
	case len(p) == 0:
		return nil
	case o.blocks.Plain():
		return fetch(p, off)
	}
	for len(p) > 0 {
		n, err := o.readRun(p, off, fetch)
		if err != nil {
			return err
		}
		p, off = p[n:], off+int64(n)
	}
	return nil
}

// maxRun bounds the memory for the stored form of what is read, in blocks.
const maxRun = 64

// readRun reads up to maxRun blocks, one behind the other in the stream, and
// returns how much of p that is.
func (o *Object) readRun(p []byte, off int64, fetch Fetch) (int, error) {
	first := off / o.block
	last := min((off+int64(len(p))-1)/o.block, first+maxRun-1)
	var starts [maxRun + 1]int64
	for b := first; b <= last; b++ {
		at, n, err := o.find(b, fetch)
		if err != nil {
			return 0, err
		}
		starts[b-first], starts[b-first+1] = at, at+int64(n)
	}
	count := last - first + 1
	stored := make([]byte, starts[count]-starts[0])
	if err := fetch(stored, starts[0]); err != nil {
		return 0, err
	}
	done := 0
	var plain []byte
	for b := first; b <= last; b++ {
		from := stored[starts[b-first]-starts[0] : starts[b-first+1]-starts[0]]
		size := min(o.block, o.size-b*o.block)
		skip := max(0, off-b*o.block)
		part := p[done:min(len(p), done+int(size-skip))]
		into := part
		if len(part) != int(size) {
			if plain == nil {
				plain = make([]byte, o.block)
			}
			into = plain[:size]
		}
		if err := o.blocks.Open(into, from, b); err != nil {
			return 0, err
		}
		if len(part) != int(size) {
			copy(part, into[skip:])
		}
		done += len(part)
	}
	return done, nil
}

// find returns where block b is in the stream.
func (o *Object) find(b int64, fetch Fetch) (off int64, n int, err error) {
	if o.blocks.comp == alba.CompressNone {
		return b * o.unit, int(min(o.block, o.size-b*o.block)) + o.blocks.Overhead(), nil
	}
	pages := IndexPages(o.blocks.comp, o.size)
	indexOff := o.stored - pages*IndexPage
	if indexOff < 0 {
		return 0, 0, fmt.Errorf("stream of %d bytes for %d pages of index: %w", o.stored, pages, ErrDamaged)
	}
	number := b / PageBlocks
	o.mu.Lock()
	page := o.pages[number]
	o.mu.Unlock()
	if page != nil {
		return FindBlock(page, b, indexOff)
	}
	page = make([]byte, IndexPage)
	if err := fetch(page, indexOff+number*IndexPage); err != nil {
		return 0, 0, err
	}
	off, n, err = FindBlock(page, b, indexOff)
	if err == nil {
		o.mu.Lock()
		if o.pages == nil {
			o.pages = make(map[int64][]byte)
		}
		o.pages[number] = page
		o.mu.Unlock()
	}
	return off, n, err
}

// Forget drops the pages of the index: one of them may be wrong.
func (o *Object) Forget() {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.pages = nil
}
