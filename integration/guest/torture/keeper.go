package main

import (
	"encoding/binary"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// libraryBytes is the part of the disk that a keeper reads from.
const libraryBytes = 4 << 20

// keeper reads from the disk into memory to which nothing but the disk's device
// writes, and checks it much later. A worker looks at once at what it has read:
// whoever copies the guest's memory, as a live migration does, and doesn't know of
// the device's writes is noticed by a keeper only.
type keeper struct {
	*worker           // of the library, which is written once
	memory  []byte    // slots of a cluster
	holds   []int64   // per slot: offset in the library of what it was read from
	checked uint64    // slots
	began   [2]uint64 // addresses at the start
}

func newKeeper(c config) (*keeper, error) {
	start := int64(c.workers) * c.span
	i := c.workers
	c.span = libraryBytes
	w, err := newWorker(c, i)
	if err != nil {
		return nil, err
	}
	w.start = start
	memory, err := unix.Mmap(-1, 0, c.keep, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANONYMOUS|unix.MAP_PRIVATE|unix.MAP_POPULATE)
	if err != nil {
		return nil, err
	}
	k := &keeper{worker: w, memory: memory, holds: make([]int64, c.keep/clusterBytes)}
	k.began, err = k.addresses()
	return k, err
}

// loop works as worker.loop does.
func (k *keeper) loop(deadline time.Time, failed <-chan struct{}) error {
	const sectors = maxIO / sectorBytes
	for at := 0; at < len(k.gen); at += sectors {
		if err := k.timed(func() error { return k.write(at, sectors) }); err != nil {
			return err
		}
	}
	for at := 0; at < len(k.memory); at += libraryBytes { // every slot holds something
		part := k.memory[at:min(at+libraryBytes, len(k.memory))]
		if err := k.load(at/clusterBytes, 0, len(part)/clusterBytes); err != nil {
			return err
		}
	}
	for n := 0; time.Now().Before(deadline) && !k.stopped(n, failed); n++ {
		count := 1 + k.rng.IntN(16)
		from := clusterBytes * k.rng.Int64N(libraryBytes/clusterBytes-int64(count)+1)
		if err := k.load(k.rng.IntN(len(k.holds)-count+1), from, count); err != nil {
			return err
		}
		if err := k.check(k.rng.IntN(len(k.holds)-count+1), count); err != nil {
			return err
		}
	}
	if closed(failed) {
		return nil
	}
	if err := k.check(0, len(k.holds)); err != nil {
		return fmt.Errorf("final check: %w", err)
	}
	return nil
}

// load reads count clusters from offset from of the library into slots.
func (k *keeper) load(slot int, from int64, count int) error {
	for i := range count {
		k.holds[slot+i] = from + int64(i)*clusterBytes
	}
	k.did.Reads++
	k.did.Bytes += uint64(count * clusterBytes)
	return k.timed(func() error {
		_, err := k.f.ReadAt(k.memory[slot*clusterBytes:][:count*clusterBytes], k.start+from)
		return err
	})
}

// check looks at what slots hold.
func (k *keeper) check(slot, count int) error {
	var want [sectorBytes]byte
	for i := slot; i < slot+count; i++ {
		k.checked++
		for s := range clusterBytes / sectorBytes {
			sector := int(k.holds[i]/sectorBytes) + s
			k.fill(want[:], sector)
			if got := k.memory[i*clusterBytes+s*sectorBytes:][:sectorBytes]; string(got) != string(want[:]) {
				return fmt.Errorf("memory that was read into is not what was read, slot %d of %d: %w", i, len(k.holds), k.mismatch(sector, got))
			}
		}
	}
	return nil
}

// soil writes to every page of n bytes of memory again and again, so that a live
// migration is not done before it is let.
func soil(n int) {
	memory := make([]byte, n)
	for ; n > 0; time.Sleep(10 * time.Millisecond) {
		for at := 0; at < n; at += clusterBytes {
			memory[at]++
		}
	}
}

// addresses returns the lowest and the highest physical address of the memory's
// pages (Linux, Documentation/admin-guide/mm/pagemap.rst).
func (k *keeper) addresses() (span [2]uint64, err error) {
	f, err := os.Open("/proc/self/pagemap")
	if err != nil {
		return span, err
	}
	defer f.Close()
	const (
		entryBytes = 8
		present    = 1 << 63
		frame      = 1<<55 - 1
	)
	entries := make([]byte, entryBytes*len(k.holds))
	first := int64(addressOf(k.memory)) / clusterBytes
	if _, err := f.ReadAt(entries, first*entryBytes); err != nil {
		return span, err
	}
	span[0] = ^uint64(0)
	for i := range k.holds {
		e := binary.LittleEndian.Uint64(entries[i*entryBytes:])
		if e&present == 0 {
			return span, fmt.Errorf("page %d of the kept memory is not there", i)
		}
		span = [2]uint64{min(span[0], e&frame*clusterBytes), max(span[1], e&frame*clusterBytes)}
	}
	return span, nil
}
