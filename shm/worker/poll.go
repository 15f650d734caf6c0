package worker

// pollState is a queue's part in adaptive polling; see the package doc.
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
