package driver_test

import (
	"context"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/rs/zerolog"

	"scoria/alba/vfs"
	"scoria/driver"
	"scoria/driver/block"
	"scoria/driver/dirstore"
)

// bench is an engine on the host's file system with its pool on tmpfs.
type bench struct {
	b    *testing.B
	dir  string // tmpfs
	data string
	pool int64
	eng  *driver.Engine
	cfg  driver.VolumeConfig
}

func newBench(b *testing.B, size uint64, pool int64) *bench {
	b.Helper()
	dir, err := os.MkdirTemp("/dev/shm", "scoria-bench-")
	if err != nil {
		b.Skip("no tmpfs at /dev/shm: ", err)
	}
	b.Cleanup(func() { os.RemoveAll(dir) })
	w := &bench{b: b, dir: dir, data: b.TempDir(), pool: pool}
	w.cfg = driver.VolumeConfig{ID: uuid.New(), Name: "default/bench", Size: size, LogicalBlock: 512, SCOBytes: driver.DefaultSCOBytes, Epoch: 1}
	w.start()
	if err := w.eng.CreateVolume(context.Background(), w.cfg); err != nil {
		b.Fatal(err)
	}
	return w
}

// start makes an engine, as a daemon's start would.
func (w *bench) start() {
	w.b.Helper()
	store, err := dirstore.Open(vfs.OS(), filepath.Join(w.data, "store"), dirstore.Options{})
	if err != nil {
		w.b.Fatal(err)
	}
	w.cfg.Store = store
	w.eng, err = driver.OpenEngine(context.Background(), driver.Config{
		FS: vfs.OS(), DataDir: w.data, PoolFile: filepath.Join(w.dir, "pool"), PoolBytes: w.pool,
		CacheBytes: 1 << 34, ReadCacheBytes: 1 << 20, Log: zerolog.Nop(),
	})
	if err != nil {
		w.b.Fatal(err)
	}
}

func (w *bench) open() *driver.Volume {
	w.b.Helper()
	v, err := w.eng.OpenVolume(context.Background(), w.cfg)
	if err != nil {
		w.b.Fatal(err)
	}
	return v
}

func (w *bench) stop() {
	w.b.Helper()
	if err := w.eng.Close(context.Background()); err != nil {
		w.b.Fatal(err)
	}
}

// benchVolume is one open volume whose pool has been populated.
func benchVolume(b *testing.B, size uint64, pool int64) *driver.Volume {
	b.Helper()
	w := newBench(b, size, pool)
	v := w.open()
	b.Cleanup(w.stop)
	time.Sleep(time.Second)
	return v
}

// BenchmarkOpen1TiB measures how long a volume with 1 TiB mapped takes to open
// after a clean stop, and after a kill with 64 MiB written since. Run with
// -benchtime=1x; it needs 3 GiB of RAM and disk.
func BenchmarkOpen1TiB(b *testing.B) {
	w := newBench(b, 1<<40, 256<<20)
	v := w.open()
	v.MapEverything()
	w.stop()
	p := make([]byte, 1<<20)
	var clean, killed time.Duration
	b.ResetTimer()
	for range b.N {
		w.start()
		begin := time.Now()
		v = w.open()
		clean += time.Since(begin)
		for off := uint64(0); off < 64<<20; off += 1 << 20 {
			if err := do(v, &block.Request{Op: block.OpWrite, Offset: off * 1000, Length: 1 << 20, Segments: [][]byte{p}}); err != nil {
				b.Fatal(err)
			}
		}
		w.eng.Abandon()
		w.start()
		begin = time.Now()
		w.open()
		killed += time.Since(begin)
		w.stop()
	}
	b.ReportMetric(float64(clean.Milliseconds())/float64(b.N), "ms/clean-open")
	b.ReportMetric(float64(killed.Milliseconds())/float64(b.N), "ms/open-after-kill")
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
		reqs[i].Complete = func(*block.Request) {}
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
	v := benchVolume(b, 256<<20, int64(b.N)*cluster*2+(64<<20))
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
