package worker

import (
	"os"
	"runtime"
	"runtime/debug"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"scoria/shm/mem"
)

const (
	// A polling worker asks the kernel for kicks of inactive queues once in so many
	// passes; a busy one after so much work (see Queue.serve): about 64 requests of
	// 4 KiB, which is how long the busy queues make another one wait.
	idlePollPasses = 32
	busyPollWork   = 128
	// A worker that polls in vain while requests are under way elsewhere lets
	// other threads run once in so many passes.
	yieldPasses = 8
	// pollBurst bounds how much unused polling budget is saved up.
	pollBurst = int64(10 * time.Millisecond)

	// kicklessInterval is how often, in ms, queues that passed no kick descriptor
	// are looked at by a worker that has nothing else to do.
	kicklessInterval = 1

	wakeID = -1 // of the wake-up descriptor in epoll
)

// Worker serves its queues on one thread. See the package doc.
type Worker struct {
	set     *Set
	pollMax int64   // ns
	pollCPU float64 // of this worker's time, to be spent polling in vain
	epoch   time.Time
	epfd    int
	wakefd  int
	ended   chan struct{}

	// From other goroutines.
	completed  atomic.Pointer[Slot]
	sleeping   atomic.Bool
	wakers     atomic.Int64 // goroutines in wake, which may use wakefd
	signalling atomic.Pointer[Queue]
	signals    atomic.Uint64 // begun
	mu         sync.Mutex
	ops        []func()
	closed     bool
	hasOps     atomic.Bool
	load       atomic.Int64 // queues
	sleeps     atomic.Uint64
	pollTime   atomic.Int64 // ns

	// The worker's own.
	queues   map[int32]*Queue
	nextID   int32
	active   []*Queue
	touched  []*Queue
	kickless []*Queue // whose front end wants them polled
	current  *Queue   // whose memory may fault now
	events   [64]unix.EpollEvent
	passes   uint64
	work     int   // since the last look at inactive queues
	inFlight int   // requests that devices have taken over
	lastIdle int64 // clock at the last pass in vain, if the one before was too
	tokens   int64 // ns of polling in vain that the budget still allows
	refilled int64
	give     giveWay
	stop     bool
}

func newWorker(pollMax time.Duration, pollCPU float64) (*Worker, error) {
	w := &Worker{
		pollMax: int64(pollMax), pollCPU: pollCPU, epoch: time.Now(), epfd: -1, wakefd: -1,
		ended: make(chan struct{}), queues: map[int32]*Queue{}, tokens: pollBurst,
	}
	var err error
	if w.epfd, err = unix.EpollCreate1(unix.EPOLL_CLOEXEC); err != nil {
		return nil, os.NewSyscallError("epoll_create1", err)
	}
	if w.wakefd, err = mem.NewEventFD(); err == nil {
		err = w.epollAdd(w.wakefd, wakeID)
	}
	if err != nil {
		w.closeFDs()
		return nil, err
	}
	return w, nil
}

func (w *Worker) closeFDs() {
	mem.CloseFD(&w.epfd)
	mem.CloseFD(&w.wakefd)
}

// epollAdd registers an eventfd edge-triggered: every signal wakes, and nobody
// needs to read the count.
func (w *Worker) epollAdd(fd int, id int32) error {
	ev := unix.EpollEvent{Events: unix.EPOLLIN | unix.EPOLLET&0xffffffff, Fd: id}
	return os.NewSyscallError("epoll_ctl", unix.EpollCtl(w.epfd, unix.EPOLL_CTL_ADD, fd, &ev))
}

func (w *Worker) epollDel(fd int) {
	// It fails only if the descriptor is not there, which is what is wanted.
	_ = unix.EpollCtl(w.epfd, unix.EPOLL_CTL_DEL, fd, nil)
}

// do runs f on the worker between two passes and waits for it. It returns false
// if the worker has ended. Faults in f on q's memory end q's session.
func (w *Worker) do(q *Queue, f func()) bool {
	done := make(chan struct{})
	w.mu.Lock()
	if w.closed {
		w.mu.Unlock()
		return false
	}
	w.ops = append(w.ops, func() {
		defer close(done)
		w.guarded(q, f)
	})
	w.mu.Unlock()
	w.hasOps.Swap(true)
	w.wake()
	<-done
	return true
}

// guarded runs f, which may touch q's memory.
func (w *Worker) guarded(q *Queue, f func()) {
	w.current = q
	defer w.recoverFault()
	f()
	w.current = nil
}

// push hands a request that ended to the worker. Any goroutine.
func (w *Worker) push(s *Slot) {
	for {
		head := w.completed.Load()
		s.next = head
		if w.completed.CompareAndSwap(head, s) {
			break
		}
	}
	w.wake()
}

