package worker

import (
	"runtime"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"scoria/driver/block"
	"scoria/shm/mem"
)

// turns counts whose requests devices get. Only the worker touches it, until done.
type turns struct {
	busy  int    // requests since the quiet peer asked
	quiet int    // requests so far
	worst int    // busy requests between the quiet peer's asking and its turn
	kick  func() // the quiet peer asks
	done  chan struct{}
}

// ring is a peer that always has requests, or has one when it is told.
type ring struct {
	t     *turns
	busy  bool
	size  uint64
	ready int
}

func (r *ring) Ready() (int, error) {
	if r.busy {
		return 1000, nil
	}
	return r.ready, nil
}
func (r *ring) DisableNotify()     {}
func (r *ring) EnableNotify() bool { return r.ready > 0 }
func (r *ring) Taken(*Slot)        {}
func (r *ring) Answer(*Slot) error { return nil }
func (r *ring) Drop(*Slot)         {}
func (r *ring) Publish()           {}
func (r *ring) NeedSignal() bool   { return false }
func (r *ring) Fail(err error)     { panic(err) }
func (r *ring) Leak()              {}

func (r *ring) Take(s *Slot) (bool, error) {
	s.Req.Op, s.Req.Length, s.Block = block.OpRead, r.size, true
	if !r.busy {
		r.ready--
	}
	return true, nil
}

// rounds is how often the quiet peer asks.
const rounds = 20

func (r *ring) Submit(batch []*block.Request) {
	t := r.t
	for _, q := range batch {
		q.Ended = true
		if !r.busy {
			t.quiet++
			t.worst = max(t.worst, t.busy)
			t.busy = 0
			continue
		}
		t.busy++
	}
	switch {
	case t.quiet == rounds:
		select {
		case <-t.done:
		default:
			close(t.done)
		}
	case r.busy && t.busy >= 10_000:
		t.busy = 0
		t.kick()
	}
}

// device makes a ring's Submit a block.Device.
type device struct {
	block.Device
	*ring
}

func (d device) Submit(batch []*block.Request) { d.ring.Submit(batch) }

// TestBusyQueueLeavesTurns: a queue that is not polled and one that is kicked gets
// its turn soon although another one on its worker is never out of work, be its
// requests small or large. Counted in the other one's requests.
func TestBusyQueueLeavesTurns(t *testing.T) {
	for name, tt := range map[string]struct {
		size     uint64
		requests int
		kickless bool
	}{
		"small":    {4096, 3 * passLimit, false},
		"large":    {1 << 20, 4, false},
		"kickless": {4096, 3 * passLimit, true},
	} {
		t.Run(name, func(t *testing.T) {
			set, err := NewSet(Config{PollMax: -1})
			if err != nil {
				t.Fatal(err)
			}
			defer set.Close()
			tr := &turns{done: make(chan struct{})}
			busyRing, quietRing := &ring{t: tr, busy: true, size: tt.size}, &ring{t: tr, size: 4096}
			fd, err := mem.NewEventFD()
			if err != nil {
				t.Fatal(err)
			}
			defer unix.Close(fd)
			tr.kick = func() {
				if quietRing.ready++; !tt.kickless {
					if err := mem.SignalEventFD(fd); err != nil {
						t.Error(err)
					}
				}
			}
			quietKick := fd
			if tt.kickless {
				quietKick = -1
			}
			var count Counters
			busy := set.NewQueue(busyRing, device{nil, busyRing}, t, &count, 64)
			quiet := set.NewQueue(quietRing, device{nil, quietRing}, t, &count, 64)
			for _, q := range []struct {
				*Queue
				kick int
			}{{quiet, quietKick}, {busy, -1}} {
				q.Do(func() {
					if err := q.Start(q.kick, -1); err != nil {
						t.Error(err)
					}
				})
			}
			select {
			case <-tr.done:
			case <-time.After(2 * time.Minute):
				buf := make([]byte, 1<<20)
				t.Fatalf("the quiet queue was not served\n%s", buf[:runtime.Stack(buf, true)])
			}
			for _, q := range []*Queue{busy, quiet} {
				q.Stop()
				<-q.Drained()
				q.Release()
			}
			if tr.worst > tt.requests {
				t.Errorf("%d requests of the busy queue went before one of the quiet one; want at most %d", tr.worst, tt.requests)
			}
		})
	}
}
