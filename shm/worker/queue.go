package worker

import (
	"errors"
	"fmt"

	"scoria/driver/block"
	"scoria/shm/mem"
)

const (
	// passLimit bounds the requests, and passBytes their data but for the last
	// one's, that a queue takes before others get a turn, and before the peer gets
	// its one signal.
	passLimit = 64
	passBytes = 512 << 10
	// batchLimit bounds the requests given to the device and answered in the
	// ring at once: a polling peer sees answers that early.
	batchLimit = 16
)

// ErrClosed: the workers have ended.
var ErrClosed = errors.New("workers have ended")

// Ring is one ring's layout in memory and its session. Its methods are called
// on the queue's worker only, but for Fail.
type Ring interface {
	// Ready returns how many requests can be taken. An error breaks the queue.
	Ready() (int, error)
	// DisableNotify tells the peer that no kicks are wanted.
	DisableNotify()
	// EnableNotify asks the peer for kicks. It reports whether requests came
	// meanwhile, for which there may be none.
	EnableNotify() bool
	// Take copies one request of those that Ready counted out of the ring and
	// fills in s.Req, but for Owner and Complete, or answers by itself: then it
	// returns false, and Answer is called at once. s.Block is to be set where
	// s.Req counts as a request of its Op. An error breaks the queue.
	Take(s *Slot) (submit bool, err error)
	// Taken is told that the device has taken over s.Req: its memory is needed
	// until Answer or Drop.
	Taken(s *Slot)
	// Answer puts the outcome, s.Req.Err, into the ring. An error breaks the queue.
	Answer(s *Slot) error
	// Drop is told that a request has ended that is not to be answered.
	Drop(s *Slot)
	// Publish makes what was answered visible to the peer.
	Publish()
	// NeedSignal reports whether the peer wants to be called for what was
	// published since it was last asked.
	NeedSignal() bool
	// Fail ends the session with a reason. It must not wait, neither for the
	// worker nor for anybody else. Any goroutine.
	Fail(err error)
	// Leak is told that the device may go on using the memory of requests
	// although it failed in Submit: it must stay mapped for good.
	Leak()
}

// Slot is one request of a queue. A queue has a fixed number of them, made
// once, so that a request allocates nothing.
type Slot struct {
	Req   block.Request
	Index int  // in its queue; constant
	Block bool // Req is counted by its Op

	next    *Slot // in the worker's completion list, or the queue's free list
	q       *Queue
	started int64 // worker's clock, ns; 0: not sampled
}

// Queue serves a Ring on a Worker. Fields belong to the worker, but for the
// constant ones.
type Queue struct {
	// Constant.
	w     *Worker
	id    int32 // in the worker's epoll
	ring  Ring
	dev   block.Device
	count *Counters

	kick int // descriptors belong to the session; -1: none
	call int

	slots       []Slot
	free        *Slot
	batch       []*block.Request
	batchSlots  []*Slot
	outstanding int  // requests that the device has taken over
	inSubmit    bool // the device runs on this goroutine
	pass        passCounters
	sampleTick  uint32

	paused   bool // disabled by the peer, or ending
	active   bool // polled
	touched  bool // in the worker's list of queues with completions
	broken   bool // the ring must not be touched any more
	drained  chan struct{}
	draining bool

	poll polling
}

// NewQueue makes a queue of at most num requests at once on the worker that has
// the fewest. owner tags its requests for Device.Cancel. It takes no request
// before Start. Release gives its place back.
func (s *Set) NewQueue(ring Ring, dev block.Device, owner any, count *Counters, num int) *Queue {
	q := &Queue{
		ring: ring, dev: dev, count: count, kick: -1, call: -1,
		slots: make([]Slot, num), batch: make([]*block.Request, 0, batchLimit), batchSlots: make([]*Slot, 0, batchLimit),
		drained: make(chan struct{}),
	}
	for i := range q.slots {
		sl := &q.slots[i]
		sl.Index, sl.q, sl.Req.Owner = i, q, owner
		sl.Req.Complete = sl.complete
		sl.next, q.free = q.free, sl
	}
	q.w = s.pick()
	return q
}

