package vhost

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"slices"
	"testing"

	"golang.org/x/sys/unix"

	"scoria/driver/block"
	"scoria/shm/mem"
	"scoria/vhost/virtq"
	"scoria/vhost/wire"
)

// The daemon ends with requests in flight; the next one carries them out in
// the order in which the guest made them, the first descriptor included, and
// the guest sees no error.
func TestP3RequestsInFlightAreResubmitted(t *testing.T) {
	for _, features := range []uint64{0, virtq.FeatureIndirect | virtq.FeatureEventIdx} {
		for _, completed := range []int{0, 1, 5} {
			t.Run(fmt.Sprintf("features=%#x/completed=%d", features, completed), func(t *testing.T) {
				b := newBed(t, Config{})
				g := newGuest(t, 1, 16, testFeatures|features)
				f := dial(t, b.path)
				f.hello(g.features)
				f.memory(g)
				f.tracked(g)
				f.configure(g, 0, 0)
				if err := f.enable(0, 1); err != nil {
					t.Fatal(err)
				}
				for i := range completed {
					g.do(0, blkOut, uint64(i), pattern(512, i), 0)
				}
				b.dev.set(func(d *ramDevice) { d.hold, d.log = true, nil })
				var reqs []blkRequest
				var want []string
				for i := range 5 {
					reqs = append(reqs, g.add(0, blkOut, uint64(100+i), pattern(512, i), 0))
					want = append(want, fmt.Sprintf("write %d", (100+i)*512))
				}
				g.publish(0)
				hurry(t, "requests at the device", func() bool { return b.dev.heldCount() == 5 })
				b.restart()
				if g.rings[0].Pending() {
					t.Fatal("a canceled request was answered")
				}
				b.dev.setHold(false)
				f.conn.Close()
				start(t, b.path, g)
				if n := b.ep.Stats().Resubmitted; n != 5 {
					t.Fatalf("%d requests resubmitted, want 5", n)
				}
				for _, q := range reqs {
					if st := g.wait(q); st != statusOK {
						t.Fatalf("status %d", st)
					}
				}
				b.dev.set(func(d *ramDevice) {
					if !slices.Equal(d.log, want) {
						t.Fatalf("carried out %v, want %v", d.log, want)
					}
				})
				g.do(0, blkFlush, 0, nil, 0)
			})
		}
	}
}

// Answers that were given out of order must not be resubmitted, the others must.
func TestP3OutOfOrderAnswersBeforeTheRestart(t *testing.T) {
	b := newBed(t, Config{})
	g := newGuest(t, 1, 16, testFeatures|virtq.FeatureIndirect)
	f := dial(t, b.path)
	f.hello(g.features)
	f.memory(g)
	f.tracked(g)
	f.configure(g, 0, 0)
	if err := f.enable(0, 1); err != nil {
		t.Fatal(err)
	}
	b.dev.setHold(true)
	var reqs []blkRequest
	for i := range 6 {
		reqs = append(reqs, g.add(0, blkOut, uint64(i), pattern(512, i), 0))
	}
	g.publish(0)
	hurry(t, "requests at the device", func() bool { return b.dev.heldCount() == 6 })
	var rest []*block.Request
	b.dev.set(func(d *ramDevice) { rest, d.held = d.held[:3], d.held[3:] })
	b.dev.let(func(int) []int { return []int{2, 0, 1} })
	for _, q := range reqs[3:] {
		g.wait(q)
	}
	b.dev.set(func(d *ramDevice) { d.held, d.log = rest, nil })
	b.restart()
	f.conn.Close()
	start(t, b.path, g)
	for _, q := range reqs[:3] {
		if st := g.wait(q); st != statusOK {
			t.Fatal(st)
		}
	}
	b.dev.set(func(d *ramDevice) {
		if want := []string{"write 0", "write 512", "write 1024"}; !slices.Equal(d.log, want) {
			t.Fatalf("carried out %v, want %v", d.log, want)
		}
	})
}

// An answer whose signal was lost with the old daemon, or with the descriptor
// that QEMU closed when the connection ended, is signalled when the ring starts.
func TestP3SignalLostWithTheOldDaemon(t *testing.T) {
	b := newBed(t, Config{})
	g := newGuest(t, 1, 16, testFeatures|virtq.FeatureEventIdx)
	f := start(t, b.path, g)
	q := g.add(0, blkOut, 0, pattern(512, 1), 0)
	g.publish(0)
	hurry(t, "answer", g.rings[0].Pending)
	f.conn.Close()
	b.restart()
	_, _ = mem.DrainEventFD(g.rings[0].call)
	start(t, b.path, g)
	hurry(t, "signal", func() bool { set, _ := mem.DrainEventFD(g.rings[0].call); return set })
	g.wait(q)
}

