package vhost

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"sync"
	"time"

	"github.com/rs/zerolog"
	"golang.org/x/sys/unix"

	"scoria/driver/block"
	"scoria/shm/mem"
)

// Defaults and limits of Config.
const (
	DefaultPollMax   = 50 * time.Microsecond
	DefaultMaxQueues = 64
	MaxQueues        = 256 // ring numbers are 8 bits on the wire
	// MaxQueueSize bounds the ring size that a front end may choose; QEMU's own
	// limit is the same.
	MaxQueueSize = 1024
)

// Errors.
var (
	ErrServerClosed = errors.New("vhost server is closing")
	ErrSocketInUse  = errors.New("socket is served by another process")
)

// Config configures a Server. The zero value of each field but Log is replaced
// by its default, but for PollMax and PollCPU, where negative means none.
type Config struct {
	// Workers is the number of threads that serve all queues; default 1.
	Workers int
	// PollMax is the longest time that a queue is polled after its last request;
	// default DefaultPollMax; negative: never poll.
	PollMax time.Duration
	// PollCPU is the share of its time, 0 to 1, that each worker may spend
	// polling in vain; default 1, which is no limit; negative: never poll.
	PollCPU float64
	// MaxQueues is the number of rings that a front end may use; default
	// DefaultMaxQueues.
	MaxQueues int
	// SocketMode and SocketGroup are given to the sockets; default 0660 and,
	// with 0, the process's own group.
	SocketMode  os.FileMode
	SocketGroup int
	Log         zerolog.Logger
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
	if c.MaxQueues == 0 {
		c.MaxQueues = DefaultMaxQueues
	}
	if c.SocketMode == 0 {
		c.SocketMode = 0o660
	}
	switch {
	case c.Workers < 0 || c.Workers > 256:
		return fmt.Errorf("vhost workers %d: must be 1 to 256", c.Workers)
	case c.PollMax > time.Second:
		return fmt.Errorf("vhost poll time %v: must be at most 1s", c.PollMax)
	case c.PollCPU > 1:
		return fmt.Errorf("vhost poll share %v: must be at most 1", c.PollCPU)
	case c.MaxQueues < 0 || c.MaxQueues > MaxQueues:
		return fmt.Errorf("vhost queues %d: must be 1 to %d", c.MaxQueues, MaxQueues)
	}
	return nil
}

// Server serves vhost-user sockets. Its methods may be called from any
// goroutine.
type Server struct {
	cfg     Config
	workers []*worker

	mu        sync.Mutex
	endpoints map[*Endpoint]struct{}
	nextID    uint64
	closed    bool
	sessions  int
	watching  chan struct{} // ends the watchdog
}

// NewServer starts the workers. Nothing is served before Listen.
func NewServer(cfg Config) (*Server, error) {
	if err := cfg.setDefaults(); err != nil {
		return nil, err
	}
	s := &Server{cfg: cfg, endpoints: map[*Endpoint]struct{}{}}
	for range cfg.Workers {
		w, err := newWorker(cfg.PollMax, cfg.PollCPU)
		if err != nil {
			for _, w := range s.workers {
				w.close()
			}
			return nil, fmt.Errorf("starting vhost worker: %w", err)
		}
		s.workers = append(s.workers, w)
		go w.run()
	}
	return s, nil
}

// OpenFunc returns the device that a connection is to. It is called at the
// first message of each connection and may block until ctx ends.
type OpenFunc func(ctx context.Context) (block.Device, error)

