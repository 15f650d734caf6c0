package vhost

import (
	"bytes"
	"fmt"
	"testing"

	"golang.org/x/sys/unix"

	"scoria/shm/mem"
	"scoria/shm/worker"
	"scoria/vhost/virtq"
	"scoria/vhost/wire"
)

const testFeatures = featureFlush | featureConfigWCE | featureDiscard | featureWriteZeroes | featureMQ

func pattern(n, seed int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(i*7 + seed*13 + i>>8)
	}
	return b
}

func TestRequests(t *testing.T) {
	for _, ring := range []struct {
		name     string
		features uint64
	}{
		{"plain", 0},
		{"eventidx", virtq.FeatureEventIdx},
		{"indirect", virtq.FeatureIndirect},
		{"both", virtq.FeatureIndirect | virtq.FeatureEventIdx},
	} {
		for _, async := range []bool{false, true} {
			for _, poll := range []int{-1, 0} {
				t.Run(fmt.Sprintf("%s/async=%v/poll=%d", ring.name, async, poll), func(t *testing.T) {
					b := newBed(t, Config{Workers: worker.Config{Workers: 2, PollCPU: float64(poll)}})
					b.dev.set(func(d *ramDevice) { d.async = async })
					g := newGuest(t, 2, 64, testFeatures|ring.features)
					start(t, b.path, g)
					exerciseRings(t, g)
				})
			}
		}
	}
}

// exerciseRings does one request of each kind, and writes and reads in number.
func exerciseRings(t *testing.T, g *guest) {
	t.Helper()
	for i := range 40 {
		data := pattern(4096*(1+i%5), i)
		if st, _ := g.do(i%2, blkOut, uint64(i*64), data, 0); st != statusOK {
			t.Fatalf("write %d: status %d", i, st)
		}
	}
	var reads []blkRequest
	for i := range 10 {
		reads = append(reads, g.add(0, blkIn, uint64(i*64), nil, 4096*(1+i%5)))
		if i%3 == 0 {
			g.publish(0)
		}
	}
	g.publish(0)
	for i, q := range reads {
		if st := g.wait(q); st != statusOK || !bytes.Equal(g.mem.Bytes()[q.data:][:q.n], pattern(q.n, i)) {
			t.Fatalf("read %d: status %d or wrong data", i, st)
		}
	}
	if st, _ := g.do(1, blkFlush, 0, nil, 0); st != statusOK {
		t.Fatalf("flush: status %d", st)
	}
	if st, id := g.do(1, blkGetID, 0, nil, 20); st != statusOK || !bytes.HasPrefix(id, []byte("serial-0123456789\x00\x00")) {
		t.Fatalf("get id: status %d, %q", st, id)
	}
	seg := make([]byte, 16)
	seg[8] = 8 // sectors
	for _, typ := range []uint32{blkDiscard, blkWriteZeroes} {
		if st, _ := g.do(0, typ, 0, seg, 0); st != statusOK {
			t.Fatalf("request type %d: status %d", typ, st)
		}
	}
	if _, data := g.do(0, blkIn, 0, nil, 4096); !bytes.Equal(data, make([]byte, 4096)) {
		t.Fatal("discarded sectors do not read as zeroes")
	}
	for _, c := range []struct {
		name   string
		typ    uint32
		sector uint64
		data   []byte
		read   int
		want   byte
	}{
		{"unknown type", 77, 0, nil, 512, statusUnsup},
		{"read behind the end", blkIn, 16 << 20 / 512, nil, 512, statusIOErr},
		{"read of half a sector", blkIn, 0, nil, 256, statusIOErr},
		{"sector that overflows", blkOut, 1 << 60, make([]byte, 512), 0, statusIOErr},
		{"discard with a bad flag", blkDiscard, 0, []byte{0, 0, 0, 0, 0, 0, 0, 0, 8, 0, 0, 0, 1, 0, 0, 0}, 0, statusUnsup},
		{"two discard segments", blkDiscard, 0, make([]byte, 32), 0, statusIOErr},
	} {
		if st, _ := g.do(0, c.typ, c.sector, c.data, c.read); st != c.want {
			t.Errorf("%s: status %d, want %d", c.name, st, c.want)
		}
	}
}

