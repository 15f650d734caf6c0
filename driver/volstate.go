package driver

import (
	"context"
	"fmt"
	"sort"
	"sync"
	"sync/atomic"
	"time"

	"scoria/driver/block"
)

// claims is the one-writer rule of a volume.
type claims struct {
	mu     sync.Mutex
	holder block.Claimant
	count  int
}

func (c *claims) take(volume string, who block.Claimant) (func(), error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.count > 0 && c.holder != who {
		return nil, &block.InUseError{Volume: volume, Holder: c.holder}
	}
	c.holder = who
	c.count++
	var once sync.Once
	return func() {
		once.Do(func() {
			c.mu.Lock()
			c.count--
			c.mu.Unlock()
		})
	}, nil
}

func (c *claims) current() (block.Claimant, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.holder, c.count > 0
}

// watches are the callbacks for changes of Info.
type watches struct {
	mu   sync.Mutex
	next int
	fns  map[int]func(block.Info)
}

func (w *watches) add(fn func(block.Info)) func() {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.fns == nil {
		w.fns = map[int]func(block.Info){}
	}
	id := w.next
	w.next++
	w.fns[id] = fn
	return func() {
		w.mu.Lock()
		delete(w.fns, id)
		w.mu.Unlock()
	}
}

func (w *watches) notify(info block.Info) {
	w.mu.Lock()
	fns := make([]func(block.Info), 0, len(w.fns))
	for _, fn := range w.fns {
		fns = append(fns, fn)
	}
	w.mu.Unlock()
	for _, fn := range fns {
		fn(info)
	}
}

// users are those who use a volume other than through requests. Close waits for
// them before it unmaps what they may look at.
type users struct {
	mu     sync.Mutex
	n      int
	closed bool
	none   chan struct{} // closed when closed and n is 0
}

func (u *users) add() bool {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.closed {
		return false
	}
	u.n++
	return true
}

func (u *users) done() {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.n--; u.n == 0 && u.closed {
		close(u.none)
	}
}

// shut lets nobody in any more and waits until the last one has left.
func (u *users) shut() {
	u.mu.Lock()
	u.shutLocked()
	u.mu.Unlock()
	<-u.none
}

func (u *users) shutLocked() {
	if !u.closed {
		u.closed, u.none = true, make(chan struct{})
		if u.n == 0 {
			close(u.none)
		}
	}
}

// shutting is shut for those who want to give up waiting, with reopen.
func (u *users) shutting() <-chan struct{} {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.shutLocked()
	return u.none
}

func (u *users) reopen() {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.closed = false
}

// enter makes the caller a user until leave. The context it returns also ends
// when the volume begins to close.
func (v *Volume) enter(ctx context.Context) (_ context.Context, leave func(), err error) {
	if !v.users.add() {
		return nil, nil, fmt.Errorf("volume %s: %w", v.cfg.Name, block.ErrClosed)
	}
	ctx, cancel := context.WithCancel(ctx)
	unhook := context.AfterFunc(v.ckpt.work, cancel)
	return ctx, func() {
		unhook()
		cancel()
		v.users.done()
	}, nil
}

// A condition may come and go a thousand times a second. One that came back within
// conditionLinger is listed until it has not held for as long, and that it began
// and ended is logged at most once per conditionQuiet.
const (
	conditionLinger = 5 * time.Second
	conditionQuiet  = 30 * time.Second
)

// condition is a Condition with its recent past.
type condition struct {
	message string
	holds   bool
	last    time.Time // when it held last, if it does not
	flaps   bool      // it has come back
	logged  bool      // its beginning was
}

// conditions are what slows, pauses or degrades a volume now or did just before.
type conditions struct {
	mu     sync.Mutex
	m      map[string]*condition
	logged map[string]time.Time // by code, when a beginning was logged last
}

// set raises or updates a condition and reports whether to log that it began.
func (c *conditions) set(now time.Time, code, message string) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.m == nil {
		c.m, c.logged = map[string]*condition{}, map[string]time.Time{}
	}
	e := c.m[code]
	if e == nil {
		e = &condition{}
		c.m[code] = e
	}
	e.flaps = e.flaps || !e.holds && !e.last.IsZero()
	e.message, e.holds = message, true
	if last, ok := c.logged[code]; e.logged || (ok && now.Sub(last) < conditionQuiet) {
		return false
	}
	e.logged = true
	c.logged[code] = now
	return true
}

// unset says that a condition does not hold now.
func (c *conditions) unset(now time.Time, code string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if e := c.m[code]; e != nil && e.holds {
		e.holds, e.last = false, now
	}
}

// sweep forgets conditions that have ended and returns those whose end should be
// logged.
func (c *conditions) sweep(now time.Time) (ended []string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for code, e := range c.m {
		if e.holds || now.Sub(e.last) < conditionLinger {
			continue
		}
		if e.logged {
			ended = append(ended, code)
		}
		delete(c.m, code)
	}
	return ended
}

func (e *condition) listed(now time.Time) bool {
	return e.holds || e.flaps && now.Sub(e.last) < conditionLinger
}

