package client

import (
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"scoria/shm/mem"
	"scoria/vhost/wire"
)

// Errors of a Client.
var (
	// ErrClosed: Close was called.
	ErrClosed = errors.New("vhost-user client is closed")
	// ErrNotNegotiated: a call needs a feature that the server or Options did not allow.
	ErrNotNegotiated = errors.New("feature was not negotiated")
	// ErrQueues: the server has fewer queues than asked for.
	ErrQueues = errors.New("server has too few queues")
	// ErrShrunk: at a reconnect the server offers less than before, which a
	// running guest can't take.
	ErrShrunk = errors.New("server offers less than before")
)

// Options of Connect. The zero value is usable.
type Options struct {
	Queues      int // default 1
	QueueSize   int // descriptors per queue, a power of two; default 256
	MaxSegments int // data segments of one request; default 16
	MemoryBytes int // of the data arena; default 8 MiB

	MaskFeatures uint64 // device features not to ask for
	MaskProtocol uint64 // protocol features not to ask for
	NoIndirect   bool   // put chains into the descriptor table
	NoEventIdx   bool   // use the flags for notification
	NoInflight   bool   // no in-flight region
	MemTable     bool   // SET_MEM_TABLE even where the server takes single slots
	Unsealed     bool   // leave memfds shrinkable, for tests that shrink them
	NoStart      bool   // stop after the handshake; Start is called later

	// Reconnect, if positive, is the interval at which the client tries to come
	// back after the server went away, as QEMU's reconnect option does.
	Reconnect time.Duration
	// Timeout bounds each wait for an answer of the server; default 30 s.
	Timeout time.Duration
	// OnConfigChange is called, from the client's own goroutine, when the server
	// says that the config space changed. It must not call the Client.
	OnConfigChange func(Config)
}

func (o *Options) defaults() {
	set := func(v *int, d int) {
		if *v == 0 {
			*v = d
		}
	}
	set(&o.Queues, 1)
	set(&o.QueueSize, 256)
	set(&o.MaxSegments, 16)
	set(&o.MemoryBytes, 8<<20)
	if o.Timeout == 0 {
		o.Timeout = DefaultTimeout
	}
	if o.NoIndirect {
		o.MaskFeatures |= FeatureIndirectDesc
	}
	if o.NoEventIdx {
		o.MaskFeatures |= FeatureEventIdx
	}
	if o.NoInflight {
		o.MaskProtocol |= wire.ProtocolInflightShmFD
	}
}

// knownProtocol is what the client asks for if the server offers it.
const knownProtocol = wire.ProtocolMQ | wire.ProtocolLogShmFD | wire.ProtocolReplyAck | wire.ProtocolBackendReq |
	wire.ProtocolConfig | wire.ProtocolInflightShmFD | wire.ProtocolResetDevice |
	wire.ProtocolConfigureMemSlots | wire.ProtocolStatus

// Client is a connected front end: what QEMU and a guest's driver are together.
type Client struct {
	path   string
	opts   Options
	queues []*Queue
	main   *Region
	arena  uint64 // offset of the arena in main

	fault  atomic.Pointer[error] // why the queues don't move; nil while they do
	config atomic.Pointer[Config]
	disk   atomic.Pointer[Disk]
	wg     sync.WaitGroup // watchers and readers of the backend channel
	stop   chan struct{}  // closed by Close

	mu        sync.Mutex // guards what follows
	conn      *Conn
	session   *session
	offered   uint64 // device features of the server
	features  uint64 // negotiated
	protocol  uint64 // negotiated
	maxSlots  uint64
	inflight  *inflight
	bases     []uint16
	clean     bool // bases are from GET_VRING_BASE
	started   bool
	closed    bool
	extra     []*Region
	nextGuest uint64
	log       *DirtyLog
}

// inflight is the region in which the server tracks requests; the client only
// keeps it from one session to the next.
type inflight struct {
	fd   int
	desc wire.Inflight
}

// Connect dials the server at path, negotiates, and starts the queues.
func Connect(path string, opts Options) (*Client, error) {
	opts.defaults()
	c := &Client{path: path, opts: opts, stop: make(chan struct{}), bases: make([]uint16, opts.Queues), clean: true}
	if err := c.allocate(); err != nil {
		return nil, fmt.Errorf("vhost-user client: %w", err)
	}
	c.mu.Lock()
	err := c.open()
	if err == nil && !opts.NoStart {
		err = c.start()
	}
	if err == nil {
		c.watch()
	}
	c.mu.Unlock()
	if err != nil {
		c.Close()
		return nil, fmt.Errorf("vhost-user client of %s: %w", path, err)
	}
	return c, nil
}

// allocate makes the shared memory and the queues in it.
func (c *Client) allocate() error {
	shape, err := shapeOf(c.opts.QueueSize, c.opts.MaxSegments)
	if err != nil {
		return err
	}
	c.arena = shape.bytes * uint64(c.opts.Queues)
	total := pageAlign(c.arena + uint64(c.opts.MemoryBytes))
	if c.main, err = newRegion("vhost-client", total, guestBase, userBase+guestBase, !c.opts.Unsealed); err != nil {
		return err
	}
	c.nextGuest = behind(c.main)
	for i := range c.opts.Queues {
		off := shape.bytes * uint64(i)
		q, err := newQueue(i, c.main.Bytes()[off:off+shape.bytes], c.main.GuestAddr+off, shape, &c.fault)
		if err != nil {
			c.free()
			return err
		}
		c.queues = append(c.queues, q)
	}
	return nil
}

