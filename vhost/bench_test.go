package vhost

import (
	"fmt"
	"testing"

	"scoria/driver/block"
	"scoria/shm/mem"
	"scoria/vhost/virtq"
)

// nullDevice answers at once and does nothing: what remains is the front end.
type nullDevice struct{ *ramDevice }

func (nullDevice) Submit(batch []*block.Request) {
	for _, r := range batch {
		r.Err, r.Ended = nil, true
	}
}

// BenchmarkServer is a polling client and a polling server around a device that
// does nothing, 4 KiB reads, by depth.
func BenchmarkServer(b *testing.B) {
	for _, depth := range []int{1, 32} {
		b.Run(fmt.Sprintf("depth=%d", depth), func(b *testing.B) {
			bd := newBed(b, Config{})
			bd.device = nullDevice{bd.dev}
			g := newGuest(b, 1, 128, testFeatures|virtq.FeatureEventIdx)
			start(b, bd.path, g)
			r := g.rings[0]
			segs := []virtq.DriverSegment{
				{Addr: testGuestBase + testDataAt, Len: 16},
				{Addr: testGuestBase + testDataAt + 4096, Len: 4096, Write: true},
				{Addr: testGuestBase + testDataAt + 64, Len: 1, Write: true},
			}
			r.DisableCall()
			b.ReportAllocs()
			b.ResetTimer()
			inFlight := 0
			for done := 0; done < b.N; {
				for ; inFlight < depth; inFlight++ {
					r.Add(segs)
				}
				if r.Publish() {
					_ = mem.SignalEventFD(r.kick)
				}
				for {
					_, _, ok, err := r.Poll()
					if err != nil {
						b.Fatal(err)
					}
					if !ok {
						break
					}
					inFlight--
					done++
				}
			}
			st := bd.ep.Stats()
			b.ReportMetric(float64(st.Kicks)/float64(b.N), "kicks/op")
			b.ReportMetric(float64(st.Calls)/float64(b.N), "calls/op")
		})
	}
}
