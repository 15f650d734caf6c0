package stream

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"time"

	"github.com/google/uuid"
)

// Version is the format's version that this program writes.
const Version = 1

// MaxData bounds the bytes of one data record.
const MaxData = 1 << 20

const (
	magic         = "SCORIAST"
	preambleBytes = 24
	recordBytes   = 24
	endBytes      = 16
	maxHeader     = 64 << 10

	typeData = 1
	typeZero = 2
	typeEnd  = 3
)

var (
	// ErrFormat: this is no stream, or a damaged one.
	ErrFormat = errors.New("not a valid volume stream")
	// ErrVersion: a later program wrote it.
	ErrVersion = errors.New("volume stream of a version that this program does not know")
	// ErrTruncated: the stream ends before its trailer.
	ErrTruncated = errors.New("volume stream ends in the middle")
	// ErrOrder: a Writer was given extents out of order or outside the volume.
	ErrOrder = errors.New("extent out of order")
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// Snapshot identifies a snapshot wherever it is.
type Snapshot struct {
	ID       uuid.UUID         `json:"id"`
	Name     string            `json:"name"`
	Created  time.Time         `json:"created,omitzero"`
	Metadata map[string]string `json:"metadata,omitempty"`
}

// Header says what a stream has.
type Header struct {
	Volume    string    `json:"volume"` // POOL/VOLUME at the sender
	VolumeID  uuid.UUID `json:"volume_id"`
	Size      uint64    `json:"size"`       // of the volume in the snapshot, bytes
	BlockSize uint32    `json:"block_size"` // logical block, bytes
	Snapshot  Snapshot  `json:"snapshot"`   // what a receiver has in the end
	Base      *Snapshot `json:"base,omitempty"`
	Start     uint64    `json:"start"`                // first byte that the records describe
	DataBytes uint64    `json:"data_bytes,omitempty"` // sum of the data records, for progress; 0: not known
}

// check says what is wrong with a header.
func (h *Header) check() error {
	switch {
	case h.Size == 0 || h.BlockSize == 0 || h.Size%uint64(h.BlockSize) != 0:
		return fmt.Errorf("%w: size %d with blocks of %d bytes", ErrFormat, h.Size, h.BlockSize)
	case h.Start > h.Size:
		return fmt.Errorf("%w: it starts at %d of %d bytes", ErrFormat, h.Start, h.Size)
	case h.Snapshot.ID == uuid.Nil, h.Base != nil && h.Base.ID == uuid.Nil:
		return fmt.Errorf("%w: snapshot without an ID", ErrFormat)
	}
	return nil
}

// Totals are what a stream's records amount to.
type Totals struct {
	Records   uint64
	DataBytes uint64
	ZeroBytes uint64
}

// Writer writes a stream.
type Writer struct {
	w      io.Writer
	header Header
	next   uint64 // first byte that may come
	crc    uint32
	totals Totals
	record [recordBytes]byte
}

// NewWriter writes a stream's header.
func NewWriter(w io.Writer, h Header) (*Writer, error) {
	if err := h.check(); err != nil {
		return nil, err
	}
	body, err := json.Marshal(h)
	if err != nil {
		return nil, err
	}
	if len(body) > maxHeader {
		return nil, fmt.Errorf("stream header of %d bytes, at most %d are allowed: the snapshot has too much metadata", len(body), maxHeader)
	}
	b := make([]byte, preambleBytes, preambleBytes+len(body))
	copy(b, magic)
	binary.LittleEndian.PutUint16(b[8:], Version)
	binary.LittleEndian.PutUint32(b[12:], uint32(len(body)))
	crc := crc32.Checksum(body, castagnoli)
	binary.LittleEndian.PutUint32(b[16:], crc)
	if _, err := w.Write(append(b, body...)); err != nil {
		return nil, err
	}
	return &Writer{w: w, header: h, next: h.Start, crc: crc}, nil
}

// Data writes p, which lies at off, in records of at most MaxData bytes.
func (w *Writer) Data(off uint64, p []byte) error {
	for len(p) > 0 {
		part := p[:min(len(p), MaxData)]
		if err := w.advance(off, uint64(len(part))); err != nil {
			return err
		}
		if err := w.put(typeData, off, uint64(len(part)), part); err != nil {
			return err
		}
		w.totals.DataBytes += uint64(len(part))
		off += uint64(len(part))
		p = p[len(part):]
	}
	return nil
}

// Zero says that length bytes from off on read as zeroes.
func (w *Writer) Zero(off, length uint64) error {
	if length == 0 {
		return nil
	}
	if err := w.advance(off, length); err != nil {
		return err
	}
	if err := w.put(typeZero, off, length, nil); err != nil {
		return err
	}
	w.totals.ZeroBytes += length
	return nil
}

func (w *Writer) advance(off, length uint64) error {
	if off < w.next || off > w.header.Size || length > w.header.Size-off {
		return fmt.Errorf("%w: %d bytes at %d, expected from %d to %d", ErrOrder, length, off, w.next, w.header.Size)
	}
	w.next = off + length
	return nil
}

// End writes the trailer. A stream without one is truncated.
func (w *Writer) End() error {
	var p [endBytes]byte
	binary.LittleEndian.PutUint64(p[:], w.totals.DataBytes)
	binary.LittleEndian.PutUint64(p[8:], w.totals.ZeroBytes)
	return w.put(typeEnd, w.totals.Records, endBytes, p[:])
}

// Totals returns what was written so far.
func (w *Writer) Totals() Totals { return w.totals }

func (w *Writer) put(typ byte, off, length uint64, payload []byte) error {
	b := w.record[:]
	clear(b)
	b[0] = typ
	binary.LittleEndian.PutUint64(b[8:], off)
	binary.LittleEndian.PutUint64(b[16:], length)
	w.crc = recordSum(w.crc, b, payload)
	binary.LittleEndian.PutUint32(b[4:], w.crc)
	w.totals.Records++
	if _, err := w.w.Write(b); err != nil {
		return err
	}
	if len(payload) == 0 {
		return nil
	}
	_, err := w.w.Write(payload)
	return err
}

func recordSum(before uint32, record, payload []byte) uint32 {
	var first [8]byte
	binary.LittleEndian.PutUint32(first[:], before)
	copy(first[4:], record[:4])
	sum := crc32.Update(0, castagnoli, first[:])
	sum = crc32.Update(sum, castagnoli, record[8:recordBytes])
	return crc32.Update(sum, castagnoli, payload)
}
