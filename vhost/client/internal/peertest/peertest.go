// Package peertest is a vhost-user-blk server with nothing behind it, for tests
// of the client: it speaks just enough of the protocol, ends every request with
// success at once, and can be told to misbehave. What it costs per request is
// close to nothing, so the speed that is measured against it is the client's.
package peertest

import (
	"encoding/binary"
	"net"
	"path/filepath"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"

	"scoria/shm/mem"
	"scoria/vhost/wire"
)

// Server listens on Socket until the test ends. Its fields are set by the
// functions given to Start; Features may change at any time.
type Server struct {
	Socket   string
	Features atomic.Uint64
	Protocol uint64
	Capacity uint64 // sectors
	// CPU is where the rings are polled, negative for any.
	CPU int
	// Answer, if it returns true, has answered a message instead of the server.
	Answer func(conn *net.UnixConn, r wire.Request, payload []byte, fds []int) bool
	// Used, if set, changes what is put into the used ring.
	Used func(head uint32) uint32

	t     testing.TB
	ln    *net.UnixListener
	wg    sync.WaitGroup
	mu    sync.Mutex
	conns []*net.UnixConn
	// Backend is the channel of the last session that gave one.
	backend atomic.Pointer[net.UnixConn]
}

// DefaultFeatures are VERSION_1, EVENT_IDX, INDIRECT_DESC and the protocol features.
const DefaultFeatures = 1<<32 | 1<<30 | 1<<29 | 1<<28

// DefaultProtocol is what the server understands.
const DefaultProtocol = wire.ProtocolConfig | wire.ProtocolReplyAck | wire.ProtocolMQ | wire.ProtocolBackendReq

// Start makes a server with the default features and 1 GiB, changed by setup.
func Start(t testing.TB, setup ...func(*Server)) *Server {
	t.Helper()
	s := &Server{
		Socket: filepath.Join(t.TempDir(), "s"), Protocol: DefaultProtocol,
		Capacity: 1 << 21, CPU: -1, t: t,
	}
	s.Features.Store(DefaultFeatures)
	for _, f := range setup {
		f(s)
	}
	var err error
	if s.ln, err = net.ListenUnix("unix", &net.UnixAddr{Name: s.Socket, Net: "unix"}); err != nil {
		t.Fatal(err)
	}
	s.wg.Go(s.accept)
	t.Cleanup(s.close)
	return s
}

func (s *Server) close() {
	s.ln.Close()
	s.Drop()
	s.wg.Wait()
}

// Drop ends all connections.
func (s *Server) Drop() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, c := range s.conns {
		c.Close()
	}
	s.conns = nil
}

func (s *Server) accept() {
	for {
		conn, err := s.ln.AcceptUnix()
		if err != nil {
			return
		}
		s.mu.Lock()
		s.conns = append(s.conns, conn)
		s.mu.Unlock()
		s.wg.Go(func() {
			p := &session{s: s, conn: conn}
			p.serve()
			p.end()
		})
	}
}

// ConfigChange sends a config-change message and returns the front end's answer.
func (s *Server) ConfigChange() (uint64, error) {
	conn := s.backend.Load()
	if err := mem.WriteFull(conn, wire.AppendMessage(nil, wire.BackendConfigChange, wire.FlagNeedReply, nil)); err != nil {
		return 0, err
	}
	b := make([]byte, wire.HeaderSize+8)
	if _, err := mem.ReadFull(conn, b, 0); err != nil {
		return 0, err
	}
	return binary.LittleEndian.Uint64(b[wire.HeaderSize:]), nil
}

// session is one connection.
type session struct {
	s      *Server
	conn   *net.UnixConn
	memory *mem.Mapping
	region wire.Region
	rings  []*ring
	wg     sync.WaitGroup
}

func (p *session) end() {
	for _, r := range p.rings {
		r.stop.Store(true)
	}
	p.wg.Wait()
	for _, r := range p.rings {
		mem.CloseAll([]int{r.call})
	}
	if p.memory != nil {
		p.memory.Release()
	}
	p.conn.Close()
}

func (p *session) serve() {
	for {
		head := make([]byte, wire.HeaderSize)
		fds, err := mem.ReadFull(p.conn, head, wire.MaxFDs)
		if err != nil {
			return
		}
		h, err := wire.ParseHeader(head)
		payload := make([]byte, h.Size)
		if err == nil && h.Size > 0 {
			_, err = mem.ReadFull(p.conn, payload, 0)
		}
		if err != nil {
			mem.CloseAll(fds)
			return
		}
		if p.s.Answer != nil && p.s.Answer(p.conn, h.Request, payload, fds) {
			mem.CloseAll(fds)
			continue
		}
		answer, ok := p.handle(h.Request, payload, fds)
		if !ok {
			return
		}
		if answer == nil && h.NeedReply() {
			answer = wire.AppendU64(nil, 0)
		}
		if answer != nil {
			if err := Reply(p.conn, h.Request, answer); err != nil {
				return
			}
		}
	}
}

