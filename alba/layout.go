package alba

import "fmt"

// BlockSize is the size in bytes of the blocks that are encrypted each alone, if
// they are not compressed too, and the unit of checksums if they are not.
const BlockSize = 4096

// TagBytes is what encryption adds to each block.
const TagBytes = 16

// CompressedBlock is the unit of compression in bytes: larger ones compress better,
// smaller ones cost less when 4 KiB of one are read.
const CompressedBlock = 16 << 10

// Layout says where the bytes of an object's stream are.
type Layout struct {
	K, M          int
	FragmentBytes int   // of each chunk but the last
	Stored        int64 // bytes of the stream
	Unit          int   // fragments and their checksums come in multiples of it
}

// Unit is the unit of checksums of fragments in bytes.
func Unit(c Compression, e Encryption) int {
	if c == CompressNone && e != EncryptNone {
		return BlockSize + TagBytes
	}
	return BlockSize
}

// PlanFragment returns the fragment size for a stream of at most upTo bytes: about
// target, so that no chunk is much shorter than the others.
func PlanFragment(upTo int64, k, target, unit int) int {
	limit := int64(k) * (int64(target) + int64(target)/4)
	chunks := max(1, (upTo+limit-1)/limit)
	perShard := (upTo + chunks*int64(k) - 1) / (chunks * int64(k))
	return int(max(int64(unit), roundUp(perShard, unit)))
}

func roundUp(n int64, unit int) int64 {
	return (n + int64(unit) - 1) / int64(unit) * int64(unit)
}

// ChunkBytes is the stream's bytes in a chunk, but for the last.
func (l Layout) ChunkBytes() int64 { return int64(l.K) * int64(l.FragmentBytes) }

// EncodedBytes is what the fragments of a chunk take together, data and parity.
func (l Layout) EncodedBytes() int64 { return int64(l.K+l.M) * int64(l.FragmentBytes) }

// Chunks is how many there are; an empty stream has none.
func (l Layout) Chunks() int {
	c := l.ChunkBytes()
	return int((l.Stored + c - 1) / c)
}

// FragmentLen is the size in bytes of the fragments of a chunk.
func (l Layout) FragmentLen(chunk int) int {
	rest := l.Stored - int64(chunk)*l.ChunkBytes()
	if rest >= l.ChunkBytes() {
		return l.FragmentBytes
	}
	return int(roundUp((rest+int64(l.K)-1)/int64(l.K), l.Unit))
}

// Piece is a byte range of the stream that lies in one fragment.
type Piece struct {
	Chunk, Shard int
	Off, Len     int // within the fragment
}

// Pieces cuts [off, off+n) of the stream, which must lie in it, at the borders of
// fragments and calls fn with each piece in order, until it returns false.
func (l Layout) Pieces(off int64, n int, fn func(Piece) bool) {
	for n > 0 {
		chunk := int(off / l.ChunkBytes())
		in := off - int64(chunk)*l.ChunkBytes()
		size := int64(l.FragmentLen(chunk))
		p := Piece{Chunk: chunk, Shard: int(in / size), Off: int(in % size)}
		p.Len = min(n, int(size)-p.Off)
		if !fn(p) {
			return
		}
		off += int64(p.Len)
		n -= p.Len
	}
}

// check refuses what no upload makes, so that sizes computed from it are sane.
func (l Layout) check() error {
	switch {
	case l.K < 1 || l.K > MaxK || l.M < 0 || l.M > MaxM:
		return fmt.Errorf("k %d, m %d: must be 1 to %d and 0 to %d", l.K, l.M, MaxK, MaxM)
	case l.FragmentBytes < l.Unit || l.FragmentBytes > 2*MaxFragmentBytes || l.FragmentBytes%l.Unit != 0:
		return fmt.Errorf("fragment of %d bytes: must be a multiple of %d up to %d", l.FragmentBytes, l.Unit, 2*MaxFragmentBytes)
	case l.Stored < 0 || l.Stored > MaxStreamBytes:
		return fmt.Errorf("stream of %d bytes: must be 0 to %d", l.Stored, int64(MaxStreamBytes))
	case l.Stored/l.ChunkBytes() >= MaxChunks:
		return fmt.Errorf("stream of %d bytes in chunks of %d: must be fewer than %d", l.Stored, l.ChunkBytes(), MaxChunks)
	}
	return nil
}

// Limits of an object.
const (
	MaxObjectBytes = 1 << 42
	MaxStreamBytes = MaxObjectBytes + MaxObjectBytes/64
	MaxChunks      = 1 << 30
)
