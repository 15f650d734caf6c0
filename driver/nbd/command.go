package nbd

import (
	"errors"
	"fmt"

	"scoria/driver/block"
)

// holeThreshold is the length in bytes from which reads with structured replies
// look for holes; for shorter ones asking costs more than it saves.
const holeThreshold = 64 << 10

// Errors that commands end with besides those of package block.
var (
	errCommand  = errors.New("unknown command")
	errFlags    = errors.New("flags not valid for this command")
	errTooLarge = errors.New("request too large")
	errNotFast  = errors.New("zeroing parts of blocks is not fast")
	errNoMeta   = errors.New("no metadata context was negotiated for this export")
)

// dispatch starts an operation: at once as part of the batch, or in a goroutine
// of its own if it takes several steps. Called by the reader.
func (c *conn) dispatch(o *op) {
	cmd := &o.cmd
	if cmd.typ >= cmdCount || cmdNames[cmd.typ] == "" {
		c.fail(o, fmt.Errorf("command %d: %w", cmd.typ, errCommand))
		return
	}
	if bad := cmd.flags &^ allowedFlags(cmd.typ, c.structured); bad != 0 {
		c.fail(o, fmt.Errorf("%s with flags %#x: %w", cmdNames[cmd.typ], bad, errFlags))
		return
	}
	var flags block.Flags
	if cmd.flags&cmdFlagFUA != 0 {
		flags |= block.FUA
	}
	if cmd.flags&cmdFlagNoHole != 0 {
		flags |= block.NoUnmap
	}
	switch cmd.typ {
	case cmdRead:
		c.dispatchRead(o)
	case cmdFlush:
		c.enqueue(o, block.OpFlush, 0)
	case cmdBlockStatus:
		go c.blockStatus(o)
	case cmdWrite:
		c.dispatchChange(o, block.OpWrite, flags)
	case cmdTrim:
		c.dispatchChange(o, block.OpDiscard, flags)
	case cmdWriteZeroes:
		c.dispatchChange(o, block.OpWriteZeroes, flags)
	}
}

func (c *conn) dispatchRead(o *op) {
	sparse := c.structured && o.cmd.length >= holeThreshold && o.cmd.flags&cmdFlagDF == 0
	switch {
	case o.cmd.length > maxPayload:
		c.fail(o, fmt.Errorf("read of %d bytes, at most %d are allowed: %w", o.cmd.length, maxPayload, errTooLarge))
	case sparse || !c.aligned(o):
		go c.readInSteps(o, sparse)
	default:
		c.enqueue(o, block.OpRead, 0)
	}
}

// dispatchChange starts what changes data, provided that the claim can be had.
func (c *conn) dispatchChange(o *op, opcode block.Op, flags block.Flags) {
	if err := c.claim(); err != nil {
		c.fail(o, err)
		return
	}
	oneStep := c.aligned(o) && (opcode == block.OpWrite || uint64(o.cmd.length) <= c.maxZero)
	if oneStep && c.exp.gate.tryShared() {
		o.gated = true
		c.enqueue(o, opcode, flags)
		return
	}
	go c.changeInSteps(o, opcode, flags)
}

func (c *conn) aligned(o *op) bool {
	return (o.cmd.offset|uint64(o.cmd.length))&(c.lb-1) == 0
}

// inside checks that a command lies inside the volume, before its range is
// widened or cut to blocks.
func (c *conn) inside(cmd *request) error {
	size := c.dev.Info().Size
	if cmd.offset > size || uint64(cmd.length) > size-cmd.offset {
		return fmt.Errorf("%d bytes at %d of a volume of %d bytes: %w", cmd.length, cmd.offset, size, block.ErrRange)
	}
	return nil
}

