package ring

import (
	"errors"
	"fmt"
	"sync/atomic"
)

// ErrOverrun: the client has more requests under way than the ring has entries.
var ErrOverrun = errors.New("more requests under way than the ring has entries")

// Server is the server's side of a ring. It belongs to one goroutine at a time.
type Server struct {
	view
	mask    uint32
	entries int
	arena   []byte

	taken    uint32 // entries
	seen     uint32 // entries known to be valid, from taken on
	written  uint32 // completions, published or not
	shown    uint32 // completions published
	inFlight int    // taken and without a completion that is published
	first    Completion
	kicks    bool // the client was told that kicks are wanted
	fresh    bool // published since NeedSignal was last asked
	segments [MaxSegments]Segment
}

// NewServer makes the server's side over memory of l.TotalBytes that a client
// has not been given, or has set to zeroes where the rings are. It fails with
// ErrMemory.
func NewServer(mem []byte, l Layout) (*Server, error) {
	if err := l.Check(); err != nil {
		return nil, err
	}
	v, err := newView(mem, l)
	if err != nil {
		return nil, err
	}
	at := l.ArenaOffset()
	return &Server{
		view: v, mask: uint32(l.Entries - 1), entries: l.Entries,
		arena: mem[at : at+l.ArenaBytes : at+l.ArenaBytes],
	}, nil
}

// Ready returns how many entries can be taken, as far as it looked: some, if
// there are any. It fails with ErrOverrun.
func (s *Server) Ready() (int, error) {
	const look = 16 // bounds the entries touched before any is taken
	for s.seen-s.taken < look && s.submitSequence(s.seen&s.mask) == s.seen+1 {
		s.seen++
		if s.inFlight+int(s.seen-s.taken) > s.entries {
			return 0, fmt.Errorf("%d entries: %w", s.entries, ErrOverrun)
		}
	}
	return int(s.seen - s.taken), nil
}

// Pop copies the next entry of those that Ready counted.
func (s *Server) Pop(r *Request) {
	s.loadSubmit(s.taken&s.mask, r)
	s.taken++
	s.inFlight++
}

// AppendData appends the pieces of the arena that r's data lies in to dst. It
// reports whether they lie there, and their lengths add up. It allocates only
// to grow dst.
func (s *Server) AppendData(dst [][]byte, r *Request) ([][]byte, bool) {
	if r.Segments == 0 {
		if r.Length == 0 {
			return dst, true
		}
		p := s.slice(r.Addr, r.Length)
		return append(dst, p), p != nil
	}
	n := int(r.Segments)
	list := s.slice(r.Addr, uint64(n)*SegmentBytes)
	if n > MaxSegments || list == nil || r.Addr%8 != 0 {
		return dst, false
	}
	for i := range n {
		var ok bool
		if s.segments[i], ok = loadSegment(list[i*SegmentBytes:]); !ok {
			return dst, false
		}
	}
	total := uint64(0)
	for _, seg := range s.segments[:n] {
		p := s.slice(seg.Addr, uint64(seg.Length))
		if p == nil {
			return dst, false
		}
		dst = append(dst, p)
		total += uint64(seg.Length)
	}
	return dst, total == r.Length
}

// slice returns n bytes of the arena, or nil unless they lie in it. An empty
// range is nil.
func (s *Server) slice(addr, n uint64) []byte {
	size := uint64(len(s.arena))
	if n == 0 || addr > size || n > size-addr {
		return nil
	}
	return s.arena[addr : addr+n : addr+n]
}

// Push writes a completion, which the client sees after the next Publish.
func (s *Server) Push(c Completion) {
	if s.written == s.shown {
		s.first = c
	} else {
		s.setCompletion(s.written&s.mask, c, s.written+1)
	}
	s.written++
}

// Publish makes what was pushed visible to the client.
func (s *Server) Publish() {
	if s.written == s.shown {
		return
	}
	// What was pushed leaves the server's count first: the client may submit
	// again as soon as it sees it.
	s.inFlight -= int(s.written - s.shown)
	s.publishCompletion(s.shown&s.mask, s.first, s.shown+1)
	s.shown, s.fresh = s.written, true
}

// NeedSignal reports whether the client waits for a call, and takes the wish
// back. It comes after Publish, which is its barrier. Where nothing was published
// since it was last asked it reports false and leaves the wish: the client would
// wake up to find nothing.
func (s *Server) NeedSignal() bool {
	if !s.fresh {
		return false
	}
	s.fresh = false
	return atomic.LoadUint32(s.callFlag) != 0 && atomic.SwapUint32(s.callFlag, 0) != 0
}

// EnableNotify asks the client for kicks. It reports whether entries came
// meanwhile, for which there may be none.
func (s *Server) EnableNotify() bool {
	s.kicks = true
	atomic.SwapUint32(s.kickFlag, 1)
	return s.seen != s.taken || s.submitSequence(s.seen&s.mask) == s.seen+1
}

// DisableNotify tells the client that no kicks are wanted.
func (s *Server) DisableNotify() {
	if s.kicks {
		s.kicks = false
		atomic.StoreUint32(s.kickFlag, 0)
	}
}

// InFlight returns how many entries are taken and without a published completion.
func (s *Server) InFlight() int { return s.inFlight }
