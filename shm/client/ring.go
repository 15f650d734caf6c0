package client

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"scoria/shm/mem"
	"scoria/shm/ring"
	"scoria/shm/wire"
)

// slot is a request under way. What it says is enough to submit it anew.
type slot struct {
	op    *Op
	entry ring.Request
	order uint64
}

// diskRing is one ring of a Disk.
type diskRing struct {
	d       *Disk
	memory  *mem.Mapping
	memfd   int
	layout  ring.Layout
	arena   *arena
	room    chan struct{} // has as many elements as requests are under way
	spins   atomic.Int32  // callers that poll
	spinFor atomic.Int64  // ns that polling pays

	mu       sync.Mutex
	ring     *ring.Client
	kick     int
	call     *os.File
	down     bool // requests are kept for the next connection
	armed    bool // the server was asked for a call
	slots    []slot
	free     []uint16
	order    uint64
	underWay int
	ended    []*Op // scratch of reap
	dead     error // no request can be submitted any more
}

// attach makes the ring with the server: anew, or with the memory it has.
func (r *diskRing) attach(ctx context.Context, k *conn) error {
	req := wire.RingRequest{Entries: uint32(r.layout.Entries), ArenaBytes: r.layout.ArenaBytes}
	want, send := 3, []int(nil)
	if r.memory != nil {
		// The former server is done with the memory: it closes the connection last.
		r.ring.Reset()
		req.Flags, want, send = wire.RingReuse, 2, []int{r.memfd}
	}
	body, fds, err := k.ask(ctx, wire.Ring, req.Append(nil), want, send...)
	if err != nil {
		return err
	}
	answer, err := wire.DecodeRingAnswer(body)
	if err == nil && (len(fds) != want || answer.MemoryBytes != r.layout.TotalBytes()) {
		err = fmt.Errorf("ring: got %d descriptors and %d bytes, want %d and %d", len(fds), answer.MemoryBytes, want, r.layout.TotalBytes())
	}
	if err == nil && r.memory == nil {
		err = r.mapMemory(fds[0])
		fds = fds[1:]
	}
	if err != nil {
		mem.CloseAll(fds)
		return err
	}
	r.connected(fds[0], os.NewFile(uintptr(fds[1]), "call eventfd"))
	return nil
}

// mapMemory takes over memfd.
func (r *diskRing) mapMemory(memfd int) error {
	m, err := mem.Map(memfd, 0, r.layout.TotalBytes())
	if err == nil {
		if r.ring, err = ring.NewClient(m.Bytes()); err != nil {
			m.Release()
		}
	}
	if err != nil {
		mem.CloseFD(&memfd)
		return err
	}
	r.memory, r.memfd, r.arena = m, memfd, newArena(r.ring.Arena())
	return nil
}

// connected begins to use the ring with the eventfds of a new connection, and
// submits what was kept, in its order.
func (r *diskRing) connected(kick int, call *os.File) {
	r.mu.Lock()
	r.kick, r.call, r.down, r.armed = kick, call, false, false
	kept := make([]*slot, 0, r.underWay)
	for i := range r.slots {
		if r.slots[i].op != nil {
			kept = append(kept, &r.slots[i])
		}
	}
	slices.SortFunc(kept, func(a, b *slot) int { return cmp.Compare(a.order, b.order) })
	for _, s := range kept {
		r.ring.Add(s.entry)
	}
	if r.ring.Publish() {
		_ = mem.SignalEventFD(kick)
	}
	r.unlock(r.arm())
	go r.reaper(call)
}

// disconnect keeps requests from now on. What was completed is taken first.
func (r *diskRing) disconnect() {
	r.mu.Lock()
	if r.down {
		r.mu.Unlock()
		return
	}
	ended := r.reap()
	r.down = true
	mem.CloseFD(&r.kick)
	r.call.Close()
	r.unlock(ended)
}

// unlock ends a section and calls back for the requests that ended in it.
func (r *diskRing) unlock(ended []*Op) {
	if len(ended) == 0 {
		r.mu.Unlock()
		return
	}
	r.ended = nil // others may reap while these are called back
	r.mu.Unlock()
	for i, op := range ended {
		ended[i] = nil
		<-r.room
		op.finish()
	}
	r.mu.Lock()
	if r.ended == nil {
		r.ended = ended[:0]
	}
	r.mu.Unlock()
}

