package virtq

import (
	"encoding/binary"
	"errors"
	"slices"
	"testing"

	"pgregory.net/rapid"
)

// flatMemory is guest memory from address 0.
type flatMemory []byte

func (m flatMemory) ReadAt(p []byte, addr uint64) bool {
	if addr > uint64(len(m)) || uint64(len(p)) > uint64(len(m))-addr {
		return false
	}
	copy(p, m[addr:])
	return true
}

// rig is a driver's ring with the memory that a device attaches to.
type rig struct {
	drv      *DriverRing
	mem      []byte
	layout   DriverLayout
	inflight []byte
	num      int
	features uint64
}

func newRig(t testing.TB, num int, features uint64) *rig {
	t.Helper()
	l, err := DriverRingLayout(num)
	if err != nil {
		t.Fatal(err)
	}
	mem := driverTestMemory(int(l.Bytes))
	drv, err := NewDriverRing(mem, num, features&FeatureEventIdx != 0)
	if err != nil {
		t.Fatal(err)
	}
	return &rig{drv: drv, mem: mem, layout: l, inflight: driverTestMemory(InflightStride(num)), num: num, features: features}
}

func (r *rig) config() Config {
	return Config{
		Num: r.num, Desc: r.mem[r.layout.Desc:], Avail: r.mem[r.layout.Avail:], Used: r.mem[r.layout.Used:],
		Features: r.features, Inflight: r.inflight, InflightNum: r.num,
	}
}

func (r *rig) attach(t testing.TB) *Queue {
	t.Helper()
	q, err := New(r.config())
	if err != nil {
		t.Fatal(err)
	}
	return q
}

func seg(addr uint64, n uint32, write bool) DriverSegment {
	return DriverSegment{Addr: addr, Len: n, Write: write}
}

func TestQueueTakesAndReturns(t *testing.T) {
	r := newRig(t, 8, FeatureEventIdx)
	q := r.attach(t)
	head, _ := r.drv.Add([]DriverSegment{seg(0x1000, 16, false), seg(0x2000, 512, true), seg(0x3000, 1, true)})
	r.drv.Publish()
	if n, err := q.Ready(); n != 1 || err != nil {
		t.Fatal(n, err)
	}
	var c Chain
	if err := q.Pop(&c, flatMemory(nil)); err != nil {
		t.Fatal(err)
	}
	want := []Desc{{0x1000, 16, DescNext, 1}, {0x2000, 512, DescNext | DescWrite, 2}, {0x3000, 1, DescWrite, 0}}
	if c.Head != head || c.Writable != 1 || !slices.Equal(c.Descs, want) {
		t.Fatalf("%+v", c)
	}
	if q.InUse() != 1 || q.Base() != 1 {
		t.Fatal(q.InUse(), q.Base())
	}
	q.Push(c.Head, 513)
	if r.drv.Pending() {
		t.Fatal("visible before Publish")
	}
	q.Publish()
	if got, n, ok, err := r.drv.Poll(); got != head || n != 513 || !ok || err != nil {
		t.Fatal(got, n, ok, err)
	}
	if !q.NeedSignal() {
		t.Fatal("no signal for the first chain")
	}
	if q.NeedSignal() {
		t.Fatal("a signal for nothing")
	}
}

func TestQueueRefusesMemory(t *testing.T) {
	r := newRig(t, 8, 0)
	for _, c := range []struct {
		name   string
		change func(*Config)
		want   error
	}{
		{"size 0", func(c *Config) { c.Num = 0 }, ErrSize},
		{"size 6", func(c *Config) { c.Num = 6 }, ErrSize},
		{"size 65536", func(c *Config) { c.Num = 65536 }, ErrSize},
		{"short table", func(c *Config) { c.Desc = c.Desc[:127] }, ErrLayout},
		{"short available ring", func(c *Config) { c.Avail = c.Avail[:21] }, ErrLayout},
		{"short used ring", func(c *Config) { c.Used = c.Used[:69] }, ErrLayout},
		{"unaligned table", func(c *Config) { c.Desc = r.mem[8:] }, ErrLayout},
		{"unaligned available ring", func(c *Config) { c.Avail = r.mem[1:] }, ErrLayout},
		{"unaligned used ring", func(c *Config) { c.Used = r.mem[2:] }, ErrLayout},
		{"small area", func(c *Config) { c.InflightNum = 4 }, ErrInflight},
		{"short region", func(c *Config) { c.Inflight = c.Inflight[:100] }, ErrLayout},
	} {
		cfg := r.config()
		c.change(&cfg)
		if _, err := New(cfg); !errors.Is(err, c.want) {
			t.Errorf("%s: %v, want %v", c.name, err, c.want)
		}
	}
	binary.LittleEndian.PutUint16(r.inflight[8:], 2)
	if _, err := New(r.config()); !errors.Is(err, ErrInflight) {
		t.Error("version 2 of the in-flight region was accepted")
	}
	binary.LittleEndian.PutUint16(r.inflight[8:], 1)
	binary.LittleEndian.PutUint16(r.inflight[10:], 16)
	if _, err := New(r.config()); !errors.Is(err, ErrInflight) {
		t.Error("a region for another size was accepted")
	}
}

