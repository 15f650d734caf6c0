package cache

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"scoria/alba/vfs"
)

// slots returns a budget of n slots per shard.
func slots(n int64) int64 { return n * shardCount * ClusterBytes }

func newCache(t testing.TB, budget int64) *Cache {
	t.Helper()
	c, err := New(budget)
	must(t, err)
	t.Cleanup(func() { c.Close() })
	return c
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// cluster returns bytes that only k has.
func cluster(k Key) []byte {
	b := make([]byte, ClusterBytes)
	fill(b, k)
	return b
}

func fill(b []byte, k Key) {
	x := k.Location*31 + uint64(k.Volume)
	for i := 0; i < len(b); i += 8 {
		binary.LittleEndian.PutUint64(b[i:], x+uint64(i))
	}
}

func same(b []byte, k Key) bool {
	x := k.Location*31 + uint64(k.Volume)
	for i := 0; i < len(b); i += 8 {
		if binary.LittleEndian.Uint64(b[i:]) != x+uint64(i) {
			return false
		}
	}
	return true
}

// eventually waits until ok, or fails with all goroutines.
func eventually(what string, ok func() bool) {
	for deadline := time.Now().Add(2 * time.Minute); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			buf := make([]byte, 1<<20)
			panic(fmt.Sprintf("cache: %s does not happen\n%s", what, buf[:runtime.Stack(buf, true)]))
		}
	}
}

func TestGetPut(t *testing.T) {
	c := newCache(t, slots(64))
	dst := make([]byte, ClusterBytes)
	k := Key{7, 1 << 50}
	if c.Get(k, dst) {
		t.Fatal("hit in an empty cache")
	}
	c.Put(k, cluster(k))
	c.Put(k, cluster(Key{1, 1})) // changes nothing
	if !c.Get(k, dst) || !same(dst, k) {
		t.Fatal("not what was put")
	}
	if c.Get(Key{8, 1 << 50}, dst) || c.Get(Key{7, 1<<50 + 1}, dst) {
		t.Fatal("keys are mixed up")
	}
	if !c.Load(k, dst) {
		t.Fatal("Load misses what Get hits")
	}
	st := c.Stats()
	if st.Hits != 2 || st.Misses != 3 || st.Inserted != 1 || st.Entries != 1 || st.BudgetBytes != slots(64) {
		t.Fatalf("%+v", st)
	}
}

func TestNothingCachedWithoutBudget(t *testing.T) {
	c := newCache(t, 100)
	k := Key{1, 1}
	c.Put(k, cluster(k))
	if c.Get(k, make([]byte, ClusterBytes)) {
		t.Fatal("a cache of 100 bytes holds a cluster")
	}
	c.DropVolume(1)
	if _, err := New(-1); err == nil {
		t.Fatal("negative budget accepted")
	}
}

// TestRandomAgainstModel: whatever the cache returns is what was put, and never
// what was dropped.
func TestRandomAgainstModel(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 2))
	c := newCache(t, slots(16))
	dst := make([]byte, ClusterBytes)
	known := make(map[Key]bool)
	hits := 0
	for range 50_000 {
		k := Key{uint32(rng.IntN(3)), uint64(rng.IntN(1200))}
		switch op := rng.IntN(2000); {
		case op == 0:
			c.DropVolume(k.Volume)
			for old := range known {
				if old.Volume == k.Volume {
					delete(known, old)
				}
			}
		case op == 1:
			must(t, c.SetBudget(slots(rng.Int64N(24))))
		case op < 1000:
			c.Put(k, cluster(k))
			known[k] = true
		default:
			if !c.Get(k, dst) {
				continue
			}
			hits++
			if !known[k] || !same(dst, k) {
				t.Fatalf("%v: known %v, wrong bytes %v", k, known[k], !same(dst, k))
			}
		}
	}
	if st := c.Stats(); hits == 0 || st.Evicted == 0 || int64(st.Entries)*ClusterBytes > st.BudgetBytes {
		t.Fatalf("%d hits, %+v", hits, st)
	}
	for i := range c.shards {
		checkTable(t, c.shards[i].t)
	}
}

