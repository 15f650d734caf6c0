package worker

import (
	"errors"
	"fmt"
	"math"
	"sync"
	"time"

	"scoria/shm/mem"
)

// Defaults and limits of Config.
const (
	DefaultPollMax = 50 * time.Microsecond
	MaxWorkers     = 256
)

// ErrBlockedCall ends a session whose call eventfd the peer made blocking and
// filled.
var ErrBlockedCall = errors.New("call eventfd was made blocking and its count is full")

// Config configures a Set.
type Config struct {
	// Workers is the number of threads that serve all queues; 0: one.
	Workers int
	// PollMax is the longest time that a queue is polled after its last request;
	// 0: DefaultPollMax; negative: never poll.
	PollMax time.Duration
	// PollCPU is the share of its time, 0 to 1, that each worker may spend
	// polling in vain; 0: all; negative: never poll.
	PollCPU float64
}

func (c *Config) setDefaults() error {
	if c.Workers == 0 {
		c.Workers = 1
	}
	if c.PollMax == 0 {
		c.PollMax = DefaultPollMax
	}
	if c.PollCPU == 0 {
		c.PollCPU = 1
	}
	if c.PollMax < 0 || c.PollCPU < 0 {
		c.PollMax, c.PollCPU = 0, 0
	}
	switch {
	case c.Workers < 0 || c.Workers > MaxWorkers:
		return fmt.Errorf("workers %d: must be 1 to %d", c.Workers, MaxWorkers)
	case c.PollMax > time.Second:
		return fmt.Errorf("poll time %v: must be at most 1s", c.PollMax)
	case c.PollCPU > 1 || math.IsNaN(c.PollCPU):
		return fmt.Errorf("poll share %v: must be at most 1", c.PollCPU)
	}
	return nil
}

// Set is a fixed number of workers. Its methods may be called from any
// goroutine but the workers'.
type Set struct {
	workers []*Worker

	mu       sync.Mutex
	queues   int
	watching chan struct{} // ends the watchdog
}

// NewSet starts the workers.
func NewSet(c Config) (*Set, error) {
	if err := c.setDefaults(); err != nil {
		return nil, err
	}
	s := &Set{}
	for range c.Workers {
		w, err := newWorker(c.PollMax, c.PollCPU)
		if err != nil {
			s.Close()
			return nil, fmt.Errorf("starting a worker: %w", err)
		}
		w.set = s
		s.workers = append(s.workers, w)
		go w.run()
	}
	return s, nil
}

// Close ends the workers, whose queues have all been released.
func (s *Set) Close() {
	for _, w := range s.workers {
		w.close()
	}
}

// Workers returns the workers; the slice is not to be changed.
func (s *Set) Workers() []*Worker { return s.workers }

// Stats returns a snapshot of the workers' counters.
func (s *Set) Stats() []WorkerStats {
	var all []WorkerStats
	for _, w := range s.workers {
		all = append(all, WorkerStats{
			Queues: int(w.load.Load()), Sleeps: w.sleeps.Load(), PollTime: time.Duration(w.pollTime.Load()),
		})
	}
	return all
}

// pick returns the worker with the fewest queues and counts one more.
func (s *Set) pick() *Worker {
	s.mu.Lock()
	defer s.mu.Unlock()
	best := s.workers[0]
	for _, w := range s.workers[1:] {
		if w.load.Load() < best.load.Load() {
			best = w
		}
	}
	best.load.Add(1)
	if s.queues++; s.queues == 1 {
		s.watching = make(chan struct{})
		go s.watch(s.watching)
	}
	return best
}

func (s *Set) unpick(w *Worker) {
	s.mu.Lock()
	defer s.mu.Unlock()
	w.load.Add(-1)
	if s.queues--; s.queues == 0 {
		close(s.watching)
	}
}

// watch is the watchdog: it runs while there are queues. A worker that is
// seen twice in the same signal is stuck in the write to an eventfd whose owner
// made it blocking and filled its count; reading it lets go.
func (s *Set) watch(stop chan struct{}) {
	tick := time.NewTicker(500 * time.Millisecond)
	defer tick.Stop()
	last := make([]uint64, len(s.workers))
	for {
		select {
		case <-stop:
			return
		case <-tick.C:
		}
		for i, w := range s.workers {
			n, q := w.signals.Load(), w.signalling.Load()
			if q != nil && n == last[i] {
				q.ring.Fail(ErrBlockedCall)
				// The descriptor stays open while the queue exists, and the queue
				// exists while its worker is stuck.
				_, _ = mem.DrainEventFD(q.call)
			}
			last[i] = n
		}
	}
}
