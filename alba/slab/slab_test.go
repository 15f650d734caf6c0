package slab

import (
	"sync"
	"testing"
	"time"
)

// newLender is a lender of its own whose trims the test runs.
func newLender(t *testing.T) (l *lender, trim func() bool) {
	t.Helper()
	var next func()
	l = &lender{after: func(_ time.Duration, f func()) { next = f }, mapping: mapHuge}
	t.Cleanup(func() {
		for i := range l.classes {
			for _, s := range l.classes[i].warm {
				cool(s)
			}
		}
	})
	return l, func() bool {
		f := next
		if next = nil; f == nil {
			return false
		}
		f()
		return true
	}
}

// resident is how many of a block's pages, all written by use, have kept their contents.
func resident(s *Slab) (n int) {
	for i := 0; i < len(s.whole); i += 4096 {
		n += int(s.whole[i]) * 4096
	}
	return n
}

func use(s *Slab) *Slab {
	for i := 0; i < len(s.B); i += 4096 {
		s.B[i] = 1
	}
	return s
}

func TestSizes(t *testing.T) {
	l, _ := newLender(t)
	for _, n := range []int{1, 4096, MinBytes, MinBytes + 1, 2*MinBytes - 1, 2 * MinBytes, 3*MinBytes + 7, 80 << 20} {
		s := l.get(n)
		if len(s.B) != n || cap(s.B) != n {
			t.Errorf("%d bytes: len %d, cap %d", n, len(s.B), cap(s.B))
		}
		if whole := len(s.whole); whole < n || whole >= 2*n && whole > MinBytes {
			t.Errorf("%d bytes take %d", n, whole)
		}
		use(s)
		l.put(s)
	}
}

// TestBlocksAreApart: no two blocks on loan share a byte, those that share a huge page included.
func TestBlocksAreApart(t *testing.T) {
	l, _ := newLender(t)
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			for round := range 10 {
				s := l.get(MinBytes << (round % 3))
				for j := range s.B {
					s.B[j] = byte(i)
				}
				for j, b := range s.B {
					if b != byte(i) {
						t.Errorf("byte %d is %d's", j, b)
						return
					}
				}
				l.put(s)
			}
		})
	}
	wg.Wait()
}

func TestLastGivenBackIsLentFirst(t *testing.T) {
	l, trim := newLender(t)
	a, b := use(l.get(4<<20)), use(l.get(4<<20))
	l.put(a)
	l.put(b)
	if got := l.get(3 << 20); got != b {
		t.Error("another block than the last one")
	} else {
		l.put(got)
	}
	for range 2 { // a was not asked for since the first
		if !trim() {
			t.Fatal("no trim to come")
		}
		l.put(l.get(4 << 20))
	}
	if n := resident(a); n != 0 {
		t.Errorf("%d bytes of a block that nobody asked for have pages", n)
	}
	if n := resident(b); n != 4<<20 {
		t.Errorf("%d bytes of the block in use have pages", n)
	}
	if got := use(l.get(4 << 20)); got != b {
		t.Error("the block with pages is not the first")
	}
	if got := l.get(4 << 20); got != a {
		t.Error("a new block although one is free")
	}
}

// TestIdleIsNothing: what nobody asks for any more goes, and so does the timer.
func TestIdleIsNothing(t *testing.T) {
	l, trim := newLender(t)
	s := use(l.get(8 << 20))
	l.put(s)
	for i := 0; trim(); i++ {
		if i > 3 {
			t.Fatal("the trims do not end")
		}
	}
	if n := resident(s); n != 0 || l.warm != 0 {
		t.Errorf("%d bytes have pages, %d are counted", n, l.warm)
	}
	l.put(use(l.get(8 << 20)))
	if !trim() {
		t.Error("no trim after it was used again")
	}
}

func TestKeepsSoMuch(t *testing.T) {
	l, _ := newLender(t)
	var all []*Slab
	for range 6 {
		all = append(all, use(l.get(64<<20)))
	}
	sum := 0
	for _, s := range all {
		l.put(s)
	}
	for _, s := range all {
		sum += resident(s)
	}
	if sum > keepBytes || sum == 0 {
		t.Errorf("%d bytes are kept, at most %d may be", sum, keepBytes)
	}
}

func TestTwiceFreed(t *testing.T) {
	l, _ := newLender(t)
	s := l.get(MinBytes)
	l.put(s)
	defer func() {
		if recover() == nil {
			t.Error("a block was given back twice")
		}
	}()
	l.put(s)
}

// TestWithoutMappings: then it is the heap's memory.
func TestWithoutMappings(t *testing.T) {
	l, trim := newLender(t)
	l.mapping = func(int) []byte { return nil }
	s := use(l.get(3 << 20))
	if len(s.B) != 3<<20 {
		t.Errorf("%d bytes", len(s.B))
	}
	l.put(s)
	if trim() {
		t.Error("the heap's memory is kept")
	}
	l.mapping = mapHuge
	if s := use(l.get(3 << 20)); s.whole == nil {
		t.Error("no mapping although there are some again")
	}
}
