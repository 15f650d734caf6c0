package main

import (
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"scoria/alba"
	"scoria/alba/proxy"
)

// readCase is one row of reads.
type readCase struct {
	tcp  bool
	cold bool // nothing of the fragments is in memory, not even their checksums
}

func readCases() []readCase {
	return []readCase{{}, {tcp: true}, {cold: true}, {tcp: true, cold: true}}
}

func (c readCase) row() string {
	if c.cold {
		return "objects-read-4k-cold" + suffix(c.tcp)
	}
	return "objects-read-4k" + suffix(c.tcp)
}

func (c readCase) target() target {
	t := target{title: "4 KiB read of a stored object, embedded, p50, against a disk read", workload: c.row(), unit: "µs", value: p50, against: bareName, limit: 2, goal: 1.3, atMost: true}
	if c.tcp {
		t.title = "4 KiB read of a stored object, loopback TCP, p50, against round trip + disk read"
	}
	if c.cold {
		t.title += ", checksums not in memory"
	}
	return t
}

// storedObjects puts objects to read from.
func storedObjects(ctx context.Context, r *objectRig, data []byte) error {
	for i := range readObjects {
		if err := r.proxy.Put(ctx, "n", fmt.Sprint("o", i), 1, bytes.NewReader(data), int64(len(data))); err != nil {
			return err
		}
	}
	return nil
}

// readLoop reads 4 KiB at random places for a measurement's length.
func (b *bench) readLoop(ctx context.Context, seed uint64, size int, read func(object int, p []byte, off int64) error) (res sample, err error) {
	rng := rand.New(rand.NewPCG(seed, 7))
	p, err := unix.Mmap(-1, 0, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANON)
	if err != nil {
		return res, fmt.Errorf("mmap: %w", err)
	}
	defer unix.Munmap(p)
	begin := time.Now()
	for res.Ops < 8 || time.Since(begin) < b.cfg.seconds {
		start := time.Now()
		if err := read(rng.IntN(readObjects), p, rng.Int64N(int64(size/4096))*4096); err != nil {
			return res, err
		}
		res.Latency.Record(uint64(time.Since(start)))
		res.Ops++
		if err := ctx.Err(); err != nil {
			return res, err
		}
	}
	finish(&res, begin, 4096)
	return res, nil
}

func (r *objectRig) readObject(ctx context.Context) func(int, []byte, int64) error {
	return func(object int, p []byte, off int64) error {
		return r.proxy.ReadAt(ctx, "n", fmt.Sprint("o", object), p, off)
	}
}

// measureObjectReads reads what no cache has, in turns with a bare loop.
func (b *bench) measureObjectReads(ctx context.Context, c readCase, data []byte) error {
	handles := 0
	if c.cold {
		handles = 1 // of open files with their checksums, per storage daemon
	}
	r, err := b.newObjectRig(ctx, rigOptions{devices: objectDevices, policy: alba.Policy{K: 4, M: 2, C: 6, X: 1}, tcp: c.tcp, handles: handles})
	if err != nil {
		return err
	}
	defer r.close()
	if err := storedObjects(ctx, r, data); err != nil {
		return err
	}
	bare, done, err := b.bareReads(r.dir, c.tcp, data)
	if err != nil {
		return err
	}
	defer done()
	b.say("%s: %d rounds", c.row(), b.cfg.rounds)
	if _, err := b.readLoop(ctx, 99, len(data), r.readObject(ctx)); err != nil { // heads are read once
		return err
	}
	counters := r.proxy.Counters()
	fromDisk, err := r.diskBytes(ctx)
	if err != nil {
		return err
	}
	fetched, asked, others := counters.FetchedBytes.Load(), counters.ReadBytes.Load(), askedOthers(counters)
	for round := range b.cfg.rounds {
		if err := r.dropCaches(); err != nil {
			return err
		}
		mine, err := b.readLoop(ctx, uint64(round), len(data), r.readObject(ctx))
		if err != nil {
			return err
		}
		b.results.put(c.row(), scoriaName, round, mine)
		other, err := b.readLoop(ctx, uint64(round), len(data), bare)
		if err != nil {
			return err
		}
		b.results.put(c.row(), bareName, round, other)
	}
	now, err := r.diskBytes(ctx)
	if err != nil {
		return err
	}
	total := float64(counters.ReadBytes.Load() - asked)
	if c.cold {
		b.figure(c.row(), "bytes that these read from their disks per byte asked, checksums not in memory"+over(c.tcp), float64(now-fromDisk)/total, "×", 0)
		return nil
	}
	b.figure(c.row(), "bytes fetched from storage daemons per byte asked"+over(c.tcp), float64(counters.FetchedBytes.Load()-fetched)/total, "×", 1.01)
	b.figure(c.row(), "bytes that these read from their disks per byte asked"+over(c.tcp), float64(now-fromDisk)/total, "×", 1.01)
	b.figure(c.row(), titleOthers, float64(askedOthers(counters)-others)/(total/4096), "×", 0)
	return nil
}

// titleOthers is of reads that more was fetched for than they asked, since a storage
// daemon was late or failed.
const titleOthers = "of these reads, asked of other storage daemons too"

