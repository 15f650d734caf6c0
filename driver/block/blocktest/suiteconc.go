package blocktest

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"

	"scoria/driver/block"
)

// testModel runs random operations one after the other against a flat model.
func (s *suite) testModel() {
	if err := runModel(s.dev, s.rnd, 0, 2<<20, 400, 1); err != nil {
		s.Fatal(err)
	}
}

// testDisjoint runs the same from several goroutines, each in its own part of
// the device, with several requests under way at a time. The parts meet inside
// clusters, so that a device which handles whole clusters is put to the test.
func (s *suite) testDisjoint() {
	const workers, part = 8, 1 << 20
	errs := make(chan error, workers)
	for w := range uint64(workers) {
		rnd := rand.New(rand.NewPCG(s.seed, w+1))
		// A logical block further each time: with 512-byte blocks the borders
		// fall into the middle of clusters.
		start := w * (part + s.lb)
		go func() { errs <- runModel(s.dev, rnd, start, part, 250, 6) }()
	}
	for range workers {
		if err := <-errs; err != nil {
			s.Error(err)
		}
	}
}

// runModel carries out rounds of random requests inside [start, start+size) and
// compares with a flat model. The requests of one round, at most depth, touch
// different blocks and are under way together.
func runModel(dev block.Device, rnd *rand.Rand, start, size uint64, rounds, depth int) error {
	lb := uint64(dev.Info().LogicalBlock)
	model := make([]byte, size)
	blocks := size / lb
	for round := range rounds {
		var flights []*flight
		var reads []int // flights that are reads
		var want [][]byte
		n := 1 + rnd.IntN(depth)
		slice := blocks / uint64(n) // each request keeps to its own slice
		for i := range uint64(n) {
			first := i*slice + rnd.Uint64N(slice)
			count := randomLength(rnd, (i+1)*slice-first)
			off, length := first*lb, count*lb
			part := model[off : off+length]
			flags := block.Flags(rnd.IntN(4))
			switch op := block.Op(rnd.IntN(5)); op {
			case block.OpRead:
				reads = append(reads, len(flights))
				want = append(want, bytes.Clone(part))
				flights = append(flights, newFlight(op, flags, start+off, length, split(rnd, pattern(length, 1))...))
			case block.OpWrite:
				fill(part, rnd.Uint64())
				flights = append(flights, newFlight(op, flags, start+off, length, split(rnd, bytes.Clone(part))...))
			case block.OpFlush:
				flights = append(flights, newFlight(op, 0, 0, 0))
			default:
				clear(part)
				flights = append(flights, newFlight(op, flags, start+off, length))
			}
		}
		submit(dev, flights...)
		for _, f := range flights {
			if err := f.wait(); err != nil {
				return fmt.Errorf("round %d: %s: %w", round, f, err)
			}
		}
		for i, at := range reads {
			if !bytes.Equal(bytes.Join(flights[at].Segments, nil), want[i]) {
				return fmt.Errorf("round %d: %s returned other data", round, flights[at])
			}
		}
	}
	p := make([]byte, size)
	if err := do(dev, block.OpRead, 0, start, size, p); err != nil {
		return err
	}
	if !bytes.Equal(p, model) {
		return fmt.Errorf("after %d rounds the device differs from the model in [%d,+%d)", rounds, start, size)
	}
	return nil
}

// A stamp fills every 16 bytes of a logical block: who wrote it, and which block
// it is. An interval says between which two points in time a request ran.
type interval struct {
	id         uint64 // of the write; 0 zeroes
	start, end uint64
}

// history collects what happened to the blocks of an area.
type history struct {
	mu     sync.Mutex
	writes [][]interval // by block
	reads  [][]interval // by block; id is the write that was seen
}

