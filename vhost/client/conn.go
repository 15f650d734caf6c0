package client

import (
	"errors"
	"fmt"
	"net"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"scoria/shm/mem"
	"scoria/vhost/wire"
)

// Errors of a connection.
var (
	// ErrDisconnected: the server closed the connection or died.
	ErrDisconnected = errors.New("vhost-user server disconnected")
	// ErrRefused: the server answered a request with an error.
	ErrRefused = errors.New("vhost-user server refused the request")
	// ErrNoReply: the server did not answer in time.
	ErrNoReply = errors.New("vhost-user server did not answer in time")
	// ErrUnsolicited: the server sent a reply that nobody had asked for.
	ErrUnsolicited = errors.New("vhost-user server sent an unexpected message")
)

// DefaultTimeout is how long a Conn waits for a reply unless told otherwise.
const DefaultTimeout = 30 * time.Second

// Conn is a bare vhost-user connection: messages and replies, no state of the
// protocol but REPLY_ACK. Tests of a server use it to say what no front end
// would. Its methods may be called from several goroutines; requests that are
// answered are answered one at a time.
type Conn struct {
	// Timeout bounds each wait for a reply; set it before the first request.
	Timeout time.Duration

	conn    *net.UnixConn
	mu      sync.Mutex // one request with a reply at a time
	ack     bool       // guarded by mu; REPLY_ACK was negotiated
	replies chan reply
	done    chan struct{} // closed when the reader ends
	err     error         // why; valid after done
}

type reply struct {
	header  wire.Header
	payload []byte
	fds     []int
}

// Dial connects to the server's socket. A goroutine reads replies until the
// connection ends.
func Dial(path string) (*Conn, error) {
	conn, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return nil, fmt.Errorf("connect to vhost-user server: %w", err)
	}
	c := &Conn{Timeout: DefaultTimeout, conn: conn, replies: make(chan reply, 1), done: make(chan struct{})}
	go c.read()
	return c, nil
}

// read hands replies to the one that waits, and notices the end.
func (c *Conn) read() {
	defer close(c.done)
	for {
		m, err := readMessage(c.conn)
		if err != nil {
			c.err = fmt.Errorf("%w: %w", ErrDisconnected, err)
			return
		}
		select {
		case c.replies <- m:
		default:
			mem.CloseAll(m.fds)
			c.err = fmt.Errorf("%w: %v", ErrUnsolicited, m.header.Request)
			return
		}
	}
}

func readMessage(conn *net.UnixConn) (m reply, err error) {
	var head [wire.HeaderSize]byte
	if m.fds, err = mem.ReadFull(conn, head[:], wire.MaxFDs); err != nil {
		return m, err
	}
	if m.header, err = wire.ParseHeader(head[:]); err != nil {
		mem.CloseAll(m.fds)
		return m, err
	}
	if m.header.Size > wire.MaxPayload {
		mem.CloseAll(m.fds)
		return m, fmt.Errorf("%v: payload of %d bytes: %w", m.header.Request, m.header.Size, wire.ErrSize)
	}
	m.payload = make([]byte, m.header.Size)
	if len(m.payload) == 0 {
		return m, nil
	}
	more, err := mem.ReadFull(conn, m.payload, wire.MaxFDs)
	if err != nil {
		mem.CloseAll(m.fds)
		return m, err
	}
	m.fds = append(m.fds, more...)
	return m, nil
}

// Done is closed when the connection has ended; Err then says why.
func (c *Conn) Done() <-chan struct{} { return c.done }

// Err is why the connection ended, nil before that.
func (c *Conn) Err() error {
	select {
	case <-c.done:
		return c.err
	default:
		return nil
	}
}

// Close ends the connection and waits for its reader.
func (c *Conn) Close() {
	c.conn.Close()
	<-c.done
	select {
	case m := <-c.replies:
		mem.CloseAll(m.fds)
	default:
	}
}

// WriteBytes sends bytes as they are, with descriptors.
func (c *Conn) WriteBytes(p []byte, fds ...int) error { return mem.WriteFull(c.conn, p, fds...) }

// Send sends a request and waits for nothing.
func (c *Conn) Send(r wire.Request, payload []byte, fds ...int) error {
	return c.send(r, 0, payload, fds)
}

func (c *Conn) send(r wire.Request, flags uint32, payload []byte, fds []int) error {
	msg := wire.AppendMessage(make([]byte, 0, wire.HeaderSize+len(payload)), r, flags, payload)
	if err := mem.WriteFull(c.conn, msg, fds...); err != nil {
		if cerr := c.Err(); cerr != nil {
			err = cerr
		}
		return fmt.Errorf("%v: %w", r, err)
	}
	return nil
}

// SetReplyAck tells whether REPLY_ACK was negotiated.
func (c *Conn) SetReplyAck(on bool) {
	c.mu.Lock()
	c.ack = on
	c.mu.Unlock()
}

// Do sends a request that has no reply of its own; with REPLY_ACK it waits for
// the acknowledgement and fails with ErrRefused if that is not zero.
func (c *Conn) Do(r wire.Request, payload []byte, fds ...int) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.ack {
		return c.send(r, 0, payload, fds)
	}
	m, err := c.roundTrip(r, wire.FlagNeedReply, payload, fds)
	if err != nil {
		return err
	}
	mem.CloseAll(m.fds)
	status, err := wire.DecodeU64(r, m.payload)
	if err != nil {
		return err
	}
	if status != 0 {
		return fmt.Errorf("%v: %w (answer %#x)", r, ErrRefused, status)
	}
	return nil
}

// Call sends a request that has a reply and returns that. Descriptors that come
// with it belong to the caller.
func (c *Conn) Call(r wire.Request, payload []byte, fds ...int) (answer []byte, got []int, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	m, err := c.roundTrip(r, 0, payload, fds)
	return m.payload, m.fds, err
}

// CallU64 is Call for a reply of a single number.
func (c *Conn) CallU64(r wire.Request, payload []byte) (uint64, error) {
	answer, fds, err := c.Call(r, payload)
	mem.CloseAll(fds)
	if err != nil {
		return 0, err
	}
	return wire.DecodeU64(r, answer)
}

// roundTrip needs c.mu.
func (c *Conn) roundTrip(r wire.Request, flags uint32, payload []byte, fds []int) (reply, error) {
	if err := c.send(r, flags, payload, fds); err != nil {
		return reply{}, err
	}
	timer := time.NewTimer(c.Timeout)
	defer timer.Stop()
	var m reply
	select {
	case m = <-c.replies:
	case <-c.done:
		select {
		case m = <-c.replies: // came before the end
		default:
			return reply{}, fmt.Errorf("%v: %w", r, c.err)
		}
	case <-timer.C:
		// The late answer would be taken for the next one's.
		c.conn.Close()
		return reply{}, fmt.Errorf("%v: %w (%v)", r, ErrNoReply, c.Timeout)
	}
	if err := wire.CheckReply(m.header, r); err != nil {
		mem.CloseAll(m.fds)
		return reply{}, err
	}
	return m, nil
}

// shutdown ends the connection without waiting; the reader notices.
func (c *Conn) shutdown() { c.conn.Close() }

// socketpair returns one end as a connection and the other as a descriptor to
// be passed on.
func socketpair() (*net.UnixConn, int, error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return nil, -1, fmt.Errorf("socketpair: %w", err)
	}
	conn, err := unixConn(fds[0])
	if err != nil {
		unix.Close(fds[1])
		return nil, -1, err
	}
	return conn, fds[1], nil
}
