package remote

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"scoria/alba/asd"
	"scoria/alba/asd/asdtest"
	"scoria/alba/asd/disk"
	"scoria/alba/wire"
)

func put(key string, size int) []asd.Update {
	return []asd.Update{asd.Put(key, asd.NewValue(bytes.Repeat([]byte(key), size/len(key))))}
}

// faulty is a Backend whose Client misbehaves.
type faulty struct {
	*asdtest.Faulty
	*disk.Disk
}

func (f faulty) Apply(ctx context.Context, a []asd.Assert, u []asd.Update, pri asd.Priority) error {
	return f.Faulty.Apply(ctx, a, u, pri)
}
func (f faulty) Get(ctx context.Context, key string, pri asd.Priority) (asd.Value, error) {
	return f.Faulty.Get(ctx, key, pri)
}
func (f faulty) MultiGet(ctx context.Context, keys []string, pri asd.Priority) ([]asd.Result, error) {
	return f.Faulty.MultiGet(ctx, keys, pri)
}
func (f faulty) ReadAt(ctx context.Context, key string, p []byte, off int64, pri asd.Priority) (asd.ReadInfo, error) {
	return f.Faulty.ReadAt(ctx, key, p, off, pri)
}
func (f faulty) Range(ctx context.Context, req asd.RangeRequest, pri asd.Priority) (asd.RangeResult, error) {
	return f.Faulty.Range(ctx, req, pri)
}
func (f faulty) Exists(ctx context.Context, keys []string, pri asd.Priority) ([]asd.Info, error) {
	return f.Faulty.Exists(ctx, keys, pri)
}
func (f faulty) Epochs(ctx context.Context, after string) ([]asd.NamespaceEpoch, bool, error) {
	return f.Faulty.Epochs(ctx, after)
}
func (f faulty) Verify(ctx context.Context, req asd.VerifyRequest) (asd.VerifyResult, error) {
	return f.Faulty.Verify(ctx, req)
}
func (f faulty) Stats(ctx context.Context) (asd.Stats, error) { return f.Disk.Stats(ctx) }
func (f faulty) Close() error                                 { return f.Disk.Close() }

// impatient dials again at once; it does not take a busy machine for a dead peer.
var impatient = Options{
	DialTimeout: time.Minute, MinBackoff: time.Millisecond, MaxBackoff: 5 * time.Millisecond,
	PingAfter: 50 * time.Millisecond, DeadAfter: time.Minute,
}

// quickToBury gives a peer up that says nothing for long enough to be told from a
// busy machine, where that matters.
func quickToBury(after time.Duration) Options {
	o := impatient
	o.DeadAfter = after
	return o
}

// TestServerRestart: requests fail at once while nobody is there, and work when
// there is a server again.
func TestServerRestart(t *testing.T) {
	d := newDisk(t)
	ln, err := Listen("127.0.0.1:0", Security{})
	must(t, err)
	addr := ln.Addr().String()
	s := serveOn(t, ln, d, ServerOptions{})
	c := dial(t, addr, impatient)
	must(t, c.Apply(within(t), nil, put("key", 100_000), guest))
	must(t, s.Close())
	_, err = c.Get(within(t), "key", guest)
	wantErr(t, err, asd.ErrUnavailable)
	wantErr(t, c.Apply(within(t), nil, put("key", 100), guest), asd.ErrUnavailable)
	ln, err = Listen(addr, Security{})
	must(t, err)
	serveOn(t, ln, d, ServerOptions{})
	deadline := time.Now().Add(2 * time.Minute)
	for {
		v, err := c.Get(within(t), "key", guest)
		if err == nil {
			if len(v.Data) != 99_999 {
				t.Fatalf("%d bytes: an Apply that was said to have had no effect had one", len(v.Data))
			}
			break
		}
		wantErr(t, err, asd.ErrUnavailable)
		if time.Now().After(deadline) {
			t.Fatal("it does not come back:", err)
		}
		time.Sleep(time.Millisecond)
	}
}

