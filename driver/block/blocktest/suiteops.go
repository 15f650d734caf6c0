package blocktest

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"runtime"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"scoria/driver/block"
)

func (s *suite) testReadBack() {
	// Whole clusters, parts of one, across clusters, the first and the last block.
	size, lb := s.info.Size, s.lb
	last := size &^ (block.ClusterSize - 1)
	if last == size {
		last -= block.ClusterSize
	}
	model := make([]byte, size-last)
	s.write(last, model)
	for i, w := range []struct{ off, length uint64 }{
		{0, block.ClusterSize}, {lb, lb}, {block.ClusterSize - lb, 2 * lb}, {5 * block.ClusterSize, 3 * block.ClusterSize},
		{6*block.ClusterSize + lb, 2*block.ClusterSize + lb}, {1 << 20, 1 << 20},
	} {
		p := pattern(w.length, uint64(i))
		s.write(w.off, p)
		s.expect(w.off, p)
	}
	p := pattern(lb, 99)
	s.write(size-lb, p)
	copy(model[uint64(len(model))-lb:], p)
	s.expect(last, model)
	// What the partial writes left alone is still there.
	first := pattern(block.ClusterSize, 0)
	copy(first[lb:], pattern(lb, 1))
	copy(first[block.ClusterSize-lb:], pattern(2*lb, 2)[:lb])
	s.expect(0, first)
}

func (s *suite) testSegments() {
	for i := range 50 {
		length := (1 + s.rnd.Uint64N(64*block.ClusterSize/s.lb)) * s.lb
		off := s.rnd.Uint64N((s.info.Size-length)/s.lb) * s.lb
		src := pattern(length, uint64(i))
		before := sum(src)
		if err := do(s.dev, block.OpWrite, 0, off, length, split(s.rnd, src)...); err != nil {
			s.Fatalf("write of %d bytes at %d in odd segments: %v", length, off, err)
		}
		if sum(src) != before {
			s.Fatal("a write changed its own data")
		}
		s.expect(off, src)
		// Read into odd segments with guards between them.
		const guard = 16
		var segs, guards [][]byte
		for _, seg := range split(s.rnd, src) {
			buf := bytes.Repeat([]byte{0xee}, len(seg)+guard)
			segs = append(segs, buf[:len(seg):len(seg)])
			guards = append(guards, buf[len(seg):])
		}
		if err := do(s.dev, block.OpRead, 0, off, length, segs...); err != nil {
			s.Fatalf("read of %d bytes at %d into odd segments: %v", length, off, err)
		}
		if !bytes.Equal(bytes.Join(segs, nil), src) {
			s.Fatalf("read of %d bytes at %d into odd segments returned other data", length, off)
		}
		for _, g := range guards {
			if !bytes.Equal(g, bytes.Repeat([]byte{0xee}, guard)) {
				s.Fatal("a read wrote behind a segment")
			}
		}
	}
}

func (s *suite) testLargest() {
	n := min(s.info.Size, block.MaxRequestBytes)
	p := pattern(n, 7)
	s.write(s.info.Size-n, p)
	s.expect(s.info.Size-n, p)
}

func (s *suite) testZeroLength() {
	s.write(0, pattern(block.ClusterSize, 1))
	for _, op := range []block.Op{block.OpRead, block.OpWrite, block.OpDiscard, block.OpWriteZeroes} {
		for _, off := range []uint64{0, s.lb, s.info.Size - s.lb, s.info.Size} {
			for _, flags := range []block.Flags{0, block.FUA} {
				if err := do(s.dev, op, flags, off, 0); err != nil {
					s.Errorf("%s of no bytes at %d: %v", op, off, err)
				}
			}
		}
		if op == block.OpRead || op == block.OpWrite {
			if err := do(s.dev, op, 0, 0, 0, []byte{}, nil); err != nil {
				s.Errorf("%s of no bytes in empty segments: %v", op, err)
			}
		}
	}
	s.expect(0, pattern(block.ClusterSize, 1))
}

func (s *suite) testFlush() {
	p := pattern(3*block.ClusterSize, 3)
	if err := do(s.dev, block.OpFlush, 0, 0, 0); err != nil {
		s.Fatalf("flush of a fresh device: %v", err)
	}
	if err := do(s.dev, block.OpWrite, block.FUA, block.ClusterSize, uint64(len(p)), p); err != nil {
		s.Fatalf("write with FUA: %v", err)
	}
	s.expect(block.ClusterSize, p)
	// Offset and length of a flush are ignored, and it may itself carry FUA.
	if err := do(s.dev, block.OpFlush, block.FUA, s.info.Size+1, 77); err != nil {
		s.Fatalf("flush with offset and length: %v", err)
	}
	// Several at once, with writes.
	var flights []*flight
	for i := range uint64(32) {
		flights = append(flights,
			newFlight(block.OpWrite, 0, i*block.ClusterSize, block.ClusterSize, pattern(block.ClusterSize, i)),
			newFlight(block.OpFlush, 0, 0, 0))
	}
	submit(s.dev, flights...)
	for _, f := range flights {
		if err := f.wait(); err != nil {
			s.Fatalf("%s: %v", f, err)
		}
	}
	for i := range uint64(32) {
		s.expect(i*block.ClusterSize, pattern(block.ClusterSize, i))
	}
}

