package client

import (
	"errors"
	"net"
	"sync/atomic"
	"testing"
	"time"

	"scoria/vhost/client/internal/peertest"
	"scoria/vhost/virtq"
	"scoria/vhost/wire"
)

func TestHandshake(t *testing.T) {
	deadline(t, 2*time.Minute)
	s := peertest.Start(t)
	c := connect(t, s.Socket, Options{Queues: 3, MaskFeatures: FeatureEventIdx})
	if c.Size() != 1<<30 || c.Offered() != peertest.DefaultFeatures || c.Features() != peertest.DefaultFeatures&^uint64(FeatureEventIdx) {
		t.Errorf("size %d, offered %#x, features %#x", c.Size(), c.Offered(), c.Features())
	}
	if c.Protocol() != peertest.DefaultProtocol {
		t.Errorf("protocol %#x", c.Protocol())
	}
	for i := range 3 {
		one(t, c.Queue(i), c.Queue(i).Flush)
	}
}

// answering starts a server that leaves some messages to answer.
func answering(t *testing.T, answer func(conn *net.UnixConn, r wire.Request, payload []byte) bool) *peertest.Server {
	return peertest.Start(t, func(s *peertest.Server) {
		s.Answer = func(conn *net.UnixConn, r wire.Request, payload []byte, _ []int) bool {
			return answer(conn, r, payload)
		}
	})
}

// TestBadReplies: whatever the server answers, Connect fails with the reason.
func TestBadReplies(t *testing.T) {
	for name, test := range map[string]struct {
		request wire.Request
		answer  func(conn *net.UnixConn, r wire.Request) error
		want    error
	}{
		"refused": {wire.SetMemTable, func(conn *net.UnixConn, r wire.Request) error {
			return peertest.Reply(conn, r, wire.AppendU64(nil, 22))
		}, ErrRefused},
		"hangs up": {wire.GetConfig, func(conn *net.UnixConn, r wire.Request) error { return conn.Close() }, ErrDisconnected},
		"silence":  {wire.GetFeatures, func(*net.UnixConn, wire.Request) error { return nil }, ErrNoReply},
		"other reply": {wire.GetFeatures, func(conn *net.UnixConn, r wire.Request) error {
			return peertest.Reply(conn, wire.GetQueueNum, wire.AppendU64(nil, 1))
		}, wire.ErrUnknown},
		"short reply": {wire.GetFeatures, func(conn *net.UnixConn, r wire.Request) error {
			return peertest.Reply(conn, r, []byte{1})
		}, wire.ErrSize},
		"no reply flag": {wire.GetFeatures, func(conn *net.UnixConn, r wire.Request) error {
			_, err := conn.Write(wire.AppendMessage(nil, r, 0, wire.AppendU64(nil, 1)))
			return err
		}, wire.ErrFlags},
		"huge reply": {wire.GetFeatures, func(conn *net.UnixConn, r wire.Request) error {
			_, err := conn.Write(wire.AppendHeader(nil, wire.Header{Request: r, Flags: wire.FlagVersion | wire.FlagReply, Size: 1 << 30}))
			return err
		}, wire.ErrSize},
		"config too short": {wire.GetConfig, func(conn *net.UnixConn, r wire.Request) error {
			return peertest.Reply(conn, r, wire.Config{Data: make([]byte, 8)}.Append(nil))
		}, wire.ErrSize},
		"config error": {wire.GetConfig, func(conn *net.UnixConn, r wire.Request) error {
			return peertest.Reply(conn, r, nil)
		}, wire.ErrSize},
	} {
		t.Run(name, func(t *testing.T) {
			deadline(t, 2*time.Minute)
			s := answering(t, func(conn *net.UnixConn, r wire.Request, _ []byte) bool {
				if r != test.request {
					return false
				}
				if err := test.answer(conn, r); err != nil {
					t.Error(err)
				}
				return true
			})
			timeout := 2 * time.Minute
			if errors.Is(test.want, ErrNoReply) {
				timeout = 50 * time.Millisecond
			}
			c, err := Connect(s.Socket, Options{Timeout: timeout})
			if err == nil {
				c.Close()
			}
			if !errors.Is(err, test.want) {
				t.Errorf("got %v, want %v", err, test.want)
			}
		})
	}
}

func TestUnsolicitedReply(t *testing.T) {
	deadline(t, 2*time.Minute)
	s := answering(t, func(conn *net.UnixConn, r wire.Request, _ []byte) bool {
		if r != wire.GetFeatures {
			return false
		}
		for range 3 {
			peertest.Reply(conn, r, wire.AppendU64(nil, peertest.DefaultFeatures))
		}
		return true
	})
	c, err := Dial(s.Socket)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := c.CallU64(wire.GetFeatures, nil); err != nil {
		t.Fatal(err)
	}
	<-c.Done()
	if !errors.Is(c.Err(), ErrUnsolicited) {
		t.Errorf("three answers to one question: %v", c.Err())
	}
}