// The available ring may lie at any even address.
func TestAvailRingAtOddWord(t *testing.T) {
	mem := driverTestMemory(4096)
	cfg := Config{Num: 2, Desc: mem, Avail: mem[66:], Used: mem[128:]}
	q, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	binary.LittleEndian.PutUint64(mem, 0x1000)
	binary.LittleEndian.PutUint32(mem[8:], 16)
	binary.LittleEndian.PutUint16(mem[66:], AvailNoInterrupt)
	binary.LittleEndian.PutUint16(mem[68:], 1)
	if n, err := q.Ready(); n != 1 || err != nil {
		t.Fatal(n, err)
	}
	var c Chain
	if err := q.Pop(&c, flatMemory(nil)); err != nil || len(c.Descs) != 1 {
		t.Fatal(err, c)
	}
	q.NeedSignal()
	q.Push(c.Head, 0)
	q.Publish()
	if q.NeedSignal() {
		t.Fatal("signal although the driver wants none")
	}
}

func TestNotifications(t *testing.T) {
	for _, features := range []uint64{0, FeatureEventIdx} {
		r := newRig(t, 8, features)
		q := r.attach(t)
		one := func() bool {
			r.drv.Add([]DriverSegment{seg(0, 16, false)})
			return r.drv.Publish()
		}
		if q.EnableNotify() {
			t.Fatal("something to take in an empty ring")
		}
		if !one() {
			t.Fatal("no kick after EnableNotify")
		}
		q.DisableNotify()
		if one() {
			t.Fatal("a kick after DisableNotify")
		}
		if !q.EnableNotify() {
			t.Fatal("the recheck missed what came in between")
		}
		var c Chain
		for range 2 {
			if n, err := q.Ready(); n == 0 || err != nil {
				t.Fatal(n, err)
			}
			if err := q.Pop(&c, flatMemory(nil)); err != nil {
				t.Fatal(err)
			}
			q.Push(c.Head, 0)
		}
		q.Publish()
		if q.EnableNotify() {
			t.Fatal("an empty ring has something")
		}
		if !one() {
			t.Fatal("no kick after the second EnableNotify")
		}
	}
}