// wake ends the worker's sleep, if it sleeps. Whoever calls has made its reason
// visible before; the worker looks for reasons after it has set sleeping.
func (w *Worker) wake() {
	if !w.sleeping.Load() {
		return
	}
	w.wakers.Add(1)
	if w.sleeping.CompareAndSwap(true, false) {
		if err := mem.SignalEventFD(w.wakefd); err != nil {
			panic("worker: waking a worker: " + err.Error())
		}
	}
	w.wakers.Add(-1)
}

func (w *Worker) run() {
	runtime.LockOSThread()
	debug.SetPanicOnFault(true)
	defer close(w.ended)
	for {
		progress := w.takeOther()
		if w.stop {
			return
		}
		if w.serveActive() {
			progress = true
		}
		w.passes++
		if progress {
			w.lastIdle = 0
			w.give.found()
			if w.work++; w.work >= busyPollWork {
				w.work = 0
				w.pollInactive()
				if w.inFlight > 0 {
					// As in idlePass: a busy queue must not keep another one's request
					// from those who carry it out.
					yieldCPU()
				}
			}
			continue
		}
		w.idlePass()
		switch {
		case len(w.active) == 0:
			w.sleep()
			w.lastIdle = 0
		case w.passes%idlePollPasses == 0:
			w.pollKicks()
		}
	}
}

// takeOther handles what other goroutines sent.
func (w *Worker) takeOther() bool {
	progress := false
	if w.completed.Load() != nil {
		w.takeCompleted()
		progress = true
	}
	if w.hasOps.Load() {
		w.hasOps.Store(false)
		w.mu.Lock()
		ops := w.ops
		w.ops = nil
		w.mu.Unlock()
		for _, op := range ops {
			op()
		}
		progress = true
	}
	return progress
}

// takeCompleted answers requests that ended asynchronously, oldest first.
func (w *Worker) takeCompleted() {
	var list *Slot
	for s := w.completed.Swap(nil); s != nil; {
		next := s.next
		s.next = list
		list, s = s, next
	}
	for s := list; s != nil; {
		next := s.next
		s.next = nil
		q := s.q
		if !q.touched {
			q.touched = true
			w.touched = append(w.touched, q)
		}
		w.endedGuarded(q, s)
		s = next
	}
	for _, q := range w.touched {
		q.touched = false
		if q.poll.found(w.pollMax) {
			q.count.hits.Add(1)
		}
		// Who gets an answer is likely to ask again.
		w.activate(q)
		w.publishGuarded(q)
		q.checkDrained()
	}
	w.touched = w.touched[:0]
}

func (w *Worker) endedGuarded(q *Queue, s *Slot) {
	w.current = q
	defer w.recoverFault()
	q.ended(s)
	w.current = nil
}

func (w *Worker) publishGuarded(q *Queue) {
	w.current = q
	defer w.recoverFault()
	q.publish()
	w.current = nil
}

// serveActive passes over the active queues once. A fault cuts the pass short.
func (w *Worker) serveActive() (progress bool) {
	defer w.recoverFault()
	for i := 0; i < len(w.active); {
		q := w.active[i]
		if q.paused {
			w.deactivate(i)
			progress = true
			continue
		}
		w.current = q
		if q.serve() > 0 {
			progress = true
			if q.poll.found(w.pollMax) {
				q.count.hits.Add(1)
			}
		}
		i++
	}
	w.current = nil
	return progress
}

// recoverFault turns a fault on the current queue's memory into the end of its
// session. Any other panic goes on: it is ours.
func (w *Worker) recoverFault() {
	r := recover()
	if r == nil {
		return
	}
	q := w.current
	addr, ok := mem.Fault(r)
	if q == nil || !ok {
		panic(r)
	}
	w.current = nil
	if q.inSubmit {
		// The device was to survive this. What it took over is unknown, so the
		// memory must stay mapped for good.
		q.ring.Leak()
	}
	q.paused, q.broken = true, true
	q.ring.Fail(&mem.FaultError{Addr: addr})
}

// idlePass opens, checks and ends the waits of queues that had nothing to do.
func (w *Worker) idlePass() {
	if len(w.active) == 0 {
		return
	}
	if w.inFlight > 0 && w.passes%yieldPasses == 0 {
		// Whoever carries them out may be waiting for this very CPU.
		yieldCPU()
	}
	now := w.now()
	if w.lastIdle != 0 {
		w.tokens -= now - w.lastIdle
		w.pollTime.Add(now - w.lastIdle)
	}
	w.lastIdle = now
	w.give.vain()
	if w.give.now() {
		yieldCPU()
		w.give.took(w.now() - now)
		w.lastIdle = 0 // that was no polling
		return
	}
	budget := w.budget(now)
	defer w.recoverFault()
	for i := 0; i < len(w.active); {
		q := w.active[i]
		q.poll.begin(now, w.pollMax, budget, q.outstanding > 0)
		over, missed := q.poll.expired(now, w.pollMax)
		if !over {
			i++
			continue
		}
		if missed {
			q.count.misses.Add(1)
		}
		w.current = q
		if q.ring.EnableNotify() { // it came in between: no kick will come for it
			i++
			continue
		}
		w.deactivate(i)
	}
	w.current = nil
}

