package worker

// pollState is the adaptive polling of one kind of wait; see the package doc.
type pollState struct {
	window     int64 // ns to poll after the last request
	idleFrom   int64 // worker's clock at the first pass in vain; 0: busy
	deadline   int64
	probing    bool
	parks      int // since the last probe
	probeEvery int
}

const (
	probeMin = 16
	probeMax = 2048
)

// found adapts to work that came while the queue was polled.
func (p *pollState) found(limit int64) {
	p.window = min(max(2*p.window, limit/8), limit)
	p.idleFrom, p.probing, p.probeEvery = 0, false, probeMin
}

// begin opens a wait. It returns whether there is a window to poll for.
func (p *pollState) begin(now, limit int64, budget bool) {
	window := p.window
	if !budget {
		window = 0
	} else if window == 0 && limit > 0 {
		if p.parks++; p.parks >= p.probeEvery {
			p.parks, p.probing, window = 0, true, limit
		}
	}
	p.idleFrom, p.deadline = now, now+window
}

// expired adapts to a wait that polling did not end, and reports whether there
// was a window at all.
func (p *pollState) expired(limit int64) bool {
	polled := p.deadline > p.idleFrom
	if p.probing {
		p.probeEvery = min(2*p.probeEvery, probeMax)
	} else if polled {
		if p.window /= 4; p.window < limit/32 {
			p.window = 0
		}
	}
	p.idleFrom, p.probing = 0, false
	return polled
}

// polling is what a queue learns about its two kinds of waits: for the peer's
// next request, and for the device to end one. open is the wait that goes on; nil
// while the queue is busy.
type polling struct {
	peer, device pollState
	open         *pollState
}

func newPolling(limit int64) polling {
	fresh := pollState{window: limit, probeEvery: probeMin}
	return polling{peer: fresh, device: fresh}
}

// begin opens a wait, unless one is open.
func (p *polling) begin(now, limit int64, budget, device bool) {
	if p.open != nil {
		return
	}
	p.open = &p.peer
	if device {
		p.open = &p.device
	}
	p.open.begin(now, limit, budget)
}

// found ends an open wait and reports whether there was one.
func (p *polling) found(limit int64) bool {
	if p.open == nil {
		return false
	}
	p.open.found(limit)
	p.open = nil
	return true
}

// expired ends the open wait if its time is over. missed: it had been polled for.
func (p *polling) expired(now, limit int64) (over, missed bool) {
	if now < p.open.deadline {
		return false, false
	}
	missed = p.open.expired(limit)
	p.open = nil
	return true, missed
}
