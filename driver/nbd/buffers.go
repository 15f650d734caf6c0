package nbd

import (
	"math/bits"
	"sync"
)

// bufferPool lends payload buffers in powers of two from 4 KiB to 32 MiB.
type bufferPool struct {
	classes [14]sync.Pool // of *buffer
}

// buffer is a lent buffer; data has the length that was asked for.
type buffer struct {
	data  []byte
	class int
}

const minBuffer = 4096

// bufferClass returns the class whose buffers hold n bytes, and their size.
func bufferClass(n int) (class, size int) {
	if n > minBuffer {
		class = bits.Len(uint(n-1)) - 12
	}
	return class, minBuffer << class
}

func (p *bufferPool) get(n int) *buffer {
	class, size := bufferClass(n)
	b, _ := p.classes[class].Get().(*buffer)
	if b == nil {
		b = &buffer{data: make([]byte, size), class: class}
	}
	b.data = b.data[:n]
	return b
}

func (p *bufferPool) put(b *buffer) { p.classes[b.class].Put(b) }
