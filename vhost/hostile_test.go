package vhost

import (
	"encoding/binary"
	"errors"
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"scoria/shm/mem"
	"scoria/shm/worker"
	"scoria/vhost/virtq"
	"scoria/vhost/wire"
)

// rawDesc writes a descriptor as it is.
func (g *guest) rawDesc(i int, addr uint64, n uint32, flags, next uint16) {
	g.rings[0].Descriptors()[i] = virtq.DriverDesc{Addr: addr, Len: n, Flags: flags, Next: next}
}

// TestP7HostileRings shows that whatever lies in a ring ends that session with
// a reason, and that others are served on.
func TestP7HostileRings(t *testing.T) {
	const (
		data = testGuestBase + testDataAt
		next = virtq.DescNext
		wr   = virtq.DescWrite
		ind  = virtq.DescIndirect
	)
	// table writes an indirect table of one descriptor.
	table := func(g *guest, addr uint64, n uint32, flags, nxt uint16) {
		b := g.mem.Bytes()[testDataAt:]
		binary.LittleEndian.PutUint64(b, addr)
		binary.LittleEndian.PutUint32(b[8:], n)
		binary.LittleEndian.PutUint16(b[12:], flags)
		binary.LittleEndian.PutUint16(b[14:], nxt)
	}
	push := func(g *guest, head uint16) { g.rings[0].PushRaw(head) }
	for _, c := range []struct {
		name string
		do   func(g *guest)
		want error
	}{
		{"loop", func(g *guest) { g.rawDesc(0, data, 16, next, 1); g.rawDesc(1, data, 16, next, 0); push(g, 0) }, virtq.ErrLoop},
		{"chain to itself", func(g *guest) { g.rawDesc(3, data, 16, next, 3); push(g, 3) }, virtq.ErrLoop},
		{"next outside the ring", func(g *guest) { g.rawDesc(0, data, 16, next, 16); push(g, 0) }, virtq.ErrHead},
		{"head outside the ring", func(g *guest) { push(g, 16) }, virtq.ErrHead},
		{"head 65535", func(g *guest) { push(g, 65535) }, virtq.ErrHead},
		{"index too far ahead", func(g *guest) { g.rings[0].SetAvailIndexRaw(17) }, virtq.ErrAvailIndex},
		{"index behind", func(g *guest) { g.rings[0].SetAvailIndexRaw(65535) }, virtq.ErrAvailIndex},
		{"empty indirect table", func(g *guest) { g.rawDesc(0, data, 0, ind, 0); push(g, 0) }, virtq.ErrIndirect},
		{"indirect table of 15 bytes", func(g *guest) { g.rawDesc(0, data, 15, ind, 0); push(g, 0) }, virtq.ErrIndirect},
		{"indirect table too long", func(g *guest) { g.rawDesc(0, data, 16*1025, ind, 0); push(g, 0) }, virtq.ErrIndirect},
		{"indirect table outside memory", func(g *guest) { g.rawDesc(0, 0x1000, 16, ind, 0); push(g, 0) }, virtq.ErrIndirect},
		{"indirect table that overflows", func(g *guest) { g.rawDesc(0, ^uint64(0)-7, 16, ind, 0); push(g, 0) }, virtq.ErrIndirect},
		{"indirect with next", func(g *guest) { g.rawDesc(0, data, 16, ind|next, 1); push(g, 0) }, virtq.ErrIndirect},
		{"indirect in indirect", func(g *guest) { table(g, data, 16, ind, 0); g.rawDesc(0, data, 16, ind, 0); push(g, 0) }, virtq.ErrIndirect},
		{"indirect next outside", func(g *guest) { table(g, data, 16, next, 1); g.rawDesc(0, data, 16, ind, 0); push(g, 0) }, virtq.ErrIndirect},
		{"indirect loop", func(g *guest) { table(g, data, 16, next, 0); g.rawDesc(0, data, 16, ind, 0); push(g, 0) }, virtq.ErrLoop},
		{"zero-length descriptor", func(g *guest) { g.rawDesc(0, data, 0, 0, 0); push(g, 0) }, virtq.ErrEmptyDesc},
		{"no status", func(g *guest) { g.rawDesc(0, data, 16, 0, 0); push(g, 0) }, errStatus},
		{"short header", func(g *guest) { g.rawDesc(0, data, 15, next, 1); g.rawDesc(1, data, 1, wr, 0); push(g, 0) }, errHeader},
		{"no header", func(g *guest) { g.rawDesc(0, data, 1, wr, 0); push(g, 0) }, errHeader},
		{"readable after writable", func(g *guest) { g.rawDesc(0, data, 1, wr|next, 1); g.rawDesc(1, data, 16, 0, 0); push(g, 0) }, virtq.ErrOrder},
		{"header outside memory", func(g *guest) { g.rawDesc(0, 0, 16, next, 1); g.rawDesc(1, data, 1, wr, 0); push(g, 0) }, errAddress},
		{"status outside memory", func(g *guest) {
			g.rawDesc(0, data, 16, next, 1)
			g.rawDesc(1, testGuestBase+testMemBytes, 1, wr, 0)
			push(g, 0)
		}, errAddress},
		{"status address overflows", func(g *guest) { g.rawDesc(0, data, 16, next, 1); g.rawDesc(1, ^uint64(0), 2, wr, 0); push(g, 0) }, errAddress},
		{"data across the end of memory", func(g *guest) {
			g.rawDesc(0, data, 16, next, 1)
			g.rawDesc(1, testGuestBase+testMemBytes-512, 1024, wr|next, 2)
			g.rawDesc(2, data, 1, wr, 0)
			push(g, 0)
		}, errAddress},
		{"data that overflows", func(g *guest) {
			g.rawDesc(0, data, 16, next, 1)
			g.rawDesc(1, ^uint64(0)-100, 4096, wr|next, 2)
			g.rawDesc(2, data, 1, wr, 0)
			push(g, 0)
		}, errAddress},
	} {
		t.Run(c.name, func(t *testing.T) {
			b := newBed(t, Config{})
			g := newGuest(t, 1, 16, testFeatures|virtq.FeatureIndirect)
			f := start(t, b.path, g)
			c.do(g)
			g.publish(0)
			_ = mem.SignalEventFD(g.rings[0].kick)
			f.ends(b, c.want.Error())
			// The volume and its socket are untouched.
			g2 := newGuest(t, 1, 16, testFeatures)
			start(t, b.path, g2)
			if st, _ := g2.do(0, blkOut, 0, pattern(512, 1), 0); st != statusOK {
				t.Fatal(st)
			}
		})
	}
}

