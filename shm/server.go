package shm

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"sync"
	"time"

	"github.com/rs/zerolog"

	"scoria/driver/block"
	"scoria/shm/ring"
	"scoria/shm/worker"
)

// Defaults and limits of Config.
const (
	DefaultMaxConnections = 1024
	DefaultMaxRings       = 64
	DefaultMemoryBytes    = 1 << 30
	// MaxArenaBytes bounds the arena of one ring.
	MaxArenaBytes = 256 << 20

	// slotBytes is what a request can take of the daemon's own memory, which
	// counts against the limit of memory.
	slotBytes = ring.MaxSegments*24 + 512
	// quietTime is how long equal reasons of disconnects are not logged again.
	quietTime = time.Minute
)

// Errors.
var (
	ErrServerClosed = errors.New("shm server is closing")
	// ErrDenied refuses a client by who it is.
	ErrDenied = errors.New("permission denied")
)

// Action is what a client wants to do with a volume.
type Action int

// The actions.
const (
	ActionUse    Action = iota // open, stat, list, resize, snapshot
	ActionCreate               // make a new one
)

// Config configures a Server. Zero limits are replaced by their defaults.
type Config struct {
	// Opener finds the volumes.
	Opener block.Opener
	// Set has the workers that serve the rings; its owner closes it after the Server.
	Set *worker.Set
	// FullName makes POOL/VOLUME of whatever clients may call a volume by; nil:
	// they say POOL/VOLUME. Everything else sees full names only.
	FullName func(name string) (string, error)
	// Allow decides who may do what with the volume called POOL/VOLUME; an error
	// that wraps ErrDenied refuses. nil: root and this process's own user may do
	// everything, nobody else anything. Any goroutine.
	Allow func(who Peer, what Action, volume string) error
	// Snapshot makes a snapshot; nil: the server can't.
	Snapshot func(ctx context.Context, volume, snapshot string) error

	// Limits of all clients together; one user but root may have half of each.
	MaxConnections int
	MaxDescriptors int   // of connections and rings; 0: half of RLIMIT_NOFILE
	MemoryBytes    int64 // of rings

	MaxRings int // of one connection
	Log      zerolog.Logger
}

func (c *Config) setDefaults() {
	if c.MaxConnections == 0 {
		c.MaxConnections = DefaultMaxConnections
	}
	if c.MaxRings == 0 {
		c.MaxRings = DefaultMaxRings
	}
	if c.MaxDescriptors == 0 {
		c.MaxDescriptors = defaultDescriptors()
	}
	if c.MemoryBytes == 0 {
		c.MemoryBytes = DefaultMemoryBytes
	}
	if c.FullName == nil {
		c.FullName = func(name string) (string, error) { return name, nil }
	}
	if c.Allow == nil {
		c.Allow = func(who Peer, _ Action, volume string) error {
			if who.UID == 0 || int(who.UID) == os.Geteuid() {
				return nil
			}
			return fmt.Errorf("volume %s, user %d: %w", volume, who.UID, ErrDenied)
		}
	}
}

// Server serves the shared-memory socket. Its methods may be called from any
// goroutine.
type Server struct {
	cfg    Config
	ctx    context.Context // ends with Close
	cancel context.CancelFunc

	mu        sync.Mutex
	listener  *net.UnixListener
	sessions  map[*session]struct{}
	used      usage
	users     map[uint32]*usage // those that have any
	volumes   map[string]*volume
	nextID    uint64
	closed    bool
	refused   uint64
	accepting chan struct{} // closed when Serve has ended; nil before it began

	refusing chan struct{}  // holds maxRefusals at most: one for each client that is being told why
	refusals sync.WaitGroup // of those
}

// volume counts the requests to one volume.
type volume struct {
	worker.Counters
	name string

	// Under Server.mu.
	sessions                 int
	connections, disconnects uint64
	reason                   string
	reasonTime, loggedTime   time.Time
}

// NewServer makes a server. Nothing is served before Serve.
func NewServer(cfg Config) *Server {
	cfg.setDefaults()
	s := &Server{cfg: cfg, sessions: map[*session]struct{}{}, users: map[uint32]*usage{}, volumes: map[string]*volume{}, refusing: make(chan struct{}, maxRefusals)}
	s.ctx, s.cancel = context.WithCancel(context.Background())
	return s
}

// Serve accepts connections on l, a unix socket of type SOCK_SEQPACKET, until
// Close; then it returns ErrServerClosed. It closes l. Called once.
func (s *Server) Serve(l *net.UnixListener) error {
	defer l.Close()
	done := make(chan struct{})
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		return ErrServerClosed
	}
	s.listener, s.accepting = l, done
	s.mu.Unlock()
	defer close(done)
	for {
		conn, err := l.AcceptUnix()
		if s.ctx.Err() != nil {
			if err == nil {
				conn.Close()
			}
			return ErrServerClosed
		}
		if err != nil { // out of descriptors, likely: it passes
			s.cfg.Log.Error().Err(err).Msg("accepting a shared-memory connection")
			select {
			case <-time.After(100 * time.Millisecond):
			case <-s.ctx.Done():
			}
			continue
		}
		s.accept(conn)
	}
}

