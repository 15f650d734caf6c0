package load

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math/bits"
	"runtime"
	"sync/atomic"
	"time"

	"scoria/vhost/client"
)

// run is what the workers of one Run share.
type run struct {
	client   *client.Client
	spec     Spec
	epoch    time.Time
	ready    chan struct{} // one per worker
	open     chan struct{} // closed when all are ready
	begin    atomic.Int64  // of the measurement, set before open is closed
	left     atomic.Int32  // workers that measure
	done     chan struct{} // closed by the last of them
	canceled atomic.Bool
}

// now is the time in nanoseconds since the run was made.
func (r *run) now() int64 { return int64(time.Since(r.epoch)) }

// worker drives one queue.
type worker struct {
	r     *run
	q     *client.Queue
	index int

	rng       uint64
	blocks    uint64 // that this worker addresses
	base      uint64 // byte offset of the first
	next      uint64 // sequential: block
	bufBlocks uint64 // in each half of its part of the arena
	writeBufs uint64 // arena offset
	readBufs  uint64 // arena offset
	stamp     uint64

	out   []client.Completion
	start []int64 // by tag: when the operation began or was due
	phase []uint8 // by tag
	free  []int   // tags

	interval float64 // ns between operations; 0: closed loop
	due      float64 // ns

	hist         Histogram
	total        uint64 // operations, measured or not
	elapsed      int64  // ns
	kicks, waits uint64
	err          error
}

// Phases of an operation.
const (
	phaseData  uint8 = iota // a read or a write
	phaseFlush              // the flush after a write
	phaseWrite              // a write that a flush follows
)

func newWorker(r *run, index int) *worker {
	s := &r.spec
	bs := uint64(s.BlockBytes)
	w := &worker{
		r: r, q: r.client.Queue(index), index: index,
		rng:   (s.Seed+uint64(index)+1)*0x9e3779b97f4a7c15 | 1,
		out:   make([]client.Completion, s.Depth),
		start: make([]int64, s.Depth), phase: make([]uint8, s.Depth), free: make([]int, 0, s.Depth),
	}
	for tag := range s.Depth {
		w.free = append(w.free, tag)
	}
	w.base, w.blocks = s.RegionOffset, s.RegionBytes/bs
	if !s.Random {
		w.blocks /= uint64(s.Queues)
		w.base += uint64(index) * w.blocks * bs
	}
	part := uint64(len(r.client.Arena())) / uint64(s.Queues)
	w.bufBlocks = part / 2 / bs
	w.writeBufs = uint64(index) * part
	w.readBufs = w.writeBufs + w.bufBlocks*bs
	if s.Rate > 0 {
		w.interval = 1e9 * float64(s.Queues) / s.Rate
	}
	return w
}

// run is the worker's goroutine. The thread stays locked and so ends with it,
// and its pinning too.
func (w *worker) run() {
	runtime.LockOSThread()
	if cpus := w.r.spec.CPUs; len(cpus) > 0 {
		if w.err = PinThread(cpus[w.index%len(cpus)]); w.err != nil {
			w.err = fmt.Errorf("pin worker to CPU %d: %w", cpus[w.index%len(cpus)], w.err)
			w.r.canceled.Store(true)
		}
	}
	if w.r.spec.Background && w.err == nil {
		if w.err = runInBackground(); w.err != nil {
			w.err = fmt.Errorf("background load: %w", w.err)
			w.r.canceled.Store(true)
		}
	}
	w.r.ready <- struct{}{}
	<-w.r.open
	if w.r.spec.Poll {
		w.q.Polling()
	}
	w.kicks, w.waits = w.q.Counts()
	if w.err == nil {
		w.err = w.loop()
	}
	if w.r.left.Add(-1) == 0 {
		close(w.r.done)
	}
	if w.err == nil {
		w.err = w.drain()
	}
}

// loop measures from begin until the duration is over or MaxOps have ended.
func (w *worker) loop() error {
	s := &w.r.spec
	begin := w.r.begin.Load()
	end := begin + int64(s.Duration)
	maxOps := s.MaxOps
	if maxOps == 0 {
		maxOps = 1 << 62
	}
	now := w.r.now()
	w.due = float64(now)
	w.submit(now)
	idle := 0
	for {
		n, err := w.q.Poll(w.out)
		if err != nil {
			return err
		}
		if n == 0 {
			if idle, err = w.rest(idle, now); err != nil {
				return err
			}
			if idle&idleMask != 0 {
				continue
			}
		}
		now = w.r.now()
		if err := w.finish(w.out[:n], now, begin); err != nil {
			return err
		}
		if now >= end || w.hist.Count() >= maxOps || w.r.canceled.Load() {
			w.elapsed = min(now, end) - begin
			return nil
		}
		w.submit(now)
	}
}

