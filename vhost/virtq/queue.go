package virtq

import (
	"errors"
	"fmt"
)

// Errors, all but ErrLayout the driver's fault in a running ring.
var (
	ErrSize       = errors.New("ring size must be a power of two from 1 to 32768")
	ErrLayout     = errors.New("ring does not fit its memory")
	ErrAvailIndex = errors.New("available index is more than the ring's size ahead")
	ErrHead       = errors.New("descriptor index is outside the ring")
	ErrBusy       = errors.New("descriptor chain is made available while it is in flight")
	ErrLoop       = errors.New("descriptor chain is longer than the ring")
	ErrIndirect   = errors.New("bad indirect descriptor")
	ErrOrder      = errors.New("readable descriptor after a writable one")
	ErrEmptyDesc  = errors.New("descriptor of zero length")
	ErrInflight   = errors.New("bad in-flight region")
)

// Memory reads guest memory; *mem.Table is one.
type Memory interface {
	// ReadAt copies len(p) bytes at guest address addr and reports whether all
	// of them are mapped.
	ReadAt(p []byte, addr uint64) bool
}

// Config describes a ring to New. The slices are used until the Queue is
// dropped or gets others by Rebind.
type Config struct {
	Num               int // descriptors, a power of two
	Desc, Avail, Used []byte
	Features          uint64 // FeatureIndirect and FeatureEventIdx count
	Base              uint16 // index of the first available entry to take; see Inflight
	// Inflight is the ring's part of the in-flight area, or nil. With it, what
	// was in flight when a former device died is taken first, in the order in
	// which it was made available, and Base is not needed: the ring goes on
	// behind what was taken.
	Inflight []byte
	// InflightNum is the number of descriptors that the in-flight area was made
	// for: Num at least.
	InflightNum int
	// UsedLog, if set, is told of every range of the used ring that was written,
	// after the write, for dirty logging.
	UsedLog func(off, n int)
}

// Queue is the device's side of a split virtqueue. It belongs to one goroutine
// at a time.
type Queue struct {
	view
	mask uint16
	num  int

	indirect, eventIdx bool

	lastAvail   uint16 // next entry to take
	shadowAvail uint16 // avail.idx when last looked at
	usedIdx     uint16 // as published
	pending     uint16 // used elements behind usedIdx
	signalled   uint16 // usedIdx when the driver was last considered for a signal
	everSignals bool   // signalled is valid
	usedFlags   uint16
	armed       bool // EnableNotify was called last, not DisableNotify; with EVENT_IDX

	busy  []bool // by head: taken and not yet pushed
	inuse int

	resubmit []uint16 // heads to take before anything else
	region   *inflightRegion
	states   []inflightDesc
	batch    []uint16 // heads pushed and not yet published
	counter  uint64

	usedLog func(off, n int)
	fence   uint32
}

// Chain is what Pop takes from a ring: private copies of descriptors. One
// Chain serves many queues, one after the other.
type Chain struct {
	Head     uint16
	Descs    []Desc // without the indirect descriptor itself; none is empty
	Writable int    // index of the first descriptor that the device writes to
	table    []Desc
}

// New makes the device's side of a ring. It fails with ErrSize, ErrLayout or
// ErrInflight.
func New(c Config) (*Queue, error) {
	if c.Num < 1 || c.Num > MaxSize || c.Num&(c.Num-1) != 0 {
		return nil, fmt.Errorf("ring of %d: %w", c.Num, ErrSize)
	}
	q := &Queue{
		num: c.Num, mask: uint16(c.Num - 1), busy: make([]bool, c.Num), usedLog: c.UsedLog,
		indirect: c.Features&FeatureIndirect != 0, eventIdx: c.Features&FeatureEventIdx != 0,
	}
	if err := q.Rebind(c.Desc, c.Avail, c.Used); err != nil {
		return nil, err
	}
	q.usedIdx = q.loadUsedIdx()
	q.lastAvail = c.Base
	if c.Inflight != nil {
		if err := q.attachInflight(c.Inflight, c.InflightNum); err != nil {
			return nil, err
		}
	}
	q.shadowAvail = q.lastAvail
	return q, nil
}

// Rebind moves the ring to other mappings of the same memory.
func (q *Queue) Rebind(desc, avail, used []byte) error {
	v, err := newView(q.num, desc, avail, used)
	if err != nil {
		return err
	}
	q.view = v
	return nil
}

