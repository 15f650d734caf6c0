package vhost

import (
	"errors"
	"fmt"
	"time"

	"golang.org/x/sys/unix"

	"scoria/driver/block"
	"scoria/shm/mem"
	"scoria/vhost/virtq"
)

const (
	// passLimit bounds the requests that a queue takes before others get a turn,
	// and before the driver gets its one signal.
	passLimit = 64
	// batchLimit bounds the requests given to the device and answered in the
	// ring at once: a polling driver sees answers that early.
	batchLimit = 16
)

// generation is guest memory as one memory table has it. Requests in flight
// hold theirs when the table is replaced. Only the queue's worker counts.
type generation struct {
	table       *mem.Table
	outstanding int
}

// queue is a started ring. But for the constant fields it belongs to its
// worker.
type queue struct {
	// Constant.
	s     *session
	w     *worker
	id    int32 // in the worker's epoll
	index int   // of the ring
	dev   block.Device
	count *counters

	vq       *virtq.Queue
	gen      *generation
	log      *dirtyLog // nil: not logging
	usedAddr uint64    // guest address at which writes to the used ring are logged
	logUsed  bool
	kick     int // descriptors belong to the session; -1: none
	call     int

	slots       []slot
	free        *slot
	batch       []*block.Request
	batchSlots  []*slot
	outstanding int  // requests that the device has taken over
	inSubmit    bool // the device runs on this goroutine
	pass        passCounters
	sampleTick  uint32

	paused   bool // disabled by the front end, or ending
	active   bool // polled
	touched  bool // in the worker's list of queues with completions
	broken   bool // the ring must not be touched any more
	drained  chan struct{}
	draining bool

	poll pollState
}

// newQueue makes the slots of a ring of num.
func newQueue(s *session, index, num int) *queue {
	q := &queue{
		s: s, index: index, dev: s.dev, count: &s.ep.counters, kick: -1, call: -1,
		slots: make([]slot, num), batch: make([]*block.Request, 0, batchLimit), batchSlots: make([]*slot, 0, batchLimit),
		drained: make(chan struct{}),
	}
	for i := range q.slots {
		sl := &q.slots[i]
		sl.q, sl.req.Owner = q, s
		sl.req.Complete = sl.complete
		sl.next, q.free = q.free, sl
	}
	return q
}

// complete is the device's call at the end of a request that it took over.
func (s *slot) complete(*block.Request) { s.q.w.push(s) }

func (q *queue) alloc() *slot {
	s := q.free
	if s == nil { // the ring refuses a chain that is in flight already
		panic("vhost: more requests in flight than the ring has descriptors")
	}
	q.free = s.next
	s.next, s.gen, s.started = nil, q.gen, 0
	return s
}

func (q *queue) release(s *slot) {
	s.status, s.gen = nil, nil
	s.next, q.free = q.free, s
}

// serve takes what the driver has made available, up to passLimit requests,
// and returns how many there were.
func (q *queue) serve() int {
	total := 0
	for total < passLimit && !q.paused {
		ready, err := q.vq.Ready()
		if err != nil {
			q.fail(err)
			break
		}
		if ready == 0 {
			break
		}
		q.vq.DisableNotify()
		n := min(ready, batchLimit, passLimit-total)
		if err := q.take(n); err != nil {
			q.fail(err)
			break
		}
		total += n
	}
	if total > 0 {
		q.signal()
		q.pass.flush(q.count)
	}
	return total
}

