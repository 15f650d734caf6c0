package vhost

import (
	"encoding/binary"
	"fmt"

	"golang.org/x/sys/unix"

	"scoria/shm/mem"
	"scoria/vhost/virtq"
	"scoria/vhost/wire"
)

// mapRegion maps a region that came with a descriptor.
func (s *session) mapRegion(r wire.Region, fd int) (mem.Region, error) {
	m, err := s.ep.budget.Map(fd, r.MmapOffset, r.Size)
	if err != nil {
		return mem.Region{}, fmt.Errorf("region of %#x bytes at guest address %#x: %w", r.Size, r.GuestAddr, err)
	}
	return mem.Region{GuestAddr: r.GuestAddr, UserAddr: r.UserAddr, Data: m.Bytes(), Mapping: m}, nil
}

// setMemTable replaces all of guest memory.
func (s *session) setMemTable(m *message) error {
	wanted, err := wire.DecodeMemTable(m.body, len(m.fds))
	if err != nil {
		return err
	}
	var regions []mem.Region
	for i, w := range wanted {
		var r mem.Region
		if r, err = s.mapRegion(w, m.fds[i]); err != nil {
			break
		}
		regions = append(regions, r)
	}
	var t *mem.Table
	if err == nil {
		t, err = mem.NewTable(regions)
	}
	if err != nil {
		for _, r := range regions {
			r.Mapping.Release()
		}
		return err
	}
	return s.useTable(t)
}

func (s *session) addMemReg(m *message) error {
	w, err := wire.DecodeRegion(m.Request, m.body)
	if err != nil {
		return err
	}
	r, err := s.mapRegion(w, m.fds[0])
	if err != nil {
		return err
	}
	var t *mem.Table
	if s.table == nil {
		t, err = mem.NewTable([]mem.Region{r})
	} else {
		t, err = s.table.Add(r)
	}
	if err != nil {
		r.Mapping.Release()
		return err
	}
	return s.useTable(t)
}

func (s *session) remMemReg(m *message) error {
	w, err := wire.DecodeRegion(m.Request, m.body)
	if err != nil {
		return err
	}
	if s.table == nil {
		return fmt.Errorf("guest address %#x: %w", w.GuestAddr, mem.ErrNoRegion)
	}
	t, err := s.table.Remove(w.GuestAddr, w.UserAddr, w.Size)
	if err != nil {
		return err
	}
	return s.useTable(t)
}

// useTable makes t, with its reference, the session's memory and moves the
// started rings. Requests in flight keep the old memory until they end.
func (s *session) useTable(t *mem.Table) error {
	old := s.table
	s.table = t
	if old != nil {
		defer old.Release()
	}
	for _, r := range s.rings {
		if r.queue != nil {
			if err := r.rebind(); err != nil {
				return err
			}
		}
	}
	return s.startReady()
}

// setLogBase takes the dirty log of a live migration.
func (s *session) setLogBase(m *message) error {
	if s.protocol&wire.ProtocolLogShmFD == 0 || len(m.fds) != 1 {
		return fmt.Errorf("%d descriptors; the log must come as one, with LOG_SHMFD: %w", len(m.fds), errProtocol)
	}
	l, err := wire.DecodeLog(m.body)
	if err != nil {
		return err
	}
	mapping, err := s.ep.budget.Map(m.fds[0], l.Offset, l.Size)
	if err != nil {
		return err
	}
	log, err := newDirtyLog(mapping, &s.ep.counters.dirtyPages)
	if err != nil {
		mapping.Release()
		return err
	}
	if !s.started() && s.table != nil {
		// The migration is older than this connection. QEMU (7.2, vhost_user_async_close)
		// drops what was marked on the connection before since it last looked.
		if err := log.markAll(s.table); err != nil {
			mapping.Release()
			return err
		}
	}
	old := s.dirty
	s.dirty = log
	err = s.applyLog()
	if old != nil { // the queues have changed to the new one, or end
		if err != nil {
			s.stopMarking()
		}
		old.mapping.Release()
	}
	return err
}

// started says whether any ring is.
func (s *session) started() bool {
	for _, r := range s.rings {
		if r.queue != nil {
			return true
		}
	}
	return false
}

// activeLog is the log that queues mark in now, or nil.
func (s *session) activeLog() *dirtyLog {
	if s.features&wire.FeatureLogAll == 0 {
		return nil
	}
	return s.dirty
}

// applyLog tells the started rings what to log and where.
func (s *session) applyLog() error {
	log := s.activeLog()
	for _, r := range s.rings {
		q := r.queue
		if q == nil {
			continue
		}
		addr, used := r.addr.Log, r.addr.Flags&wire.VringFlagLog != 0
		if !q.Do(func() { q.setLog(log, addr, used) }) {
			return ErrServerClosed
		}
	}
	return nil
}

// stopMarking takes the log away from the started rings.
func (s *session) stopMarking() {
	for _, r := range s.rings {
		if q := r.queue; q != nil {
			q.Do(func() { q.setLog(nil, 0, false) })
		}
	}
}