// free gives back what the client holds beside the connection.
func (c *Client) free() {
	for _, q := range c.queues {
		q.close()
	}
	for _, r := range c.extra {
		r.close()
	}
	if c.inflight != nil {
		unix.Close(c.inflight.fd)
	}
	if c.log != nil {
		c.log.close()
	}
	c.main.close()
}

// Close stops the queues if the server still answers, and gives everything
// back. Nobody may use the queues or the memory any more.
func (c *Client) Close() error {
	c.mu.Lock()
	if c.closed {
		c.mu.Unlock()
		return nil
	}
	c.closed = true
	close(c.stop)
	if d := c.disk.Load(); d != nil {
		d.Close()
	}
	var err error
	if c.started && c.conn.Err() == nil {
		err = c.stopQueues()
	}
	c.fail(ErrClosed)
	if c.session != nil {
		c.session.end()
	}
	c.mu.Unlock()
	c.wg.Wait()
	c.free()
	return err
}

// Abandon closes the client as a front end that dies: without a word.
func (c *Client) Abandon() {
	c.mu.Lock()
	c.started = false
	c.mu.Unlock()
	c.Close()
}

// Queue returns queue i.
func (c *Client) Queue(i int) *Queue { return c.queues[i] }

// Queues is their number.
func (c *Client) Queues() int { return len(c.queues) }

// Offered is what the server offered, Features and Protocol what was agreed.
func (c *Client) Offered() uint64 {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.offered
}

// Features is explained at Offered.
func (c *Client) Features() uint64 {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.features
}

// Protocol is explained at Offered.
func (c *Client) Protocol() uint64 {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.protocol
}

// MaxMemSlots is what the server answered to GET_MAX_MEM_SLOTS, 0 if not asked.
func (c *Client) MaxMemSlots() uint64 {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.maxSlots
}

// Config is the config space as last read.
func (c *Client) Config() Config { return *c.config.Load() }

// Size is the device's capacity in bytes, as last read.
func (c *Client) Size() uint64 { return c.Config().Capacity * sectorSize }

// Err is why the queues don't move: ErrDisconnected, ErrClosed or nil.
func (c *Client) Err() error {
	if err := c.fault.Load(); err != nil {
		return *err
	}
	return nil
}

// Conn is the present connection, for tests that send messages of their own.
func (c *Client) Conn() *Conn {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.conn
}

// fail sets the reason why queues don't move and wakes everybody who waits.
func (c *Client) fail(err error) {
	c.fault.Store(&err)
	for _, q := range c.queues {
		q.Wake()
	}
}

// ReadConfig asks the server for n bytes of the config space at off.
func (c *Client) ReadConfig(off, n int) ([]byte, error) { return getConfig(c.Conn(), off, n) }

func getConfig(conn *Conn, off, n int) ([]byte, error) {
	req := wire.Config{Offset: uint32(off), Data: make([]byte, n)}
	answer, fds, err := conn.Call(wire.GetConfig, req.Append(nil))
	mem.CloseAll(fds)
	if err != nil {
		return nil, err
	}
	got, err := wire.DecodeConfig(wire.GetConfig, answer)
	if err != nil {
		return nil, err
	}
	if len(got.Data) != n || got.Offset != req.Offset {
		return nil, fmt.Errorf("%v: asked for %d bytes at %d, got %d at %d: %w", wire.GetConfig, n, off, len(got.Data), got.Offset, wire.ErrSize)
	}
	return got.Data, nil
}

// SetConfig writes data to the config space at off (a guest that writes a field).
func (c *Client) SetConfig(off int, data []byte) error {
	msg := wire.Config{Offset: uint32(off), Flags: wire.ConfigWritable, Data: data}
	return c.Conn().Do(wire.SetConfig, msg.Append(nil))
}

// SetWriteCache switches the write cache of the device (CONFIG_WCE).
func (c *Client) SetWriteCache(on bool) error {
	if c.Features()&FeatureConfigWCE == 0 {
		return fmt.Errorf("set write cache: %w: CONFIG_WCE", ErrNotNegotiated)
	}
	v := byte(0)
	if on {
		v = 1
	}
	return c.SetConfig(ConfigOffsetWriteback, []byte{v})
}

// Start starts the queues, after NoStart or Stop.
func (c *Client) Start() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.start()
}

// Stop stops all queues (GET_VRING_BASE): when it returns, the server has ended
// every request it had taken and touches the memory no more.
func (c *Client) Stop() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.stopQueues()
}

// StopQueue is Stop for one queue; it returns the base that the server answered.
func (c *Client) StopQueue(i int) (uint16, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.stopQueue(i)
}

// Reset asks the server for RESET_DEVICE and empties the rings, as a driver
// that resets its device. Start makes it run again.
func (c *Client) Reset() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.protocol&wire.ProtocolResetDevice == 0 {
		return fmt.Errorf("reset: %w: RESET_DEVICE", ErrNotNegotiated)
	}
	if err := c.conn.Do(wire.ResetDevice, nil); err != nil {
		return err
	}
	c.emptyRings()
	return nil
}

// emptyRings needs c.mu, and a server that has stopped.
func (c *Client) emptyRings() {
	for i, q := range c.queues {
		q.ring.Reset()
		c.bases[i] = 0
	}
	if c.inflight != nil {
		unix.Close(c.inflight.fd)
		c.inflight = nil
	}
	c.clean, c.started = true, false
}
