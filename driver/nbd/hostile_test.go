package nbd

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/rs/zerolog"
	"golang.org/x/sys/unix"

	"scoria/driver/block"
	"scoria/driver/block/blocktest"
)

// logged is a log that tests can look at.
type logged struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *logged) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *logged) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// TestP7HostileClientIsDisconnected: whatever breaks the protocol ends that
// connection, with the reason in the log, and nothing else.
func TestP7HostileClientIsDisconnected(t *testing.T) {
	var log logged
	f := serve(t, func(s *Server) { s.Log = zerolog.New(&log) }, ram(1<<20, blocktest.Options{Mode: blocktest.Mixed}))
	other := f.connect(t, "vm1")
	other.write(0, []byte("mine"))
	option := func(magic uint64, option, length uint32) []byte {
		b := binary.BigEndian.AppendUint64(nil, magic)
		b = binary.BigEndian.AppendUint32(b, option)
		return binary.BigEndian.AppendUint32(b, length)
	}
	fixed := []byte{0, 0, 0, 3}
	badMagic := appendRequest(nil, request{typ: cmdRead, length: 512})
	badMagic[0] = 'x'
	for _, tc := range []struct {
		why          string
		transmission bool
		send         []byte
		want         string // in the log
	}{
		{"unknown client flags", false, []byte{0xff, 0, 0, 3}, "client flags"},
		{"not fixed newstyle", false, append([]byte{0, 0, 0, 0}, option(magicOption, optGo, 0)...), "without fixed newstyle"},
		{"option magic", false, append(fixed, option(4711, optList, 0)...), "option begins with"},
		{"option too long", false, append(fixed, option(magicOption, optList, 1<<31)...), "2147483648 bytes of data"},
		{"options without end", false, append(fixed, bytes.Repeat(option(magicOption, 99, 0), maxOptions)...), "1024 options"},
		{"export name too long", false, append(fixed, append(option(magicOption, optExportName, 5000), make([]byte, 5000)...)...), "export name of 5000 bytes"},
		{"request magic", true, badMagic, "request begins with"},
		{"write too large", true, appendRequest(nil, request{typ: cmdWrite, length: maxPayload + 1}), "write of 33554433 bytes"},
		{"half a request", true, badMagic[:13], "middle of a command"},
	} {
		before := f.Stats().Violations
		var nc net.Conn
		if tc.transmission {
			nc = f.connect(t, "vm1").nc
		} else {
			var err error
			if nc, err = net.Dial("unix", f.path); err != nil {
				t.Fatal(err)
			}
		}
		_ = nc.SetDeadline(time.Now().Add(patience))
		go func() { // answers are to be read meanwhile
			_, _ = nc.Write(tc.send)
			_ = nc.(*net.UnixConn).CloseWrite()
		}()
		if _, err := io.Copy(io.Discard, nc); isTimeout(err) {
			t.Errorf("%s: not disconnected", tc.why)
		}
		nc.Close()
		await("the violation of "+tc.why, func() bool { return f.Stats().Violations == before+1 })
		if !strings.Contains(log.String(), tc.want) {
			t.Errorf("%s: the log has no %q:\n%s", tc.why, tc.want, log.String())
		}
	}
	if got := other.read(0, 4); string(got) != "mine" {
		t.Errorf("the other client reads %q", got)
	}
	await("the others' end", func() bool { return f.Stats().Connections == 1 })
}

func TestP7HandshakeHasADeadline(t *testing.T) {
	f := serve(t, func(s *Server) { s.HandshakeTime = 50 * time.Millisecond }, ram(1<<20, blocktest.Options{}))
	c := f.dial(t)
	_, _ = c.nc.Write([]byte("IHAVE")) // on a busy machine it has ended already
	c.ended()
	await("the connection's end", func() bool { return f.Stats().Connections == 0 })
	if f.Stats().Violations != 1 {
		t.Error("the time-out does not count as a violation")
	}
}

func TestP7ConnectionsAreLimited(t *testing.T) {
	f := serve(t, func(s *Server) { s.MaxConnsPerPeer = 3 }, ram(1<<20, blocktest.Options{}))
	var open []*client
	for range 3 {
		open = append(open, f.connect(t, "vm1"))
	}
	nc, err := net.Dial("unix", f.path)
	if err != nil {
		t.Fatal(err)
	}
	_ = nc.SetDeadline(time.Now().Add(patience))
	if b, err := io.ReadAll(nc); len(b) != 0 || isTimeout(err) {
		t.Errorf("a connection too many is greeted with %d bytes, %v", len(b), err)
	}
	open[0].nc.Close()
	await("room", func() bool { return f.Stats().Connections == 2 })
	f.connect(t, "vm1")
	if st := f.Stats(); st.Refused != 1 || st.Accepted != 4 {
		t.Errorf("refused %d, accepted %d", st.Refused, st.Accepted)
	}
}

