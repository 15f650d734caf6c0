package nbd

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"sync/atomic"
	"testing"

	"scoria/driver/block"
	"scoria/driver/block/blocktest"
)

// snapped is a device with snapshots monday and tuesday: every second 64 KiB
// changed since monday, nothing since tuesday.
type snapped struct {
	*blocktest.RAM
	open *atomic.Int64 // not yet released
}

func (d snapped) Since(context.Context) ([]string, error) { return []string{"monday", "tuesday"}, nil }

func (d snapped) Changes(_ context.Context, since string, off, length uint64, fn func(block.Extent) bool) error {
	if since != "monday" && since != "tuesday" {
		return fmt.Errorf("snapshot %s: %w", since, block.ErrNotFound)
	}
	for at := off; at < off+length; {
		end := min((at|0xffff)+1, off+length)
		if !fn(block.Extent{Offset: at, Length: end - at, Mapped: since == "monday" && at>>16&1 == 1}) {
			break
		}
		at = end
	}
	return nil
}

func (d snapped) Release() { d.open.Add(-1) }

// snappedPool opens its devices as snapped.
type snappedPool struct {
	*blocktest.Pool
	open atomic.Int64
}

func (p *snappedPool) Open(ctx context.Context, name string) (block.Device, error) {
	dev, err := p.Pool.Open(ctx, name)
	if err != nil {
		return nil, err
	}
	p.open.Add(1)
	return snapped{dev.(*blocktest.RAM), &p.open}, nil
}

func serveSnapped(t *testing.T) (*fixture, *snappedPool) {
	t.Helper()
	pool := &snappedPool{}
	f := serve(t, func(s *Server) {
		pool.Pool = s.Opener.(*blocktest.Pool)
		s.Opener = pool
	}, blocktest.NewRAM(1<<20, blocktest.Options{Name: "default/vm1"}))
	return f, pool
}

// contexts sends a metadata option and returns the names in the replies.
func (c *client) contexts(option uint32, export string, queries ...string) (names []string, last uint32) {
	c.Helper()
	for _, r := range c.option(option, metaRequest(export, queries...)) {
		if r.typ == repMeta {
			names = append(names, string(r.data[4:]))
		}
		last = r.typ
	}
	return names, last
}

func TestContextsAreListed(t *testing.T) {
	f, pool := serveSnapped(t)
	c := f.dial(t)
	c.option(optStructuredReply, nil)
	since := []string{"scoria:since=monday", "scoria:since=tuesday"}
	bitmaps := []string{"qemu:dirty-bitmap:monday", "qemu:dirty-bitmap:tuesday"}
	for _, tt := range []struct{ queries, want []string }{
		{nil, slices.Concat([]string{"base:allocation"}, since, bitmaps)},
		{[]string{"base:"}, []string{"base:allocation"}},
		{[]string{"scoria:"}, since},
		{[]string{"scoria:since="}, since},
		{[]string{"qemu:"}, bitmaps},
		{[]string{"qemu:dirty-bitmap:", "scoria:since=monday"}, slices.Concat(since[:1], bitmaps)},
		{[]string{"scoria:since=friday", "x:"}, nil},
	} {
		names, last := c.contexts(optListMeta, "vm1", tt.queries...)
		if !slices.Equal(names, tt.want) || last != repAck {
			t.Errorf("%q lists %q, %#x; want %q", tt.queries, names, last, tt.want)
		}
	}
	await("release of the devices that were looked at", func() bool { return pool.open.Load() == 0 })
}

