package driver_test

import (
	"context"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"github.com/google/uuid"
	"github.com/rs/zerolog"

	"scoria/alba/vfs"
	"scoria/driver"
	"scoria/driver/block"
	"scoria/driver/dirstore"
)

// benchVolume is a volume on the host's file system with its pool on tmpfs.
func benchVolume(b *testing.B, size uint64, pool int64) *driver.Volume {
	b.Helper()
	dir, err := os.MkdirTemp("/dev/shm", "scoria-bench-")
	if err != nil {
		b.Skip("no tmpfs at /dev/shm: ", err)
	}
	b.Cleanup(func() { os.RemoveAll(dir) })
	data := b.TempDir()
	store, err := dirstore.Open(vfs.OS(), filepath.Join(data, "store"), dirstore.Options{})
	if err != nil {
		b.Fatal(err)
	}
	eng, err := driver.OpenEngine(context.Background(), driver.Config{
		FS: vfs.OS(), DataDir: data, PoolFile: filepath.Join(dir, "pool"), PoolBytes: pool,
		CacheBytes: 1 << 34, ReadCacheBytes: 1 << 20, Log: zerolog.Nop(),
	})
	if err != nil {
		b.Fatal(err)
	}
	cfg := driver.VolumeConfig{ID: uuid.New(), Name: "default/bench", Size: size, LogicalBlock: 512, SCOBytes: driver.DefaultSCOBytes, Epoch: 1, Store: store}
	if err := eng.CreateVolume(context.Background(), cfg); err != nil {
		b.Fatal(err)
	}
	v, err := eng.OpenVolume(context.Background(), cfg)
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { eng.Close(context.Background()) })
	return v
}

// benchSubmit sends random 4 KiB requests in batches of 32.
func benchSubmit(b *testing.B, v *driver.Volume, op block.Op, span uint64) {
	const depth = 32
	buf := make([]byte, 64<<20)
	for i := range buf {
		buf[i] = byte(i * 7 >> 3)
	}
	var reqs [depth]block.Request
	var batch [depth]*block.Request
	var segs [depth][1][]byte
	for i := range reqs {
		reqs[i].Op = op
		reqs[i].Length = cluster
		batch[i] = &reqs[i]
	}
	rng := rand.New(rand.NewPCG(1, 2))
	b.SetBytes(cluster)
	b.ResetTimer()
	for n := 0; n < b.N; n += depth {
		for i := range reqs {
			off := rng.Uint64N(uint64(len(buf)) / cluster)
			segs[i][0] = buf[off*cluster : (off+1)*cluster]
			reqs[i].Segments = segs[i][:]
			reqs[i].Offset = rng.Uint64N(span/cluster) * cluster
			reqs[i].Ended = false
		}
		v.Submit(batch[:])
		for i := range reqs {
			if !reqs[i].Ended || reqs[i].Err != nil {
				b.Fatalf("request waits: err %v; make the pool larger or -benchtime smaller", reqs[i].Err)
			}
		}
	}
}

// The pool must hold what is written: run with -benchtime=400000x or less.
func BenchmarkSubmitWrite4K(b *testing.B) {
	v := benchVolume(b, 256<<20, int64(b.N)*cluster*3/2+(64<<20))
	benchSubmit(b, v, block.OpWrite, 256<<20)
}

func BenchmarkSubmitRead4K(b *testing.B) {
	v := benchVolume(b, 256<<20, 1<<30)
	benchFill(b, v)
	benchSubmit(b, v, block.OpRead, 256<<20)
}

func benchFill(b *testing.B, v *driver.Volume) {
	p := make([]byte, 1<<20)
	for i := range p {
		p[i] = byte(i)
	}
	for off := uint64(0); off < 256<<20; off += 1 << 20 {
		if err := do(v, &block.Request{Op: block.OpWrite, Offset: off, Length: 1 << 20, Segments: [][]byte{p}}); err != nil {
			b.Fatal(err)
		}
	}
}
