package nbd

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strconv"
	"sync/atomic"
	"time"

	"github.com/rs/zerolog"

	"scoria/driver/block"
)

// errHangup: the client closed its end without NBD_CMD_DISC.
var errHangup = errors.New("client hung up")

// conn is one connection. Fields without a word on it belong to the reader.
type conn struct {
	s     *Server
	nc    net.Conn
	peer  peer
	id    uint64
	since time.Time
	log   zerolog.Logger
	r     *bufio.Reader
	// ctx ends when the connection shall: server closed, client gone.
	ctx    context.Context
	cancel context.CancelFunc

	// Set by the handshake.
	structured bool
	metaFor    string        // export for which metas were selected
	metas      []metaContext // selected ones; of another export until the handshake's end
	name       atomic.Pointer[string]
	dev        block.Device
	exp        *export
	lb         uint64 // logical block, bytes
	maxZero    uint64 // bytes of one discard or write-zeroes request
	readOnly   bool

	release  func()        // of the claim, once it is taken
	denied   bool          // the refusal of a claim has been logged
	writer   atomic.Bool   // the claim was taken
	released chan struct{} // closed when it has been given back

	batch   []*op
	reqs    []*block.Request
	free    chan *op // operations that are not in use
	made    int      // operations that exist
	replies chan *op // room for all operations: sending never blocks
	room    chan struct{}
	bytes   atomic.Int64 // payload buffers in use

	// outstanding counts operations from their dispatch until they are in
	// replies; idle is signaled when it reaches zero.
	outstanding atomic.Int64
	idle        chan struct{}
	ended       atomic.Bool // steps of operations are not to be started any more
}

// op is one command under way.
type op struct {
	req   block.Request // of commands that are one request
	c     *conn
	cmd   request
	gated bool // holds the gate shared
	buf   *buffer
	cost  int64 // of buf, in conn.bytes
	err   error
	seg   [1][]byte
	parts [][]byte // the reply, if prepared by a goroutine
	head  [chunkBytes + 8]byte
}

func newConn(ctx context.Context, s *Server, nc net.Conn, p peer, id uint64) *conn {
	c := &conn{
		s: s, nc: nc, peer: p, id: id, since: time.Now(),
		log:     s.Log.With().Uint64("conn", id).Int("pid", p.pid).Logger(),
		r:       bufio.NewReaderSize(nc, 64<<10),
		free:    make(chan *op, maxOps),
		replies: make(chan *op, maxOps),
		room:    make(chan struct{}, 1),
		idle:    make(chan struct{}, 1),

		released: make(chan struct{}),
	}
	c.ctx, c.cancel = context.WithCancel(ctx)
	return c
}

func (c *conn) exportName() string {
	if p := c.name.Load(); p != nil {
		return *p
	}
	return ""
}

// claimant is who the connection is to block.Device.Claim.
func (c *conn) claimant() block.Claimant {
	if c.peer.pid > 0 {
		return block.Claimant{Kind: "nbd", ID: strconv.Itoa(c.peer.pid)}
	}
	return block.Claimant{Kind: "nbd", ID: fmt.Sprintf("connection %d", c.id)}
}