// SetUsedLog replaces Config.UsedLog.
func (q *Queue) SetUsedLog(f func(off, n int)) { q.usedLog = f }

// Base is the index of the next available entry: what GET_VRING_BASE answers.
func (q *Queue) Base() uint16 { return q.lastAvail }

// InUse is the number of chains that were taken and not yet pushed.
func (q *Queue) InUse() int { return q.inuse }

// Ready returns how many chains Pop can take now. It looks at the driver's
// index only when all chains seen before have been taken.
func (q *Queue) Ready() (int, error) {
	n := q.shadowAvail - q.lastAvail
	if n == 0 {
		q.shadowAvail = q.loadAvailIdx()
		n = q.shadowAvail - q.lastAvail
		if int(n) > q.num {
			return 0, fmt.Errorf("available index %d with %d taken, ring of %d: %w", q.shadowAvail, q.lastAvail, q.num, ErrAvailIndex)
		}
	}
	return int(n) + len(q.resubmit), nil
}

// Pop takes the next chain, after Ready said that there is one. mem translates
// the addresses of indirect tables.
func (q *Queue) Pop(c *Chain, mem Memory) error {
	var head uint16
	if len(q.resubmit) > 0 {
		head = q.resubmit[0]
		q.resubmit = q.resubmit[1:]
	} else {
		head = q.loadHead(q.lastAvail & q.mask)
		if int(head) >= q.num {
			return fmt.Errorf("head %d in a ring of %d: %w", head, q.num, ErrHead)
		}
		if q.busy[head] {
			return fmt.Errorf("head %d: %w", head, ErrBusy)
		}
		q.lastAvail++
		q.busy[head] = true
		q.inuse++
		if q.region != nil {
			q.markInflight(head)
		}
	}
	return q.copyChain(c, head, mem)
}

// copyChain copies the chain that starts at head and checks its form.
func (q *Queue) copyChain(c *Chain, head uint16, mem Memory) error {
	c.Head, c.Descs, c.Writable = head, c.Descs[:0], -1
	i := head
	for {
		d := q.loadDesc(i)
		if d.Flags&DescIndirect != 0 {
			if err := q.copyIndirect(c, &d, mem); err != nil {
				return err
			}
			break
		}
		if err := c.add(&d); err != nil {
			return err
		}
		if d.Flags&DescNext == 0 {
			break
		}
		if len(c.Descs) >= q.num {
			return fmt.Errorf("chain at %d in a ring of %d: %w", head, q.num, ErrLoop)
		}
		if i = d.Next; int(i) >= q.num {
			return fmt.Errorf("chain at %d goes on at %d in a ring of %d: %w", head, i, q.num, ErrHead)
		}
	}
	if c.Writable < 0 {
		c.Writable = len(c.Descs)
	}
	return nil
}

// add appends a descriptor that carries data.
func (c *Chain) add(d *Desc) error {
	if d.Len == 0 {
		return fmt.Errorf("chain at %d: %w", c.Head, ErrEmptyDesc)
	}
	if d.Flags&DescWrite != 0 {
		if c.Writable < 0 {
			c.Writable = len(c.Descs)
		}
	} else if c.Writable >= 0 {
		return fmt.Errorf("chain at %d: %w", c.Head, ErrOrder)
	}
	c.Descs = append(c.Descs, *d)
	return nil
}

// copyIndirect walks the table that d points to (virtio 1.1, 2.6.5.3). The
// specification asks for no alignment of its address; its length must be whole
// descriptors.
func (q *Queue) copyIndirect(c *Chain, d *Desc, mem Memory) error {
	n := int(d.Len / DescBytes)
	switch {
	case !q.indirect:
		return fmt.Errorf("chain at %d: the feature was not negotiated: %w", c.Head, ErrIndirect)
	case d.Flags&DescNext != 0:
		return fmt.Errorf("chain at %d: it has a next descriptor: %w", c.Head, ErrIndirect)
	case n == 0 || d.Len%DescBytes != 0 || n > MaxIndirect:
		return fmt.Errorf("chain at %d: table of %d bytes, want a multiple of %d up to %d: %w", c.Head, d.Len, DescBytes, DescBytes*MaxIndirect, ErrIndirect)
	}
	if cap(c.table) < n {
		c.table = make([]Desc, max(n, 128))
	}
	table := c.table[:n]
	if !mem.ReadAt(descBytes(table), d.Addr) {
		return fmt.Errorf("chain at %d: table of %d bytes at %#x is not in guest memory: %w", c.Head, d.Len, d.Addr, ErrIndirect)
	}
	i := 0
	for range n {
		e := &table[i]
		if e.Flags&DescIndirect != 0 {
			return fmt.Errorf("chain at %d: indirect inside an indirect table: %w", c.Head, ErrIndirect)
		}
		if err := c.add(e); err != nil {
			return err
		}
		if e.Flags&DescNext == 0 {
			return nil
		}
		if i = int(e.Next); i >= n {
			return fmt.Errorf("chain at %d: table of %d goes on at %d: %w", c.Head, n, i, ErrIndirect)
		}
	}
	return fmt.Errorf("chain at %d: table of %d has a loop: %w", c.Head, n, ErrLoop)
}