// TestDroppedConnections: while connections are cut all the time, an Apply that
// was acknowledged is there, one that was said to have had no effect isn't, and
// reads are right.
func TestDroppedConnections(t *testing.T) {
	d := newDisk(t)
	s, backend := serve(t, d, ServerOptions{}, Security{})
	m := newMiddle(t, backend)
	c := dial(t, m.addr, impatient)
	stop := make(chan struct{})
	var cutter sync.WaitGroup
	cutter.Go(func() {
		for {
			select {
			case <-stop:
				return
			case <-time.After(3 * time.Millisecond):
				m.cut()
			}
		}
	})
	unknown, lost := 0, 0
	for i := range 300 {
		want := byte(i)
		err := c.Apply(within(t), nil, []asd.Update{asd.Put("key", asd.NewValue(bytes.Repeat([]byte{want}, 3000+100*i)))}, guest)
		direct, directErr := d.Get(within(t), "key", guest)
		switch {
		case err == nil:
			must(t, directErr)
			if direct.Data[0] != want {
				t.Fatalf("apply %d was acknowledged, byte %d is there", i, direct.Data[0])
			}
		case errors.Is(err, asd.ErrUnknownOutcome):
			unknown++
			// It may still be done: not behind the next one, if that is to be told apart.
			// A connection counts until its last request has ended.
			waitConnections(t, s, 0)
			must(t, d.Apply(within(t), nil, put("key", 10), guest))
		case errors.Is(err, asd.ErrUnavailable):
			lost++
			if directErr == nil && direct.Data[0] == want && want != 'k' {
				t.Fatalf("apply %d had an effect: %v", i, err)
			}
		default:
			t.Fatal(err)
		}
		v, err := c.Get(within(t), "key", guest)
		if err == nil {
			must(t, v.Check("key"))
		} else if !errors.Is(err, asd.ErrUnavailable) && !errors.Is(err, asd.ErrNoKey) {
			t.Fatal(err)
		}
	}
	close(stop)
	cutter.Wait()
	t.Logf("%d unknown, %d without effect", unknown, lost)
}

// middle passes bytes between clients and a server, and may damage or cut.
type middle struct {
	addr   string
	damage atomic.Int64 // which byte of the server's, counted from now on, is damaged; 0: none
	mu     sync.Mutex
	conns  map[net.Conn]struct{}
}

func newMiddle(t *testing.T, backend string) *middle {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	m := &middle{addr: ln.Addr().String(), conns: make(map[net.Conn]struct{})}
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			front, err := ln.Accept()
			if err != nil {
				return
			}
			back, err := net.Dial("tcp", backend)
			if err != nil {
				_ = front.Close()
				continue
			}
			m.mu.Lock()
			m.conns[front], m.conns[back] = struct{}{}, struct{}{}
			m.mu.Unlock()
			wg.Go(func() { m.pass(back, front, false) })
			wg.Go(func() { m.pass(front, back, true) })
		}
	})
	t.Cleanup(func() {
		_ = ln.Close()
		m.cut()
		wg.Wait()
	})
	return m
}

func (m *middle) pass(to, from net.Conn, fromServer bool) {
	buf := make([]byte, 4096)
	for {
		n, err := from.Read(buf)
		if fromServer && n > 0 {
			if left := m.damage.Add(-int64(n)); left < 0 && left+int64(n) > 0 {
				buf[left+int64(n)-1] ^= 4
			}
		}
		if n > 0 {
			if _, err := to.Write(buf[:n]); err != nil {
				break
			}
		}
		if err != nil {
			break
		}
	}
	_ = to.Close()
	_ = from.Close()
	m.mu.Lock()
	delete(m.conns, to)
	delete(m.conns, from)
	m.mu.Unlock()
}

func (m *middle) cut() {
	m.mu.Lock()
	defer m.mu.Unlock()
	for c := range m.conns {
		_ = c.Close()
	}
}

