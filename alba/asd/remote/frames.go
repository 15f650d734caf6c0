package remote

import (
	"bufio"
	"io"
	"sync"

	"scoria/alba/slab"
	"scoria/alba/wire"
)

// readHeader reads the next frame's header.
func readHeader(r *bufio.Reader, b []byte) (wire.Header, error) {
	if _, err := io.ReadFull(r, b[:wire.HeaderBytes]); err != nil {
		return wire.Header{}, err
	}
	return wire.DecodeHeader(b[:wire.HeaderBytes])
}

// readRest reads a frame's body and data.
func readRest(r *bufio.Reader, h *wire.Header) (body []byte, data *buffer, err error) {
	if body, err = readBody(r, h); err != nil {
		return nil, nil, err
	}
	data = newBuffer(int(h.Data))
	if _, err := io.ReadFull(r, data.b); err != nil {
		data.free()
		return nil, nil, err
	}
	return body, data, nil
}

func readBody(r *bufio.Reader, h *wire.Header) ([]byte, error) {
	body := make([]byte, h.Body)
	if _, err := io.ReadFull(r, body); err != nil {
		return nil, err
	}
	return body, h.CheckBody(body)
}

// readRequest reads the rest of a request. The values that it puts are verified as they
// come: what is wrong with one is for the backend to say.
func readRequest(r *bufio.Reader, h *wire.Header) (req wire.Request, data *buffer, err error) {
	body, err := readBody(r, h)
	if err != nil {
		return req, nil, err
	}
	memory := newBuffer(int(h.Data))
	defer func() {
		if err != nil {
			memory.free()
		}
	}()
	fill := func(p []byte) error {
		_, err := io.ReadFull(r, p)
		return err
	}
	// This refers to the data and does not look at them.
	if req, err = wire.DecodeRequest(h, body, memory.b); err != nil {
		return req, nil, err
	}
	for i := range req.Updates {
		if err = req.Updates[i].Value.CheckAsItComes(fill); err != nil {
			return req, nil, err
		}
	}
	return req, memory, nil
}

// buffer is memory for data that is used again.
type buffer struct {
	b    []byte
	slab *slab.Slab // nil if the heap has it
}

// Two sizes of buffers on the heap: pages, and what is less than most fragments.
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
	if n >= slab.MinBytes {
		s := slab.Get(n)
		return &buffer{b: s.B, slab: s}
	}
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
func (b *buffer) free() {
	if b.slab != nil {
		b.slab.Free()
		return
	}
	buffers[bufferClass(cap(b.b))].Put(b)
}
