package shm

import (
	"fmt"
	"os"
	"runtime"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"scoria/driver/block/blocktest"
	"scoria/shm/wire"
)

// bare is a client that takes none of this process's memory but a descriptor: what
// the server takes for it can be measured.
type bare int

func (b *bed) bare(t *testing.T) bare {
	t.Helper()
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: 30}); err != nil {
		t.Fatal(err)
	}
	if err := unix.Connect(fd, &unix.SockaddrUnix{Name: b.path}); err != nil {
		t.Fatal(err)
	}
	return bare(fd)
}

// ask sends a request and returns the answer's status and body.
func (c bare) ask(t *testing.T, p []byte, typ wire.Type, body []byte) (wire.Code, string) {
	t.Helper()
	if _, err := unix.Write(int(c), wire.Append(p[:0], wire.Header{Type: typ, Tag: 7}, body)); err != nil {
		t.Fatal(err)
	}
	n, err := unix.Read(int(c), p[:cap(p)])
	if err != nil {
		t.Fatal(err)
	}
	h, answer, err := wire.Parse(p[:n])
	if err != nil || h.Type != typ|wire.Answer || h.Tag != 7 {
		t.Fatal(h, err)
	}
	return h.Status, string(answer)
}

// connections is how many of n connections to itself this process can have open.
func connections(t *testing.T, n int) int {
	t.Helper()
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatal(err)
	}
	open, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	const others = 300 // rings, refused connections, the test's files
	return min(n, (int(min(limit.Cur, 1<<20))-len(open)-others)/2)
}

func memoryInUse() int64 {
	runtime.GC()
	runtime.GC() // what pools held is gone after the second
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc + m.StackInuse)
}

// Thousands of connections cost little each; one too many is told so; whoever has
// a volume open goes on, and when they are gone nothing stays.
func TestP7ThousandsOfConnections(t *testing.T) {
	const perConnection = 32 << 10 // bytes, at most
	n := connections(t, 3000)
	if n < 100 {
		t.Skipf("RLIMIT_NOFILE leaves room for %d connections", n)
	}
	b := newBed(t, blocktest.Options{}, func(c *Config) { c.MaxConnections, c.MaxDescriptors = n, 2*n })
	user := b.open(nil)
	works := func() {
		t.Helper()
		want, got := pattern(4096, 9), make([]byte, 4096)
		if _, err := user.WriteAt(want, 8192); err != nil {
			t.Fatal(err)
		}
		if _, err := user.ReadAt(got, 8192); err != nil || string(got) != string(want) {
			t.Fatal("read other than what was written", err)
		}
	}
	p := make([]byte, 0, wire.MaxMessage)
	before := memoryInUse()
	var all []bare
	for len(all) < n-1 {
		c := b.bare(t)
		if code, text := c.ask(t, p, wire.Hello, hello()); code != wire.OK {
			t.Fatalf("connection %d: %d %s", len(all), code, text)
		}
		if all = append(all, c); len(all)%16 == 0 {
			works()
		}
		if len(all)%100 == 0 {
			if code, text := c.ask(t, p, wire.Open, wire.Named{Value: wire.OpenReadOnly, Name: testVolume}.Append(nil)); code != wire.OK {
				t.Fatal(text)
			}
		}
	}
	if each := (memoryInUse() - before) / int64(n-1); each > perConnection {
		t.Errorf("%d connections take %d bytes each, want at most %d", n-1, each, perConnection)
	} else {
		t.Logf("%d connections take %d bytes each", n-1, each)
	}
	const refused = 100
	for range refused {
		code, text := b.bare(t).ask(t, p, wire.Hello, hello())
		if want := fmt.Sprintf("%d of at most %d connections are open", n, n); code != wire.Limit || text != want {
			t.Fatalf("one too many is told %d %q, want %q", code, text, want)
		}
		works()
	}
	if got := b.srv.Totals(); got.Connections != n || got.Refused != refused {
		t.Errorf("%+v, want %d connections and %d refused", got, n, refused)
	}
	for _, c := range all {
		_ = unix.Shutdown(int(c), unix.SHUT_RDWR)
	}
	hurry(t, "end of all but one", func() bool { return b.srv.Totals().Connections == 1 })
	works()
	if code, text := b.bare(t).ask(t, p, wire.Hello, hello()); code != wire.OK {
		t.Errorf("after all are gone: %d %s", code, text)
	}
}

func TestP7DescriptorsAreLimited(t *testing.T) {
	b := newBed(t, blocktest.Options{}, func(c *Config) { c.MaxDescriptors = 6 })
	r := b.dial(t).open()
	r.ring(1, 4096)
	r.ring(1, 4096)
	ring := wire.RingRequest{Entries: 1, ArenaBytes: 4096}.Append(nil)
	if h, text, _ := r.ask(wire.Ring, ring); h.Status != wire.Limit || !strings.Contains(string(text), "5 of at most 6 descriptors") {
		t.Errorf("third ring: %d %s", h.Status, text)
	}
	b.dial(t).must(wire.Hello, hello())
	if h, text, _ := b.dial(t).ask(wire.Hello, hello()); h.Status != wire.Limit || !strings.Contains(string(text), "6 of at most 6 descriptors") {
		t.Errorf("third connection: %d %s", h.Status, text)
	}
	r.must(wire.CloseRing, wire.AppendCloseRing(nil, 0))
	r.must(wire.Ring, ring)
}

// One user but root has half of each limit, so that others are served.
func TestP7OneUserTakesHalf(t *testing.T) {
	s := NewServer(Config{MaxConnections: 10, MaxDescriptors: 100, MemoryBytes: 1000})
	const somebody, another = 1000, 1001
	ring := usage{descriptors: ringDescriptors, memory: 500}
	for i := range 5 {
		if err := s.takeRing(somebody, oneConnection); err != nil {
			t.Fatal(i, err)
		}
	}
	if err := s.takeRing(somebody, oneConnection); err == nil || !strings.Contains(err.Error(), "user 1000: 5 of at most 5 connections") {
		t.Error(err)
	}
	if err := s.takeRing(somebody, ring); err != nil {
		t.Error(err)
	}
	if err := s.takeRing(somebody, usage{memory: 1}); err == nil || !strings.Contains(err.Error(), "user 1000: rings take 500 of at most 500 bytes") {
		t.Error(err)
	}
	if err := s.takeRing(another, ring); err != nil {
		t.Error("another user has no room:", err)
	}
	if err := s.takeRing(0, usage{memory: 1}); err == nil || strings.Contains(err.Error(), "user") {
		t.Error("over the limit of all:", err)
	}
	s.giveRing(another, ring)
	if err := s.takeRing(0, ring); err != nil {
		t.Error(err)
	}
	s.giveRing(0, ring)
	s.giveRing(somebody, ring)
	for range 5 {
		s.giveRing(somebody, oneConnection)
	}
	if s.used != (usage{}) || len(s.users) != 0 {
		t.Errorf("after all is given back: %+v, %v", s.used, s.users)
	}
}

// A client that is refused and says nothing is not waited for.
func TestP7RefusedClientsHoldNothingUp(t *testing.T) {
	b := newBed(t, blocktest.Options{}, func(c *Config) { c.MaxConnections = 1 })
	b.dial(t).must(wire.Hello, hello())
	for range 2 * maxRefusals {
		b.bare(t)
	}
	hurry(t, "refusals", func() bool { return b.srv.Totals().Refused == 2*maxRefusals })
	b.srv.Close()
}