// checkTable holds queues, free list and index against each other.
func checkTable(t *testing.T, tab *table) {
	t.Helper()
	free := uint32(0)
	for i := tab.free; i != none; i = tab.entries.s[i].next {
		free++
	}
	if free+tab.small.count+tab.main.count != tab.slots {
		t.Fatalf("%d free, %d small, %d main of %d", free, tab.small.count, tab.main.count, tab.slots)
	}
	indexed, live := 0, 0
	for _, b := range tab.buckets.s {
		for i := b; i != 0; i = tab.entries.s[i-1].chain {
			indexed++
		}
	}
	for i := range tab.entries.s {
		if e := &tab.entries.s[i]; e.queue != queueFree && !e.dead {
			live++
		}
	}
	if indexed != live {
		t.Fatalf("%d in the index, %d alive", indexed, live)
	}
}

// TestScanResistance: reading far more than fits, once, leaves the hot set.
func TestScanResistance(t *testing.T) {
	c := newCache(t, slots(128))
	dst := make([]byte, ClusterBytes)
	const hot = 1024 // a quarter of the slots
	for range 4 {
		for i := range uint64(hot) {
			if k := (Key{1, i}); !c.Get(k, dst) {
				c.Put(k, cluster(k))
			}
		}
	}
	for i := range uint64(40_000) {
		if k := (Key{2, i}); !c.Get(k, dst) {
			c.Put(k, dst)
		}
	}
	kept := 0
	for i := range uint64(hot) {
		if c.Get(Key{1, i}, dst) {
			kept++
		}
	}
	if kept < hot*9/10 {
		t.Fatalf("%d of %d hot clusters survived a scan", kept, hot)
	}
}

// TestGhosts: what comes back soon after it was evicted goes to the main queue.
func TestGhosts(t *testing.T) {
	c := newCache(t, slots(100))
	src := make([]byte, ClusterBytes)
	for round := range 2 {
		for i := range uint64(100 * shardCount * 5 / 4) {
			c.Put(Key{1, i}, src)
		}
		main := uint32(0)
		for i := range c.shards {
			main += c.shards[i].t.main.count
		}
		if (round == 1) != (main > 0) {
			t.Fatalf("round %d: %d in the main queues", round, main)
		}
	}
}

func TestSetBudgetKeepsWhatFits(t *testing.T) {
	c := newCache(t, slots(100))
	dst := make([]byte, ClusterBytes)
	const n = 1500
	count := func() (hits int) {
		for i := range uint64(n) {
			if k := (Key{1, i}); c.Get(k, dst) {
				hits++
				if !same(dst, k) {
					t.Fatal("wrong bytes")
				}
			}
		}
		return hits
	}
	for i := range uint64(n) {
		c.Put(Key{1, i}, cluster(Key{1, i}))
	}
	before := count()
	must(t, c.SetBudget(slots(300)))
	if got := count(); got != before {
		t.Fatalf("%d clusters of %d after growing", got, before)
	}
	must(t, c.SetBudget(slots(10)))
	if got := count(); got == 0 || got > 10*shardCount {
		t.Fatalf("%d clusters after shrinking", got)
	}
	must(t, c.SetBudget(0))
	if got := count(); got != 0 {
		t.Fatalf("%d clusters without a budget", got)
	}
}

func TestNoAllocation(t *testing.T) {
	c := newCache(t, slots(8))
	b := make([]byte, ClusterBytes)
	i := uint64(0)
	if n := testing.AllocsPerRun(5_000, func() {
		i++
		c.Put(Key{1, i % 1000}, b)
		c.Get(Key{1, i * 7 % 1000}, b)
	}); n != 0 {
		t.Fatalf("%v allocations per Put and Get", n)
	}
}

