package limit

import (
	"math/rand/v2"
	"testing"

	"pgregory.net/rapid"

	"scoria/driver/block"
)

func ptr[T any](v T) *T { return &v }

// passed is a request that a gate let go.
type passed struct {
	at    int64
	class class
	bytes uint64
	late  int64 // how long it waited, ns
}

// sim drives a gate with a clock of its own.
type sim struct {
	g    gate
	now  int64
	done []passed
}

// offer submits a request and lets go what may pass.
func (s *sim) offer(c class, n uint64) {
	if s.g.pass(s.now, c, n) {
		s.done = append(s.done, passed{at: s.now, class: c, bytes: n})
		return
	}
	s.g.wait(&waiter{class: c, bytes: n, since: s.now})
}

// advance lets time pass, and requests with it.
func (s *sim) advance(until int64) {
	for {
		w, at := s.g.next(s.now)
		switch {
		case w != nil:
			s.done = append(s.done, passed{at: s.now, class: w.class, bytes: w.bytes, late: s.now - w.since})
		case at > until:
			s.now = max(s.now, until)
			return
		default:
			s.now = at
		}
	}
}

// exceeds returns the first stretch of time in which more passed than a bucket
// allows: rate × t + max(depth, the largest).
func exceeds(done []passed, r rate, cost func(*passed) uint64) (from, to int, over bool) {
	if r.perSecond == 0 {
		return 0, 0, false
	}
	depth := float64(r.depth) * float64(r.perSecond) / 1e9
	for i := range done {
		sum, largest := 0.0, depth
		for j := i; j < len(done); j++ {
			c := float64(cost(&done[j]))
			sum += c
			largest = max(largest, c)
			allowed := float64(done[j].at-done[i].at)*float64(r.perSecond)/1e9 + largest
			if sum > allowed*(1+1e-9)+1e-6 {
				return i, j, true
			}
		}
	}
	return 0, 0, false
}

func costOf(k kind) func(*passed) uint64 {
	return func(p *passed) uint64 {
		if k.class != both && k.class != p.class {
			return 0
		}
		if k.unit == inRequests {
			return 1
		}
		return p.bytes
	}
}

func drawSettings(t *rapid.T) Settings {
	var s Settings
	for _, name := range Names {
		f := s.number(name)
		if f == nil || rapid.IntRange(0, 2).Draw(t, name+" set") == 0 {
			continue
		}
		switch name {
		case "read_bps", "write_bps", "total_bps":
			*f = ptr(rapid.SampledFrom([]uint64{0, 4096, 1e6, 333_333_333, MaxRate}).Draw(t, name))
		case "burst_requests":
			*f = ptr(rapid.SampledFrom([]uint64{0, 1, 7, 1000}).Draw(t, name))
		case "burst_bytes":
			*f = ptr(rapid.SampledFrom([]uint64{0, 1, 4096, 1 << 20, MaxDepth}).Draw(t, name))
		default:
			*f = ptr(rapid.SampledFrom([]uint64{0, 1, 3, 100, 77_777, 1e6, MaxRate}).Draw(t, name))
		}
	}
	if rapid.Bool().Draw(t, "burst set") {
		s.Burst = ptr(rapid.SampledFrom([]float64{0, MinBurst, 1, 2.5, MaxBurst}).Draw(t, "burst"))
	}
	return s
}

// TestNeverMoreThanRateAndBurst: whatever is asked and when, no bucket lets more
// pass in any stretch of time than it promises, and everything passes in the end.
func TestNeverMoreThanRateAndBurst(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		set := drawSettings(t)
		if err := set.Check(); err != nil {
			t.Fatal(err)
		}
		rates := set.limits()
		var s sim
		s.g.set(0, rates)
		n := rapid.IntRange(1, 60).Draw(t, "requests")
		for range n {
			c := class(rapid.IntRange(0, 1).Draw(t, "class"))
			size := rapid.SampledFrom([]uint64{0, 512, 4096, 65536, block.MaxRequestBytes}).Draw(t, "bytes")
			s.offer(c, size)
			s.advance(s.now + rapid.SampledFrom([]int64{0, 1, 1000, 1e6, 1e9}).Draw(t, "pause"))
		}
		s.advance(1 << 60)
		if len(s.done) != n {
			t.Fatalf("%d of %d requests passed in 36 years", len(s.done), n)
		}
		for i := range rates {
			k := kind{class(i / 2), unit(i % 2)}
			if from, to, over := exceeds(s.done, rates[i], costOf(k)); over {
				t.Fatalf("%s (%d/s, depth %d ns): requests %d to %d: %+v", bucketNames[i], rates[i].perSecond, rates[i].depth, from, to, s.done[from:to+1])
			}
		}
	})
}

