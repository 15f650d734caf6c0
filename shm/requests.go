package shm

import (
	"context"
	"fmt"
	"slices"
	"time"

	"scoria/driver/block"
	"scoria/shm/mem"
	"scoria/shm/ring"
	"scoria/shm/wire"
)

// operationTimeout bounds what a client asks the daemon to do with a volume.
const operationTimeout = time.Minute

// dispatch does what a message asks for.
func (s *session) dispatch(m *message) (a answer, err error) {
	switch m.Type {
	case wire.Hello:
		return s.hello(m)
	case wire.Ring:
		return s.addRing(m)
	case wire.CloseRing:
		return a, s.closeRing(m)
	case wire.Snapshot:
		return a, s.snapshot(m)
	case wire.Open, wire.Stat, wire.Create, wire.Resize, wire.List:
	default:
		return a, refusef(wire.Unsupported, "%v: no such request", m.Type)
	}
	n, err := wire.DecodeNamed(m.Type, m.body)
	if err != nil {
		return a, err
	}
	if m.Type == wire.List {
		a.body, err = s.list(n.Name)
		return a, err
	}
	if n.Name, err = s.srv.cfg.FullName(n.Name); err != nil {
		return a, refusef(wire.Invalid, "%w", err)
	}
	action := ActionUse
	if m.Type == wire.Create {
		action = ActionCreate
	}
	if err := s.srv.cfg.Allow(s.peer, action, n.Name); err != nil {
		return a, err
	}
	if m.Type == wire.Open {
		a.body, err = s.open(n.Name, n.Value&wire.OpenReadOnly != 0)
		return a, err
	}
	ctx, cancel := context.WithTimeout(s.srv.ctx, operationTimeout)
	defer cancel()
	switch m.Type {
	case wire.Create:
		return a, s.srv.cfg.Opener.Create(ctx, n.Name, n.Value)
	case wire.Resize:
		return a, s.srv.cfg.Opener.Resize(ctx, n.Name, n.Value)
	}
	dev, err := s.srv.cfg.Opener.Open(ctx, n.Name) // stat
	if err != nil {
		return a, err
	}
	a.body = s.describe(dev.Info(), false).Append(nil)
	return a, nil
}

func (s *session) hello(m *message) (a answer, err error) {
	if s.greeted {
		return a, fmt.Errorf("a second one: %w", errProtocol)
	}
	version, err := wire.DecodeHelloRequest(m.body)
	if err != nil {
		return a, err
	}
	s.greeted = true
	_ = s.conn.SetReadDeadline(time.Time{})
	if reason := s.failure(); reason != nil { // fail's deadline may have come before
		return a, reason
	}
	a.body = wire.HelloAnswer{
		Version: version, MaxRings: uint32(s.srv.cfg.MaxRings), MaxEntries: ring.MaxEntries, MaxSegments: ring.MaxSegments,
		MaxArena: MaxArenaBytes, MaxRequest: block.MaxRequestBytes,
	}.Append(nil)
	return a, nil
}

// open makes the session one to a volume, and its writer unless it is read-only.
func (s *session) open(name string, readOnly bool) ([]byte, error) {
	if s.dev != nil {
		return nil, refusef(wire.Invalid, "volume %s is open already: a connection is to one volume", s.vol.name)
	}
	ctx, cancel := context.WithTimeout(s.srv.ctx, operationTimeout)
	defer cancel()
	dev, err := s.srv.cfg.Opener.Open(ctx, name)
	if err != nil {
		return nil, err
	}
	info := dev.Info()
	readOnly = readOnly || info.ReadOnly
	if !readOnly {
		if err := s.claim(dev, name); err != nil {
			return nil, err
		}
	}
	s.dev, s.readOnly = dev, readOnly
	s.vol = s.srv.opened(name)
	s.opened.Store(s.vol)
	s.noticed = make(chan struct{})
	s.unwatch = dev.Watch(func(block.Info) {
		select {
		case s.changed <- struct{}{}:
		default: // one is pending
		}
	})
	go s.notify()
	s.log = s.log.With().Str("volume", name).Logger()
	s.log.Debug().Bool("read_only", readOnly).Msg("volume opened over shared memory")
	return s.describe(info, readOnly).Append(nil), nil
}

func (s *session) describe(info block.Info, readOnly bool) wire.Volume {
	v := wire.Volume{
		Size: info.Size, MaxDiscard: info.MaxDiscard, LogicalBlock: info.LogicalBlock, PhysicalBlock: info.PhysicalBlock,
		DiscardAlignment: info.DiscardAlignment, Serial: info.Serial, Name: info.Name,
	}
	if readOnly || info.ReadOnly {
		v.Flags = wire.VolumeReadOnly
	}
	return v
}

func (s *session) list(after string) ([]byte, error) {
	ctx, cancel := context.WithTimeout(s.srv.ctx, operationTimeout)
	defer cancel()
	names, err := s.srv.cfg.Opener.Names(ctx)
	if err != nil {
		return nil, err
	}
	slices.Sort(names)
	i, found := slices.BinarySearch(names, after)
	if found {
		i++
	}
	names = slices.DeleteFunc(names[i:], func(name string) bool { return s.srv.cfg.Allow(s.peer, ActionUse, name) != nil })
	return wire.AppendNames(nil, names), nil
}