// QEMU asks for a prefix of the configuration space.
func TestConfigAnswersExactlyWhatWasAsked(t *testing.T) {
	b := newBed(t, Config{})
	f := dial(t, b.path)
	f.hello(testFeatures | wire.FeatureProtocolFeatures)
	for _, n := range []int{0, 1, 8, 33, 36, 60, 96, 256} {
		p := f.get(wire.GetConfig, wire.Config{Data: make([]byte, n)}.Append(nil))
		c, err := wire.DecodeConfig(wire.GetConfig, p)
		if err != nil || len(c.Data) != n {
			t.Fatalf("asked for %d bytes, got %d, %v", n, len(c.Data), err)
		}
		if n >= 8 && le64(c.Data) != 16<<20/512 {
			t.Fatalf("capacity %d", le64(c.Data))
		}
		if n >= 24 && c.Data[21] != 2 { // 512
			t.Fatalf("block size % x", c.Data[20:24])
		}
	}
	c, _ := wire.DecodeConfig(wire.GetConfig, f.get(wire.GetConfig, wire.Config{Offset: 20, Data: make([]byte, 5)}.Append(nil)))
	if !bytes.Equal(c.Data, []byte{0, 2, 0, 0, 3}) {
		t.Fatalf("bytes 20 to 24: % x", c.Data)
	}
}

func le64(b []byte) (v uint64) {
	for i := range 8 {
		v |= uint64(b[i]) << (8 * i)
	}
	return v
}

func TestKickBeforeEnableIsNotLost(t *testing.T) {
	b := newBed(t, Config{})
	g := newGuest(t, 1, 16, testFeatures)
	f := dial(t, b.path)
	f.hello(g.features)
	q := g.add(0, blkOut, 0, pattern(4096, 1), 0)
	g.publish(0)
	f.memory(g)
	f.configure(g, 0, 0)
	if err := f.enable(0, 1); err != nil {
		t.Fatal(err)
	}
	if st := g.wait(q); st != statusOK {
		t.Fatal(st)
	}
}

// A front end may poll: it passes no kick or no call descriptor.
func TestFrontEndThatPolls(t *testing.T) {
	b := newBed(t, Config{})
	g := newGuest(t, 1, 16, testFeatures)
	f := dial(t, b.path)
	f.hello(g.features)
	f.memory(g)
	f.configure(g, 0, 0)
	f.must(wire.SetVringKick, wire.VringFD{NoFD: true}.Append(nil))
	f.must(wire.SetVringCall, wire.VringFD{NoFD: true}.Append(nil))
	if err := f.enable(0, 1); err != nil {
		t.Fatal(err)
	}
	for i := range 5 {
		q := g.add(0, blkOut, uint64(i), pattern(512, 1), 0)
		g.rings[0].Publish()
		hurry(t, "answer without kick", func() bool { g.reap(0); _, ok := g.rings[0].written[q.head]; return ok })
	}
}

func TestWriteCacheOffMakesWritesDurable(t *testing.T) {
	b := newBed(t, Config{})
	g := newGuest(t, 1, 16, testFeatures)
	f := dial(t, b.path)
	f.hello(g.features)
	f.memory(g)
	f.tracked(g)
	f.configure(g, 0, 0)
	if err := f.enable(0, 1); err != nil {
		t.Fatal(err)
	}
	g.do(0, blkOut, 0, pattern(512, 1), 0)
	if b.dev.fuaCount() != 0 {
		t.Fatal("FUA with the write cache on")
	}
	f.must(wire.SetConfig, wire.Config{Offset: wceOffset, Data: []byte{0}}.Append(nil))
	if b.dev.flushCount() != 1 {
		t.Fatal("switching the write cache off did not flush")
	}
	g.do(0, blkOut, 0, pattern(512, 1), 0)
	if b.dev.fuaCount() != 1 {
		t.Fatal("no FUA with the write cache off")
	}
	c, _ := wire.DecodeConfig(wire.GetConfig, f.get(wire.GetConfig, wire.Config{Data: make([]byte, 60)}.Append(nil)))
	if c.Data[wceOffset] != 0 {
		t.Fatal("the configuration space does not show it")
	}
	// A new daemon learns it from the in-flight area.
	b.restart()
	start(t, b.path, g)
	g.do(0, blkOut, 0, pattern(512, 1), 0)
	if b.dev.fuaCount() != 2 {
		t.Fatal("no FUA after a restart")
	}
	if err := dial(t, b.path).set(wire.SetConfig, wire.Config{Offset: 0, Data: []byte{1}}.Append(nil)); err == nil {
		t.Fatal("a read-only field could be written")
	}
}