func (s *Server) accept(conn *net.UnixConn) {
	peer, err := peerOf(conn)
	if err != nil {
		s.cfg.Log.Error().Err(err).Msg("a shared-memory client's credentials")
		conn.Close()
		return
	}
	n := newSession(s, conn, peer)
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		conn.Close()
		return
	}
	if err = s.take(peer.UID, oneConnection); err != nil {
		s.refused++
	} else {
		s.nextID++
		n.begin(s.nextID)
		s.sessions[n] = struct{}{}
	}
	s.mu.Unlock()
	if err != nil {
		s.cfg.Log.Debug().Err(err).Int32("pid", peer.PID).Msg("shared-memory connection refused")
		s.refuse(conn, err)
		return
	}
	go n.run()
}

// Close ends the sessions and waits for the requests under way; those that wait
// for room are canceled and stay without a completion, to be submitted again to
// the next daemon. It waits for no client.
func (s *Server) Close() {
	s.mu.Lock()
	s.closed = true
	l, accepting := s.listener, s.accepting
	all := make([]*session, 0, len(s.sessions))
	for n := range s.sessions {
		all = append(all, n)
	}
	s.mu.Unlock()
	s.cancel()
	if l != nil {
		l.Close()
		<-accepting
	}
	for _, n := range all {
		n.fail(ErrServerClosed)
	}
	for _, n := range all {
		<-n.done
	}
	s.refusals.Wait()
}

// opened counts a session to a volume.
func (s *Server) opened(name string) *volume {
	s.mu.Lock()
	defer s.mu.Unlock()
	v := s.volumes[name]
	if v == nil {
		v = &volume{name: name}
		s.volumes[name] = v
	}
	v.sessions++
	v.connections++
	return v
}

// writers returns the other sessions that have the volume open to write.
func (s *Server) writers(but *session, name string) []*session {
	s.mu.Lock()
	defer s.mu.Unlock()
	var all []*session
	for n := range s.sessions {
		if n != but && n.writes(name) {
			all = append(all, n)
		}
	}
	return all
}

// ended forgets a session and says why it ended.
func (s *Server) ended(n *session, err error) {
	blamed := blame(err)
	quiet := false
	now := time.Now()
	s.mu.Lock()
	delete(s.sessions, n)
	s.give(n.peer.UID, oneConnection)
	if v := n.vol; v != nil {
		v.sessions--
		if blamed {
			text := err.Error()
			quiet = text == v.reason && now.Sub(v.loggedTime) < quietTime
			v.disconnects++
			v.reason, v.reasonTime = text, now
			if !quiet {
				v.loggedTime = now
			}
		}
	}
	s.mu.Unlock()
	switch {
	case !blamed:
		n.log.Debug().AnErr("reason", err).Msg("shared-memory connection ended")
	case quiet:
		n.log.Debug().Err(err).Msg("shared-memory client disconnected again")
	default:
		n.log.Warn().Err(err).Msg("shared-memory client disconnected")
	}
}

// Remove disconnects the users of a volume that is to be no more, waits until
// none of them touches it, and forgets its counters.
func (s *Server) Remove(name string) {
	var users []*session
	s.mu.Lock()
	for n := range s.sessions {
		if v := n.opened.Load(); v != nil && v.name == name {
			users = append(users, n)
		}
	}
	delete(s.volumes, name)
	s.mu.Unlock()
	for _, n := range users {
		n.fail(errRemoved)
	}
	for _, n := range users {
		<-n.done
	}
}

// errRemoved ends the sessions of a volume that is removed.
var errRemoved = errors.New("the volume is removed")

// Stats is a snapshot of one volume's counters.
type Stats struct {
	Name     string // POOL/VOLUME
	Sessions int    // open connections

	worker.Stats

	Connections uint64 // that opened the volume
	Disconnects uint64 // sessions ended for a fault of the client or the device

	// LastDisconnect is the reason of the last such end, with its time; empty if
	// there was none.
	LastDisconnect     string
	LastDisconnectTime time.Time
}

// Stats returns the counters of the volumes that were opened.
func (s *Server) Stats() []Stats {
	s.mu.Lock()
	defer s.mu.Unlock()
	all := make([]Stats, 0, len(s.volumes))
	for _, v := range s.volumes {
		all = append(all, v.stats())
	}
	return all
}

// VolumeStats returns the counters of one volume, and whether it was opened.
func (s *Server) VolumeStats(name string) (Stats, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	v := s.volumes[name]
	if v == nil {
		return Stats{}, false
	}
	return v.stats(), true
}

func (v *volume) stats() Stats {
	return Stats{
		Name: v.name, Sessions: v.sessions, Stats: v.Snapshot(), Connections: v.connections, Disconnects: v.disconnects,
		LastDisconnect: v.reason, LastDisconnectTime: v.reasonTime,
	}
}

// Totals are the numbers of the whole server.
type Totals struct {
	Connections int    // open
	Refused     uint64 // over a limit
	MemoryBytes int64  // that rings take
}

// Totals returns the numbers of the whole server.
func (s *Server) Totals() Totals {
	s.mu.Lock()
	defer s.mu.Unlock()
	return Totals{Connections: len(s.sessions), Refused: s.refused, MemoryBytes: s.used.memory}
}
