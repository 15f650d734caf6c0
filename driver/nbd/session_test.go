package nbd

import (
	"bytes"
	"encoding/binary"
	"io"
	"math/rand/v2"
	"os"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/rs/zerolog"

	"scoria/driver/block"
	"scoria/driver/block/blocktest"
)

// TestModelOfBytes changes single bytes from several connections at once; their
// ranges meet inside blocks, so that every read-modify-write has neighbours.
func TestModelOfBytes(t *testing.T) {
	for _, lb := range []uint32{512, 4096} {
		f := serve(t, nil, ram(4<<20, blocktest.Options{Mode: blocktest.Mixed, LogicalBlock: lb}))
		seed := rand.Uint64()
		t.Logf("seed %d", seed)
		const workers, stripe, stripes = 4, 777, 300
		model := make([]byte, workers*stripe*stripes)
		var wg sync.WaitGroup
		for w := range workers {
			c := f.connect(t, "vm1")
			rnd := rand.New(rand.NewPCG(seed, uint64(w)))
			wg.Go(func() {
				for range 400 {
					// Stripe i of worker w begins at (i*workers+w)*stripe.
					at := (rnd.IntN(stripes)*workers + w) * stripe
					from := rnd.IntN(stripe)
					n := rnd.IntN(stripe-from) + 1
					part := model[at+from:][:n]
					switch rnd.IntN(4) {
					case 0:
						clear(part)
						if r := c.do(cmdWriteZeroes, 0, uint64(at+from), uint32(n), nil); r.code != 0 {
							t.Errorf("zeroes: %d %s", r.code, r.message)
						}
					case 1:
						if got := c.read(uint64(at+from), n); !bytes.Equal(got, part) {
							t.Errorf("[%d,+%d) differs from the model", at+from, n)
						}
					default:
						copy(part, pattern(n, rnd.Uint64()))
						c.write(uint64(at+from), part)
					}
				}
			})
		}
		wg.Wait()
		if got := f.connect(t, "vm1").read(0, len(model)); !bytes.Equal(got, model) {
			t.Errorf("the volume differs from the model (logical block %d)", lb)
		}
	}
}

// TestPipelining keeps many commands of all kinds under way on one connection.
func TestPipelining(t *testing.T) {
	f := serve(t, nil, ram(16<<20, blocktest.Options{Mode: blocktest.Mixed}))
	c := f.connect(t, "vm1")
	const n = 1000
	kinds := []uint16{cmdWrite, cmdRead, cmdFlush, cmdTrim, cmdWriteZeroes, cmdBlockStatus}
	go func() {
		for i := range n {
			var p []byte
			length := uint32(512 + i%8192)
			if kinds[i%len(kinds)] == cmdWrite {
				p = make([]byte, length)
			}
			c.cookie++
			_, _ = c.nc.Write(append(appendRequest(nil, request{typ: kinds[i%len(kinds)], cookie: uint64(i), offset: uint64(i * 4000), length: length}), p...))
		}
	}()
	seen := make(map[uint64]bool)
	for range n {
		r := c.receive(0)
		if r.code != 0 || seen[r.cookie] {
			t.Fatalf("reply to %d: %d %s, second one: %v", r.cookie, r.code, r.message, seen[r.cookie])
		}
		seen[r.cookie] = true
	}
	await("the end of all operations", func() bool { return f.Conns()[0].Outstanding == 0 })
	st := f.Stats()
	var sum uint64
	for _, o := range st.Ops {
		sum += o.Count
	}
	if sum != n || st.Connections != 1 || st.Ops["flush"].Count == 0 {
		t.Errorf("%d commands counted, want %d: %+v", sum, n, st)
	}
}

func TestOneWriter(t *testing.T) {
	d := ram(1<<20, blocktest.Options{})
	f := serve(t, nil, d)
	release, err := d.Claim(block.Claimant{Kind: "vhost", ID: "7"})
	if err != nil {
		t.Fatal(err)
	}
	c := f.connect(t, "vm1")
	r := c.do(cmdWrite, 0, 0, 512, make([]byte, 512))
	if want := (&block.InUseError{Volume: "default/vm1", Holder: block.Claimant{Kind: "vhost", ID: "7"}}).Error(); r.code != ePerm || r.message != want {
		t.Errorf("write to a volume in use: %d %q, want EPERM %q", r.code, r.message, want)
	}
	for _, typ := range []uint16{cmdTrim, cmdWriteZeroes} {
		if r := c.do(typ, 0, 0, 512, nil); r.code != ePerm {
			t.Errorf("command %d to a volume in use: %d, want EPERM", typ, r.code)
		}
	}
	c.read(0, 4096)
	if r := c.do(cmdFlush, 0, 0, 0, nil); r.code != 0 {
		t.Errorf("flush: %d", r.code)
	}
	release()
	c.write(0, []byte("now"))
	// All connections of one process are one claimant.
	c2 := f.connect(t, "vm1")
	c2.write(8, []byte("too"))
	if h, ok := d.Claimed(); !ok || h != (block.Claimant{Kind: "nbd", ID: strconv.Itoa(os.Getpid())}) {
		t.Errorf("claim %v %v", h, ok)
	}
	c.start(cmdDisc, 0, 0, 0, nil)
	c.ended()
	await("the first connection's end", func() bool { return f.Stats().Connections == 1 })
	if _, err := d.Claim(block.Claimant{Kind: "vhost", ID: "7"}); err == nil {
		t.Error("the claim ended with the first of two connections")
	}
	c2.nc.Close()
	await("the claim's end", func() bool { _, ok := d.Claimed(); return !ok })
}

