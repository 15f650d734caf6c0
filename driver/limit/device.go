package limit

import (
	"sync"
	"sync/atomic"
	"time"

	"scoria/driver/block"
)

const (
	// passBatch bounds the requests that are decided on, or let go, at once.
	passBatch = 64
	// maxFree bounds the waiters kept for reuse.
	maxFree = 1024
	// recent is how long after its last wait a volume still counts as limited:
	// what waits comes and goes.
	recent = time.Second
)

// Device holds the requests to a block.Device to limits. Safe from any goroutine.
type Device struct {
	block.Device
	limited atomic.Bool // any limit is set

	epoch time.Time

	mu       sync.Mutex
	settings Settings
	gate     gate
	urgent   line // let go at once, whatever the limits
	running  bool // the goroutine that lets requests go
	free     *waiter
	nfree    int
	stats    Stats
	lastWait int64 // clock at the end of the last wait

	wake chan struct{} // one token: the goroutine has to look again
}

var (
	_ block.Device  = (*Device)(nil)
	_ block.Delayer = (*Device)(nil)
)

// Stats says what the limits did since the Device was made.
type Stats struct {
	ReadsDelayed  uint64 // requests that had to wait
	WritesDelayed uint64
	ReadWait      time.Duration // by all of them together
	WriteWait     time.Duration
	Waiting       int           // requests that wait now
	Oldest        time.Duration // how long the one has that waits longest
	Limited       bool          // requests wait now, or did a moment ago
	By            string        // the setting that held up a request last; empty: none did
}

// waiter is a request that waits, and the copy of it that the device below gets
// in the end: that one sets Ended, and a front end may still be looking at its
// own.
type waiter struct {
	copy  block.Request
	orig  *block.Request
	to    block.Device // that gets it
	d     *Device
	next  *waiter
	class class
	bytes uint64
	seq   uint64 // order over both lines
	since int64
	uses  atomic.Int32 // by the goroutine that lets it go, and until its end
}

// New returns dev with no limit.
func New(dev block.Device) *Device {
	return &Device{Device: dev, epoch: time.Now(), wake: make(chan struct{}, 1)}
}

// now is the clock, in ns. It never goes backwards.
func (d *Device) now() int64 { return int64(time.Since(d.epoch)) }

// Set changes the limits, for requests that wait too. The settings must have
// passed Check.
func (d *Device) Set(s Settings) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.settings == s {
		return
	}
	d.settings = s
	d.gate.set(d.now(), s.limits())
	d.limited.Store(d.gate.limited)
	d.nudge()
}

// Settings returns the limits in force.
func (d *Device) Settings() Settings {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.settings
}

// nudge makes the goroutine that lets requests go look again.
func (d *Device) nudge() {
	select {
	case d.wake <- struct{}{}:
	default:
	}
}

// Submit implements block.Device.
func (d *Device) Submit(batch []*block.Request) { d.submitTo(d.Device, batch) }

func (d *Device) submitTo(dev block.Device, batch []*block.Request) {
	if !d.limited.Load() {
		dev.Submit(batch)
		return
	}
	for len(batch) > 0 {
		n := min(len(batch), passBatch)
		d.submit(dev, batch[:n])
		batch = batch[n:]
	}
}

// submit lets go at once what may pass and keeps the rest. From the moment at
// which the lock is released, a request that waits is not touched here any more.
func (d *Device) submit(dev block.Device, batch []*block.Request) {
	var passes [passBatch]bool
	d.mu.Lock()
	now := d.now()
	for i, r := range batch {
		if passes[i] = r.Op == block.OpFlush && (dev != d.Device || !d.gate.counted); passes[i] {
			continue
		}
		c, n := classOf(r)
		if passes[i] = d.gate.pass(now, c, n); !passes[i] {
			r.Ended = false
			d.keep(dev, r, c, n, now)
		}
	}
	d.start()
	d.mu.Unlock()
	for i := 0; i < len(batch); {
		j := i
		for j < len(batch) && passes[j] {
			j++
		}
		if j > i {
			dev.Submit(batch[i:j])
		}
		i = j + 1
	}
}

// keep lets r wait before dev gets it. Caller holds mu.
func (d *Device) keep(dev block.Device, r *block.Request, c class, n uint64, now int64) {
	w := d.free
	if w == nil {
		w = &waiter{d: d}
		w.copy.Complete = func(*block.Request) {
			w.finish()
			w.release()
		}
	} else {
		d.free = w.next
		d.nfree--
	}
	w.orig, w.to, w.class, w.bytes, w.since = r, dev, c, n, now
	w.copy.Op, w.copy.Flags, w.copy.Offset, w.copy.Length = r.Op, r.Flags, r.Offset, r.Length
	w.copy.Segments, w.copy.Owner, w.copy.Err, w.copy.Ended = r.Segments, r.Owner, nil, false
	if c == reads {
		d.stats.ReadsDelayed++
	} else {
		d.stats.WritesDelayed++
	}
	d.gate.wait(w)
}

