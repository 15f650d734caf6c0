package virtq

import (
	"bytes"
	"encoding/binary"
	"errors"
	"testing"

	"pgregory.net/rapid"
)

// driverPeer is a device that knows the bytes of the standard and nothing else.
type driverPeer struct {
	mem        []byte
	l          DriverLayout
	size       int
	lastAvail  uint16
	usedIdx    uint16
	descOfHead map[uint16][]DriverDesc
}

func newDriverPair(t testing.TB, size int, eventIdx bool) (*DriverRing, *driverPeer) {
	t.Helper()
	l, err := DriverRingLayout(size)
	if err != nil {
		t.Fatal(err)
	}
	mem := driverTestMemory(int(l.Bytes))
	r, err := NewDriverRing(mem, size, eventIdx)
	if err != nil {
		t.Fatal(err)
	}
	return r, &driverPeer{mem: mem, l: l, size: size, descOfHead: map[uint16][]DriverDesc{}}
}

func (p *driverPeer) u16(off uint64) uint16       { return binary.LittleEndian.Uint16(p.mem[off:]) }
func (p *driverPeer) setU16(off uint64, v uint16) { binary.LittleEndian.PutUint16(p.mem[off:], v) }

func (p *driverPeer) availIdx() uint16  { return p.u16(p.l.Avail + 2) }
func (p *driverPeer) usedEvent() uint16 { return p.u16(p.l.Avail + 4 + 2*uint64(p.size)) }
func (p *driverPeer) setAvailEvent(v uint16) {
	p.setU16(p.l.Used+4+8*uint64(p.size), v)
}

// take returns the heads of all new chains.
func (p *driverPeer) take() (heads []uint16) {
	for ; p.lastAvail != p.availIdx(); p.lastAvail++ {
		slot := uint64(p.lastAvail) % uint64(p.size)
		head := p.u16(p.l.Avail + 4 + 2*slot)
		p.descOfHead[head] = p.walk(head)
		heads = append(heads, head)
	}
	return heads
}

func (p *driverPeer) walk(i uint16) (chain []DriverDesc) {
	for {
		b := p.mem[p.l.Desc+16*uint64(i):]
		d := DriverDesc{
			Addr: binary.LittleEndian.Uint64(b), Len: binary.LittleEndian.Uint32(b[8:]),
			Flags: binary.LittleEndian.Uint16(b[12:]), Next: binary.LittleEndian.Uint16(b[14:]),
		}
		chain = append(chain, d)
		if d.Flags&DriverDescNext == 0 {
			return chain
		}
		i = d.Next
	}
}

func (p *driverPeer) put(id, n uint32) {
	off := p.l.Used + 4 + 8*(uint64(p.usedIdx)%uint64(p.size))
	binary.LittleEndian.PutUint32(p.mem[off:], id)
	binary.LittleEndian.PutUint32(p.mem[off+4:], n)
	p.usedIdx++
	p.setU16(p.l.Used+2, p.usedIdx)
}

func TestDriverRingLayout(t *testing.T) {
	for _, size := range []int{0, 1, 3, 100, 65536, -2} {
		if _, err := DriverRingLayout(size); !errors.Is(err, ErrDriverRingSize) {
			t.Errorf("size %d: %v", size, err)
		}
	}
	for size := 2; size <= DriverMaxRingSize; size *= 2 {
		l, err := DriverRingLayout(size)
		if err != nil {
			t.Fatal(err)
		}
		n := uint64(size)
		if l.Desc%16 != 0 || l.Avail < l.Desc+16*n || l.Used < l.Avail+6+2*n || l.Bytes < l.Used+6+8*n {
			t.Errorf("size %d: parts overlap: %+v", size, l)
		}
	}
}