// TestP7StoppedClientHurtsOnlyItself: a client that sends reads and takes no
// reply is not read from any more; memory stays within its bounds, and others
// are served.
func TestP7StoppedClientHurtsOnlyItself(t *testing.T) {
	d := ram(64<<20, blocktest.Options{})
	f := serve(t, nil, d)
	other := f.connect(t, "vm1")
	c := f.stopped(t)
	f.mu.Lock()
	for c := range f.conns {
		if n := c.bytes.Load(); n > f.BytesPerConn {
			t.Errorf("%d bytes of payload are in memory, at most %d are allowed", n, f.BytesPerConn)
		}
	}
	f.mu.Unlock()
	other.write(0, []byte("alive"))
	if got := other.read(0, 5); string(got) != "alive" {
		t.Errorf("read %q", got)
	}
	c.nc.Close()
	await("the stopped client's end", func() bool { return f.Stats().Connections == 1 })
	f.stopped(t)
	defer watchdog("Close with a stopped client")()
	f.Close()
}

// stopped connects a client that sends reads until the server no longer takes
// them.
func (f *fixture) stopped(t *testing.T) *client {
	c := f.connect(t, "vm1")
	_ = c.nc.SetWriteDeadline(time.Now().Add(200 * time.Millisecond))
	sent := 0
	for {
		_, err := c.nc.Write(appendRequest(nil, request{typ: cmdRead, flags: cmdFlagDF, offset: 0, length: 8 << 20}))
		if err != nil {
			break // the socket is full: the server has stopped reading
		}
		if sent++; sent > 1_000_000 {
			t.Fatal("the server reads without end")
		}
	}
	return c
}

// FuzzSession sends bytes to a server as a client's whole session. The server
// must end the session and be as before.
func FuzzSession(f *testing.F) {
	hello := []byte{0, 0, 0, 3}
	structured := appendOption(nil, optStructuredReply, nil)
	meta := appendOption(nil, optSetMeta, metaRequest("vm1", contextAllocation))
	enter := appendOption(nil, optGo, infoRequest("vm1", infoBlockSize))
	join := func(parts ...[]byte) []byte { return bytes.Join(parts, nil) }
	write := appendRequest(nil, request{typ: cmdWrite, flags: cmdFlagFUA, cookie: 7, offset: 4000, length: 8})
	commands := join(write, []byte("datadata"))
	for _, r := range []request{
		{typ: cmdRead, offset: 3, length: 100_000}, {typ: cmdRead, offset: 512, length: 512}, {typ: cmdFlush}, {typ: cmdTrim, length: 9000},
		{typ: cmdWriteZeroes, offset: 1, length: 20000}, {typ: cmdBlockStatus, length: 1 << 20}, {typ: 77}, {typ: cmdDisc},
	} {
		commands = appendRequest(commands, r)
	}
	f.Add(join(hello, structured, meta, enter, commands))
	f.Add(join(hello, enter, commands))
	f.Add(join(hello, appendOption(nil, optExportName, []byte("new:size=1M")), commands))
	f.Add(join(hello, appendOption(nil, optList, nil), structured, appendOption(nil, optListMeta, metaRequest("vm1")), appendOption(nil, optAbort, nil)))
	f.Fuzz(func(t *testing.T, session []byte) {
		d := ram(1<<20, blocktest.Options{Mode: blocktest.Mixed})
		pool := &blocktest.Pool{}
		pool.Add(d)
		s := &Server{Opener: pool, Log: zerolog.Nop()}
		near, far := socketPair(t)
		ended := make(chan struct{})
		go func() {
			defer close(ended)
			s.ServeConn(context.Background(), far)
		}()
		go func() {
			_, _ = near.Write(session)
			_ = near.(*net.UnixConn).CloseWrite()
		}()
		_ = near.SetReadDeadline(time.Now().Add(patience))
		if _, err := io.Copy(io.Discard, near); isTimeout(err) {
			hang("the end of the session")
		}
		near.Close()
		defer watchdog("the end of the connection")()
		<-ended
		if _, ok := d.Claimed(); ok {
			t.Error("the claim outlives the connection")
		}
		if st := s.Stats(); st.Connections != 0 || len(s.exports) != 0 {
			t.Errorf("%d connections and %d exports are left", st.Connections, len(s.exports))
		}
		s.Close()
		pool.Close()
	})
}

// socketPair returns two connected unix sockets.
func socketPair(t testing.TB) (a, b net.Conn) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	var conns [2]net.Conn
	for i, fd := range fds {
		file := os.NewFile(uintptr(fd), "socketpair")
		if conns[i], err = net.FileConn(file); err != nil {
			t.Fatal(err)
		}
		file.Close()
	}
	return conns[0], conns[1]
}

