package client

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"sync/atomic"

	"scoria/shm/ring"
)

// Kind is what an Op does.
type Kind uint8

// The kinds.
const (
	Read        Kind = ring.OpRead
	Write       Kind = ring.OpWrite
	Flush       Kind = ring.OpFlush
	Discard     Kind = ring.OpDiscard
	WriteZeroes Kind = ring.OpWriteZeroes
)

// Flags modify an Op.
type Flags uint8

const (
	// FUA: a write, discard or write-zeroes ends only when it would survive a loss of power.
	FUA Flags = ring.FlagFUA
	// NoUnmap: write-zeroes keeps the space provisioned.
	NoUnmap Flags = ring.FlagNoUnmap
)

// ErrNotArena: an Op's data is not memory from Alloc, or of several rings.
var ErrNotArena = errors.New("data is not memory from Alloc")

const (
	opRuns int32 = iota
	opEnded
	opAbandoned // nobody waits for it any more
)

// Op is one asynchronous operation; see Disk.Start. It may be used again when it
// has ended.
type Op struct {
	Kind   Kind
	Flags  Flags
	Offset uint64 // bytes
	Length uint64 // bytes; of discard and write-zeroes only
	// Data of reads and writes, from Alloc.
	Data []byte
	// Done is called once when the operation has ended, from any goroutine. It
	// must not wait, but may start others if there is room in the ring.
	Done func(*Op)

	err    error
	ring   *diskRing
	state  atomic.Int32
	signal chan struct{} // set for those that are waited for
	bounce []byte        // piece of the arena that the data is copied through
}

// Err is the outcome of an operation that has ended; nil is success. It is a
// *StatusError or wraps ErrLost.
func (o *Op) Err() error { return o.err }

// finish is called when the operation has ended, without locks.
func (o *Op) finish() {
	if o.signal == nil {
		o.state.Store(opEnded)
		o.Done(o)
		return
	}
	if o.state.CompareAndSwap(opRuns, opEnded) {
		o.signal <- struct{}{}
		return
	}
	if o.bounce != nil { // abandoned: the caller is gone
		o.ring.free1(o.bounce)
	}
}

// free1 gives a piece back to the arena.
func (r *diskRing) free1(p []byte) {
	off, _ := r.memory.Offset(p)
	r.arena.release(int(off-r.layout.ArenaOffset()), cap(p))
}

// arenaOffset returns where p lies in the ring's arena.
func (r *diskRing) arenaOffset(p []byte) (uint64, bool) {
	off, ok := r.memory.Offset(p)
	return off - r.layout.ArenaOffset(), ok && off >= r.layout.ArenaOffset()
}

// Start begins an operation and returns; op.Done is called at its end. It waits
// for room in the ring until ctx ends; the operation itself does not end with
// ctx. Any goroutine.
func (d *Disk) Start(ctx context.Context, op *Op) error {
	d.using.RLock()
	defer d.using.RUnlock()
	if len(d.rings) == 0 {
		return ErrClosed
	}
	r, e := d.pick(), ring.Request{Op: uint8(op.Kind), Flags: uint8(op.Flags), Offset: op.Offset, Length: op.Length}
	switch op.Kind {
	case Read, Write:
		if r = d.ringOf(op.Data); r == nil {
			return ErrNotArena
		}
		e.Addr, _ = r.arenaOffset(op.Data)
		e.Length = uint64(len(op.Data))
	case Flush:
		e.Offset, e.Length = 0, 0
	}
	op.err, op.ring, op.signal, op.bounce = nil, r, nil, nil
	op.state.Store(opRuns)
	return r.submit(ctx, op, e)
}

// ringOf returns the ring in whose arena p lies, or nil.
func (d *Disk) ringOf(p []byte) *diskRing {
	for _, r := range d.rings {
		if _, ok := r.arenaOffset(p); ok && len(p) > 0 {
			return r
		}
	}
	return nil
}

