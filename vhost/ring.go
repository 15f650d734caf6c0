package vhost

import (
	"fmt"

	"golang.org/x/sys/unix"

	"scoria/driver/block"
	"scoria/shm/mem"
	"scoria/vhost/virtq"
	"scoria/vhost/wire"
)

// ring is what the front end has said of one vring. It is the session's; the
// queue made from it, while the ring is started, is a worker's.
type ring struct {
	s     *session
	index int

	num     uint32
	base    uint32
	addr    wire.VringAddr
	hasAddr bool
	hasKick bool // SET_VRING_KICK came, with or without a descriptor
	enabled bool
	kick    int
	call    int
	err     int

	queue *queue // nil: stopped
}

// ringMemory is where a ring lies here.
type ringMemory struct{ desc, avail, used []byte }

// ring returns the ring of an index, made when it is first spoken of.
func (s *session) ring(index uint32) (*ring, error) {
	if index >= uint32(s.srv.cfg.MaxQueues) {
		return nil, fmt.Errorf("ring %d: there are %d: %w", index, s.srv.cfg.MaxQueues, errProtocol)
	}
	for uint32(len(s.rings)) <= index {
		s.rings = append(s.rings, &ring{s: s, index: len(s.rings), kick: -1, call: -1, err: -1})
	}
	return s.rings[index], nil
}

// stoppedRing returns a ring that may be configured.
func (s *session) stoppedRing(index uint32) (*ring, error) {
	r, err := s.ring(index)
	if err == nil && r.queue != nil {
		err = fmt.Errorf("ring %d is started: %w", index, errProtocol)
	}
	return r, err
}

func (s *session) setVringNum(m *message) error {
	v, err := wire.DecodeVringState(m.Request, m.body)
	if err != nil {
		return err
	}
	r, err := s.stoppedRing(v.Index)
	if err != nil {
		return err
	}
	if v.Num == 0 || v.Num > MaxQueueSize || v.Num&(v.Num-1) != 0 {
		return fmt.Errorf("ring %d: size %d: must be a power of two up to %d: %w", v.Index, v.Num, MaxQueueSize, errProtocol)
	}
	r.num = v.Num
	return nil
}

func (s *session) setVringBase(m *message) error {
	v, err := wire.DecodeVringState(m.Request, m.body)
	if err != nil {
		return err
	}
	r, err := s.stoppedRing(v.Index)
	if err != nil {
		return err
	}
	if v.Num > 0xffff {
		return fmt.Errorf("ring %d: base %d: must be at most 65535: %w", v.Index, v.Num, errProtocol)
	}
	r.base = v.Num
	return nil
}

// setVringAddr also switches the logging of a started ring, and may move it.
func (s *session) setVringAddr(m *message) error {
	v, err := wire.DecodeVringAddr(m.body)
	if err != nil {
		return err
	}
	r, err := s.ring(v.Index)
	if err != nil {
		return err
	}
	if v.Desc%16 != 0 || v.Avail%2 != 0 || v.Used%4 != 0 {
		return fmt.Errorf("ring %d: addresses %#x, %#x, %#x: must be multiples of 16 (descriptors), 2 (available), 4 (used): %w",
			v.Index, v.Desc, v.Avail, v.Used, errProtocol)
	}
	r.addr, r.hasAddr = v, true
	if r.queue == nil {
		return s.startReady()
	}
	if err := r.rebind(); err != nil {
		return err
	}
	return s.applyLog()
}

func (s *session) setVringFD(m *message) error {
	v, err := wire.DecodeVringFD(m.Request, m.body, len(m.fds))
	if err != nil {
		return err
	}
	r, err := s.ring(uint32(v.Index))
	if err != nil {
		return err
	}
	fd := -1
	if !v.NoFD {
		if err := mem.CheckEventFD(m.fds[0]); err != nil {
			return fmt.Errorf("ring %d: %w", v.Index, err)
		}
		fd = m.take(0)
	}
	switch m.Request {
	case wire.SetVringKick:
		return r.setKick(fd)
	case wire.SetVringCall:
		return r.setCall(fd)
	}
	mem.CloseFD(&r.err)
	r.err = fd
	return nil
}