// FuzzOptionData feeds the parsers of option data.
func FuzzOptionData(f *testing.F) {
	f.Add(infoRequest("vm1", infoName, infoBlockSize))
	f.Add(metaRequest("vm1", contextAllocation, "base:", ""))
	f.Fuzz(func(t *testing.T, data []byte) {
		if name, infos, err := parseInfoRequest(data); err == nil && !bytes.Equal(infoRequest(name, infos...), data) {
			t.Errorf("%q is parsed as name %q, requests %v", data, name, infos)
		}
		if name, queries, err := parseMetaRequest(data, maxQueries); err == nil && !bytes.Equal(metaRequest(name, queries...), data) {
			t.Errorf("%q is parsed as name %q, queries %q", data, name, queries)
		}
	})
}

// FuzzRequest checks that decoding and encoding commands are inverse.
func FuzzRequest(f *testing.F) {
	f.Add(appendRequest(nil, request{flags: 1, typ: 2, cookie: 3, offset: 4, length: 5}))
	f.Fuzz(func(t *testing.T, data []byte) {
		if len(data) < requestBytes {
			return
		}
		r, err := decodeRequest(data[:requestBytes])
		if err == nil && !bytes.Equal(appendRequest(nil, r), data[:requestBytes]) {
			t.Errorf("% x is decoded as %+v", data[:requestBytes], r)
		}
		if err != nil && !errors.Is(err, errMagic) {
			t.Errorf("unexpected error %v", err)
		}
	})
}

// brokenOpener has exports that nobody can open.
type brokenOpener struct{ block.Opener }

var errBroken = errors.New("registry is not reachable")

func (brokenOpener) Open(context.Context, string) (block.Device, error) { return nil, errBroken }
func (brokenOpener) Names(context.Context) ([]string, error)            { return nil, errBroken }

func TestOpenerErrorsReachTheClient(t *testing.T) {
	f := serve(t, func(s *Server) { s.Opener = brokenOpener{} })
	c := f.dial(t)
	for _, option := range []uint32{optList, optGo} {
		var data []byte
		if option == optGo {
			data = infoRequest("vm1")
		}
		if r := c.option(option, data); r[0].typ != repErrPolicy || !strings.Contains(string(r[0].data), errBroken.Error()) {
			t.Errorf("option %d: %#x %s", option, r[0].typ, r[0].data)
		}
	}
}

// FuzzCommands carries out commands made from the input, twelve bytes each, one
// after the other on a real session, and compares with a flat model. Each must
// get one reply with its cookie.
func FuzzCommands(f *testing.F) {
	f.Add([]byte{1, 0, 1, 0, 0, 3, 232, 0, 0, 32, 0, 9, 7, 0, 0, 0, 0, 3, 0, 0, 1, 0, 0, 0, 0})
	f.Add([]byte{2, 0, 6, 0, 0, 1, 1, 0, 0, 2, 200, 0, 9, 0, 4, 0, 0, 0, 1, 0, 0, 32, 1, 0, 0})
	f.Fuzz(func(t *testing.T, in []byte) {
		if len(in) == 0 || len(in) > 12*64 {
			return
		}
		const size = 1 << 18
		opts := blocktest.Options{Mode: blocktest.Mixed, LogicalBlock: 512, MaxDiscard: 9000}
		if in[0]&2 != 0 {
			opts.LogicalBlock = 4096
		}
		fx := serve(t, nil, ram(size, opts))
		c := fx.dial(t)
		if in[0]&1 != 0 {
			c.structure("vm1")
		}
		c.mustGo("vm1")
		model := make([]byte, size)
		for in = in[1:]; len(in) >= 12; in = in[12:] {
			typ, flags := uint16(in[1]&7), uint16(in[2]&31)
			off := uint64(binary.BigEndian.Uint32(in[3:])) % (size + 4096)
			length := binary.BigEndian.Uint32(in[7:]) % (size/2 + 1)
			if typ == cmdDisc {
				continue
			}
			inside := off+uint64(length) <= size
			var payload []byte
			if typ == cmdWrite {
				payload = bytes.Repeat(in[11:12], int(length))
			}
			r := c.do(typ, flags, off, length, payload)
			if !inside && r.code == 0 && typ != cmdFlush {
				t.Fatalf("command %d of %d bytes at %d succeeds behind the end", typ, length, off)
			}
			if r.code != 0 || !inside {
				continue
			}
			part := model[off:][:length]
			switch typ {
			case cmdWrite:
				copy(part, payload)
			case cmdWriteZeroes:
				clear(part)
			case cmdTrim:
				lb := uint64(opts.LogicalBlock)
				if a, b := (off+lb-1)&^(lb-1), (off+uint64(length))&^(lb-1); a < b {
					clear(model[a:b])
				}
			case cmdRead:
				got, err := r.assemble(off, int(length), c.structured)
				if err != nil || !bytes.Equal(got, part) {
					t.Fatalf("read of %d bytes at %d differs from the model: %v", length, off, err)
				}
			}
		}
		if got := c.read(0, size); !bytes.Equal(got, model) {
			t.Error("the volume differs from the model")
		}
	})
}
