package cache

import (
	"math/bits"
	"sync/atomic"
)

// none ends lists of slots.
const none = ^uint32(0)

// Queues a slot can be in.
const (
	queueFree uint8 = iota
	queueSmall
	queueMain
)

const (
	// filling, in entry.state: the slot's bytes are being copied in.
	filling = 1 << 31

	maxFreq = 3 // what S3-FIFO counts to
	maxHits = 255

	// evictSteps bounds the slots that one Put looks at. When the queue's head is
	// that hot, the newcomer is turned away and the clock has moved on.
	evictSteps = 64

	ghostWays = 4
)

// entry describes a slot. The shard's mutex guards all but state, which readers
// lower without it.
type entry struct {
	location uint64
	volume   uint32
	next     uint32        // slot behind it in its queue
	chain    uint32        // next slot of its bucket
	state    atomic.Uint32 // readers that copy from it, or filling
	queue    uint8
	freq     uint8
	hits     uint8 // since it came in, saturating
	dead     bool  // not in the index any more; waits for its turn in the queue
}

// fifo is a queue of slots, linked by entry.next.
type fifo struct {
	head, tail uint32
	count      uint32
}

// table is one shard's slots, index, queues and ghosts.
type table struct {
	slots   uint32
	data    array[byte]   // slots × ClusterBytes
	entries array[entry]  // slots
	buckets array[uint32] // power of two; heads of chains, plus 1
	ghosts  array[uint64] // sets of ghostWays: fingerprint and time
	clock   uint32        // evictions to the ghosts so far
	free    uint32        // list by entry.next
	small   fifo
	main    fifo
}

func newTable(slots uint32) (*table, error) {
	t := &table{slots: slots, free: none, small: fifo{head: none, tail: none}, main: fifo{head: none, tail: none}}
	if slots == 0 {
		return t, nil
	}
	size := 1 << bits.Len32(slots-1)
	var err error
	if t.data, err = newArray[byte](int(slots) * ClusterBytes); err == nil {
		if t.entries, err = newArray[entry](int(slots)); err == nil {
			if t.buckets, err = newArray[uint32](size); err == nil {
				t.ghosts, err = newArray[uint64](max(size, ghostWays))
			}
		}
	}
	if err != nil {
		t.release()
		return nil, err
	}
	for i := slots; i > 0; i-- {
		t.entries.s[i-1].next = t.free
		t.free = i - 1
	}
	return t, nil
}

func (t *table) release() {
	t.data.free()
	t.entries.free()
	t.buckets.free()
	t.ghosts.free()
	t.slots = 0
}

func (t *table) bytes(i uint32) []byte {
	return t.data.s[int(i)*ClusterBytes : (int(i)+1)*ClusterBytes]
}

func (t *table) bucket(hash uint64) *uint32 {
	return &t.buckets.s[hash&uint64(len(t.buckets.s)-1)]
}

// find returns the slot of a key, or none.
func (t *table) find(k Key, hash uint64) uint32 {
	if t.slots == 0 {
		return none
	}
	for i := *t.bucket(hash) - 1; i != none; {
		e := &t.entries.s[i]
		if e.location == k.Location && e.volume == k.Volume {
			return i
		}
		i = e.chain - 1
	}
	return none
}

// link puts a slot into the index.
func (t *table) link(i uint32, hash uint64) {
	b := t.bucket(hash)
	t.entries.s[i].chain = *b
	*b = i + 1
}

// unlink takes a slot out of the index.
func (t *table) unlink(i uint32, hash uint64) {
	for p := t.bucket(hash); *p != 0; p = &t.entries.s[*p-1].chain {
		if *p == i+1 {
			*p = t.entries.s[i].chain
			return
		}
	}
	panic("cache: a slot is missing in its bucket")
}

func (t *table) push(q *fifo, queue uint8, i uint32) {
	e := &t.entries.s[i]
	e.queue, e.next = queue, none
	if q.count == 0 {
		q.head = i
	} else {
		t.entries.s[q.tail].next = i
	}
	q.tail = i
	q.count++
}