// start makes sure that what waits is let go in time. Caller holds mu.
func (d *Device) start() {
	if d.gate.waiting()+d.urgent.n > 0 && !d.running {
		d.running = true
		go d.run()
	}
}

// run lets requests go as the limits allow, until none waits.
func (d *Device) run() {
	var ready [passBatch]*waiter
	timer := time.NewTimer(time.Hour)
	defer timer.Stop()
	for {
		n, pause, more := d.collect(ready[:])
		switch {
		case n > 0:
			d.letGo(ready[:n])
			continue
		case !more:
			return
		}
		timer.Reset(pause)
		select {
		case <-timer.C:
		case <-d.wake:
		}
	}
}

// collect takes the requests that may pass now. If there are none, it says after
// which pause to come back, or that nothing waits: then the goroutine must end.
func (d *Device) collect(ready []*waiter) (n int, pause time.Duration, more bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	now := d.now()
	for n < len(ready) && d.urgent.first != nil {
		ready[n] = d.urgent.pop()
		n++
	}
	for n < len(ready) {
		w, at := d.gate.next(now)
		if w == nil {
			pause = time.Duration(at - now)
			break
		}
		d.waited(w, now)
		ready[n] = w
		n++
	}
	if n == 0 && d.gate.waiting() == 0 {
		d.running = false
		return 0, 0, false
	}
	return n, pause, true
}

// waited counts a wait that has ended. Caller holds mu.
func (d *Device) waited(w *waiter, now int64) {
	d.lastWait = now
	if t := time.Duration(now - w.since); w.class == reads {
		d.stats.ReadWait += t
	} else {
		d.stats.WriteWait += t
	}
}

// letGo passes requests on to their devices.
func (d *Device) letGo(list []*waiter) {
	var batch [passBatch]*block.Request
	for i, w := range list {
		w.uses.Store(2)
		batch[i] = &w.copy
	}
	for i := 0; i < len(list); {
		j := i + 1
		for j < len(list) && list[j].to == list[i].to {
			j++
		}
		list[i].to.Submit(batch[i:j])
		i = j
	}
	for _, w := range list {
		if w.copy.Ended {
			w.finish()
			w.release()
		}
		w.release()
	}
}

// finish ends the front end's request as its copy has ended.
func (w *waiter) finish() {
	r := w.orig
	r.Err = w.copy.Err
	r.Complete(r)
}

// release gives w back when neither use is left.
func (w *waiter) release() {
	if w.uses.Add(-1) > 0 {
		return
	}
	w.orig, w.to, w.copy.Segments, w.copy.Owner = nil, nil, nil, nil
	d := w.d
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.nfree < maxFree {
		w.next, d.free = d.free, w
		d.nfree++
	}
}

// Cancel implements block.Device: what waits for the limits waits for room.
func (d *Device) Cancel(owner any) { d.cancelIn(d.Device, owner) }

func (d *Device) cancelIn(dev block.Device, owner any) {
	match := func(w *waiter) bool { return w.to == dev && w.orig.Owner == owner }
	d.mu.Lock()
	now := d.now()
	list := d.gate.remove(match)
	list = d.urgent.remove(match, list)
	for _, w := range list {
		d.waited(w, now)
	}
	if len(list) > 0 {
		d.nudge()
	}
	d.mu.Unlock()
	for _, w := range list {
		w.uses.Store(1)
		w.copy.Err = block.ErrCanceled
		w.finish()
		w.release()
	}
	dev.Cancel(owner)
}

// Hasten implements block.Delayer. What is let go early counts all the same:
// later requests wait for it.
func (d *Device) Hasten(owner any) { d.hastenIn(d.Device, owner) }

func (d *Device) hastenIn(dev block.Device, owner any) {
	d.mu.Lock()
	defer d.mu.Unlock()
	now := d.now()
	for _, w := range d.gate.remove(func(w *waiter) bool { return w.to == dev && w.orig.Owner == owner }) {
		d.gate.take(now, w.class, w.bytes)
		d.waited(w, now)
		d.urgent.push(w)
	}
	d.nudge()
}

// Stats returns what the limits did.
func (d *Device) Stats() Stats {
	d.mu.Lock()
	defer d.mu.Unlock()
	now := d.now()
	st := d.stats
	st.Waiting = d.gate.waiting() + d.urgent.n
	st.Oldest = time.Duration(now - d.gate.oldest(now))
	if st.ReadsDelayed+st.WritesDelayed > 0 {
		st.By = bucketNames[d.gate.blocked]
		st.Limited = st.Waiting > 0 || now-d.lastWait < int64(recent)
	}
	return st
}
