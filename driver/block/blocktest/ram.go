// Package blocktest has what tests of block.Device and of its users need: RAM,
// the reference implementation of a Device; Pool, a block.Opener of RAM
// devices; and Run, the conformance suite that every Device must pass.
//
// RAM is meant to be obviously right rather than fast, and to be awkward on
// request: it can complete everything late and out of order (Async), make
// requests wait for room (Stall), fail chosen requests (Options.Fail) and show
// what reaches it (Options.Trace). It keeps nothing beyond the process; its
// flushes succeed at once.
package blocktest

import (
	"cmp"
	"context"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"

	"scoria/driver/block"
)

// Mode says how a RAM device completes requests.
type Mode uint8

const (
	// Sync answers every request before Submit returns, except while stalled.
	Sync Mode = iota
	// Async takes over every request and completes it later from another
	// goroutine, in random order.
	Async
	// Mixed answers some requests at once and takes over the others.
	Mixed
)

// Options of a RAM device. The zero value is a writable device with 512-byte
// logical blocks that answers at once.
type Options struct {
	Name         string // default "default/ram"
	Serial       string // default "ram"
	LogicalBlock uint32 // bytes; default 512
	ReadOnly     bool
	Mode         Mode
	MaxDiscard   uint64 // bytes, as in block.Info; only announced, not enforced
	Seed         uint64 // of the random order of Async and Mixed

	// Trace sees every request as it is submitted, before anything is done. It
	// must not keep the request.
	Trace func(*block.Request)
	// Fail is asked about every valid request; an error ends the request with it
	// and nothing is done.
	Fail func(*block.Request) error
}

// RAM is a block.Device in memory. Only clusters that were written occupy any.
type RAM struct {
	opts Options

	// Requests hold sizeMu shared while they run, Resize exclusively. Lock order:
	// sizeMu, then shard.mu; the others are taken alone, except that watchers
	// are called under watchMu (so they must not call Watch or cancel).
	sizeMu sync.RWMutex
	size   uint64
	shards [64]shard

	qmu     sync.Mutex
	qcond   sync.Cond
	queue   []*block.Request // taken over, any order; bounded by the submitters
	waiting []*block.Request // waiting for room while stalls > 0
	rnd     *rand.Rand
	stalls  int
	closed  bool
	done    chan struct{} // closed when the completing goroutine has ended

	claimMu sync.Mutex
	holder  block.Claimant
	claims  int

	watchMu  sync.Mutex
	watchers map[int]func(block.Info)
	watchSeq int

	submitted atomic.Uint64
}

type shard struct {
	mu       sync.RWMutex
	clusters map[uint64]*[block.ClusterSize]byte
}

// NewRAM makes a device of size bytes, which must be a multiple of the logical
// block. Close ends its goroutine, if the mode has one.
func NewRAM(size uint64, opts Options) *RAM {
	opts.Name = cmp.Or(opts.Name, "default/ram")
	opts.Serial = cmp.Or(opts.Serial, "ram")
	opts.LogicalBlock = cmp.Or(opts.LogicalBlock, block.SectorSize)
	if size%uint64(opts.LogicalBlock) != 0 {
		panic(fmt.Sprintf("blocktest: size %d is no multiple of the logical block %d", size, opts.LogicalBlock))
	}
	d := &RAM{
		opts:     opts,
		size:     size,
		rnd:      rand.New(rand.NewPCG(opts.Seed, 0)),
		watchers: make(map[int]func(block.Info)),
		done:     make(chan struct{}),
	}
	d.qcond.L = &d.qmu
	for i := range d.shards {
		d.shards[i].clusters = make(map[uint64]*[block.ClusterSize]byte)
	}
	go d.complete()
	return d
}

// Close refuses all later requests with block.ErrClosed, ends those that wait
// for room the same way, and returns when every request has been completed.
func (d *RAM) Close() {
	d.qmu.Lock()
	d.closed = true
	d.stalls = 0
	for _, r := range d.waiting {
		r.Err = block.ErrClosed
		d.queue = append(d.queue, r)
	}
	d.waiting = nil
	d.qmu.Unlock()
	d.qcond.Broadcast()
	<-d.done
}

// Info implements block.Device.
func (d *RAM) Info() block.Info {
	d.sizeMu.RLock()
	defer d.sizeMu.RUnlock()
	return d.info()
}

func (d *RAM) info() block.Info {
	return block.Info{
		Name:             d.opts.Name,
		Serial:           d.opts.Serial,
		Size:             d.size,
		LogicalBlock:     d.opts.LogicalBlock,
		PhysicalBlock:    block.ClusterSize,
		ReadOnly:         d.opts.ReadOnly,
		MaxDiscard:       d.opts.MaxDiscard,
		DiscardAlignment: block.ClusterSize,
	}
}

// Submitted counts the requests that reached the device.
func (d *RAM) Submitted() uint64 { return d.submitted.Load() }

// Submit implements block.Device.
func (d *RAM) Submit(batch []*block.Request) {
	d.submitted.Add(uint64(len(batch)))
	for _, r := range batch {
		if d.opts.Trace != nil {
			d.opts.Trace(r)
		}
		if !d.takeOver(r) {
			r.Err = d.carryOut(r)
			r.Ended = true
		}
	}
}

