package main

import (
	"testing"
	"time"
)

// The ideal server gets and ends as many requests as the rate says, and none is
// faster than its service.
func TestIdealServer(t *testing.T) {
	b := &bench{cfg: &config{clientCPU: 0, serverCPU: 1, seconds: 200 * time.Millisecond}}
	const rate, service = 10_000, 20 * time.Microsecond
	var res sample
	for range 50 { // on a busy machine neither side may run for as long as that
		var err error
		if res, err = b.measureIdeal(t.Context(), rate, service); err != nil {
			t.Skipf("two CPUs are needed: %v", err)
		}
		if res.Ops > 0 {
			break
		}
	}
	// What came due in the 20 ms before is counted if it ends late.
	if res.Ops == 0 || res.Ops > rate*22/100+idealDepth {
		t.Errorf("%d operations in 200 ms at %d per second", res.Ops, rate)
	}
	if fastest := res.Latency.Quantile(0); fastest < service {
		t.Errorf("a request took %v, the service alone takes %v", fastest, service)
	}
}