func (s *session) snapshot(m *message) error {
	r, err := wire.DecodeSnapshotRequest(m.body)
	if err != nil {
		return err
	}
	if r.Volume, err = s.srv.cfg.FullName(r.Volume); err != nil {
		return refusef(wire.Invalid, "%w", err)
	}
	if err := s.srv.cfg.Allow(s.peer, ActionUse, r.Volume); err != nil {
		return err
	}
	if s.srv.cfg.Snapshot == nil {
		return refusef(wire.Unsupported, "this server makes no snapshots")
	}
	ctx, cancel := context.WithTimeout(s.srv.ctx, operationTimeout)
	defer cancel()
	return s.srv.cfg.Snapshot(ctx, r.Volume, r.Snapshot)
}

// addRing makes a ring, in memory of its own or in that of an earlier one, and
// begins to serve it.
func (s *session) addRing(m *message) (a answer, err error) {
	r, err := wire.DecodeRingRequest(m.body)
	if err != nil {
		return a, err
	}
	reuse := r.Flags&wire.RingReuse != 0
	if reuse && len(m.fds) != 1 || !reuse && len(m.fds) != 0 {
		return a, fmt.Errorf("%d descriptors; memory to use again comes as one, else none: %w", len(m.fds), errProtocol)
	}
	if s.dev == nil {
		return a, refusef(wire.Invalid, "no volume is open: open one first")
	}
	l := ring.Layout{Entries: int(r.Entries), ArenaBytes: r.ArenaBytes}
	if err := l.Check(); err != nil || r.ArenaBytes > MaxArenaBytes {
		return a, refusef(wire.Invalid, "ring of %d entries and %d bytes: entries must be a power of two up to %d, bytes a multiple of 4096 up to %d",
			r.Entries, r.ArenaBytes, ring.MaxEntries, MaxArenaBytes)
	}
	if len(s.rings) >= s.srv.cfg.MaxRings {
		return a, refusef(wire.Limit, "the connection has %d rings already", len(s.rings))
	}
	fd := -1
	if reuse {
		fd = m.fds[0]
	}
	q, memfd, err := s.newQueue(l, fd)
	if err != nil {
		return a, err
	}
	s.nextRing++
	s.rings[uint64(q.number)] = q
	a.body = wire.RingAnswer{Ring: q.number, MemoryBytes: l.TotalBytes()}.Append(nil)
	a.fds = []int{q.kick, q.call}
	if !reuse {
		m.fds = append(m.fds, memfd) // closed when the answer is sent
		a.fds = []int{memfd, q.kick, q.call}
	}
	return a, nil
}

// newQueue makes and starts a ring in the memory of fd, or in new memory, whose
// descriptor it returns, if fd is -1.
func (s *session) newQueue(l ring.Layout, fd int) (_ *queue, _ int, err error) {
	q := &queue{
		s: s, number: uint32(s.nextRing), kick: -1, call: -1, readOnly: s.readOnly, maxDiscard: s.dev.Info().MaxDiscard,
		charged: usage{descriptors: ringDescriptors, memory: int64(l.TotalBytes()) + int64(l.Entries)*slotBytes},
	}
	if err := s.srv.takeRing(s.peer.UID, q.charged); err != nil {
		return nil, -1, refusef(wire.Limit, "%w", err)
	}
	q.answers = make([]ring.Completion, l.Entries)
	memfd := -1
	defer func() {
		if err != nil {
			mem.CloseFD(&memfd)
			mem.CloseFD(&q.kick)
			mem.CloseFD(&q.call)
			if q.memory != nil {
				q.memory.Release()
			}
			s.srv.giveRing(s.peer.UID, q.charged)
		}
	}()
	if fd < 0 {
		if memfd, err = newMemory(l); err != nil {
			return nil, -1, err
		}
		fd = memfd
	} else if !mem.SizeSealed(fd) {
		return nil, -1, refusef(wire.Invalid, "memory to use again is not sealed against shrinking")
	}
	if q.memory, err = mem.Map(fd, 0, l.TotalBytes()); err != nil {
		return nil, -1, refusef(wire.Invalid, "memory of the ring: %w", err)
	}
	if q.ring, err = ring.NewServer(q.memory.Bytes(), l); err != nil {
		return nil, -1, err
	}
	if q.kick, err = mem.NewEventFD(); err != nil {
		return nil, -1, err
	}
	if q.call, err = mem.NewEventFD(); err != nil {
		return nil, -1, err
	}
	return q, memfd, s.startQueue(q, l)
}

// newMemory makes the memory of a ring.
func newMemory(l ring.Layout) (int, error) {
	fd, err := mem.CreateMemfd("scoria-shm", int64(l.TotalBytes()))
	if err != nil {
		return -1, err
	}
	m, err := mem.Map(fd, 0, ring.HeaderBytes)
	if err == nil {
		l.PutHeader(m.Bytes())
		m.Release()
		err = mem.SealSize(fd)
	}
	if err != nil {
		mem.CloseFD(&fd)
		return -1, err
	}
	return fd, nil
}

func (s *session) startQueue(q *queue, l ring.Layout) error {
	q.Queue = s.srv.cfg.Set.NewQueue(q, s.dev, q, &s.vol.Counters, l.Entries)
	var err error
	started := q.Do(func() { err = q.Start(q.kick, q.call) })
	if err == nil && !started {
		err = ErrServerClosed
	}
	if err != nil {
		q.Queue.Release()
		return err
	}
	s.vol.Rings.Add(1)
	return nil
}

// closeRing waits for the ring's requests and gives back what it has.
func (s *session) closeRing(m *message) error {
	number, err := wire.DecodeCloseRing(m.body)
	if err != nil {
		return err
	}
	q := s.rings[number]
	if q == nil {
		return refusef(wire.Invalid, "no ring %d", number)
	}
	q.Stop()
	if err := s.await(q.Drained()); err != nil {
		return err
	}
	delete(s.rings, number)
	s.drain(q)
	return nil
}
