package vhost

import (
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"scoria/shm/mem"
	"scoria/vhost/wire"
)

// TestP7ConnectionsAreLimited: a front end that connects again and again takes
// nothing of other volumes'; and when it lets go, there is room again.
func TestP7ConnectionsAreLimited(t *testing.T) {
	b := newBed(t, Config{})
	var held []*frontEnd
	for range maxSessions {
		held = append(held, dial(t, b.path))
	}
	hurry(t, "all connections", func() bool { return b.ep.Stats().Sessions == maxSessions })
	dial(t, b.path)
	hurry(t, "the one too many to be refused", func() bool { return strings.Contains(b.ep.Stats().LastDisconnect, errTooMany.Error()) })
	if n := b.ep.Stats().Sessions; n != maxSessions {
		t.Fatalf("%d connections", n)
	}
	other := &bed{t: t, srv: b.srv, dev: newRAMDevice(1 << 20), path: b.path + ".other"}
	other.listen()
	g := newGuest(t, 1, 16, testFeatures)
	start(t, other.path, g)
	if st, _ := g.do(0, blkOut, 0, pattern(512, 1), 0); st != statusOK {
		t.Fatal(st)
	}
	held[0].conn.Close()
	hurry(t, "one to end", func() bool { return b.ep.Stats().Sessions == maxSessions-1 })
	g2 := newGuest(t, 1, 16, testFeatures)
	start(t, b.path, g2)
	if st, _ := g2.do(0, blkOut, 0, pattern(512, 1), 0); st != statusOK {
		t.Fatal(st)
	}
}

// TestP7MappedMemoryIsLimited: sparse files of any size cost a front end nothing;
// the daemon's address space and its number of mappings are everybody's. Each way
// to have something mapped ends the session that is over the limit, and what it
// had comes back.
func TestP7MappedMemoryIsLimited(t *testing.T) {
	const limit = 64 << 20
	slot := func(i, size uint64) wire.Region {
		return wire.Region{GuestAddr: i << 40, UserAddr: i << 40, Size: size}
	}
	for _, c := range []struct {
		name string
		do   func(f *frontEnd, g *guest, sparse int)
		want string
	}{
		{"memory slots", func(f *frontEnd, _ *guest, sparse int) {
			for i := range uint64(9) {
				_ = f.send(wire.AddMemReg, 0, wire.AppendRegion(nil, slot(i, limit/8)), sparse)
			}
		}, "bytes are mapped"},
		{"memory table", func(f *frontEnd, _ *guest, sparse int) {
			_ = f.send(wire.SetMemTable, 0, wire.AppendMemTable(nil, []wire.Region{slot(1, limit/2), slot(2, limit/2+4096)}), sparse, sparse)
		}, "bytes are mapped"},
		{"dirty log", func(f *frontEnd, _ *guest, sparse int) {
			_ = f.send(wire.SetLogBase, 0, wire.Log{Size: limit + 4096}.Append(nil), sparse)
		}, "bytes are mapped"},
		{"in-flight area", func(f *frontEnd, _ *guest, sparse int) {
			_ = f.send(wire.SetInflightFD, 0, wire.Inflight{MmapSize: limit + 4096, Queues: 1, QueueSize: 16}.Append(nil), sparse)
		}, "bytes are mapped"},
	} {
		t.Run(c.name, func(t *testing.T) {
			b := newBed(t, Config{endpointBytes: limit})
			sparse, err := mem.CreateMemfd("sparse", 1<<40)
			if err != nil {
				t.Fatal(err)
			}
			defer unix.Close(sparse)
			g := newGuest(t, 1, 16, testFeatures)
			f := dial(t, b.path)
			f.hello(g.features)
			c.do(f, g, sparse)
			f.ends(b, c.want)
			hurry(t, "memory to be unmapped", func() bool { n, m := b.srv.budget.Used(); return n == 0 && m == 0 })
			start(t, b.path, g)
			if st, _ := g.do(0, blkOut, 0, pattern(512, 1), 0); st != statusOK {
				t.Fatal(st)
			}
		})
	}
}

// The number of mappings that all front ends have is bounded with room for the
// daemon's own, and one volume's front ends leave room for others.
func TestP7MappingsAreLimited(t *testing.T) {
	if n := mem.MaxMappings() / 2; maxEndpointMappings > n/4 {
		t.Skipf("the kernel allows %d mappings only", 2*n)
	}
	b := newBed(t, Config{})
	fd, err := mem.CreateMemfd("slots", 1<<20)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	// Each connection keeps as many as it may.
	for n := range uint64(maxSessions) {
		f := dial(t, b.path)
		f.hello(wire.FeatureProtocolFeatures)
		refused := false
		for i := range uint64(mem.MaxRegions) {
			r := wire.Region{GuestAddr: i << 12, UserAddr: i << 12, Size: 4096}
			if f.set(wire.AddMemReg, wire.AppendRegion(nil, r), fd) != nil {
				refused = true
				break
			}
		}
		if refused != (n >= 4) {
			t.Fatalf("connection %d: refused %v", n, refused)
		}
		if refused {
			break
		}
	}
	hurry(t, "that connection to end", func() bool { return strings.Contains(b.ep.Stats().LastDisconnect, mem.ErrBudget.Error()) })
	other := &bed{t: t, srv: b.srv, dev: newRAMDevice(1 << 20), path: b.path + ".other"}
	other.listen()
	g := newGuest(t, 1, 16, testFeatures)
	start(t, other.path, g)
	if st, _ := g.do(0, blkOut, 0, pattern(512, 1), 0); st != statusOK {
		t.Fatal(st)
	}
}
