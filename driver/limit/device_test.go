package limit

import (
	"bytes"
	"errors"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"scoria/driver/block"
	"scoria/driver/block/blocktest"
)

// staller lets the conformance suite make requests wait below the limits.
type staller struct {
	*Device
	ram *blocktest.RAM
}

func (s staller) Stall() func()            { return s.ram.Stall() }
func (s staller) Resize(size uint64) error { return s.ram.Resize(size) }

// TestConformance: a limited device is a device, with limits that hold up nearly
// everything, some, and nothing.
func TestConformance(t *testing.T) {
	for name, set := range map[string]Settings{
		"none":  {},
		"tight": {ReadIOPS: ptr(uint64(200_000)), WriteIOPS: ptr(uint64(200_000)), BurstRequests: ptr(uint64(1))},
		"loose": {TotalBPS: ptr(uint64(4 << 30)), TotalIOPS: ptr(uint64(1e6)), Burst: ptr(1.0)},
	} {
		for mode, m := range map[string]blocktest.Mode{"sync": blocktest.Sync, "mixed": blocktest.Mixed} {
			t.Run(name+"-"+mode, func(t *testing.T) {
				blocktest.Run(t, func(t *testing.T) block.Device {
					ram := blocktest.NewRAM(blocktest.MinSize, blocktest.Options{Mode: m})
					t.Cleanup(ram.Close)
					d := New(ram)
					d.Set(set)
					return staller{d, ram}
				})
			})
		}
	}
}

// flight is a request and how it ended.
type flight struct {
	block.Request
	calls atomic.Int32
}

func newFlight(op block.Op, n uint64, owner any) *flight {
	f := &flight{Request: block.Request{Op: op, Length: n, Owner: owner, Segments: [][]byte{make([]byte, n)}}}
	f.Complete = func(*block.Request) { f.calls.Add(1) }
	return f
}

func submit(d block.Device, list ...*flight) {
	batch := make([]*block.Request, len(list))
	for i, f := range list {
		batch[i] = &f.Request
	}
	d.Submit(batch)
}

// ended reports whether the request has ended, once.
func (f *flight) ended(t *testing.T) bool {
	t.Helper()
	calls := f.calls.Load()
	if calls > 1 || f.Ended && calls > 0 {
		t.Fatalf("%s ended more than once", f.Op)
	}
	return f.Ended || calls == 1
}

func countEnded(t *testing.T, list []*flight) (n int) {
	for _, f := range list {
		if f.ended(t) {
			n++
		}
	}
	return n
}

func ramDevice(t *testing.T) *Device {
	ram := blocktest.NewRAM(blocktest.MinSize, blocktest.Options{})
	t.Cleanup(ram.Close)
	return New(ram)
}

// TestRateOnTheClock: with 10 requests per second and a burst of 5, of 25 writes
// 5 end at once and the rest in 2 s; a change takes effect for those that wait.
func TestRateOnTheClock(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := ramDevice(t)
		d.Set(Settings{WriteIOPS: ptr(uint64(10)), BurstRequests: ptr(uint64(5))})
		var list []*flight
		for range 25 {
			list = append(list, newFlight(block.OpWrite, 4096, nil))
		}
		submit(d, list...)
		if n := countEnded(t, list); n != 5 {
			t.Fatalf("%d ended at once; want the burst of 5", n)
		}
		time.Sleep(time.Second + time.Millisecond)
		synctest.Wait()
		if n := countEnded(t, list); n != 15 {
			t.Fatalf("%d ended within a second; want 15", n)
		}
		if st := d.Stats(); st.Waiting != 10 || !st.Limited || st.By != "write_iops" || st.WritesDelayed != 20 || st.Oldest < time.Second {
			t.Fatalf("%+v", st)
		}
		d.Set(Settings{WriteIOPS: ptr(uint64(1000))})
		time.Sleep(20 * time.Millisecond)
		synctest.Wait()
		if n := countEnded(t, list); n != 25 {
			t.Fatalf("%d ended after the limit was raised; want all", n)
		}
		st := d.Stats()
		if !st.Limited || st.WriteWait < 10*time.Second || st.WriteWait > 25*time.Second {
			t.Fatalf("%+v", st)
		}
		time.Sleep(2 * recent)
		if d.Stats().Limited {
			t.Fatal("limited although nothing has waited for a while")
		}
	})
}

