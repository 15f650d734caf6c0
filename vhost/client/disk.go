package client

import (
	"errors"
	"fmt"
	"io"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// Limits of Disk.
const (
	// DiskBufferBytes is the largest request that a Disk makes; longer reads and
	// writes are cut.
	DiskBufferBytes = 128 << 10
)

// ErrRange: offset or length is no multiple of 512, or lies outside the device.
var ErrRange = errors.New("range is not in the device or not a multiple of 512 bytes")

// Disk is a synchronous view of a Client, safe for many goroutines. It owns the
// client's queues and arena. One goroutine per queue sleeps on the queue's call
// eventfd and hands out completions.
//
// When the server goes away, requests fail with ErrDisconnected, unless
// Options.Reconnect is set: then they wait, as a guest's do.
type Disk struct {
	c      *Client
	queues []*diskQueue
	next   atomic.Uint32
	wg     sync.WaitGroup
}

type diskQueue struct {
	d    *Disk
	mu   sync.Mutex // guards q, slots and err
	q    *Queue
	slot []diskSlot
	err  error    // the server broke the ring
	free chan int // slots
	stop atomic.Bool
}

// diskSlot is one request at a time and the buffer that belongs to it.
type diskSlot struct {
	off    uint64 // of its buffer in the arena
	result chan error
	id     [idBytes]byte
	busy   bool // the server has it
	wanted bool // somebody waits for it
}

// Disk makes the synchronous view, of which a client has at most one for all
// its life; Client.Close closes it. Options.MemoryBytes decides how many requests it can have in flight:
// one per DiskBufferBytes.
func (c *Client) Disk() (*Disk, error) {
	d := &Disk{c: c}
	if !c.disk.CompareAndSwap(nil, d) {
		return nil, errors.New("disk: this client has one already")
	}
	perQueue := len(c.Arena()) / DiskBufferBytes / len(c.queues)
	if perQueue == 0 {
		return nil, fmt.Errorf("disk: %d bytes of memory for %d queues; %d are needed", len(c.Arena()), len(c.queues), len(c.queues)*DiskBufferBytes)
	}
	for i, q := range c.queues {
		n := min(perQueue, q.Depth())
		dq := &diskQueue{d: d, q: q, slot: make([]diskSlot, n), free: make(chan int, n)}
		for s := range dq.slot {
			dq.slot[s].off = uint64((i*perQueue + s) * DiskBufferBytes)
			dq.slot[s].result = make(chan error, 1)
			dq.free <- s
		}
		d.queues = append(d.queues, dq)
		d.wg.Go(dq.reap)
	}
	return d, nil
}

// Close ends all requests with ErrClosed and waits for the goroutines.
func (d *Disk) Close() {
	for _, dq := range d.queues {
		dq.stop.Store(true)
		dq.q.Wake()
	}
	d.wg.Wait()
}

// Size is the capacity in bytes.
func (d *Disk) Size() int64 { return int64(d.c.Size()) }

// ReadAt implements io.ReaderAt for ranges of whole sectors.
func (d *Disk) ReadAt(p []byte, off int64) (int, error) {
	return d.pieces(p, off, func(dq *diskQueue, s int, part []byte, at uint64) error {
		buf := d.c.Arena()[dq.slot[s].off:][:len(part)]
		err := dq.do(s, func(tag uint64) bool {
			return dq.q.Read(at, d.c.Buffer(dq.slot[s].off, uint32(len(part))), tag)
		})
		if err == nil {
			copy(part, buf)
		}
		return err
	})
}

// WriteAt implements io.WriterAt for ranges of whole sectors. What a failed
// write left is undefined, as on every disk.
func (d *Disk) WriteAt(p []byte, off int64) (int, error) {
	return d.pieces(p, off, func(dq *diskQueue, s int, part []byte, at uint64) error {
		copy(d.c.Arena()[dq.slot[s].off:], part)
		return dq.do(s, func(tag uint64) bool {
			return dq.q.Write(at, d.c.Buffer(dq.slot[s].off, uint32(len(part))), tag)
		})
	})
}

// pieces cuts a transfer into requests, one after the other.
func (d *Disk) pieces(p []byte, off int64, do func(dq *diskQueue, s int, part []byte, at uint64) error) (n int, err error) {
	if err := d.check(off, int64(len(p))); err != nil {
		return 0, err
	}
	dq := d.pick()
	for n < len(p) {
		part := p[n:min(n+DiskBufferBytes, len(p))]
		s, err := dq.acquire()
		if err == nil {
			err = do(dq, s, part, uint64(off)+uint64(n))
			dq.giveBack(s)
		}
		if err != nil {
			return n, fmt.Errorf("at byte %d: %w", off+int64(n), err)
		}
		n += len(part)
	}
	return n, nil
}

func (d *Disk) check(off, length int64) error {
	if off < 0 || length < 0 || (off|length)%sectorSize != 0 || off > d.Size()-length {
		return fmt.Errorf("%w: %d bytes at %d of %d", ErrRange, length, off, d.Size())
	}
	return nil
}

func (d *Disk) pick() *diskQueue {
	return d.queues[int(d.next.Add(1))%len(d.queues)]
}

// Flush makes what has been written durable.
func (d *Disk) Flush() error {
	return d.simple(func(q *Queue, tag uint64) bool { return q.Flush(tag) })
}

// Discard gives a range up. One request: the server's limits are the caller's.
func (d *Disk) Discard(off, length int64) error {
	if err := d.check(off, length); err != nil {
		return err
	}
	return d.simple(func(q *Queue, tag uint64) bool { return q.Discard(uint64(off), uint64(length), tag) })
}

// WriteZeroes zeroes a range, like Discard in one request.
func (d *Disk) WriteZeroes(off, length int64, unmap bool) error {
	if err := d.check(off, length); err != nil {
		return err
	}
	return d.simple(func(q *Queue, tag uint64) bool { return q.WriteZeroes(uint64(off), uint64(length), unmap, tag) })
}

// ID is the device's serial number.
func (d *Disk) ID() (string, error) {
	dq := d.pick()
	s, err := dq.acquire()
	if err != nil {
		return "", err
	}
	defer dq.giveBack(s)
	if err := dq.do(s, dq.q.GetID); err != nil {
		return "", err
	}
	id, _, _ := strings.Cut(string(dq.slot[s].id[:]), "\x00")
	return id, nil
}

func (d *Disk) simple(add func(q *Queue, tag uint64) bool) error {
	dq := d.pick()
	s, err := dq.acquire()
	if err != nil {
		return err
	}
	defer dq.giveBack(s)
	return dq.do(s, func(tag uint64) bool { return add(dq.q, tag) })
}

// acquire takes a slot, waiting for one.
func (dq *diskQueue) acquire() (int, error) {
	select {
	case s := <-dq.free:
		return s, nil
	default:
	}
	tick := time.NewTicker(diskPatience)
	defer tick.Stop()
	for {
		select {
		case s := <-dq.free:
			return s, nil
		case <-tick.C:
			dq.mu.Lock()
			err := dq.broken()
			dq.mu.Unlock()
			if err != nil {
				return 0, err
			}
		}
	}
}

// diskPatience is how often those who wait for a slot look whether there is any
// hope.
const diskPatience = 100 * time.Millisecond

// broken is why requests can't be served any more. It needs dq.mu.
func (dq *diskQueue) broken() error {
	switch {
	case dq.stop.Load():
		return ErrClosed
	case dq.err != nil:
		return dq.err
	case dq.d.c.opts.Reconnect > 0:
		return nil
	}
	return dq.d.c.Err()
}

// giveBack returns a slot, unless the server still has its buffer.
func (dq *diskQueue) giveBack(s int) {
	dq.mu.Lock()
	busy := dq.slot[s].busy
	dq.slot[s].wanted = false
	dq.mu.Unlock()
	if !busy {
		dq.free <- s
	}
}

// do submits what add adds and waits for its end.
func (dq *diskQueue) do(s int, add func(tag uint64) bool) error {
	dq.mu.Lock()
	if err := dq.broken(); err != nil {
		dq.mu.Unlock()
		return err
	}
	if !add(uint64(s)) {
		dq.mu.Unlock()
		// There is a slot for each request that fits, so only a server that
		// broke the ring gets here.
		return fmt.Errorf("queue %d is full", dq.q.index)
	}
	dq.slot[s].busy, dq.slot[s].wanted = true, true
	dq.q.Kick()
	dq.mu.Unlock()
	return <-dq.slot[s].result
}

// reap hands out completions until the disk is closed.
func (dq *diskQueue) reap() {
	for {
		dq.mu.Lock()
		n := 0
		if dq.err == nil {
			n, dq.err = dq.collect()
		}
		idle := n == 0 && !dq.q.ring.EnableCall()
		err := dq.broken()
		if err != nil {
			dq.failAll(err)
		}
		dq.mu.Unlock()
		if errors.Is(err, ErrClosed) {
			return
		}
		if idle || err != nil {
			// Not the queue's own sleep: that would return at once while the
			// connection is lost. Loss, return and Close all write to it.
			if err := dq.q.drainCall(); err != nil {
				dq.mu.Lock()
				dq.err = err
				dq.mu.Unlock()
			}
		}
	}
}

// collect needs dq.mu.
func (dq *diskQueue) collect() (n int, err error) {
	for {
		c, id, ok, err := dq.q.PollID()
		if err != nil || !ok {
			return n, err
		}
		n++
		s := &dq.slot[c.Tag]
		s.busy = false
		if !s.wanted {
			dq.free <- int(c.Tag)
			continue
		}
		s.wanted, s.id = false, id
		s.result <- StatusErr(c.Status)
	}
}

// failAll ends the waiting, not the requests: their buffers stay with the
// server. It needs dq.mu.
func (dq *diskQueue) failAll(err error) {
	for i := range dq.slot {
		if s := &dq.slot[i]; s.wanted {
			s.wanted = false
			s.result <- err
		}
	}
}

var (
	_ io.ReaderAt = (*Disk)(nil)
	_ io.WriterAt = (*Disk)(nil)
)
