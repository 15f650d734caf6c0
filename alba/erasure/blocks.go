package erasure

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/hkdf"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"sync"

	"github.com/klauspost/compress/zstd"
	"github.com/pierrec/lz4/v4"

	"scoria/alba"
)

// ErrDamaged: a stored block can't be decrypted or decompressed.
var ErrDamaged = errors.New("stored block is damaged")

// Blocks compresses and encrypts the blocks of one upload, each alone. An encrypted
// block is AES-256-GCM under a key derived from the namespace's key and the upload's
// ID (HKDF-SHA-256, the ID as salt), with the block's number as nonce: both are
// used once, since an upload's ID is never used again and writes each block once.
// Compressed blocks that would not become shorter are stored as they are. Safe
// from any goroutine.
type Blocks struct {
	comp  alba.Compression
	aead  cipher.AEAD // nil: no encryption
	block int
}

// NewBlocks returns the transformation for an upload; key is the namespace's, and
// is not used without encryption.
func NewBlocks(c alba.Compression, e alba.Encryption, key []byte, upload alba.ID) (*Blocks, error) {
	b := &Blocks{comp: c, block: alba.BlockBytes(c)}
	if e == alba.EncryptNone {
		return b, nil
	}
	if len(key) != alba.KeyBytes {
		return nil, fmt.Errorf("key of %d bytes: must have %d: %w", len(key), alba.KeyBytes, alba.ErrKey)
	}
	sub, err := hkdf.Key(sha256.New, key, upload[:], "scoria object key 1", alba.KeyBytes)
	if err != nil {
		return nil, fmt.Errorf("derive key: %w", err)
	}
	block, err := aes.NewCipher(sub)
	if err != nil {
		return nil, err
	}
	b.aead, err = cipher.NewGCM(block)
	return b, err
}

// Plain says that blocks are stored as they are.
func (b *Blocks) Plain() bool { return b.aead == nil && b.comp == alba.CompressNone }

func nonce(number int64) (n [12]byte) {
	binary.LittleEndian.PutUint64(n[:], uint64(number))
	return n
}

// Seal appends the stored form of a block to dst. plain must not overlap dst.
func (b *Blocks) Seal(dst, plain []byte, number int64) []byte {
	if b.comp != alba.CompressNone {
		start := len(dst)
		packed := compress(b.comp, dst, plain)
		if len(packed) == 0 || len(packed)-start >= len(plain) {
			packed = append(dst, plain...)
		}
		if b.aead == nil {
			return packed
		}
		n := nonce(number)
		// In place: GCM allows the output to be exactly over the input.
		sealed := b.aead.Seal(packed[start:start], n[:], packed[start:], nil)
		return append(packed[:start], sealed...)
	}
	if b.aead == nil {
		return append(dst, plain...)
	}
	n := nonce(number)
	return b.aead.Seal(dst, n[:], plain, nil)
}

// Open fills dst, which must have the block's length, from its stored form. The
// latter is overwritten. ErrDamaged if it is not what Seal made.
func (b *Blocks) Open(dst, stored []byte, number int64) error {
	if b.aead != nil {
		n := nonce(number)
		plain, err := b.aead.Open(stored[:0], n[:], stored, nil)
		if err != nil {
			return fmt.Errorf("block %d fails its authentication: %w", number, ErrDamaged)
		}
		stored = plain
	}
	if len(stored) == len(dst) {
		copy(dst, stored)
		return nil
	}
	if b.comp == alba.CompressNone {
		return fmt.Errorf("block %d has %d bytes, want %d: %w", number, len(stored), len(dst), ErrDamaged)
	}
	if err := decompress(b.comp, dst, stored); err != nil {
		return fmt.Errorf("block %d: %v: %w", number, err, ErrDamaged)
	}
	return nil
}

// Overhead is what encryption adds to each stored block, in bytes.
func (b *Blocks) Overhead() int {
	if b.aead == nil {
		return 0
	}
	return b.aead.Overhead()
}

