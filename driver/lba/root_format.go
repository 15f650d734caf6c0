package lba

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"iter"
	"math"

	"github.com/google/uuid"
)

// A root object describes one checkpoint:
//
//	 0  magic "SCLBROOT"                          8 bytes
//	 8  version, 1                                4
//	12  length of the blob                        4
//	16  volume UUID                              16
//	32  sequence number, from 1 on                8
//	40  log position: SCO number                  8
//	48                record index                8
//	56  size of the volume, clusters              8
//	64  mapped clusters                           8
//	72  blob
//	    directory: runs, then one byte 0
//	    number of leaves                          8
//	    CRC32C of all before                      4
//
// Numbers are little-endian, in the directory uvarints. A run is a stretch of
// consecutive leaves whose pages are consecutive in one object:
//
//	number of leaves, from 1 on
//	leaves since the end of the run before, which are empty
//	object number, from 1 on
//	page index of the first leaf
const (
	rootMagic        = "SCLBROOT"
	rootVersion      = 1
	rootHeaderBytes  = 72
	rootTrailerBytes = 12

	// MaxBlobBytes bounds the driver's part of a root.
	MaxBlobBytes = 1 << 30
	// MaxRootBytes bounds a root: one run per leaf of the largest volume, and the blob.
	MaxRootBytes = MaxBlobBytes + MaxLeaves*16
)

// Root is the root object of a checkpoint.
type Root struct {
	Volume    uuid.UUID
	Sequence  uint64 // of the checkpoint, from 1 on
	LogSCO    uint64 // log position up to which the checkpoint goes: SCO number …
	LogRecord uint64 // … and index of the first record in it that is not contained
	Clusters  uint64 // size of the volume
	Mapped    uint64 // clusters
	Blob      []byte // the driver's own
	// Directory yields the leaves that are not empty, ascending, and where their
	// pages are: Checkpoint.Directory when encoding, for Map.RestoreDirectory
	// when decoded.
	Directory iter.Seq2[uint64, PageAddr]
}

// check says what is wrong with the fixed fields.
func (r *Root) check() error {
	switch {
	case r.Sequence == 0:
		return fmt.Errorf("%w: sequence number 0: must be at least 1", ErrFormat)
	case r.Clusters == 0 || r.Clusters > MaxClusters:
		return fmt.Errorf("%w: volume of %d clusters: must be 1 to %d", ErrFormat, r.Clusters, uint64(MaxClusters))
	case len(r.Blob) > MaxBlobBytes:
		return fmt.Errorf("%w: blob of %d bytes: must be at most %d", ErrFormat, len(r.Blob), MaxBlobBytes)
	}
	return nil
}

// checkMapped says whether so many mapped clusters fit so many leaves.
func (r *Root) checkMapped(leaves uint64) error {
	if most := min(leaves*LeafClusters, r.Clusters); r.Mapped < leaves || r.Mapped > most {
		return fmt.Errorf("%w: %d clusters mapped in %d leaves: must be %d to %d", ErrFormat, r.Mapped, leaves, leaves, most)
	}
	return nil
}

// run is consecutive leaves whose pages are consecutive.
type run struct {
	leaf, count uint64
	addr        PageAddr // of the first leaf
}

// extends: the leaf at addr continues the run.
func (r *run) extends(leaf uint64, addr PageAddr) bool {
	return r.count > 0 && leaf == r.leaf+r.count && addr == r.addr+PageAddr(r.count) && addr.Object() == r.addr.Object()
}

