package nbd

import (
	"cmp"
	"slices"
	"sync/atomic"
	"time"
)

// counters are the server's statistics.
type counters struct {
	accepted, refused, violations, created atomic.Uint64
	ops                                    [cmdCount]struct{ count, bytes, errors atomic.Uint64 }
}

// OpStats counts one kind of command since the server was made. Bytes are those
// that the commands named, not those that crossed the socket.
type OpStats struct {
	Count  uint64 `json:"count"`
	Bytes  uint64 `json:"bytes"`
	Errors uint64 `json:"errors"`
}

// Stats is a snapshot of the server's counters.
type Stats struct {
	Connections int                `json:"connections"` // open now
	Accepted    uint64             `json:"accepted"`
	Refused     uint64             `json:"refused"`    // over a limit
	Violations  uint64             `json:"violations"` // disconnected for breaking the protocol
	Created     uint64             `json:"created"`    // volumes
	Ops         map[string]OpStats `json:"ops"`        // by command: read, write, flush, …
}

// ConnStats describes an open connection.
type ConnStats struct {
	ID          uint64    `json:"id"`
	PID         int       `json:"pid"` // 0 if unknown
	UID         int       `json:"uid"`
	Export      string    `json:"export"` // empty during the handshake
	Writer      bool      `json:"writer"` // holds the claim
	Since       time.Time `json:"since"`
	Outstanding int       `json:"outstanding"` // operations under way
}

var cmdNames = [cmdCount]string{
	cmdRead: "read", cmdWrite: "write", cmdFlush: "flush", cmdTrim: "trim",
	cmdWriteZeroes: "write_zeroes", cmdBlockStatus: "block_status",
}

// Stats returns the counters. Safe from any goroutine.
func (s *Server) Stats() Stats {
	s.mu.Lock()
	n := len(s.conns)
	s.mu.Unlock()
	st := Stats{
		Connections: n,
		Accepted:    s.stats.accepted.Load(),
		Refused:     s.stats.refused.Load(),
		Violations:  s.stats.violations.Load(),
		Created:     s.stats.created.Load(),
		Ops:         make(map[string]OpStats),
	}
	for i := range s.stats.ops {
		if name := cmdNames[i]; name != "" {
			o := &s.stats.ops[i]
			st.Ops[name] = OpStats{Count: o.count.Load(), Bytes: o.bytes.Load(), Errors: o.errors.Load()}
		}
	}
	return st
}

// Conns lists the open connections by ID. Safe from any goroutine.
func (s *Server) Conns() []ConnStats {
	s.mu.Lock()
	defer s.mu.Unlock()
	list := make([]ConnStats, 0, len(s.conns))
	for c := range s.conns {
		list = append(list, ConnStats{
			ID: c.id, PID: c.peer.pid, UID: c.peer.uid, Export: c.exportName(), Writer: c.writer.Load(),
			Since: c.since, Outstanding: int(c.outstanding.Load()),
		})
	}
	slices.SortFunc(list, func(a, b ConnStats) int { return cmp.Compare(a.ID, b.ID) })
	return list
}
