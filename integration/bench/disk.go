package main

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"scoria/vhost/client"
	"scoria/vhost/client/load"
)

// measureDiskSync writes 4 KiB and calls fdatasync, again and again, as a log
// that does nothing else: once appending to a file, which is the reference, and
// once into space that is allocated and written already, which is the best that a
// disk can do.
func (b *bench) measureDiskSync(ctx context.Context, round int) error {
	appended, err := os.Create(filepath.Join(b.dataDir, "append"))
	if err != nil {
		return err
	}
	defer removeFile(appended)
	if err := b.measureSyncLoop(ctx, appended, 1<<40, round, diskName); err != nil {
		return err
	}
	written, err := preallocated(filepath.Join(b.dataDir, "sync"), 64<<20)
	if err != nil {
		return err
	}
	defer removeFile(written)
	return b.measureSyncLoop(ctx, written, 64<<20, round, inPlaceName)
}

func (b *bench) measureSyncLoop(ctx context.Context, f *os.File, size int64, round int, server string) error {
	const block = 4096
	data := make([]byte, block)
	fill(data)
	var res sample
	begin := time.Now()
	for off := int64(0); time.Since(begin) < b.cfg.seconds && ctx.Err() == nil; off = (off + block) % size {
		start := time.Now()
		if _, err := f.WriteAt(data, off); err != nil {
			return err
		}
		if err := unix.Fdatasync(int(f.Fd())); err != nil {
			return fmt.Errorf("fdatasync: %w", err)
		}
		res.Latency.Record(uint64(time.Since(start)))
		res.Ops++
	}
	finish(&res, begin, block)
	b.results.put(rowFlush1, server, round, res)
	b.results.put("A-flush-d8", server, round, res)
	return ctx.Err()
}

// preallocated makes a file whose blocks have all been written once.
func preallocated(name string, size int64) (*os.File, error) {
	f, err := os.Create(name)
	if err != nil {
		return nil, err
	}
	chunk := make([]byte, 1<<20)
	fill(chunk)
	for off := int64(0); off < size; off += int64(len(chunk)) {
		if _, err := f.WriteAt(chunk, off); err != nil {
			removeFile(f)
			return nil, err
		}
	}
	if err := f.Sync(); err != nil {
		removeFile(f)
		return nil, err
	}
	return f, nil
}

func removeFile(f *os.File) {
	f.Close()
	os.Remove(f.Name())
}

// fill makes data that no disk compresses.
func fill(p []byte) { rand.NewChaCha8([32]byte{1}).Read(p) }

// finish completes a result of a bare loop.
func finish(res *sample, begin time.Time, block uint64) {
	res.Elapsed = time.Since(begin)
	res.Bytes = res.Ops * block
	res.IOPS = float64(res.Ops) / res.Elapsed.Seconds()
	res.MBps = float64(res.Bytes) / res.Elapsed.Seconds() / 1e6
	h := &res.Latency
	res.P50, res.P99, res.P999, res.Max, res.Mean = h.Quantile(0.5), h.Quantile(0.99), h.Quantile(0.999), h.Max(), h.Mean()
}

// measureDiskSequential writes large blocks directly to a new file for d.
func (b *bench) measureDiskSequential(ctx context.Context, d time.Duration) (sample, error) {
	const block = 2 << 20
	name := filepath.Join(b.dataDir, "sequential")
	flags := os.O_CREATE | os.O_RDWR | os.O_TRUNC
	f, err := os.OpenFile(name, flags|unix.O_DIRECT, 0o600)
	if err != nil {
		// tmpfs, for one, has no direct I/O.
		if f, err = os.OpenFile(name, flags, 0o600); err != nil {
			return sample{}, err
		}
	}
	defer removeFile(f)
	data, err := unix.Mmap(-1, 0, block, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANON)
	if err != nil {
		return sample{}, fmt.Errorf("mmap: %w", err)
	}
	defer unix.Munmap(data)
	fill(data)
	var res sample
	begin := time.Now()
	for off := int64(0); time.Since(begin) < d && ctx.Err() == nil; off += block {
		start := time.Now()
		if _, err := f.WriteAt(data, off); err != nil {
			return res, err
		}
		res.Latency.Record(uint64(time.Since(start)))
		res.Ops++
	}
	if err := f.Sync(); err != nil {
		return res, err
	}
	finish(&res, begin, block)
	return res, ctx.Err()
}

// measureSustained fills the write buffer with random writes and goes on; only
// the second half counts. The disk is measured before and after; the mean of the
// two is the denominator.
func (b *bench) measureSustained(ctx context.Context) error {
	d, err := b.newScoriad(rowSustained, b.cfg.poll, 1<<30)
	if err != nil {
		return err
	}
	defer os.RemoveAll(d.data)
	part := b.cfg.sustained / 4
	b.say("sustained random write: the disk, %v", part)
	before, err := b.measureDiskSequential(ctx, part)
	if err != nil {
		return err
	}
	// So large that little is written over: what the log costs is measured here, what
	// giving space back costs in the scrubber's row.
	const size = 64 << 30
	s, err := d.startVolume(ctx, size, b.cfg.serverCPU)
	if err != nil {
		return err
	}
	defer s.close()
	if err := s.connect(client.Options{MemoryBytes: 32 << 20}); err != nil {
		return err
	}
	if err := s.proc.settle(ctx, settleLimit); err != nil {
		return err
	}
	b.say("sustained random write: scoria, %v", b.cfg.sustained)
	res, err := s.measure(ctx, b.sustainedSpec(s.proc.pid()))
	if err != nil {
		return err
	}
	s.close()
	b.say("sustained random write: the disk again")
	after, err := b.measureDiskSequential(ctx, part)
	if err != nil {
		return err
	}
	b.results.put(rowSustained, scoriaName, 0, res)
	b.results.put(rowSustained, diskName, 0, both(before, after))
	return nil
}

// sustainedSpec is the load of that row, of which the first half is not measured.
func (b *bench) sustainedSpec(pid int) load.Spec {
	spec := load.Spec{
		Random: true, Depth: 32, Warmup: b.cfg.sustained / 2, Duration: b.cfg.sustained - b.cfg.sustained/2, ServerPID: pid,
	}
	b.place(&spec, placementA)
	return spec
}

// both is two measurements taken as one.
func both(a, c sample) sample {
	a.Latency.Add(&c.Latency)
	a.Ops += c.Ops
	a.Bytes += c.Bytes
	a.Elapsed += c.Elapsed
	a.IOPS = float64(a.Ops) / a.Elapsed.Seconds()
	a.MBps = float64(a.Bytes) / a.Elapsed.Seconds() / 1e6
	return a
}