// run submits requests and waits for all; the first error counts. Not for the
// reader.
func (c *conn) run(reqs []*block.Request) error {
	if c.ended.Load() {
		return block.ErrCanceled
	}
	done := make(chan struct{}, len(reqs))
	for _, r := range reqs {
		r.Owner = c
		r.Complete = func(*block.Request) { done <- struct{}{} }
	}
	c.dev.Submit(reqs)
	for _, r := range reqs {
		if !r.Ended {
			<-done
		}
	}
	for _, r := range reqs {
		if r.Err != nil {
			return r.Err
		}
	}
	return nil
}

// readInSteps reads a range that is not aligned, or whose holes are not to be
// sent. It prepares the reply itself.
func (c *conn) readInSteps(o *op, sparse bool) {
	defer c.finish(o)
	off, data := o.cmd.offset, o.buf.data
	if o.err = c.inside(&o.cmd); o.err != nil || len(data) == 0 {
		return
	}
	extents := []block.Extent{{Offset: off, Length: uint64(len(data)), Mapped: true}}
	if sparse {
		if extents, o.err = c.extents(off, uint64(len(data)), maxChunks, true); o.err != nil {
			return
		}
	}
	var reqs []*block.Request
	for _, e := range extents {
		if e.Mapped {
			reqs = c.appendReads(reqs, e.Offset, data[e.Offset-off:][:e.Length])
		}
	}
	if o.err = c.run(reqs); o.err != nil || !c.structured {
		return
	}
	for i, e := range extents {
		var flags uint16
		if i == len(extents)-1 {
			flags = chunkDone
		}
		if e.Mapped {
			o.parts = append(o.parts, appendDataChunk(nil, flags, o.cmd.cookie, e.Offset, uint32(e.Length)), data[e.Offset-off:][:e.Length])
		} else {
			o.parts = append(o.parts, appendHoleChunk(nil, flags, o.cmd.cookie, e.Offset, uint32(e.Length)))
		}
	}
}

// extents asks the device for at most limit extents of [off, off+length),
// neighbours of one kind joined. With fill, what the limit cut off is called
// mapped, so that the list always covers the range.
func (c *conn) extents(off, length uint64, limit int, fill bool) ([]block.Extent, error) {
	list, err := gatherExtents(limit, func(fn func(block.Extent) bool) error { return c.dev.BlockStatus(c.ctx, off, length, fn) })
	if err != nil {
		return nil, fmt.Errorf("block status of %d bytes at %d: %w", length, off, err)
	}
	end := off
	if n := len(list); n > 0 {
		end = list[n-1].Offset + list[n-1].Length
	}
	if rest := off + length - end; fill && rest > 0 {
		if n := len(list); n > 0 && list[n-1].Mapped {
			list[n-1].Length += rest
		} else {
			list = append(list, block.Extent{Offset: end, Length: rest, Mapped: true})
		}
	}
	return list, nil
}

// appendReads appends the requests that fill p from off, widened to blocks; the
// surplus goes to memory that nobody looks at.
func (c *conn) appendReads(reqs []*block.Request, off uint64, p []byte) []*block.Request {
	c.pieces(off, p, func(from, to uint64, part []byte, at uint64) {
		r := &block.Request{Op: block.OpRead, Offset: from, Length: to - from}
		if at > from {
			r.Segments = append(r.Segments, make([]byte, at-from))
		}
		r.Segments = append(r.Segments, part)
		if end := at + uint64(len(part)); end < to {
			r.Segments = append(r.Segments, make([]byte, to-end))
		}
		reqs = append(reqs, r)
	})
	return reqs
}

// pieces cuts p, which lies at off, at block boundaries into parts whose
// enclosing blocks [from, to) fit a request.
func (c *conn) pieces(off uint64, p []byte, fn func(from, to uint64, part []byte, at uint64)) {
	for len(p) > 0 {
		from := off &^ (c.lb - 1)
		to := min((off+uint64(len(p))+c.lb-1)&^(c.lb-1), from+maxPayload)
		part := p[:min(uint64(len(p)), to-off)]
		fn(from, to, part, off)
		off += uint64(len(part))
		p = p[len(part):]
	}
}

