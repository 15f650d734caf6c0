package client

import (
	"errors"
	"fmt"
	"net"
	"time"

	"golang.org/x/sys/unix"

	"scoria/shm/mem"
	"scoria/vhost/wire"
)

// session is one connection's life. A client has one after the other.
type session struct {
	conn    *Conn
	backend *net.UnixConn // the server's own requests; nil without BACKEND_REQ
	slots   []*Region     // memory slots that the server knows
}

func (s *session) end() {
	s.conn.shutdown()
	if s.backend != nil {
		s.backend.Close()
	}
}

// open dials and negotiates up to, not including, the start of the queues, in
// the order in which QEMU does it. It needs c.mu.
func (c *Client) open() (err error) {
	conn, err := Dial(c.path)
	if err != nil {
		return err
	}
	conn.Timeout = c.opts.Timeout
	s := &session{conn: conn}
	defer func() {
		if err != nil {
			s.end()
			<-conn.Done()
		}
	}()
	offered, err := conn.CallU64(wire.GetFeatures, nil)
	if err != nil {
		return err
	}
	features := offered & knownFeatures &^ c.opts.MaskFeatures
	if agreed := c.features &^ FeatureLogAll; agreed != 0 {
		// A guest negotiates once.
		if missing := agreed &^ offered; missing != 0 {
			return fmt.Errorf("%w: device features %#x are gone", ErrShrunk, missing)
		}
		features = agreed
	}
	protocol, err := c.negotiateProtocol(conn, features)
	if err != nil {
		return err
	}
	if missing := c.protocol &^ protocol; missing != 0 {
		return fmt.Errorf("%w: protocol features %#x are gone", ErrShrunk, missing)
	}
	if err := c.checkLimits(conn, protocol); err != nil {
		return err
	}
	if protocol&wire.ProtocolBackendReq != 0 {
		if err := c.openBackend(s); err != nil {
			return err
		}
	}
	if err := conn.Do(wire.SetOwner, nil); err != nil {
		return err
	}
	if protocol&wire.ProtocolConfig != 0 {
		if err := c.loadConfig(conn); err != nil {
			return err
		}
	} else {
		c.config.Store(&Config{})
	}
	c.conn, c.session = conn, s
	c.offered, c.features, c.protocol = offered, features, protocol
	for _, q := range c.queues {
		if c.clean {
			q.negotiated(features)
		}
	}
	return nil
}

func (c *Client) negotiateProtocol(conn *Conn, features uint64) (uint64, error) {
	if features&FeatureProtocolFeatures == 0 {
		return 0, nil
	}
	protocol, err := conn.CallU64(wire.GetProtocolFeatures, nil)
	if err != nil {
		return 0, err
	}
	protocol &= knownProtocol &^ c.opts.MaskProtocol
	if err := conn.Do(wire.SetProtocolFeatures, wire.AppendU64(nil, protocol)); err != nil {
		return 0, err
	}
	conn.SetReplyAck(protocol&wire.ProtocolReplyAck != 0)
	return protocol, nil
}

// checkLimits asks for the numbers of queues and memory slots.
func (c *Client) checkLimits(conn *Conn, protocol uint64) error {
	if protocol&wire.ProtocolMQ != 0 {
		n, err := conn.CallU64(wire.GetQueueNum, nil)
		if err != nil {
			return err
		}
		if n < uint64(len(c.queues)) {
			return fmt.Errorf("%w: it has %d, %d are wanted", ErrQueues, n, len(c.queues))
		}
	}
	if protocol&wire.ProtocolConfigureMemSlots != 0 {
		n, err := conn.CallU64(wire.GetMaxMemSlots, nil)
		if err != nil {
			return err
		}
		if n < c.maxSlots {
			return fmt.Errorf("%w: %d memory slots, %d before", ErrShrunk, n, c.maxSlots)
		}
		c.maxSlots = n
	}
	return nil
}

func (c *Client) loadConfig(conn *Conn) error {
	b, err := getConfig(conn, 0, ConfigBytes)
	if err != nil {
		return err
	}
	cfg, err := ParseConfig(b)
	if err != nil {
		return err
	}
	c.config.Store(&cfg)
	return nil
}

// start hands memory and rings to the server and enables them. It needs c.mu.
func (c *Client) start() error {
	if c.log != nil {
		c.features |= FeatureLogAll
	}
	if err := c.conn.Do(wire.SetFeatures, wire.AppendU64(nil, c.features)); err != nil {
		return err
	}
	if err := c.startInflight(); err != nil {
		return err
	}
	if err := c.sendMemory(); err != nil {
		return err
	}
	if c.log != nil {
		if err := c.sendLog(); err != nil {
			return err
		}
	}
	for _, q := range c.queues {
		if err := c.startQueue(q); err != nil {
			return err
		}
	}
	c.started, c.clean = true, false
	if c.fault.Load() != nil {
		c.fault.Store(nil)
	}
	for _, q := range c.queues {
		// What was added while nobody served the ring waits for this kick.
		one := [8]byte{1}
		unix.Write(q.kickFD, one[:])
	}
	return nil
}