// QEMU ends with requests in flight and comes back, the daemon staying.
func TestFrontEndReconnects(t *testing.T) {
	b := newBed(t, Config{})
	g := newGuest(t, 1, 16, testFeatures)
	f := start(t, b.path, g)
	b.dev.setHold(true)
	g.add(0, blkOut, 0, pattern(512, 1), 0)
	g.publish(0)
	hurry(t, "request at the device", func() bool { return b.dev.heldCount() == 1 })
	f.conn.Close()
	g2 := newGuest(t, 1, 16, testFeatures)
	b.dev.setHold(false)
	start(t, b.path, g2)
	if st, _ := g2.do(0, blkOut, 0, pattern(512, 2), 0); st != statusOK {
		t.Fatal(st)
	}
	hurry(t, "old session to end", func() bool { return b.ep.Stats().Sessions == 1 })
}

func TestMemorySlotsChangeWhileRunning(t *testing.T) {
	b := newBed(t, Config{})
	g := newGuest(t, 1, 16, testFeatures|virtq.FeatureIndirect)
	f := dial(t, b.path)
	f.hello(g.features)
	// Rings in the first MiB, data in slots of one MiB each.
	slot := func(i int) wire.Region {
		return wire.Region{GuestAddr: testGuestBase + uint64(i)<<20, UserAddr: testUserBase + uint64(i)<<20, Size: 1 << 20, MmapOffset: uint64(i) << 20}
	}
	for i := range 8 {
		f.must(wire.AddMemReg, wire.AppendRegion(nil, slot(i)), g.fd)
	}
	f.configure(g, 0, 0)
	if err := f.enable(0, 1); err != nil {
		t.Fatal(err)
	}
	g.next = 2<<20 - 8192 // a read that crosses from one slot to the next
	q := g.add(0, blkOut, 0, pattern(16384, 3), 0)
	g.publish(0)
	if g.wait(q) != statusOK {
		t.Fatal("write across slots")
	}
	b.dev.setHold(true)
	g.next = 3 << 20
	q = g.add(0, blkIn, 0, nil, 4096)
	g.publish(0)
	hurry(t, "request at the device", func() bool { return b.dev.heldCount() == 1 })
	// The slot that the request points to goes; the request must not fault.
	f.must(wire.RemMemReg, wire.AppendRegion(nil, slot(3)))
	b.dev.let(inOrder)
	if g.wait(q) != statusOK || !bytes.Equal(g.mem.Bytes()[q.data:][:4096], pattern(16384, 3)[:4096]) {
		t.Fatal("request in a slot that was removed")
	}
	f.must(wire.AddMemReg, wire.AppendRegion(nil, slot(3)), g.fd)
	g.next = 3 << 20
	if st, _ := g.do(0, blkIn, 0, nil, 4096); st != statusOK {
		t.Fatal(st)
	}
	f.must(wire.RemMemReg, wire.AppendRegion(nil, slot(4)), g.fd) // some pass a descriptor
	if f.set(wire.RemMemReg, wire.AppendRegion(nil, slot(4))) == nil {
		t.Fatal("a slot could be removed twice")
	}
}

// startLog has f log what the device writes to g's memory, and returns the log.
func startLog(t *testing.T, f *frontEnd, g *guest) *mem.Mapping {
	t.Helper()
	const size = (testGuestBase + testMemBytes) / logPage / 8
	fd, err := mem.CreateMemfd("log", size)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	log, err := mem.Map(fd, 0, size)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(log.Release)
	if err := f.send(wire.SetLogBase, 0, wire.Log{Size: size}.Append(nil), fd); err != nil {
		t.Fatal(err)
	}
	if _, _, err := f.recv(wire.SetLogBase); err != nil {
		t.Fatal(err)
	}
	f.must(wire.SetFeatures, wire.AppendU64(nil, g.features|wire.FeatureLogAll))
	f.must(wire.SetVringAddr, g.addr(0, wire.VringFlagLog).Append(nil))
	return log
}

// marked says whether the page at an offset of guest memory is in the log.
func marked(log *mem.Mapping, off uint64) bool {
	page := (testGuestBase + off) / logPage
	return log.Bytes()[page/8]&(1<<(page%8)) != 0
}

// A front end that connects again while it migrates may have lost what was marked on
// the connection before: all of memory is marked, and only then.
func TestP3DirtyLogAfterReconnect(t *testing.T) {
	b := newBed(t, Config{})
	g := newGuest(t, 1, 16, testFeatures)
	f := start(t, b.path, g)
	if log := startLog(t, f, g); marked(log, testMemBytes-1) {
		t.Fatal("memory is marked that nobody wrote to")
	}
	f.conn.Close()
	b.restart()
	f = dial(t, b.path)
	f.hello(g.features | wire.FeatureLogAll)
	f.memory(g)
	log := startLog(t, f, g)
	for off := uint64(0); off < testMemBytes; off += logPage {
		if !marked(log, off) {
			t.Fatalf("page at %#x of guest memory is not marked", off)
		}
	}
}