func (t *table) pop(q *fifo) uint32 {
	i := q.head
	q.head = t.entries.s[i].next
	q.count--
	return i
}

// insert takes a slot for a key that is not in the table, evicting another if
// need be. The slot is in the index, filling. ok is false if no slot could be
// had. victim is what was evicted from it, worthy whether to keep that elsewhere.
func (t *table) insert(k Key, hash, seed uint64, hot bool) (i uint32, victim Key, worthy, ok bool) {
	if t.slots == 0 {
		return 0, victim, false, false
	}
	if t.free == none {
		if victim, worthy, ok = t.evict(seed); !ok {
			return 0, victim, false, false
		}
	}
	i = t.free
	e := &t.entries.s[i]
	t.free = e.next
	e.location, e.volume = k.Location, k.Volume
	e.freq, e.hits, e.dead = 0, 0, false
	e.state.Store(filling)
	t.link(i, hash)
	if hot {
		t.push(&t.main, queueMain, i)
	} else {
		t.push(&t.small, queueSmall, i)
	}
	return i, victim, worthy, true
}

// evict frees a slot, which is then the first of the free list.
func (t *table) evict(seed uint64) (victim Key, worthy, ok bool) {
	smallTarget := max(t.slots/10, 1)
	for range evictSteps {
		if t.small.count > smallTarget || t.main.count == 0 {
			i := t.pop(&t.small)
			e := &t.entries.s[i]
			switch {
			case e.state.Load() != 0:
				t.push(&t.small, queueSmall, i)
			case e.freq > 1 && !e.dead:
				e.freq = 0
				t.push(&t.main, queueMain, i)
			default:
				if !e.dead {
					t.remember(hashKey(Key{e.volume, e.location}, seed))
				}
				victim, worthy = t.vacate(i, seed)
				return victim, worthy, true
			}
			continue
		}
		i := t.pop(&t.main)
		e := &t.entries.s[i]
		if e.state.Load() != 0 || e.freq > 0 && !e.dead {
			e.freq -= min(e.freq, 1)
			t.push(&t.main, queueMain, i)
			continue
		}
		victim, worthy = t.vacate(i, seed)
		return victim, worthy, true
	}
	return victim, false, false
}

// vacate frees a slot that is in no queue and that nobody copies from.
func (t *table) vacate(i uint32, seed uint64) (victim Key, worthy bool) {
	e := &t.entries.s[i]
	victim = Key{e.volume, e.location}
	if !e.dead {
		worthy = e.hits > 1
		t.unlink(i, hashKey(victim, seed))
	}
	e.queue, e.next = queueFree, t.free
	t.free = i
	return victim, worthy
}

// A ghost is the upper half of a hash and the time it came, in one of the ways of
// its set. It counts as long as no more ghosts came since than there are slots.

func (t *table) ghostSet(hash uint64) []uint64 {
	sets := uint64(len(t.ghosts.s) / ghostWays)
	first := (hash >> 8) % sets * ghostWays
	return t.ghosts.s[first : first+ghostWays]
}

// remember makes a ghost, in place of its set's oldest.
func (t *table) remember(hash uint64) {
	t.clock++
	set := t.ghostSet(hash)
	oldest := 0
	for i := range set {
		if t.clock-uint32(set[i]) > t.clock-uint32(set[oldest]) {
			oldest = i
		}
	}
	set[oldest] = hash>>32<<32 | uint64(t.clock)
}

// ghost says whether a key was evicted lately, and forgets it.
func (t *table) ghost(hash uint64) bool {
	if t.slots == 0 {
		return false
	}
	set := t.ghostSet(hash)
	for i, g := range set {
		if g>>32 == hash>>32 && g != 0 && t.clock-uint32(g) < t.slots {
			set[i] = 0
			return true
		}
	}
	return false
}
