package stream

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
)

// Extent is one record of a stream.
type Extent struct {
	Offset, Length uint64 // bytes
	Data           []byte // nil: zeroes; valid until the next call
}

// Reader reads a stream and verifies all of it.
type Reader struct {
	r      io.Reader
	header Header
	next   uint64
	crc    uint32
	totals Totals
	ended  bool
	record [recordBytes]byte
	buf    []byte
}

// NewReader reads a stream's header.
func NewReader(r io.Reader) (*Reader, error) {
	var b [preambleBytes]byte
	if err := fill(r, b[:], "preamble"); err != nil {
		return nil, err
	}
	if string(b[:8]) != magic {
		return nil, fmt.Errorf("%w: it begins with %q", ErrFormat, b[:8])
	}
	if v := binary.LittleEndian.Uint16(b[8:]); v != Version {
		return nil, fmt.Errorf("%w: it has version %d, this program knows %d", ErrVersion, v, Version)
	}
	n := binary.LittleEndian.Uint32(b[12:])
	if n > maxHeader || b[10]|b[11]|b[20]|b[21]|b[22]|b[23] != 0 {
		return nil, fmt.Errorf("%w: header of %d bytes", ErrFormat, n)
	}
	body := make([]byte, n)
	if err := fill(r, body, "header"); err != nil {
		return nil, err
	}
	sum := crc32.Checksum(body, castagnoli)
	if sum != binary.LittleEndian.Uint32(b[16:]) {
		return nil, fmt.Errorf("%w: the header fails its checksum", ErrFormat)
	}
	s := &Reader{r: r, crc: sum}
	d := json.NewDecoder(bytes.NewReader(body))
	d.DisallowUnknownFields()
	if err := d.Decode(&s.header); err != nil {
		return nil, fmt.Errorf("%w: header: %w", ErrFormat, err)
	}
	s.next = s.header.Start
	return s, s.header.check()
}

// Header returns what the stream says it has.
func (s *Reader) Header() Header { return s.header }

// Totals returns what was read so far.
func (s *Reader) Totals() Totals { return s.totals }

// Next returns the next extent, and io.EOF behind the last one if the trailer was
// there and right. Extents come in order and don't overlap.
func (s *Reader) Next() (Extent, error) {
	if s.ended {
		return Extent{}, io.EOF
	}
	b := s.record[:]
	if err := fill(s.r, b, "record"); err != nil {
		return Extent{}, err
	}
	e := Extent{Offset: binary.LittleEndian.Uint64(b[8:]), Length: binary.LittleEndian.Uint64(b[16:])}
	payload, err := s.payload(b[0], e.Length)
	if err != nil {
		return e, err
	}
	if got, want := recordSum(s.crc, b, payload), binary.LittleEndian.Uint32(b[4:]); got != want {
		return e, fmt.Errorf("%w: record %d, at byte %d of the volume, fails its checksum", ErrFormat, s.totals.Records, s.next)
	}
	s.crc = binary.LittleEndian.Uint32(b[4:])
	if b[1]|b[2]|b[3] != 0 {
		return e, fmt.Errorf("%w: record %d has a flag that is not known", ErrFormat, s.totals.Records)
	}
	if b[0] == typeEnd {
		return Extent{}, s.end(e.Offset, payload)
	}
	if e.Offset < s.next || e.Length == 0 || e.Offset > s.header.Size || e.Length > s.header.Size-e.Offset {
		return e, fmt.Errorf("%w: record %d has %d bytes at %d, expected from %d to %d", ErrFormat, s.totals.Records, e.Length, e.Offset, s.next, s.header.Size)
	}
	s.next = e.Offset + e.Length
	s.totals.Records++
	if b[0] == typeZero {
		s.totals.ZeroBytes += e.Length
		return e, nil
	}
	s.totals.DataBytes += e.Length
	e.Data = payload
	return e, nil
}

// payload reads what follows a record of a type.
func (s *Reader) payload(typ byte, length uint64) ([]byte, error) {
	switch {
	case typ == typeZero:
		return nil, nil
	case typ == typeData && length <= MaxData, typ == typeEnd && length == endBytes:
	default:
		return nil, fmt.Errorf("%w: record %d has type %d and %d bytes", ErrFormat, s.totals.Records, typ, length)
	}
	if cap(s.buf) < int(length) {
		s.buf = make([]byte, length)
	}
	p := s.buf[:length]
	return p, fill(s.r, p, "data")
}

func (s *Reader) end(records uint64, p []byte) error {
	want := Totals{records, binary.LittleEndian.Uint64(p), binary.LittleEndian.Uint64(p[8:])}
	if s.totals != want {
		return fmt.Errorf("%w: its trailer counts %+v, it had %+v", ErrFormat, want, s.totals)
	}
	s.ended = true
	return io.EOF
}

func fill(r io.Reader, p []byte, what string) error {
	_, err := io.ReadFull(r, p)
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return fmt.Errorf("%w: %s", ErrTruncated, what)
	}
	if err != nil {
		return fmt.Errorf("volume stream: %s: %w", what, err)
	}
	return nil
}
