package proxy

import (
	"errors"
	"fmt"
	"io"
	"sync"
	"time"

	"scoria/alba/asd"
)

// How a device's failures are judged.
const (
	firstBackoff = 100 * time.Millisecond
	maxBackoff   = 15 * time.Second
	lateLimit    = 3 // answers in a row that came later than the hedge

	hedgeMin   = 2 * time.Millisecond
	hedgeMax   = 300 * time.Millisecond
	hedgeStart = 30 * time.Millisecond
)

var errLate = fmt.Errorf("does not answer in time: %w", asd.ErrUnavailable)

// health is what requests tell of a device: up or down, and how fast. The zero value
// is up. Safe from any goroutine; the lock is a leaf.
type health struct {
	mu       sync.Mutex
	failures int       // in a row
	late     int       // in a row
	retry    time.Time // down until then; then one request may find out
	since    time.Time // of the first failure in this row
	reason   string
	returns  uint64 // successes right after failures
	err      error
	mean     time.Duration // of small reads, smoothed
	dev      time.Duration // mean deviation
}

// ok records a success; took is 0 if it says nothing about small reads.
func (h *health) ok(took time.Duration) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.failures > 0 {
		h.returns++
	}
	h.failures, h.late, h.reason, h.err, h.retry = 0, 0, "", nil, time.Time{}
	if took <= 0 {
		return
	}
	if h.mean == 0 {
		h.mean, h.dev = took, took/2
		return
	}
	// Jacobson's estimate, as for retransmissions.
	diff := took - h.mean
	h.mean += diff / 8
	h.dev += (max(diff, -diff) - h.dev) / 4
}

// failed records that the device could not be used; the next requests avoid it for
// a while that doubles.
func (h *health) failed(now time.Time, err error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.fail(now, err)
}

func (h *health) fail(now time.Time, err error) {
	if h.failures == 0 {
		h.since = now
	}
	if now.Before(h.retry) {
		return // of the same failure: requests under way end one after the other
	}
	wait := min(maxBackoff, firstBackoff<<min(h.failures, 10))
	h.failures++
	h.reason, h.err, h.retry = err.Error(), err, now.Add(wait)
}

// hedged records that an answer was so late that others were asked; several in a
// row are a failure: a daemon that is stopped does not refuse.
func (h *health) hedged(now time.Time) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.late++; h.late >= lateLimit {
		h.fail(now, errLate)
	}
}

// up says whether requests should go there.
func (h *health) up(now time.Time) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return !now.Before(h.retry)
}

// down returns why and since when nothing succeeded there; "" if it did last time.
func (h *health) down() (string, time.Time) {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.reason, h.since
}

// Returns is how often the device has come back after it had failed: what it missed
// meanwhile can be made up for.
func (h *health) Returns() uint64 {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.returns
}

// lastError is why the device is down; nil if it is not.
func (h *health) lastError() error {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.err
}

// hedge is how long to wait for a small read before others are asked.
func (h *health) hedge() time.Duration {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.mean == 0 {
		return hedgeStart
	}
	return min(hedgeMax, max(hedgeMin, h.mean+4*h.dev))
}

// latency is the smoothed time of small reads; 0 if there was none.
func (h *health) latency() time.Duration {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.mean
}

// answered says that an error is about one value or this request, from a device that
// works. All others speak against the device as a whole.
func answered(err error) bool {
	for _, e := range []error{asd.ErrNoKey, asd.ErrFull, asd.ErrStaleEpoch, asd.ErrAssert, asd.ErrCorrupt, asd.ErrInvalid, io.ErrUnexpectedEOF} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}