// idleMask: a spinning worker looks at the clock once in so many empty polls.
const idleMask = 1<<10 - 1

// rest is what a worker does that found no completion: spin or sleep. It
// returns idle+1, or 0 if it is time to look at the clock.
func (w *worker) rest(idle int, now int64) (int, error) {
	switch {
	case w.r.spec.Poll:
		if idle++; w.interval == 0 && idle&idleMask != 0 {
			return idle, nil
		}
		return 0, w.r.client.Err()
	case w.interval == 0:
		return 0, w.q.Wait(-1)
	}
	err := w.q.Wait(time.Duration(max(0, int64(w.due)-now)))
	if errors.Is(err, client.ErrTimeout) {
		err = nil
	}
	return 0, err
}

// submit starts what is due.
func (w *worker) submit(now int64) {
	if w.interval == 0 {
		for _, tag := range w.free {
			w.issue(tag, now)
		}
		w.free = w.free[:0]
		w.q.Kick()
		return
	}
	for len(w.free) > 0 && w.due <= float64(now) {
		tag := w.free[len(w.free)-1]
		w.free = w.free[:len(w.free)-1]
		w.issue(tag, int64(w.due))
		w.due += w.interval
	}
	w.q.Kick()
}

// random is xorshift64*.
func (w *worker) random() uint64 {
	x := w.rng
	x ^= x >> 12
	x ^= x << 25
	x ^= x >> 27
	w.rng = x
	return x * 0x2545f4914f6cdd1d
}

// below maps a random number to [0, n).
func below(random, n uint64) uint64 {
	hi, _ := bits.Mul64(random, n)
	return hi
}

// issue adds the next operation under tag. There is room: each tag stands for one
// request, and the queue takes Depth of them.
func (w *worker) issue(tag int, start int64) {
	s := &w.r.spec
	bs := uint64(s.BlockBytes)
	w.start[tag] = start
	rnd := w.random()
	var block uint64
	if s.Random {
		block = below(rnd, w.blocks)
	} else {
		block = w.next
		if w.next++; w.next == w.blocks {
			w.next = 0
		}
	}
	off := w.base + block*bs
	// Other bits of the same number, which below has hardly used.
	buf := below(rnd<<32|rnd>>32, w.bufBlocks) * bs
	if s.ReadPercent == 100 || s.ReadPercent > 0 && int(below(w.random(), 100)) < s.ReadPercent {
		w.phase[tag] = phaseData
		w.q.Read(off, w.r.client.Buffer(w.readBufs+buf, uint32(bs)), uint64(tag))
		return
	}
	w.phase[tag] = phaseData
	if s.FlushEach {
		w.phase[tag] = phaseWrite
	}
	buf += w.writeBufs
	w.stamp++
	binary.LittleEndian.PutUint64(w.r.client.Arena()[buf:], w.stamp)
	w.q.Write(off, w.r.client.Buffer(buf, uint32(bs)), uint64(tag))
}

// finish takes completions in: operations that began after begin are counted.
func (w *worker) finish(done []client.Completion, now, begin int64) error {
	for i := range done {
		c := &done[i]
		if c.Status != client.StatusOK {
			return fmt.Errorf("%w: queue %d: %w", ErrIO, w.index, client.StatusErr(c.Status))
		}
		tag := int(c.Tag)
		if w.phase[tag] == phaseWrite {
			w.phase[tag] = phaseFlush
			w.q.Flush(c.Tag)
			continue
		}
		w.total++
		if now >= begin {
			w.hist.Record(uint64(now - w.start[tag]))
		}
		w.free = append(w.free, tag)
	}
	return nil
}

// drainTimeout bounds the wait for what is still in flight at the end. Longer
// than any server takes that makes progress.
const drainTimeout = 60 * time.Second

// drain waits for everything in flight. Flushes that were due are left out.
func (w *worker) drain() error {
	w.q.Kick()
	for w.q.InFlight() > 0 {
		n, err := w.q.Poll(w.out)
		if err != nil {
			return err
		}
		w.total += uint64(n)
		if n == 0 {
			if err := w.q.Wait(drainTimeout); err != nil {
				return fmt.Errorf("%d requests still in flight: %w", w.q.InFlight(), err)
			}
		}
	}
	return nil
}
