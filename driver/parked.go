package driver

import (
	"runtime/debug"
	"sync"
	"sync/atomic"
	"time"

	"scoria/driver/block"
)

// parkedWrite is a write that waits, with how many clusters are done.
type parkedWrite struct {
	r     *block.Request
	done  uint32
	since time.Time
}

// parkedQueue holds the writes that wait for room, oldest first.
type parkedQueue struct {
	mu      sync.Mutex
	list    []*parkedWrite
	current *parkedWrite // taken by the admitter
	dropped bool         // current was canceled meanwhile
	running bool
	busy    atomic.Bool // running, for those who must not take the lock
}

// push adds p and reports whether an admitter must be started.
func (q *parkedQueue) push(p *parkedWrite) bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.list = append(q.list, p)
	start := !q.running
	q.running = true
	q.busy.Store(true)
	return start
}

// pop takes the oldest; nil ends the admitter.
func (q *parkedQueue) pop() *parkedWrite {
	q.mu.Lock()
	defer q.mu.Unlock()
	if len(q.list) == 0 {
		q.running = false
		q.busy.Store(false)
		q.list = nil
		return nil
	}
	p := q.list[0]
	q.list[0] = nil
	q.list = q.list[1:]
	q.current, q.dropped = p, false
	return p
}

// unpop puts p back as the oldest, unless it was canceled since it was popped.
func (q *parkedQueue) unpop(p *parkedWrite) bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.current = nil
	if q.dropped {
		return false
	}
	q.list = append([]*parkedWrite{p}, q.list...)
	return true
}

// length is how many wait now.
func (q *parkedQueue) length() int {
	if !q.busy.Load() {
		return 0
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	n := len(q.list)
	if q.current != nil {
		n++
	}
	return n
}

func (q *parkedQueue) remove(match func(*parkedWrite) bool) (out []*parkedWrite) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.current != nil && match(q.current) {
		q.dropped = true
	}
	keep := q.list[:0]
	for _, p := range q.list {
		if match(p) {
			out = append(out, p)
		} else {
			keep = append(keep, p)
		}
	}
	q.list = keep
	return out
}

// writeLater carries out a write that can't be done on the caller's goroutine:
// done clusters of it are written already.
func (v *Volume) writeLater(r *block.Request, done uint32) {
	if (r.Offset|r.Length)%block.ClusterSize != 0 {
		go v.writePartial(r)
		return
	}
	first, n := r.Offset/block.ClusterSize, r.Length/block.ClusterSize
	if done == 0 && !v.resident(first, n) {
		// Reading the map may take long; nobody queues up behind that.
		go func() {
			if err := v.loadPatiently(v.forRequest(r.Owner), v.m, first, n); err != nil {
				v.end(r, err)
				return
			}
			v.park(r, done)
		}()
		return
	}
	v.park(r, done)
}

// park lets a write of whole clusters wait for its turn.
func (v *Volume) park(r *block.Request, done uint32) {
	if v.parked.push(&parkedWrite{r: r, done: done, since: time.Now()}) && !v.spawn(v.admit) {
		// It came while the volume was being closed.
		for p := v.parked.pop(); p != nil; p = v.parked.pop() {
			v.end(p.r, block.ErrClosed)
		}
	}
}

// admit lets waiting writes in as room comes and as fast as the throttle allows.
func (v *Volume) admit() {
	debug.SetPanicOnFault(true)
	for {
		p := v.parked.pop()
		if p == nil {
			v.settle("write-buffer-full")
			v.settle("throttled")
			v.settle("space-bound")
			v.roomFound()
			return
		}
		room := v.eng.pool.roomChan()
		before := p.done
		err := v.writeWhole(p)
		if err == errNoRoom {
			freed := v.spaceFreed()
			v.raiseNoRoom(freed != nil)
			if !v.parked.unpop(p) {
				v.end(p.r, block.ErrCanceled)
				continue
			}
			if freed != nil {
				v.waitRoom(freed)
				continue
			}
			v.kickIO()
			v.eng.kickAll()
			v.waitRoom(room)
			continue
		}
		v.roomFound()
		v.stats.stages[StageLog].since(p.since)
		if err == nil && p.r.Flags&block.FUA != 0 {
			v.flushLater(p.r)
		} else {
			v.end(p.r, err)
		}
		if v.charge(p.done-before) > maxAhead {
			if v.space.slow.Load() > 0 {
				v.raiseSpaceBound()
			} else {
				v.raise("throttled", "writes are slowed down so that the write buffer or the disk does not run full suddenly")
			}
			select {
			case <-time.After(v.pace.ahead(time.Now())):
			case <-v.ctx.Done():
			}
		}
	}
}