// A chain that is made available again while it is in flight.
func TestP7HeadInFlightTwice(t *testing.T) {
	b := newBed(t, Config{})
	g := newGuest(t, 1, 16, testFeatures)
	f := start(t, b.path, g)
	b.dev.setHold(true)
	q := g.add(0, blkOut, 0, pattern(512, 1), 0)
	g.rings[0].PushRaw(q.head)
	g.publish(0)
	f.ends(b, virtq.ErrBusy.Error())
}

// ends waits for the end of the connection and checks the reason.
func (f *frontEnd) ends(b *bed, reason string) {
	f.t.Helper()
	_ = f.conn.SetReadDeadline(time.Now().Add(testTimeout))
	var p [256]byte
	for {
		if _, err := f.conn.Read(p[:]); err != nil {
			if errors.Is(err, unix.EAGAIN) || strings.Contains(err.Error(), "timeout") {
				f.t.Fatalf("still connected, want an end for %q", reason)
			}
			break
		}
	}
	hurry(f.t, "session to end", func() bool { return b.ep.Stats().Sessions == 0 })
	if got := b.ep.Stats().LastDisconnect; !strings.Contains(got, reason) {
		f.t.Fatalf("reason %q, want %q in it", got, reason)
	}
}

// TestP7HostileMessages sends what no front end may.
func TestP7HostileMessages(t *testing.T) {
	raw := func(request, flags, size uint32, payload string) func(*frontEnd, *guest) {
		return func(f *frontEnd, _ *guest) {
			p := wire.AppendHeader(nil, wire.Header{Request: wire.Request(request), Flags: flags, Size: size})
			_ = mem.WriteFull(f.conn, append(p, payload...))
		}
	}
	msg := func(r wire.Request, payload []byte, fds func(*guest) []int) func(*frontEnd, *guest) {
		return func(f *frontEnd, g *guest) {
			var list []int
			if fds != nil {
				list = fds(g)
			}
			_ = f.send(r, 0, payload, list...)
		}
	}
	memfd := func(g *guest) []int { return []int{g.fd} }
	// started sends a message that comes too late: ring 0 is started.
	started := func(r wire.Request, payload []byte, fds func(*guest) []int) func(*frontEnd, *guest) {
		return func(f *frontEnd, g *guest) {
			f.memory(g)
			f.configure(g, 0, 0)
			if err := f.enable(0, 1); err != nil {
				f.t.Fatal(err)
			}
			msg(r, payload, fds)(f, g)
		}
	}
	state := func(i, n uint32) []byte { return wire.VringState{Index: i, Num: n}.Append(nil) }
	region := func(change func(*wire.Region)) []byte {
		r := wire.Region{GuestAddr: testGuestBase, UserAddr: testUserBase, Size: testMemBytes}
		change(&r)
		return wire.AppendMemTable(nil, []wire.Region{r})
	}
	for _, c := range []struct {
		name, want string
		do         func(*frontEnd, *guest)
	}{
		{"wrong version", "version", raw(1, 2, 0, "")},
		{"unknown", "unknown message", raw(99, 1, 0, "")},
		{"reply flag", "reply flag", raw(1, 5, 0, "")},
		{"too long", "payload of 4294967295 bytes", raw(5, 1, 0xffffffff, "")},
		{"too short", "payload of 7 bytes", raw(2, 1, 7, "1234567")},
		{"truncated", "unexpected EOF", func(f *frontEnd, g *guest) { raw(2, 1, 8, "123")(f, g); _ = f.conn.CloseWrite() }},
		{"truncated header", "unexpected EOF", func(f *frontEnd, _ *guest) { _, _ = f.conn.Write([]byte{1}); _ = f.conn.CloseWrite() }},
		{"features not offered", "not offered", msg(wire.SetFeatures, wire.AppendU64(nil, 1<<40), nil)},
		{"protocol features not offered", "not offered", msg(wire.SetProtocolFeatures, wire.AppendU64(nil, 1<<14), nil)},
		{"table without descriptor", "file descriptors for 1 regions", msg(wire.SetMemTable, region(func(*wire.Region) {}), nil)},
		{"table with one too many", "2 file descriptors for 1", msg(wire.SetMemTable, region(func(*wire.Region) {}), func(g *guest) []int { return []int{g.fd, g.fd} })},
		{"table of 9", "9 regions", msg(wire.SetMemTable, append([]byte{9, 0, 0, 0, 0, 0, 0, 0}, make([]byte, 256)...), nil)},
		{"nine descriptors", "too many file descriptors", msg(wire.SetMemTable, region(func(*wire.Region) {}), func(g *guest) []int {
			return []int{g.fd, g.fd, g.fd, g.fd, g.fd, g.fd, g.fd, g.fd, g.fd}
		})},
		{"descriptor where none belongs", "1 file descriptors, want 0", msg(wire.SetOwner, nil, memfd)},
		{"empty region", "empty", msg(wire.SetMemTable, region(func(r *wire.Region) { r.Size = 0 }), memfd)},
		{"guest address overflows", "overflows", msg(wire.SetMemTable, region(func(r *wire.Region) { r.GuestAddr = ^uint64(0) - 100 }), memfd)},
		{"user address overflows", "overflows", msg(wire.SetMemTable, region(func(r *wire.Region) { r.UserAddr = ^uint64(0) - 100 }), memfd)},
		{"offset overflows", "overflows", msg(wire.SetMemTable, region(func(r *wire.Region) { r.MmapOffset = 1 << 63 }), memfd)},
		{"region longer than its file", "shorter", msg(wire.SetMemTable, region(func(r *wire.Region) { r.Size += 4096 }), memfd)},
		{"overlapping regions", "overlap", msg(wire.SetMemTable, wire.AppendMemTable(nil, []wire.Region{
			{GuestAddr: 0, UserAddr: 0, Size: 8192}, {GuestAddr: 4096, UserAddr: 1 << 20, Size: 8192}}), func(g *guest) []int { return []int{g.fd, g.fd} })},
		{"ring size 3", "power of two", msg(wire.SetVringNum, state(0, 3), nil)},
		{"ring size 0", "power of two", msg(wire.SetVringNum, state(0, 0), nil)},
		{"ring size 2048", "power of two", msg(wire.SetVringNum, state(0, 2048), nil)},
		{"ring 64", "there are 64", msg(wire.SetVringNum, state(64, 16), nil)},
		{"ring 2^32-1", "there are 64", msg(wire.GetVringBase, state(0xffffffff, 16), nil)},
		{"base 65536", "at most 65535", msg(wire.SetVringBase, state(0, 65536), nil)},
		{"enable 2", "must be 0 or 1", msg(wire.SetVringEnable, state(0, 2), nil)},
		{"unaligned ring", "multiples", msg(wire.SetVringAddr, wire.VringAddr{Desc: 8}.Append(nil), nil)},
		{"kick that is no eventfd", "eventfd", msg(wire.SetVringKick, wire.VringFD{}.Append(nil), memfd)},
		{"kick without descriptor", "0 file descriptors, want 1", msg(wire.SetVringKick, wire.VringFD{}.Append(nil), nil)},
		{"call with high bits", "bits 0 to 8", msg(wire.SetVringCall, wire.AppendU64(nil, 1<<9), nil)},
		{"config too long", "at most 256", msg(wire.GetConfig, wire.Config{Offset: 200, Data: make([]byte, 57)}.Append(nil), nil)},
		{"config shorter than said", "announced", msg(wire.GetConfig, wire.Config{Data: make([]byte, 8)}.Append(nil)[:19], nil)},
		{"set a read-only field", "only the byte at 32", msg(wire.SetConfig, wire.Config{Data: make([]byte, 8)}.Append(nil), nil)},
		{"log without its feature", "LOG_SHMFD", func(f *frontEnd, g *guest) {
			_ = f.send(wire.SetProtocolFeatures, 0, wire.AppendU64(nil, 0))
			msg(wire.SetLogBase, wire.Log{Size: 4096}.Append(nil), memfd)(f, g)
		}},
		{"in-flight area too small", "want", msg(wire.SetInflightFD, wire.Inflight{MmapSize: 64, Queues: 2, QueueSize: 128}.Append(nil), memfd)},
		{"in-flight area for no queue", "0 queues", msg(wire.GetInflightFD, wire.Inflight{}.Append(nil), nil)},
		{"remove memory before there is any", "no such memory region", msg(wire.RemMemReg, wire.AppendRegion(nil, wire.Region{Size: 4096}), nil)},
		{"back-end channel that is no socket", "back-end channel", msg(wire.SetBackendReqFD, nil, memfd)},
		{"ring outside memory", "not in guest memory", func(f *frontEnd, g *guest) {
			f.memory(g)
			f.configure(g, 0, 0)
			a := g.addr(0, 0)
			a.Used += testMemBytes
			f.must(wire.SetVringAddr, a.Append(nil))
			_ = f.enable(0, 1)
		}},
		{"size of a started ring", "started", started(wire.SetVringNum, state(0, 16), nil)},
		{"base of a started ring", "started", started(wire.SetVringBase, state(0, 1), nil)},
		{"in-flight area under a started ring", "started", started(wire.SetInflightFD, wire.Inflight{MmapSize: 1 << 16, Queues: 1, QueueSize: 16}.Append(nil), memfd)},
		{"memory without a started ring's", "not in guest memory", started(wire.SetMemTable, region(func(r *wire.Region) { r.UserAddr += testMemBytes }), memfd)},
		{"no memory under a started ring", "not in guest memory", started(wire.RemMemReg, wire.AppendRegion(nil, (*guest)(nil).region()), nil)},
		{"a started ring moved out of memory", "not in guest memory", started(wire.SetVringAddr, wire.VringAddr{Desc: 16, Avail: 16, Used: 16}.Append(nil), nil)},
		{"a started ring moved to an odd address", "multiples", started(wire.SetVringAddr, wire.VringAddr{Desc: 8}.Append(nil), nil)},
	} {
		t.Run(c.name, func(t *testing.T) {
			b := newBed(t, Config{})
			g := newGuest(t, 1, 16, testFeatures)
			f := dial(t, b.path)
			f.hello(g.features)
			c.do(f, g)
			f.ends(b, c.want)
			dial(t, b.path).hello(wire.FeatureProtocolFeatures)
		})
	}
}