// testOverlapping lets several goroutines read, write and zero the same few
// clusters at once. Every logical block must always be whole, and a read must
// return a write that had begun before the read ended and that no other write,
// begun after it had ended, had replaced before the read began. Requests that
// run at the same time have no order.
func (s *suite) testOverlapping() {
	const workers, rounds, clusters = 6, 250, 6
	blocks := uint64(clusters * block.ClusterSize / s.lb)
	h := &history{writes: make([][]interval, blocks), reads: make([][]interval, blocks)}
	var clock, ids atomic.Uint64
	clock.Store(1)
	for b := range h.writes {
		h.writes[b] = []interval{{}} // zeroes, before everything
	}
	errs := make(chan error, workers)
	for w := range uint64(workers) {
		rnd := rand.New(rand.NewPCG(s.seed, 100+w))
		go func() { errs <- s.overlap(h, rnd, rounds, blocks, &clock, &ids) }()
	}
	for range workers {
		if err := <-errs; err != nil {
			s.Error(err)
		}
	}
	// A last read sees what remained.
	p := s.read(0, blocks*s.lb)
	now := clock.Add(1)
	if err := h.observe(p, 0, s.lb, now, now); err != nil {
		s.Fatal(err)
	}
	if err := h.check(); err != nil {
		s.Fatal(err)
	}
}

func (s *suite) overlap(h *history, rnd *rand.Rand, rounds int, blocks uint64, clock, ids *atomic.Uint64) error {
	for range rounds {
		first := rnd.Uint64N(blocks)
		count := 1 + rnd.Uint64N(blocks-first)
		p := make([]byte, count*s.lb)
		op := []block.Op{block.OpRead, block.OpRead, block.OpWrite, block.OpWrite, block.OpDiscard, block.OpWriteZeroes}[rnd.IntN(6)]
		var id uint64
		var segs [][]byte
		switch op {
		case block.OpWrite:
			id = ids.Add(1)
			stamp(p, first, s.lb, id)
			segs = split(rnd, p)
		case block.OpRead:
			segs = split(rnd, p)
		}
		start := clock.Add(1)
		if err := do(s.dev, op, 0, first*s.lb, count*s.lb, segs...); err != nil {
			return fmt.Errorf("%s [%d,+%d): %w", op, first*s.lb, count*s.lb, err)
		}
		end := clock.Add(1)
		if op == block.OpRead {
			if err := h.observe(p, first, s.lb, start, end); err != nil {
				return err
			}
			continue
		}
		h.mu.Lock()
		for b := first; b < first+count; b++ {
			h.writes[b] = append(h.writes[b], interval{id, start, end})
		}
		h.mu.Unlock()
	}
	return nil
}

func stamp(p []byte, first, lb, id uint64) {
	for i := uint64(0); i < uint64(len(p)); i += 16 {
		binary.LittleEndian.PutUint64(p[i:], id)
		binary.LittleEndian.PutUint64(p[i+8:], first+i/lb+1)
	}
}

// observe takes a read's data apart into blocks and records what was seen.
func (h *history) observe(p []byte, first, lb, start, end uint64) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	want := make([]byte, lb)
	for b := first; len(p) > 0; b, p = b+1, p[lb:] {
		id := binary.LittleEndian.Uint64(p)
		clear(want)
		if id != 0 {
			stamp(want, b, lb, id)
		}
		if !bytes.Equal(p[:lb], want) {
			return fmt.Errorf("block %d is torn or misplaced: it begins with write %d", b, id)
		}
		h.reads[b] = append(h.reads[b], interval{id, start, end})
	}
	return nil
}

// check decides for every read whether what it saw is possible.
func (h *history) check() error {
	for b, reads := range h.reads {
		for _, r := range reads {
			if !possible(r, h.writes[b]) {
				return fmt.Errorf("block %d: a read during (%d,%d) returned write %d (0: zeroes), which had not begun or had been replaced", b, r.start, r.end, r.id)
			}
		}
	}
	return nil
}

func possible(r interval, writes []interval) bool {
	for _, w := range writes {
		if w.id != r.id || w.start > r.end {
			continue
		}
		replaced := false
		for _, later := range writes {
			if later.start > w.end && later.end < r.start {
				replaced = true
				break
			}
		}
		if !replaced {
			return true
		}
	}
	return false
}