func TestConfigChange(t *testing.T) {
	deadline(t, 2*time.Minute)
	var capacity atomic.Uint64
	changes := make(chan Config, 4)
	s := answering(t, func(conn *net.UnixConn, r wire.Request, payload []byte) bool {
		if r != wire.GetConfig || capacity.Load() == 0 {
			return false
		}
		c, err := wire.DecodeConfig(r, payload)
		if err != nil {
			t.Error(err)
			return true
		}
		copy(c.Data, wire.AppendU64(nil, capacity.Load()))
		peertest.Reply(conn, r, c.Append(nil))
		return true
	})
	c := connect(t, s.Socket, Options{OnConfigChange: func(c Config) { changes <- c }})
	capacity.Store(12345)
	if status, err := s.ConfigChange(); err != nil || status != 0 {
		t.Fatalf("answer %d, %v", status, err)
	}
	if got := <-changes; got.Capacity != 12345 || c.Size() != 12345*512 {
		t.Errorf("capacity %d, size %d", got.Capacity, c.Size())
	}
}

// TestBrokenRing: a server that returns what it was not given is found out, by
// the queue and by everybody who waits for the disk.
func TestBrokenRing(t *testing.T) {
	deadline(t, 2*time.Minute)
	s := peertest.Start(t, func(s *peertest.Server) { s.Used = func(uint32) uint32 { return 77 } })
	c := connect(t, s.Socket, Options{})
	q := c.Queue(0)
	q.Flush(1)
	q.Kick()
	if err := q.Wait(2 * time.Minute); err != nil {
		t.Fatal(err)
	}
	if _, err := q.Poll(make([]Completion, 1)); !errors.Is(err, virtq.ErrDriverBadUsed) {
		t.Errorf("poll: %v", err)
	}
	d := diskOf(t, connect(t, s.Socket, Options{}))
	for range 2 {
		if err := d.Flush(); !errors.Is(err, virtq.ErrDriverBadUsed) {
			t.Errorf("flush: %v", err)
		}
	}
}

func TestReconnectRefusesLess(t *testing.T) {
	deadline(t, 2*time.Minute)
	s := peertest.Start(t)
	c := connect(t, s.Socket, Options{})
	s.Features.Store(peertest.DefaultFeatures &^ FeatureIndirectDesc)
	if err := c.Reconnect(); !errors.Is(err, ErrShrunk) {
		t.Errorf("without INDIRECT_DESC: %v", err)
	}
	s.Features.Store(peertest.DefaultFeatures | FeatureDiscard)
	if err := c.Reconnect(); err != nil {
		t.Fatal(err)
	}
	if c.Features()&FeatureDiscard != 0 {
		t.Error("a feature came up behind the guest's back")
	}
	one(t, c.Queue(0), c.Queue(0).Flush)
}

func TestFullQueue(t *testing.T) {
	deadline(t, 2*time.Minute)
	s := peertest.Start(t)
	for name, opts := range map[string]Options{
		"indirect": {QueueSize: 16}, "direct": {QueueSize: 16, NoIndirect: true},
	} {
		t.Run(name, func(t *testing.T) {
			q := connect(t, s.Socket, opts).Queue(0)
			out := make([]Completion, 16)
			for range 5 {
				n := 0
				for q.Read(0, Buffer{Addr: guestBase, Len: 512}, uint64(n)) {
					n++
				}
				if n != q.Depth() {
					t.Fatalf("%d requests fit, want %d", n, q.Depth())
				}
				q.Kick()
				for got := 0; got < n; {
					if err := q.WaitSeveral(n-got, 2*time.Minute); err != nil {
						t.Fatal(err)
					}
					k, err := q.Poll(out)
					if err != nil {
						t.Fatal(err)
					}
					got += k
				}
			}
			if q.ReadV(0, make([]Buffer, 17), 0) {
				t.Error("accepted more segments than there is room for")
			}
		})
	}
}

func TestQueueDoesNotAllocate(t *testing.T) {
	deadline(t, 2*time.Minute)
	s := peertest.Start(t)
	c := connect(t, s.Socket, Options{})
	q, out := c.Queue(0), make([]Completion, 4)
	q.Polling()
	if n := testing.AllocsPerRun(1000, func() {
		q.Write(4096, c.Buffer(0, 4096), 1)
		q.Kick()
		for n := 0; n == 0; {
			n, _ = q.Poll(out)
		}
	}); n != 0 {
		t.Errorf("%v allocations per request", n)
	}
}

func FuzzParseConfig(f *testing.F) {
	f.Add(make([]byte, ConfigBytes))
	f.Add([]byte{1})
	f.Fuzz(func(t *testing.T, b []byte) {
		if c, err := ParseConfig(b); err == nil && len(b) < 8 {
			t.Errorf("%d bytes gave %+v", len(b), c)
		}
	})
}