// budget reports whether polling in vain is still within its share of time.
func (w *Worker) budget(now int64) bool {
	if w.pollCPU >= 1 {
		return true
	}
	w.tokens = min(w.tokens+int64(w.pollCPU*float64(now-w.refilled)), pollBurst)
	w.refilled = now
	return w.tokens > 0
}

func (w *Worker) activate(q *Queue) {
	if q.active || q.paused {
		return
	}
	q.active, q.poll.open = true, nil
	w.active = append(w.active, q)
}

func (w *Worker) deactivate(i int) {
	w.active[i].active = false
	last := len(w.active) - 1
	w.active[i] = w.active[last]
	w.active[last] = nil
	w.active = w.active[:last]
}

// sleep waits for kicks and for wake.
func (w *Worker) sleep() {
	w.sleeping.Swap(true) // a full barrier, also under the race detector
	if w.completed.Load() != nil || w.hasOps.Load() {
		w.sleeping.Store(false)
		return
	}
	w.sleeps.Add(1)
	timeout := -1
	if len(w.kickless) > 0 {
		timeout = kicklessInterval
	}
	n, err := unix.EpollWait(w.epfd, w.events[:], timeout)
	w.sleeping.Store(false)
	if err != nil && err != unix.EINTR {
		panic("worker: epoll_wait: " + err.Error())
	}
	w.kicked(n)
	for _, q := range w.kickless {
		w.activate(q)
	}
}

// pollInactive looks for requests in the queues that are not polled, while others
// are busy.
func (w *Worker) pollInactive() {
	if len(w.active) == len(w.queues) {
		return
	}
	w.pollKicks()
	for _, q := range w.kickless {
		w.activate(q)
	}
}

// pollKicks looks for kicks without sleeping.
func (w *Worker) pollKicks() { w.kicked(pollEpoll(w.epfd, w.events[:])) }

func (w *Worker) kicked(n int) {
	for i := range max(n, 0) {
		if q := w.queues[w.events[i].Fd]; q != nil { // it may have been stopped since
			q.count.kicks.Add(1)
			w.activate(q)
		}
	}
}

// add begins to serve q; see Queue.Start.
func (w *Worker) add(q *Queue, kick int) error {
	for w.nextID++; w.nextID < 0 || w.queues[w.nextID] != nil; w.nextID++ {
		if w.nextID < 0 {
			w.nextID = 0
		}
	}
	q.id = w.nextID
	if err := w.setKick(q, kick); err != nil {
		return err
	}
	w.queues[q.id] = q
	q.poll = newPolling(w.pollMax)
	w.activate(q)
	return nil
}

// setKick makes fd the descriptor that tells of new requests; -1 is none.
func (w *Worker) setKick(q *Queue, fd int) error {
	w.dropKick(q)
	if fd < 0 {
		w.kickless = append(w.kickless, q)
		return nil
	}
	q.kick = fd
	return w.epollAdd(fd, q.id)
}

func (w *Worker) dropKick(q *Queue) {
	if q.kick >= 0 {
		w.epollDel(q.kick)
		q.kick = -1
	}
	if i := slices.Index(w.kickless, q); i >= 0 {
		w.kickless = slices.Delete(w.kickless, i, i+1)
	}
}

// forget ends serving q.
func (w *Worker) forget(q *Queue) {
	w.dropKick(q)
	delete(w.queues, q.id)
	q.paused = true
	if i := slices.Index(w.active, q); i >= 0 {
		w.deactivate(i)
	}
}

// close ends the worker, which must have no queues left.
func (w *Worker) close() {
	w.do(nil, func() {
		w.mu.Lock()
		w.stop, w.closed = true, true
		w.mu.Unlock()
	})
	<-w.ended
	// It sleeps no more, so nobody new gets to use the descriptor; somebody may
	// still be about to, when something else woke the worker.
	for w.wakers.Load() != 0 {
		time.Sleep(time.Millisecond)
	}
	w.closeFDs()
}

// Sleeping reports whether the worker waits in the kernel. Any goroutine.
func (w *Worker) Sleeping() bool { return w.sleeping.Load() }

// now is the worker's clock: nanoseconds since it was made, never 0.
func (w *Worker) now() int64 { return int64(time.Since(w.epoch)) + 1 }
