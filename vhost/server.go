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
	"scoria/shm/worker"
	"scoria/vhost/virtq"
)

// Defaults and limits of Config.
const (
	DefaultMaxQueues = 64
	MaxQueues        = 256 // ring numbers are 8 bits on the wire
	// MaxQueueSize bounds the ring size that a front end may choose; QEMU's own
	// limit is the same.
	MaxQueueSize = 1024
)

// Limits of what front ends take of the daemon's (P7). A QEMU has one connection
// to a volume; two have, while they migrate on one host, and one that comes back
// may be there before the one that it had has been given back.
const (
	// maxSessions is how many connections an endpoint has at most.
	maxSessions = 8
	// All front ends together may map maxTotalBytes, of the 128 TiB of address space
	// that a process has, and half of the mappings that the kernel allows; those of
	// one endpoint maxEndpointBytes and maxEndpointMappings: four times guest memory of
	// the most regions, as memory tables are replaced before the old one is unmapped.
	maxTotalBytes       = 96 << 40
	maxEndpointBytes    = 32 << 40
	maxEndpointMappings = 4*mem.MaxRegions + 4*maxSessions
)

// Errors.
var (
	ErrServerClosed = errors.New("vhost server is closing")
	ErrSocketInUse  = errors.New("socket is served by another process")
)

// Config configures a Server. The zero value of each field but Log is replaced
// by its default.
type Config struct {
	// Set has the workers that serve all queues, which other front ends may share
	// and whose owner closes it after the Server; nil: a set of the Server's own
	// as Workers says.
	Set     *worker.Set
	Workers worker.Config
	// MaxQueues is the number of rings that a front end may use; default
	// DefaultMaxQueues.
	MaxQueues int
	// SocketMode and SocketGroup are given to the sockets; default 0660 and,
	// with 0, the process's own group.
	SocketMode  os.FileMode
	SocketGroup int
	Log         zerolog.Logger

	// For tests; 0: the constants.
	endpointBytes uint64
	replyTimeout  time.Duration
}

func (c *Config) setDefaults() error {
	if c.MaxQueues == 0 {
		c.MaxQueues = DefaultMaxQueues
	}
	if c.endpointBytes == 0 {
		c.endpointBytes = maxEndpointBytes
	}
	if c.replyTimeout == 0 {
		c.replyTimeout = replyTimeout
	}
	if c.SocketMode == 0 {
		c.SocketMode = 0o660
	}
	if c.MaxQueues < 0 || c.MaxQueues > MaxQueues {
		return fmt.Errorf("vhost queues %d: must be 1 to %d", c.MaxQueues, MaxQueues)
	}
	return nil
}

// Server serves vhost-user sockets. Its methods may be called from any
// goroutine.
type Server struct {
	cfg     Config
	workers *worker.Set
	chains  map[*worker.Worker]*virtq.Chain // scratch, one per worker
	budget  *mem.Budget

	mu        sync.Mutex
	endpoints map[*Endpoint]struct{}
	nextID    uint64
	closed    bool
}

// NewServer makes a server. Nothing is served before Listen.
func NewServer(cfg Config) (*Server, error) {
	if err := cfg.setDefaults(); err != nil {
		return nil, err
	}
	s := &Server{cfg: cfg, workers: cfg.Set, endpoints: map[*Endpoint]struct{}{}, chains: map[*worker.Worker]*virtq.Chain{},
		budget: mem.NewBudget(nil, maxTotalBytes, mem.MaxMappings()/2)}
	if s.workers == nil {
		set, err := worker.NewSet(cfg.Workers)
		if err != nil {
			return nil, fmt.Errorf("vhost: %w", err)
		}
		s.workers = set
	}
	for _, w := range s.workers.Workers() {
		s.chains[w] = new(virtq.Chain)
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
		budget: mem.NewBudget(s.budget, s.cfg.endpointBytes, maxEndpointMappings),
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

// Close ends all endpoints and sessions, and the workers if they are its own. Requests in flight end
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
	if s.cfg.Set == nil {
		s.workers.Close()
	}
}

func (s *Server) nextSession() (id uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.nextID++
	return s.nextID
}