func TestDriverRingRefusesMemory(t *testing.T) {
	l, _ := DriverRingLayout(8)
	mem := driverTestMemory(int(l.Bytes) + 64)
	if _, err := NewDriverRing(mem[:l.Bytes-1], 8, true); !errors.Is(err, ErrDriverRingMemory) {
		t.Errorf("too small: %v", err)
	}
	if _, err := NewDriverRing(mem[8:], 8, true); !errors.Is(err, ErrDriverRingMemory) {
		t.Errorf("unaligned: %v", err)
	}
}

// TestDriverRingProperty adds and returns chains in random order and compares
// with what the device reads from the bytes.
func TestDriverRingProperty(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		size := 1 << rapid.IntRange(1, 6).Draw(rt, "log2 size")
		r, p := newDriverPair(t, size, rapid.Bool().Draw(rt, "event idx"))
		want := map[uint16][]DriverSegment{}
		var held []uint16 // taken by the device, not returned
		for range rapid.IntRange(1, 200).Draw(rt, "steps") {
			n := rapid.IntRange(1, size+1).Draw(rt, "segments")
			segs := make([]DriverSegment, n)
			for i := range segs {
				segs[i] = DriverSegment{Addr: rapid.Uint64().Draw(rt, "addr"), Len: rapid.Uint32().Draw(rt, "len"), Write: i > n/2}
			}
			free := r.Free()
			if head, ok := r.Add(segs); ok {
				want[head] = segs
			} else if n <= free {
				rt.Fatalf("chain of %d refused with %d free", n, free)
			}
			if rapid.Bool().Draw(rt, "publish") {
				r.Publish()
				held = append(held, p.take()...)
			}
			for len(held) > 0 && rapid.Bool().Draw(rt, "complete") {
				k := rapid.IntRange(0, len(held)-1).Draw(rt, "which")
				head := held[k]
				held = append(held[:k], held[k+1:]...)
				checkDriverChain(rt, p.descOfHead[head], want[head])
				p.put(uint32(head), uint32(k))
				got, written, ok, err := r.Poll()
				if err != nil || !ok || got != head || written != uint32(k) {
					rt.Fatalf("poll: head %d, %d bytes, %v, %v; want %d, %d", got, written, ok, err, head, k)
				}
			}
		}
	})
}

func checkDriverChain(rt *rapid.T, got []DriverDesc, want []DriverSegment) {
	if len(got) != len(want) {
		rt.Fatalf("chain of %d descriptors, want %d", len(got), len(want))
	}
	for i, s := range want {
		if got[i].Addr != s.Addr || got[i].Len != s.Len || got[i].Flags&DriverDescWrite != 0 != s.Write {
			rt.Fatalf("descriptor %d is %+v, want %+v", i, got[i], s)
		}
	}
}

func TestDriverRingIndirect(t *testing.T) {
	r, p := newDriverPair(t, 4, true)
	for i := range 4 {
		if next := r.NextHead(); next != uint16(i) {
			t.Fatalf("next head %d", next)
		}
		if _, ok := r.AddIndirect(uint64(i)<<12, 48); !ok {
			t.Fatal("refused")
		}
	}
	if _, ok := r.AddIndirect(0, 48); ok {
		t.Fatal("accepted a fifth chain in four descriptors")
	}
	r.Publish()
	for i, head := range p.take() {
		want := DriverDesc{Addr: uint64(i) << 12, Len: 48, Flags: DriverDescIndirect}
		if got := p.descOfHead[head][0]; got != want {
			t.Errorf("descriptor %+v, want %+v", got, want)
		}
	}
}

func TestDriverRingKick(t *testing.T) {
	seg := []DriverSegment{{Addr: 1, Len: 1}}
	r, p := newDriverPair(t, 8, true)
	r.Add(seg)
	if !r.Publish() {
		t.Error("first chain: device asked for a kick at index 0 and got none")
	}
	if r.Publish() {
		t.Error("kick without a new chain")
	}
	p.setAvailEvent(2)
	r.Add(seg)
	if r.Publish() {
		t.Error("kick before the index asked for")
	}
	r.Add(seg)
	r.Add(seg)
	if !r.Publish() {
		t.Error("no kick although the batch passed the index asked for")
	}

	r, p = newDriverPair(t, 8, false)
	p.setU16(p.l.Used, driverUsedNoNotify)
	r.Add(seg)
	if r.Publish() {
		t.Error("kick although the device refused them")
	}
	p.setU16(p.l.Used, 0)
	r.Add(seg)
	if !r.Publish() {
		t.Error("no kick")
	}
}