// changeInSteps carries out a change that is not aligned, exceeds the device's
// limits or came while the gate was shut.
func (c *conn) changeInSteps(o *op, opcode block.Op, flags block.Flags) {
	defer c.finish(o)
	if o.err = c.inside(&o.cmd); o.err != nil {
		return
	}
	off, end := o.cmd.offset, o.cmd.offset+uint64(o.cmd.length)
	if opcode == block.OpDiscard {
		off, end = (off+c.lb-1)&^(c.lb-1), end&^(c.lb-1)
		if off >= end {
			return // less than a block: nothing to forget
		}
	}
	gate, giveUp := &c.exp.gate, c.ended.Load
	if (off|end)&(c.lb-1) == 0 {
		if !gate.shared(giveUp) {
			o.err = block.ErrCanceled
			return
		}
		defer gate.releaseShared()
		if opcode == block.OpWrite {
			o.err = c.run([]*block.Request{{Op: opcode, Flags: flags, Offset: off, Length: end - off, Segments: [][]byte{o.buf.data}}})
		} else {
			o.err = c.zero(opcode, flags, off, end)
		}
		return
	}
	if o.cmd.flags&cmdFlagFastZero != 0 {
		o.err = fmt.Errorf("%d bytes at %d with blocks of %d bytes: %w", o.cmd.length, off, c.lb, errNotFast)
		return
	}
	if !gate.exclusive(giveUp) {
		o.err = block.ErrCanceled
		return
	}
	defer gate.releaseExclusive()
	if opcode == block.OpWrite {
		o.err = c.modify(flags, off, o.buf.data)
	} else {
		o.err = c.zeroParts(flags, off, end)
	}
}

// zero discards or zeroes whole blocks in requests that the device takes.
func (c *conn) zero(opcode block.Op, flags block.Flags, off, end uint64) error {
	for off < end {
		n := min(end-off, c.maxZero)
		if err := c.run([]*block.Request{{Op: opcode, Flags: flags, Offset: off, Length: n}}); err != nil {
			return err
		}
		off += n
	}
	return nil
}

// zeroParts zeroes a range that begins or ends inside a block. The gate is held
// alone.
func (c *conn) zeroParts(flags block.Flags, off, end uint64) error {
	first, last := (off+c.lb-1)&^(c.lb-1), end&^(c.lb-1)
	if first > last { // inside one block
		return c.modify(flags, off, make([]byte, end-off))
	}
	if off < first {
		if err := c.modify(flags, off, make([]byte, first-off)); err != nil {
			return err
		}
	}
	if last < end {
		if err := c.modify(flags, last, make([]byte, end-last)); err != nil {
			return err
		}
	}
	return c.zero(block.OpWriteZeroes, flags, first, last)
}

// modify writes p at off by reading the blocks of which it covers only a part.
// The gate is held alone.
func (c *conn) modify(flags block.Flags, off uint64, p []byte) (err error) {
	c.pieces(off, p, func(from, to uint64, part []byte, at uint64) {
		if err != nil {
			return
		}
		head, tail := make([]byte, c.lb), make([]byte, c.lb)
		end := at + uint64(len(part))
		var reads []*block.Request
		if at > from {
			reads = append(reads, &block.Request{Op: block.OpRead, Offset: from, Length: c.lb, Segments: [][]byte{head}})
		}
		if end < to {
			reads = append(reads, &block.Request{Op: block.OpRead, Offset: to - c.lb, Length: c.lb, Segments: [][]byte{tail}})
		}
		if err = c.run(reads); err != nil {
			return
		}
		err = c.run([]*block.Request{{
			Op: block.OpWrite, Flags: flags, Offset: from, Length: to - from,
			Segments: [][]byte{head[:at-from], part, tail[c.lb-(to-end):]},
		}})
	})
	return err
}
