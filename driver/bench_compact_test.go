package driver_test

import (
	"context"
	"math/rand/v2"
	"testing"

	"scoria/driver"
	"scoria/driver/block"
)

// benchReadSealed reads single clusters of sealed SCOs from their files, past the
// caches of data.
func benchReadSealed(b *testing.B, prepare func(w *bench, v *driver.Volume)) {
	w := newBench(b, 64<<20, 512<<20)
	v := w.open()
	b.Cleanup(w.stop)
	p := make([]byte, 1<<20)
	for off := uint64(0); off < 64<<20; off += 1 << 20 {
		if err := do(v, &block.Request{Op: block.OpWrite, Offset: off, Length: 1 << 20, Segments: [][]byte{p}}); err != nil {
			b.Fatal(err)
		}
	}
	prepare(w, v)
	w.eng.ForgetRAM()
	rng := rand.New(rand.NewPCG(1, 2))
	buf := make([]byte, cluster)
	for c := range uint64(64 << 20 / cluster) { // into the page cache: the disk is not what is measured
		if err := do(v, readOf(c, buf)); err != nil {
			b.Fatal(err)
		}
	}
	b.SetBytes(cluster)
	b.ResetTimer()
	for range b.N {
		w.eng.ForgetClusters()
		if err := do(v, readOf(rng.Uint64N(64<<20/cluster), buf)); err != nil {
			b.Fatal(err)
		}
	}
}

// seal closes the head and gets everything into the store.
func benchSeal(b *testing.B, v *driver.Volume) {
	for range 3 {
		if err := v.CheckpointAnew(context.Background()); err != nil {
			b.Fatal(err)
		}
		v.WaitSealed()
		if _, err := v.Publish(context.Background()); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkReadSealed4K is what a read of a sealed SCO costs that was never compacted.
func BenchmarkReadSealed4K(b *testing.B) {
	benchReadSealed(b, func(_ *bench, v *driver.Volume) { benchSeal(b, v) })
}

// BenchmarkReadCompacted4K is what one of a compacted SCO costs.
func BenchmarkReadCompacted4K(b *testing.B) {
	benchReadSealed(b, func(_ *bench, v *driver.Volume) {
		p := make([]byte, cluster)
		for c := uint64(0); c < 64<<20/cluster; c += 3 {
			if err := do(v, &block.Request{Op: block.OpWrite, Offset: c * cluster, Length: cluster, Segments: [][]byte{p}}); err != nil {
				b.Fatal(err)
			}
		}
		benchSnapshot(b, v)
		benchSeal(b, v)
		if err := v.CompactAll(context.Background()); err != nil {
			b.Fatal(err)
		}
		benchSeal(b, v)
		if v.Stats().CompactedBytes == 0 {
			b.Fatal("nothing was compacted")
		}
	})
}
