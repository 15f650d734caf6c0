package driver

import (
	"fmt"
	"sort"
	"sync"
	"sync/atomic"

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

// conditions are what slows, pauses or degrades a volume now.
type conditions struct {
	mu sync.Mutex
	m  map[string]string
}

// set raises or updates a condition and reports whether it is new.
func (c *conditions) set(code, format string, args ...any) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.m == nil {
		c.m = map[string]string{}
	}
	_, had := c.m[code]
	c.m[code] = fmt.Sprintf(format, args...)
	return !had
}

// unset ends a condition and reports whether it was there.
func (c *conditions) unset(code string) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	_, had := c.m[code]
	delete(c.m, code)
	return had
}

func (c *conditions) list() []Condition {
	c.mu.Lock()
	defer c.mu.Unlock()
	out := make([]Condition, 0, len(c.m))
	for code, msg := range c.m {
		out = append(out, Condition{Code: code, Message: msg})
	}
	sort.Slice(out, func(i, j int) bool { return out[i].Code < out[j].Code })
	return out
}

// raise and settle log a condition's beginning and end once.
func (v *Volume) raise(code, format string, args ...any) {
	if v.conds.set(code, format, args...) {
		v.log.Warn().Str("condition", code).Msgf(format, args...)
	}
}

func (v *Volume) settle(code string) {
	if v.conds.unset(code) {
		v.log.Info().Str("condition", code).Msg("condition has ended")
	}
}

type opCounters struct{ count, bytes, errors atomic.Uint64 }

func (o *opCounters) add(n, bytes uint64) {
	o.count.Add(n)
	o.bytes.Add(bytes)
}

type counters struct {
	ops            [5]opCounters
	syncs          atomic.Uint64
	spilled        atomic.Uint64
	scrubbed       atomic.Uint64
	reclaimed      atomic.Uint64
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
