package driver_test

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"runtime"
	"runtime/debug"
	"testing"
	"time"

	"github.com/google/uuid"

	"scoria/driver"
	"scoria/driver/block"
)

// residentBytes is the process's resident memory.
func residentBytes(t *testing.T) int64 {
	t.Helper()
	debug.FreeOSMemory()
	b, err := os.ReadFile("/proc/self/statm")
	if err != nil {
		t.Fatal(err)
	}
	var size, resident int64
	if _, err := fmt.Sscan(string(b), &size, &resident); err != nil {
		t.Fatal(err)
	}
	return resident * int64(os.Getpagesize())
}

// TestIdleVolumes: a thousand volumes that were used and now rest have no
// goroutine and take little memory, and all of them close.
func TestIdleVolumes(t *testing.T) { overStores(t, testIdleVolumes) }

func testIdleVolumes(t *testing.T, k storeKind) {
	volumes := raced(1000, 100)
	ctx := context.Background()
	r := newRig(t, k, rand.New(rand.NewPCG(1, 1)), 1024, 64)
	r.cfg.Size = 64 << 30
	r.create()
	warm := func(v *driver.Volume, off uint64) {
		p := make([]byte, cluster)
		p[0] = 1
		r.must(do(v, &block.Request{Op: block.OpWrite, Offset: off, Length: cluster, Segments: [][]byte{p}}))
		r.must(do(v, &block.Request{Op: block.OpFlush}))
	}
	warm(r.vol, 0)
	goroutines, memory := runtime.NumGoroutine(), residentBytes(t)
	var open []*driver.Volume
	for i := range volumes {
		cfg := r.cfg
		cfg.ID, cfg.Name = uuid.NewSHA1(r.cfg.ID, []byte{byte(i), byte(i >> 8)}), fmt.Sprintf("default/idle%d", i)
		r.must(r.eng.CreateVolume(ctx, cfg))
		v, err := r.eng.OpenVolume(ctx, cfg)
		r.must(err)
		open = append(open, v)
	}
	opened := residentBytes(t)
	t.Logf("%d open volumes take %d KiB each", volumes, (opened-memory)/int64(volumes)>>10)
	if per := (opened - memory) / int64(volumes); per > 512<<10 && !raceEnabled {
		t.Errorf("an idle volume takes %d KiB, it should be 256", per>>10)
	}
	for i, v := range open[:min(100, volumes)] {
		warm(v, uint64(i)*cluster)
		v.Tick(time.Now().Add(time.Hour)) // closes the head
		v.WaitSealed()
	}
	eventually(t, "all goroutines have ended", func() bool { return runtime.NumGoroutine() <= goroutines+1 })
	start := time.Now()
	for _, v := range open {
		v.Tick(time.Now().Add(time.Hour))
	}
	t.Logf("a tick of %d volumes takes %v", volumes, time.Since(start))
	eventually(t, "all goroutines have ended again", func() bool { return runtime.NumGoroutine() <= goroutines+1 })
	start = time.Now()
	r.close()
	t.Logf("closing takes %v", time.Since(start))
	eventually(t, "the engine's goroutines have ended", func() bool { return runtime.NumGoroutine() < goroutines })
}
