package remote

import (
	"fmt"
	"math/rand/v2"
	"testing"

	"scoria/alba/asd"
	"scoria/alba/asd/disk"
	"scoria/alba/vfs"
)

// BenchmarkReadAt4K reads 4 KiB of a fragment over loopback with so many readers.
func BenchmarkReadAt4K(b *testing.B) {
	d, err := disk.Open(vfs.OS(), b.TempDir(), disk.Options{ReserveBytes: 1 << 20})
	must(b, err)
	b.Cleanup(func() { _ = d.Close() })
	must(b, d.Apply(within(b), nil, put("key", 4<<20), guest))
	_, addr := serve(b, d, ServerOptions{}, Security{})
	c := dial(b, addr, Options{})
	for _, readers := range []int{1, 32} {
		b.Run(fmt.Sprintf("%dreaders", readers), func(b *testing.B) {
			ctx := within(b)
			b.SetBytes(4096)
			b.ReportAllocs()
			read := func(p []byte) {
				if _, err := c.ReadAt(ctx, "key", p, int64(rand.IntN(1000))*4096, guest); err != nil {
					b.Error(err)
				}
			}
			if readers == 1 {
				p := make([]byte, 4096)
				for b.Loop() {
					read(p)
				}
				return
			}
			b.SetParallelism(readers / 2) // times GOMAXPROCS, which is 2 here
			b.RunParallel(func(pb *testing.PB) {
				p := make([]byte, 4096)
				for pb.Next() {
					read(p)
				}
			})
		})
	}
}

// BenchmarkPutFragment puts 1 MiB over loopback.
func BenchmarkPutFragment(b *testing.B) {
	d, err := disk.Open(vfs.OS(), b.TempDir(), disk.Options{ReserveBytes: 1 << 20})
	must(b, err)
	b.Cleanup(func() { _ = d.Close() })
	_, addr := serve(b, d, ServerOptions{}, Security{})
	c := dial(b, addr, Options{})
	v := asd.NewValue(make([]byte, 1<<20))
	ctx := within(b)
	b.SetBytes(1 << 20)
	b.SetParallelism(4)
	b.RunParallel(func(pb *testing.PB) {
		for i := 0; pb.Next(); i++ {
			if err := c.Apply(ctx, nil, []asd.Update{asd.Put(fmt.Sprint("key-", i%50), v)}, guest); err != nil {
				b.Error(err)
			}
		}
	})
}
