package cache

import (
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"runtime"
	"sync"
	"sync/atomic"
)

// ClusterBytes is the size of what is cached.
const ClusterBytes = 4096

const (
	shardBits  = 5
	shardCount = 1 << shardBits
)

// ErrClosed: the cache was closed.
var ErrClosed = errors.New("cache is closed")

// Key names a cluster: a tag for the volume, unique in the process's life, and
// its location within the volume.
type Key struct {
	Volume   uint32
	Location uint64
}

// Stats are the counters since New, in clusters, and the current sizes.
type Stats struct {
	Hits, Misses uint64 // of Get; Load counts its hits in RAM only
	Inserted     uint64
	Evicted      uint64
	TurnedAway   uint64 // Puts that met nothing but slots hotter or in use
	Entries      uint64 // slots in use, forgotten clusters included
	BudgetBytes  int64

	SSD SSDStats
}

// SSDStats are about the tier on the SSD; all zero without one.
type SSDStats struct {
	Hits, Misses uint64
	Written      uint64
	Dropped      uint64 // not written because the writer was behind
	Errors       uint64 // failed reads, and failed writes of a batch
	Corrupt      uint64 // clusters that failed their CRC32C
	Entries      uint64 // clusters on the SSD now
	Bytes        int64  // size of the file
	Failed       string // why the tier was switched off, or ""
}

// Cache is the read cache. Safe from any goroutine.
type Cache struct {
	seed   uint64
	shards [shardCount]shard
	ssd    atomic.Pointer[ssd]

	configMu sync.Mutex // serialises SetBudget, AttachSSD and Close
	budget   atomic.Int64
	closed   bool
}

type shard struct {
	mu sync.Mutex
	// rebuilding turns callers away while a new budget is put into effect, since
	// they must not wait for that.
	rebuilding atomic.Bool
	t          *table

	hits, misses, inserted, evicted, turnedAway uint64

	_ [64]byte // the neighbour's mutex is on another cache line
}

// New returns a cache of this many bytes of clusters, rounded down to whole
// slots in all shards; 0 is a cache that keeps nothing.
func New(budgetBytes int64) (*Cache, error) {
	c := &Cache{seed: rand.Uint64()}
	for i := range c.shards {
		c.shards[i].t, _ = newTable(0)
	}
	if err := c.SetBudget(budgetBytes); err != nil {
		return nil, errors.Join(err, c.Close())
	}
	return c, nil
}

// hashKey mixes a key; the seed keeps the buckets unpredictable.
func hashKey(k Key, seed uint64) uint64 {
	x := k.Location*0x9e3779b97f4a7c15 ^ uint64(k.Volume)*0xc2b2ae3d27d4eb4f ^ seed
	x ^= x >> 32
	x *= 0xd6e8feb86659fd93
	x ^= x >> 29
	x *= 0x9fb21c651e98df25
	return x ^ x>>32
}

// shard and table take different bits of the hash.
func (c *Cache) shard(hash uint64) *shard { return &c.shards[hash>>(64-shardBits)] }

func checkCluster(p []byte) {
	if len(p) != ClusterBytes {
		panic(fmt.Sprintf("cache: %d bytes, want a cluster of %d", len(p), ClusterBytes))
	}
}

// Get copies a cluster from RAM to dst, which must have ClusterBytes bytes, and
// reports whether it was there. It never waits for a disk.
func (c *Cache) Get(k Key, dst []byte) bool { return c.get(k, dst, 1) }

func (c *Cache) get(k Key, dst []byte, miss uint64) bool {
	checkCluster(dst)
	hash := hashKey(k, c.seed)
	s := c.shard(hash)
	if s.rebuilding.Load() {
		return false
	}
	s.mu.Lock()
	t := s.t
	i := t.find(k, hash)
	if i == none || t.entries.s[i].state.Load() == filling {
		s.misses += miss
		s.mu.Unlock()
		return false
	}
	e := &t.entries.s[i]
	e.state.Add(1)
	if e.freq < maxFreq {
		e.freq++
	}
	if e.hits < maxHits {
		e.hits++
	}
	s.hits++
	src := t.bytes(i)
	s.mu.Unlock()
	copy(dst, src)
	e.state.Add(^uint32(0))
	return true
}

// Put keeps a copy of a cluster of ClusterBytes bytes, unless the key is there
// already or its place is taken by hotter ones. It never waits for a disk.
func (c *Cache) Put(k Key, src []byte) {
	checkCluster(src)
	hash := hashKey(k, c.seed)
	s := c.shard(hash)
	if s.rebuilding.Load() {
		return
	}
	s.mu.Lock()
	t := s.t
	if t.find(k, hash) != none {
		s.mu.Unlock()
		return
	}
	full := t.free == none
	i, victim, worthy, ok := t.insert(k, hash, c.seed, t.ghost(hash))
	switch {
	case !ok:
		s.turnedAway += min(1, uint64(t.slots))
		s.mu.Unlock()
		return
	case full:
		s.evicted++
	}
	s.inserted++
	e, slot := &t.entries.s[i], t.bytes(i)
	s.mu.Unlock()
	// The slot is filling: nobody else looks at its bytes, old or new.
	if worthy {
		if tier := c.ssd.Load(); tier != nil {
			tier.offer(victim, slot)
		}
	}
	copy(slot, src)
	e.state.Store(0)
}

