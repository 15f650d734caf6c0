package shm

import (
	"encoding/binary"
	"io"
	"math"
	"net"
	"os"
	"runtime"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"scoria/driver/block/blocktest"
	"scoria/shm/client"
	"scoria/shm/mem"
	"scoria/shm/ring"
	"scoria/shm/wire"
)

// raw is a client that sends whatever it likes.
type raw struct {
	t    testing.TB
	sock *net.UnixConn
	tag  uint32
}

func (b *bed) dial(t testing.TB) *raw {
	t.Helper()
	c, err := net.DialUnix("unixpacket", nil, &net.UnixAddr{Name: b.path, Net: "unixpacket"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	_ = c.SetDeadline(time.Now().Add(2 * time.Minute))
	return &raw{t: t, sock: c}
}

func (r *raw) send(typ wire.Type, body []byte, fds ...int) error {
	r.tag++
	return mem.WriteFull(r.sock, wire.Append(nil, wire.Header{Type: typ, Tag: r.tag}, body), fds...)
}

func (r *raw) ask(typ wire.Type, body []byte, fds ...int) (wire.Header, []byte, []int) {
	r.t.Helper()
	if err := r.send(typ, body, fds...); err != nil {
		r.t.Fatal(err)
	}
	p := make([]byte, wire.MaxMessage)
	n, got, err := mem.ReadPacket(r.sock, p, wire.MaxFDs)
	if err != nil {
		r.t.Fatalf("%v: %v", typ, err)
	}
	r.t.Cleanup(func() { mem.CloseAll(got) })
	h, answer, err := wire.Parse(p[:n])
	if err != nil || h.Type != typ|wire.Answer || h.Tag != r.tag {
		r.t.Fatal(h, err)
	}
	return h, answer, got
}

func (r *raw) must(typ wire.Type, body []byte, fds ...int) []int {
	r.t.Helper()
	h, text, got := r.ask(typ, body, fds...)
	if h.Status != wire.OK {
		r.t.Fatalf("%v: %d %s", typ, h.Status, text)
	}
	return got
}

func hello() []byte { return wire.HelloRequest{Min: 1, Max: 1}.Append(nil) }

func (r *raw) open() *raw {
	r.t.Helper()
	r.must(wire.Hello, hello())
	r.must(wire.Open, wire.Named{Name: testVolume}.Append(nil))
	return r
}

// ring makes a ring and returns the client's side and its eventfds.
func (r *raw) ring(entries uint32, arena uint64) (*ring.Client, []byte, []int) {
	r.t.Helper()
	fds := r.must(wire.Ring, wire.RingRequest{Entries: entries, ArenaBytes: arena}.Append(nil))
	m, err := mem.Map(fds[0], 0, ring.Layout{Entries: int(entries), ArenaBytes: arena}.TotalBytes())
	if err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(m.Release)
	c, err := ring.NewClient(m.Bytes())
	if err != nil {
		r.t.Fatal(err)
	}
	return c, m.Bytes(), fds
}

// ends waits for the server to close the connection.
func (r *raw) ends(what string) {
	r.t.Helper()
	p := make([]byte, wire.MaxMessage)
	for {
		_, fds, err := mem.ReadPacket(r.sock, p, wire.MaxFDs)
		mem.CloseAll(fds)
		if os.IsTimeout(err) {
			r.t.Fatalf("%s: the server goes on", what)
		}
		if err != nil {
			return
		}
	}
}

// alive checks that others are served.
func (b *bed) alive(t testing.TB) {
	t.Helper()
	d, err := client.Open(soon(t), client.Options{Socket: b.path, Volume: testVolume})
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	if _, err := d.WriteAt(pattern(512, 1), 0); err != nil {
		t.Fatal(err)
	}
}

func TestP7BrokenMessagesEndTheConnection(t *testing.T) {
	b := newBed(t, blocktest.Options{}, nil)
	fd, err := mem.CreateMemfd("test", 1<<20)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	msg := func(typ wire.Type, body []byte) []byte { return wire.Append(nil, wire.Header{Type: typ}, body) }
	for _, tc := range []struct {
		name  string
		hello bool
		p     []byte
		fds   []int
	}{
		{"no header", false, []byte("x"), nil},
		{"wrong length", false, binary.LittleEndian.AppendUint32(nil, 99), nil},
		{"another protocol", false, []byte("GET / HTTP/1.1\r\n\r\n"), nil},
		{"open before hello", false, msg(wire.Open, wire.Named{Name: testVolume}.Append(nil)), nil},
		{"later version", false, msg(wire.Hello, wire.HelloRequest{Min: 2, Max: 9}.Append(nil)), nil},
		{"wrong magic", false, msg(wire.Hello, make([]byte, 16)), nil},
		{"second hello", true, msg(wire.Hello, hello()), nil},
		{"an answer", true, msg(wire.Hello|wire.Answer, hello()), nil},
		{"a status", true, wire.Append(nil, wire.Header{Type: wire.Stat, Status: 1}, nil), nil},
		{"too long", true, make([]byte, wire.MaxMessage+1), nil},
		{"no name", true, msg(wire.Open, make([]byte, 8)), nil},
		{"long name", true, msg(wire.Stat, make([]byte, 8+wire.MaxName+1)), nil},
		{"unknown flags", true, msg(wire.Open, wire.Named{Value: math.MaxUint64, Name: "x"}.Append(nil)), nil},
		{"ring of another length", true, msg(wire.Ring, make([]byte, 15)), nil},
		{"descriptors with stat", true, msg(wire.Stat, wire.Named{Name: "x"}.Append(nil)), []int{fd}},
		{"too many descriptors", true, msg(wire.Ring, wire.RingRequest{Entries: 1}.Append(nil)), []int{fd, fd, fd, fd, fd}},
		{"memory that was not announced", true, msg(wire.Ring, wire.RingRequest{Entries: 1}.Append(nil)), []int{fd}},
		{"announced memory missing", true, msg(wire.Ring, wire.RingRequest{Entries: 1, Flags: wire.RingReuse}.Append(nil)), nil},
	} {
		t.Run(tc.name, func(t *testing.T) {
			r := b.dial(t)
			if tc.hello {
				r.must(wire.Hello, hello())
			}
			if err := mem.WriteFull(r.sock, tc.p, tc.fds...); err != nil {
				t.Fatal(err)
			}
			r.ends(tc.name)
		})
	}
	b.alive(t)
}

func TestP7RefusedRequests(t *testing.T) {
	b := newBed(t, blocktest.Options{}, func(c *Config) { c.MaxRings, c.MemoryBytes = 2, 8<<20 })
	r := b.dial(t).open()
	growing, err := mem.CreateMemfd("growing", 1<<20)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(growing)
	short, err := mem.CreateMemfd("short", 4096)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(short)
	if err := mem.SealSize(short); err != nil {
		t.Fatal(err)
	}
	ringOf := func(entries, flags uint32, arena uint64) []byte {
		return wire.RingRequest{Entries: entries, Flags: flags, ArenaBytes: arena}.Append(nil)
	}
	for _, tc := range []struct {
		name string
		typ  wire.Type
		body []byte
		fds  []int
		want wire.Code
	}{
		{"unknown request", 77, nil, nil, wire.Unsupported},
		{"second open", wire.Open, wire.Named{Name: testVolume}.Append(nil), nil, wire.Invalid},
		{"no entries", wire.Ring, ringOf(0, 0, 0), nil, wire.Invalid},
		{"entries no power of two", wire.Ring, ringOf(3, 0, 0), nil, wire.Invalid},
		{"too many entries", wire.Ring, ringOf(1<<31, 0, 0), nil, wire.Invalid},
		{"odd arena", wire.Ring, ringOf(4, 0, 100), nil, wire.Invalid},
		{"huge arena", wire.Ring, ringOf(4, 0, 1<<63), nil, wire.Invalid},
		{"more memory than there may be", wire.Ring, ringOf(4, 0, 16<<20), nil, wire.Limit},
		{"memory that may shrink", wire.Ring, ringOf(4, wire.RingReuse, 4096), []int{growing}, wire.Invalid},
		{"memory too short", wire.Ring, ringOf(4, wire.RingReuse, 4096), []int{short}, wire.Invalid},
		{"no such ring", wire.CloseRing, wire.AppendCloseRing(nil, 5), nil, wire.Invalid},
	} {
		if h, text, _ := r.ask(tc.typ, tc.body, tc.fds...); h.Status != tc.want {
			t.Errorf("%s: %d %q, want %d", tc.name, h.Status, text, tc.want)
		}
	}
	r.ring(4, 4096)
	r.ring(4, 4096)
	if h, _, _ := r.ask(wire.Ring, ringOf(4, 0, 4096)); h.Status != wire.Limit {
		t.Errorf("third ring: %d", h.Status)
	}
	r.must(wire.CloseRing, wire.AppendCloseRing(nil, 0))
	r.must(wire.CloseRing, wire.AppendCloseRing(nil, 1))
	if got := b.srv.Totals().MemoryBytes; got != 0 {
		t.Errorf("%d bytes charged without a ring", got)
	}
	r.ring(4, 4096)
}

func TestP7MalformedEntriesAreAnswered(t *testing.T) {
	b := newBed(t, blocktest.Options{MaxDiscard: 1 << 20}, nil)
	r := b.dial(t).open()
	c, _, fds := r.ring(16, 1<<20)
	for i, tc := range []struct {
		r    ring.Request
		want ring.Status
	}{
		{ring.Request{Op: ring.OpWrite, Length: 4096}, ring.StatusOK},
		{ring.Request{Op: 9}, ring.StatusUnsupported},
		{ring.Request{Op: ring.OpRead, Flags: 128, Length: 512}, ring.StatusInvalid},
		{ring.Request{Op: ring.OpRead, Flags: ring.FlagFUA, Length: 512}, ring.StatusInvalid},
		{ring.Request{Op: ring.OpWrite, Flags: ring.FlagNoUnmap, Length: 512}, ring.StatusInvalid},
		{ring.Request{Op: ring.OpRead}, ring.StatusInvalid},
		{ring.Request{Op: ring.OpRead, Length: math.MaxUint64}, ring.StatusInvalid},
		{ring.Request{Op: ring.OpRead, Addr: 1 << 20, Length: 512}, ring.StatusInvalid},
		{ring.Request{Op: ring.OpRead, Length: 512, Segments: 300}, ring.StatusInvalid},
		{ring.Request{Op: ring.OpRead, Offset: math.MaxUint64 &^ 511, Length: 512}, ring.StatusRange},
		{ring.Request{Op: ring.OpRead, Offset: 1, Length: 512}, ring.StatusAlignment},
		{ring.Request{Op: ring.OpDiscard, Length: 2 << 20}, ring.StatusInvalid},
		{ring.Request{Op: ring.OpDiscard, Length: 512, Segments: 1}, ring.StatusInvalid},
		{ring.Request{Op: ring.OpFlush, Flags: ring.FlagFUA}, ring.StatusInvalid},
		{ring.Request{Op: ring.OpFlush, Offset: 12345}, ring.StatusOK},
	} {
		tc.r.Cookie = uint64(i)
		c.Add(tc.r)
		if c.Publish() {
			_ = mem.SignalEventFD(fds[1])
		}
		var done ring.Completion
		hurry(t, "completion", func() (ok bool) { done, ok = c.Poll(); return ok })
		if done != (ring.Completion{Cookie: uint64(i), Status: tc.want}) {
			t.Errorf("%+v: %+v, want %v", tc.r, done, tc.want)
		}
	}
}

func TestP7OverrunEndsTheConnection(t *testing.T) {
	b := newBed(t, blocktest.Options{}, nil)
	resume := b.ram.Stall()
	r := b.dial(t).open()
	c, _, fds := r.ring(4, 4096)
	for _, n := range []int{4, 1} { // the fifth lies over the first
		for range n {
			c.Add(ring.Request{Op: ring.OpWrite, Length: 512})
		}
		c.Publish()
		_ = mem.SignalEventFD(fds[1])
		hurry(t, "requests taken", func() bool { return b.ram.Waiting() == 4 || b.srv.Totals().Connections == 0 })
	}
	r.ends("overrun")
	resume()
	hurry(t, "end", func() bool { return b.srv.Totals() == Totals{} })
	b.alive(t)
}

// Memory that changes while it is read, in every word of it, from two threads.
func TestP7MemoryChangesWhileItIsRead(t *testing.T) {
	b := newBed(t, blocktest.Options{Mode: blocktest.Mixed}, nil)
	for round := range 4 {
		r := b.dial(t).open()
		c, all, fds := r.ring(8, 16<<10)
		stop := make(chan struct{})
		var wg sync.WaitGroup
		wg.Go(func() { // in other memory than the Go race detector looks at: this is another process's
			seed := uint64(round + 1)
			for {
				select {
				case <-stop:
					return
				default:
				}
				for range 64 {
					seed = seed*6364136223846793005 + 1442695040888963407
					at := 4096 + seed>>33%uint64(len(all)-4104)
					scribble(all, at, seed)
				}
			}
		})
		for range 200 {
			c.Add(ring.Request{Op: ring.OpWrite, Length: 4096, Segments: 2})
			c.Publish()
			_ = mem.SignalEventFD(fds[1])
		}
		time.Sleep(20 * time.Millisecond)
		close(stop)
		wg.Wait()
		r.sock.Close()
		hurry(t, "end", func() bool { return b.srv.Totals() == Totals{} })
	}
	b.alive(t)
}

// A client that floods without ever reading an answer.
func TestP7ClientThatNeverReads(t *testing.T) {
	b := newBed(t, blocktest.Options{}, nil)
	r := b.dial(t)
	r.must(wire.Hello, hello())
	_ = r.sock.SetDeadline(time.Now().Add(100 * time.Millisecond))
	for r.send(wire.List, wire.Named{}.Append(nil)) == nil {
	}
	b.alive(t)
	b.srv.Close() // waits for no client
}

// A call eventfd that the client fills and makes blocking holds a worker up for
// a moment only.
func TestP7BlockingCallEventFD(t *testing.T) {
	b := newBed(t, blocktest.Options{}, nil)
	r := b.dial(t).open()
	c, _, fds := r.ring(4, 4096)
	if err := unix.SetNonblock(fds[2], false); err != nil {
		t.Fatal(err)
	}
	if _, err := unix.Write(fds[2], binary.NativeEndian.AppendUint64(nil, math.MaxUint64-1)); err != nil {
		t.Fatal(err)
	}
	c.EnableCall()
	c.Add(ring.Request{Op: ring.OpFlush})
	c.Publish()
	_ = mem.SignalEventFD(fds[1])
	r.ends("blocking eventfd")
	b.alive(t)
}

func TestP7ConnectionsAreLimited(t *testing.T) {
	b := newBed(t, blocktest.Options{}, func(c *Config) { c.MaxConnections = 4 })
	for range 4 {
		b.dial(t).must(wire.Hello, hello())
	}
	fifth := b.dial(t)
	if h, text, _ := fifth.ask(wire.Hello, hello()); h.Status != wire.Limit {
		t.Errorf("fifth connection: %d %s", h.Status, text)
	}
	fifth.ends("fifth connection")
	if got := b.srv.Totals(); got.Connections != 4 || got.Refused != 1 {
		t.Fatalf("%+v", got)
	}
}

// A thousand clients that connect, open, submit and vanish leave nothing behind.
func TestP7VanishedClientsLeaveNothing(t *testing.T) {
	b := newBed(t, blocktest.Options{Mode: blocktest.Mixed}, nil)
	b.alive(t)
	hurry(t, "end", func() bool { return b.srv.Totals() == Totals{} })
	fdsBefore, goBefore := openFDs(t), runtime.NumGoroutine()
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for i := range 125 {
				vanish(t, b.path, i)
			}
		})
	}
	wg.Wait()
	hurry(t, "end of all sessions", func() bool { return b.srv.Totals().Connections == 0 && b.srv.Totals().MemoryBytes == 0 })
	if _, claimed := b.ram.Claimed(); claimed {
		t.Fatal("the volume is still claimed")
	}
	hurry(t, "descriptors", func() bool { return openFDs(t) <= fdsBefore })
	hurry(t, "goroutines", func() bool { return runtime.NumGoroutine() <= goBefore })
	for _, w := range b.set.Stats() {
		if w.Queues != 0 {
			t.Fatalf("%d queues left", w.Queues)
		}
	}
	b.alive(t)
}