// TestClearLetsEverythingGo: without limits nothing waits any more.
func TestClearLetsEverythingGo(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := ramDevice(t)
		d.Set(Settings{TotalBPS: ptr(uint64(MinBPS)), BurstBytes: ptr(uint64(1))})
		list := []*flight{newFlight(block.OpRead, 1<<20, nil), newFlight(block.OpRead, 4096, nil), newFlight(block.OpWrite, 4096, nil)}
		submit(d, list...)
		if n := countEnded(t, list); n != 1 {
			t.Fatalf("%d ended; want the first alone", n)
		}
		d.Set(Settings{})
		synctest.Wait()
		if n := countEnded(t, list); n != 3 {
			t.Fatalf("%d ended without limits; want all", n)
		}
	})
}

// TestP1FlushPassesWaitingWrites: a flush waits for no limit on bytes, and a write
// that waits has not reached the device when it ends.
func TestP1FlushPassesWaitingWrites(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var mu sync.Mutex
		var seen []block.Op
		ram := blocktest.NewRAM(blocktest.MinSize, blocktest.Options{Trace: func(r *block.Request) {
			mu.Lock()
			defer mu.Unlock()
			seen = append(seen, r.Op)
		}})
		defer ram.Close()
		d := New(ram)
		d.Set(Settings{WriteBPS: ptr(uint64(MinBPS)), ReadIOPS: ptr(uint64(1)), BurstBytes: ptr(uint64(1))})
		first, late, flush := newFlight(block.OpWrite, 4096, nil), newFlight(block.OpWrite, 4096, nil), newFlight(block.OpFlush, 0, nil)
		submit(d, first, late, flush)
		if !first.ended(t) || late.ended(t) || !flush.ended(t) {
			t.Fatalf("ended: write %v, write that waits %v, flush %v", first.ended(t), late.ended(t), flush.ended(t))
		}
		mu.Lock()
		got := len(seen)
		mu.Unlock()
		if got != 2 {
			t.Fatalf("the device saw %v", seen)
		}
		time.Sleep(2 * time.Second)
		synctest.Wait()
		if !late.ended(t) || len(seen) != 3 {
			t.Fatal("the write never came")
		}
	})
}

// TestCancelAndHasten: Cancel ends what one owner has waiting; Hasten carries it
// out, and later requests pay for it.
func TestCancelAndHasten(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := ramDevice(t)
		d.Set(Settings{WriteIOPS: ptr(uint64(1)), BurstRequests: ptr(uint64(1))})
		a, b := new(int), new(int)
		submit(d, newFlight(block.OpWrite, 4096, nil))
		var ofA, ofB []*flight
		for range 4 {
			ofA, ofB = append(ofA, newFlight(block.OpWrite, 4096, a)), append(ofB, newFlight(block.OpWrite, 4096, b))
		}
		submit(d, append(ofA, ofB...)...)
		d.Cancel(a)
		synctest.Wait()
		for _, f := range ofA {
			if !f.ended(t) || !errors.Is(f.Err, block.ErrCanceled) {
				t.Fatalf("after Cancel: %v", f.Err)
			}
		}
		if n := countEnded(t, ofB); n != 0 {
			t.Fatalf("%d of another owner ended", n)
		}
		block.Hasten(d, b)
		synctest.Wait()
		if n := countEnded(t, ofB); n != 4 || ofB[0].Err != nil {
			t.Fatalf("%d of 4 ended after Hasten, %v", n, ofB[0].Err)
		}
		next := newFlight(block.OpWrite, 4096, b)
		submit(d, next)
		time.Sleep(4500 * time.Millisecond)
		synctest.Wait()
		if next.ended(t) {
			t.Fatal("what was hastened was not counted")
		}
		time.Sleep(time.Second)
		synctest.Wait()
		if !next.ended(t) {
			t.Fatal("the next request never passed")
		}
		if st := d.Stats(); st.Waiting != 0 {
			t.Fatalf("%+v", st)
		}
	})
}

