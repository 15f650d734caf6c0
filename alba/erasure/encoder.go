package erasure

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"

	"scoria/alba"
)

// readBytes is how much is read from an object's source at a time, at most.
const readBytes = 1 << 20

// Chunk is the fragments of one chunk. Its memory is used again by Encoder.Next.
type Chunk struct {
	Memory []byte // for the shards; where it is too little, Next makes more

	Number int
	Shards [][]byte // k data, m parity; one length
	End    int64    // of the chunk in the stream, bytes
	Last   bool     // the stream ends with it
}

// Encoder reads an object once, in order, and makes chunks of it. Not safe for
// concurrent use; the chunks it made are independent of it.
type Encoder struct {
	src    io.ReaderAt
	size   int64
	blocks *Blocks
	codec  *Codec
	layout alba.Layout // Stored is what the stream has so far
	pack   bool        // blocks are compressed

	read    int64  // of the source
	number  int64  // next block
	plain   []byte // buffer for one block
	carry   []byte // stream bytes that did not fit in the last chunk
	carried int    // of carry, already used
	index   []byte
	flushed bool // the index is
	chunks  int
}

// NewEncoder encodes size bytes of src. The layout's Stored is ignored.
func NewEncoder(src io.ReaderAt, size int64, l alba.Layout, blocks *Blocks) (*Encoder, error) {
	codec, err := CodecFor(l.K, l.M)
	if err != nil {
		return nil, err
	}
	l.Stored = 0
	e := &Encoder{src: src, size: size, blocks: blocks, codec: codec, layout: l, pack: blocks.comp != alba.CompressNone}
	if !blocks.Plain() {
		e.plain = make([]byte, blocks.block)
	}
	return e, nil
}

// Stored is the length of the stream; final after Next returned io.EOF.
func (e *Encoder) Stored() int64 { return e.layout.Stored }

// Done says that the chunk that Next made was the last.
func (e *Encoder) Done() bool {
	return e.read == e.size && e.carried == len(e.carry) && (e.flushed || !e.pack || e.size == 0)
}

// Next makes the next chunk in c, whose memory it uses again. check is called
// between reads of the source and its error ends the encoding: so a canceled
// upload ends. ready, if set, is called once for each fragment when its bytes and c's
// other fields are final, before Next is done with the others: those of the data go
// to disks while the rest is read and parity is computed. io.EOF after the last
// chunk; io.ErrUnexpectedEOF if the source is shorter than the object, perhaps when
// some fragments were ready.
func (e *Encoder) Next(c *Chunk, check func() error, ready func(shard int)) error {
	full := int(e.layout.ChunkBytes())
	parity := e.layout.M * e.layout.FragmentBytes
	if upTo := MaxStored(e.blocks.comp, e.encryption(), e.size) - e.layout.Stored; upTo < int64(full) {
		// The last chunk: take no more memory than it needs.
		l := e.layout
		l.Stored = upTo
		full, parity = l.K*l.FragmentLen(0), l.M*l.FragmentLen(0)
	}
	if cap(c.Memory) < full+parity {
		c.Memory = make([]byte, full+parity)
	}
	if ready == nil {
		ready = func(int) {}
	}
	data := c.Memory[:full]
	if e.blocks.Plain() {
		return e.nextPlain(c, int(min(int64(full), e.size-e.read)), check, ready)
	}
	n, err := e.fill(data, check)
	if err != nil {
		return err
	}
	if n == 0 {
		return io.EOF
	}
	frag := e.cut(c, n)
	clear(data[n : e.layout.K*frag])
	c.Last = e.Done()
	for i := range e.layout.K {
		ready(i)
	}
	return e.parity(c, ready)
}

// nextPlain makes a chunk of the next n bytes of the source, fragment by fragment.
func (e *Encoder) nextPlain(c *Chunk, n int, check func() error, ready func(int)) error {
	if n == 0 {
		return io.EOF
	}
	c.Last = e.read+int64(n) == e.size
	frag := e.cut(c, n)
	for i, p := range c.Shards[:e.layout.K] {
		have := min(frag, max(0, n-i*frag))
		if err := e.readSource(p[:have], check); err != nil {
			return err
		}
		clear(p[have:])
		ready(i)
	}
	return e.parity(c, ready)
}