// vanish goes as far as the claim lets it, and is gone in the middle.
func vanish(t *testing.T, path string, i int) {
	c, err := net.DialUnix("unixpacket", nil, &net.UnixAddr{Name: path, Net: "unixpacket"})
	if err != nil {
		t.Error(err)
		return
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(2 * time.Minute))
	p := make([]byte, wire.MaxMessage)
	step := func(typ wire.Type, body []byte) ([]int, bool) {
		if mem.WriteFull(c, wire.Append(nil, wire.Header{Type: typ, Tag: 1}, body)) != nil {
			return nil, false
		}
		n, fds, err := mem.ReadPacket(c, p, wire.MaxFDs)
		if err != nil {
			return nil, false
		}
		h, _, err := wire.Parse(p[:n])
		return fds, err == nil && h.Status == wire.OK
	}
	if _, ok := step(wire.Hello, hello()); !ok || i%5 == 0 {
		return
	}
	flags := uint64(i % 2) // readers too, several at once
	if _, ok := step(wire.Open, wire.Named{Value: flags, Name: testVolume}.Append(nil)); !ok || i%5 == 1 {
		return
	}
	const entries, arena = 8, 64 << 10
	fds, ok := step(wire.Ring, wire.RingRequest{Entries: entries, ArenaBytes: arena}.Append(nil))
	defer mem.CloseAll(fds)
	if !ok {
		return
	}
	m, err := mem.Map(fds[0], 0, ring.Layout{Entries: entries, ArenaBytes: arena}.TotalBytes())
	if err != nil {
		t.Error(err)
		return
	}
	defer m.Release()
	rc, err := ring.NewClient(m.Bytes())
	if err != nil {
		t.Error(err)
		return
	}
	for range entries {
		rc.Add(ring.Request{Op: uint8(i % 3), Length: 4096})
	}
	rc.Publish()
	_ = mem.SignalEventFD(fds[1])
}