func (c *conditions) list(now time.Time) []Condition {
	c.mu.Lock()
	defer c.mu.Unlock()
	out := make([]Condition, 0, len(c.m))
	for code, e := range c.m {
		if e.listed(now) {
			out = append(out, Condition{Code: code, Message: e.message})
		}
	}
	sort.Slice(out, func(i, j int) bool { return out[i].Code < out[j].Code })
	return out
}

// raise says that a condition holds, from any goroutine.
func (v *Volume) raise(code, format string, args ...any) {
	message := fmt.Sprintf(format, args...)
	if v.conds.set(time.Now(), code, message) {
		v.log.Warn().Str("condition", code).Msg(message)
	}
}

// settle says that it does not hold any more; tick tells the log.
func (v *Volume) settle(code string) { v.conds.unset(time.Now(), code) }

func (v *Volume) logEnded(now time.Time) {
	for _, code := range v.conds.sweep(now) {
		v.log.Info().Str("condition", code).Msg("condition has ended")
	}
}

type opCounters struct{ count, bytes, errors atomic.Uint64 }

func (o *opCounters) add(n, bytes uint64) {
	o.count.Add(n)
	o.bytes.Add(bytes)
}

type counters struct {
	stages         [stageCount]latency
	ops            [5]opCounters
	syncs          atomic.Uint64
	spilled        atomic.Uint64
	scrubbed       atomic.Uint64
	compacted      atomic.Uint64
	reclaimed      atomic.Uint64
	uploaded       atomic.Uint64
	storeRead      atomic.Uint64
	cacheHits      atomic.Uint64
	cacheMisses    atomic.Uint64
	checksumErrors atomic.Uint64
	replayed       atomic.Uint64
	checkpointed   atomic.Uint64
}

// liveTable counts the live clusters of each SCO. Writers adjust it without a
// lock; pages of counters are made when a SCO is opened.
type liveTable struct {
	mu    sync.Mutex
	pages atomic.Pointer[[]*livePage]
}

const livePageLen = 1024

type livePage [livePageLen]atomic.Int32

// ensure makes the counter of SCO n exist.
func (t *liveTable) ensure(n uint64) {
	t.mu.Lock()
	defer t.mu.Unlock()
	var pages []*livePage
	if p := t.pages.Load(); p != nil {
		pages = *p
	}
	i := n / livePageLen
	if i < uint64(len(pages)) && pages[i] != nil {
		return
	}
	grown := make([]*livePage, max(uint64(len(pages)), i+1))
	copy(grown, pages)
	grown[i] = new(livePage)
	t.pages.Store(&grown)
}

// inherit makes one page of counters serve all SCOs of ancestors, the last of which
// is given: what writers take from them says how many clusters are still theirs.
func (t *liveTable) inherit(last uint64) {
	t.mu.Lock()
	defer t.mu.Unlock()
	pages := make([]*livePage, last/livePageLen+1)
	shared := new(livePage)
	for i := range pages {
		pages[i] = shared
	}
	pages[last/livePageLen] = new(livePage) // it has own ones, too
	t.pages.Store(&pages)
}

// lost sums up the changes of the counters of ancestors' SCOs.
func (t *liveTable) lost(last uint64) (n int64) {
	pages := *t.pages.Load()
	if last >= livePageLen {
		for i := range pages[0] {
			n += int64(pages[0][i].Load())
		}
	}
	for i := range last%livePageLen + 1 {
		n += int64(pages[last/livePageLen][i].Load())
	}
	return n
}

// liveCounters is a copy of a liveTable.
type liveCounters []*[livePageLen]int32

// copy is the counters as they are now: exact if the gate is closed.
func (t *liveTable) copy() liveCounters {
	pages := *t.pages.Load()
	out := make(liveCounters, len(pages))
	for i, p := range pages {
		switch {
		case p == nil:
		case i > 0 && p == pages[i-1]:
			out[i] = out[i-1]
		default:
			out[i] = new([livePageLen]int32)
			for k := range p {
				out[i][k] = p[k].Load()
			}
		}
	}
	return out
}

// at returns the count of SCO n.
func (c liveCounters) at(n uint64) uint32 {
	if i := n / livePageLen; i < uint64(len(c)) && c[i] != nil {
		return uint32(max(0, c[i][n%livePageLen]))
	}
	return 0
}

// at returns the counter of SCO n, which must have been ensured.
func (t *liveTable) at(n uint64) *atomic.Int32 {
	return &(*t.pages.Load())[n/livePageLen][n%livePageLen]
}

// waitingSet is the requests that wait for room outside the parked queue, with
// whether they were canceled.
type waitingSet struct {
	mu sync.Mutex
	m  map[*block.Request]bool
}

func (w *waitingSet) enter(r *block.Request) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.m == nil {
		w.m = map[*block.Request]bool{}
	}
	w.m[r] = false
}

// leave removes r and reports whether it was canceled.
func (w *waitingSet) leave(r *block.Request) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	canceled := w.m[r]
	delete(w.m, r)
	return canceled
}

func (w *waitingSet) cancel(owner any) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for r := range w.m {
		if r.Owner == owner {
			w.m[r] = true
		}
	}
}
