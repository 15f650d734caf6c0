package shm

import (
	"errors"
	"fmt"

	"scoria/driver/block"
	"scoria/shm/mem"
	"scoria/shm/ring"
	"scoria/shm/worker"
)

// queue is a served ring: its worker.Ring. But for the constant fields it
// belongs to its worker.
type queue struct {
	// Constant.
	*worker.Queue
	s          *session
	number     uint32
	memory     *mem.Mapping
	charged    usage
	kick, call int
	readOnly   bool
	maxDiscard uint64 // bytes; 0: no limit

	ring    *ring.Server
	req     ring.Request
	answers []ring.Completion // by worker.Slot.Index
}

// Ready implements worker.Ring.
func (q *queue) Ready() (int, error) { return q.ring.Ready() }

// DisableNotify implements worker.Ring.
func (q *queue) DisableNotify() { q.ring.DisableNotify() }

// EnableNotify implements worker.Ring.
func (q *queue) EnableNotify() bool { return q.ring.EnableNotify() }

// Publish implements worker.Ring.
func (q *queue) Publish() { q.ring.Publish() }

// NeedSignal implements worker.Ring.
func (q *queue) NeedSignal() bool { return q.ring.NeedSignal() }

// Taken implements worker.Ring: the memory stays until the queue is drained.
func (q *queue) Taken(*worker.Slot) {}

// Drop implements worker.Ring: the request stays without a completion.
func (q *queue) Drop(*worker.Slot) {}

// Leak implements worker.Ring.
func (q *queue) Leak() { q.s.leak.Store(true) }

// Fail implements worker.Ring.
func (q *queue) Fail(err error) { q.s.fail(fmt.Errorf("ring %d: %w", q.number, err)) }

// Answer implements worker.Ring.
func (q *queue) Answer(s *worker.Slot) error {
	c := q.answers[s.Index]
	if s.Block {
		c.Status = statusOf(s.Req.Err)
	}
	q.ring.Push(c)
	return nil
}

// Take implements worker.Ring.
func (q *queue) Take(s *worker.Slot) (bool, error) {
	q.ring.Pop(&q.req)
	status := q.prepare(&s.Req)
	q.answers[s.Index] = ring.Completion{Cookie: q.req.Cookie, Status: status}
	s.Block = status == ring.StatusOK
	return s.Block, nil
}

// prepare turns the entry into a block.Request whose segments point into the
// arena. The device checks range and alignment.
func (q *queue) prepare(r *block.Request) ring.Status {
	e := &q.req
	r.Op, r.Offset, r.Length, r.Segments = block.OpRead, e.Offset, e.Length, r.Segments[:0]
	if e.Reserved != 0 || e.Flags&^(ring.FlagFUA|ring.FlagNoUnmap) != 0 {
		return ring.StatusInvalid
	}
	if q.readOnly && e.Op != ring.OpRead && e.Op != ring.OpFlush {
		return ring.StatusReadOnly
	}
	allowed := uint8(0)
	switch e.Op {
	case ring.OpRead:
		return q.prepareData(r, e)
	case ring.OpWrite:
		r.Op = block.OpWrite
		return q.prepareData(r, e)
	case ring.OpFlush:
		r.Op, r.Offset, r.Length = block.OpFlush, 0, 0
	case ring.OpDiscard:
		r.Op, allowed = block.OpDiscard, ring.FlagFUA
	case ring.OpWriteZeroes:
		r.Op, allowed = block.OpWriteZeroes, ring.FlagFUA|ring.FlagNoUnmap
	default:
		return ring.StatusUnsupported
	}
	if e.Flags&^allowed != 0 || e.Segments != 0 || q.maxDiscard != 0 && r.Length > q.maxDiscard {
		return ring.StatusInvalid
	}
	setFlags(r, e.Flags)
	return ring.StatusOK
}

func (q *queue) prepareData(r *block.Request, e *ring.Request) ring.Status {
	if e.Length == 0 || e.Length > block.MaxRequestBytes || e.Flags&ring.FlagNoUnmap != 0 || e.Op == ring.OpRead && e.Flags != 0 {
		return ring.StatusInvalid
	}
	var ok bool
	if r.Segments, ok = q.ring.AppendData(r.Segments, e); !ok {
		return ring.StatusInvalid
	}
	setFlags(r, e.Flags)
	return ring.StatusOK
}

func setFlags(r *block.Request, flags uint8) {
	if flags&ring.FlagFUA != 0 {
		r.Flags |= block.FUA
	}
	if flags&ring.FlagNoUnmap != 0 {
		r.Flags |= block.NoUnmap
	}
}

// statusOf maps the outcome of a request to the ring's status.
func statusOf(err error) ring.Status {
	if err == nil {
		return ring.StatusOK
	}
	for _, m := range []struct {
		err    error
		status ring.Status
	}{
		{block.ErrRange, ring.StatusRange}, {block.ErrAlignment, ring.StatusAlignment}, {block.ErrReadOnly, ring.StatusReadOnly},
		{block.ErrCorrupt, ring.StatusCorrupt}, {block.ErrFailed, ring.StatusFailed},
	} {
		if errors.Is(err, m.err) {
			return m.status
		}
	}
	return ring.StatusIO
}

// release gives back what a drained queue has.
func (q *queue) release() {
	q.Queue.Release()
	mem.CloseFD(&q.kick)
	mem.CloseFD(&q.call)
	if q.s.leak.Load() {
		q.charged.memory = 0 // it stays
	} else {
		q.memory.Release()
	}
	q.s.srv.giveRing(q.s.peer.UID, q.charged)
}
