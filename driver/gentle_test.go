package driver

import (
	"testing"
	"time"

	"scoria/alba/vfs"
)

// gentleRig is a volume on a pool of so many chunks, without goroutines.
func gentleRig(t *testing.T, chunks uint32) (*Volume, *logSCO) {
	t.Helper()
	p, _, err := openPool(vfs.NewMem(), "pool", int64(chunks)*chunkBytes, goldenBoot)
	if err != nil {
		t.Fatal(err)
	}
	v := &Volume{eng: &Engine{pool: p}, cfg: VolumeConfig{SCOBytes: 8 << 20}}
	return v, newLogSCO(v, 1, 0, 0)
}

// use takes n chunks of the pool for l, from slot on.
func use(t *testing.T, l *logSCO, from, n uint32) {
	t.Helper()
	for slot := from; slot < from+n; slot++ {
		id := l.vol.eng.pool.alloc(l, slot, chunkData)
		if id == 0 {
			t.Fatalf("no chunk for slot %d", slot)
		}
		l.data[slot].Store(id)
	}
}

// TestGentleWrites: a write to the disk that nobody waits for is a small one, since
// the CPU that prepares it may be a worker's; when the pool runs full it is a large
// one.
func TestGentleWrites(t *testing.T) {
	v, l := gentleRig(t, 32)
	use(t, l, 0, 20)
	var vec [maxVec + aheadChunks][]byte
	if n, c, _ := v.gather(l, 20*chunkClusters, v.gently(), &vec); n != gentleVec || c != gentleVec*chunkClusters {
		t.Errorf("with room in the pool %d chunks up to cluster %d are written at once, want %d", n, c, gentleVec)
	}
	use(t, l, 20, 5)
	if n, c, _ := v.gather(l, 20*chunkClusters, v.gently(), &vec); n != maxVec || c != maxVec*chunkClusters {
		t.Errorf("with a full pool %d chunks up to cluster %d are written at once, want %d", n, c, maxVec)
	}
}

// TestSpillRateIsTheDisks: what a write waited for the CPU while it was to yield to
// others does not count as the disk's slowness, by which writers are throttled.
func TestSpillRateIsTheDisks(t *testing.T) {
	e := &Engine{}
	rate := func(per time.Duration, hurry bool) time.Duration {
		e.spillRate(64, 64*per, hurry)
		return time.Duration(e.perCluster.Load())
	}
	if got := rate(time.Microsecond, true); got != time.Microsecond {
		t.Fatalf("the first write took 1µs per cluster, the rate is %v", got)
	}
	if got := rate(time.Second, false); got != time.Microsecond {
		t.Errorf("a write that waited for the CPU made the rate %v per cluster", got)
	}
	if got := rate(9*time.Microsecond, true); got != 2*time.Microsecond {
		t.Errorf("a write in a hurry of 9µs made the rate %v per cluster, want 2µs", got)
	}
	if got := rate(0, false); got >= 2*time.Microsecond {
		t.Errorf("a fast write made the rate %v per cluster", got)
	}
}

// TestCheckpointLeavesTheLogToTheBackground: while much of the log is in the pool
// alone, a checkpoint that is due waits; not when the pool runs full, which is when
// writing out is in a hurry anyway.
func TestCheckpointLeavesTheLogToTheBackground(t *testing.T) {
	const scos = behindSCOs + 1 // of 32 chunks each
	for chunks, behind := range map[uint32]bool{32 * scos * 5 / 4: false, 32 * scos * 2: true} {
		v, _ := gentleRig(t, chunks)
		for n := range uint64(scos) {
			if v.behind() {
				t.Errorf("behind with %d SCOs in the pool", n)
			}
			use(t, newLogSCO(v, n+1, 0, 0), 0, 32)
		}
		if v.behind() != behind {
			t.Errorf("behind is %v with %d SCOs in the pool, which is %v full", v.behind(), scos, v.eng.pool.fill())
		}
	}
}