func TestNeitherFlushNorWriteCacheMeansWriteThrough(t *testing.T) {
	b := newBed(t, Config{})
	g := newGuest(t, 1, 16, 0)
	start(t, b.path, g)
	g.do(0, blkOut, 0, pattern(512, 1), 0)
	if b.dev.fuaCount() != 1 {
		t.Fatal("a guest that can't flush got a write-back cache")
	}
}

func TestResizeIsTold(t *testing.T) {
	b := newBed(t, Config{})
	g := newGuest(t, 1, 16, testFeatures)
	f := dial(t, b.path)
	f.hello(g.features)
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	f.must(wire.SetBackendReqFD, nil, pair[0])
	unix.Close(pair[0])
	defer unix.Close(pair[1])
	f.get(wire.GetConfig, wire.Config{Data: make([]byte, 60)}.Append(nil))
	// While the device is stopped a notice would be ignored: it comes later.
	b.dev.resize(24 << 20)
	f.memory(g)
	f.configure(g, 0, 0)
	if err := f.enable(0, 1); err != nil {
		t.Fatal(err)
	}
	notice := func() {
		t.Helper()
		p := []unix.PollFd{{Fd: int32(pair[1]), Events: unix.POLLIN}}
		if n, _ := unix.Poll(p, int(testTimeout.Milliseconds())); n != 1 {
			t.Fatal("no notice")
		}
		var h [wire.HeaderSize]byte
		unix.Read(pair[1], h[:])
		if hdr, err := wire.ParseHeader(h[:]); err != nil || hdr.Request != wire.BackendConfigChange {
			t.Fatal(hdr, err)
		}
		c, _ := wire.DecodeConfig(wire.GetConfig, f.get(wire.GetConfig, wire.Config{Data: make([]byte, 60)}.Append(nil)))
		if le64(c.Data) != b.dev.Info().Size/512 {
			t.Fatal("old capacity")
		}
	}
	notice()
	b.dev.resize(32 << 20)
	notice()
}

// A reconnecting front end refuses fewer slots or a smaller capacity.
func TestNothingShrinksBetweenReconnects(t *testing.T) {
	b := newBed(t, Config{})
	f := dial(t, b.path)
	f.hello(wire.FeatureProtocolFeatures)
	if n := f.getU64(wire.GetMaxMemSlots); n < 509 {
		t.Fatalf("%d memory slots; earlier versions had 509", n)
	}
	b.dev.resize(24 << 20)
	f.conn.Close()
	b.restart()
	f = dial(t, b.path)
	f.hello(wire.FeatureProtocolFeatures)
	c, _ := wire.DecodeConfig(wire.GetConfig, f.get(wire.GetConfig, wire.Config{Data: make([]byte, 8)}.Append(nil)))
	if le64(c.Data) != 24<<20/512 {
		t.Fatal("the capacity shrank")
	}
}

func TestGetVringBaseDrains(t *testing.T) {
	b := newBed(t, Config{})
	g := newGuest(t, 1, 16, testFeatures)
	f := start(t, b.path, g)
	g.do(0, blkOut, 0, pattern(512, 1), 0)
	b.dev.setHold(true)
	q := g.add(0, blkOut, 8, pattern(512, 1), 0)
	g.publish(0)
	hurry(t, "request at the device", func() bool { return b.dev.heldCount() == 1 })
	if err := f.send(wire.GetVringBase, 0, wire.VringState{}.Append(nil)); err != nil {
		t.Fatal(err)
	}
	hurry(t, "ring to stop", func() bool { return b.srv.workers.Workers()[0].Sleeping() })
	if g.rings[0].Pending() {
		t.Fatal("answered while held")
	}
	b.dev.let(inOrder)
	p, _, err := f.recv(wire.GetVringBase)
	if err != nil {
		t.Fatal(err)
	}
	if !g.rings[0].Pending() {
		t.Fatal("replied before the request was answered")
	}
	if v, _ := wire.DecodeVringState(wire.GetVringBase, p); v.Num != 2 {
		t.Fatalf("base %d, want 2", v.Num)
	}
	g.wait(q)
	if b.dev.claimed() {
		t.Fatal("claim held with all rings stopped")
	}
	// What comes while it is stopped is taken at the next start.
	q = g.add(0, blkOut, 16, pattern(512, 1), 0)
	g.publish(0)
	f.configure(g, 0, 2)
	if st := g.wait(q); st != statusOK {
		t.Fatal(st)
	}
}