// Encode writes the root. It fails with ErrFormat if the root contradicts itself.
func (r *Root) Encode(w io.Writer) error {
	if err := r.check(); err != nil {
		return fmt.Errorf("encode map root: %w", err)
	}
	e := &rootEncoder{w: bufio.NewWriterSize(w, 64<<10)}
	head := make([]byte, rootHeaderBytes)
	copy(head, rootMagic)
	le.PutUint32(head[8:], rootVersion)
	le.PutUint32(head[12:], uint32(len(r.Blob)))
	copy(head[16:32], r.Volume[:])
	for i, field := range []uint64{r.Sequence, r.LogSCO, r.LogRecord, r.Clusters, r.Mapped} {
		le.PutUint64(head[32+8*i:], field)
	}
	e.write(head)
	e.write(r.Blob)
	leaves, err := e.directory(r)
	if err == nil {
		err = r.checkMapped(leaves)
	}
	if err != nil {
		return fmt.Errorf("encode map root: %w", err)
	}
	e.write(le.AppendUint64(nil, leaves))
	e.write(le.AppendUint32(nil, e.crc))
	if err := e.w.Flush(); err != nil { // sticky: the first error of all
		return fmt.Errorf("encode map root: %w", err)
	}
	return nil
}

type rootEncoder struct {
	w   *bufio.Writer
	crc uint32
	end uint64 // of the last run written
	buf []byte
}

func (e *rootEncoder) write(p []byte) {
	e.crc = crc32.Update(e.crc, castagnoli, p)
	_, _ = e.w.Write(p) // Flush tells
}

// directory writes the runs and their end.
func (e *rootEncoder) directory(r *Root) (leaves uint64, err error) {
	var pending run
	limit := (r.Clusters + LeafClusters - 1) / LeafClusters
	for leaf, addr := range r.Directory {
		if pending.extends(leaf, addr) && leaf < limit {
			pending.count++
			leaves++
			continue
		}
		if leaf < pending.leaf+pending.count || leaf >= limit || addr.Object() == 0 {
			return 0, fmt.Errorf("%w: leaf %d at %v does not ascend below %d or has no address", ErrFormat, leaf, addr, limit)
		}
		e.run(pending)
		pending = run{leaf, 1, addr}
		leaves++
	}
	e.run(pending)
	e.write([]byte{0})
	return leaves, nil
}

func (e *rootEncoder) run(r run) {
	if r.count == 0 {
		return
	}
	b := binary.AppendUvarint(e.buf[:0], r.count)
	b = binary.AppendUvarint(b, r.leaf-e.end)
	b = binary.AppendUvarint(b, uint64(r.addr.Object()))
	b = binary.AppendUvarint(b, uint64(r.addr.Page()))
	e.end, e.buf = r.leaf+r.count, b
	e.write(b)
}

// DecodeRoot verifies and decodes a root. The result refers to b.
func DecodeRoot(b []byte) (*Root, error) {
	r, err := decodeRoot(b)
	if err != nil {
		return nil, fmt.Errorf("decode map root: %w", err)
	}
	return r, nil
}

func decodeRoot(b []byte) (*Root, error) {
	if len(b) < rootHeaderBytes+1+rootTrailerBytes {
		return nil, fmt.Errorf("%w: %d bytes: too short", ErrFormat, len(b))
	}
	// Magic and version first: they tell a foreign file from a damaged one.
	if string(b[:8]) != rootMagic {
		return nil, fmt.Errorf("%w: magic %q: must be %q", ErrFormat, b[:8], rootMagic)
	}
	if v := le.Uint32(b[8:]); v != rootVersion {
		return nil, fmt.Errorf("%w: version %d: must be %d", ErrFormat, v, rootVersion)
	}
	body, trailer := b[:len(b)-rootTrailerBytes], b[len(b)-rootTrailerBytes:]
	if crc32.Checksum(b[:len(b)-4], castagnoli) != le.Uint32(trailer[8:]) {
		return nil, ErrChecksum
	}
	blob := uint64(le.Uint32(b[12:]))
	if blob > uint64(len(body)-rootHeaderBytes) {
		return nil, fmt.Errorf("%w: blob of %d bytes in a root of %d", ErrFormat, blob, len(b))
	}
	r := &Root{
		Volume:    uuid.UUID(b[16:32]),
		Sequence:  le.Uint64(b[32:]),
		LogSCO:    le.Uint64(b[40:]),
		LogRecord: le.Uint64(b[48:]),
		Clusters:  le.Uint64(b[56:]),
		Mapped:    le.Uint64(b[64:]),
		Blob:      body[rootHeaderBytes : rootHeaderBytes+blob : rootHeaderBytes+blob],
	}
	if err := r.check(); err != nil {
		return nil, err
	}
	runs := body[rootHeaderBytes+blob:]
	leaves, err := checkRuns(runs, (r.Clusters+LeafClusters-1)/LeafClusters)
	if err != nil {
		return nil, err
	}
	if stated := le.Uint64(trailer); stated != leaves {
		return nil, fmt.Errorf("%w: %d leaves in the directory: must be %d", ErrFormat, leaves, stated)
	}
	if err := r.checkMapped(leaves); err != nil {
		return nil, err
	}
	r.Directory = func(yield func(uint64, PageAddr) bool) { yieldRuns(runs, yield) }
	return r, nil
}

