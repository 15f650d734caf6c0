package main

import (
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

const (
	sectorBytes  = 512
	clusterBytes = 4096
	maxIO        = 256 << 10
)

// worker has [start, start+span) of the disk for itself.
type worker struct {
	cfg   config
	f     *os.File
	rng   *rand.Rand
	start int64    // bytes
	gen   []uint32 // per sector: the write that it must hold; 0: zeroes
	last  uint32   // latest generation
	buf   []byte   // page-aligned for O_DIRECT
	did   report
	err   error
}

func newWorker(c config, i int) (*worker, error) {
	f, err := os.OpenFile(c.device, os.O_RDWR|unix.O_DIRECT, 0)
	if err != nil {
		return nil, err
	}
	buf, err := unix.Mmap(-1, 0, maxIO, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANONYMOUS|unix.MAP_PRIVATE)
	if err != nil {
		return nil, err
	}
	w := &worker{
		cfg:   c,
		f:     f,
		rng:   rand.New(rand.NewPCG(c.seed, uint64(i))),
		start: int64(i) * c.span,
		gen:   make([]uint32, c.span/sectorBytes),
		buf:   buf,
	}
	return w, nil
}

// loop works until the deadline, the stop file, or another worker's failure,
// and then checks its whole part of the disk.
func (w *worker) loop(deadline time.Time, failed <-chan struct{}) error {
	// What was there before is unknown: begin with zeroes everywhere.
	if err := w.timed(func() error { return w.zero(0, len(w.gen)) }); err != nil {
		return err
	}
	for n := 0; time.Now().Before(deadline) && !w.stopped(n, failed); n++ {
		if err := w.timed(w.step); err != nil {
			return err
		}
	}
	if closed(failed) {
		return nil
	}
	for at := 0; at < len(w.gen); at += maxIO / sectorBytes {
		if err := w.timed(func() error { return w.read(at, min(maxIO/sectorBytes, len(w.gen)-at)) }); err != nil {
			return fmt.Errorf("final check: %w", err)
		}
	}
	return nil
}

// stopped says before the n-th operation whether the stop file is there or another
// worker has failed.
func (w *worker) stopped(n int, failed <-chan struct{}) bool {
	if closed(failed) || n%16 != 0 || w.cfg.stop == "" {
		return closed(failed)
	}
	_, err := os.Stat(w.cfg.stop)
	return err == nil
}

func closed(c <-chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}

// timed runs one operation and notes a long wait.
func (w *worker) timed(op func() error) error {
	begin := time.Now()
	err := op()
	took := time.Since(begin)
	w.did.LongestMs = max(w.did.LongestMs, took.Milliseconds())
	if took >= w.cfg.pause {
		w.did.PausesMs = append(w.did.PausesMs, took.Milliseconds())
	}
	return err
}

// step carries out one random operation. Most are whole clusters; some are not,
// and some are long enough to need several descriptors.
func (w *worker) step() error {
	kind := w.rng.IntN(100)
	unit := clusterBytes / sectorBytes
	if kind < 70 && w.rng.IntN(4) == 0 {
		unit = 1
	}
	longest := 4
	if w.rng.IntN(8) == 0 {
		longest = w.cfg.maxIO / clusterBytes
	}
	count := unit * (1 + w.rng.IntN(longest))
	at := unit * w.rng.IntN((len(w.gen)-count)/unit+1)
	switch {
	case kind < 45:
		return w.write(at, count)
	case kind < 85 || !w.cfg.discard && kind < 95:
		return w.read(at, count)
	case kind < 91:
		return w.drop(at, count)
	case kind < 95:
		return w.zero(at, count)
	case !w.cfg.flush:
		return w.read(at, count)
	default:
		w.did.Flushes++
		return w.f.Sync()
	}
}

func (w *worker) write(at, count int) error {
	w.last++
	for i := range count {
		w.gen[at+i] = w.last
		w.fill(w.buf[i*sectorBytes:][:sectorBytes], at+i)
	}
	w.did.Writes++
	w.did.Bytes += uint64(count * sectorBytes)
	_, err := w.f.WriteAt(w.buf[:count*sectorBytes], w.offset(at))
	return err
}

func (w *worker) read(at, count int) error {
	w.did.Reads++
	w.did.Bytes += uint64(count * sectorBytes)
	if _, err := w.f.ReadAt(w.buf[:count*sectorBytes], w.offset(at)); err != nil {
		return err
	}
	var want [sectorBytes]byte
	for i := range count {
		w.fill(want[:], at+i)
		if got := w.buf[i*sectorBytes:][:sectorBytes]; string(got) != string(want[:]) {
			return w.mismatch(at+i, got)
		}
	}
	return nil
}

func (w *worker) drop(at, count int) error {
	w.did.Discards++
	w.forget(at, count)
	return discard(w.f, uint64(w.offset(at)), uint64(count*sectorBytes))
}

func (w *worker) zero(at, count int) error {
	w.did.Zeroes++
	w.forget(at, count)
	// The kernel turns these into WRITE_ZEROES, with the unmap flag and without.
	mode := uint32(unix.FALLOC_FL_ZERO_RANGE | unix.FALLOC_FL_KEEP_SIZE)
	if w.rng.IntN(2) == 0 {
		mode = unix.FALLOC_FL_PUNCH_HOLE | unix.FALLOC_FL_KEEP_SIZE
	}
	return unix.Fallocate(int(w.f.Fd()), mode, w.offset(at), int64(count*sectorBytes))
}

func (w *worker) forget(at, count int) {
	for i := range count {
		w.gen[at+i] = 0
	}
}

func (w *worker) offset(sector int) int64 { return w.start + int64(sector)*sectorBytes }

// fill writes what a sector must hold: its number on the disk, its generation,
// and words made from both.
func (w *worker) fill(p []byte, sector int) {
	g := w.gen[sector]
	if g == 0 {
		clear(p)
		return
	}
	number := uint64(w.offset(sector) / sectorBytes)
	binary.LittleEndian.PutUint64(p, number)
	binary.LittleEndian.PutUint64(p[8:], uint64(g))
	x := number<<32 | uint64(g)
	for i := 16; i < sectorBytes; i += 8 {
		x = x*6364136223846793005 + 1442695040888963407
		binary.LittleEndian.PutUint64(p[i:], x)
	}
}

func (w *worker) mismatch(sector int, got []byte) error {
	number, g := binary.LittleEndian.Uint64(got), binary.LittleEndian.Uint64(got[8:])
	return fmt.Errorf("wrong data in sector %d: must be generation %d of it (0 is zeroes, latest is %d); "+
		"found sector %d, generation %d, first bytes %x", w.offset(sector)/sectorBytes, w.gen[sector], w.last, number, g, got[:32])
}