// The front end shrinks the file that its rings or its data lie in while they are
// used.
func TestP7ShrunkMemory(t *testing.T) {
	for _, c := range []struct {
		name string
		keep int64
		do   func(g *guest)
		want string
	}{
		{"rings", 0, func(g *guest) {}, "fault on shared memory"},
		{"data of a write", testDataAt + 4096, func(g *guest) { g.next = testDataAt; g.add(0, blkOut, 0, pattern(512, 1), 0) }, "not accessible"},
		{"data of a read", testDataAt + 4096, func(g *guest) { g.next = testDataAt; g.add(0, blkIn, 0, nil, 4096) }, "not accessible"},
		{"header and status", testDataAt, func(g *guest) { g.next = testDataAt; g.add(0, blkIn, 0, nil, 4096) }, "fault on shared memory"},
	} {
		t.Run(c.name, func(t *testing.T) {
			b := newBed(t, Config{})
			victim := newGuest(t, 1, 16, testFeatures)
			g := newGuest(t, 1, 16, testFeatures)
			f := start(t, b.path, g)
			g.do(0, blkOut, 0, pattern(512, 1), 0)
			c.do(g)
			// A worker that still polls must not see the request before its memory is
			// gone, where the ring survives.
			if c.keep < testDataAt {
				g.rings[0].Publish()
			}
			if err := unix.Ftruncate(g.fd, c.keep); err != nil {
				t.Fatal(err)
			}
			if c.keep >= testDataAt {
				g.rings[0].Publish()
			}
			_ = mem.SignalEventFD(g.rings[0].kick)
			f.ends(b, c.want)
			start(t, b.path, victim)
			if st, _ := victim.do(0, blkOut, 0, pattern(512, 1), 0); st != statusOK {
				t.Fatal(st)
			}
		})
	}
}

