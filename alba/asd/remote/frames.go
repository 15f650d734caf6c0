package remote

import (
	"bufio"
	"io"
	"net"
	"sync"
	"time"

	"scoria/alba/wire"
)

// outgoing is a frame on its way to the writer of a connection.
type outgoing struct {
	frame []byte
	data  [][]byte
	// claim, if set, is asked before the first byte is written; with false the
	// frame is left out.
	claim func() bool
	// written, if set, is called when data is no longer needed.
	written func()
}

// maxBatch bounds the frames of one write.
const maxBatch = 64

// writeFrames writes what comes from queue until stop is closed or a write
// fails, as many frames per system call as wait. Each write must make progress
// within timeout. What is left in the queue is for the caller.
func writeFrames(c net.Conn, queue <-chan *outgoing, stop <-chan struct{}, timeout time.Duration) error {
	var batch []*outgoing
	for {
		batch = batch[:0]
		select {
		case o := <-queue:
			batch = append(batch, o)
		case <-stop:
			return nil
		}
		for more := true; more && len(batch) < maxBatch; {
			select {
			case o := <-queue:
				batch = append(batch, o)
			default:
				more = false
			}
		}
		var bufs net.Buffers
		for _, o := range batch {
			if o.claim == nil || o.claim() {
				bufs = append(append(bufs, o.frame), o.data...)
			}
		}
		err := writeAll(c, bufs, timeout)
		for _, o := range batch {
			if o.written != nil {
				o.written()
			}
		}
		if err != nil {
			return err
		}
	}
}

func writeAll(c net.Conn, bufs net.Buffers, timeout time.Duration) error {
	if len(bufs) == 0 {
		return nil
	}
	if err := c.SetWriteDeadline(time.Now().Add(timeout)); err != nil {
		return err
	}
	_, err := bufs.WriteTo(c)
	return err
}

// readHeader reads the next frame's header.
func readHeader(r *bufio.Reader, b []byte) (wire.Header, error) {
	if _, err := io.ReadFull(r, b[:wire.HeaderBytes]); err != nil {
		return wire.Header{}, err
	}
	return wire.DecodeHeader(b[:wire.HeaderBytes])
}

// readRest reads a frame's body and data.
func readRest(r *bufio.Reader, h *wire.Header) (body []byte, data *buffer, err error) {
	body = make([]byte, h.Body)
	if _, err := io.ReadFull(r, body); err != nil {
		return nil, nil, err
	}
	if err := h.CheckBody(body); err != nil {
		return nil, nil, err
	}
	data = newBuffer(int(h.Data))
	if _, err := io.ReadFull(r, data.b); err != nil {
		data.free()
		return nil, nil, err
	}
	return body, data, nil
}

// buffer is memory for data that is used again.
type buffer struct{ b []byte }

// Two sizes of buffers: pages and fragments.
var buffers = [2]sync.Pool{}

const smallBuffer = 64 << 10

func bufferClass(n int) int {
	if n <= smallBuffer {
		return 0
	}
	return 1
}

// newBuffer returns a buffer of n bytes with any contents.
func newBuffer(n int) *buffer {
	b, _ := buffers[bufferClass(n)].Get().(*buffer)
	if b == nil {
		b = new(buffer)
	}
	if cap(b.b) < n {
		b.b = make([]byte, n)
	}
	b.b = b.b[:n]
	return b
}

// free gives the memory back.
func (b *buffer) free() { buffers[bufferClass(cap(b.b))].Put(b) }