// Release gives back the queue's place on its worker. The queue is drained, or
// was never started. Called once.
func (q *Queue) Release() { q.w.set.unpick(q.w) }

// Worker returns the queue's worker.
func (q *Queue) Worker() *Worker { return q.w }

// Do runs f on the worker between two passes and waits for it. It returns false
// if the worker has ended. A fault in f on the ring's memory breaks the queue.
// Any goroutine but the workers'.
func (q *Queue) Do(f func()) bool { return q.w.do(q, f) }

// Start begins to serve the ring; kick is the eventfd that the peer signals
// (-1: the ring is looked at every millisecond) and call the one it is called by
// (-1: none). The ring is looked at at once: a kick may have come before. From
// within Do.
func (q *Queue) Start(kick, call int) error {
	q.call = call
	return q.w.add(q, kick)
}

// SetKick changes the eventfd that the peer signals. From within Do.
func (q *Queue) SetKick(fd int) error {
	err := q.w.setKick(q, fd)
	q.w.activate(q)
	return err
}

// SetCall changes the eventfd that the peer is called by. From within Do.
func (q *Queue) SetCall(fd int) { q.call = fd }

// Enable lets the queue take requests, or not. From within Do.
func (q *Queue) Enable(on bool) {
	q.paused = !on || q.broken
	q.w.activate(q)
}

// Stop takes nothing more from the ring. Drained's channel is closed when what
// was taken has ended; then the worker has forgotten the queue. Any goroutine
// but the workers'.
func (q *Queue) Stop() {
	q.Do(func() {
		q.paused = true
		select {
		case <-q.drained:
		default:
			q.draining = true
			q.checkDrained()
		}
	})
}

// Drained is closed when a stopped queue has no requests left.
func (q *Queue) Drained() <-chan struct{} { return q.drained }

// Broken reports whether the ring must not be touched any more. From within Do,
// or once drained.
func (q *Queue) Broken() bool { return q.broken }

// complete is the device's call at the end of a request that it took over.
func (s *Slot) complete(*block.Request) { s.q.w.push(s) }

func (q *Queue) alloc() *Slot {
	s := q.free
	if s == nil { // rings refuse more requests than the queue was made for
		panic("worker: more requests in flight than the queue was made for")
	}
	q.free = s.next
	s.next, s.started, s.Block = nil, 0, false
	r := &s.Req
	r.Flags, r.Err, r.Ended = 0, nil, false
	return s
}

func (q *Queue) release(s *Slot) { s.next, q.free = q.free, s }

func (q *Queue) drop(s *Slot) {
	q.ring.Drop(s)
	q.release(s)
}

// serve takes what the peer has made available, within passLimit and passBytes,
// and returns how many requests there were. It counts the worker's work: a unit
// per request and per 4 KiB.
func (q *Queue) serve() int {
	total := 0
	var bytes uint64
	for total < passLimit && bytes < passBytes && !q.paused {
		ready, err := q.ring.Ready()
		if err != nil {
			q.Fail(err)
			break
		}
		if ready == 0 {
			break
		}
		q.ring.DisableNotify()
		n, b, err := q.take(min(ready, batchLimit, passLimit-total), passBytes-bytes)
		total, bytes = total+n, bytes+b
		if err != nil {
			q.Fail(err)
			break
		}
	}
	if total > 0 {
		q.w.work += total + int(bytes>>12)
		q.signal()
		q.pass.flush(q.count)
	}
	return total
}

