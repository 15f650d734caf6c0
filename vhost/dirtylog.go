package vhost

import (
	"errors"
	"fmt"
	"sync/atomic"

	"scoria/shm/mem"
)

// logPage is the unit of the dirty log (VHOST_LOG_PAGE).
const logPage = 4096

var errLogRange = errors.New("address is not covered by the dirty log")

// dirtyLog is the bitmap of guest pages that live migration must copy again:
// one bit per page from guest address 0. Only workers mark.
type dirtyLog struct {
	mapping *mem.Mapping
	pages   uint64
	marked  *atomic.Uint64 // counts pages, each time that one is marked
}

func newDirtyLog(m *mem.Mapping, marked *atomic.Uint64) (*dirtyLog, error) {
	b := m.Bytes()
	if !mem.AlignedTo(b, 4) {
		return nil, fmt.Errorf("dirty log: offset is no multiple of 4: %w", mem.ErrRange)
	}
	return &dirtyLog{mapping: m, pages: 8 * uint64(len(b)&^3), marked: marked}, nil
}

// mark marks the pages of [addr, addr+n). It must be called after the pages
// were written: then the front end, which clears a bit before it copies the
// page, can't miss the change.
func (l *dirtyLog) mark(addr, n uint64) error {
	if n == 0 {
		return nil
	}
	first, last := addr/logPage, (addr+n-1)/logPage
	if last >= l.pages || last < first {
		return fmt.Errorf("%d bytes at %#x, log of %d pages: %w", n, addr, l.pages, errLogRange)
	}
	words := l.mapping.Bytes()
	for page := first; page <= last; page++ {
		if page%32 == 0 && last-page >= 31 {
			orWord(words, page/32, 1<<32-1)
			page += 31
			continue
		}
		orWord(words, page/32, 1<<(page%32))
	}
	l.marked.Add(last - first + 1)
	return nil
}

// markAll marks all of guest memory.
func (l *dirtyLog) markAll(t *mem.Table) error {
	for _, r := range t.Regions() {
		if err := l.mark(r.GuestAddr, r.Size()); err != nil {
			return err
		}
	}
	return nil
}

// markSlice marks memory that was found through t.
func (l *dirtyLog) markSlice(t *mem.Table, b []byte) error {
	if len(b) == 0 {
		return nil
	}
	addr, ok := t.GuestAddr(b)
	if !ok {
		panic("vhost: slice of no region")
	}
	return l.mark(addr, uint64(len(b)))
}