// A request that is refused without having been understood is logged for its
// status alone, and not for what its slot was used for before: that may point to
// memory which has been replaced since.
func TestDirtyLogOfUnknownRequest(t *testing.T) {
	b := newBed(t, Config{})
	g := newGuest(t, 1, 16, testFeatures)
	f := start(t, b.path, g)
	read := g.add(0, blkIn, 0, nil, 4096)
	g.publish(0)
	g.wait(read)
	f.memory(g) // mapped anew
	log := startLog(t, f, g)
	unknown := g.add(0, 77, 0, nil, 512)
	g.publish(0)
	if st := g.wait(unknown); st != statusUnsup {
		t.Fatal(st)
	}
	f.stopRing(0) // after the reply, everything is marked
	if !marked(log, unknown.status) || marked(log, read.data) {
		t.Fatalf("status is marked: %v; an earlier request's data is: %v", marked(log, unknown.status), marked(log, read.data))
	}
	if b.ep.Stats().DirtyPages == 0 {
		t.Fatal("no pages were counted")
	}
}

// Everything that is written to guest memory is in the dirty log: data, status
// bytes and the used ring.
func TestDirtyLogHasEverythingWritten(t *testing.T) {
	for _, features := range []uint64{0, virtq.FeatureEventIdx} {
		b := newBed(t, Config{})
		g := newGuest(t, 1, 16, testFeatures|features)
		f := start(t, b.path, g)
		// A request that began before the log did is logged too.
		b.dev.setHold(true)
		early := g.add(0, blkIn, 8, nil, 4096)
		g.publish(0)
		hurry(t, "request at the device", func() bool { return b.dev.heldCount() == 1 })
		log := startLog(t, f, g)
		if marked(log, early.data) {
			t.Fatal("marked before it was written")
		}
		b.dev.let(inOrder)
		g.wait(early)
		read := g.add(0, blkIn, 16, nil, 3*4096)
		write := g.add(0, blkOut, 16, pattern(4096, 1), 0)
		id := g.add(0, blkGetID, 0, nil, 20)
		g.publish(0)
		for _, q := range []blkRequest{read, write, id} {
			g.wait(q)
		}
		f.stopRing(0) // after the reply, everything is marked
		for name, off := range map[string]uint64{
			"early data": early.data, "early status": early.status, "data 0": read.data, "data 1": read.data + 4096, "data 2": read.data + 8192,
			"read status": read.status, "write status": write.status, "id": id.data, "used ring": g.rings[0].at + g.rings[0].layout.Used,
		} {
			if !marked(log, off) {
				t.Errorf("%s is not marked", name)
			}
		}
		if marked(log, write.data) {
			t.Error("memory that was not written is marked")
		}
	}
}

func TestSecondWriterIsRefused(t *testing.T) {
	b := newBed(t, Config{})
	g, g2 := newGuest(t, 1, 16, testFeatures), newGuest(t, 1, 16, testFeatures)
	f := start(t, b.path, g)
	f2 := dial(t, b.path) // connected and configured is fine
	f2.hello(g2.features)
	f2.memory(g2)
	f2.configure(g2, 0, 0)
	g.do(0, blkOut, 0, pattern(512, 1), 0)
	if f2.enable(0, 1) == nil {
		t.Fatal("two front ends have started rings")
	}
	hurry(t, "second session to end", func() bool { return b.ep.Stats().Sessions == 1 })
	st := b.ep.Stats()
	if want := "in use by vhost"; !bytes.Contains([]byte(st.LastDisconnect), []byte(want)) {
		t.Fatalf("reason %q, want %q", st.LastDisconnect, want)
	}
	g.do(0, blkOut, 0, pattern(512, 1), 0)
	// As QEMU to QEMU on one host does: the other one starts when the first stopped.
	f3 := dial(t, b.path)
	f3.hello(g2.features)
	f3.memory(g2)
	f3.configure(g2, 0, 0)
	f.stopRing(0)
	if err := f3.enable(0, 1); err != nil {
		t.Fatal(err)
	}
	g2.do(0, blkOut, 0, pattern(512, 1), 0)
}

func TestSocketTakeover(t *testing.T) {
	b := newBed(t, Config{})
	open := func(context.Context) (block.Device, error) { return b.dev, nil }
	if _, err := b.srv.Listen("default/other", b.path, open); !errors.Is(err, ErrSocketInUse) {
		t.Fatalf("a served socket was taken over: %v", err)
	}
	stale := b.path + ".stale"
	ln, err := net.ListenUnix("unix", &net.UnixAddr{Name: stale, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	ln.SetUnlinkOnClose(false)
	ln.Close() // as a dead daemon leaves it
	e, err := b.srv.Listen("default/other", stale, open)
	if err != nil {
		t.Fatal(err)
	}
	if st, err := os.Stat(stale); err != nil || st.Mode().Perm() != 0o660 {
		t.Fatal(st, err)
	}
	dial(t, stale).hello(wire.FeatureProtocolFeatures)
	e.Close()
	if _, err := os.Lstat(stale); !errors.Is(err, os.ErrNotExist) {
		t.Fatal("socket left behind")
	}
	plain := b.path + ".file"
	if err := os.WriteFile(plain, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := b.srv.Listen("default/other", plain, open); err == nil {
		t.Fatal("a plain file was replaced")
	}
}