// TestP5DamageOnTheWay: whichever byte of an answer is damaged, the reader gets
// the right bytes by a second attempt, and no other ones.
func TestP5DamageOnTheWay(t *testing.T) {
	d := newDisk(t)
	_, backend := serve(t, d, ServerOptions{}, Security{})
	m := newMiddle(t, backend)
	c := dial(t, m.addr, impatient)
	must(t, d.Apply(within(t), nil, put("key", 9000), guest))
	want, err := d.Get(within(t), "key", guest)
	must(t, err)
	warm := func() {
		t.Helper()
		_, err := c.ReadAt(within(t), "key", make([]byte, 1), 0, guest)
		must(t, err)
		_, err = c.Get(within(t), "key", guest)
		must(t, err)
	}
	for _, at := range []int64{1, 10, 17, 20, 25, 33, 40, 50, 70, 100, 1000, 5000, 8000} {
		warm()
		m.damage.Store(at)
		p := make([]byte, 8192)
		if _, err := c.ReadAt(within(t), "key", p, 100, guest); err != nil {
			t.Fatalf("byte %d: %v", at, err)
		}
		if !bytes.Equal(p, want.Data[100:100+8192]) {
			t.Fatalf("byte %d: wrong bytes", at)
		}
		warm()
		m.damage.Store(at)
		v, err := c.Get(within(t), "key", guest)
		if err != nil || !bytes.Equal(v.Data, want.Data) {
			t.Fatalf("byte %d: get: %v", at, err)
		}
	}
}

// TestBusyIsNotDead: a server whose disk hangs answers pings, and the request
// waits; when the caller no longer does, it ends.
func TestBusyIsNotDead(t *testing.T) {
	d := newDisk(t)
	f := asdtest.NewFaulty(d)
	_, addr := serve(t, faulty{f, d}, ServerOptions{}, Security{})
	c := dial(t, addr, impatient)
	must(t, c.Apply(within(t), nil, put("key", 100), guest))
	f.Set(asdtest.Fault{Stopped: true})
	// A machine that stood still for longer than that is not the server's fault.
	for _, deadAfter := range []time.Duration{time.Second, 5 * time.Second, 30 * time.Second} {
		opts := quickToBury(deadAfter)
		ctx, cancel := context.WithTimeout(context.Background(), 3*(opts.PingAfter+opts.DeadAfter)/2)
		defer cancel()
		_, err := dial(t, addr, opts).Get(ctx, "key", guest)
		if deadAfter < 30*time.Second && errors.Is(err, asd.ErrUnavailable) {
			continue
		}
		wantErr(t, err, context.DeadlineExceeded)
		break
	}
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Millisecond)
	defer cancel()
	wantErr(t, c.Apply(ctx, nil, put("key", 200), guest), context.DeadlineExceeded)
	done := make(chan error, 1)
	go func() {
		_, err := c.Get(within(t), "key", guest)
		done <- err
	}()
	time.Sleep(3 * impatient.PingAfter)
	f.Set(asdtest.Fault{})
	must(t, <-done)
}

// TestSilentServer: one that takes requests and says nothing is given up.
func TestSilentServer(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			nc, err := ln.Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				defer nc.Close()
				if _, err := io.ReadFull(nc, make([]byte, wire.HelloBytes)); err != nil {
					return
				}
				_, _ = nc.Write((&wire.Welcome{Version: 1, MaxRequests: 10, ID: [16]byte{1}}).Encode())
				_, _ = io.Copy(io.Discard, nc)
			})
		}
	})
	t.Cleanup(func() {
		_ = ln.Close()
		wg.Wait()
	})
	c, err := New(ln.Addr().String(), quickToBury(500*time.Millisecond))
	must(t, err)
	_, err = c.Get(within(t), "key", guest)
	wantErr(t, err, asd.ErrUnavailable)
	wantErr(t, c.Apply(within(t), nil, put("key", 10), guest), asd.ErrUnknownOutcome)
	must(t, c.Close())
}