// takeOver queues a request that is not to be answered at once.
func (d *RAM) takeOver(r *block.Request) bool {
	d.qmu.Lock()
	defer d.qmu.Unlock()
	switch {
	case d.closed:
		// carryOut refuses it.
		return false
	case d.stalls > 0 && r.Op != block.OpRead && r.Op != block.OpFlush:
		r.Err = nil
		d.waiting = append(d.waiting, r)
		return true
	case d.opts.Mode == Async, d.opts.Mode == Mixed && d.rnd.IntN(2) == 0:
		r.Err = nil
		d.queue = append(d.queue, r)
		d.qcond.Signal()
		return true
	}
	return false
}

// complete is the device's one goroutine: it carries out queued requests in
// random order.
func (d *RAM) complete() {
	defer close(d.done)
	for {
		d.qmu.Lock()
		for len(d.queue) == 0 && !d.closed {
			d.qcond.Wait()
		}
		if len(d.queue) == 0 {
			d.qmu.Unlock()
			return
		}
		i, last := d.rnd.IntN(len(d.queue)), len(d.queue)-1
		r := d.queue[i]
		d.queue[i] = d.queue[last]
		d.queue[last] = nil
		d.queue = d.queue[:last]
		d.qmu.Unlock()
		if r.Err == nil {
			r.Err = d.carryOut(r)
		}
		r.Complete(r)
	}
}

// Stall makes requests that change data wait for room, as a full write buffer
// does, until resume is called. Stalls nest.
func (d *RAM) Stall() (resume func()) {
	d.qmu.Lock()
	d.stalls++
	d.qmu.Unlock()
	return sync.OnceFunc(func() {
		d.qmu.Lock()
		defer d.qmu.Unlock()
		if d.stalls == 0 {
			return // closed meanwhile
		}
		if d.stalls--; d.stalls == 0 {
			d.queue = append(d.queue, d.waiting...)
			d.waiting = nil
			d.qcond.Signal()
		}
	})
}

// Waiting returns the number of requests that wait for room.
func (d *RAM) Waiting() int {
	d.qmu.Lock()
	defer d.qmu.Unlock()
	return len(d.waiting)
}

// Cancel implements block.Device.
func (d *RAM) Cancel(owner any) {
	d.qmu.Lock()
	defer d.qmu.Unlock()
	d.waiting = slices.DeleteFunc(d.waiting, func(r *block.Request) bool {
		if r.Owner != owner {
			return false
		}
		r.Err = block.ErrCanceled
		d.queue = append(d.queue, r)
		return true
	})
	d.qcond.Signal()
}

// Claim implements block.Device.
func (d *RAM) Claim(c block.Claimant) (func(), error) {
	d.claimMu.Lock()
	defer d.claimMu.Unlock()
	if d.claims > 0 && d.holder != c {
		return nil, &block.InUseError{Volume: d.opts.Name, Holder: d.holder}
	}
	d.holder = c
	d.claims++
	return sync.OnceFunc(func() {
		d.claimMu.Lock()
		defer d.claimMu.Unlock()
		d.claims--
	}), nil
}

// Claimed returns who holds the claim, if anybody does.
func (d *RAM) Claimed() (holder block.Claimant, ok bool) {
	d.claimMu.Lock()
	defer d.claimMu.Unlock()
	return d.holder, d.claims > 0
}

// Watch implements block.Device.
func (d *RAM) Watch(fn func(block.Info)) (cancel func()) {
	d.watchMu.Lock()
	defer d.watchMu.Unlock()
	id := d.watchSeq
	d.watchSeq++
	d.watchers[id] = fn
	return func() {
		d.watchMu.Lock()
		defer d.watchMu.Unlock()
		delete(d.watchers, id)
	}
}

// Resize changes the size in bytes and tells the watchers. Data behind a
// smaller end is forgotten.
func (d *RAM) Resize(size uint64) error {
	if size%uint64(d.opts.LogicalBlock) != 0 {
		return fmt.Errorf("blocktest: size %d is no multiple of the logical block %d", size, d.opts.LogicalBlock)
	}
	d.sizeMu.Lock()
	if size < d.size {
		d.zero(size, d.size-size)
	}
	d.size = size
	info := d.info()
	d.sizeMu.Unlock()
	d.watchMu.Lock()
	defer d.watchMu.Unlock()
	for _, fn := range d.watchers {
		fn(info)
	}
	return nil
}

// BlockStatus implements block.Device; extents are merged where they can be.
func (d *RAM) BlockStatus(ctx context.Context, off, length uint64, fn func(block.Extent) bool) error {
	d.sizeMu.RLock()
	size := d.size
	d.sizeMu.RUnlock()
	if off >= size {
		return nil
	}
	end := off + min(length, size-off)
	var run block.Extent
	for at := off; at < end; {
		if err := ctx.Err(); err != nil {
			return err
		}
		next := min(end, (at/block.ClusterSize+1)*block.ClusterSize)
		mapped := d.mapped(at / block.ClusterSize)
		switch {
		case run.Length > 0 && run.Mapped == mapped:
			run.Length += next - at
		case run.Length > 0 && !fn(run):
			return nil
		default:
			run = block.Extent{Offset: at, Length: next - at, Mapped: mapped}
		}
		at = next
	}
	if run.Length > 0 {
		fn(run)
	}
	return nil
}