// testZeroing checks that op zeroes exactly its range.
func (s *suite) testZeroing(op block.Op, flags block.Flags) {
	const area = 2 << 20
	model := pattern(area, 11)
	s.write(0, model)
	zero := func(off, length uint64) {
		s.Helper()
		if err := do(s.dev, op, flags, off, length); err != nil {
			s.Fatalf("%s of %d bytes at %d: %v", op, length, off, err)
		}
		clear(model[min(off, area):min(off+length, area)])
		s.expect(0, model)
	}
	zero(0, block.ClusterSize)
	zero(2*block.ClusterSize+s.lb, s.lb)                     // inside one cluster (or one whole)
	zero(4*block.ClusterSize-s.lb, 2*s.lb)                   // the ends of two
	zero(8*block.ClusterSize+s.lb, 4*block.ClusterSize-s.lb) // head in part
	zero(16*block.ClusterSize, 3*block.ClusterSize+s.lb)     // tail in part
	zero(8*block.ClusterSize, 16*block.ClusterSize)          // again, and more
	zero(1<<20+s.lb, 1<<19)
	// Data written afterwards is there, in whole and in part.
	s.write(9*block.ClusterSize, model[7<<18:7<<18+block.ClusterSize])
	copy(model[9*block.ClusterSize:], model[7<<18:7<<18+block.ClusterSize])
	s.write(11*block.ClusterSize+s.lb, model[15<<17:15<<17+s.lb])
	copy(model[11*block.ClusterSize+s.lb:], model[15<<17:15<<17+s.lb])
	s.expect(0, model)
	// The whole device, in the largest requests it takes.
	step := s.info.Size
	if s.info.MaxDiscard != 0 {
		step = min(step, s.info.MaxDiscard)
	}
	for off := uint64(0); off < s.info.Size; off += step {
		zero(off, min(step, s.info.Size-off))
	}
}

func (s *suite) testBatch() {
	a, b := pattern(block.ClusterSize, 1), pattern(block.ClusterSize, 2)
	s.write(0, a)
	got := make([]byte, block.ClusterSize)
	flights := []*flight{
		newFlight(block.OpRead, 0, 0, block.ClusterSize, got),
		newFlight(block.OpWrite, 0, s.info.Size, block.ClusterSize, b),
		newFlight(block.OpWrite, 0, 1<<20, block.ClusterSize, b),
		newFlight(block.OpRead, 0, 1, s.lb, make([]byte, s.lb)),
		newFlight(block.OpFlush, 0, 0, 0),
		newFlight(block.OpDiscard, 0, 2<<20, block.ClusterSize),
	}
	submit(s.dev, flights...)
	for i, want := range []error{nil, block.ErrRange, nil, block.ErrAlignment, nil, nil} {
		if err := flights[i].wait(); !errors.Is(err, want) {
			s.Errorf("%s in a batch: %v, want %v", flights[i], err, want)
		}
	}
	if !bytes.Equal(got, a) {
		s.Error("the read of the batch returned other data")
	}
	s.expect(1<<20, b)
	s.dev.Submit(nil)
}

// testCompletion submits requests, also twice with the same memory, and checks
// who completes them. A flight panics when it is completed twice.
func (s *suite) testCompletion() {
	var inside atomic.Int64 // the goroutine inside Submit
	p := make([]byte, block.ClusterSize)
	for i := range uint64(200) {
		f := newFlight(block.Op(i%5), 0, i*block.ClusterSize, 0)
		if f.Op != block.OpFlush {
			f.Length = block.ClusterSize
		}
		if f.Op == block.OpRead || f.Op == block.OpWrite {
			f.Segments = [][]byte{p}
		}
		complete := f.Complete
		f.Complete = func(r *block.Request) {
			if goid() == inside.Load() {
				panic("blocktest: Complete was called from within Submit")
			}
			complete(r)
		}
		for range 2 { // a request may be used again once it has ended
			f.Ended, f.Err = false, errors.New("not set")
			f.calls.Store(0)
			f.done = make(chan struct{})
			inside.Store(goid())
			submit(s.dev, f)
			inside.Store(0)
			if err := f.wait(); err != nil {
				s.Fatalf("%s: %v", f, err)
			}
		}
	}
}

// goid is the number of the calling goroutine, from the head of its stack dump.
func goid() int64 {
	var buf [64]byte
	var id int64
	for _, c := range buf[len("goroutine "):runtime.Stack(buf[:], false)] {
		if c < '0' || c > '9' {
			break
		}
		id = id*10 + int64(c-'0')
	}
	return id
}

// testFault takes the memory away before a request is submitted, as a hostile
// peer does by shrinking its memfd: the request fails, the program lives.
func (s *suite) testFault() {
	const n = 4 * block.ClusterSize
	s.write(0, pattern(n, 5))
	fd, err := unix.MemfdCreate("blocktest", unix.MFD_CLOEXEC)
	if err != nil {
		s.Fatal(err)
	}
	defer unix.Close(fd)
	if err := unix.Ftruncate(fd, n); err != nil {
		s.Fatal(err)
	}
	mem, err := unix.Mmap(fd, 0, n, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		s.Fatal(err)
	}
	defer unix.Munmap(mem)
	if err := do(s.dev, block.OpRead, 0, 0, n, mem); err != nil {
		s.Fatalf("read into shared memory: %v", err)
	}
	if err := unix.Ftruncate(fd, block.ClusterSize); err != nil {
		s.Fatal(err)
	}
	for _, op := range []block.Op{block.OpRead, block.OpWrite} {
		if err := do(s.dev, op, 0, 1<<20, n, mem); !errors.Is(err, block.ErrFault) {
			s.Errorf("%s with memory that is gone: %v, want ErrFault", op, err)
		}
	}
	s.expect(0, pattern(n, 5))
	// The part of the device that the failed write named is usable.
	s.write(1<<20, pattern(n, 6))
	s.expect(1<<20, pattern(n, 6))
}

// randomLength returns mostly small lengths, in logical blocks.
func randomLength(rnd *rand.Rand, limit uint64) uint64 {
	if rnd.IntN(4) == 0 {
		return rnd.Uint64N(limit + 1)
	}
	return rnd.Uint64N(min(limit, 24) + 1)
}