func TestDriverRingCall(t *testing.T) {
	seg := []DriverSegment{{Addr: 1, Len: 1}}
	r, p := newDriverPair(t, 8, true)
	for range 4 {
		r.Add(seg)
	}
	r.Publish()
	if r.EnableCall() || p.usedEvent() != 0 {
		t.Errorf("used_event %d, want 0", p.usedEvent())
	}
	if r.EnableCallAfter(3) || p.usedEvent() != 2 {
		t.Errorf("used_event %d, want 2", p.usedEvent())
	}
	p.put(0, 0)
	p.put(1, 0)
	if r.EnableCallAfter(3) {
		t.Error("two of three are enough")
	}
	p.put(2, 0)
	if !r.EnableCallAfter(3) || !r.EnableCall() {
		t.Error("pending chains not seen")
	}
	r.DisableCall()
	if event := p.usedEvent(); event-r.lastUsed < 0x8000 {
		t.Errorf("used_event %d is ahead of %d", event, r.lastUsed)
	}

	r, p = newDriverPair(t, 8, false)
	r.DisableCall()
	if p.u16(p.l.Avail) != driverAvailNoInterrupt {
		t.Error("flag not set")
	}
	r.EnableCall()
	if p.u16(p.l.Avail) != 0 {
		t.Error("flag not cleared")
	}
}

func TestDriverRingBrokenDevice(t *testing.T) {
	for name, breakIt := range map[string]func(p *driverPeer){
		"index ahead":  func(p *driverPeer) { p.put(0, 0); p.put(1, 0); p.put(0, 0) },
		"not in chain": func(p *driverPeer) { p.put(5, 0) },
		"outside":      func(p *driverPeer) { p.put(1<<20, 0) },
	} {
		r, p := newDriverPair(t, 8, true)
		r.Add([]DriverSegment{{Addr: 1, Len: 1}})
		r.Add([]DriverSegment{{Addr: 1, Len: 1}})
		r.Publish()
		breakIt(p)
		if _, _, _, err := r.Poll(); !errors.Is(err, ErrDriverBadUsed) {
			t.Errorf("%s: %v", name, err)
		}
	}
	r, p := newDriverPair(t, 8, true)
	r.Add([]DriverSegment{{Addr: 1, Len: 1}})
	r.Add([]DriverSegment{{Addr: 1, Len: 1}})
	r.Publish()
	p.put(0, 0)
	p.put(0, 0)
	if _, _, _, err := r.Poll(); err != nil {
		t.Fatal(err)
	}
	if _, _, _, err := r.Poll(); !errors.Is(err, ErrDriverBadUsed) {
		t.Errorf("returned twice: %v", err)
	}
}

func TestDriverRingReset(t *testing.T) {
	r, p := newDriverPair(t, 8, true)
	for range 3 {
		r.Add([]DriverSegment{{Addr: 1, Len: 1}})
	}
	r.Publish()
	p.put(0, 0)
	r.Reset()
	if r.Free() != 8 || r.InFlight() != 0 || r.Pending() || !bytes.Equal(p.mem, make([]byte, len(p.mem))) {
		t.Errorf("not empty after reset: free %d, in flight %d", r.Free(), r.InFlight())
	}
}

func BenchmarkDriverRing(b *testing.B) {
	r, p := newDriverPair(b, 256, true)
	b.ReportAllocs()
	for b.Loop() {
		head, _ := r.AddIndirect(4096, 48)
		r.Publish()
		p.put(uint32(head), 1)
		if _, _, ok, _ := r.Poll(); !ok {
			b.Fatal("nothing returned")
		}
	}
}