// Push returns a chain, of whose writable part n bytes were written. The driver
// sees it after Publish. The head must have come from Pop.
func (q *Queue) Push(head uint16, n uint32) {
	if !q.busy[head] {
		panic("virtq: Push of a chain that is not in flight")
	}
	q.busy[head] = false
	q.inuse--
	q.storeUsedElem((q.usedIdx+q.pending)&q.mask, uint32(head), n)
	q.pending++
	if q.region != nil {
		q.states[head].next = q.region.lastBatchHead
		q.region.lastBatchHead = head
		q.batch = append(q.batch, head)
	}
}

// Pending is the number of chains pushed and not yet published.
func (q *Queue) Pending() int { return int(q.pending) }

// Publish shows the driver what was pushed.
func (q *Queue) Publish() {
	n := q.pending
	if n == 0 {
		return
	}
	old := q.usedIdx
	q.usedIdx += n
	q.pending = 0
	q.storeUsedHead(q.usedFlags, q.usedIdx)
	if q.region != nil {
		q.clearInflight()
	}
	if q.usedLog != nil {
		q.logUsed(old, n)
	}
}

func (q *Queue) logUsed(old, n uint16) {
	first := int(old & q.mask)
	k := min(int(n), q.num-first)
	q.usedLog(4+usedElemBytes*first, usedElemBytes*k)
	if k < int(n) {
		q.usedLog(4, usedElemBytes*(int(n)-k))
	}
	q.usedLog(0, 4)
}

// NeedSignal reports whether the driver wants to hear of what was published
// since the last call.
func (q *Queue) NeedSignal() bool {
	old, valid := q.signalled, q.everSignals
	q.signalled, q.everSignals = q.usedIdx, true
	if !valid {
		return true
	}
	if old == q.usedIdx {
		return false
	}
	if q.eventIdx {
		return NeedEvent(q.loadUsedEvent(), q.usedIdx, old)
	}
	return q.loadAvailFlags()&AvailNoInterrupt == 0
}

// DisableNotify tells the driver not to kick. It is a hint. With EVENT_IDX there
// is something to do only if the event that EnableNotify asked for has not come:
// else it stays behind by itself.
func (q *Queue) DisableNotify() {
	if q.eventIdx {
		if q.armed && q.loadAvailIdx() == q.lastAvail {
			q.storeAvailEvent(q.lastAvail-1, &q.fence)
			if q.usedLog != nil {
				q.usedLog(4+usedElemBytes*q.num, 2)
			}
		}
		q.armed = false
		return
	}
	if q.usedFlags == 0 {
		q.usedFlags = UsedNoNotify
		q.storeUsedHead(q.usedFlags, q.usedIdx)
		if q.usedLog != nil {
			q.usedLog(0, 4)
		}
	}
}

// EnableNotify asks the driver to kick at its next chain and reports whether
// there is something to take already: then no kick may come for it, and the
// caller has to look again.
func (q *Queue) EnableNotify() bool {
	off, n := 0, 4
	if q.eventIdx {
		q.storeAvailEvent(q.lastAvail, &q.fence)
		q.armed = true
		off, n = 4+usedElemBytes*q.num, 2
	} else {
		q.usedFlags = 0
		q.storeUsedHead(0, q.usedIdx)
	}
	if q.usedLog != nil {
		q.usedLog(off, n)
	}
	return q.loadAvailIdx() != q.lastAvail || len(q.resubmit) > 0
}