func askedOthers(c *proxy.Counters) uint64 { return c.Hedged.Load() + c.Decoded.Load() }

// bareReads returns a function that reads 4 KiB directly from a file, behind a round
// trip if asked.
func (b *bench) bareReads(dir string, tcp bool, data []byte) (read func(int, []byte, int64) error, done func(), err error) {
	name := filepath.Join(dir, "bare")
	for range readObjects {
		f, err := os.OpenFile(name, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
		if err != nil {
			return nil, nil, err
		}
		_, err = f.Write(data)
		if serr := f.Sync(); err == nil {
			err = serr
		}
		f.Close()
		if err != nil {
			return nil, nil, err
		}
	}
	f, err := os.OpenFile(name, os.O_RDONLY|unix.O_DIRECT, 0)
	if err != nil { // tmpfs, for one, has no direct I/O
		if f, err = os.Open(name); err != nil {
			return nil, nil, err
		}
	}
	if !tcp {
		return func(object int, p []byte, off int64) error {
			_, err := f.ReadAt(p, int64(object)*int64(len(data))+off)
			return err
		}, func() { f.Close() }, nil
	}
	ln, err := bareServer(f)
	if err != nil {
		f.Close()
		return nil, nil, err
	}
	c, err := net.Dial("tcp", ln.Addr().String())
	if err != nil {
		ln.Close()
		f.Close()
		return nil, nil, err
	}
	return func(object int, p []byte, off int64) error {
		var q [64]byte
		at := uint64(object)*uint64(len(data)) + uint64(off)
		for i := range 8 {
			q[i] = byte(at >> (8 * i))
		}
		if _, err := c.Write(q[:]); err != nil {
			return err
		}
		return readFull(c, p)
	}, func() { c.Close(); ln.Close(); f.Close() }, nil
}

// measureEncryptedReads says what encryption adds to what is read.
func (b *bench) measureEncryptedReads(ctx context.Context, data []byte) error {
	r, err := b.newObjectRig(ctx, rigOptions{devices: objectDevices, policy: alba.Policy{K: 4, M: 2, C: 6, X: 1}, encryption: alba.EncryptAES256GCM})
	if err != nil {
		return err
	}
	defer r.close()
	if err := storedObjects(ctx, r, data); err != nil {
		return err
	}
	b.say("objects-encrypted: reads")
	if _, err := b.readLoop(ctx, 99, len(data), r.readObject(ctx)); err != nil {
		return err
	}
	counters := r.proxy.Counters()
	before, err := r.diskBytes(ctx)
	if err != nil {
		return err
	}
	fetched, asked, others := counters.FetchedBytes.Load(), counters.ReadBytes.Load(), askedOthers(counters)
	if _, err := b.readLoop(ctx, 1, len(data), r.readObject(ctx)); err != nil {
		return err
	}
	after, err := r.diskBytes(ctx)
	if err != nil {
		return err
	}
	total := float64(counters.ReadBytes.Load() - asked)
	b.figure(rowObjects+"-encrypted", "with encryption: bytes fetched per byte asked", float64(counters.FetchedBytes.Load()-fetched)/total, "×", 1.1)
	b.figure(rowObjects+"-encrypted", "with encryption: bytes read from disks per byte asked", float64(after-before)/total, "×", 1.1)
	b.figure(rowObjects+"-encrypted", titleOthers, float64(askedOthers(counters)-others)/(total/4096), "×", 0)
	return nil
}

// slowDisk is how late a slow device answers.
const slowDisk = 200 * time.Millisecond

// measureDegraded reads with all devices, with one that answers late, and without it.
func (b *bench) measureDegraded(ctx context.Context, data []byte) error {
	r, err := b.newObjectRig(ctx, rigOptions{devices: objectDevices, policy: alba.Policy{K: 4, M: 2, C: 6, X: 1}})
	if err != nil {
		return err
	}
	defer r.close()
	if err := storedObjects(ctx, r, data); err != nil {
		return err
	}
	b.say("objects-degraded: reads with a device slow, and missing")
	bad, _ := r.device(0)
	for _, state := range []struct {
		title string
		set   func()
	}{
		{"all devices", func() {}},
		{fmt.Sprintf("one of 6 devices %v late", slowDisk), func() { bad.delay.Store(int64(slowDisk)) }},
		{"one of 6 devices missing", func() { bad.delay.Store(0); bad.down.Store(true) }},
	} {
		state.set()
		if err := r.dropCaches(); err != nil {
			return err
		}
		counters := r.proxy.Counters()
		fetched, asked := counters.FetchedBytes.Load(), counters.ReadBytes.Load()
		res, err := b.readLoop(ctx, 5, len(data), r.readObject(ctx))
		if err != nil {
			return err
		}
		row := rowObjects + "-degraded"
		b.figure(row, "4 KiB read, 4+2, "+state.title+", p50", p50(&res), "µs", 0)
		b.figure(row, "the same, p99", float64(res.P99)/1e3, "µs", 0)
		b.figure(row, "the same, p99.9", p999(&res), "µs", 0)
		b.figure(row, "the same, bytes fetched per byte asked", float64(counters.FetchedBytes.Load()-fetched)/float64(counters.ReadBytes.Load()-asked), "×", 0)
	}
	return nil
}
