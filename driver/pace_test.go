package driver

import (
	"testing"
	"time"

	"scoria/driver/block"
)

// TestPace: writers may be ahead of their pace by what they have done at once. A pause
// that took too long is made up for; of a long rest no more than that is theirs to keep.
func TestPace(t *testing.T) {
	var p pace
	now := time.Unix(1000, 0)
	p.charge(now, 0)
	if a := p.ahead(now); a > 0 {
		t.Fatalf("ahead by %v of no pace", a)
	}
	p.charge(now, maxBehind)
	for range 1000 {
		p.charge(now, time.Microsecond)
	}
	if a := p.ahead(now); a != time.Millisecond {
		t.Fatalf("ahead by %v after 1000 writes of 1µs", a)
	}
	now = now.Add(400 * time.Microsecond)
	if a := p.ahead(now); a != 600*time.Microsecond {
		t.Fatalf("ahead by %v after 400µs", a)
	}
	now = now.Add(5 * time.Millisecond)
	p.charge(now, 5*time.Millisecond)
	if a := p.ahead(now); a != 600*time.Microsecond {
		t.Fatalf("ahead by %v after a pause that took 5ms too long, which is as much as was written", a)
	}
	now = now.Add(time.Hour)
	p.charge(now, maxBehind+5*time.Millisecond)
	if a := p.ahead(now); a != 5*time.Millisecond {
		t.Fatalf("ahead by %v after an hour of rest and 5ms more than that is worth", a)
	}
}

// TestGainRate: guests are slowed around the rate at which the scrubber can gain space.
// What it took to gain little, because they wrote little, must not count: the next burst
// would be held to that.
func TestGainRate(t *testing.T) {
	const enough = 1000
	var r gainRate
	now, gain := time.Unix(1000, 0), int64(0)
	work := func(clusters int64, per time.Duration) {
		now, gain = now.Add(time.Duration(clusters)*per), gain+clusters*block.ClusterSize
		r.measure(now, gain, enough)
	}
	r.restart(now, gain)
	work(enough-1, 10*time.Microsecond)
	if r.perCluster != 0 {
		t.Fatalf("%v for a cluster after too few", r.perCluster)
	}
	work(1, 10*time.Microsecond)
	if r.perCluster != 10*time.Microsecond {
		t.Fatalf("%v for a cluster, want 10µs", r.perCluster)
	}
	for range 100 { // little to do: it works for 10 ms in each half second
		now = now.Add(490 * time.Millisecond)
		r.restart(now, gain)
		work(enough, 10*time.Microsecond)
	}
	if r.perCluster != 10*time.Microsecond {
		t.Fatalf("%v for a cluster after rests between work at 10µs each", r.perCluster)
	}
	for range 100 {
		work(enough, 20*time.Microsecond)
	}
	if r.perCluster < 19*time.Microsecond || r.perCluster > 20*time.Microsecond {
		t.Fatalf("%v for a cluster where it takes 20µs now", r.perCluster)
	}
}
