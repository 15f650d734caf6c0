package blocktest

import (
	"bytes"
	"context"
	"errors"
	"math"
	"sync"
	"time"

	"scoria/driver/block"
)

// extents collects BlockStatus and checks that it covers exactly what it should.
func (s *suite) extents(off, length uint64) []block.Extent {
	s.Helper()
	var list []block.Extent
	at, end := off, min(s.dev.Info().Size, off+min(length, math.MaxUint64-off))
	if err := s.dev.BlockStatus(context.Background(), off, length, func(e block.Extent) bool {
		if e.Offset != at || e.Length == 0 || e.Length > end-at {
			s.Fatalf("BlockStatus(%d, %d): extent [%d,+%d) follows %d (end %d)", off, length, e.Offset, e.Length, at, end)
		}
		at += e.Length
		list = append(list, e)
		return true
	}); err != nil {
		s.Fatalf("BlockStatus(%d, %d): %v", off, length, err)
	}
	if at < end {
		s.Fatalf("BlockStatus(%d, %d) ends at %d, want %d", off, length, at, end)
	}
	return list
}

// mappedBytes sums the mapped extents.
func mappedBytes(list []block.Extent) (n uint64) {
	for _, e := range list {
		if e.Mapped {
			n += e.Length
		}
	}
	return n
}

func (s *suite) testBlockStatus() {
	size := s.info.Size
	if n := mappedBytes(s.extents(0, size)); n != 0 {
		s.Errorf("a fresh device has %d mapped bytes", n)
	}
	s.write(1<<20, pattern(8*block.ClusterSize, 1))
	s.write(2<<20+block.ClusterSize-s.lb, pattern(s.lb, 2))
	if n := mappedBytes(s.extents(0, size)); n != 9*block.ClusterSize {
		s.Errorf("%d bytes are mapped after writes to 9 clusters, want %d", n, 9*block.ClusterSize)
	}
	if n := mappedBytes(s.extents(1<<20, 8*block.ClusterSize)); n != 8*block.ClusterSize {
		s.Errorf("%d bytes of the written range are mapped, want all %d", n, 8*block.ClusterSize)
	}
	// Ranges that begin and end anywhere, inside and behind the device.
	for _, r := range []struct{ off, length uint64 }{
		{0, 0}, {0, 1}, {1<<20 - 1, 2}, {1<<20 + 17, 5000}, {size - 1, 1}, {size - 1, 100}, {size, 1}, {size, 0},
		{size + 5, 5}, {0, math.MaxUint64}, {1 << 20, math.MaxUint64}, {math.MaxUint64, math.MaxUint64},
	} {
		s.extents(r.off, r.length)
	}
	// Whole clusters that are discarded are unmapped again; what is called
	// unmapped must read as zeroes.
	for i, op := range []block.Op{block.OpDiscard, block.OpWriteZeroes} {
		off := 1<<20 + uint64(i)*2*block.ClusterSize
		if err := do(s.dev, op, 0, off, 2*block.ClusterSize); err != nil {
			s.Fatal(err)
		}
		if n := mappedBytes(s.extents(off, 2*block.ClusterSize)); n != 0 {
			s.Errorf("%d bytes are mapped in two clusters after %s", n, op)
		}
	}
	for _, e := range s.extents(0, 4<<20) {
		if !e.Mapped {
			s.expect(e.Offset, make([]byte, e.Length))
		}
	}
	// fn ends the walk.
	calls := 0
	if err := s.dev.BlockStatus(context.Background(), 0, size, func(block.Extent) bool { calls++; return calls < 2 }); err != nil || calls != 2 {
		s.Errorf("BlockStatus called fn %d times, want 2 (%v)", calls, err)
	}
}

func (s *suite) testClaim() {
	vhost, nbd1, nbd2 := block.Claimant{Kind: "vhost", ID: "1"}, block.Claimant{Kind: "nbd", ID: "1"}, block.Claimant{Kind: "nbd", ID: "2"}
	release, err := s.dev.Claim(nbd1)
	if err != nil {
		s.Fatalf("first claim: %v", err)
	}
	refused := func(c block.Claimant) {
		s.Helper()
		var inUse *block.InUseError
		if _, err := s.dev.Claim(c); !errors.As(err, &inUse) {
			s.Fatalf("claim by %s: %v, want InUseError", c, err)
		}
		if inUse.Holder != nbd1 || inUse.Volume != s.info.Name {
			s.Errorf("InUseError %+v names the wrong holder or volume", inUse)
		}
	}
	refused(vhost)
	refused(nbd2)
	again, err := s.dev.Claim(nbd1)
	if err != nil {
		s.Fatalf("second claim of the same claimant: %v", err)
	}
	release()
	release() // a release counts once
	refused(vhost)
	refused(nbd2)
	again()
	release, err = s.dev.Claim(vhost)
	if err != nil {
		s.Fatalf("claim after the last release: %v", err)
	}
	again() // a release of an earlier claim doesn't end a later one
	if _, err := s.dev.Claim(nbd2); err == nil {
		s.Error("two claimants at once")
	}
	release()
}