// Reply sends a reply to r.
func Reply(conn *net.UnixConn, r wire.Request, payload []byte, fds ...int) error {
	return mem.WriteFull(conn, wire.AppendMessage(nil, r, wire.FlagReply, payload), fds...)
}

// handle carries a message out. It takes the descriptors.
func (p *session) handle(r wire.Request, payload []byte, fds []int) (answer []byte, ok bool) {
	keep := false
	defer func() {
		if !keep {
			mem.CloseAll(fds)
		}
	}()
	u64 := func(v uint64) ([]byte, bool) { return wire.AppendU64(nil, v), true }
	switch r {
	case wire.GetFeatures:
		return u64(p.s.Features.Load())
	case wire.GetProtocolFeatures:
		return u64(p.s.Protocol)
	case wire.GetQueueNum:
		return u64(4)
	case wire.GetConfig:
		c, err := wire.DecodeConfig(r, payload)
		if err != nil {
			return nil, false
		}
		full := make([]byte, wire.MaxConfigSize)
		binary.LittleEndian.PutUint64(full, p.s.Capacity)
		copy(c.Data, full[c.Offset:])
		return c.Append(nil), true
	case wire.SetMemTable:
		regions, err := wire.DecodeMemTable(payload, len(fds))
		if err != nil || len(regions) != 1 {
			return nil, false
		}
		p.region = regions[0]
		p.memory, err = mem.Map(fds[0], p.region.MmapOffset, p.region.Size)
		return nil, err == nil
	case wire.SetBackendReqFD:
		keep = true
		return nil, p.setBackend(fds)
	case wire.SetVringNum, wire.SetVringBase, wire.SetVringAddr, wire.SetVringEnable, wire.SetVringCall, wire.SetVringKick, wire.GetVringBase:
		keep = r == wire.SetVringCall
		return p.vring(r, payload, fds)
	}
	return nil, true
}

func (p *session) setBackend(fds []int) bool {
	if len(fds) != 1 {
		mem.CloseAll(fds)
		return false
	}
	conn, err := connOf(fds[0])
	if err != nil {
		return false
	}
	p.s.backend.Store(conn)
	p.s.t.Cleanup(func() { conn.Close() })
	return true
}

func (p *session) vring(r wire.Request, payload []byte, fds []int) ([]byte, bool) {
	index := int(payload[0])
	for len(p.rings) <= index {
		p.rings = append(p.rings, &ring{p: p, call: -1})
	}
	q := p.rings[index]
	switch r {
	case wire.SetVringNum:
		v, err := wire.DecodeVringState(r, payload)
		q.size = uint64(v.Num)
		return nil, err == nil
	case wire.SetVringBase:
		v, err := wire.DecodeVringState(r, payload)
		q.last = uint16(v.Num)
		return nil, err == nil
	case wire.SetVringAddr:
		a, err := wire.DecodeVringAddr(payload)
		if err != nil {
			return nil, false
		}
		q.desc, q.avail, q.used = a.Desc-p.region.UserAddr, a.Avail-p.region.UserAddr, a.Used-p.region.UserAddr
		return nil, true
	case wire.SetVringCall:
		q.call = fds[0]
		return nil, true
	case wire.SetVringEnable:
		q.stop.Store(false)
		q.done.Add(1)
		p.wg.Go(q.run)
		return nil, true
	case wire.GetVringBase:
		q.stop.Store(true)
		q.done.Wait()
		return wire.VringState{Index: uint32(index), Num: uint32(q.last)}.Append(nil), true
	}
	return nil, true
}

// run polls the ring.
func (q *ring) run() {
	defer q.done.Done()
	if q.p.s.CPU >= 0 {
		runtime.LockOSThread() // never unlocked: the thread ends here
		var set unix.CPUSet
		set.Set(q.p.s.CPU)
		if err := unix.SchedSetaffinity(0, &set); err != nil {
			q.p.s.t.Error(err)
		}
	}
	// Giving up the thread at each empty pass would be most of a request's latency.
	for idle := 1; !q.stop.Load(); idle++ {
		if q.pass() > 0 {
			idle = 0
		} else if idle%1024 == 0 {
			runtime.Gosched()
		}
	}
}