func openFDs(t *testing.T) int {
	t.Helper()
	all, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(all)
}

// FuzzSession sends packets of the fuzzer's to a server: whatever they are, it
// goes on serving others.
func FuzzSession(f *testing.F) {
	h := wire.Append(nil, wire.Header{Type: wire.Hello}, hello())
	o := wire.Append(nil, wire.Header{Type: wire.Open}, wire.Named{Name: testVolume}.Append(nil))
	n := wire.Append(nil, wire.Header{Type: wire.Ring}, wire.RingRequest{Entries: 4, ArenaBytes: 4096}.Append(nil))
	f.Add(h, o, n)
	f.Add(h, n, o)
	f.Add(o, h, n)
	b := newBed(f, blocktest.Options{}, nil)
	f.Fuzz(func(t *testing.T, a, bb, c []byte) {
		r := b.dial(t)
		p := make([]byte, wire.MaxMessage)
		for _, m := range [][]byte{a, bb, c} {
			if len(m) == 0 || mem.WriteFull(r.sock, m) != nil {
				break
			}
			_, fds, err := mem.ReadPacket(r.sock, p, wire.MaxFDs)
			mem.CloseAll(fds)
			if err == io.EOF {
				break
			}
		}
		r.sock.Close()
		hurry(t, "end of the session", func() bool { return b.srv.Totals() == Totals{} })
	})
}