func (s *suite) testClaimRace() {
	for range 50 {
		const claimants = 8
		var wg sync.WaitGroup
		var mu sync.Mutex
		var held []func()
		for i := range claimants {
			wg.Go(func() {
				release, err := s.dev.Claim(block.Claimant{Kind: "test", ID: string(rune('a' + i))})
				if err == nil {
					mu.Lock()
					held = append(held, release)
					mu.Unlock()
				}
			})
		}
		wg.Wait()
		if len(held) != 1 {
			s.Fatalf("%d claimants hold the claim, want 1", len(held))
		}
		held[0]()
	}
}

// testCancel cancels while requests are under way: each ends once, normally or
// with ErrCanceled. A Staller shows besides that waiting requests of one owner,
// and only those, end at once.
func (s *suite) testCancel() {
	owners := [2]any{new(int), new(int)}
	start := func(n int) (flights []*flight) {
		for i := range n {
			f := newFlight(block.OpWrite, 0, uint64(i)*block.ClusterSize, block.ClusterSize, pattern(block.ClusterSize, uint64(i)))
			f.Owner = owners[i%2]
			flights = append(flights, f)
		}
		submit(s.dev, flights...)
		return flights
	}
	flights := start(64)
	s.dev.Cancel(owners[0])
	s.dev.Cancel(owners[0])
	s.dev.Cancel(new(int))
	s.dev.Cancel(nil)
	for i, f := range flights {
		err := f.wait()
		if err == nil || i%2 == 0 && errors.Is(err, block.ErrCanceled) {
			continue
		}
		s.Fatalf("%s of owner %d after Cancel of owner 0: %v", f, i%2, err)
	}
	staller, ok := s.dev.(Staller)
	if !ok {
		return
	}
	resume := staller.Stall()
	defer resume()
	flights = start(16)
	s.dev.Cancel(owners[0])
	for i := 0; i < len(flights); i += 2 {
		if err := flights[i].wait(); !errors.Is(err, block.ErrCanceled) {
			s.Errorf("%s that waits for room, after Cancel: %v, want ErrCanceled", flights[i], err)
		}
	}
	for i := 1; i < len(flights); i += 2 {
		if flights[i].Ended || flights[i].calls.Load() != 0 {
			s.Fatalf("%s of another owner did not wait for room: %v", flights[i], flights[i].Err)
		}
	}
	s.expect(uint64(2<<20), make([]byte, block.ClusterSize)) // reads go on
	resume()
	for i := 1; i < len(flights); i += 2 {
		if err := flights[i].wait(); err != nil {
			s.Errorf("%s after the stall: %v", flights[i], err)
		}
		s.expect(flights[i].Offset, bytes.Join(flights[i].Segments, nil))
	}
}

func (s *suite) testWatch() {
	infos := make(chan block.Info, 100)
	cancel := s.dev.Watch(func(i block.Info) { infos <- i })
	gone := s.dev.Watch(func(block.Info) { s.Error("a canceled watcher was called") })
	gone()
	gone()
	defer cancel()
	resizer, ok := s.dev.(Resizer)
	if !ok {
		s.Skip("the device has no Resize(size uint64) error")
	}
	size := s.info.Size + 4<<20
	if err := resizer.Resize(size); err != nil {
		s.Fatalf("resize to %d: %v", size, err)
	}
	select {
	case i := <-infos:
		if i.Size != size {
			s.Errorf("watcher saw size %d, want %d", i.Size, size)
		}
	case <-time.After(patience):
		hang("the watcher was not called after a resize")
	}
	if got := s.dev.Info().Size; got != size {
		s.Errorf("size is %d after a resize to %d", got, size)
	}
	s.expect(s.info.Size, make([]byte, 4<<20))
	p := pattern(2*block.ClusterSize, 1)
	s.write(s.info.Size-block.ClusterSize, p)
	s.expect(s.info.Size-block.ClusterSize, p)
	if err := do(s.dev, block.OpWrite, 0, size, s.lb, p[:s.lb]); !errors.Is(err, block.ErrRange) {
		s.Errorf("write behind the new end: %v, want ErrRange", err)
	}
}