// TestFullUse: a volume that always has something waiting gets its whole rate.
func TestFullUse(t *testing.T) {
	for _, tt := range []struct {
		set  Settings
		size uint64
		rate float64 // requests per second
	}{
		{Settings{ReadIOPS: ptr(uint64(777))}, 4096, 777},
		{Settings{ReadBPS: ptr(uint64(10_000_000))}, 4096, 10e6 / 4096},
		{Settings{TotalIOPS: ptr(uint64(300)), ReadBPS: ptr(uint64(1 << 40))}, 4096, 300},
		{Settings{ReadBPS: ptr(uint64(1 << 20)), BurstBytes: ptr(uint64(4096))}, 1 << 20, 1}, // larger than the burst
		{Settings{ReadIOPS: ptr(uint64(999_983))}, 512, 999_983},                             // no whole number of ns
	} {
		rates := tt.set.limits()
		var s sim
		s.g.set(0, rates)
		const n = 20000
		for range n {
			s.offer(reads, tt.size)
		}
		s.advance(1 << 60)
		// What passed at the beginning was the burst.
		first := 0
		for first < n && s.done[first].at == 0 {
			first++
		}
		got := float64(n-first) / (float64(s.done[n-1].at) / 1e9)
		if got < 0.999*tt.rate || got > 1.001*tt.rate {
			t.Errorf("%+v: %.1f requests per second after the burst of %d; want %.1f", tt.set, got, first, tt.rate)
		}
	}
}

// TestNobodyStarves: small requests of one class under a limit on both can't keep
// a large one of the other waiting, however many there are.
func TestNobodyStarves(t *testing.T) {
	for seed := range uint64(20) {
		rnd := rand.New(rand.NewPCG(seed, 1))
		var s sim
		set := Settings{TotalBPS: ptr(uint64(1 << 20)), TotalIOPS: ptr(uint64(1000)), WriteBPS: ptr(uint64(1 << 19))}
		s.g.set(0, set.limits())
		for range 200 { // empty the buckets
			s.offer(reads, 4096)
		}
		asked := s.now
		s.offer(writes, 1<<20)
		for i := range 20000 {
			s.offer(reads, 4096)
			s.advance(s.now + int64(rnd.Uint64N(1e6)))
			if i == 0 {
				asked = s.now
			}
		}
		var write *passed
		for i := range s.done {
			if s.done[i].class == writes {
				write = &s.done[i]
			}
		}
		// 800 KiB were before it, it has 1 MiB itself, and its own limit takes 2 s.
		if write == nil || write.at-asked > 4e9 {
			t.Fatalf("seed %d: the write passed %+v; want within 4 s", seed, write)
		}
	}
}

// TestReadsDontWaitForWrites: a limit on writes alone holds up no read.
func TestReadsDontWaitForWrites(t *testing.T) {
	var s sim
	set := Settings{WriteIOPS: ptr(uint64(1))}
	s.g.set(0, set.limits())
	for range 100 {
		s.offer(writes, 4096)
		s.offer(reads, 4096)
	}
	if n := len(s.done); n != 101 {
		t.Fatalf("%d requests passed at once; want all 100 reads and 1 write", n)
	}
}

// TestChangeKeepsDebt: a new rate takes effect for what waits, and raising it does
// not forgive what was taken too early.
func TestChangeKeepsDebt(t *testing.T) {
	var s sim
	slow, fast := Settings{WriteBPS: ptr(uint64(1 << 20))}, Settings{WriteBPS: ptr(uint64(1 << 30))}
	s.g.set(0, slow.limits())
	s.offer(writes, 32<<20) // passes, as the bucket is full: 32 s of debt
	s.offer(writes, 4096)
	s.advance(1e9)
	if len(s.done) != 1 {
		t.Fatalf("%d passed under the slow limit; want 1", len(s.done))
	}
	s.g.set(s.now, fast.limits())
	s.advance(s.now + 1)
	if len(s.done) != 2 { // 31 MiB are 30 ms now, less than the depth of 100 ms
		t.Fatalf("%d passed under the fast limit; want 2", len(s.done))
	}
	s.g.set(s.now, slow.limits())
	s.offer(writes, 4096)
	s.advance(s.now + 29e9)
	if len(s.done) != 2 {
		t.Fatal("the debt was forgiven")
	}
	s.advance(s.now + 3e9)
	if len(s.done) != 3 {
		t.Fatal("the debt grew")
	}
	s.offer(writes, 1<<20)
	s.offer(writes, 1<<20)
	s.g.set(s.now, [kinds]rate{})
	s.advance(s.now)
	if len(s.done) != 5 {
		t.Fatalf("%d passed without limits; want all", len(s.done))
	}
}

// TestNewLimitsHoldFromTheChangeOn: between two changes no more passes than the
// limits of that time allow.
func TestNewLimitsHoldFromTheChangeOn(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var s sim
		rates := [kinds]rate{}
		for range rapid.IntRange(1, 8).Draw(t, "changes") {
			set := drawSettings(t)
			rates = set.limits()
			s.g.set(s.now, rates)
			s.done = nil
			for range rapid.IntRange(0, 20).Draw(t, "requests") {
				s.offer(class(rapid.IntRange(0, 1).Draw(t, "class")), rapid.SampledFrom([]uint64{512, 4096, 1 << 20}).Draw(t, "bytes"))
				s.advance(s.now + rapid.SampledFrom([]int64{0, 1e6, 1e9}).Draw(t, "pause"))
			}
			for i := range rates {
				k := kind{class(i / 2), unit(i % 2)}
				if from, to, over := exceeds(s.done, rates[i], costOf(k)); over {
					t.Fatalf("%s: requests %d to %d of %+v", bucketNames[i], from, to, s.done)
				}
			}
		}
	})
}