// TestP3InflightSurvivesACrashAnywhere runs random traffic and lets the device
// die between any two stores that matter. Each chain must be answered, none
// twice, and resubmission keeps the order in which the driver made them.
func TestP3InflightSurvivesACrashAnywhere(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		r := newRig(t, 8, FeatureEventIdx)
		q := r.attach(t)
		var c Chain
		var order []uint16 // taken and not published, oldest first
		pushed := map[uint16]bool{}
		crash := func() {
			var err error
			if q, err = New(r.config()); err != nil {
				rt.Fatal(err)
			}
			clear(pushed)
			n, err := q.Ready()
			if err != nil || n < len(order) {
				rt.Fatal(n, err)
			}
			for _, want := range order {
				if err := q.Pop(&c, flatMemory(nil)); err != nil || c.Head != want {
					rt.Fatalf("resubmitted %d, %v, want %d", c.Head, err, want)
				}
			}
		}
		publish := func(mode int) {
			region := slices.Clone(r.inflight)
			batch := slices.Clone(q.batch)
			q.Publish()
			order = slices.DeleteFunc(order, func(h uint16) bool { return pushed[h] })
			for {
				if _, _, ok, err := r.drv.Poll(); err != nil {
					rt.Fatal(err)
				} else if !ok {
					break
				}
			}
			clear(pushed)
			if mode == 0 {
				return
			}
			// Died after used.idx was stored: the flags of some of the batch were
			// cleared, used_idx was not.
			copy(r.inflight, region)
			for _, h := range batch {
				if rapid.Bool().Draw(rt, "cleared") {
					r.inflight[inflightHeaderBytes+inflightDescBytes*int(h)] = 0
				}
			}
			crash()
		}
		rt.Repeat(map[string]func(*rapid.T){
			"add": func(*rapid.T) {
				for range rapid.IntRange(1, 3).Draw(rt, "n") {
					r.drv.Add([]DriverSegment{seg(0, 16, false)})
				}
				r.drv.Publish()
			},
			"take": func(*rapid.T) {
				if n, err := q.Ready(); err != nil {
					rt.Fatal(err)
				} else if n > 0 {
					if err := q.Pop(&c, flatMemory(nil)); err != nil {
						rt.Fatal(err)
					}
					order = append(order, c.Head)
				}
			},
			"push": func(*rapid.T) {
				var open []uint16
				for _, h := range order {
					if !pushed[h] {
						open = append(open, h)
					}
				}
				if len(open) > 0 {
					h := rapid.SampledFrom(open).Draw(rt, "head")
					q.Push(h, 1)
					pushed[h] = true
				}
			},
			"publish":          func(*rapid.T) { publish(0) },
			"crash in publish": func(*rapid.T) { publish(1) },
			"crash":            func(*rapid.T) { crash() },
			"stop and start":   func(*rapid.T) { publish(0); crash() },
		})
		for h := range order {
			if !pushed[order[h]] {
				q.Push(order[h], 0)
				pushed[order[h]] = true
			}
		}
		publish(0)
		for range r.drv.InFlight() {
			if n, err := q.Ready(); n == 0 || err != nil {
				rt.Fatal(n, err)
			}
			if err := q.Pop(&c, flatMemory(nil)); err != nil {
				rt.Fatal(err)
			}
			q.Push(c.Head, 0)
		}
		q.Publish()
		for r.drv.InFlight() > 0 {
			if _, _, ok, err := r.drv.Poll(); !ok || err != nil {
				rt.Fatal("a chain was lost", err)
			}
		}
	})
}

// A fresh region under a ring that has run for long, as after a migration, has
// no half-returned batch, and descriptor 0 is not skipped.
func TestFreshRegionOfAnOldRing(t *testing.T) {
	r := newRig(t, 8, 0)
	binary.LittleEndian.PutUint16(r.mem[r.layout.Used+2:], 1000)
	binary.LittleEndian.PutUint16(r.mem[r.layout.Avail+2:], 1000)
	q := r.attach(t)
	binary.LittleEndian.PutUint32(r.mem[8:], 16) // descriptor 0
	binary.LittleEndian.PutUint16(r.mem[r.layout.Avail+4+2*(1000%8):], 0)
	binary.LittleEndian.PutUint16(r.mem[r.layout.Avail+2:], 1001)
	var c Chain
	if n, err := q.Ready(); n != 1 || err != nil {
		t.Fatal(n, err)
	}
	if err := q.Pop(&c, flatMemory(nil)); err != nil {
		t.Fatal(err)
	}
	q = r.attach(t) // died with no completion
	if n, err := q.Ready(); n != 1 || err != nil {
		t.Fatalf("descriptor 0 was skipped: %d, %v", n, err)
	}
	if q.Base() != 1001 {
		t.Fatal(q.Base())
	}
}