func TestWrongASD(t *testing.T) {
	d := newDisk(t)
	_, addr := serve(t, d, ServerOptions{}, Security{})
	opts := impatient
	opts.ID = "2f0c8a52-95fd-4a29-8db4-5f4e7b3b3f3c"
	_, err := dial(t, addr, opts).Get(within(t), "key", guest)
	wantErr(t, err, asd.ErrWrongASD)
	wantErr(t, err, asd.ErrUnavailable)
	opts.ID = d.ID()
	_, err = dial(t, addr, opts).Stats(within(t))
	must(t, err)
}

// TestPlaintextNeedsWords: without TLS nothing listens on, or connects to, what
// others can reach, unless it is said in words.
func TestPlaintextNeedsWords(t *testing.T) {
	for _, addr := range []string{"0.0.0.0:0", ":0", "[::]:0", "192.0.2.1:1"} {
		_, err := Listen(addr, Security{})
		wantErr(t, err, ErrInsecure)
	}
	_, err := Listen("127.0.0.1:0", Security{AllowPlaintext: "yes"})
	if err == nil || !strings.Contains(err.Error(), PlaintextWords) {
		t.Fatalf("%v does not say which words", err)
	}
	ln, err := Listen("0.0.0.0:0", Security{AllowPlaintext: PlaintextWords})
	must(t, err)
	serveOn(t, ln, newDisk(t), ServerOptions{})
	ip := outsideAddress(t)
	_, port, _ := net.SplitHostPort(ln.Addr().String())
	_, err = dial(t, net.JoinHostPort(ip, port), impatient).Stats(within(t))
	wantErr(t, err, ErrInsecure)
	opts := impatient
	opts.Security.AllowPlaintext = PlaintextWords
	_, err = dial(t, net.JoinHostPort(ip, port), opts).Stats(within(t))
	must(t, err)
}

func outsideAddress(t *testing.T) string {
	addrs, err := net.InterfaceAddrs()
	must(t, err)
	for _, a := range addrs {
		if n, ok := a.(*net.IPNet); ok && !n.IP.IsLoopback() && n.IP.To4() != nil {
			return n.IP.String()
		}
	}
	t.Skip("no address besides loopback")
	return ""
}

func TestTLSRefusesStrangers(t *testing.T) {
	a := newAuthority(t)
	_, addr := serve(t, newDisk(t), ServerOptions{}, a.issue(t, "server"))
	_, err := dial(t, addr, Options{Security: a.issue(t, "client")}).Stats(within(t))
	must(t, err)
	stranger := newAuthority(t).issue(t, "stranger")
	_, err = dial(t, addr, Options{Security: stranger}).Stats(within(t)) // knows another CA
	wantErr(t, err, asd.ErrUnavailable)
	stranger.CAFile = a.issue(t, "x").CAFile // knows ours, and isn't known
	_, err = dial(t, addr, Options{Security: stranger}).Stats(within(t))
	wantErr(t, err, asd.ErrUnavailable)
	_, err = dial(t, addr, Options{}).Stats(within(t)) // plain
	wantErr(t, err, asd.ErrUnavailable)
	if err := (&Security{CertFile: "only"}).Check(); err == nil {
		t.Fatal("a certificate without key and CA was accepted")
	}
}