// TestChangesSinceSnapshots: each selected context has its own chunk with its own
// states, and unknown ones are ignored.
func TestChangesSinceSnapshots(t *testing.T) {
	f, pool := serveSnapped(t)
	c := f.dial(t)
	c.option(optStructuredReply, nil)
	c.structured = true
	want := []string{"scoria:since=tuesday", "base:allocation", "qemu:dirty-bitmap:monday"}
	names, _ := c.contexts(optSetMeta, "vm1", slices.Insert(slices.Clone(want), 1, "scoria:since=friday", "scoria:")...)
	if !slices.Equal(names, want) {
		t.Fatalf("selected %q; want %q", names, want)
	}
	c.mustGo("vm1")
	c.write(0, make([]byte, 64<<10))
	c.start(cmdBlockStatus, 0, 0, 256<<10, nil)
	got := map[uint32][][2]uint32{}
	for last := false; !last; {
		h := c.bytes(20)
		p := c.bytes(int(binary.BigEndian.Uint32(h[16:])))
		if binary.BigEndian.Uint16(h[6:]) != chunkBlockStatus {
			t.Fatalf("a chunk of type %d: %q", binary.BigEndian.Uint16(h[6:]), p)
		}
		last = binary.BigEndian.Uint16(h[4:])&chunkDone != 0
		id := binary.BigEndian.Uint32(p)
		for p = p[4:]; len(p) > 0; p = p[8:] {
			got[id] = append(got[id], [2]uint32{binary.BigEndian.Uint32(p), binary.BigEndian.Uint32(p[4:])})
		}
	}
	for id, w := range map[uint32][][2]uint32{
		1: {{256 << 10, 0}},
		2: {{64 << 10, 0}, {192 << 10, stateHole | stateZero}},
		3: {{64 << 10, 0}, {64 << 10, stateChanged}, {64 << 10, 0}, {64 << 10, stateChanged}},
	} {
		if !slices.Equal(got[id], w) {
			t.Errorf("%s: %v; want %v", want[id-1], got[id], w)
		}
	}
	if n := pool.open.Load(); n != 1 {
		t.Errorf("%d devices are open with one connection", n)
	}
	c.nc.Close()
	await("release of the device", func() bool { return pool.open.Load() == 0 })
}

// TestContextsOfAnotherExport don't count.
func TestContextsOfAnotherExport(t *testing.T) {
	f, _ := serveSnapped(t)
	f.pool.Add(blocktest.NewRAM(1<<20, blocktest.Options{Name: "default/vm2"}))
	c := f.dial(t)
	c.option(optStructuredReply, nil)
	c.structured = true
	c.contexts(optSetMeta, "vm1", "scoria:since=monday")
	c.mustGo("vm2")
	if r := c.do(cmdBlockStatus, 0, 0, 4096, nil); r.code != eInval {
		t.Errorf("block status: %d %s; want EINVAL", r.code, r.message)
	}
	// A volume that is not there has no snapshots, but may be made by NBD_OPT_GO.
	c = f.dial(t)
	c.option(optStructuredReply, nil)
	if names, last := c.contexts(optSetMeta, "new:size=1M", "scoria:since=monday", "base:allocation"); last != repAck || !slices.Equal(names, []string{"base:allocation"}) {
		t.Errorf("selected %q, %#x", names, last)
	}
}

// TestToolsSeeChanges: libnbd's and QEMU's tools ask by both names.
func TestToolsSeeChanges(t *testing.T) {
	info, img := tool(t, "nbdinfo"), tool(t, "qemu-img")
	f, pool := serveSnapped(t)
	var extents []struct{ Offset, Length, Type uint64 }
	for _, name := range []string{"scoria:since=monday", "qemu:dirty-bitmap:monday"} {
		out := must(t, info, "--json", "--map="+name, f.uri("vm1"))
		if err := json.Unmarshal([]byte(out), &extents); err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
		if len(extents) != 16 || extents[1].Type != stateChanged || extents[1].Offset != 64<<10 || extents[2].Type != 0 {
			t.Errorf("%s: %+v", name, extents)
		}
	}
	if out := must(t, info, "--list", "nbd+unix://?socket="+f.path); !strings.Contains(out, "scoria:since=tuesday") {
		t.Errorf("nbdinfo --list: %s", out)
	}
	out := must(t, img, "map", "--output=json", "--image-opts",
		"driver=nbd,server.type=unix,server.path="+f.path+",export=default/vm1,x-dirty-bitmap=qemu:dirty-bitmap:monday")
	var runs []struct {
		Start uint64
		Data  bool
	}
	if err := json.NewDecoder(bytes.NewReader([]byte(out))).Decode(&runs); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	// QEMU shows what is dirty as no data.
	if len(runs) != 16 || !runs[0].Data || runs[1].Data {
		t.Errorf("qemu-img map: %+v", runs)
	}
	await("release of the devices", func() bool { return pool.open.Load() == 0 })
}