// TestStoppingRingHastens: a guest that stops does not wait for what a device
// holds back on purpose.
func TestStoppingRingHastens(t *testing.T) {
	b := newBed(t, Config{})
	g := newGuest(t, 1, 16, testFeatures)
	f := start(t, b.path, g)
	b.dev.mu.Lock()
	b.dev.hold, b.dev.delays = true, true
	b.dev.mu.Unlock()
	q := g.add(0, blkOut, 8, pattern(512, 1), 0)
	g.publish(0)
	hurry(t, "request at the device", func() bool { return b.dev.heldCount() == 1 })
	f.get(wire.GetVringBase, wire.VringState{}.Append(nil)) // has a deadline
	if st := g.wait(q); st != statusOK {
		t.Fatal(st)
	}
}

func inOrder(n int) (order []int) {
	for i := range n {
		order = append(order, i)
	}
	return order
}

func TestDisabledRingRests(t *testing.T) {
	b := newBed(t, Config{})
	g := newGuest(t, 1, 16, testFeatures)
	f := start(t, b.path, g)
	if err := f.enable(0, 0); err != nil {
		t.Fatal(err)
	}
	q := g.add(0, blkOut, 0, pattern(512, 1), 0)
	g.publish(0)
	hurry(t, "worker to sleep", func() bool { return b.srv.workers.Workers()[0].Sleeping() })
	if g.rings[0].Pending() {
		t.Fatal("a disabled ring was served")
	}
	if err := f.enable(0, 1); err != nil {
		t.Fatal(err)
	}
	g.wait(q)
}

func TestStatusAndReset(t *testing.T) {
	b := newBed(t, Config{})
	g := newGuest(t, 2, 16, testFeatures)
	f := start(t, b.path, g)
	f.must(wire.SetStatus, wire.AppendU64(nil, 15))
	if v := f.getU64(wire.GetStatus); v != 15 {
		t.Fatal(v)
	}
	if v := f.getU64(wire.GetQueueNum); v != DefaultMaxQueues {
		t.Fatal(v)
	}
	f.must(wire.ResetDevice, nil)
	if v := f.getU64(wire.GetStatus); v != 0 || b.ep.Stats().Rings != 0 || b.dev.claimed() {
		t.Fatal("reset left something")
	}
	for i, r := range g.rings {
		r.Reset()
		f.configure(g, i, 0)
		if err := f.enable(i, 1); err != nil {
			t.Fatal(err)
		}
	}
	g.do(1, blkOut, 0, pattern(512, 1), 0)
}

func TestIdleServerSleeps(t *testing.T) {
	b := newBed(t, Config{})
	g := newGuest(t, 2, 16, testFeatures|virtq.FeatureEventIdx)
	start(t, b.path, g)
	g.do(0, blkOut, 0, pattern(512, 1), 0)
	w := b.srv.workers
	hurry(t, "worker to sleep", func() bool { return w.Workers()[0].Sleeping() })
	sleeps := w.Stats()[0].Sleeps
	unix.Poll(nil, 100)
	if w.Stats()[0].Sleeps != sleeps {
		t.Fatal("an idle worker woke up")
	}
}

func TestNoAllocationPerRequest(t *testing.T) {
	b := newBed(t, Config{})
	b.dev.set(func(d *ramDevice) { d.quiet = true })
	g := newGuest(t, 1, 16, testFeatures|virtq.FeatureEventIdx)
	start(t, b.path, g)
	r := g.rings[0]
	segs := []virtq.DriverSegment{{Addr: testGuestBase + testDataAt, Len: 16}, {Addr: testGuestBase + testDataAt + 4096, Len: 4096, Write: true}, {Addr: testGuestBase + testDataAt + 64, Len: 1, Write: true}}
	once := func() {
		r.Add(segs)
		if r.Publish() {
			_ = mem.SignalEventFD(r.kick)
		}
		for range 1 << 30 {
			if _, _, ok, _ := r.Poll(); ok {
				return
			}
		}
		panic("no answer")
	}
	if n := testing.AllocsPerRun(2000, once); n >= 1 {
		t.Fatalf("%v allocations per request", n)
	}
	st := b.ep.Stats()
	if st.Ops[0].Requests < 2000 || st.Ops[0].Bytes != 4096*st.Ops[0].Requests || st.Ops[0].Latency.Count == 0 {
		t.Fatalf("%+v", st.Ops[0])
	}
}
