package vfs

import (
	"math/rand/v2"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// pageSize is the unit in bytes in which Mem stores contents and counts space.
const pageSize = 4096

// page is a piece of a file. Once shared is set more than one content refers to
// it and its data never changes again: writers copy it first.
type page struct {
	shared atomic.Bool
	data   [pageSize]byte
}

// zeroPage stands for room that was reserved and not written yet.
var zeroPage = func() *page {
	p := new(page)
	p.shared.Store(true)
	return p
}()

// content is a sparse file image.
type content struct {
	pages map[int64]*page
	size  int64
}

func newContent() content { return content{pages: make(map[int64]*page)} }

// clone shares all pages with the copy.
func (c *content) clone() content {
	out := content{pages: make(map[int64]*page, len(c.pages)), size: c.size}
	for i, p := range c.pages {
		out.share(i, p)
	}
	return out
}

// share stores a page that another content holds too.
func (c *content) share(i int64, p *page) {
	if !p.shared.Load() {
		p.shared.Store(true)
	}
	c.pages[i] = p
}

// writable returns page i for changing, making or copying it. keep says that
// its old data matter.
func (c *content) writable(i int64, keep bool) *page {
	old := c.pages[i]
	if old != nil && !old.shared.Load() {
		return old
	}
	p := new(page)
	if old != nil && keep {
		p.data = old.data
	}
	c.pages[i] = p
	return p
}

// readAt fills p, of which all must lie inside the file.
func (c *content) readAt(p []byte, off int64) {
	for len(p) > 0 {
		in := off % pageSize
		n := min(len(p), int(pageSize-in))
		if pg := c.pages[off/pageSize]; pg != nil {
			copy(p[:n], pg.data[in:])
		} else {
			clear(p[:n])
		}
		p, off = p[n:], off+int64(n)
	}
}

// writeData stores p without changing the size. It stops before the first page
// for which room (in pages; negative: no limit) runs out and returns the bytes
// written.
func (c *content) writeData(p []byte, off, room int64) int {
	done := 0
	for done < len(p) {
		i, in := off/pageSize, off%pageSize
		n := min(len(p)-done, int(pageSize-in))
		if c.pages[i] == nil && room >= 0 {
			if room == 0 {
				return done
			}
			room--
		}
		copy(c.writable(i, n < pageSize).data[in:], p[done:done+n])
		done, off = done+n, off+int64(n)
	}
	return done
}

// zero gives the whole pages inside [off, end) back and clears the rest of it.
func (c *content) zero(off, end int64) {
	c.eachPage(off, end, func(i int64) {
		from, to := max(off-i*pageSize, 0), min(end-i*pageSize, pageSize)
		if from == 0 && to == pageSize {
			delete(c.pages, i)
			return
		}
		clear(c.writable(i, true).data[from:to])
	})
}

// eachPage calls fn with the number of every existing page that [off, end)
// touches, in no particular order.
func (c *content) eachPage(off, end int64, fn func(i int64)) {
	if end <= off {
		return
	}
	first, last := off/pageSize, (end-1)/pageSize
	if last-first < int64(len(c.pages)) {
		for i := first; i <= last; i++ {
			if c.pages[i] != nil {
				fn(i)
			}
		}
		return
	}
	for i := range c.pages {
		if i >= first && i <= last {
			fn(i)
		}
	}
}

// truncate sets the size; what lay behind a smaller one is gone.
func (c *content) truncate(size int64) {
	c.zero(size, maxSize)
	c.size = size
}

// reserve fills the gaps of [off, end) with pages of zeroes, all or none, if
// room (in pages; negative: no limit) suffices. It reports whether it did.
func (c *content) reserve(off, end, room int64) bool {
	first, last := off/pageSize, (end-1)/pageSize
	if room >= 0 {
		missing := last - first + 1
		c.eachPage(off, end, func(int64) { missing-- })
		if missing > room {
			return false
		}
	}
	for i := first; i <= last; i++ {
		if c.pages[i] == nil {
			c.pages[i] = zeroPage
		}
	}
	return true
}

// maxSize is the largest file in bytes.
const maxSize = 1 << 62

type changeKind uint8

const (
	changeWrite changeKind = iota
	changeTruncate
	changePunch
	changeAllocate
)

// change is a journal entry: something done to a file since its last Sync.
type change struct {
	kind     changeKind
	off, end int64  // bytes; a truncate's size is end
	data     []byte // of a write; never changed
}

// apply carries the whole change out.
func (c *content) apply(ch *change) {
	switch ch.kind {
	case changeWrite:
		c.writeData(ch.data, ch.off, -1)
		c.size = max(c.size, ch.end)
	case changeTruncate:
		c.truncate(ch.end)
	case changePunch:
		c.zero(ch.off, ch.end)
	case changeAllocate:
		c.reserve(ch.off, ch.end, -1)
		c.size = max(c.size, ch.end)
	}
}

// survive applies what a loss of power left of the journal: each change in
// whole, in part or not at all, each sector of a write by itself, and the size
// apart from the data.
func (c *content) survive(journal []change, rng *rand.Rand) {
	lossPercent := [...]int{0, 20, 50, 80, 100}[rng.IntN(5)]
	kept := func() bool { return rng.IntN(100) >= lossPercent }
	for i := range journal {
		ch := &journal[i]
		switch ch.kind {
		case changeTruncate, changePunch:
			if kept() {
				c.apply(ch)
			}
		case changeAllocate:
			if kept() {
				c.reserve(ch.off, ch.end, -1)
			}
			if kept() {
				c.size = max(c.size, ch.end)
			}
		case changeWrite:
			c.surviveWrite(ch, rng, kept)
			if kept() {
				c.size = max(c.size, ch.end)
			}
		}
	}
	c.truncate(c.size) // data whose size was lost are not seen later either
}

func (c *content) surviveWrite(ch *change, rng *rand.Rand, kept func() bool) {
	if rng.IntN(2) == 0 {
		if kept() {
			c.writeData(ch.data, ch.off, -1)
		}
		return
	}
	for off := ch.off; off < ch.end; {
		next := min(off-off%SectorSize+SectorSize, ch.end)
		if kept() {
			c.writeData(ch.data[off-ch.off:next-ch.off], off, -1)
		}
		off = next
	}
}

// validRange refuses what a kernel refuses.
func validRange(off, length int64) error {
	if off < 0 || length <= 0 || off > maxSize-length {
		return unix.EINVAL
	}
	return nil
}
