package limit

import (
	"errors"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"scoria/driver/block"
	"scoria/driver/block/blocktest"
)

// TestFlushesCount: where requests of writes are limited, flushes wait in their line
// and take their turn, in order, also when writes and reads are limited together.
func TestFlushesCount(t *testing.T) {
	for name, set := range map[string]Settings{
		"writes":   {WriteIOPS: ptr(uint64(1)), BurstRequests: ptr(uint64(1))},
		"together": {TotalIOPS: ptr(uint64(1)), BurstRequests: ptr(uint64(1))},
	} {
		t.Run(name, func(t *testing.T) {
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
				d.Set(set)
				fua := newFlight(block.OpWrite, 4096, nil)
				fua.Flags = block.FUA
				list := []*flight{newFlight(block.OpFlush, 0, nil), newFlight(block.OpWrite, 4096, nil), newFlight(block.OpFlush, 0, nil), fua}
				submit(d, list...)
				for n := 1; n <= len(list); n++ {
					synctest.Wait()
					if got := countEnded(t, list); got != n || !list[n-1].ended(t) {
						t.Fatalf("after %d turns %d have ended", n, got)
					}
					time.Sleep(time.Second)
				}
				if want := []block.Op{block.OpFlush, block.OpWrite, block.OpFlush, block.OpWrite}; !slices.Equal(seen, want) {
					t.Fatalf("the device saw %v", seen)
				}
				if st := d.Stats(); st.WritesDelayed != 3 || st.Waiting != 0 {
					t.Fatalf("%+v", st)
				}
				d.Set(Settings{WriteIOPS: ptr(uint64(1)), ReadBPS: ptr(uint64(MinBPS)), BurstRequests: ptr(uint64(1))})
				late := newFlight(block.OpFlush, 0, nil)
				submit(d, newFlight(block.OpWrite, 4096, nil), late)
				d.Set(Settings{ReadBPS: ptr(uint64(MinBPS))})
				synctest.Wait()
				if !late.ended(t) {
					t.Fatal("a flush waits for a limit that is gone")
				}
			})
		})
	}
}

// TestSharesTakeFromTheSameLimits: what several devices under one limit do together is
// within it, each request reaches its own device, and a device's requests are canceled
// and hastened by themselves.
func TestSharesTakeFromTheSameLimits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := ramDevice(t)
		d.Set(Settings{ReadIOPS: ptr(uint64(10)), WriteIOPS: ptr(uint64(1)), BurstRequests: ptr(uint64(5))})
		snap := blocktest.NewRAM(blocktest.MinSize, blocktest.Options{})
		defer snap.Close()
		data := newFlight(block.OpWrite, 4096, nil)
		data.Segments[0][0] = 7
		submit(snap, data)
		s := d.Share(snap)
		var list []*flight
		for i := range 20 {
			f := newFlight(block.OpRead, 4096, nil)
			list = append(list, f)
			if i%2 == 0 {
				submit(d, f)
			} else {
				submit(s, f)
			}
		}
		if n := countEnded(t, list); n != 5 {
			t.Fatalf("%d ended at once; want the burst of 5", n)
		}
		time.Sleep(time.Second + time.Millisecond)
		synctest.Wait()
		if n := countEnded(t, list); n != 15 {
			t.Fatalf("%d ended within a second; want 15", n)
		}
		time.Sleep(time.Second)
		synctest.Wait()
		for i, f := range list {
			if want := byte(i % 2 * 7); !f.ended(t) || f.Err != nil || f.Segments[0][0] != want {
				t.Fatalf("read %d: ended %v, %v, %d; want %d", i, f.ended(t), f.Err, f.Segments[0][0], want)
			}
		}
		var mine, others []*flight
		owner := new(int)
		for range 10 {
			mine, others = append(mine, newFlight(block.OpRead, 4096, owner)), append(others, newFlight(block.OpRead, 4096, owner))
		}
		submit(d, others...)
		submit(s, mine...)
		flush := newFlight(block.OpFlush, 0, owner)
		submit(s, flush)
		if !flush.ended(t) {
			t.Error("a flush of what is read only waits")
		}
		s.Cancel(owner)
		canceled := 0
		for _, f := range mine {
			if f.ended(t) && errors.Is(f.Err, block.ErrCanceled) {
				canceled++
			}
		}
		if done := countEnded(t, others); canceled != 10 || done == 10 {
			t.Fatalf("%d canceled of the share's, %d ended of the other's", canceled, done)
		}
		block.Hasten(s, owner)
		synctest.Wait()
		if n := countEnded(t, others); n == 10 {
			t.Fatal("hastening the share hastened the other")
		}
		block.Hasten(d, owner)
		synctest.Wait()
		if n := countEnded(t, others); n != 10 {
			t.Fatalf("%d ended after Hasten", n)
		}
	})
}

// TestShareConformance: a device under another one's limits is a device.
func TestShareConformance(t *testing.T) {
	blocktest.Run(t, func(t *testing.T) block.Device {
		ram := blocktest.NewRAM(blocktest.MinSize, blocktest.Options{Mode: blocktest.Mixed})
		t.Cleanup(ram.Close)
		d := ramDevice(t)
		d.Set(Settings{ReadIOPS: ptr(uint64(200_000)), WriteIOPS: ptr(uint64(200_000)), BurstRequests: ptr(uint64(1))})
		return sharedStaller{d.Share(ram), ram}
	})
}

// sharedStaller lets the conformance suite make requests wait below the limits.
type sharedStaller struct {
	*Shared
	ram *blocktest.RAM
}

func (s sharedStaller) Stall() func()            { return s.ram.Stall() }
func (s sharedStaller) Resize(size uint64) error { return s.ram.Resize(size) }