var (
	lz4Pool  = sync.Pool{New: func() any { return new(lz4.Compressor) }}
	zstdPool = sync.Pool{New: func() any {
		e, err := zstd.NewWriter(nil, zstd.WithEncoderConcurrency(1), zstd.WithEncoderLevel(zstd.SpeedFastest),
			zstd.WithEncoderCRC(false), zstd.WithWindowSize(alba.CompressedBlock), zstd.WithLowerEncoderMem(true))
		if err != nil {
			panic(fmt.Sprintf("erasure: zstd encoder: %v", err)) // of fixed options
		}
		return e
	}}
	unzstdPool = sync.Pool{New: func() any {
		d, err := zstd.NewReader(nil, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxMemory(1<<20), zstd.WithDecoderLowmem(true))
		if err != nil {
			panic(fmt.Sprintf("erasure: zstd decoder: %v", err))
		}
		return d
	}}
)

// compress appends the compressed plain to dst; nil if that would be longer.
func compress(c alba.Compression, dst, plain []byte) []byte {
	switch c {
	case alba.CompressLZ4:
		lz := lz4Pool.Get().(*lz4.Compressor)
		defer lz4Pool.Put(lz)
		start := len(dst)
		dst = append(dst, plain...) // room for at most as much
		n, err := lz.CompressBlock(plain, dst[start:])
		if err != nil || n == 0 {
			return nil
		}
		return dst[:start+n]
	case alba.CompressZstd:
		e := zstdPool.Get().(*zstd.Encoder)
		defer zstdPool.Put(e)
		return e.EncodeAll(plain, dst)
	}
	return nil
}

func decompress(c alba.Compression, dst, packed []byte) error {
	var n int
	switch c {
	case alba.CompressLZ4:
		var err error
		if n, err = lz4.UncompressBlock(packed, dst); err != nil {
			return err
		}
	case alba.CompressZstd:
		d := unzstdPool.Get().(*zstd.Decoder)
		defer unzstdPool.Put(d)
		out, err := d.DecodeAll(packed, dst[:0:len(dst)])
		if err != nil {
			return err
		}
		if n = len(out); n == len(dst) && n > 0 && &out[0] != &dst[0] {
			copy(dst, out)
		}
	}
	if n != len(dst) {
		return fmt.Errorf("%d bytes after decompression, want %d", n, len(dst))
	}
	return nil
}

// # The index
//
// Behind the compressed blocks, in pages of 4096 bytes, the lengths of the blocks
// as they are stored. A page, little-endian:
//
//	0          8                                   4096
//	+----------+-----------------------------------+
//	| base u64 | length u16 of each of 2044 blocks |
//	+----------+-----------------------------------+
//
// base is the stream offset of the page's first block.

// IndexPage is the size of a page of the index, in bytes.
const IndexPage = 4096

// PageBlocks is how many blocks a page covers.
const PageBlocks = (IndexPage - 8) / 2

// IndexPages is how many pages an object of size bytes has; 0 without compression.
func IndexPages(c alba.Compression, size int64) int64 {
	if c == alba.CompressNone {
		return 0
	}
	blocks := (size + alba.CompressedBlock - 1) / alba.CompressedBlock
	return (blocks + PageBlocks - 1) / PageBlocks
}

// FindBlock returns where in the stream a block is that the page covers, and its
// stored length: ErrDamaged if that can't be.
func FindBlock(page []byte, number, indexOff int64) (off int64, n int, err error) {
	if len(page) != IndexPage {
		return 0, 0, fmt.Errorf("index page of %d bytes: %w", len(page), ErrDamaged)
	}
	base := binary.LittleEndian.Uint64(page)
	in := number % PageBlocks
	sum := base
	for i := range in {
		sum += uint64(binary.LittleEndian.Uint16(page[8+2*i:]))
	}
	n = int(binary.LittleEndian.Uint16(page[8+2*in:]))
	if base > uint64(indexOff) || sum+uint64(n) > uint64(indexOff) || n > alba.CompressedBlock+alba.TagBytes || n == 0 {
		return 0, 0, fmt.Errorf("index of block %d says %d bytes at %d of %d: %w", number, n, sum, indexOff, ErrDamaged)
	}
	return int64(sum), n, nil
}

// MaxStored is the most bytes that the stream of an object of size bytes has.
func MaxStored(c alba.Compression, e alba.Encryption, size int64) int64 {
	block := int64(alba.BlockBytes(c))
	n := size
	if e != alba.EncryptNone {
		n += (size + block - 1) / block * alba.TagBytes
	}
	if c != alba.CompressNone {
		n = (n + IndexPage - 1) / IndexPage * IndexPage
		n += IndexPages(c, size) * IndexPage
	}
	return n
}
