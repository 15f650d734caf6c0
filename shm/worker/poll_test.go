package worker

import "testing"

// Polling that finds work goes on at full length; polling in vain, as beside a
// client on the same CPU, comes to an end, but for a probe now and then.
func TestPollWindowAdapts(t *testing.T) {
	const limit = 50_000
	p := pollState{window: limit, probeEvery: probeMin}
	vain, polled := 0, 0
	for range 100_000 {
		p.begin(1, limit, true)
		if p.deadline > p.idleFrom {
			polled++
		}
		p.expired(limit)
		vain++
	}
	if p.window != 0 || polled > vain/500 {
		t.Fatalf("window %d; polled in %d of %d waits in vain", p.window, polled, vain)
	}
	for range 2 * probeMax { // a probe comes and finds work
		p.begin(1, limit, true)
		if p.probing {
			p.found(limit)
			break
		}
		p.expired(limit)
	}
	for range 10 {
		p.begin(1, limit, true)
		p.found(limit)
	}
	if p.window != limit {
		t.Fatalf("window %d although polling pays", p.window)
	}
	p.begin(1, limit, false)
	if p.deadline != 1 {
		t.Fatal("polling without budget")
	}
	p = pollState{}
	p.begin(1, 0, true)
	if p.expired(0) {
		t.Fatal("polling although it is switched off")
	}
}

// A device that takes longer than polling lasts ends polling for it, but not
// polling for the peer.
func TestPollDeviceApart(t *testing.T) {
	const limit = 50_000
	p := newPolling(limit)
	polled := 0
	for range 1000 {
		p.begin(1, limit, true, true)
		if p.open.deadline > 1 {
			polled++
		}
		if over, _ := p.expired(1+2*limit, limit); !over {
			t.Fatal("a wait goes on after its time")
		}
		p.begin(1, limit, true, false) // the answer has come
		if over, _ := p.expired(1+limit-1, limit); over {
			t.Fatal("the peer is not polled for as long as that pays")
		}
		if !p.found(limit) || p.found(limit) {
			t.Fatal("want one hit for one wait")
		}
	}
	if polled > 100 {
		t.Fatalf("polled %d times of 1000 for a device that is too slow for that", polled)
	}
}

func TestPollBudget(t *testing.T) {
	w := &Worker{pollCPU: 0.25, tokens: pollBurst}
	spent := int64(0)
	for now := int64(1); now < int64(1e9); now += 10_000 {
		if w.budget(now) {
			w.tokens -= 10_000
			spent += 10_000
		}
	}
	if share := float64(spent-pollBurst) / 1e9; share < 0.24 || share > 0.26 {
		t.Fatalf("polled in vain for %.3f of the time, want 0.25", share)
	}
}
