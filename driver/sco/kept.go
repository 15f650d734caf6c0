package sco

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"math/bits"
)

// Kept says which clusters of a SCO a compacted one holds, and where. The clusters
// keep the indices that they had: a location means the same in every generation.
// It must not be changed while others read it.
type Kept struct {
	span  uint32
	words []uint64
	ranks []uint32 // kept clusters before each word, since Seal
	n     uint32
}

// NewKept is an empty set of clusters below span.
func NewKept(span uint32) *Kept {
	return &Kept{span: span, words: make([]uint64, (span+63)/64)}
}

// Add puts a cluster in. It reports false if it is not below the span or is there
// already.
func (k *Kept) Add(cluster uint32) bool {
	if cluster >= k.span || k.Has(cluster) {
		return false
	}
	k.words[cluster/64] |= 1 << (cluster % 64)
	k.n++
	return true
}

// Seal is called when all clusters are in, before Slot.
func (k *Kept) Seal() *Kept {
	k.ranks = make([]uint32, len(k.words))
	n := uint32(0)
	for i, w := range k.words {
		k.ranks[i] = n
		n += uint32(bits.OnesCount64(w))
	}
	return k
}

// Has reports whether a cluster is in.
func (k *Kept) Has(cluster uint32) bool {
	return cluster < k.span && k.words[cluster/64]&(1<<(cluster%64)) != 0
}

// Slot is the place of a cluster in the compacted SCO, from 0 on. Neighbours that
// both are in lie side by side.
func (k *Kept) Slot(cluster uint32) (slot uint32, ok bool) {
	if !k.Has(cluster) {
		return 0, false
	}
	w := k.words[cluster/64] & (1<<(cluster%64) - 1)
	return k.ranks[cluster/64] + uint32(bits.OnesCount64(w)), true
}

// Len is how many clusters are in, Span below which index they all are.
func (k *Kept) Len() uint32  { return k.n }
func (k *Kept) Span() uint32 { return k.span }

// KeptBytes is the room that the table of kept clusters below span takes.
func KeptBytes(span uint32) int64 { return RoundUp((int64(span) + 7) / 8) }

// Encode returns the table as it is stored, and its checksum.
func (k *Kept) Encode() (b []byte, crc uint32) {
	b = make([]byte, KeptBytes(k.span))
	for i, w := range k.words {
		binary.LittleEndian.PutUint64(b[8*i:], w)
	}
	return b, crc32.Checksum(b, castagnoli)
}

// ReadKept reads and verifies the table at off of a compacted SCO: of the clusters
// below span it must name n.
func ReadKept(r io.ReaderAt, off int64, span, n, crc uint32) (*Kept, error) {
	if span == 0 || span > MaxClusters {
		return nil, fmt.Errorf("table of kept clusters: %w: %d clusters", ErrFormat, span)
	}
	b := make([]byte, KeptBytes(span))
	if _, err := r.ReadAt(b, off); err != nil && !errors.Is(err, io.EOF) {
		return nil, fmt.Errorf("table of kept clusters at %d: %w", off, err)
	}
	if crc32.Checksum(b, castagnoli) != crc {
		return nil, fmt.Errorf("table of kept clusters at %d: %w: checksum", off, ErrFormat)
	}
	k := NewKept(span)
	for i := range k.words {
		k.words[i] = binary.LittleEndian.Uint64(b[8*i:])
		k.n += uint32(bits.OnesCount64(k.words[i]))
	}
	if tail := span % 64; k.n != n || tail != 0 && k.words[len(k.words)-1]>>tail != 0 {
		return nil, fmt.Errorf("table of kept clusters at %d: %w: it names %d clusters, want %d below %d", off, ErrFormat, k.n, n, span)
	}
	return k.Seal(), nil
}

// Run is the first run of neighbours that are in, from cluster from on, at most most
// of them; n is 0 if there is none.
func (k *Kept) Run(from, most uint32) (first, n uint32) {
	for first = from; first < k.span && !k.Has(first); first++ {
	}
	for n < most && k.Has(first+n) {
		n++
	}
	return first, n
}