// setKick also starts the ring: what the specification makes the first kick do.
// Waiting for that could lose one that came before, and after a reconnect none
// may come.
func (r *ring) setKick(fd int) error {
	old := r.kick
	r.kick, r.hasKick = fd, true
	var err error
	if q := r.queue; q != nil {
		q.Do(func() { err = q.SetKick(fd) })
	}
	mem.CloseFD(&old)
	if err != nil {
		return err
	}
	return r.s.startReady()
}

// setCall replaces the call descriptor. The new one is signalled at once: the
// driver may wait for an answer that was signalled on the old one, unseen.
func (r *ring) setCall(fd int) error {
	if fd >= 0 {
		if flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFL, 0); err != nil || flags&unix.O_NONBLOCK == 0 {
			if err = unix.SetNonblock(fd, true); err != nil {
				unix.Close(fd)
				return err
			}
		}
	}
	old := r.call
	r.call = fd
	if q := r.queue; q != nil {
		q.Do(func() { q.SetCall(fd) })
		if fd >= 0 {
			_ = mem.SignalEventFD(fd)
		}
	}
	mem.CloseFD(&old)
	return nil
}

func (s *session) setVringEnable(m *message) error {
	v, err := wire.DecodeVringState(m.Request, m.body)
	if err != nil {
		return err
	}
	r, err := s.ring(v.Index)
	if err != nil {
		return err
	}
	if v.Num > 1 {
		return fmt.Errorf("ring %d: enable %d: must be 0 or 1: %w", v.Index, v.Num, errProtocol)
	}
	r.enabled = v.Num == 1
	if q := r.queue; q != nil {
		on := r.enabled
		q.Do(func() { q.Enable(on) })
		return nil
	}
	return s.startReady()
}

// getVringBase stops the ring: it waits for the requests in flight, so that
// nothing of the ring is written after the reply.
func (s *session) getVringBase(m *message) ([]byte, error) {
	v, err := wire.DecodeVringState(m.Request, m.body)
	if err != nil {
		return nil, err
	}
	r, err := s.ring(v.Index)
	if err != nil {
		return nil, err
	}
	if err := r.stop(); err != nil {
		return nil, err
	}
	return wire.VringState{Index: v.Index, Num: r.base}.Append(nil), nil
}

// startReady starts the rings for which everything is there.
func (s *session) startReady() error {
	for _, r := range s.rings {
		// Without the feature there is no message to enable a ring.
		enabled := r.enabled || s.features&wire.FeatureProtocolFeatures == 0
		if r.queue != nil || !enabled || !r.hasKick || !r.hasAddr || r.num == 0 || s.table == nil {
			continue
		}
		if err := r.start(); err != nil {
			return fmt.Errorf("ring %d: %w", r.index, err)
		}
	}
	return nil
}

// locate finds the ring's parts in t.
func (r *ring) locate(t *mem.Table) (*ringMemory, error) {
	num := int(r.num)
	m := &ringMemory{
		desc:  t.UserSlice(r.addr.Desc, uint64(virtq.DescTableBytes(num))),
		avail: t.UserSlice(r.addr.Avail, uint64(virtq.AvailBytes(num))),
		used:  t.UserSlice(r.addr.Used, uint64(virtq.UsedBytes(num))),
	}
	for _, p := range []struct {
		name string
		addr uint64
		b    []byte
	}{{"descriptor table", r.addr.Desc, m.desc}, {"available ring", r.addr.Avail, m.avail}, {"used ring", r.addr.Used, m.used}} {
		if p.b == nil {
			return nil, fmt.Errorf("ring %d: %s at user address %#x: %w", r.index, p.name, p.addr, errAddress)
		}
	}
	return m, nil
}

