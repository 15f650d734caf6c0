package vhost

import (
	"context"
	"encoding/binary"
	"fmt"
	"net"
	"path/filepath"
	"runtime"
	"testing"
	"time"

	"github.com/rs/zerolog"
	"golang.org/x/sys/unix"

	"scoria/driver/block"
	"scoria/shm/mem"
	"scoria/vhost/virtq"
	"scoria/vhost/wire"
)

const (
	testGuestBase = 0x40000000
	testUserBase  = 0x7f1200000000
	testMemBytes  = 8 << 20
	testRingBytes = 64 << 10 // room for one ring
	testDataAt    = 1 << 20  // data of requests lies from here on
	testTimeout   = 2 * time.Minute
)

// hurry fails the test with all stacks if cond does not hold in time.
func hurry(t testing.TB, what string, cond func() bool) {
	t.Helper()
	for end := time.Now().Add(testTimeout); !cond(); time.Sleep(200 * time.Microsecond) {
		if time.Now().After(end) {
			buf := make([]byte, 1<<20)
			t.Fatalf("%s: not in time\n%s", what, buf[:runtime.Stack(buf, true)])
		}
	}
}

type bed struct {
	t    testing.TB
	srv  *Server
	dev  *ramDevice
	ep   *Endpoint
	path string

	device block.Device // instead of dev, if set
}