// nextRun decodes the run at the beginning of b; end is where the run before
// ended. ok is false if b is malformed; a run of no leaves is the end.
func nextRun(b []byte, end uint64) (r run, rest []byte, ok bool) {
	var field [4]uint64
	for i := range field {
		v, n := binary.Uvarint(b)
		if n <= 0 {
			return run{}, nil, false
		}
		field[i], b = v, b[n:]
		if i == 0 && v == 0 {
			return run{}, b, true
		}
	}
	count, gap, object, page := field[0], field[1], field[2], field[3]
	if count > MaxLeaves || gap > MaxLeaves || object == 0 || object > math.MaxUint32 || page > math.MaxUint32-(count-1) {
		return run{}, nil, false
	}
	return run{end + gap, count, MakePageAddr(uint32(object), uint32(page))}, b, true
}

// checkRuns verifies a directory of leaves below limit and counts them.
func checkRuns(b []byte, limit uint64) (leaves uint64, err error) {
	size, end := len(b), uint64(0)
	for {
		r, rest, ok := nextRun(b, end)
		if !ok || r.leaf+r.count > limit {
			return 0, fmt.Errorf("%w: directory at byte %d, behind leaf %d of %d", ErrFormat, size-len(b), end, limit)
		}
		if r.count == 0 {
			if len(rest) > 0 {
				return 0, fmt.Errorf("%w: %d bytes behind the directory", ErrFormat, len(rest))
			}
			return leaves, nil
		}
		b, end = rest, r.leaf+r.count
		leaves += r.count
	}
}

// yieldRuns yields the leaves of a verified directory.
func yieldRuns(b []byte, yield func(uint64, PageAddr) bool) {
	for end := uint64(0); ; {
		r, rest, ok := nextRun(b, end)
		if !ok || r.count == 0 {
			return
		}
		for i := range r.count {
			if !yield(r.leaf+i, r.addr+PageAddr(i)) {
				return
			}
		}
		b, end = rest, r.leaf+r.count
	}
}

// ReadRoot reads and decodes a root of size bytes.
func ReadRoot(r io.ReaderAt, size int64) (*Root, error) {
	if size < 0 || size > MaxRootBytes {
		return nil, fmt.Errorf("read map root: %w: %d bytes: must be at most %d", ErrFormat, size, int64(MaxRootBytes))
	}
	// In steps, so that a wrong size costs no memory.
	const step = 8 << 20
	var b []byte
	for int64(len(b)) < size {
		n := len(b)
		b = append(b, make([]byte, min(step, size-int64(n)))...)
		if err := readFull(r, b[n:], int64(n)); err != nil {
			if errors.Is(err, io.ErrUnexpectedEOF) {
				err = fmt.Errorf("%w: %w", ErrFormat, err)
			}
			return nil, fmt.Errorf("read map root: %w", err)
		}
	}
	return DecodeRoot(b)
}