func TestStalledVolume(t *testing.T) {
	d := ram(1<<20, blocktest.Options{})
	f := serve(t, nil, d)
	resume := d.Stall()
	c := f.connect(t, "vm1")
	for i := range uint64(8) {
		c.start(cmdWrite, 0, i*512, 512, pattern(512, i))
	}
	c.start(cmdWrite, 0, 100_001, 3, []byte("abc")) // in steps, waits for the gate
	await("the stall", func() bool { return d.Waiting() == 8 })
	// Reads on this and other connections go on; other writers wait as well.
	c2 := f.connect(t, "vm1")
	c2.read(0, 4096)
	cookie := c.start(cmdRead, 0, 1<<19, 512, nil)
	if r := c.receive(0); r.cookie != cookie {
		t.Errorf("reply to %d, want the read's %d", r.cookie, cookie)
	}
	resume()
	for range 9 {
		if r := c.receive(0); r.code != 0 {
			t.Errorf("write after the stall: %d %s", r.code, r.message)
		}
	}
	if got := c.read(100_000, 5); string(got) != "\x00abc\x00" {
		t.Errorf("read %q", got)
	}
	c.nc.Close()
	// A client that hangs up while its writes wait frees the volume, also if so
	// many wait that the server no longer reads from it.
	for _, n := range []int{4, maxOps + 50} {
		resume = d.Stall()
		c = f.connect(t, "vm1")
		c.write2(n)
		await("the stall", func() bool { return d.Waiting() == min(n, maxOps) })
		c.nc.Close()
		await("the canceling", func() bool { return d.Waiting() == 0 })
		await("the connection's end", func() bool { return f.Stats().Connections == 1 })
		resume()
	}
	c2.nc.Close()
	await("the claim's end", func() bool { _, ok := d.Claimed(); return !ok })
}

// write2 sends n writes and waits for none.
func (c *client) write2(n int) {
	var b []byte
	for i := range uint64(n) {
		b = appendRequest(b, request{typ: cmdWrite, cookie: i, offset: i * 512, length: 512})
		b = append(b, make([]byte, 512)...)
	}
	c.send(b)
}

func TestCloseEndsConnections(t *testing.T) {
	d := ram(1<<20, blocktest.Options{})
	f := serve(t, nil, d)
	f.dial(t) // in the handshake
	idle := f.connect(t, "vm1")
	busy := f.connect(t, "vm1")
	d.Stall()
	busy.start(cmdWrite, 0, 0, 512, make([]byte, 512))
	busy.start(cmdWrite, 0, 1000, 3, make([]byte, 3))
	await("the stall", func() bool { return d.Waiting() == 1 })
	stop := watchdog("Close")
	f.Close()
	stop()
	idle.ended()
	for range 2 {
		if r := busy.receive(0); r.code != eShutdown {
			t.Errorf("write at Close: %d %s, want ESHUTDOWN", r.code, r.message)
		}
	}
	busy.ended()
	if _, ok := d.Claimed(); ok {
		t.Error("the claim outlives Close")
	}
}

func TestDeviceErrors(t *testing.T) {
	var fail atomic.Pointer[error]
	f := serve(t, nil, ram(1<<20, blocktest.Options{Mode: blocktest.Mixed, Fail: func(*block.Request) error {
		if e := fail.Load(); e != nil {
			return *e
		}
		return nil
	}}))
	c := f.connect(t, "vm1")
	c.write(0, make([]byte, 1<<18)) // so that a sparse read has to read
	for _, tc := range []struct {
		err  error
		want uint32
	}{{block.ErrCorrupt, eIO}, {block.ErrFailed, eIO}, {block.ErrClosed, eShutdown}, {block.ErrReadOnly, ePerm}} {
		fail.Store(&tc.err)
		for _, typ := range []uint16{cmdRead, cmdWrite, cmdFlush, cmdTrim, cmdWriteZeroes} {
			for _, r := range []struct {
				off    uint64
				length uint32
			}{{0, 4096}, {0, 1 << 17}, {1, 4096}, {1, 100_000}} {
				var p []byte
				if typ == cmdWrite {
					p = make([]byte, r.length)
				}
				if got := c.do(typ, 0, r.off, r.length, p); got.code != tc.want {
					t.Errorf("%s of %d bytes at %d: %d %q, want %d", cmdNames[typ], r.length, r.off, got.code, got.message, tc.want)
				}
			}
		}
	}
}

func BenchmarkRandomWrite4K(b *testing.B) {
	f := serve(b, func(s *Server) { s.Log = zerolog.Nop() }, ram(64<<20, blocktest.Options{}))
	c := f.connect(b, "vm1")
	const depth = 32
	frame := append(appendRequest(nil, request{typ: cmdWrite, length: 4096}), make([]byte, 4096)...)
	replies := make([]byte, simpleBytes)
	c.deadline()
	b.SetBytes(4096)
	b.ReportAllocs()
	inFlight := 0
	for i := 0; b.Loop(); i++ {
		if inFlight == depth {
			if _, err := io.ReadFull(c.r, replies); err != nil {
				b.Fatal(err)
			}
			inFlight--
		}
		binary.BigEndian.PutUint64(frame[16:], uint64(i%16384)*4096)
		if _, err := c.nc.Write(frame); err != nil {
			b.Fatal(err)
		}
		inFlight++
		if i%1000 == 0 {
			c.deadline()
		}
	}
}