// take moves requests from the ring to the device, n at most and no more once
// their data has reached room bytes, and answers those that end at once. It
// returns how many there were, and how many bytes.
func (q *Queue) take(n int, room uint64) (total int, bytes uint64, err error) {
	batch, slots := q.batch[:0], q.batchSlots[:0]
	for ; total < n && bytes < room; total++ {
		s := q.alloc()
		submit, err := q.ring.Take(s)
		if err != nil {
			return total, bytes, err
		}
		if !submit {
			if err := q.answer(s); err != nil {
				return total, bytes, err
			}
			continue
		}
		if s.Req.Op == block.OpRead || s.Req.Op == block.OpWrite {
			bytes += s.Req.Length // others move no data
		}
		if q.sampleTick++; q.sampleTick&sampleMask == 0 {
			s.started = q.w.now()
		}
		batch, slots = append(batch, &s.Req), append(slots, s)
	}
	if len(batch) > 0 {
		q.inSubmit = true
		q.dev.Submit(batch)
		q.inSubmit = false
	}
	taken := 0
	var failed error
	for i, r := range batch {
		if !r.Ended {
			taken++
			q.ring.Taken(slots[i])
			continue
		}
		if err := q.finish(slots[i]); err != nil && failed == nil {
			failed = err
		}
	}
	if taken > 0 {
		q.outstanding += taken
		q.w.inFlight += taken
		q.count.inFlight.Add(int64(taken))
	}
	q.ring.Publish()
	return total, bytes, failed
}

// ends reports whether a request with this outcome must not be answered: the
// session has to end, and the peer submits the request again to the next one.
func ends(err error) bool {
	return errors.Is(err, block.ErrFault) || errors.Is(err, block.ErrCanceled) || errors.Is(err, block.ErrClosed)
}

// finish answers a request that the device has ended. An error ends the
// session; the request then stays in flight as the peer sees it.
func (q *Queue) finish(s *Slot) error {
	r := &s.Req
	op := r.Op
	q.pass.dirty = true
	q.pass.requests[op]++
	q.pass.bytes[op] += r.Length
	if s.started != 0 {
		q.count.ops[op].observe(q.w.now() - s.started)
	}
	if r.Err != nil {
		q.pass.errors[op]++
		if ends(r.Err) {
			err := fmt.Errorf("%v of %d bytes at %d: %w", op, r.Length, r.Offset, r.Err)
			q.drop(s)
			q.paused = true
			return err
		}
	}
	return q.answer(s)
}

// answer gives the request back.
func (q *Queue) answer(s *Slot) error {
	if !s.Block {
		q.pass.dirty = true
		q.pass.other++
	}
	err := q.ring.Answer(s)
	q.release(s)
	return err
}

// ended takes back a request that ended after Submit. The counts go down
// before anything can fault.
func (q *Queue) ended(s *Slot) {
	q.outstanding--
	q.w.inFlight--
	q.count.inFlight.Add(-1)
	if q.broken {
		q.drop(s)
		return
	}
	if err := q.finish(s); err != nil {
		q.Fail(err)
	}
}

// publish shows and signals what ended asynchronously. The queue is looked at
// next: the peer need not kick for what it adds when it sees the answers.
func (q *Queue) publish() {
	if !q.broken {
		if q.active {
			q.ring.DisableNotify()
		}
		q.ring.Publish()
		q.signal()
	}
	q.pass.flush(q.count)
}

// signal calls the peer if it wants that.
func (q *Queue) signal() {
	if !q.ring.NeedSignal() || q.call < 0 {
		return
	}
	q.w.signals.Add(1)
	q.w.signalling.Store(q)
	err := mem.SignalEventFD(q.call)
	q.w.signalling.Store(nil)
	q.w.give.due = true
	if err != nil {
		q.Fail(fmt.Errorf("calling: %w", err))
		return
	}
	q.count.calls.Add(1)
}

// Fail ends the session with a reason and touches the ring no more, unless the
// reason is the device's: then what still ends is answered. On the worker only.
func (q *Queue) Fail(err error) {
	q.paused = true
	if !errors.Is(err, block.ErrCanceled) && !errors.Is(err, block.ErrClosed) {
		q.broken = true
	}
	q.ring.Fail(err)
}

// checkDrained ends a stop when the last request has ended.
func (q *Queue) checkDrained() {
	if !q.draining || q.outstanding != 0 {
		return
	}
	q.draining = false
	q.w.forget(q)
	close(q.drained)
}