// Load is Get that also looks on the SSD and then takes the cluster into RAM. It
// may block on a disk.
func (c *Cache) Load(k Key, dst []byte) bool {
	if c.get(k, dst, 0) {
		return true
	}
	tier := c.ssd.Load()
	if tier == nil || !tier.read(k, dst) {
		return false
	}
	c.Put(k, dst)
	return true
}

// dropSteps is how many slots DropVolume looks at under one hold of a lock.
const dropSteps = 2048

// DropVolume forgets all clusters of a volume, in both tiers.
func (c *Cache) DropVolume(tag uint32) {
	for i := range c.shards {
		s := &c.shards[i]
		for from, more := uint32(0), true; more; from += dropSteps {
			s.mu.Lock()
			more = s.t.drop(tag, from, dropSteps, c.seed)
			s.mu.Unlock()
		}
	}
	if tier := c.ssd.Load(); tier != nil {
		tier.drop(tag)
	}
}

// drop forgets the volume's clusters in some slots, which stay in their queues
// until their turn comes. It reports whether there are more slots.
func (t *table) drop(tag, from, count uint32, seed uint64) bool {
	end := min(uint64(from)+uint64(count), uint64(t.slots))
	for i := from; uint64(i) < end; i++ {
		e := &t.entries.s[i]
		if e.volume == tag && e.queue != queueFree && !e.dead {
			t.unlink(i, hashKey(Key{e.volume, e.location}, seed))
			e.dead = true
		}
	}
	return end < uint64(t.slots)
}

// SetBudget changes the bytes of RAM for clusters. What fits into a smaller
// budget stays. Meanwhile the shards miss, one after the other.
func (c *Cache) SetBudget(bytes int64) error {
	slots := bytes / ClusterBytes / shardCount
	if bytes < 0 || slots > math.MaxInt32 {
		return fmt.Errorf("cache budget %d: must be 0 to %d bytes", bytes, int64(math.MaxInt32)*ClusterBytes*shardCount)
	}
	c.configMu.Lock()
	defer c.configMu.Unlock()
	if c.closed {
		return ErrClosed
	}
	return c.resize(uint32(slots))
}

func (c *Cache) resize(slots uint32) error {
	for i := range c.shards {
		if err := c.shards[i].resize(slots, c.seed); err != nil {
			return fmt.Errorf("cache budget of %d bytes: %w", int64(slots)*ClusterBytes*shardCount, err)
		}
	}
	c.budget.Store(int64(slots) * ClusterBytes * shardCount)
	return nil
}

// resize replaces the shard's table.
func (s *shard) resize(slots uint32, seed uint64) error {
	next, err := newTable(slots)
	if err != nil {
		return err
	}
	s.rebuilding.Store(true)
	defer s.rebuilding.Store(false)
	s.mu.Lock()
	defer s.mu.Unlock()
	old := s.t
	old.quiesce()
	s.evicted += old.moveTo(next, seed)
	s.t = next
	old.release()
	return nil
}

// quiesce waits until nobody copies to or from the table. Under the shard's
// mutex nobody begins to.
func (t *table) quiesce() {
	for i := range t.entries.s {
		for t.entries.s[i].state.Load() != 0 {
			runtime.Gosched()
		}
	}
}

// moveTo copies what fits and returns how many clusters did not.
func (t *table) moveTo(next *table, seed uint64) (lost uint64) {
	for _, q := range []*fifo{&t.small, &t.main} {
		for q.count > 0 {
			i := t.pop(q)
			from := &t.entries.s[i]
			if from.dead {
				continue
			}
			k := Key{from.volume, from.location}
			full := next.free == none
			j, _, _, ok := next.insert(k, hashKey(k, seed), seed, q == &t.main)
			if !ok || full {
				lost++
			}
			if !ok {
				continue
			}
			to := &next.entries.s[j]
			to.freq, to.hits = from.freq, from.hits
			copy(next.bytes(j), t.bytes(i))
			to.state.Store(0)
		}
	}
	return lost
}

// Stats adds the shards' counters up.
func (c *Cache) Stats() Stats {
	st := Stats{BudgetBytes: c.budget.Load()}
	for i := range c.shards {
		s := &c.shards[i]
		s.mu.Lock()
		st.Hits += s.hits
		st.Misses += s.misses
		st.Inserted += s.inserted
		st.Evicted += s.evicted
		st.TurnedAway += s.turnedAway
		st.Entries += uint64(s.t.small.count + s.t.main.count)
		s.mu.Unlock()
	}
	if tier := c.ssd.Load(); tier != nil {
		st.SSD = tier.stats()
	}
	return st
}

// Close gives the memory back and stops the SSD tier. Later Gets miss.
func (c *Cache) Close() error {
	c.configMu.Lock()
	defer c.configMu.Unlock()
	if c.closed {
		return ErrClosed
	}
	c.closed = true
	err := c.resize(0)
	if tier := c.ssd.Swap(nil); tier != nil {
		err = errors.Join(err, tier.close())
	}
	return err
}