// The in-flight area or the dirty log, which are files of their own, shrink.
func TestP7ShrunkAreas(t *testing.T) {
	for _, area := range []string{"in-flight area", "dirty log"} {
		t.Run(area, func(t *testing.T) {
			b := newBed(t, Config{})
			g := newGuest(t, 1, 16, testFeatures)
			f := dial(t, b.path)
			f.hello(g.features)
			f.memory(g)
			fd, err := mem.CreateMemfd(area, 1<<20)
			if err != nil {
				t.Fatal(err)
			}
			defer unix.Close(fd)
			if area == "in-flight area" {
				f.must(wire.SetInflightFD, wire.Inflight{MmapSize: 1 << 20, Queues: 1, QueueSize: 16}.Append(nil), fd)
			} else {
				if err := f.send(wire.SetLogBase, 0, wire.Log{Size: 1 << 20}.Append(nil), fd); err != nil {
					t.Fatal(err)
				}
				if _, _, err := f.recv(wire.SetLogBase); err != nil {
					t.Fatal(err)
				}
				f.must(wire.SetFeatures, wire.AppendU64(nil, g.features|wire.FeatureLogAll))
			}
			f.configure(g, 0, 0)
			if err := f.enable(0, 1); err != nil {
				t.Fatal(err)
			}
			if st, _ := g.do(0, blkIn, 0, nil, 4096); st != statusOK {
				t.Fatal(st)
			}
			if err := unix.Ftruncate(fd, 0); err != nil {
				t.Fatal(err)
			}
			g.add(0, blkIn, 0, nil, 4096)
			g.publish(0)
			f.ends(b, "fault on shared memory")
			victim := newGuest(t, 1, 16, testFeatures)
			start(t, b.path, victim)
			if st, _ := victim.do(0, blkOut, 0, pattern(512, 1), 0); st != statusOK {
				t.Fatal(st)
			}
		})
	}
}

