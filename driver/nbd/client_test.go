package nbd

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"path/filepath"
	"runtime"
	"testing"
	"time"

	"github.com/rs/zerolog"

	"scoria/driver/block/blocktest"
)

// patience is how long a wait of a test may take before it counts as a hang.
const patience = 2 * time.Minute

// hang ends the test program with the stacks of all goroutines.
func hang(what string) {
	buf := make([]byte, 1<<20)
	panic(fmt.Sprintf("%s did not happen within %v\n%s", what, patience, buf[:runtime.Stack(buf, true)]))
}

// await calls cond until it holds.
func await(what string, cond func() bool) {
	for end := time.Now().Add(patience); !cond(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			hang(what)
		}
	}
}

// watchdog panics unless stop is called in time.
func watchdog(what string) (stop func() bool) {
	return time.AfterFunc(patience, func() { hang(what) }).Stop
}

// fixture is a server on a unix socket with the devices of a pool.
type fixture struct {
	*Server
	pool *blocktest.Pool
	path string
}

// serve starts a server; configure may set its fields before.
func serve(t testing.TB, configure func(*Server), devices ...*blocktest.RAM) *fixture {
	t.Helper()
	f := &fixture{Server: &Server{Log: zerolog.New(zerolog.NewTestWriter(t))}, pool: &blocktest.Pool{}, path: filepath.Join(t.TempDir(), "s")}
	if _, ok := t.(*testing.B); ok {
		f.Log = zerolog.Nop()
	}
	f.Opener = f.pool
	for _, d := range devices {
		f.pool.Add(d)
	}
	if configure != nil {
		configure(f.Server)
	}
	ln, err := net.Listen("unix", f.path)
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- f.Serve(context.Background(), ln) }()
	t.Cleanup(func() {
		defer watchdog("the end of the server")()
		f.Close()
		if err := <-ended; !errors.Is(err, ErrServerClosed) {
			t.Errorf("Serve returned %v, want ErrServerClosed", err)
		}
		f.pool.Close()
		if n := len(f.exports); n != 0 {
			t.Errorf("%d exports are left after Close", n)
		}
	})
	return f
}

// client is a plain NBD client that does exactly what it is told.
type client struct {
	testing.TB
	nc         net.Conn
	r          *bufio.Reader
	structured bool
	size       uint64
	flags      uint16
	cookie     uint64
}

type optReply struct {
	typ  uint32
	data []byte
}

// dial connects and gets as far as the first option.
func (f *fixture) dial(t testing.TB) *client {
	t.Helper()
	nc, err := net.Dial("unix", f.path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { nc.Close() })
	c := &client{TB: t, nc: nc, r: bufio.NewReader(nc)}
	c.deadline()
	hello := c.bytes(18)
	if binary.BigEndian.Uint64(hello) != magicInit || binary.BigEndian.Uint64(hello[8:]) != magicOption {
		t.Fatalf("the server greets with % x", hello)
	}
	c.send(binary.BigEndian.AppendUint32(nil, uint32(binary.BigEndian.Uint16(hello[16:]))))
	return c
}

// connect negotiates structured replies and base:allocation and goes.
func (f *fixture) connect(t testing.TB, name string) *client {
	t.Helper()
	c := f.dial(t)
	c.structure(name)
	c.mustGo(name)
	return c
}

func (c *client) structure(name string) {
	c.Helper()
	if r := c.option(optStructuredReply, nil); r[0].typ != repAck {
		c.Fatalf("structured replies: %#x %s", r[0].typ, r[0].data)
	}
	c.structured = true
	if r := c.option(optSetMeta, metaRequest(name, contextAllocation)); r[0].typ != repMeta {
		c.Fatalf("base:allocation: %#x %s", r[0].typ, r[0].data)
	}
}

func (c *client) mustGo(name string) {
	c.Helper()
	replies := c.option(optGo, infoRequest(name, infoBlockSize))
	last := replies[len(replies)-1]
	if last.typ != repAck {
		c.Fatalf("go %q: %#x %s", name, last.typ, last.data)
	}
	for _, r := range replies {
		if r.typ == repInfo && binary.BigEndian.Uint16(r.data) == infoExport {
			c.size, c.flags = binary.BigEndian.Uint64(r.data[2:]), binary.BigEndian.Uint16(r.data[10:])
		}
	}
}

func infoRequest(name string, infos ...uint16) []byte {
	b := binary.BigEndian.AppendUint32(nil, uint32(len(name)))
	b = append(b, name...)
	b = binary.BigEndian.AppendUint16(b, uint16(len(infos)))
	for _, i := range infos {
		b = binary.BigEndian.AppendUint16(b, i)
	}
	return b
}

func metaRequest(name string, queries ...string) []byte {
	b := binary.BigEndian.AppendUint32(nil, uint32(len(name)))
	b = append(b, name...)
	b = binary.BigEndian.AppendUint32(b, uint32(len(queries)))
	for _, q := range queries {
		b = binary.BigEndian.AppendUint32(b, uint32(len(q)))
		b = append(b, q...)
	}
	return b
}

func (c *client) deadline() { _ = c.nc.SetDeadline(time.Now().Add(patience)) }

func (c *client) send(b []byte) {
	c.Helper()
	c.deadline()
	if _, err := c.nc.Write(b); err != nil {
		c.Fatalf("send: %v", err)
	}
}

func (c *client) bytes(n int) []byte {
	c.Helper()
	c.deadline()
	b := make([]byte, n)
	if _, err := io.ReadFull(c.r, b); err != nil {
		c.Fatalf("receive %d bytes: %v", n, err)
	}
	return b
}