// cut makes c the next chunk, of n bytes of the stream, and returns the length of its
// fragments.
func (e *Encoder) cut(c *Chunk, n int) (frag int) {
	l := e.layout
	l.Stored = int64(n)
	frag = l.FragmentLen(0)
	c.Number, c.Shards = e.chunks, c.Shards[:0]
	all := c.Memory[:(l.K+l.M)*frag]
	for i := range l.K + l.M {
		c.Shards = append(c.Shards, all[i*frag:(i+1)*frag:(i+1)*frag])
	}
	e.chunks++
	e.layout.Stored += int64(n)
	c.End = e.layout.Stored
	return frag
}

// parity computes the last fragments of a chunk from the first.
func (e *Encoder) parity(c *Chunk, ready func(int)) error {
	if err := e.codec.Encode(c.Shards); err != nil {
		return err
	}
	for i := range e.layout.M {
		ready(e.layout.K + i)
	}
	return nil
}

func (e *Encoder) encryption() alba.Encryption {
	if e.blocks.aead == nil {
		return alba.EncryptNone
	}
	return alba.EncryptAES256GCM
}

// fill puts the next bytes of a stream of sealed blocks into data and returns how many; fewer
// than len(data) only at the stream's end.
func (e *Encoder) fill(data []byte, check func() error) (int, error) {
	n := 0
	for n < len(data) {
		if e.carried < len(e.carry) {
			c := copy(data[n:], e.carry[e.carried:])
			e.carried, n = e.carried+c, n+c
			continue
		}
		e.carry, e.carried = e.carry[:0], 0
		switch {
		case e.read < e.size:
			if err := e.sealBlock(check); err != nil {
				return n, err
			}
		case e.pack && !e.flushed:
			e.flushed = true
			e.flushIndex(e.layout.Stored + int64(n))
		default:
			return n, nil
		}
	}
	return n, nil
}

// sealBlock puts the stored form of the next block into carry.
func (e *Encoder) sealBlock(check func() error) error {
	p := e.plain[:min(int64(len(e.plain)), e.size-e.read)]
	if err := e.readSource(p, check); err != nil {
		return err
	}
	e.carry = e.blocks.Seal(e.carry, p, e.number)
	if e.pack {
		if e.number%PageBlocks == 0 {
			var base int64
			if e.number > 0 {
				base = e.lastBase() + e.sumLast()
			}
			e.index = append(e.index, make([]byte, IndexPage)...)
			binary.LittleEndian.PutUint64(e.page(), uint64(base))
		}
		binary.LittleEndian.PutUint16(e.page()[8+2*(e.number%PageBlocks):], uint16(len(e.carry)))
	}
	e.number++
	return nil
}

func (e *Encoder) page() []byte { return e.index[len(e.index)-IndexPage:] }

func (e *Encoder) lastBase() int64 { return int64(binary.LittleEndian.Uint64(e.page())) }

func (e *Encoder) sumLast() (sum int64) {
	for i := range PageBlocks {
		sum += int64(binary.LittleEndian.Uint16(e.page()[8+2*i:]))
	}
	return sum
}

// flushIndex puts the padding and the index behind the last block into carry.
func (e *Encoder) flushIndex(at int64) {
	pad := (IndexPage - at%IndexPage) % IndexPage
	e.carry = append(append(e.carry, make([]byte, pad)...), e.index...)
	e.index = nil
}

func (e *Encoder) readSource(p []byte, check func() error) error {
	for len(p) > 0 {
		if err := check(); err != nil {
			return err
		}
		n := min(len(p), readBytes)
		got, err := e.src.ReadAt(p[:n], e.read)
		if got < n {
			if err == nil || errors.Is(err, io.EOF) {
				err = io.ErrUnexpectedEOF
			}
			return fmt.Errorf("read the object at %d of %d: %w", e.read+int64(got), e.size, err)
		}
		e.read += int64(n)
		p = p[n:]
	}
	return nil
}
