package vhost

import (
	"encoding/binary"
	"errors"
	"fmt"

	"scoria/driver/block"
	"scoria/shm/mem"
	"scoria/shm/worker"
	"scoria/vhost/virtq"
)

// Request types and status bytes (virtio 1.1, 5.2.6).
const (
	blkIn          = 0
	blkOut         = 1
	blkFlush       = 4
	blkGetID       = 8
	blkDiscard     = 11
	blkWriteZeroes = 13

	statusOK    = 0
	statusIOErr = 1
	statusUnsup = 2

	blkHeaderBytes  = 16
	discardSegBytes = 16
	idBytes         = 20

	// maxSegments bounds the pieces of one request, which follow from the number
	// of descriptors (segMax is announced) and of region borders crossed.
	maxSegments = 2*segMax + 4
)

// Errors of requests whose form forbids to answer them: they end the session.
var (
	errHeader  = errors.New("request is too short for its header")
	errStatus  = errors.New("request has no room for its status")
	errAddress = errors.New("address is not in guest memory")
)

// slot is what a queue keeps of a request besides worker.Slot. A queue has as
// many as its ring has descriptors.
type slot struct {
	*worker.Slot
	gen     *generation // the memory that Req.Segments and status point to
	status  []byte      // one byte of guest memory
	written uint32      // bytes for the used ring, status included
	head    uint16
	taken   bool // counted in gen
	code    byte // status of what the device does not see
}

// verdict says what to do with a request.
type verdict int

const (
	submit verdict = iota // to the device
	answer                // with the status given
)

// prepare turns a chain into a block.Request whose segments point into t. An
// error means that the request can't be answered in the ring.
func (s *slot) prepare(c *virtq.Chain, t *mem.Table, dev *deviceView) (verdict, byte, error) {
	s.head = c.Head
	readable, writable := c.Descs[:c.Writable], c.Descs[c.Writable:]
	if len(writable) == 0 {
		return answer, 0, errStatus
	}
	last := &writable[len(writable)-1]
	last.Len--
	if s.status = t.Slice(last.Addr+uint64(last.Len), 1); s.status == nil {
		return answer, 0, fmt.Errorf("status at %#x: %w", last.Addr+uint64(last.Len), errAddress)
	}
	if last.Len == 0 {
		writable = writable[:len(writable)-1]
	}
	var header [blkHeaderBytes]byte
	readable, err := gather(header[:], readable, t)
	if err != nil {
		return answer, 0, err
	}
	in := totalBytes(writable)
	s.written = uint32(min(in, 1<<31)) + 1

	r := &s.Req
	sector := binary.LittleEndian.Uint64(header[8:])
	switch binary.LittleEndian.Uint32(header[:]) {
	case blkIn:
		r.Op = block.OpRead
		return s.prepareData(sector, writable, in, t)
	case blkOut:
		r.Op = block.OpWrite
		if dev.writeThrough {
			r.Flags = block.FUA
		}
		return s.prepareData(sector, readable, totalBytes(readable), t)
	case blkFlush:
		r.Op, r.Offset, r.Length, r.Segments = block.OpFlush, 0, 0, r.Segments[:0]
		s.Block = true
		return submit, 0, nil
	case blkGetID:
		return s.answerID(dev, writable, t)
	case blkDiscard:
		r.Op = block.OpDiscard
		return s.prepareDiscard(dev, readable, t)
	case blkWriteZeroes:
		r.Op = block.OpWriteZeroes
		return s.prepareDiscard(dev, readable, t)
	}
	// What the slot's last request wrote to is not this one's: see logRequest.
	r.Segments = r.Segments[:0]
	return answer, statusUnsup, nil
}

// gather copies len(p) bytes from the start of descs, each byte once, and
// returns what is left of them.
func gather(p []byte, descs []virtq.Desc, t *mem.Table) ([]virtq.Desc, error) {
	for len(p) > 0 {
		if len(descs) == 0 {
			return nil, errHeader
		}
		d := &descs[0]
		n := min(uint64(len(p)), uint64(d.Len))
		if !t.ReadAt(p[:n], d.Addr) {
			return nil, fmt.Errorf("header of %d bytes at %#x: %w", n, d.Addr, errAddress)
		}
		p = p[n:]
		d.Addr += n
		d.Len -= uint32(n)
		if d.Len == 0 {
			descs = descs[1:]
		}
	}
	return descs, nil
}