// option sends an option and returns all replies.
func (c *client) option(option uint32, data []byte) (replies []optReply) {
	c.Helper()
	c.send(appendOption(nil, option, data))
	for {
		h := c.bytes(20)
		if binary.BigEndian.Uint64(h) != magicOptReply || binary.BigEndian.Uint32(h[8:]) != option {
			c.Fatalf("option %d is answered by % x", option, h)
		}
		r := optReply{typ: binary.BigEndian.Uint32(h[12:]), data: c.bytes(int(binary.BigEndian.Uint32(h[16:])))}
		replies = append(replies, r)
		if r.typ == repAck || r.typ >= 1<<31 {
			return replies
		}
	}
}

// ended says that the server closes the connection without another byte.
func (c *client) ended() {
	c.Helper()
	c.deadline()
	if b, err := io.ReadAll(c.r); len(b) != 0 || errors.Is(err, context.DeadlineExceeded) || isTimeout(err) {
		c.Fatalf("the server did not hang up: %d bytes, %v", len(b), err)
	}
}

func isTimeout(err error) bool {
	var ne net.Error
	return errors.As(err, &ne) && ne.Timeout()
}

// start sends a command and returns its cookie.
func (c *client) start(typ, flags uint16, off uint64, length uint32, payload []byte) uint64 {
	c.Helper()
	c.cookie++
	c.send(append(appendRequest(nil, request{typ: typ, flags: flags, cookie: c.cookie, offset: off, length: length}), payload...))
	return c.cookie
}

// reply is a whole reply to a command.
type reply struct {
	cookie  uint64
	code    uint32
	message string
	data    map[uint64][]byte // of data chunks, by offset
	holes   map[uint64]uint32 // by offset
	extents [][2]uint32       // length, state
	chunks  int               // structured ones
}

// receive reads one reply; readLength is the data of a simple one. Replies to
// several commands must not be interleaved, which this server never does.
func (c *client) receive(readLength int) reply {
	c.Helper()
	r := reply{data: map[uint64][]byte{}, holes: map[uint64]uint32{}}
	for {
		switch m := binary.BigEndian.Uint32(c.bytes(4)); m {
		case magicSimple:
			h := c.bytes(12)
			r.code, r.cookie = binary.BigEndian.Uint32(h), binary.BigEndian.Uint64(h[4:])
			if r.code == 0 && readLength > 0 {
				r.data[0] = c.bytes(readLength)
			}
			return r
		case magicStructured:
			h := c.bytes(16)
			p := c.bytes(int(binary.BigEndian.Uint32(h[12:])))
			r.cookie = binary.BigEndian.Uint64(h[4:])
			r.chunks++
			r.chunk(c, binary.BigEndian.Uint16(h[2:]), p)
			if binary.BigEndian.Uint16(h)&chunkDone != 0 {
				return r
			}
		default:
			c.Fatalf("reply begins with %#08x", m)
		}
	}
}

func (r *reply) chunk(c *client, typ uint16, p []byte) {
	c.Helper()
	switch typ {
	case chunkNone:
	case chunkData:
		r.data[binary.BigEndian.Uint64(p)] = p[8:]
	case chunkHole:
		r.holes[binary.BigEndian.Uint64(p)] = binary.BigEndian.Uint32(p[8:])
	case chunkError:
		r.code, r.message = binary.BigEndian.Uint32(p), string(p[6:])
	case chunkBlockStatus:
		for p = p[4:]; len(p) > 0; p = p[8:] {
			r.extents = append(r.extents, [2]uint32{binary.BigEndian.Uint32(p), binary.BigEndian.Uint32(p[4:])})
		}
	default:
		c.Fatalf("chunk of type %d", typ)
	}
}

// do sends a command and returns its reply.
func (c *client) do(typ, flags uint16, off uint64, length uint32, payload []byte) reply {
	c.Helper()
	cookie := c.start(typ, flags, off, length, payload)
	n := 0
	if typ == cmdRead && !c.structured {
		n = int(length)
	}
	r := c.receive(n)
	if r.cookie != cookie {
		c.Fatalf("reply to %d, want %d", r.cookie, cookie)
	}
	return r
}

func (c *client) write(off uint64, p []byte) {
	c.Helper()
	if r := c.do(cmdWrite, 0, off, uint32(len(p)), p); r.code != 0 {
		c.Fatalf("write of %d bytes at %d: %d %s", len(p), off, r.code, r.message)
	}
}

// assemble puts a read's data together.
func (r *reply) assemble(off uint64, length int, structured bool) ([]byte, error) {
	if !structured {
		return r.data[0], nil
	}
	p := bytes.Repeat([]byte{0xdd}, length)
	n := 0
	for at, d := range r.data {
		n += copy(p[at-off:], d)
	}
	for at, l := range r.holes {
		clear(p[at-off:][:l])
		n += int(l)
	}
	if n != length {
		return nil, fmt.Errorf("chunks cover %d of %d bytes", n, length)
	}
	return p, nil
}

func (c *client) read(off uint64, length int) []byte {
	c.Helper()
	r := c.do(cmdRead, 0, off, uint32(length), nil)
	if r.code != 0 {
		c.Fatalf("read of %d bytes at %d: %d %s", length, off, r.code, r.message)
	}
	p, err := r.assemble(off, length, c.structured)
	if err != nil {
		c.Fatalf("read of %d bytes at %d: %v", length, off, err)
	}
	return p
}
