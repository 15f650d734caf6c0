package vhost

import (
	"fmt"

	"scoria/driver/block"
	"scoria/vhost/wire"
)

// updateView tells the queues of a change of the write cache.
func (s *session) updateView(info block.Info) {
	s.view.Store(&deviceView{
		serial: info.Serial, maxDiscardSectors: maxDiscardSectors(&info), writeThrough: !s.writeCache(),
	})
}

// writeCache says whether a completed write may be lost before a flush (virtio
// 1.1, 5.2.6.2): what the guest set if it can, else whether it can flush.
func (s *session) writeCache() bool {
	if s.features&featureConfigWCE != 0 {
		return s.wce
	}
	return s.features&featureFlush != 0
}

// getConfig answers exactly the part of the configuration space asked for: QEMU
// asks for as much as the features that it knows need.
func (s *session) getConfig(m *message) ([]byte, error) {
	c, err := wire.DecodeConfig(m.Request, m.body)
	if err != nil {
		return nil, err
	}
	info := s.dev.Info()
	s.notice.reported(info.Size)
	var space [wire.MaxConfigSize]byte
	part := buildConfig(&info, s.srv.cfg.MaxQueues, s.wce)
	copy(space[:], part[:])
	c.Data = space[c.Offset:][:len(c.Data)]
	return c.Append(nil), nil
}

// setConfig takes a change of the write cache, the one writable field. The
// whole space, which live migration may send, must not change anything else.
func (s *session) setConfig(m *message) error {
	c, err := wire.DecodeConfig(m.Request, m.body)
	if err != nil {
		return err
	}
	if c.Flags != wire.ConfigWritable && c.Flags != wire.ConfigMigration {
		return fmt.Errorf("flags %#x: %w", c.Flags, errProtocol)
	}
	end := c.Offset + uint32(len(c.Data))
	if c.Flags == wire.ConfigWritable && (c.Offset != wceOffset || end != wceOffset+1) {
		return fmt.Errorf("%d bytes at %d: only the byte at %d, writeback, can be written: %w", len(c.Data), c.Offset, wceOffset, errProtocol)
	}
	if c.Offset > wceOffset || end <= wceOffset {
		return nil
	}
	return s.setWriteCache(c.Data[wceOffset-c.Offset] != 0)
}

// setWriteCache switches the write cache. What was completed before it is
// switched off is made durable before the answer.
func (s *session) setWriteCache(on bool) error {
	flush := s.wce && !on
	s.wce = on
	s.inflight.storeWriteCache(on)
	s.updateView(s.dev.Info())
	if !flush {
		return nil
	}
	done := make(chan struct{})
	r := &block.Request{Op: block.OpFlush, Owner: s, Complete: func(*block.Request) { close(done) }}
	s.dev.Submit([]*block.Request{r})
	if !r.Ended {
		if err := s.await(done); err != nil {
			return err
		}
	}
	if r.Err != nil && !s.dev.Info().ReadOnly {
		return fmt.Errorf("flushing the write cache: %w", r.Err)
	}
	return nil
}
