package nbd

import (
	"context"
	"errors"
	"net"

	"scoria/driver/block"
)

// Bounds of one write to the socket.
const (
	maxWriteOps   = 64
	maxWriteBytes = 1 << 20
)

// writeReplies is the connection's writer: it sends replies, as many at a time
// as are ready, until the queue is closed. After a failed write it ends the
// connection and only recycles.
func (c *conn) writeReplies() {
	var (
		parts  [][]byte
		buffer net.Buffers
		sent   []*op
		broken bool
	)
	for o := range c.replies {
		parts, sent = parts[:0], sent[:0]
		n := 0
		for o != nil {
			sent = append(sent, o)
			first := len(parts)
			parts = c.appendReply(parts, o)
			for _, p := range parts[first:] {
				n += len(p)
			}
			o = nil
			if len(sent) < maxWriteOps && n < maxWriteBytes {
				select {
				case o = <-c.replies: // nil once it is closed
				default:
				}
			}
		}
		if !broken {
			buffer = parts
			if _, err := buffer.WriteTo(c.nc); err != nil {
				broken = true
				c.cancel()
			}
		}
		clear(parts)
		for _, o := range sent {
			c.recycle(o)
		}
	}
}

// appendReply appends the bytes that answer an operation, and counts it.
func (c *conn) appendReply(parts [][]byte, o *op) [][]byte {
	if o.cmd.typ < cmdCount {
		st := &c.s.stats.ops[o.cmd.typ]
		st.count.Add(1)
		st.bytes.Add(uint64(o.cmd.length))
		if o.err != nil {
			st.errors.Add(1)
		}
	}
	cookie := o.cmd.cookie
	switch {
	case o.err != nil && c.structured:
		return append(parts, appendErrorChunk(nil, cookie, errorCode(&o.cmd, o.err), o.err.Error()))
	case o.err != nil:
		return append(parts, appendSimple(o.head[:0], errorCode(&o.cmd, o.err), cookie))
	case o.parts != nil:
		return append(parts, o.parts...)
	case o.cmd.typ != cmdRead:
		return append(parts, appendSimple(o.head[:0], 0, cookie))
	case !c.structured:
		return append(parts, appendSimple(o.head[:0], 0, cookie), o.buf.data)
	case o.cmd.length == 0:
		return append(parts, appendChunk(o.head[:0], chunkDone, chunkNone, cookie, 0))
	}
	return append(parts, appendDataChunk(o.head[:0], chunkDone, cookie, o.cmd.offset, o.cmd.length), o.buf.data)
}

// errorCode maps errors to the values of "Error values".
func errorCode(cmd *request, err error) uint32 {
	var inUse *block.InUseError
	switch {
	case errors.Is(err, block.ErrRange):
		if cmd.typ == cmdWrite || cmd.typ == cmdWriteZeroes {
			return eNoSpc
		}
		return eInval
	case errors.Is(err, block.ErrAlignment), errors.Is(err, errCommand), errors.Is(err, errFlags), errors.Is(err, errNoMeta):
		return eInval
	case errors.Is(err, errTooLarge):
		return eOverflow
	case errors.Is(err, errNotFast):
		return eNotSup
	case errors.Is(err, block.ErrReadOnly), errors.As(err, &inUse):
		return ePerm
	case errors.Is(err, block.ErrCanceled), errors.Is(err, block.ErrClosed), errors.Is(err, context.Canceled):
		return eShutdown
	}
	return eIO
}
