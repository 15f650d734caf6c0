package driver_test

import (
	"context"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/uuid"

	"scoria/driver"
	"scoria/driver/block"
)

// benchSnapshot makes a snapshot of a filled volume.
func benchSnapshot(b *testing.B, v *driver.Volume) driver.Snapshot {
	b.Helper()
	s, err := v.CreateSnapshot(context.Background(), uuid.New(), "bench", nil)
	if err != nil {
		b.Fatal(err)
	}
	return s
}

// BenchmarkSubmitWrite4KFilled is BenchmarkSubmitWrite4K over data, to compare the
// next two with.
func BenchmarkSubmitWrite4KFilled(b *testing.B) {
	v := benchVolume(b, 256<<20, int64(b.N)*cluster*2+(512<<20))
	benchFill(b, v)
	benchSubmit(b, v, block.OpWrite, 256<<20)
}

// BenchmarkSubmitWrite4KAfterSnapshot is the first writes after a snapshot.
func BenchmarkSubmitWrite4KAfterSnapshot(b *testing.B) {
	v := benchVolume(b, 256<<20, int64(b.N)*cluster*2+(512<<20))
	benchFill(b, v)
	benchSnapshot(b, v)
	benchSubmit(b, v, block.OpWrite, 256<<20)
}

// BenchmarkSubmitWrite4KClone is writes to a fresh clone, whose map pages have been
// read.
func BenchmarkSubmitWrite4KClone(b *testing.B) {
	w := newBench(b, 256<<20, int64(b.N)*cluster*2+(512<<20))
	parent := w.open()
	b.Cleanup(w.stop)
	time.Sleep(time.Second)
	benchFill(b, parent)
	s := benchSnapshot(b, parent)
	w.cfg.ID, w.cfg.Name = uuid.New(), "default/clone"
	if err := w.eng.CreateClone(context.Background(), w.cfg, parent, s.ID); err != nil {
		b.Fatal(err)
	}
	v := w.open()
	if err := v.BlockStatus(context.Background(), 0, 256<<20, func(block.Extent) bool { return true }); err != nil {
		b.Fatal(err)
	}
	benchSubmit(b, v, block.OpWrite, 256<<20)
}

// BenchmarkSnapshot measures, on a volume with 1 TiB mapped, how long a snapshot
// takes and how long a guest's write waits at most meanwhile. Run with
// -benchtime=10x; it needs 3 GiB of RAM and disk.
func BenchmarkSnapshot(b *testing.B) {
	w := newBench(b, 1<<40, 256<<20)
	v := w.open()
	b.Cleanup(w.stop)
	v.MapEverything()
	benchSnapshot(b, v) // writes all pages
	var worst, ended atomic.Int64
	done := make(chan struct{})
	go func() {
		defer close(done)
		p := make([]byte, cluster)
		for i := uint64(0); ended.Load() == 0; i++ {
			begin := time.Now()
			r := &block.Request{Op: block.OpWrite, Offset: i % 4096 * cluster, Length: cluster, Segments: [][]byte{p}, Complete: func(*block.Request) {}}
			v.Submit([]*block.Request{r})
			worst.Store(max(worst.Load(), int64(time.Since(begin))))
			time.Sleep(50 * time.Microsecond)
		}
	}()
	b.ResetTimer()
	for range b.N {
		worst.Store(0)
		benchSnapshot(b, v)
	}
	b.StopTimer()
	b.ReportMetric(float64(worst.Load())/1e3, "µs/longest-write")
	ended.Store(1)
	<-done
}