// What crosses from one region into nothing, or a ring from one into the next, which
// need not adjoin here, is refused; data that crosses into a region that adjoins is not
// (TestMemorySlotsChangeWhileRunning).
func TestP7AddressesAcrossRegions(t *testing.T) {
	const hole = testMemBytes / 2 // one MiB of guest memory is not there
	regions := []wire.Region{
		{GuestAddr: testGuestBase, UserAddr: testUserBase, Size: hole},
		{GuestAddr: testGuestBase + hole + 1<<20, UserAddr: testUserBase + hole + 1<<20, Size: testMemBytes - hole - 1<<20, MmapOffset: hole + 1<<20},
	}
	edge := uint64(testGuestBase + hole)
	for _, c := range []struct {
		name string
		do   func(g *guest)
		want error
	}{
		{"data", func(g *guest) {
			g.rawDesc(0, testGuestBase+testDataAt, 16, virtq.DescNext, 1)
			g.rawDesc(1, edge-512, 1024, virtq.DescWrite|virtq.DescNext, 2)
			g.rawDesc(2, testGuestBase+testDataAt, 1, virtq.DescWrite, 0)
		}, errAddress},
		{"data over the hole", func(g *guest) {
			g.rawDesc(0, testGuestBase+testDataAt, 16, virtq.DescNext, 1)
			g.rawDesc(1, edge-512, 1<<20+1024, virtq.DescWrite|virtq.DescNext, 2)
			g.rawDesc(2, testGuestBase+testDataAt, 1, virtq.DescWrite, 0)
		}, errAddress},
		{"header", func(g *guest) {
			g.rawDesc(0, edge-8, 16, virtq.DescNext, 1)
			g.rawDesc(1, testGuestBase+testDataAt, 1, virtq.DescWrite, 0)
		}, errAddress},
		{"indirect table", func(g *guest) { g.rawDesc(0, edge-16, 32, virtq.DescIndirect, 0) }, virtq.ErrIndirect},
	} {
		t.Run(c.name, func(t *testing.T) {
			b := newBed(t, Config{})
			g := newGuest(t, 1, 16, testFeatures|virtq.FeatureIndirect)
			f := dial(t, b.path)
			f.hello(g.features)
			f.must(wire.SetMemTable, wire.AppendMemTable(nil, regions), g.fd, g.fd)
			f.configure(g, 0, 0)
			if err := f.enable(0, 1); err != nil {
				t.Fatal(err)
			}
			c.do(g)
			g.rings[0].PushRaw(0)
			g.publish(0)
			f.ends(b, c.want.Error())
		})
	}
	t.Run("ring", func(t *testing.T) {
		b := newBed(t, Config{})
		g := newGuest(t, 1, 16, testFeatures)
		f := dial(t, b.path)
		f.hello(g.features)
		// The descriptor table lies half in the one and half in the other.
		half := uint64(4096)
		f.must(wire.SetMemTable, wire.AppendMemTable(nil, []wire.Region{
			{GuestAddr: testGuestBase, UserAddr: testUserBase, Size: half},
			{GuestAddr: testGuestBase + half, UserAddr: testUserBase + half, Size: testMemBytes - half, MmapOffset: half},
		}), g.fd, g.fd)
		f.configure(g, 0, 0)
		a := g.addr(0, 0)
		a.Desc = testUserBase + half - 128
		f.must(wire.SetVringAddr, a.Append(nil))
		_ = f.enable(0, 1)
		f.ends(b, "not in guest memory")
	})
}

