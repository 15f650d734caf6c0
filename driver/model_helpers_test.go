package driver_test

import (
	"sync"

	"scoria/alba/vfs"
	"scoria/driver/block"
)

// readOf reads one cluster into p.
func readOf(c uint64, p []byte) *block.Request {
	return &block.Request{Op: block.OpRead, Offset: c * cluster, Length: uint64(len(p)), Segments: [][]byte{p}}
}

type counter struct {
	mu sync.Mutex
	n  int
}

func (c *counter) next() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.n++
	return c.n
}

// goOnFrom starts anew on what a loss of power left; the engine was abandoned.
func (w *world) goOnFrom(clone *vfs.Mem) {
	w.t.Helper()
	w.fs = clone
	w.boot++
	w.start()
	w.open()
}