func TestUsedLogCoversEveryWrite(t *testing.T) {
	r := newRig(t, 4, FeatureEventIdx)
	cfg := r.config()
	written := make([]bool, UsedBytes(4))
	cfg.UsedLog = func(off, n int) {
		for i := range n {
			written[off+i] = true
		}
	}
	q, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	before := slices.Clone(r.mem[r.layout.Used:][:UsedBytes(4)])
	var c Chain
	for range 7 {
		r.drv.Add([]DriverSegment{seg(0, 16, false)})
		r.drv.Add([]DriverSegment{seg(0, 16, false)})
		r.drv.Publish()
		for range 2 {
			if n, _ := q.Ready(); n == 0 {
				t.Fatal("nothing")
			}
			if err := q.Pop(&c, flatMemory(nil)); err != nil {
				t.Fatal(err)
			}
			q.Push(c.Head, 0xffffffff)
		}
		q.Publish()
		q.EnableNotify()
		for i, v := range r.mem[r.layout.Used:][:UsedBytes(4)] {
			if v != before[i] && !written[i] {
				t.Fatalf("byte %d of the used ring was written and not logged", i)
			}
		}
		for range 2 {
			r.drv.Poll()
		}
	}
}

// FuzzQueue attaches to memory full of whatever the driver likes.
func FuzzQueue(f *testing.F) {
	f.Add(uint8(3), uint8(3), []byte("descriptors"))
	f.Add(uint8(0), uint8(0), []byte{})
	f.Fuzz(func(t *testing.T, shift, feat uint8, data []byte) {
		num := 1 << (shift % 6)
		features := uint64(feat&1)*FeatureIndirect | uint64(feat>>1&1)*FeatureEventIdx
		mem := driverTestMemory(4096)
		copy(mem, data)
		avail := (DescTableBytes(num) + 3) &^ 3
		used := (avail + AvailBytes(num) + 3) &^ 3
		cfg := Config{Num: num, Desc: mem, Avail: mem[avail:], Used: mem[used:], Features: features}
		if feat&4 != 0 {
			cfg.Inflight, cfg.InflightNum = mem[2048:], num
		}
		q, err := New(cfg)
		if err != nil {
			return
		}
		var c Chain
		for range 3 * num {
			n, err := q.Ready()
			if n == 0 || err != nil {
				break
			}
			if q.Pop(&c, flatMemory(mem)) != nil {
				break
			}
			if len(c.Descs) > num+MaxIndirect || c.Writable > len(c.Descs) {
				t.Fatalf("chain of %d, writable from %d", len(c.Descs), c.Writable)
			}
			for _, d := range c.Descs {
				if d.Len == 0 {
					t.Fatal("empty descriptor")
				}
			}
			if feat&8 != 0 {
				q.Push(c.Head, 1)
				q.Publish()
				q.NeedSignal()
				q.EnableNotify()
			}
		}
	})
}

// BenchmarkQueue is the device's work for a request of three descriptors, the
// driver's included, in batches of 16.
func BenchmarkQueue(b *testing.B) {
	for _, bench := range []struct {
		name     string
		inflight bool
		indirect bool
	}{{"direct", false, false}, {"inflight", true, false}, {"indirect+inflight", true, true}} {
		b.Run(bench.name, func(b *testing.B) {
			r := newRig(b, 128, FeatureEventIdx|FeatureIndirect)
			cfg := r.config()
			if !bench.inflight {
				cfg.Inflight = nil
			}
			q, err := New(cfg)
			if err != nil {
				b.Fatal(err)
			}
			table := make(flatMemory, 48)
			for i, d := range []Desc{{0, 16, DescNext, 1}, {4096, 4096, DescNext | DescWrite, 2}, {8192, 1, DescWrite, 0}} {
				binary.LittleEndian.PutUint64(table[16*i:], d.Addr)
				binary.LittleEndian.PutUint32(table[16*i+8:], d.Len)
				binary.LittleEndian.PutUint16(table[16*i+12:], d.Flags)
				binary.LittleEndian.PutUint16(table[16*i+14:], d.Next)
			}
			segs := []DriverSegment{seg(0, 16, false), seg(4096, 4096, true), seg(8192, 1, true)}
			var c Chain
			var memory Memory = table
			b.ReportAllocs()
			for n := 0; n < b.N; n += 16 {
				for range 16 {
					if bench.indirect {
						r.drv.AddIndirect(0, 48)
					} else {
						r.drv.Add(segs)
					}
				}
				r.drv.Publish()
				ready, _ := q.Ready()
				for range ready {
					if err := q.Pop(&c, memory); err != nil {
						b.Fatal(err)
					}
					q.Push(c.Head, 4097)
				}
				q.Publish()
				q.NeedSignal()
				for range ready {
					r.drv.Poll()
				}
			}
		})
	}
}