// pick returns the rings in turn.
func (d *Disk) pick() *diskRing { return d.rings[int(d.turn.Add(1)-1)%len(d.rings)] }

// Alloc returns n bytes, at a multiple of 4096, that data goes to and from
// without a copy. It waits until others are freed, or ctx ends. Any goroutine.
func (d *Disk) Alloc(ctx context.Context, n int) ([]byte, error) {
	d.using.RLock()
	defer d.using.RUnlock()
	if len(d.rings) == 0 {
		return nil, ErrClosed
	}
	return d.pick().alloc(ctx, n)
}

func (r *diskRing) alloc(ctx context.Context, n int) ([]byte, error) {
	if n <= 0 || n > len(r.arena.data) {
		return nil, fmt.Errorf("%d bytes: must be 1 to %d, the size of the arena", n, len(r.arena.data))
	}
	for {
		p, freed := r.arena.alloc(n)
		if p != nil {
			return p, nil
		}
		select {
		case <-freed:
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-r.d.ctx.Done():
			return nil, ErrClosed
		}
	}
}

// Free gives back what Alloc returned, whole. No operation uses it any more.
func (d *Disk) Free(p []byte) {
	d.using.RLock()
	defer d.using.RUnlock()
	if r := d.ringOf(p); r != nil {
		r.free1(p)
	}
}

var ops = sync.Pool{New: func() any { return &Op{signal: make(chan struct{}, 1)} }}

// do carries out one request that fits into a ring and waits for it. p is nil or
// data; it is copied through the arena unless it lies there.
func (d *Disk) do(ctx context.Context, e ring.Request, p []byte) error {
	d.using.RLock()
	defer d.using.RUnlock()
	if len(d.rings) == 0 {
		return ErrClosed
	}
	op := ops.Get().(*Op)
	op.err, op.bounce = nil, nil
	op.state.Store(opRuns)
	r := d.ringOf(p)
	switch {
	case r != nil:
		e.Addr, _ = r.arenaOffset(p)
	case p != nil:
		r = d.pick()
		b, err := r.alloc(ctx, len(p))
		if err != nil {
			return err
		}
		op.bounce = b
		e.Addr, _ = r.arenaOffset(b)
		if e.Op == ring.OpWrite {
			copy(b, p)
		}
	default:
		r = d.pick()
	}
	op.ring = r
	if err := r.carryOut(ctx, op, e); err != nil {
		return err // op is left to whoever ends it
	}
	err := op.err
	if op.bounce != nil {
		if e.Op == ring.OpRead && err == nil {
			copy(p, op.bounce)
		}
		r.free1(op.bounce)
	}
	op.ring, op.bounce = nil, nil
	ops.Put(op)
	return err
}

// carryOut submits op and waits for its end. If it fails, nobody waits for op
// any more.
func (r *diskRing) carryOut(ctx context.Context, op *Op, e ring.Request) error {
	polls := r.d.options.Poll > 0
	if polls {
		r.beginSpin()
	}
	err := r.submit(ctx, op, e)
	if err != nil && op.bounce != nil {
		r.free1(op.bounce)
	}
	if polls {
		if err == nil {
			r.spin(op)
		}
		r.endSpin()
	}
	if err != nil {
		return err
	}
	select {
	case <-op.signal:
		return nil
	case <-ctx.Done():
	}
	if op.state.CompareAndSwap(opRuns, opAbandoned) {
		return ctx.Err()
	}
	<-op.signal
	return nil
}

// transfer reads or writes all of p in pieces that fit.
func (d *Disk) transfer(ctx context.Context, kind Kind, flags Flags, p []byte, off uint64) (n int, err error) {
	for n < len(p) {
		part := p[n:min(len(p), n+d.pieceBytes)]
		err := d.do(ctx, ring.Request{Op: uint8(kind), Flags: uint8(flags), Offset: off + uint64(n), Length: uint64(len(part))}, part)
		if err != nil {
			return n, fmt.Errorf("%s: %d bytes at %d: %w", d.options.Volume, len(part), off+uint64(n), err)
		}
		n += len(part)
	}
	return n, nil
}