// reap takes the completions that are there. r.mu is held.
func (r *diskRing) reap() []*Op {
	ended := r.ended[:0]
	if r.down {
		return ended
	}
	for {
		c, ok := r.ring.Poll()
		if !ok {
			return ended
		}
		if c.Cookie >= uint64(len(r.slots)) || r.slots[c.Cookie].op == nil {
			continue // not ours: a server that is out of order harms nobody but itself
		}
		s := &r.slots[c.Cookie]
		s.op.err = statusError(c.Status)
		ended = append(ended, s.op)
		s.op = nil
		r.free = append(r.free, uint16(c.Cookie))
		r.underWay--
	}
}

// arm asks the server for a call, unless somebody polls or nothing is under
// way, and returns what ended meanwhile. r.mu is held.
func (r *diskRing) arm() []*Op {
	if r.down || r.armed || r.underWay == 0 || r.spins.Load() != 0 {
		return nil
	}
	var ended []*Op
	for r.underWay > 0 {
		r.armed = true
		if !r.ring.EnableCall() {
			break
		}
		ended = append(ended, r.reap()...)
		r.armed = false
	}
	return ended
}

// submit hands op to the server, or keeps it if there is none. It waits for room
// in the ring until ctx ends.
func (r *diskRing) submit(ctx context.Context, op *Op, entry ring.Request) error {
	select {
	case r.room <- struct{}{}:
	default:
		select {
		case r.room <- struct{}{}:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	r.mu.Lock()
	if r.dead != nil {
		err := r.dead
		r.mu.Unlock()
		<-r.room
		return err
	}
	i := r.free[len(r.free)-1]
	r.free = r.free[:len(r.free)-1]
	entry.Cookie = uint64(i)
	r.order++
	r.slots[i] = slot{op: op, entry: entry, order: r.order}
	r.underWay++
	var ended []*Op
	if !r.down {
		r.ring.Add(entry)
		if r.armed && r.spins.Load() != 0 {
			r.ring.DisableCall()
			r.armed = false
		}
		if r.ring.Publish() {
			_ = mem.SignalEventFD(r.kick)
		}
		ended = r.arm()
	}
	r.unlock(ended)
	return nil
}

// reaper waits for the server's calls on one connection.
func (r *diskRing) reaper(call *os.File) {
	var count [8]byte
	for {
		if _, err := call.Read(count[:]); err != nil {
			return // closed by disconnect
		}
		r.mu.Lock()
		r.armed = false
		ended := slices.Clone(r.reap())
		r.unlock(append(ended, r.arm()...))
	}
}

// spin polls the ring for op's end. The window shrinks when polling is in vain,
// and grows when a request ends in it.
func (r *diskRing) spin(op *Op) {
	window, limit := r.spinFor.Load(), int64(r.d.options.Poll)
	begin := time.Now()
	for n := 0; op.state.Load() == opRuns; n++ {
		if r.mu.TryLock() {
			r.unlock(r.reap())
		}
		if n&15 == 15 && int64(time.Since(begin)) > window {
			r.spinFor.Store(max(window/2, limit/16))
			return
		}
	}
	r.spinFor.Store(min(2*window, limit))
}

// beginSpin says that the caller is going to poll. It comes before submit.
func (r *diskRing) beginSpin() { r.spins.Add(1) }

// endSpin says that it polls no more.
func (r *diskRing) endSpin() {
	if r.spins.Add(-1) == 0 {
		r.mu.Lock()
		r.unlock(r.arm())
	}
}

// abandon ends all requests with err, for good.
func (r *diskRing) abandon(err error) {
	r.mu.Lock()
	r.dead = err
	var ended []*Op
	for i := range r.slots {
		if op := r.slots[i].op; op != nil {
			op.err = err
			ended = append(ended, op)
			r.slots[i].op = nil
			r.free = append(r.free, uint16(i))
			r.underWay--
		}
	}
	r.unlock(ended)
}

// Errors of requests, by the ring's status.
var statusErrors = map[ring.Status]error{}

// StatusError is the outcome of a request that the server did not carry out.
type StatusError struct{ Status ring.Status }

func (e *StatusError) Error() string { return e.Status.String() }

func init() {
	for s := ring.StatusIO; s <= ring.StatusFailed; s++ {
		statusErrors[s] = &StatusError{s}
	}
}

func statusError(s ring.Status) error {
	if s == ring.StatusOK {
		return nil
	}
	if err, ok := statusErrors[s]; ok {
		return err
	}
	return &StatusError{s}
}

// IsStatus reports whether err is a request's outcome s.
func IsStatus(err error, s ring.Status) bool {
	var e *StatusError
	return errors.As(err, &e) && e.Status == s
}
