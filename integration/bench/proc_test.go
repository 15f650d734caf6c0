package main

import (
	"testing"
	"time"
)

// TestSettleWaitsForCalm: one quiet step is not enough for a server that only looks
// now and then for what it has to do.
func TestSettleWaitsForCalm(t *testing.T) {
	ctx := deadline(t, 2*time.Minute)
	p, err := startPinned(-1, "sleep", "600")
	if err != nil {
		t.Fatal(err)
	}
	defer p.kill()
	p.calm = 4
	begin := time.Now()
	if err := p.settle(ctx, settleLimit); err != nil {
		t.Fatal(err)
	}
	if took := time.Since(begin); took < 400*time.Millisecond {
		t.Errorf("settled after %v, want at least four steps of 100 ms", took)
	}
}
