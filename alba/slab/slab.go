// Package slab lends large blocks of memory for the fragments of objects.
//
// They come from anonymous mappings outside the Go heap, aligned and advised for huge
// pages. Memory that the kernel has to give anew costs more than all that an upload does
// with it: the first touch of the 80 MiB of a 64 MiB object under 16+4 took 65–300 ms in
// 4 KiB pages (upload: 45 ms), which sync.Pool let happen after any two garbage
// collections; and as a part of the heap such blocks would double what the collector lets
// it grow to. What was given back stays for keepFor, up to keepBytes in all; then its pages
// go back to the kernel and only the addresses stay.
//
// A block is never unmapped: whoever looks at one that was given back sees other bytes and
// does not crash the process. Values carry checksums, so that this is found.
//
// All functions may be called from any goroutine. The only lock is a leaf.
package slab

import (
	"math/bits"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// MinBytes is the size of the smallest block; what is smaller belongs on the heap.
	MinBytes = 1 << 20

	hugePage  = 2 << 20
	keepBytes = 256 << 20
	keepFor   = 5 * time.Second // and at most twice that
)

// Slab is a block of memory on loan.
type Slab struct {
	B     []byte // of the length asked for, with any contents
	class int    // index in free.classes
	whole []byte // 1<<class × MinBytes; nil: on the heap, since there were no mappings left
}

// class is what is free of one size.
type class struct {
	warm []*Slab // with pages; the last given back is the first lent
	cold []*Slab // without
	// unused is how many of warm, the first ones, were not lent since the last trim.
	unused int
}

// lender is where blocks come from and go.
type lender struct {
	mu      sync.Mutex
	classes [bits.UintSize]class
	warm    int // bytes of all classes' warm blocks
	timed   bool
	after   func(time.Duration, func()) // runs trim later
	mapping func(n int) []byte          // nil if there is none
}

var free = lender{after: func(d time.Duration, f func()) { time.AfterFunc(d, f) }, mapping: mapHuge}

// Get lends a block of n bytes, n > 0, with any contents.
func Get(n int) *Slab { return free.get(n) }

// Free gives the block back; it must not be used any more. A second Free panics.
func (s *Slab) Free() { free.put(s) }

func classOf(n int) int { return bits.Len(uint((n - 1) / MinBytes)) }

func (l *lender) get(n int) *Slab {
	c := classOf(n)
	s := l.take(c)
	if s == nil {
		s = l.mapped(c)
	}
	if s.whole == nil {
		s.B = make([]byte, n)
	} else {
		s.B = s.whole[:n:n]
	}
	return s
}

// take returns a free block of the class, nil if there is none.
func (l *lender) take(c int) *Slab {
	l.mu.Lock()
	defer l.mu.Unlock()
	f := &l.classes[c]
	if n := len(f.warm); n > 0 {
		s := f.warm[n-1]
		f.warm[n-1] = nil
		f.warm = f.warm[:n-1]
		f.unused = min(f.unused, n-1)
		l.warm -= len(s.whole)
		return s
	}
	if n := len(f.cold); n > 0 {
		s := f.cold[n-1]
		f.cold[n-1] = nil
		f.cold = f.cold[:n-1]
		return s
	}
	return nil
}

// mapped makes a new block; what its mapping has more is free.
func (l *lender) mapped(c int) *Slab {
	size := MinBytes << c
	whole := l.mapping(max(size, hugePage))
	if whole == nil {
		return &Slab{class: c}
	}
	if rest := whole[size:]; len(rest) > 0 {
		l.mu.Lock()
		l.classes[c].cold = append(l.classes[c].cold, &Slab{class: c, whole: rest[:size:size]})
		l.mu.Unlock()
	}
	return &Slab{class: c, whole: whole[:size:size]}
}

func (l *lender) put(s *Slab) {
	if s.B == nil {
		panic("slab: given back twice")
	}
	s.B = nil
	if s.whole == nil {
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	f := &l.classes[s.class]
	if l.warm+len(s.whole) > keepBytes {
		f.cold = append(f.cold, cool(s))
		return
	}
	f.warm = append(f.warm, s)
	l.warm += len(s.whole)
	if !l.timed {
		l.timed = true
		l.after(keepFor, l.trim)
	}
}

// trim takes the pages of blocks that nobody asked for since the last trim, and comes again
// while there are others.
func (l *lender) trim() {
	l.mu.Lock()
	defer l.mu.Unlock()
	for i := range l.classes {
		f := &l.classes[i]
		for _, s := range f.warm[:f.unused] {
			f.cold = append(f.cold, cool(s))
			l.warm -= len(s.whole)
		}
		n := copy(f.warm, f.warm[f.unused:])
		clear(f.warm[n:])
		f.warm = f.warm[:n]
		f.unused = n
	}
	if l.timed = l.warm > 0; l.timed {
		l.after(keepFor, l.trim)
	}
}

// cool gives the pages back to the kernel.
func cool(s *Slab) *Slab {
	// If it is refused they stay, which is no fault of the block.
	_ = unix.Madvise(s.whole, unix.MADV_DONTNEED)
	return s
}
