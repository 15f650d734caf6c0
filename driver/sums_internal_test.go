package driver

import "testing"

// TestSumsAreBounded: a store that takes nothing does not make the daemon keep the
// checksums of all that waits.
func TestSumsAreBounded(t *testing.T) {
	var c sumCache
	const each = maxSums / 4
	key := func(n uint64) fileKey { return fileKey{tag: 1, sco: n} }
	for n := range uint64(10) {
		c.put(key(n), make([]uint32, each))
		c.put(key(n), make([]uint32, each)) // said twice, counted once
	}
	c.put(key(100), nil)
	c.put(key(101), make([]uint32, maxSums+1))
	if c.held != maxSums || len(c.m) != 4 || len(c.order) != 4 {
		t.Fatalf("%d sums of %d SCOs, %d in order; want %d of 4", c.held, len(c.m), len(c.order), maxSums)
	}
	for n := range uint64(10) {
		if got := len(c.take(key(n))); (got == each) != (n >= 6) {
			t.Errorf("SCO %d has %d sums", n, got)
		}
	}
	if c.held != 0 || len(c.m) != 0 || len(c.order) != 0 || c.take(key(9)) != nil {
		t.Errorf("%d sums are left", c.held)
	}
}