// inflightArea is the memory that survives this daemon in the front end's
// hands: the regions of virtq, one per queue, and behind them
//
//	magic "SCORIAIF" | version u32 (1) | write cache u32 (0 off, 1 on) | 48 bytes 0
//
// because a front end that connects again does not tell a new daemon that the
// guest had switched the write cache off.
type inflightArea struct {
	mapping *mem.Mapping
	queues  int
	num     int // descriptors that each region is for
	trailer []byte
}

const (
	inflightTrailerBytes = 64
	inflightMagic        = "SCORIAIF"
	inflightTrailerV1    = 1
)

// newInflightArea checks the shape of an area.
func (s *session) newInflightArea(m *mem.Mapping, queues, num uint16) (*inflightArea, error) {
	if err := s.checkInflight(queues, num); err != nil {
		return nil, err
	}
	a := &inflightArea{mapping: m, queues: int(queues), num: int(num)}
	b := m.Bytes()
	regions := a.queues * virtq.InflightStride(a.num)
	if len(b) < regions {
		return nil, fmt.Errorf("area of %d bytes, want %d for %d queues of %d: %w", len(b), regions, queues, num, errProtocol)
	}
	if len(b) >= regions+inflightTrailerBytes {
		a.trailer = b[regions:][:inflightTrailerBytes]
	}
	return a, nil
}

func (s *session) checkInflight(queues, num uint16) error {
	if queues == 0 || int(queues) > s.srv.cfg.MaxQueues || num == 0 || num > MaxQueueSize {
		return fmt.Errorf("%d queues of %d: must be 1 to %d of 1 to %d: %w", queues, num, s.srv.cfg.MaxQueues, MaxQueueSize, errProtocol)
	}
	return nil
}

// region returns the part of ring index, or nil if there is no area.
func (a *inflightArea) region(index, num int) ([]byte, int, error) {
	if a == nil {
		return nil, 0, nil
	}
	if index >= a.queues || num > a.num {
		return nil, 0, fmt.Errorf("size %d: the in-flight area is for %d rings of %d: %w", num, a.queues, a.num, errProtocol)
	}
	return a.mapping.Bytes()[index*virtq.InflightStride(a.num):][:virtq.InflightBytes(a.num)], a.num, nil
}

func (a *inflightArea) storeWriteCache(on bool) {
	if a == nil || a.trailer == nil {
		return
	}
	v := uint32(0)
	if on {
		v = 1
	}
	copy(a.trailer, inflightMagic)
	binary.LittleEndian.PutUint32(a.trailer[8:], inflightTrailerV1)
	binary.LittleEndian.PutUint32(a.trailer[12:], v)
}

// writeCache returns what a former daemon stored.
func (a *inflightArea) writeCache() (on, known bool) {
	if a.trailer == nil || string(a.trailer[:8]) != inflightMagic || binary.LittleEndian.Uint32(a.trailer[8:]) != inflightTrailerV1 {
		return false, false
	}
	return binary.LittleEndian.Uint32(a.trailer[12:]) != 0, true
}

func (a *inflightArea) close() {
	if a != nil {
		a.mapping.Release()
	}
}

// getInflight makes a new area and sends it.
func (s *session) getInflight(m *message) error {
	want, err := wire.DecodeInflight(m.Request, m.body)
	if err != nil {
		return err
	}
	if err := s.checkInflight(want.Queues, want.QueueSize); err != nil {
		return err
	}
	size := uint64(int(want.Queues)*virtq.InflightStride(int(want.QueueSize)) + inflightTrailerBytes)
	fd, err := mem.CreateMemfd("scoria-vhost-inflight", int64(size))
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if err := mem.SealSize(fd); err != nil {
		return err
	}
	if err := s.useInflight(fd, wire.Inflight{MmapSize: size, Queues: want.Queues, QueueSize: want.QueueSize}); err != nil {
		return err
	}
	s.inflight.storeWriteCache(s.wce)
	want.MmapSize, want.MmapOffset = size, 0
	return s.reply(m.Request, want.Append(nil), fd)
}

// setInflight takes an area back, maybe one that a former daemon made.
func (s *session) setInflight(m *message) error {
	f, err := wire.DecodeInflight(m.Request, m.body)
	if err != nil {
		return err
	}
	if err := s.useInflight(m.fds[0], f); err != nil {
		return err
	}
	if on, known := s.inflight.writeCache(); known && on != s.wce {
		s.wce = on
		s.updateView(s.dev.Info())
	}
	return nil
}

func (s *session) useInflight(fd int, f wire.Inflight) error {
	for _, r := range s.rings {
		if r.queue != nil {
			return fmt.Errorf("ring %d is started: %w", r.index, errProtocol)
		}
	}
	m, err := s.ep.budget.Map(fd, f.MmapOffset, f.MmapSize)
	if err != nil {
		return err
	}
	a, err := s.newInflightArea(m, f.Queues, f.QueueSize)
	if err != nil {
		m.Release()
		return err
	}
	s.inflight.close()
	s.inflight = a
	return nil
}