func newBed(t testing.TB, cfg Config) *bed {
	t.Helper()
	cfg.Log = zerolog.Nop()
	srv, err := NewServer(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(srv.Close)
	b := &bed{t: t, srv: srv, dev: newRAMDevice(16 << 20), path: filepath.Join(t.TempDir(), "v.sock")}
	b.listen()
	return b
}

func (b *bed) listen() {
	b.t.Helper()
	var err error
	b.ep, err = b.srv.Listen("default/test", b.path, func(context.Context) (block.Device, error) {
		if b.device != nil {
			return b.device, nil
		}
		return b.dev, nil
	})
	if err != nil {
		b.t.Fatal(err)
	}
}

// restart replaces the server, as if the daemon had been started anew.
func (b *bed) restart() {
	b.t.Helper()
	b.srv.Close()
	srv, err := NewServer(b.srv.cfg)
	if err != nil {
		b.t.Fatal(err)
	}
	b.t.Cleanup(srv.Close)
	b.srv = srv
	b.listen()
}

// guest is the memory and the rings that outlive a front end's connection.
type guest struct {
	t        testing.TB
	fd       int
	mem      *mem.Mapping
	rings    []*guestRing
	features uint64
	inflight int // descriptor
	inflMsg  wire.Inflight
	next     uint64 // in the data area
}

type guestRing struct {
	*virtq.DriverRing
	at         uint64 // offset in memory
	layout     virtq.DriverLayout
	kick, call int
	written    map[uint16]uint32 // of ended requests
}

func newGuest(t testing.TB, rings, size int, features uint64) *guest {
	t.Helper()
	fd, err := mem.CreateMemfd("guest", testMemBytes)
	if err != nil {
		t.Fatal(err)
	}
	m, err := mem.Map(fd, 0, testMemBytes)
	if err != nil {
		t.Fatal(err)
	}
	g := &guest{t: t, fd: fd, mem: m, features: features | wire.FeatureProtocolFeatures | virtq.FeatureVersion1, inflight: -1, next: testDataAt}
	for i := range rings {
		r := &guestRing{at: uint64(i) * testRingBytes, written: map[uint16]uint32{}}
		if r.layout, err = virtq.DriverRingLayout(size); err != nil {
			t.Fatal(err)
		}
		r.DriverRing, err = virtq.NewDriverRing(m.Bytes()[r.at:][:testRingBytes], size, features&virtq.FeatureEventIdx != 0)
		if err != nil {
			t.Fatal(err)
		}
		for _, p := range []*int{&r.kick, &r.call} {
			if *p, err = mem.NewEventFD(); err != nil {
				t.Fatal(err)
			}
		}
		g.rings = append(g.rings, r)
	}
	t.Cleanup(func() {
		m.Release()
		unix.Close(fd)
		if g.inflight >= 0 {
			unix.Close(g.inflight)
		}
		for _, r := range g.rings {
			unix.Close(r.kick)
			unix.Close(r.call)
		}
	})
	return g
}

func (g *guest) region() wire.Region {
	return wire.Region{GuestAddr: testGuestBase, Size: testMemBytes, UserAddr: testUserBase}
}

// alloc returns the offset of n bytes, 4 KiB aligned; they are never freed.
func (g *guest) alloc(n int) uint64 {
	at := g.next
	g.next += uint64(n+4095) &^ 4095
	if g.next > testMemBytes {
		at, g.next = testDataAt, testDataAt+uint64(n+4095)&^4095
	}
	return at
}

// blkRequest is one request as it lies in guest memory.
type blkRequest struct {
	ring   int
	head   uint16
	data   uint64 // offset
	n      int
	status uint64 // offset
}

// add puts a request into a ring without showing it.
func (g *guest) add(ring int, typ uint32, sector uint64, data []byte, read int) blkRequest {
	g.t.Helper()
	b := g.mem.Bytes()
	n := max(len(data), read)
	at := g.alloc(4096 + n)
	hdr, status, buf := at, at+64, at+4096
	binary.LittleEndian.PutUint32(b[hdr:], typ)
	binary.LittleEndian.PutUint32(b[hdr+4:], 0)
	binary.LittleEndian.PutUint64(b[hdr+8:], sector)
	b[status] = 0xff
	copy(b[buf:], data)
	segs := []virtq.DriverSegment{{Addr: testGuestBase + hdr, Len: 16}}
	for off := 0; off < n; off += 4096 {
		segs = append(segs, virtq.DriverSegment{Addr: testGuestBase + buf + uint64(off), Len: uint32(min(4096, n-off)), Write: read > 0})
	}
	segs = append(segs, virtq.DriverSegment{Addr: testGuestBase + status, Len: 1, Write: true})
	r := g.rings[ring]
	var head uint16
	ok := false
	if g.features&virtq.FeatureIndirect != 0 {
		table := at + 128
		for i, s := range segs {
			d := b[table+16*uint64(i):]
			binary.LittleEndian.PutUint64(d, s.Addr)
			binary.LittleEndian.PutUint32(d[8:], s.Len)
			flags := uint16(0)
			if s.Write {
				flags = virtq.DescWrite
			}
			if i+1 < len(segs) {
				flags |= virtq.DescNext
			}
			binary.LittleEndian.PutUint16(d[12:], flags)
			binary.LittleEndian.PutUint16(d[14:], uint16(i+1))
		}
		head, ok = r.AddIndirect(testGuestBase+table, uint32(16*len(segs)))
	} else {
		head, ok = r.Add(segs)
	}
	if !ok {
		g.t.Fatal("test ring is full")
	}
	return blkRequest{ring: ring, head: head, data: buf, n: n, status: status}
}

// publish shows what was added and kicks if the device wants it.
func (g *guest) publish(ring int) {
	g.t.Helper()
	r := g.rings[ring]
	if r.Publish() {
		if err := mem.SignalEventFD(r.kick); err != nil {
			g.t.Fatal(err)
		}
	}
}

// reap takes what has ended, without waiting.
func (g *guest) reap(ring int) {
	g.t.Helper()
	r := g.rings[ring]
	for {
		head, n, ok, err := r.Poll()
		if err != nil {
			g.t.Fatal(err)
		}
		if !ok {
			return
		}
		r.written[head] = n
	}
}

// wait waits for a request by sleeping on the call descriptor, and returns its
// status.
func (g *guest) wait(q blkRequest) byte {
	g.t.Helper()
	r := g.rings[q.ring]
	end := time.Now().Add(testTimeout)
	for {
		g.reap(q.ring)
		if _, ok := r.written[q.head]; ok {
			delete(r.written, q.head)
			return g.mem.Bytes()[q.status]
		}
		if r.EnableCall() {
			continue
		}
		p := []unix.PollFd{{Fd: int32(r.call), Events: unix.POLLIN}}
		if n, _ := unix.Poll(p, 1000); n > 0 {
			_, _ = mem.DrainEventFD(r.call)
		}
		if time.Now().After(end) {
			buf := make([]byte, 1<<20)
			g.t.Fatalf("request at head %d did not end\n%s", q.head, buf[:runtime.Stack(buf, true)])
		}
	}
}

func (g *guest) do(ring int, typ uint32, sector uint64, data []byte, read int) (byte, []byte) {
	g.t.Helper()
	q := g.add(ring, typ, sector, data, read)
	g.publish(ring)
	st := g.wait(q)
	return st, g.mem.Bytes()[q.data:][:q.n]
}

// frontEnd is a connection.
type frontEnd struct {
	t    testing.TB
	conn *net.UnixConn
}

func dial(t testing.TB, path string) *frontEnd {
	t.Helper()
	conn, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return &frontEnd{t: t, conn: conn}
}

func (f *frontEnd) send(r wire.Request, flags uint32, payload []byte, fds ...int) error {
	return mem.WriteFull(f.conn, wire.AppendMessage(nil, r, flags, payload), fds...)
}

func (f *frontEnd) recv(want wire.Request) ([]byte, []int, error) {
	_ = f.conn.SetReadDeadline(time.Now().Add(testTimeout))
	var head [wire.HeaderSize]byte
	fds, err := mem.ReadFull(f.conn, head[:], wire.MaxFDs)
	if err != nil {
		return nil, nil, err
	}
	h, err := wire.ParseHeader(head[:])
	if err != nil {
		return nil, nil, err
	}
	if err := wire.CheckReply(h, want); err != nil {
		return nil, nil, err
	}
	p := make([]byte, h.Size)
	_, err = mem.ReadFull(f.conn, p, 0)
	return p, fds, err
}

// set sends a message and waits for its acknowledgement.
func (f *frontEnd) set(r wire.Request, payload []byte, fds ...int) error {
	if err := f.send(r, wire.FlagNeedReply, payload, fds...); err != nil {
		return err
	}
	p, _, err := f.recv(r)
	if err != nil {
		return err
	}
	if v, err := wire.DecodeU64(r, p); err != nil || v != 0 {
		return fmt.Errorf("%v: acknowledged with %d: %v", r, v, err)
	}
	return nil
}

func (f *frontEnd) must(r wire.Request, payload []byte, fds ...int) {
	f.t.Helper()
	if err := f.set(r, payload, fds...); err != nil {
		f.t.Fatal(err)
	}
}

func (f *frontEnd) get(r wire.Request, payload []byte) []byte {
	f.t.Helper()
	if err := f.send(r, 0, payload); err != nil {
		f.t.Fatal(err)
	}
	p, fds, err := f.recv(r)
	if err != nil {
		f.t.Fatal(err)
	}
	mem.CloseAll(fds)
	return p
}

func (f *frontEnd) getU64(r wire.Request) uint64 {
	f.t.Helper()
	v, err := wire.DecodeU64(r, f.get(r, nil))
	if err != nil {
		f.t.Fatal(err)
	}
	return v
}

// hello negotiates.
func (f *frontEnd) hello(features uint64) {
	f.t.Helper()
	offered := f.getU64(wire.GetFeatures)
	if features&^offered != 0 {
		f.t.Fatalf("features %#x wanted, %#x offered", features, offered)
	}
	proto := f.getU64(wire.GetProtocolFeatures)
	if err := f.send(wire.SetProtocolFeatures, 0, wire.AppendU64(nil, proto)); err != nil {
		f.t.Fatal(err)
	}
	f.must(wire.SetOwner, nil)
	f.must(wire.SetFeatures, wire.AppendU64(nil, features))
}

// memory passes a guest's memory as one table.
func (f *frontEnd) memory(g *guest) {
	f.t.Helper()
	f.must(wire.SetMemTable, wire.AppendMemTable(nil, []wire.Region{g.region()}), g.fd)
}

// tracked passes the in-flight area, a new one if the guest has none.
func (f *frontEnd) tracked(g *guest) {
	f.t.Helper()
	if g.inflight < 0 {
		want := wire.Inflight{Queues: uint16(len(g.rings)), QueueSize: uint16(g.rings[0].Size())}
		if err := f.send(wire.GetInflightFD, 0, want.Append(nil)); err != nil {
			f.t.Fatal(err)
		}
		p, fds, err := f.recv(wire.GetInflightFD)
		if err != nil || len(fds) != 1 {
			f.t.Fatal(err, fds)
		}
		g.inflight = fds[0]
		if g.inflMsg, err = wire.DecodeInflight(wire.GetInflightFD, p); err != nil {
			f.t.Fatal(err)
		}
	}
	f.must(wire.SetInflightFD, g.inflMsg.Append(nil), g.inflight)
}

func (g *guest) addr(ring int, flags uint32) wire.VringAddr {
	r := g.rings[ring]
	return wire.VringAddr{
		Index: uint32(ring), Flags: flags, Log: testGuestBase + r.at + r.layout.Used,
		Desc: testUserBase + r.at + r.layout.Desc, Avail: testUserBase + r.at + r.layout.Avail, Used: testUserBase + r.at + r.layout.Used,
	}
}

// configure does all for a ring but enabling it.
func (f *frontEnd) configure(g *guest, ring int, base uint16) {
	f.t.Helper()
	r := g.rings[ring]
	i := uint32(ring)
	f.must(wire.SetVringNum, wire.VringState{Index: i, Num: uint32(r.Size())}.Append(nil))
	f.must(wire.SetVringBase, wire.VringState{Index: i, Num: uint32(base)}.Append(nil))
	f.must(wire.SetVringAddr, g.addr(ring, 0).Append(nil))
	f.must(wire.SetVringCall, wire.VringFD{Index: uint8(i)}.Append(nil), r.call)
	f.must(wire.SetVringKick, wire.VringFD{Index: uint8(i)}.Append(nil), r.kick)
}

func (f *frontEnd) enable(ring int, on uint32) error {
	return f.set(wire.SetVringEnable, wire.VringState{Index: uint32(ring), Num: on}.Append(nil))
}

// start connects a guest whole.
func start(t testing.TB, path string, g *guest) *frontEnd {
	t.Helper()
	f := dial(t, path)
	f.hello(g.features)
	f.memory(g)
	if g.inflight >= 0 {
		f.tracked(g)
	}
	for i, r := range g.rings {
		f.configure(g, i, r.UsedIndex())
		if err := f.enable(i, 1); err != nil {
			t.Fatal(err)
		}
	}
	return f
}

// stopRing returns the base.
func (f *frontEnd) stopRing(ring int) uint16 {
	f.t.Helper()
	v, err := wire.DecodeVringState(wire.GetVringBase, f.get(wire.GetVringBase, wire.VringState{Index: uint32(ring)}.Append(nil)))
	if err != nil {
		f.t.Fatal(err)
	}
	return uint16(v.Num)
}
