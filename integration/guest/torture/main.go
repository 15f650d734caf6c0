// Command torture runs inside the test guest. It writes, reads, discards, zeroes
// and flushes random ranges of a disk from many threads, knows what every sector
// must hold, and checks it at every read and in the end. It fails at the first
// I/O error or wrong byte; it prints what it did, and the pauses it saw, as JSON.
//
// Every worker has a part of the disk for itself, so its model needs no lock and
// the outcome of every operation is known. A sector holds its number and the
// generation that wrote it, so that a mismatch says whether data is old, lost or
// misplaced.
package main

import (
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"sync"
	"time"
)

type config struct {
	device  string
	workers int
	span    int64         // bytes per worker
	run     time.Duration // at most
	stop    string        // the run ends early when this file exists
	seed    uint64
	discard bool
	flush   bool
	maxIO   int           // bytes of one operation
	keep    int           // bytes of memory to read into for later; 0: none
	dirty   int           // bytes of memory to write to all the time; 0: none
	pause   time.Duration // waits for one operation at least this long are listed
}

// report is what goes to standard output.
type report struct {
	Reads, Writes, Discards, Zeroes, Flushes uint64
	Bytes                                    uint64
	Kept                                     uint64    // checks of clusters that were read long before
	KeptBegan, KeptEnded                     [2]uint64 // lowest and highest physical address of the memory for them
	Seconds                                  float64
	PausesMs                                 []int64 // of worker 0, in order
	LongestMs                                int64   // wait for one operation, any worker
}

func main() {
	var c config
	flag.StringVar(&c.device, "device", "/dev/vda", "disk that is overwritten")
	flag.IntVar(&c.workers, "workers", 16, "threads, each with one operation under way")
	span := flag.Int64("span-mib", 8, "MiB of the disk per worker")
	flag.DurationVar(&c.run, "run", time.Minute, "how long")
	flag.StringVar(&c.stop, "stop", "", "end early when this file exists")
	flag.Uint64Var(&c.seed, "seed", 1, "of the random operations")
	flag.BoolVar(&c.discard, "discard", true, "also discard and write zeroes")
	flag.BoolVar(&c.flush, "flush", true, "also flush")
	maxKiB := flag.Int("max-kib", maxIO>>10, "KiB of the longest operation, at least 16")
	keepMiB := flag.Int("keep-mib", 0, "MiB of memory that one more thread reads into, from behind the workers' parts, and checks much later")
	dirtyMiB := flag.Int("dirty-mib", 0, "MiB of memory that one more thread writes to all the time, whether the disk is there or not")
	flag.DurationVar(&c.pause, "pause", 200*time.Millisecond, "list waits at least this long")
	flag.Parse()
	c.span, c.maxIO, c.keep = *span<<20, *maxKiB<<10, *keepMiB<<20
	c.dirty = *dirtyMiB << 20
	r, err := torture(c)
	out, jerr := json.Marshal(r)
	fmt.Println(string(out))
	if err = errors.Join(err, jerr); err != nil {
		fmt.Fprintln(os.Stderr, "torture:", err)
		os.Exit(1)
	}
}

func torture(c config) (report, error) {
	workers := make([]*worker, c.workers)
	for i := range workers {
		w, err := newWorker(c, i)
		if err != nil {
			return report{}, err
		}
		workers[i] = w
	}
	var kept *keeper
	if c.keep > 0 {
		k, err := newKeeper(c)
		if err != nil {
			return report{}, err
		}
		kept = k
	}
	begin := time.Now()
	failed := make(chan struct{})
	var once sync.Once
	var wg sync.WaitGroup
	go soil(c.dirty)
	work := func(w *worker, loop func(time.Time, <-chan struct{}) error) {
		if w.err = loop(begin.Add(c.run), failed); w.err != nil {
			once.Do(func() { close(failed) })
		}
	}
	for _, w := range workers {
		wg.Go(func() { work(w, w.loop) })
	}
	if kept != nil {
		wg.Go(func() { work(kept.worker, kept.loop) })
	}
	wg.Wait()
	var sum report
	var errs []error
	if kept != nil {
		workers = append(workers, kept.worker)
		sum.Kept, sum.KeptBegan = kept.checked, kept.began
		var err error
		if sum.KeptEnded, err = kept.addresses(); err != nil {
			errs = append(errs, err)
		}
	}
	for i, w := range workers {
		sum.Reads += w.did.Reads
		sum.Writes += w.did.Writes
		sum.Discards += w.did.Discards
		sum.Zeroes += w.did.Zeroes
		sum.Flushes += w.did.Flushes
		sum.Bytes += w.did.Bytes
		sum.LongestMs = max(sum.LongestMs, w.did.LongestMs)
		if i == 0 {
			sum.PausesMs = w.did.PausesMs
		}
		if w.err != nil {
			errs = append(errs, fmt.Errorf("worker %d: %w", i, w.err))
		}
	}
	sum.Seconds = time.Since(begin).Seconds()
	return sum, errors.Join(errs...)
}
