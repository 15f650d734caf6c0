package remote

import (
	"bytes"
	"context"
	"encoding/binary"
	"hash/crc32"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"runtime/pprof"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"scoria/alba/asd"
	"scoria/alba/asd/disk"
)

// heldReads is a Backend whose reads of some keys wait.
type heldReads struct {
	*disk.Disk
	begin func(ctx context.Context, key string) error
}

func (h heldReads) ReadBlocks(ctx context.Context, key string, buf []byte, off, size int64, pri asd.Priority) ([]byte, asd.ReadInfo, error) {
	if err := h.begin(ctx, key); err != nil {
		return nil, asd.ReadInfo{}, err
	}
	return h.Disk.ReadBlocks(ctx, key, buf, off, size, pri)
}

// await fails the test with all stacks if nothing comes in time.
func await[T any](t testing.TB, c <-chan T, what string) (v T) {
	t.Helper()
	select {
	case v = <-c:
	case <-time.After(2 * time.Minute):
		_ = pprof.Lookup("goroutine").WriteTo(os.Stderr, 2)
		t.Fatal("waited too long for: " + what)
	}
	return v
}

// TestP8HungReadHoldsNobodyUp: a small read, which the connection's reader does itself,
// hangs with its disk: others on the same connection are answered, it can be given up,
// and the server learns of that. Over and over: each time another goroutine reads on.
func TestP8HungReadHoldsNobodyUp(t *testing.T) {
	server, client := certificates(t)
	for name, sec := range map[string][2]Security{"plain": {}, "TLS": {server, client}} {
		t.Run(name, func(t *testing.T) {
			d := newDisk(t)
			must(t, d.Apply(within(t), nil, append(put("slow", 8000), put("quick", 8000)...), guest))
			hung, given := make(chan struct{}), make(chan struct{})
			h := heldReads{d, func(ctx context.Context, key string) error {
				if key != "slow" {
					return nil
				}
				hung <- struct{}{}
				<-ctx.Done()
				given <- struct{}{}
				return ctx.Err()
			}}
			_, addr := serve(t, h, ServerOptions{}, sec[0])
			c := dial(t, addr, Options{Security: sec[1]})
			for range 5 {
				ctx, cancel := context.WithCancel(within(t))
				slow := make(chan error, 1)
				go func() {
					_, err := c.ReadAt(ctx, "slow", make([]byte, 4000), 0, guest)
					slow <- err
				}()
				await(t, hung, "the read that hangs to begin")
				for range inlineRest + 5 {
					_, err := c.ReadAt(within(t), "quick", make([]byte, 4000), 0, guest)
					must(t, err)
				}
				cancel()
				wantErr(t, await(t, slow, "the read that was given up"), context.Canceled)
				await(t, given, "the server to hear of it")
			}
		})
	}
}

// TestReadsRunAtOnce: reads that all have to be under way before the first can end.
func TestReadsRunAtOnce(t *testing.T) {
	const n = 20
	d := newDisk(t)
	must(t, d.Apply(within(t), nil, put("key", 8000), guest))
	var here atomic.Int64
	all := make(chan struct{})
	h := heldReads{d, func(ctx context.Context, _ string) error {
		if here.Add(1) == n {
			close(all)
		}
		select {
		case <-all:
			return nil
		case <-ctx.Done():
			return ctx.Err()
		}
	}}
	_, addr := serve(t, h, ServerOptions{}, Security{})
	c := dial(t, addr, Options{})
	done := make(chan error, n)
	for range n {
		go func() {
			_, err := c.ReadAt(within(t), "key", make([]byte, 4000), 0, guest)
			done <- err
		}()
	}
	for range n {
		must(t, await(t, done, "a read among many"))
	}
}

// TestCloseWhileHung: a server that is closed while its reader hangs in a request ends
// when that does.
func TestCloseWhileHung(t *testing.T) {
	d := newDisk(t)
	must(t, d.Apply(within(t), nil, put("key", 8000), guest))
	hung := make(chan struct{}, 10)
	h := heldReads{d, func(ctx context.Context, _ string) error {
		hung <- struct{}{}
		<-ctx.Done()
		return ctx.Err()
	}}
	s, addr := serve(t, h, ServerOptions{}, Security{})
	c := dial(t, addr, impatient)
	done := make(chan error, 1)
	go func() {
		_, err := c.ReadAt(within(t), "key", make([]byte, 4000), 0, guest)
		done <- err
	}()
	await(t, hung, "the read to begin")
	closed := make(chan error, 1)
	go func() { closed <- s.Close() }()
	must(t, await(t, closed, "the server to be closed"))
	if err := await(t, done, "the read"); err == nil {
		t.Fatal("a read that the server gave up succeeded")
	}
}