// raiseNoRoom says why writes wait: it may be for the bound of space and the disk.
func (v *Volume) raiseNoRoom(held bool) {
	if held {
		v.raiseSpaceBound()
	}
	if v.lacksRoom(false) || held || v.eng.pool.fill() <= spillAt {
		return
	}
	v.raise("write-buffer-full", "writes wait: the write buffer (%d MiB) is full and the local disk takes data more slowly than the guest writes it; give the daemon a larger write buffer or a faster disk", uint64(v.eng.pool.n)*chunkBytes>>20)
}

// charge adds what the throttle asks for so many clusters to the pace, and returns
// how far ahead of it the volume's writers are now.
func (v *Volume) charge(clusters uint32) time.Duration {
	now := time.Now()
	v.pace.charge(now, v.throttleDelay(clusters))
	return v.pace.ahead(now)
}

// maxAhead is how far writers may be ahead of their pace: what they do within it is
// done at once, on the worker, which costs a fraction of going through the admitter;
// and a pause is long enough to be worth its timer.
const maxAhead = time.Millisecond

// maxBehind is how far they may be behind it: a pause that took longer than it should,
// because something else had the CPU, is made up for.
const maxBehind = 10 * time.Millisecond

// pace is when a volume's writers would be done with what they have written if they
// wrote as slowly as the throttle asks. Any goroutine.
type pace struct{ until atomic.Int64 } // Unix nanoseconds

func (p *pace) ahead(now time.Time) time.Duration {
	return time.Duration(p.until.Load() - now.UnixNano())
}

func (p *pace) charge(now time.Time, d time.Duration) {
	if d <= 0 {
		return
	}
	for {
		until := p.until.Load()
		if p.until.CompareAndSwap(until, max(until, now.Add(-maxBehind).UnixNano())+int64(d)) {
			return
		}
	}
}

// waitRoom waits until room is closed, something may have changed, or the
// waiting writes have all been taken away.
func (v *Volume) waitRoom(room <-chan struct{}) {
	select {
	case <-room:
	case <-time.After(50 * time.Millisecond):
	case <-v.ctx.Done():
	}
}

// waitForRoom lets a request that is not parked wait for room, unless its owner
// gives up. upkeep: it gives room back.
func (v *Volume) waitForRoom(r *block.Request, room <-chan struct{}, upkeep bool) error {
	v.waiting.enter(r)
	v.lacksRoom(upkeep)
	v.kickIO()
	v.eng.kickAll()
	v.waitRoom(room)
	if v.waiting.leave(r) {
		v.roomFound()
		return block.ErrCanceled
	}
	return nil
}

// writeWhole continues a write of whole clusters; it may read map pages.
func (v *Volume) writeWhole(p *parkedWrite) error {
	if err := v.writable(); err != nil {
		return err
	}
	first := p.r.Offset / block.ClusterSize
	n := uint32(p.r.Length / block.ClusterSize)
	if !v.resident(first, uint64(n)) {
		if err := v.loadPatiently(v.forRequest(p.r.Owner), v.m, first, uint64(n)); err != nil {
			return err
		}
	}
	src := segments{list: p.r.Segments}
	src.skip(int(p.done) * block.ClusterSize)
	for p.done < n {
		k := min(n-p.done, maxInlineClusters)
		v.gate.RLock()
		if p.r.Offset+p.r.Length > v.info.Load().Size {
			v.gate.RUnlock()
			return block.ErrRange // it has shrunk meanwhile
		}
		done, err := v.writeClusters(&src, first+uint64(p.done), k)
		v.gate.RUnlock()
		p.done += done
		if err != nil {
			return err
		}
	}
	return nil
}
