package vhost

import (
	"encoding/binary"
	"io"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"scoria/shm/mem"
	"scoria/vhost/virtq"
	"scoria/vhost/wire"
)

// script reads the fuzzer's bytes as a front end's deeds.
type script struct{ b []byte }

func (s *script) u8() byte {
	if len(s.b) == 0 {
		return 0
	}
	v := s.b[0]
	s.b = s.b[1:]
	return v
}

func (s *script) take(n int) []byte {
	n = min(n, len(s.b))
	p := s.b[:n]
	s.b = s.b[n:]
	return p
}

// FuzzSession lets a front end do anything: raw messages with any descriptors,
// bytes anywhere in the rings, kicks, a file that shrinks. After each, another
// front end must be served.
func FuzzSession(f *testing.F) {
	f.Add([]byte{1, 0, 1, 0, 0, 0, 0})
	f.Add([]byte{0, 0, 9, 40, 0, 0, 0, 0, 1, 0, 0, 2, 16, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 3, 4})
	f.Add([]byte{2, 0, 0, 48, 0, 0, 16, 64, 0, 0, 0, 0, 16, 0, 0, 0, 1, 0, 1, 0, 2, 4, 0, 4, 0, 0, 1, 0, 3, 4})
	b := newBed(f, Config{})
	b.dev.set(func(d *ramDevice) { d.quiet = true })
	victim := newGuest(f, 1, 16, testFeatures)
	healthy := start(f, b.path, victim) // has the claim
	f.Fuzz(func(t *testing.T, data []byte) {
		s := &script{b: data}
		dev := newRAMDevice(1 << 20) // no claim stands in the way of the hostile one
		b2 := &bed{t: t, srv: b.srv, dev: dev, path: t.TempDir() + "/v.sock"}
		b2.listen()
		defer b2.ep.Close()
		g := newGuest(t, 1, 16, testFeatures|virtq.FeatureIndirect)
		fe := dial(t, b2.path)
		go io.Copy(io.Discard, fe.conn) // what the server answers does not matter
		if s.u8()%4 != 0 {
			prelude(fe, g)
		}
		for range 64 {
			if len(s.b) == 0 {
				break
			}
			fe.deed(s, g)
		}
		fe.conn.Close()
		hurry(t, "hostile session to end", func() bool { return b2.ep.Stats().Sessions == 0 })
		victim.t = t
		if st, _ := victim.do(0, blkOut, 0, pattern(512, 1), 0); st != statusOK {
			t.Fatal(st)
		}
	})
	healthy.conn.Close()
}

// prelude starts a ring, without waiting for answers.
func prelude(f *frontEnd, g *guest) {
	send := func(r wire.Request, p []byte, fds ...int) { _ = f.send(r, 0, p, fds...) }
	send(wire.SetFeatures, wire.AppendU64(nil, g.features))
	send(wire.SetProtocolFeatures, wire.AppendU64(nil, protocolFeatures))
	send(wire.SetMemTable, wire.AppendMemTable(nil, []wire.Region{g.region()}), g.fd)
	send(wire.SetVringNum, wire.VringState{Num: 16}.Append(nil))
	send(wire.SetVringAddr, g.addr(0, 0).Append(nil))
	send(wire.SetVringKick, wire.VringFD{}.Append(nil), g.rings[0].kick)
	send(wire.SetVringEnable, wire.VringState{Num: 1}.Append(nil))
}

func (f *frontEnd) deed(s *script, g *guest) {
	_ = f.conn.SetWriteDeadline(time.Now().Add(testTimeout))
	switch s.u8() % 6 {
	case 0: // a message with a header that fits
		r, n := wire.Request(s.u8()%42), int(s.u8())
		fds := []int{g.fd, g.rings[0].kick, g.rings[0].call}[:s.u8()%4]
		p := append([]byte(nil), s.take(n)...)
		_ = f.send(r, uint32(s.u8())&wire.FlagNeedReply, p, fds...)
	case 1: // bytes
		_, _ = f.conn.Write(s.take(int(s.u8())))
	case 2: // memory: rings and the start of the data
		at := int(binary.LittleEndian.Uint16(append(s.take(2), 0, 0)))
		copy(g.mem.Bytes()[at:], s.take(int(s.u8())))
	case 3: // kick
		_ = mem.SignalEventFD(g.rings[0].kick)
	case 4: // one more request, well-formed, at a place it may not be
		g.rings[0].Descriptors()[0] = virtq.DriverDesc{Addr: testGuestBase + uint64(s.u8())<<8, Len: 16, Flags: 1, Next: 1}
		g.rings[0].Descriptors()[1] = virtq.DriverDesc{Addr: testGuestBase + uint64(s.u8())<<8, Len: uint32(s.u8())<<4 + 1, Flags: 2}
		g.rings[0].PushRaw(0)
		g.rings[0].Publish()
		_ = mem.SignalEventFD(g.rings[0].kick)
	case 5: // the file shrinks; this process does not touch its own mapping afterwards
		_ = unix.Ftruncate(g.fd, int64(s.u8())<<12)
		s.b = nil
		_ = mem.SignalEventFD(g.rings[0].kick)
	}
}