func (r *ring) start() error {
	s := r.s
	m, err := r.locate(s.table)
	if err != nil {
		return err
	}
	region, regionNum, err := s.inflight.region(r.index, int(r.num))
	if err != nil {
		return err
	}
	if err := s.claim(); err != nil {
		return err
	}
	q := newQueue(s, r.index, int(r.num))
	log := s.activeLog()
	started, resubmitted := false, 0
	q.Do(func() {
		q.vq, err = virtq.New(virtq.Config{
			Num: int(r.num), Desc: m.desc, Avail: m.avail, Used: m.used, Features: s.features,
			Base: uint16(r.base), Inflight: region, InflightNum: regionNum,
		})
		if err != nil {
			return
		}
		resubmitted = q.vq.InUse()
		q.gen = &generation{table: s.table}
		s.table.Retain()
		q.setLog(log, r.addr.Log, r.addr.Flags&wire.VringFlagLog != 0)
		if err = q.Start(r.kick, r.call); err != nil {
			s.table.Release()
			return
		}
		started = true
	})
	if !started {
		q.Release()
		if err == nil { // a fault on the ring: the session has failed with it
			err = s.failure()
		}
		return err
	}
	r.queue = q
	s.ready.Store(true)
	if r.call >= 0 {
		// A former daemon may have died, or the front end may have let go of the
		// old descriptor, between an answer and its signal.
		_ = mem.SignalEventFD(r.call)
	}
	s.ep.counters.Rings.Add(1)
	s.ep.counters.resubmitted.Add(uint64(resubmitted))
	s.notice.ringStarted(s)
	s.log.Debug().Int("ring", r.index).Uint32("size", r.num).Int("resubmitted", resubmitted).Msg("ring started")
	return nil
}

// rebind moves a started ring to where its addresses are now in the table.
func (r *ring) rebind() error {
	m, err := r.locate(r.s.table)
	if err != nil {
		return err
	}
	q := r.queue
	r.s.table.Retain()
	q.Do(func() {
		if err = q.setTable(r.s.table, m); err != nil {
			r.s.table.Release()
		}
	})
	return err
}

// stop ends a started ring and waits for its requests.
func (r *ring) stop() error {
	if r.queue == nil {
		return nil
	}
	r.beginStop()
	// QEMU, and with it the guest, stands still until the requests have ended.
	block.Hasten(r.s.dev, r.s)
	if err := r.s.await(r.queue.Drained()); err != nil {
		return err
	}
	r.endStop()
	for _, other := range r.s.rings {
		if other.queue != nil {
			return nil
		}
	}
	r.s.unclaim()
	return nil
}

// beginStop takes nothing more from the ring; the queue's drained is closed
// when what it took has ended.
func (r *ring) beginStop() {
	if r.queue != nil {
		r.queue.Stop()
	}
}

// endStop gives back what the drained queue had. The ring starts again with the
// next SET_VRING_KICK.
func (r *ring) endStop() {
	q := r.queue
	r.queue, r.hasKick = nil, false
	r.base = uint32(q.vq.Base())
	if !r.s.leak.Load() {
		q.gen.table.Release()
	}
	q.Release()
	if r.kick >= 0 {
		// Kicks that were never read would look like new ones to the front end,
		// once it listens itself.
		_, _ = mem.DrainEventFD(r.kick)
	}
	mem.CloseFD(&r.kick)
	r.s.ep.counters.Rings.Add(-1)
	r.s.notice.ringStopped()
	if q.Broken() && r.err >= 0 {
		_ = unix.SetNonblock(r.err, true)
		_ = mem.SignalEventFD(r.err)
	}
}

func (r *ring) close() {
	mem.CloseFD(&r.kick)
	mem.CloseFD(&r.call)
	mem.CloseFD(&r.err)
}

func (s *session) stopAll() error {
	for _, r := range s.rings {
		if err := r.stop(); err != nil {
			return err
		}
	}
	return nil
}

// reset stops all rings and forgets what was configured of them.
func (s *session) reset() error {
	if err := s.stopAll(); err != nil {
		return err
	}
	for _, r := range s.rings {
		r.close()
	}
	s.rings, s.status, s.wce = nil, 0, true
	s.inflight.storeWriteCache(true)
	s.updateView(s.dev.Info())
	return nil
}
