package client

import "sync"

// allocUnit is what pieces of an arena are a multiple of, in bytes.
const allocUnit = 4096

// arena hands out pieces of a ring's data memory, first fit.
type arena struct {
	mu    sync.Mutex
	data  []byte
	free  []piece       // by offset, none adjoining
	freed chan struct{} // closed and replaced when something comes back
}

type piece struct{ off, n int }

func newArena(data []byte) *arena {
	return &arena{data: data, free: []piece{{0, len(data)}}, freed: make(chan struct{})}
}

// alloc returns n bytes, or nil and a channel that is closed when it is worth
// trying again.
func (a *arena) alloc(n int) ([]byte, <-chan struct{}) {
	size := (n + allocUnit - 1) &^ (allocUnit - 1)
	a.mu.Lock()
	defer a.mu.Unlock()
	for i := range a.free {
		p := &a.free[i]
		if p.n < size {
			continue
		}
		off := p.off
		p.off, p.n = p.off+size, p.n-size
		if p.n == 0 {
			a.free = append(a.free[:i], a.free[i+1:]...)
		}
		return a.data[off : off+n : off+size], nil
	}
	return nil, a.freed
}

// release takes back the piece at off whose capacity is n.
func (a *arena) release(off, n int) {
	a.mu.Lock()
	defer a.mu.Unlock()
	i := 0
	for i < len(a.free) && a.free[i].off < off {
		i++
	}
	before := i > 0 && a.free[i-1].off+a.free[i-1].n == off
	after := i < len(a.free) && off+n == a.free[i].off
	switch {
	case before && after:
		a.free[i-1].n += n + a.free[i].n
		a.free = append(a.free[:i], a.free[i+1:]...)
	case before:
		a.free[i-1].n += n
	case after:
		a.free[i].off, a.free[i].n = off, a.free[i].n+n
	default:
		a.free = append(a.free, piece{})
		copy(a.free[i+1:], a.free[i:])
		a.free[i] = piece{off, n}
	}
	close(a.freed)
	a.freed = make(chan struct{})
}