// ReadContext fills p from offset off, as io.ReaderAt does.
func (d *Disk) ReadContext(ctx context.Context, p []byte, off int64) (n int, err error) {
	v := d.Info()
	if off < 0 {
		return 0, fmt.Errorf("read at %d: must not be negative", off)
	}
	if uint64(off) >= v.Size {
		return 0, io.EOF
	}
	short := uint64(len(p)) > v.Size-uint64(off)
	if short {
		p = p[:v.Size-uint64(off)]
	}
	block := uint64(v.LogicalBlock)
	if (uint64(off)|uint64(len(p)))%block == 0 {
		n, err = d.transfer(ctx, Read, 0, p, uint64(off))
	} else {
		n, err = d.readAround(ctx, p, uint64(off), block)
	}
	if err == nil && short {
		err = io.EOF
	}
	return n, err
}

// readAround reads whole blocks and copies the part that is wanted.
func (d *Disk) readAround(ctx context.Context, p []byte, off, block uint64) (int, error) {
	n := 0
	for n < len(p) {
		at := (off + uint64(n)) &^ (block - 1)
		skip := int(off + uint64(n) - at)
		whole := (uint64(skip+len(p)-n) + block - 1) &^ (block - 1)
		b := make([]byte, min(whole, uint64(d.pieceBytes)))
		if _, err := d.transfer(ctx, Read, 0, b, at); err != nil {
			return n, err
		}
		n += copy(p[n:], b[skip:])
	}
	return n, nil
}

// WriteContext stores p at offset off, both multiples of the logical block. With
// FUA in flags it returns only when p would survive a loss of power.
func (d *Disk) WriteContext(ctx context.Context, p []byte, off int64, flags Flags) (int, error) {
	if off < 0 {
		return 0, fmt.Errorf("write at %d: must not be negative", off)
	}
	return d.transfer(ctx, Write, flags, p, uint64(off))
}

// ReadAt implements io.ReaderAt.
func (d *Disk) ReadAt(p []byte, off int64) (int, error) {
	return d.ReadContext(context.Background(), p, off)
}

// WriteAt implements io.WriterAt; p and off must be multiples of the logical
// block.
func (d *Disk) WriteAt(p []byte, off int64) (int, error) {
	return d.WriteContext(context.Background(), p, off, 0)
}

// Flush returns when every write that had ended before would survive a loss of
// power.
func (d *Disk) Flush(ctx context.Context) error {
	if err := d.do(ctx, ring.Request{Op: ring.OpFlush}, nil); err != nil {
		return fmt.Errorf("%s: flush: %w", d.options.Volume, err)
	}
	return nil
}

// Discard forgets length bytes at off; they read as zeroes afterwards.
func (d *Disk) Discard(ctx context.Context, off, length uint64, flags Flags) error {
	return d.clear(ctx, ring.OpDiscard, off, length, flags)
}

// WriteZeroes makes length bytes at off read as zeroes.
func (d *Disk) WriteZeroes(ctx context.Context, off, length uint64, flags Flags) error {
	return d.clear(ctx, ring.OpWriteZeroes, off, length, flags)
}

func (d *Disk) clear(ctx context.Context, op uint8, off, length uint64, flags Flags) error {
	limit := d.Info().MaxDiscard
	for length > 0 {
		n := length
		if limit != 0 {
			n = min(n, limit)
		}
		if err := d.do(ctx, ring.Request{Op: op, Flags: uint8(flags), Offset: off, Length: n}, nil); err != nil {
			return fmt.Errorf("%s: clearing %d bytes at %d: %w", d.options.Volume, n, off, err)
		}
		off, length = off+n, length-n
	}
	return nil
}
