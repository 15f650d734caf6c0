package disk

import (
	"fmt"
	"math/rand/v2"
	"os"
	"sync/atomic"
	"testing"

	"scoria/alba/asd"
	"scoria/alba/vfs"
)

// benchDir is a directory on the disk that SCORIA_BENCH_DIR names, or the usual
// temporary one.
func benchDir(b *testing.B) string {
	dir, err := os.MkdirTemp(os.Getenv("SCORIA_BENCH_DIR"), "asd-bench-")
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

func benchDisk(b *testing.B) *Disk {
	d := open(b, vfs.OS(), benchDir(b), Options{ReserveBytes: 1 << 20})
	b.Cleanup(func() { _ = d.Close() })
	return d
}

// BenchmarkGet4K reads 4 KiB of fragments of 4 MiB, and whole values of 4 KiB
// from the key-value store.
func BenchmarkGet4K(b *testing.B) {
	for _, kind := range []string{"fragment", "inline"} {
		b.Run(kind, func(b *testing.B) {
			d := benchDisk(b)
			const n = 16
			size := 4 << 20
			if kind == "inline" {
				size = 4096
			}
			for i := range n {
				must(b, d.Apply(background, nil, []asd.Update{asd.Put(fmt.Sprint("key-", i), asd.NewValue(make([]byte, size)))}, guest))
			}
			keys := make([]string, n)
			for i := range keys {
				keys[i] = fmt.Sprint("key-", i)
			}
			b.SetBytes(4096)
			b.ReportAllocs()
			b.ResetTimer()
			b.RunParallel(func(pb *testing.PB) {
				p := make([]byte, 4096)
				for pb.Next() {
					if _, err := d.ReadAt(background, keys[rand.IntN(n)], p, int64(rand.IntN(size/4096))*4096, guest); err != nil {
						b.Error(err)
						return
					}
				}
			})
		})
	}
}

// BenchmarkPut measures puts by 1 and by 64 writers, who share syncs.
func BenchmarkPut(b *testing.B) {
	for _, size := range []int{4096, 1 << 20} {
		for _, writers := range []int{1, 64} {
			b.Run(fmt.Sprintf("%dKiB/%dwriters", size>>10, writers), func(b *testing.B) {
				d := benchDisk(b)
				v := asd.NewValue(make([]byte, size))
				var n atomic.Int64
				b.SetBytes(int64(size))
				b.SetParallelism(writers / 2) // times GOMAXPROCS, which is 2 here
				if writers == 1 {
					for b.Loop() {
						put(b, d, n.Add(1), v)
					}
					return
				}
				b.RunParallel(func(pb *testing.PB) {
					for pb.Next() {
						put(b, d, n.Add(1), v)
					}
				})
				b.ReportMetric(float64(d.n.applies.Load())/float64(max(d.n.commits.Load(), 1)), "applies/sync")
			})
		}
	}
}

// put overwrites one of 100 keys.
func put(b *testing.B, d *Disk, n int64, v asd.Value) {
	if err := d.Apply(background, nil, []asd.Update{asd.Put(fmt.Sprint("key-", n%100), v)}, guest); err != nil {
		b.Error(err)
	}
}
