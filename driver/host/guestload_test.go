package host

import (
	"math/bits"
	"testing"
	"time"

	"scoria/driver"
)

// fakeGuests are guests whose waits a test makes up, and their clock.
type fakeGuests struct {
	w   driver.GuestWaits
	now time.Time
}

func (f *fakeGuests) add(l *driver.Latency, took time.Duration, n uint64) {
	l.Buckets[bits.Len64(uint64(took))] += n
	l.Count += n
}

func (f *fakeGuests) load(limit time.Duration) *guestLoad {
	return newGuestLoad(func() driver.GuestWaits { return f.w }, limit, func() time.Time { return f.now })
}

// TestGuestLoad: guests wait when one in a hundred of their requests is slow, of any
// kind, when writes are parked or slowed down; and only as long as that lasts.
func TestGuestLoad(t *testing.T) {
	const limit = 10 * time.Millisecond
	for _, tt := range []struct {
		name string
		do   func(f *fakeGuests)
		want bool
	}{
		{"idle", func(*fakeGuests) {}, false},
		{"fast", func(f *fakeGuests) { f.add(&f.w.Flush, time.Millisecond, 1000); f.add(&f.w.Read, limit/2, 50) }, false},
		{"one in a hundred", func(f *fakeGuests) { f.add(&f.w.Read, time.Millisecond, 99); f.add(&f.w.Read, time.Second, 1) }, false},
		{"two in a hundred", func(f *fakeGuests) { f.add(&f.w.Read, time.Millisecond, 98); f.add(&f.w.Read, time.Second, 2) }, true},
		{"a slow flush", func(f *fakeGuests) { f.add(&f.w.Flush, 2*limit, 1) }, true},
		{"a late write", func(f *fakeGuests) { f.add(&f.w.Log, 2*limit, 1) }, true},
		{"parked writes", func(f *fakeGuests) { f.w.Parked = 1 }, true},
		{"throttled", func(f *fakeGuests) { f.w.Throttling = true }, true},
	} {
		f := &fakeGuests{now: time.Unix(1000, 0)}
		f.add(&f.w.Read, time.Minute, 100) // before maintenance looked for the first time
		g := f.load(limit)
		tt.do(f)
		f.now = f.now.Add(guestLook)
		if got := g.busy(); got != tt.want {
			t.Errorf("%s: busy %v, want %v", tt.name, got, tt.want)
		}
		// The same answer until the next look, then that of what happened since.
		f.w.Parked, f.w.Throttling = 0, false
		f.now = f.now.Add(guestLook - 1)
		if got := g.busy(); got != tt.want {
			t.Errorf("%s: busy %v before the next look, want %v", tt.name, got, tt.want)
		}
		f.now = f.now.Add(1)
		if g.busy() {
			t.Errorf("%s: still busy after all was well", tt.name)
		}
	}
}

// TestGuestLoadForgets: what happened while no maintenance asked, and the counts of
// a volume that was closed, say nothing of now.
func TestGuestLoadForgets(t *testing.T) {
	f := &fakeGuests{now: time.Unix(1000, 0)}
	g := f.load(10 * time.Millisecond)
	f.add(&f.w.Flush, time.Second, 10)
	f.now = f.now.Add(time.Hour)
	if g.busy() {
		t.Error("a guest that waited some time in the last hour counts as one that waits")
	}
	f.w.Flush = driver.Latency{}
	f.add(&f.w.Flush, 2*time.Second, 1)
	f.now = f.now.Add(guestLook)
	if g.busy() {
		t.Error("counts that fell were taken for slow requests")
	}
	f.add(&f.w.Flush, 2*time.Second, 1)
	f.now = f.now.Add(guestLook)
	if !g.busy() {
		t.Error("a slow flush was not noticed")
	}
}