// Listen serves the volume called name on a unix socket at path. A socket that
// a dead process left there is replaced; one that is served by somebody is
// refused with ErrSocketInUse.
func (s *Server) Listen(name, path string, open OpenFunc) (*Endpoint, error) {
	ln, err := listenUnix(path, s.cfg.SocketMode, s.cfg.SocketGroup)
	if err != nil {
		return nil, fmt.Errorf("vhost socket of volume %s: %w", name, err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	e := &Endpoint{
		srv: s, name: name, path: path, open: open, ln: ln, ctx: ctx, cancel: cancel,
		log: s.cfg.Log.With().Str("volume", name).Logger(), sessions: map[*session]struct{}{}, accepting: make(chan struct{}),
	}
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		cancel()
		ln.Close()
		return nil, ErrServerClosed
	}
	s.endpoints[e] = struct{}{}
	s.mu.Unlock()
	go e.accept()
	return e, nil
}

// listenUnix binds path, with its mode set before the first connection can be
// made.
func listenUnix(path string, mode os.FileMode, group int) (*net.UnixListener, error) {
	st, err := os.Lstat(path)
	switch {
	case errors.Is(err, os.ErrNotExist):
	case err != nil:
		return nil, err
	case st.Mode()&os.ModeSocket == 0:
		return nil, fmt.Errorf("%s is there and is no socket", path)
	default:
		if c, err := net.Dial("unix", path); err == nil {
			c.Close()
			return nil, fmt.Errorf("%s: %w", path, ErrSocketInUse)
		} else if !errors.Is(err, unix.ECONNREFUSED) {
			return nil, err
		}
		if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
			return nil, err
		}
	}
	// Bound under another name, the socket can't be connected to before it has
	// its mode.
	tmp := path + ".new"
	_ = os.Remove(tmp)
	ln, err := net.ListenUnix("unix", &net.UnixAddr{Name: tmp, Net: "unix"})
	if err != nil {
		return nil, err
	}
	ln.SetUnlinkOnClose(false)
	err = os.Chmod(tmp, mode)
	if err == nil && group != 0 {
		err = os.Chown(tmp, -1, group)
	}
	if err == nil {
		err = os.Rename(tmp, path)
	}
	if err != nil {
		ln.Close()
		_ = os.Remove(tmp)
		return nil, err
	}
	return ln, nil
}

// Close ends all endpoints and sessions and the workers. Requests in flight end
// first; those that wait for room are canceled and stay in the front ends'
// in-flight areas, to be resubmitted to the next daemon.
func (s *Server) Close() {
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		return
	}
	s.closed = true
	var all []*Endpoint
	for e := range s.endpoints {
		all = append(all, e)
	}
	s.mu.Unlock()
	var wg sync.WaitGroup
	for _, e := range all {
		wg.Go(e.Close)
	}
	wg.Wait()
	for _, w := range s.workers {
		w.close()
	}
}

// Workers returns a snapshot of the workers' counters.
func (s *Server) Workers() []WorkerStats {
	var all []WorkerStats
	for _, w := range s.workers {
		all = append(all, WorkerStats{
			Queues: int(w.load.Load()), Sleeps: w.sleeps.Load(), PollTime: time.Duration(w.pollTime.Load()),
		})
	}
	return all
}

// pickWorker returns the worker with the fewest queues and counts one more.
func (s *Server) pickWorker() *worker {
	best := s.workers[0]
	for _, w := range s.workers[1:] {
		if w.load.Load() < best.load.Load() {
			best = w
		}
	}
	best.load.Add(1)
	return best
}

func (s *Server) sessionStarted() (id uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.sessions++; s.sessions == 1 {
		s.watching = make(chan struct{})
		go s.watch(s.watching)
	}
	s.nextID++
	return s.nextID
}

func (s *Server) sessionEnded() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.sessions--; s.sessions == 0 {
		close(s.watching)
	}
}

// watch is the watchdog: it runs while there are sessions. A worker that is
// seen twice in the same signal is stuck in the write to an eventfd whose owner
// made it blocking and filled its count; reading it lets go.
func (s *Server) watch(stop chan struct{}) {
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
				q.s.fail(fmt.Errorf("ring %d: %w", q.index, errBlockedCall))
				// The descriptor stays open while the queue exists, and the queue
				// exists while its worker is stuck.
				_, _ = mem.DrainEventFD(q.call)
			}
			last[i] = n
		}
	}
}

var errBlockedCall = errors.New("call eventfd was made blocking and its count is full")