// tcpPair is two ends of a connection.
func tcpPair(t *testing.T) (a, b net.Conn) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	defer ln.Close()
	a, err = net.Dial("tcp", ln.Addr().String())
	must(t, err)
	b, err = ln.Accept()
	must(t, err)
	t.Cleanup(func() { _, _ = a.Close(), b.Close() })
	return a, b
}

// TestSender: frames of all sizes, from many goroutines, through a connection that is
// full most of the time: each arrives whole, once, and is done with, once.
func TestSender(t *testing.T) {
	a, b := tcpPair(t)
	stop := make(chan struct{})
	s := newSender(a, 4, 2*time.Minute)
	ran := make(chan error, 1)
	go func() { ran <- s.run(stop) }()
	const writers, each = 8, 60
	sent := make(chan map[uint32]int, writers)
	var done, written atomic.Int64
	for range writers {
		go func() {
			sums := map[uint32]int{}
			for range each {
				pieces := [][]byte{make([]byte, 8)}
				size, sum := 0, uint32(0)
				for range rand.IntN(directPieces + 2) {
					p := make([]byte, rand.IntN(directBytes/2))
					for i := range p {
						p[i] = byte(rand.Uint32())
					}
					size, sum = size+len(p), crc32.Update(sum, crc32.IEEETable, p)
					pieces = append(pieces, p)
				}
				binary.LittleEndian.PutUint32(pieces[0], uint32(size))
				binary.LittleEndian.PutUint32(pieces[0][4:], sum)
				sums[sum]++
				o := &outgoing{frame: pieces[0], data: pieces[1:], written: func() { written.Add(1) }}
				if rand.IntN(10) == 0 {
					o.claim = func() bool { return true }
				}
				done.Add(1)
				if err := s.send(o); err != nil {
					t.Error(err)
				}
			}
			sent <- sums
		}()
	}
	came := map[uint32]int{}
	must(t, b.SetReadDeadline(time.Now().Add(2*time.Minute)))
	for range writers * each {
		var head [8]byte
		if _, err := io.ReadFull(b, head[:]); err != nil {
			t.Fatal(err)
		}
		p := make([]byte, binary.LittleEndian.Uint32(head[:]))
		if _, err := io.ReadFull(b, p); err != nil {
			t.Fatal(err)
		}
		sum := binary.LittleEndian.Uint32(head[4:])
		if crc32.ChecksumIEEE(p) != sum {
			t.Fatal("a frame is torn")
		}
		came[sum]++
	}
	for range writers {
		for sum, n := range await(t, sent, "a writer") {
			if came[sum] -= n; came[sum] == 0 {
				delete(came, sum)
			}
		}
	}
	if len(came) > 0 {
		t.Errorf("%d frames came that were not sent, or not so often", len(came))
	}
	close(stop)
	must(t, await(t, ran, "run"))
	must(t, s.send(&outgoing{frame: []byte("late"), written: func() { written.Add(1) }}))
	if written.Load() != done.Load()+1 {
		t.Errorf("%d of %d frames are done with", written.Load(), done.Load()+1)
	}
}

// TestSenderPeerGone: what can't be written is done with all the same, and the write
// that found out says so.
func TestSenderPeerGone(t *testing.T) {
	a, b := tcpPair(t)
	stop := make(chan struct{})
	s := newSender(a, 4, 2*time.Minute)
	ran := make(chan error, 1)
	go func() { ran <- s.run(stop) }()
	const n = 200
	var written sync.WaitGroup
	refused := 0
	for i := range n {
		o := &outgoing{frame: bytes.Repeat([]byte{byte(i)}, 1000), written: written.Done}
		if i%3 == 0 {
			o.claim = func() bool { return false }
		}
		written.Add(1)
		if i == n/2 {
			must(t, b.Close())
		}
		if err := s.send(o); err != nil {
			refused++
		}
	}
	_ = a.Close()
	close(stop)
	if err := await(t, ran, "run"); err != nil {
		refused++
	}
	all := make(chan struct{})
	go func() { written.Wait(); close(all) }()
	await(t, all, "all frames to be done with")
	if refused == 0 {
		t.Error("nobody was told that the peer is gone")
	}
}