func (c *Client) startInflight() error {
	if c.protocol&wire.ProtocolInflightShmFD == 0 {
		return nil
	}
	if c.inflight == nil {
		want := wire.Inflight{Queues: uint16(len(c.queues)), QueueSize: uint16(c.opts.QueueSize)}
		answer, fds, err := c.conn.Call(wire.GetInflightFD, want.Append(nil))
		if err != nil {
			return err
		}
		desc, err := wire.DecodeInflight(wire.GetInflightFD, answer)
		if err == nil && len(fds) != 1 {
			err = fmt.Errorf("%v: %d file descriptors, want 1: %w", wire.GetInflightFD, len(fds), wire.ErrFDs)
		}
		if err != nil {
			mem.CloseAll(fds)
			return err
		}
		desc.Queues, desc.QueueSize = want.Queues, want.QueueSize
		c.inflight = &inflight{fd: fds[0], desc: desc}
	}
	return c.conn.Do(wire.SetInflightFD, c.inflight.desc.Append(nil), c.inflight.fd)
}

// startQueue sets a ring up. A ring that was not stopped cleanly goes on from
// the used index in memory, as in QEMU: what the in-flight region holds comes in
// addition, and without such a region the server must have completed in order.
func (c *Client) startQueue(q *Queue) error {
	i := uint32(q.index)
	if !c.clean {
		c.bases[q.index] = q.ring.UsedIndex()
	}
	state := func(v uint32) []byte { return wire.VringState{Index: i, Num: v}.Append(nil) }
	fd := wire.VringFD{Index: uint8(i)}.Append(nil)
	steps := []struct {
		request wire.Request
		payload []byte
		fds     []int
	}{
		{wire.SetVringNum, state(uint32(q.ring.Size())), nil},
		{wire.SetVringBase, state(uint32(c.bases[q.index])), nil},
		{wire.SetVringAddr, c.vringAddr(q).Append(nil), nil},
		{wire.SetVringCall, fd, []int{q.callFD}},
		{wire.SetVringKick, fd, []int{q.kickFD}},
	}
	for _, s := range steps {
		if err := c.conn.Do(s.request, s.payload, s.fds...); err != nil {
			return fmt.Errorf("queue %d: %w", i, err)
		}
	}
	if c.features&FeatureProtocolFeatures == 0 {
		return nil
	}
	if err := c.conn.Do(wire.SetVringEnable, state(1)); err != nil {
		return fmt.Errorf("queue %d: %w", i, err)
	}
	return nil
}

// vringAddr is where queue q lies.
func (c *Client) vringAddr(q *Queue) wire.VringAddr {
	shape, err := shapeOf(c.opts.QueueSize, c.opts.MaxSegments)
	if err != nil {
		panic(err) // allocate has checked it
	}
	off := shape.bytes * uint64(q.index)
	user := c.main.UserAddr + off
	a := wire.VringAddr{
		Index: uint32(q.index),
		Desc:  user + shape.ring.Desc, Avail: user + shape.ring.Avail, Used: user + shape.ring.Used,
		Log: c.main.GuestAddr + off + shape.ring.Used,
	}
	if c.log != nil {
		a.Flags = wire.VringFlagLog
	}
	return a
}

// SetVringEnable enables or disables queue i of the running device.
func (c *Client) SetVringEnable(i int, on bool) error {
	state := wire.VringState{Index: uint32(i)}
	if on {
		state.Num = 1
	}
	return c.Conn().Do(wire.SetVringEnable, state.Append(nil))
}

func (c *Client) stopQueues() error {
	for i := range c.queues {
		if _, err := c.stopQueue(i); err != nil {
			return err
		}
	}
	c.started, c.clean = false, true
	return nil
}

func (c *Client) stopQueue(i int) (uint16, error) {
	answer, fds, err := c.conn.Call(wire.GetVringBase, wire.VringState{Index: uint32(i)}.Append(nil))
	mem.CloseAll(fds)
	if err != nil {
		return 0, err
	}
	state, err := wire.DecodeVringState(wire.GetVringBase, answer)
	if err != nil {
		return 0, err
	}
	c.bases[i] = uint16(state.Num)
	return c.bases[i], nil
}

// Reconnect dials the server again, after it died or was restarted, and goes on
// with the same memory, rings and in-flight region.
func (c *Client) Reconnect() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.reconnect()
}

func (c *Client) reconnect() error {
	if c.closed {
		return ErrClosed
	}
	if c.session != nil {
		c.session.end()
		<-c.session.conn.Done()
		c.session = nil
	}
	if err := c.open(); err != nil {
		return fmt.Errorf("reconnect to %s: %w", c.path, err)
	}
	if err := c.start(); err != nil {
		return fmt.Errorf("reconnect to %s: %w", c.path, err)
	}
	c.watch()
	return nil
}

// watch follows the present connection to its end, and comes back if the
// options say so. It needs c.mu.
func (c *Client) watch() {
	conn := c.conn
	c.wg.Go(func() {
		<-conn.Done()
		c.mu.Lock()
		current := c.conn == conn && !c.closed
		if current {
			c.fail(conn.Err())
			c.session.end()
		}
		c.mu.Unlock()
		if current && c.opts.Reconnect > 0 {
			c.comeBack(conn)
		}
	})
}

// comeBack tries until a session stands, the client is closed, or somebody else
// was faster.
func (c *Client) comeBack(lost *Conn) {
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-c.stop:
			return
		case <-timer.C:
		}
		c.mu.Lock()
		if c.conn != lost && c.conn.Err() == nil {
			c.mu.Unlock()
			return
		}
		err := c.reconnect()
		c.mu.Unlock()
		if err == nil || errors.Is(err, ErrClosed) {
			return
		}
		timer.Reset(c.opts.Reconnect)
	}
}
