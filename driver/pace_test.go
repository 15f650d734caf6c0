package driver

import (
	"testing"
	"time"
)

// TestPace: writers may be ahead of their pace by what they have done at once, and
// time that they did not use is not theirs to keep.
func TestPace(t *testing.T) {
	var p pace
	now := time.Unix(1000, 0)
	p.charge(now, 0)
	if a := p.ahead(now); a > 0 {
		t.Fatalf("ahead by %v of no pace", a)
	}
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
	now = now.Add(time.Hour)
	p.charge(now, 5*time.Millisecond)
	if a := p.ahead(now); a != 5*time.Millisecond {
		t.Fatalf("ahead by %v after an hour of rest and 5ms", a)
	}
}
