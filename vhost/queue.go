package vhost

import (
	"fmt"

	"scoria/driver/block"
	"scoria/shm/mem"
	"scoria/shm/worker"
	"scoria/vhost/virtq"
)

// generation is guest memory as one memory table has it. Requests in flight
// hold theirs when the table is replaced. Only the queue's worker counts.
type generation struct {
	table       *mem.Table
	outstanding int
}

// queue is a started ring: the worker.Ring of a virtqueue. But for the constant
// fields it belongs to its worker.
type queue struct {
	// Constant.
	*worker.Queue
	s     *session
	index int          // of the ring
	chain *virtq.Chain // shared by the worker's queues

	vq       *virtq.Queue
	gen      *generation
	view     *deviceView // as of the last look at the ring
	log      *dirtyLog   // nil: not logging
	usedAddr uint64      // guest address at which writes to the used ring are logged
	logUsed  bool
	slots    []slot // by worker.Slot.Index
}

// newQueue makes the slots of a ring of num.
func newQueue(s *session, index, num int) *queue {
	q := &queue{s: s, index: index, slots: make([]slot, num)}
	q.Queue = s.srv.workers.NewQueue(q, s.dev, s, &s.ep.counters.Counters, num)
	q.chain = s.srv.chains[q.Worker()]
	return q
}

// Ready implements worker.Ring.
func (q *queue) Ready() (int, error) {
	n, err := q.vq.Ready()
	if n != 0 {
		q.view = q.s.view.Load()
	}
	return n, err
}

// DisableNotify implements worker.Ring.
func (q *queue) DisableNotify() { q.vq.DisableNotify() }

// EnableNotify implements worker.Ring.
func (q *queue) EnableNotify() bool { return q.vq.EnableNotify() }

// Publish implements worker.Ring.
func (q *queue) Publish() { q.vq.Publish() }

// NeedSignal implements worker.Ring.
func (q *queue) NeedSignal() bool { return q.vq.NeedSignal() }

// Leak implements worker.Ring.
func (q *queue) Leak() { q.s.leak.Store(true) }

// Fail implements worker.Ring.
func (q *queue) Fail(err error) { q.s.fail(fmt.Errorf("ring %d: %w", q.index, err)) }

// Take implements worker.Ring.
func (q *queue) Take(ws *worker.Slot) (bool, error) {
	if err := q.vq.Pop(q.chain, q.gen.table); err != nil {
		return false, err
	}
	s := &q.slots[ws.Index]
	s.Slot, s.gen, s.taken = ws, q.gen, false
	v, code, err := s.prepare(q.chain, q.gen.table, q.view)
	s.code = code
	return v == submit, err
}

// Taken implements worker.Ring.
func (q *queue) Taken(ws *worker.Slot) {
	s := &q.slots[ws.Index]
	s.taken = true
	s.gen.outstanding++
}

// Answer implements worker.Ring: it writes the status and gives the chain back.
func (q *queue) Answer(ws *worker.Slot) error {
	s := &q.slots[ws.Index]
	if q.settle(s) {
		defer releaseTable(s.gen.table)
	}
	status := s.code
	if s.Block {
		status = statusOf(s.Req.Err)
	}
	s.status[0] = status
	if q.log != nil {
		if err := q.logRequest(s); err != nil {
			return err
		}
	}
	q.vq.Push(s.head, s.written)
	s.status = nil
	return nil
}

// Drop implements worker.Ring: the request stays in flight as the front end
// sees it.
func (q *queue) Drop(ws *worker.Slot) {
	s := &q.slots[ws.Index]
	if q.settle(s) {
		releaseTable(s.gen.table)
	}
	s.status = nil
}

// settle counts a request off its memory. It reports whether that was the last
// one of a table that was replaced. It comes before anything that can fault.
func (q *queue) settle(s *slot) bool {
	if !s.taken {
		return false
	}
	s.taken = false
	s.gen.outstanding--
	return s.gen != q.gen && s.gen.outstanding == 0
}

// logRequest marks what a request wrote to guest memory.
func (q *queue) logRequest(s *slot) error {
	if s.Req.Op == block.OpRead {
		for _, seg := range s.Req.Segments {
			if err := q.log.markSlice(s.gen.table, seg); err != nil {
				return err
			}
		}
	}
	return q.log.markSlice(s.gen.table, s.status)
}

// releaseTable drops a reference away from the worker: unmapping takes time.
func releaseTable(t *mem.Table) { go t.Release() }

// logUsedRange is the ring's hook for writes to the used ring.
func (q *queue) logUsedRange(off, n int) {
	if err := q.log.mark(q.usedAddr+uint64(off), uint64(n)); err != nil {
		q.Queue.Fail(fmt.Errorf("used ring: %w", err))
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
