package proxy

import (
	"sync"
	"time"
)

// hedges begins what reads do when their device is late. A timer for each read would
// wake a thread each time, which costs more than the rest of a read's way through the
// proxy; here one timer waits for the earliest of them. It is set when a read comes that
// has to be earlier, or when it finds reads left, so that many reads in time, one behind
// the other, set it once in a hedge's length.
type hedges struct {
	mu    sync.Mutex // a leaf
	list  []*hedge   // in no order; as many as there are reads under way
	timer *time.Timer
	next  time.Time // when the timer runs; zero: it does not
}

// hedge is something to be done at a time, unless that is stopped before.
type hedge struct {
	at    time.Time
	begin func()
	index int // in list; -1: begun
}

// after has begin called, in a goroutine of its own, when d has passed.
func (l *hedges) after(d time.Duration, begin func()) *hedge {
	h := &hedge{at: time.Now().Add(d), begin: begin}
	l.mu.Lock()
	defer l.mu.Unlock()
	h.index = len(l.list)
	l.list = append(l.list, h)
	if l.next.IsZero() || h.at.Before(l.next) {
		l.set(h.at)
	}
	return h
}

// set has the timer run at a time. Called with mu.
func (l *hedges) set(at time.Time) {
	l.next = at
	if l.timer == nil {
		l.timer = time.AfterFunc(time.Until(at), l.run)
		return
	}
	l.timer.Reset(time.Until(at))
}

// run begins what is due. The timer may run more often than it was meant to.
func (l *hedges) run() {
	l.mu.Lock()
	defer l.mu.Unlock()
	now := time.Now()
	l.next = time.Time{}
	for i := 0; i < len(l.list); {
		h := l.list[i]
		if now.Before(h.at) {
			if l.next.IsZero() || h.at.Before(l.next) {
				l.next = h.at
			}
			i++
			continue
		}
		l.remove(h)
		go h.begin()
	}
	if !l.next.IsZero() {
		l.set(l.next)
	}
}

// stop says whether it came before the hedge was begun, which then never is.
func (l *hedges) stop(h *hedge) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if h.index < 0 {
		return false
	}
	l.remove(h)
	return true
}

// remove takes a hedge out of the list. Called with mu.
func (l *hedges) remove(h *hedge) {
	end := len(l.list) - 1
	last := l.list[end]
	l.list[h.index], last.index = last, h.index
	l.list[end] = nil
	l.list = l.list[:end]
	h.index = -1
}