// TestP7HostilePeer: whatever comes, the server ends that connection and serves
// the others.
func TestP7HostilePeer(t *testing.T) {
	s, addr := serve(t, newDisk(t), ServerOptions{FrameTimeout: time.Second, MaxRequests: 4}, Security{})
	good := dial(t, addr, Options{})
	must(t, good.Apply(within(t), nil, put("key", 100), guest))
	hello := (&wire.Hello{Lowest: 1, Highest: 1}).Encode()
	frame := func(h wire.Header, rest ...byte) []byte {
		return append(append(bytes.Clone(hello), wire.AppendHeader(nil, &h)...), rest...)
	}
	same, _, err := (&wire.Request{ID: 1, Op: wire.OpGet, Keys: []string{"key"}}).Encode()
	must(t, err)
	for name, b := range map[string][]byte{
		"nothing":          nil,
		"no hello":         make([]byte, 100),
		"no version":       (&wire.Hello{Lowest: 9, Highest: 10}).Encode(),
		"another ASD":      (&wire.Hello{Lowest: 1, Highest: 1, Want: [16]byte{1}}).Encode(),
		"garbage":          append(bytes.Clone(hello), bytes.Repeat([]byte{0xa5}, 1000)...),
		"huge body":        frame(wire.Header{Op: wire.OpGet, Body: wire.MaxBodyBytes + 1}),
		"body never comes": frame(wire.Header{Op: wire.OpGet, Body: wire.MaxBodyBytes, Data: asd.MaxValueBytes}, 1, 2, 3),
		"body's checksum":  frame(wire.Header{Op: wire.OpGet, Body: 1, BodyCRC: 7}, 1),
		"empty body":       frame(wire.Header{Op: wire.OpGet}),
		"data for a get":   frame(wire.Header{Op: wire.OpStats, Data: 1}, 1),
		"same number":      append(bytes.Clone(hello), bytes.Repeat(same, 50)...),
	} {
		nc, err := net.Dial("tcp", addr)
		must(t, err)
		must(t, nc.SetDeadline(time.Now().Add(2*time.Minute)))
		_, _ = nc.Write(b)
		if name == "same number" { // allowed one behind the other: only the end counts
			_ = nc.(*net.TCPConn).CloseWrite()
		}
		if _, err := io.Copy(io.Discard, nc); errors.Is(err, context.DeadlineExceeded) || isTimeout(err) {
			t.Errorf("%s: the connection stays open", name)
		}
		_ = nc.Close()
		_, err = good.Get(within(t), "key", guest)
		must(t, err)
	}
	waitConnections(t, s, 2)
}

func isTimeout(err error) bool {
	var n net.Error
	return errors.As(err, &n) && n.Timeout()
}

func waitConnections(t *testing.T, s *Server, most int) {
	t.Helper()
	deadline := time.Now().Add(2 * time.Minute)
	for s.Connections() > most {
		if time.Now().After(deadline) {
			t.Fatalf("%d connections, want at most %d", s.Connections(), most)
		}
		time.Sleep(time.Millisecond)
	}
}

// TestPeerThatDoesNotRead: answers that nobody takes hold a bounded part of the
// memory until the connection is ended; others go on.
func TestPeerThatDoesNotRead(t *testing.T) {
	d := newDisk(t)
	s, addr := serve(t, d, ServerOptions{WriteTimeout: 3 * time.Second, MaxRequests: 4, TotalBytes: 1}, Security{})
	must(t, d.Apply(within(t), nil, put("key", 8<<20), guest))
	nc, err := net.Dial("tcp", addr)
	must(t, err)
	defer nc.Close()
	_, err = nc.Write((&wire.Hello{Lowest: 1, Highest: 1}).Encode())
	must(t, err)
	for i := range 100 {
		frame, _, err := (&wire.Request{ID: uint64(i), Op: wire.OpGet, Keys: []string{"key"}}).Encode()
		must(t, err)
		_, err = nc.Write(frame)
		must(t, err)
	}
	c := dial(t, addr, Options{})
	_, err = c.Get(within(t), "key", guest)
	must(t, err)
	waitConnections(t, s, 1) // c has one
}

func TestTooManyConnections(t *testing.T) {
	_, addr := serve(t, newDisk(t), ServerOptions{MaxConns: 1}, Security{})
	_, err := dial(t, addr, Options{}).Stats(within(t))
	must(t, err)
	_, err = dial(t, addr, Options{}).Stats(within(t))
	if wantErr(t, err, asd.ErrUnavailable); !strings.Contains(err.Error(), wire.TooManyConnections.String()) {
		t.Fatal(err)
	}
}