// TestConcurrent has readers, writers, drops and changes of budget at once, with
// an SSD behind.
func TestConcurrent(t *testing.T) {
	c := newCache(t, slots(8))
	must(t, c.AttachSSD(vfs.NewMem(), "ssd", MinSSDBytes))
	var wg sync.WaitGroup
	for g := range uint64(6) {
		wg.Go(func() {
			rng := rand.New(rand.NewPCG(g, 0))
			dst, src := make([]byte, ClusterBytes), make([]byte, ClusterBytes)
			for i := range 8_000 {
				k := Key{uint32(rng.IntN(4)), uint64(rng.ExpFloat64() * 200)}
				fill(src, k)
				c.Put(k, src)
				hit := false
				if i%4 == 0 {
					hit = c.Load(k, dst)
				} else {
					hit = c.Get(k, dst)
				}
				if hit && !same(dst, k) {
					t.Errorf("%v: wrong bytes", k)
					return
				}
				switch {
				case g == 0 && i%1000 == 0:
					c.DropVolume(k.Volume)
				case g == 1 && i%1000 == 0:
					if err := c.SetBudget(slots(rng.Int64N(16))); err != nil {
						t.Error(err)
					}
				case g == 2 && i%500 == 0:
					c.Stats()
				}
			}
		})
	}
	wg.Wait()
	for i := range c.shards {
		c.shards[i].t.quiesce()
		checkTable(t, c.shards[i].t)
	}
	if st := c.Stats(); st.SSD.Corrupt != 0 || st.SSD.Errors != 0 {
		t.Fatalf("%+v", st.SSD)
	}
}

// TestCloseUnderUse: users may come late.
func TestCloseUnderUse(t *testing.T) {
	for range 20 {
		c, err := New(slots(8))
		must(t, err)
		must(t, c.AttachSSD(vfs.NewMem(), "ssd", MinSSDBytes))
		var wg sync.WaitGroup
		var stop atomic.Bool
		for g := range uint64(3) {
			wg.Go(func() {
				dst := make([]byte, ClusterBytes)
				for i := uint64(0); !stop.Load(); i++ {
					c.Put(Key{1, i % 700}, cluster(Key{1, i % 700}))
					c.Get(Key{1, i * g % 700}, dst)
					c.Load(Key{1, i * g % 700}, dst)
				}
			})
		}
		eventually("traffic", func() bool { return c.Stats().Hits > 100 })
		must(t, c.Close())
		stop.Store(true)
		wg.Wait()
		if err := c.Close(); !errors.Is(err, ErrClosed) {
			t.Fatal(err)
		}
		if err := c.SetBudget(1 << 20); !errors.Is(err, ErrClosed) {
			t.Fatal(err)
		}
	}
}

func benchCache(b *testing.B, budget int64) *Cache {
	c := newCache(b, budget)
	src := bytes.Repeat([]byte{1}, ClusterBytes)
	for i := range uint64(budget / ClusterBytes * 3 / 4) {
		c.Put(Key{1, i}, src)
	}
	b.SetBytes(ClusterBytes)
	b.ReportAllocs()
	return c
}

func BenchmarkGetHit(b *testing.B) {
	const budget = 256 << 20
	c := benchCache(b, budget)
	dst := make([]byte, ClusterBytes)
	x := uint64(1)
	for b.Loop() {
		x = x*6364136223846793005 + 1442695040888963407
		c.Get(Key{1, (x >> 33) % (budget / ClusterBytes * 3 / 4)}, dst)
	}
}

func BenchmarkGetHitParallel(b *testing.B) {
	const budget = 256 << 20
	c := benchCache(b, budget)
	b.RunParallel(func(pb *testing.PB) {
		dst := make([]byte, ClusterBytes)
		x := rand.Uint64()
		for pb.Next() {
			x = x*6364136223846793005 + 1442695040888963407
			c.Get(Key{1, (x >> 33) % (budget / ClusterBytes * 3 / 4)}, dst)
		}
	})
}

func BenchmarkGetMiss(b *testing.B) {
	c := benchCache(b, 64<<20)
	dst := make([]byte, ClusterBytes)
	i := uint64(0)
	for b.Loop() {
		i++
		c.Get(Key{2, i}, dst)
	}
}

func BenchmarkPutEvict(b *testing.B) {
	c := benchCache(b, 64<<20)
	src := make([]byte, ClusterBytes)
	i := uint64(1 << 40)
	for b.Loop() {
		i++
		c.Put(Key{1, i}, src)
	}
}