// take moves n requests from the ring to the device and answers those that
// end at once.
func (q *queue) take(n int) error {
	batch, slots := q.batch[:0], q.batchSlots[:0]
	view := q.s.view.Load()
	for range n {
		if err := q.vq.Pop(&q.w.chain, q.gen.table); err != nil {
			return err
		}
		s := q.alloc()
		v, status, err := s.prepare(&q.w.chain, q.gen.table, view)
		if err != nil {
			return err
		}
		if v == answer {
			if err := q.answer(s, status); err != nil {
				return err
			}
			continue
		}
		if q.sampleTick++; q.sampleTick&sampleMask == 0 {
			s.started = q.w.now()
		}
		batch, slots = append(batch, &s.req), append(slots, s)
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
			slots[i].gen.outstanding++
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
	q.vq.Publish()
	return failed
}

// finish answers a request that the device has ended. An error ends the
// session; the request then stays in flight.
func (q *queue) finish(s *slot) error {
	r := &s.req
	status, end := statusOf(r.Err)
	op := r.Op
	q.pass.dirty = true
	q.pass.requests[op]++
	q.pass.bytes[op] += r.Length
	if r.Err != nil {
		q.pass.errors[op]++
	}
	if s.started != 0 {
		q.count.ops[op].observe(q.w.now() - s.started)
	}
	if end != nil {
		q.release(s)
		q.paused = true
		return fmt.Errorf("ring %d: %v of %d bytes at %d: %w", q.index, op, r.Length, r.Offset, end)
	}
	return q.answer(s, status)
}

// answer writes the status and gives the chain back.
func (q *queue) answer(s *slot, status byte) error {
	if !s.isBlock {
		q.pass.dirty = true
		q.pass.other++
	}
	s.status[0] = status
	if q.log != nil {
		if err := q.logRequest(s); err != nil {
			return err
		}
	}
	q.vq.Push(s.head, s.written)
	q.release(s)
	return nil
}

// logRequest marks what a request wrote to guest memory.
func (q *queue) logRequest(s *slot) error {
	if s.req.Op == block.OpRead {
		for _, seg := range s.req.Segments {
			if err := q.log.markSlice(s.gen.table, seg); err != nil {
				return err
			}
		}
	}
	return q.log.markSlice(s.gen.table, s.status)
}

// ended takes back a request that ended after Submit. The counts go down
// before anything can fault.
func (q *queue) ended(s *slot) {
	q.outstanding--
	q.w.inFlight--
	q.count.inFlight.Add(-1)
	if g := s.gen; g != q.gen {
		if g.outstanding--; g.outstanding == 0 {
			defer releaseTable(g.table)
		}
	} else {
		g.outstanding--
	}
	if q.broken {
		q.release(s)
		return
	}
	if err := q.finish(s); err != nil {
		q.fail(err)
	}
}

// releaseTable drops a reference away from the worker: unmapping takes time.
func releaseTable(t *mem.Table) { go t.Release() }

// publish shows and signals what ended asynchronously.
func (q *queue) publish() {
	if !q.broken {
		q.vq.Publish()
		q.signal()
	}
	q.pass.flush(q.count)
}

// signal calls the driver if it wants that.
func (q *queue) signal() {
	if !q.vq.NeedSignal() || q.call < 0 {
		return
	}
	q.w.signals.Add(1)
	q.w.signalling.Store(q)
	err := mem.SignalEventFD(q.call)
	q.w.signalling.Store(nil)
	if err != nil {
		q.fail(fmt.Errorf("calling: %w", err))
		return
	}
	q.count.calls.Add(1)
}

// fail ends the session with a reason and touches the ring no more, unless the
// reason is the device's: then what still ends is answered.
func (q *queue) fail(err error) {
	q.paused = true
	if !errors.Is(err, block.ErrCanceled) && !errors.Is(err, block.ErrClosed) {
		q.broken = true
	}
	q.s.fail(fmt.Errorf("ring %d: %w", q.index, err))
}

// logUsedRange is the ring's hook for writes to the used ring.
func (q *queue) logUsedRange(off, n int) {
	if err := q.log.mark(q.usedAddr+uint64(off), uint64(n)); err != nil {
		q.fail(fmt.Errorf("used ring: %w", err))
	}
}

// setLog starts, changes or stops dirty logging.
func (q *queue) setLog(log *dirtyLog, usedAddr uint64, logUsed bool) {
	q.log, q.usedAddr, q.logUsed = log, usedAddr, logUsed
	if log != nil && logUsed {
		q.vq.SetUsedLog(q.logUsedRange)
	} else {
		q.vq.SetUsedLog(nil)
	}
}

// setTable moves the queue to a new memory table, of which it takes over one
// reference, with the ring at its new place.
func (q *queue) setTable(t *mem.Table, r *ringMemory) error {
	if err := q.vq.Rebind(r.desc, r.avail, r.used); err != nil {
		return err
	}
	old := q.gen
	q.gen = &generation{table: t}
	if old.outstanding == 0 {
		releaseTable(old.table)
	}
	return nil
}

// checkDrained ends a stop when the last request has ended.
func (q *queue) checkDrained() {
	if !q.draining || q.outstanding != 0 {
		return
	}
	q.draining = false
	q.w.forget(q)
	close(q.drained)
}

// pollState is a queue's part in adaptive polling; see the package doc.
type pollState struct {
	window     int64 // ns to poll after the last request
	idleFrom   int64 // worker's clock at the first pass in vain; 0: busy
	deadline   int64
	probing    bool
	parks      int // since the last probe
	probeEvery int
}

const (
	probeMin = 16
	probeMax = 2048
)

// found adapts to work that came while the queue was polled.
func (p *pollState) found(limit int64) {
	p.window = min(max(2*p.window, limit/8), limit)
	p.idleFrom, p.probing, p.probeEvery = 0, false, probeMin
}

// begin opens a wait. It returns whether there is a window to poll for.
func (p *pollState) begin(now, limit int64, budget bool) {
	window := p.window
	if !budget {
		window = 0
	} else if window == 0 && limit > 0 {
		if p.parks++; p.parks >= p.probeEvery {
			p.parks, p.probing, window = 0, true, limit
		}
	}
	p.idleFrom, p.deadline = now, now+window
}

// expired adapts to a wait that polling did not end, and reports whether there
// was a window at all.
func (p *pollState) expired(limit int64) bool {
	polled := p.deadline > p.idleFrom
	if p.probing {
		p.probeEvery = min(2*p.probeEvery, probeMax)
	} else if polled {
		if p.window /= 4; p.window < limit/32 {
			p.window = 0
		}
	}
	p.idleFrom, p.probing = 0, false
	return polled
}

// closeFD closes a descriptor and marks it closed.
func closeFD(fd *int) {
	if *fd >= 0 {
		unix.Close(*fd)
		*fd = -1
	}
}

// now is the worker's clock: nanoseconds since it was made, never 0.
func (w *worker) now() int64 { return int64(time.Since(w.epoch)) + 1 }
