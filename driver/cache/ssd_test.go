package cache

import (
	"errors"
	"sync"
	"syscall"
	"testing"

	"scoria/alba/vfs"
)

// warm makes n clusters hot and then pushes them out of RAM.
func warm(c *Cache, n int) {
	dst := make([]byte, ClusterBytes)
	for i := range uint64(n) {
		k := Key{1, i}
		c.Put(k, cluster(k))
		for range 3 {
			c.Get(k, dst)
		}
	}
	evictAll(c)
}

// evictAll pushes everything out of RAM that is there.
func evictAll(c *Cache) {
	dst := make([]byte, ClusterBytes)
	for i := range uint64(6 * c.budget.Load() / ClusterBytes) {
		c.Put(Key{9, 1<<40 + i}, dst)
		for range 3 {
			c.Get(Key{9, 1<<40 + i}, dst)
		}
	}
}

func TestSSD(t *testing.T) {
	m := vfs.NewMem()
	c := newCache(t, slots(4))
	must(t, c.AttachSSD(m, "ssd", 4<<20))
	if err := c.AttachSSD(m, "ssd2", 4<<20); err == nil {
		t.Fatal("two tiers")
	}
	dst := make([]byte, ClusterBytes)
	hits := 0
	eventually("a hit on the SSD", func() bool {
		warm(c, 100)
		for i := range uint64(100) {
			k := Key{1, i}
			if c.Get(k, dst) || !c.Load(k, dst) {
				continue
			}
			hits++
			if !same(dst, k) {
				t.Fatalf("%v: wrong bytes from the SSD", k)
			}
			if !c.Get(k, dst) && c.Stats().TurnedAway == 0 {
				t.Fatal("what came from the SSD is not in RAM")
			}
		}
		return hits > 50
	})
	st := c.Stats().SSD
	if st.Hits < 50 || st.Written == 0 || st.Entries == 0 || st.Bytes != 4<<20 || st.Failed != "" {
		t.Fatalf("%+v", st)
	}
	c.DropVolume(1)
	evictAll(c)
	for i := range uint64(100) {
		if c.Load(Key{1, i}, dst) {
			t.Fatal("a dropped cluster came back")
		}
	}
}

// TestP5SSDCorruption: bytes that rotted on the SSD are a miss.
func TestP5SSDCorruption(t *testing.T) {
	m := vfs.NewMem()
	c := newCache(t, slots(4))
	must(t, c.AttachSSD(m, "ssd", MinSSDBytes))
	for i := range int64(MinSSDBytes / ClusterBytes) {
		must(t, m.Corrupt("ssd", i*ClusterBytes)) // so that stale slots differ too
	}
	warm(c, 100)
	eventually("writing", func() bool { return c.Stats().SSD.Entries > 0 })
	tier := c.ssd.Load()
	tier.mu.Lock()
	var keys []Key
	for i := range tier.entries.s {
		if e := &tier.entries.s[i]; e.used {
			keys = append(keys, Key{e.volume, e.location})
			must(t, m.Corrupt("ssd", int64(i)*ClusterBytes+77))
		}
	}
	tier.mu.Unlock()
	dst := make([]byte, ClusterBytes)
	for _, k := range keys {
		if tier.read(k, dst) {
			t.Fatalf("%v: rotten bytes were returned", k)
		}
	}
	if st := c.Stats().SSD; st.Corrupt == 0 {
		t.Fatalf("%+v", st)
	}
}

func TestSSDFailures(t *testing.T) {
	m := vfs.NewMem()
	c := newCache(t, slots(4))
	must(t, c.AttachSSD(m, "ssd", MinSSDBytes))
	m.SetHook(func(op vfs.Op, _ string) error {
		if op == vfs.OpWrite {
			return syscall.EIO
		}
		return nil
	})
	eventually("switching off", func() bool {
		warm(c, 100)
		return c.Stats().SSD.Failed != ""
	})
	st := c.Stats().SSD
	if st.Errors < failuresAllowed || st.Entries != 0 {
		t.Fatalf("%+v", st)
	}
	if c.Load(Key{1, 1 << 50}, make([]byte, ClusterBytes)) {
		t.Fatal("hit on a failed SSD")
	}
}

func TestSSDDropsUnderPressure(t *testing.T) {
	m := vfs.NewMem()
	c := newCache(t, slots(4))
	must(t, c.AttachSSD(m, "ssd", MinSSDBytes))
	block := make(chan struct{})
	m.SetHook(func(op vfs.Op, _ string) error {
		if op == vfs.OpWrite {
			<-block
		}
		return nil
	})
	eventually("dropping", func() bool {
		warm(c, 500)
		return c.Stats().SSD.Dropped > 0
	})
	close(block)
}

// TestDropOnTheWayToTheSSD: clusters of a volume that is dropped while the writer has
// them do not come back when they are written.
func TestDropOnTheWayToTheSSD(t *testing.T) {
	m := vfs.NewMem()
	c := newCache(t, slots(4))
	must(t, c.AttachSSD(m, "ssd", 4<<20))
	writing, goOn := make(chan struct{}), make(chan struct{})
	var once sync.Once
	m.SetHook(func(op vfs.Op, _ string) error {
		if op == vfs.OpWrite {
			once.Do(func() { close(writing) })
			<-goOn
		}
		return nil
	})
	warm(c, 400)
	eventually("the writer has a batch", func() bool { // others wait, and one is being filled
		select {
		case <-writing:
			return true
		default:
			return false
		}
	})
	c.DropVolume(1)
	close(goOn)
	eventually("writing", func() bool {
		evictAll(c)
		return c.Stats().SSD.Written >= batchCount*batchClusters
	})
	m.SetHook(nil)
	dst := make([]byte, ClusterBytes)
	for i := range uint64(400) {
		if c.Load(Key{1, i}, dst) {
			t.Fatalf("dropped cluster %d came back", i)
		}
	}
}

func TestSSDNeedsRoom(t *testing.T) {
	m := vfs.NewMem()
	m.SetCapacity(1 << 20)
	c := newCache(t, slots(4))
	if err := c.AttachSSD(m, "ssd", 8<<20); !errors.Is(err, syscall.ENOSPC) {
		t.Fatal(err)
	}
	if m.Used() != 0 {
		t.Fatalf("%d bytes stay reserved", m.Used())
	}
	if err := c.AttachSSD(m, "ssd", 1); err == nil {
		t.Fatal("a tier of one byte")
	}
	must(t, c.AttachSSD(m, "ssd", MinSSDBytes))
}

func TestSSDOnHost(t *testing.T) {
	c := newCache(t, slots(4))
	// It has room for all that warm pushes out of RAM: on a smaller one a quick disk
	// has written others over the first ones before they are looked for.
	must(t, c.AttachSSD(vfs.OS(), t.TempDir()+"/ssd", 4<<20))
	dst := make([]byte, ClusterBytes)
	eventually("a hit on the SSD", func() bool {
		warm(c, 100)
		for i := range uint64(100) {
			if k := (Key{1, i}); c.Load(k, dst) && !same(dst, k) {
				t.Fatal("wrong bytes")
			}
		}
		return c.Stats().SSD.Hits > 0
	})
}