// Memory that is gone when a request of it ends later.
func TestP7ShrunkMemoryUnderRequestsInFlight(t *testing.T) {
	b := newBed(t, Config{})
	g := newGuest(t, 1, 16, testFeatures)
	f := start(t, b.path, g)
	b.dev.setHold(true)
	g.add(0, blkIn, 0, nil, 4096)
	g.add(0, blkOut, 8, pattern(512, 1), 0)
	g.publish(0)
	hurry(t, "requests at the device", func() bool { return b.dev.heldCount() == 2 })
	// The ring stays: a worker that still polls it would find out first.
	if err := unix.Ftruncate(g.fd, testDataAt); err != nil {
		t.Fatal(err)
	}
	b.dev.let(inOrder)
	f.ends(b, "not accessible")
}

// A front end that does not read its replies is disconnected, and hurts nobody else
// meanwhile.
func TestP7FrontEndThatDoesNotRead(t *testing.T) {
	b := newBed(t, Config{replyTimeout: time.Second})
	f := dial(t, b.path)
	f.hello(wire.FeatureProtocolFeatures)
	p := wire.AppendMessage(nil, wire.GetConfig, 0, wire.Config{Data: make([]byte, 256)}.Append(nil))
	_ = f.conn.SetWriteDeadline(time.Now().Add(testTimeout))
	g := newGuest(t, 1, 16, testFeatures)
	start(t, b.path, g)
	for {
		if _, err := f.conn.Write(p); errors.Is(err, os.ErrDeadlineExceeded) {
			t.Fatal("still connected")
		} else if err != nil {
			break
		}
	}
	if st, _ := g.do(0, blkOut, 0, pattern(512, 1), 0); st != statusOK {
		t.Fatal(st)
	}
	hurry(t, "session to end", func() bool { return b.ep.Stats().Sessions == 1 })
	if got := b.ep.Stats().LastDisconnect; !strings.Contains(got, "GET_CONFIG: reply") || !strings.Contains(got, "timeout") {
		t.Fatalf("reason %q", got)
	}
}

// A front end that makes its call descriptor blocking and fills it up stops the
// worker for a moment, and then is gone.
func TestP7CallDescriptorThatBlocks(t *testing.T) {
	b := newBed(t, Config{})
	g := newGuest(t, 1, 16, testFeatures)
	f := start(t, b.path, g)
	g.do(0, blkOut, 0, pattern(512, 1), 0)
	call := g.rings[0].call
	_, _ = mem.DrainEventFD(call)
	if err := unix.SetNonblock(call, false); err != nil {
		t.Fatal(err)
	}
	if _, err := unix.Write(call, binary.LittleEndian.AppendUint64(nil, ^uint64(0)-1)); err != nil {
		t.Fatal(err)
	}
	g.add(0, blkOut, 0, pattern(512, 1), 0)
	g.publish(0)
	f.ends(b, worker.ErrBlockedCall.Error())
	victim := newGuest(t, 1, 16, testFeatures)
	start(t, b.path, victim)
	victim.do(0, blkOut, 0, pattern(512, 1), 0)
}
