package lba

import "sync"

const (
	hugeBytes     = 2 << 20
	maxChunkBytes = 1 << 30
)

// arena hands out zeroed pages. It maps memory in growing chunks and keeps all
// of it until close, so that a reader with an outdated directory entry still
// reads mapped memory. Free pages are chained through their first word.
type arena struct {
	mu     sync.Mutex
	free   uintptr // first free page, 0 if none
	next   uintptr // pages [next, end) of the last chunk were never used
	end    uintptr
	chunks []chunk
	used   uint64 // pages handed out
	total  uintptr
	failed bool // the last attempt to grow was refused
}

type chunk struct{ addr, bytes uintptr }

// alloc returns a page of zeroes, or 0 if the kernel refuses memory.
func (a *arena) alloc() uintptr {
	a.mu.Lock()
	defer a.mu.Unlock()
	if p := a.free; p != 0 {
		link := word(p, 0)
		a.free = uintptr(link.Load())
		link.Store(0)
		a.used++
		return p
	}
	if a.next == a.end {
		if err := a.grow(); err != nil {
			return 0
		}
	}
	p := a.next
	a.next += PageBytes
	a.used++
	return p
}

// grow maps another chunk. The first one is of small pages, which is all that
// an idle volume should pay for.
func (a *arena) grow() error {
	n := min(max(a.total/8&^(hugeBytes-1), hugeBytes), maxChunkBytes)
	addr, err := mapAligned(n, hugeBytes)
	a.failed = err != nil
	if err != nil {
		return err
	}
	adviseHuge(addr, n, len(a.chunks) > 0)
	a.chunks = append(a.chunks, chunk{addr, n})
	a.next, a.end = addr, addr+n
	a.total += n
	return nil
}

// ensure reports why alloc last failed, if it would fail again.
func (a *arena) ensure() error {
	a.mu.Lock()
	defer a.mu.Unlock()
	if !a.failed || a.free != 0 || a.next != a.end {
		return nil
	}
	return a.grow()
}

// put takes back a page. zero says that it holds only zeroes. A reader that
// looked the page up before may be reading it meanwhile; it drops what it read
// when it finds that the directory no longer says so.
func (a *arena) put(p uintptr, zero bool) {
	if !zero {
		clear(pageWords(p)[:])
	}
	a.mu.Lock()
	word(p, 0).Store(uint64(a.free))
	a.free = p
	a.used--
	a.mu.Unlock()
}

// touched returns the bytes of memory that pages have ever occupied.
func (a *arena) touched() uint64 {
	a.mu.Lock()
	defer a.mu.Unlock()
	return uint64(a.total - (a.end - a.next))
}

func (a *arena) close() {
	for _, c := range a.chunks {
		release(c.addr, c.bytes)
	}
	*a = arena{}
}