// TestDataArrives: requests that waited carry their data both ways.
func TestDataArrives(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := ramDevice(t)
		d.Set(Settings{TotalIOPS: ptr(uint64(2)), BurstRequests: ptr(uint64(1))})
		w := newFlight(block.OpWrite, 4096, nil)
		for i := range w.Segments[0] {
			w.Segments[0][i] = byte(i)
		}
		submit(d, newFlight(block.OpRead, 512, nil), w)
		time.Sleep(time.Second)
		synctest.Wait()
		r := newFlight(block.OpRead, 4096, nil)
		submit(d, newFlight(block.OpRead, 512, nil), r)
		time.Sleep(3 * time.Second)
		synctest.Wait()
		if !w.ended(t) || !r.ended(t) || !bytes.Equal(r.Segments[0], w.Segments[0]) {
			t.Fatal("the data did not come back")
		}
	})
}

// TestChangesUnderLoad submits, changes, cancels and hastens from several
// goroutines: every request ends exactly once.
func TestChangesUnderLoad(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ram := blocktest.NewRAM(blocktest.MinSize, blocktest.Options{Mode: blocktest.Mixed})
		d := New(ram)
		var wg sync.WaitGroup
		all := make([][]*flight, 4)
		for i := range all {
			owner := new(int)
			wg.Go(func() {
				for j := range 300 {
					f := newFlight(block.Op(j%2), uint64(j%3+1)*4096, owner)
					all[i] = append(all[i], f)
					submit(d, f)
					switch j % 50 {
					case 20:
						d.Cancel(owner)
					case 40:
						d.Hasten(owner)
					}
					time.Sleep(time.Duration(j%5) * time.Millisecond)
				}
			})
		}
		for i := range 60 {
			d.Set([]Settings{
				{WriteIOPS: ptr(uint64(20))}, {}, {TotalBPS: ptr(uint64(1 << 20)), Burst: ptr(0.02)},
			}[i%3])
			time.Sleep(10 * time.Millisecond)
		}
		wg.Wait()
		time.Sleep(time.Hour)
		synctest.Wait()
		ram.Close()
		for i := range all {
			if n := countEnded(t, all[i]); n != 300 {
				t.Fatalf("goroutine %d: %d of 300 ended", i, n)
			}
		}
		if st := d.Stats(); st.Waiting != 0 {
			t.Fatalf("%+v", st)
		}
	})
}

// TestNoAllocation holds the promise of the hot paths: none without limits, and
// none for requests that pass or wait once waiters are there for reuse.
func TestNoAllocation(t *testing.T) {
	d := New(instant{})
	f := newFlight(block.OpWrite, 4096, nil)
	batch := []*block.Request{&f.Request}
	if n := testing.AllocsPerRun(1000, func() { d.Submit(batch) }); n != 0 {
		t.Errorf("%v allocations without limits", n)
	}
	d.Set(Settings{WriteIOPS: ptr(uint64(MaxRate))})
	if n := testing.AllocsPerRun(1000, func() { d.Submit(batch) }); n != 0 {
		t.Errorf("%v allocations of a request that passes", n)
	}
}

// instant answers everything at once.
type instant struct{ block.Device }

func (instant) Submit(batch []*block.Request) {
	for _, r := range batch {
		r.Err, r.Ended = nil, true
	}
}

func BenchmarkSubmit(b *testing.B) {
	f := newFlight(block.OpWrite, 4096, nil)
	batch := make([]*block.Request, 16)
	for i := range batch {
		batch[i] = &f.Request
	}
	for name, dev := range map[string]block.Device{"bare": instant{}, "unlimited": New(instant{}), "passing": func() block.Device {
		d := New(instant{})
		d.Set(Settings{WriteIOPS: ptr(uint64(MaxRate)), TotalBPS: ptr(uint64(MaxRate)), Burst: ptr(MaxBurst)})
		return d
	}()} {
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			for range b.N {
				dev.Submit(batch)
			}
		})
	}
}