func totalBytes(descs []virtq.Desc) (n uint64) {
	for i := range descs {
		n += uint64(descs[i].Len)
	}
	return n
}

// prepareData fills in a read or a write. The device checks range and alignment.
func (s *slot) prepareData(sector uint64, descs []virtq.Desc, length uint64, t *mem.Table) (verdict, byte, error) {
	r := &s.Req
	r.Segments = r.Segments[:0]
	for i := range descs {
		var ok bool
		if r.Segments, ok = t.AppendSlices(r.Segments, descs[i].Addr, uint64(descs[i].Len)); !ok {
			return answer, 0, fmt.Errorf("%v of %d bytes at %#x: %w", r.Op, descs[i].Len, descs[i].Addr, errAddress)
		}
		if len(r.Segments) > maxSegments {
			return answer, statusIOErr, nil
		}
	}
	if length > block.MaxRequestBytes || sector > 1<<54 {
		return answer, statusIOErr, nil
	}
	r.Offset, r.Length = sector*block.SectorSize, length
	s.Block = true
	return submit, 0, nil
}

// prepareDiscard fills in a discard or write-zeroes request of one segment: the
// configuration space announces no more (virtio 1.1, 5.2.6).
func (s *slot) prepareDiscard(dev *deviceView, descs []virtq.Desc, t *mem.Table) (verdict, byte, error) {
	if totalBytes(descs) != discardSegBytes {
		return answer, statusIOErr, nil
	}
	var seg [discardSegBytes]byte
	if _, err := gather(seg[:], descs, t); err != nil {
		return answer, 0, err
	}
	const unmap = 1
	sector, sectors := binary.LittleEndian.Uint64(seg[:]), binary.LittleEndian.Uint32(seg[8:])
	flags := binary.LittleEndian.Uint32(seg[12:])
	r := &s.Req
	if flags&^unmap != 0 || r.Op == block.OpDiscard && flags != 0 {
		return answer, statusUnsup, nil
	}
	if sectors > dev.maxDiscardSectors || sector > 1<<54 {
		return answer, statusIOErr, nil
	}
	if r.Op == block.OpWriteZeroes && flags&unmap == 0 {
		r.Flags |= block.NoUnmap
	}
	if dev.writeThrough {
		r.Flags |= block.FUA
	}
	r.Segments = r.Segments[:0]
	r.Offset, r.Length = sector*block.SectorSize, uint64(sectors)*block.SectorSize
	s.Block = true
	return submit, 0, nil
}

// answerID writes the serial, padded with zeroes, as far as there is room.
func (s *slot) answerID(dev *deviceView, descs []virtq.Desc, t *mem.Table) (verdict, byte, error) {
	var id [idBytes]byte
	copy(id[:], dev.serial)
	rest := id[:]
	r := &s.Req
	r.Op, r.Segments = block.OpRead, r.Segments[:0]
	for i := range descs {
		if len(rest) == 0 {
			break
		}
		n := min(uint64(descs[i].Len), uint64(len(rest)))
		var ok bool
		if r.Segments, ok = t.AppendSlices(r.Segments, descs[i].Addr, n); !ok {
			return answer, 0, fmt.Errorf("id at %#x: %w", descs[i].Addr, errAddress)
		}
		rest = rest[n:]
	}
	rest = id[:]
	for _, seg := range r.Segments {
		rest = rest[copy(seg, rest):]
	}
	return answer, statusOK, nil
}

// deviceView is what the hot path needs to know of a device and its session.
// It is immutable; a change makes a new one.
type deviceView struct {
	serial            string
	maxDiscardSectors uint32
	writeThrough      bool
}

// statusOf maps the outcome of a request to virtio's status.
func statusOf(err error) byte {
	if err == nil {
		return statusOK
	}
	return statusIOErr
}