// serve runs the connection. An error says why it ended otherwise than by the
// client's orderly wish.
func (c *conn) serve() error {
	stop := context.AfterFunc(c.ctx, func() { _ = c.nc.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	defer func() { block.Release(c.dev) }()
	transmit, err := c.handshake()
	if errors.Is(err, os.ErrDeadlineExceeded) && c.ctx.Err() == nil {
		err = fmt.Errorf("handshake not complete after %v: %w", c.s.HandshakeTime, errProtocol)
	}
	if !transmit || err != nil {
		return err
	}
	c.exp = c.s.acquire(*c.name.Load())
	defer c.s.release(c.exp)
	written := make(chan struct{})
	go func() {
		defer close(written)
		c.writeReplies()
	}()
	err = c.readCommands()
	c.submitBatch()
	c.drain(err == nil)
	// The last replies, and a writer that the client has left waiting.
	if c.ctx.Err() == nil {
		_ = c.nc.SetWriteDeadline(time.Now().Add(drainTime))
	} else {
		_ = c.nc.SetWriteDeadline(time.Now().Add(closeTime))
	}
	close(c.replies)
	<-written
	if c.release != nil {
		c.release()
	}
	close(c.released)
	if errors.Is(err, errHangup) {
		return nil
	}
	return err
}

// drain waits until every operation has been answered. An orderly client gets
// drainTime for those that wait for room; the others are canceled at once, and
// again and again, as operations of several steps may just begin one.
func (c *conn) drain(orderly bool) {
	var patience <-chan time.Time
	if orderly {
		block.Hasten(c.dev, c)
		patience = time.After(drainTime)
	} else {
		c.abandon()
	}
	again := time.NewTicker(drainTime / 50)
	defer again.Stop()
	for c.outstanding.Load() > 0 {
		select {
		case <-c.idle:
		case <-patience:
			c.abandon()
		case <-c.ctx.Done():
			c.abandon()
			<-again.C
		case <-again.C:
			if c.ended.Load() {
				c.abandon()
			}
		}
	}
}

// abandon ends what waits for room or for the gate.
func (c *conn) abandon() {
	c.ended.Store(true)
	c.dev.Cancel(c)
	c.exp.gate.wake()
}

// readCommands takes commands off the socket until the client disconnects
// (nil), hangs up (errHangup) or something is wrong.
func (c *conn) readCommands() error {
	for {
		if c.r.Buffered() < requestBytes {
			c.submitBatch()
		}
		p, err := c.r.Peek(requestBytes)
		switch {
		case c.ctx.Err() != nil:
			return c.ctx.Err()
		case err == io.EOF && len(p) == 0:
			return errHangup
		case err == io.EOF:
			return fmt.Errorf("connection ends in the middle of a command: %w", errProtocol)
		case err != nil:
			return err
		}
		cmd, err := decodeRequest(p)
		if err != nil {
			return fmt.Errorf("%w: %w", err, errProtocol)
		}
		_, _ = c.r.Discard(requestBytes)
		if cmd.typ == cmdDisc {
			return nil
		}
		if cmd.typ == cmdWrite && cmd.length > maxPayload {
			return fmt.Errorf("write of %d bytes, at most %d are allowed: %w", cmd.length, maxPayload, errProtocol)
		}
		o, err := c.take(cmd)
		if err != nil {
			return err
		}
		if cmd.typ == cmdWrite {
			if err := c.readPayload(o); err != nil {
				c.recycle(o)
				return err
			}
		}
		c.outstanding.Add(1)
		c.dispatch(o)
	}
}

func (c *conn) readPayload(o *op) error {
	if c.r.Buffered() < len(o.buf.data) {
		c.submitBatch()
	}
	if _, err := io.ReadFull(c.r, o.buf.data); err != nil {
		if c.ctx.Err() != nil {
			return c.ctx.Err()
		}
		return fmt.Errorf("data of a write of %d bytes: %w", o.cmd.length, err)
	}
	return nil
}

// take gets an operation with the buffer that it needs, and waits for both if
// need be.
func (c *conn) take(cmd request) (*op, error) {
	var need int64
	size := -1
	switch {
	case cmd.typ == cmdWrite, cmd.typ == cmdRead && cmd.length <= maxPayload:
		_, n := bufferClass(int(cmd.length))
		size, need = int(cmd.length), int64(n)
	}
	for c.bytes.Load()+need > c.s.BytesPerConn {
		if err := c.waitForRoom(); err != nil {
			return nil, err
		}
	}
	o, err := c.takeOp()
	if err != nil {
		return nil, err
	}
	o.cmd, o.err, o.gated, o.parts = cmd, nil, false, nil
	if size >= 0 {
		o.buf, o.cost = c.s.buffers.get(size), need
		c.bytes.Add(need)
	}
	return o, nil
}

func (c *conn) takeOp() (*op, error) {
	for {
		select {
		case o := <-c.free:
			return o, nil
		default:
		}
		if c.made < maxOps {
			c.made++
			o := &op{c: c}
			o.req.Owner = c
			o.req.Complete = func(r *block.Request) {
				o.err = r.Err
				c.finish(o)
			}
			return o, nil
		}
		if err := c.waitForRoom(); err != nil {
			return nil, err
		}
	}
}

// waitForRoom returns when an operation has been recycled. As the socket is not
// being read, it looks from time to time whether the client is still there.
func (c *conn) waitForRoom() error {
	c.submitBatch()
	tick := time.NewTicker(pollTime)
	defer tick.Stop()
	for {
		select {
		case <-c.room:
			return nil
		case <-c.ctx.Done():
			return c.ctx.Err()
		case <-tick.C:
			if hungUp(c.nc) {
				return errHangup
			}
		}
	}
}

// recycle makes an operation and its buffer available again. Called by the
// writer, or by the reader for operations that were never dispatched.
func (c *conn) recycle(o *op) {
	if o.buf != nil {
		c.s.buffers.put(o.buf)
		o.buf = nil
		c.bytes.Add(-o.cost)
	}
	o.parts = nil
	o.seg[0] = nil
	o.req.Segments = nil
	c.free <- o
	select {
	case c.room <- struct{}{}:
	default:
	}
}

// finish hands an operation that has ended to the writer. Safe from any
// goroutine; does not block.
func (c *conn) finish(o *op) {
	if o.gated {
		o.gated = false
		c.exp.gate.releaseShared()
	}
	c.replies <- o
	if c.outstanding.Add(-1) == 0 {
		select {
		case c.idle <- struct{}{}:
		default:
		}
	}
}

// fail ends an operation with an error before anything was done.
func (c *conn) fail(o *op, err error) {
	o.err = err
	c.finish(o)
}

// enqueue adds the operation's one request to the batch.
func (c *conn) enqueue(o *op, opcode block.Op, flags block.Flags) {
	r := &o.req
	r.Op, r.Flags, r.Offset, r.Length = opcode, flags, o.cmd.offset, uint64(o.cmd.length)
	r.Segments = nil
	if o.buf != nil {
		o.seg[0] = o.buf.data
		r.Segments = o.seg[:]
	}
	r.Err, r.Ended = nil, false
	c.batch = append(c.batch, o)
	if len(c.batch) == maxBatch {
		c.submitBatch()
	}
}

// submitBatch gives the collected requests to the device. Only the reader
// resets operations, so Ended may be looked at even if the operation has been
// answered and recycled meanwhile.
func (c *conn) submitBatch() {
	if len(c.batch) == 0 {
		return
	}
	for _, o := range c.batch {
		c.reqs = append(c.reqs, &o.req)
	}
	c.dev.Submit(c.reqs)
	for _, o := range c.batch {
		if o.req.Ended {
			o.err = o.req.Err
			c.finish(o)
		}
	}
	clear(c.reqs)
	clear(c.batch)
	c.reqs, c.batch = c.reqs[:0], c.batch[:0]
}

// claim makes the connection a writer of its volume. One whose client is gone but
// which has not given back the claim yet is waited for. Called by the reader.
func (c *conn) claim() error {
	if c.release != nil || c.readOnly {
		return nil // the device itself refuses what would change it
	}
	release, err := c.dev.Claim(c.claimant())
	var held *block.InUseError
	if errors.As(err, &held) {
		c.awaitGone()
		release, err = c.dev.Claim(c.claimant())
	}
	if err != nil {
		if !c.denied {
			c.denied = true
			c.log.Warn().Err(err).Str("export", c.exportName()).Msg("nbd client may not write")
		}
		return err
	}
	c.release = release
	c.writer.Store(true)
	return nil
}

// awaitGone waits for the volume's writers on this server whose clients are gone, while
// its own client is there. A writer never waits here, so that no two wait for each
// other.
func (c *conn) awaitGone() {
	tick := time.NewTicker(hangupInterval)
	defer tick.Stop()
	for _, other := range c.s.writers(c) {
		for waiting := hungUp(other.nc); waiting; {
			select {
			case <-other.released:
				waiting = false
			case <-c.ctx.Done():
				return
			case <-tick.C:
				if hungUp(c.nc) {
					return
				}
			}
		}
	}
}

// hangupInterval is how often a connection that waits for another one looks whether
// its own client is still there.
const hangupInterval = 100 * time.Millisecond
