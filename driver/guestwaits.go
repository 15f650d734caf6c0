package driver

// GuestWaits is what guests wait for, over all open volumes of a daemon: the measure
// by which maintenance of the store gives way to them.
type GuestWaits struct {
	// Log, Flush and Read are the histograms of these stages since the volumes were
	// opened. A volume that was closed is no longer in them, so counts may fall.
	Log, Flush, Read Latency
	// Parked writes wait for room in the write buffer or for the throttle now.
	Parked int
	// Buffer is the part of the write buffer that is in use, from 0 to 1.
	Buffer float64
	// Throttling says that Buffer is beyond the part from which on writers are slowed.
	Throttling bool
}

// GuestWaits sums up all open volumes. Cheap enough to ask several times a second;
// from any goroutine.
func (e *Engine) GuestWaits() GuestWaits {
	w := GuestWaits{Log: Latency{Stage: StageLog}, Flush: Latency{Stage: StageFlush}, Read: Latency{Stage: StageRead}}
	for _, v := range e.list() {
		for _, l := range []*Latency{&w.Log, &w.Flush, &w.Read} {
			l.add(v.stats.stages[l.Stage].snapshot(l.Stage))
		}
		w.Parked += v.parked.length()
	}
	w.Buffer = e.pool.fill()
	w.Throttling = w.Buffer > throttleAt
	return w
}

func (l *Latency) add(o Latency) {
	for i, n := range o.Buckets {
		l.Buckets[i] += n
	}
	l.Count += o.Count
	l.Sum += o.Sum
}
