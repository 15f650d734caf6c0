package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"scoria/driver/control"
	"scoria/vhost/client/load"
)

// The row of the scrubber: what it costs to give the space of overwritten data
// back. A volume that is written over from end to end needs none of its work, as
// every SCO dies whole; one that is written over at random has the same part of
// each SCO live, and what lives has to move. Both at the same rate, which leaves
// the disk room.
const (
	rowScrub = "scrub"

	scrubFull   = 80        // percent of the volume that is in use
	scrubRate   = 50_000    // writes of 4 KiB per second
	scrubBuffer = 256 << 20 // the write buffer: small against the volume
	scrubPasses = 3         // of as many random writes at full speed as there are clusters
	scrubStep   = 250 * time.Millisecond
	scrubLimit  = 1.3 // space against live data, besides the write buffer (README)
)

// usePoint is the state of the daemon's counters at one moment.
type usePoint struct {
	at       time.Time
	cpu      time.Duration
	disk     uint64 // bytes that it wrote to disks
	writes   uint64 // of the guest
	bytes    uint64 // of the guest
	uploaded uint64
	scrubbed uint64
}

// scrubUse is what a stretch of steady overwriting took.
type scrubUse struct {
	rate   float64 // writes per second
	cpu    float64 // µs of the daemon's CPU time per write
	disk   float64 // bytes written to the disk per byte of the guest
	store  float64 // bytes put into the store, the same
	moved  float64 // bytes that the scrubber moved, the same
	wait   waits
	onDisk float64 // the most space on the disk against live data, write buffer taken off
	stored float64 // the same in the store
}

// waits is how long the guest's writes took, in µs.
type waits struct{ p50, p99, p999, most float64 }

func waitsOf(r *load.Result) waits {
	us := func(d time.Duration) float64 { return float64(d) / 1e3 }
	return waits{us(r.P50), us(r.P99), us(r.P999), us(r.Max)}
}

// between is what happened from a to z.
func between(a, z usePoint) (u scrubUse) {
	writes, bytes := float64(z.writes-a.writes), float64(z.bytes-a.bytes)
	if writes == 0 || !z.at.After(a.at) {
		return u
	}
	u.rate = writes / z.at.Sub(a.at).Seconds()
	u.cpu = float64((z.cpu - a.cpu).Microseconds()) / writes
	u.disk = float64(z.disk-a.disk) / bytes
	u.store = float64(z.uploaded-a.uploaded) / bytes
	u.moved = float64(z.scrubbed-a.scrubbed) / bytes
	return u
}

// space notes how much is used at one moment.
func (u *scrubUse) space(onDisk, stored, live uint64) {
	part := func(used uint64) float64 { return float64(used-min(used, scrubBuffer)) / float64(max(live, 1)) }
	u.onDisk = max(u.onDisk, part(onDisk))
	u.stored = max(u.stored, part(stored))
}

// measureScrub overwrites a volume sequentially and then at random.
func (b *bench) measureScrub(ctx context.Context) error {
	// The daemon sleeps when it has nothing to do: else all of its CPU time is polling.
	d, err := b.newScoriad(rowScrub, 0, scrubBuffer)
	if err != nil {
		return err
	}
	defer os.RemoveAll(d.data)
	s, err := d.startVolume(ctx, uint64(b.cfg.scrubVolume), b.cfg.serverCPU)
	if err != nil {
		return err
	}
	defer s.close()
	if err := s.warm(ctx); err != nil {
		return err
	}
	api := control.NewClient(d.control())
	defer api.Close()
	o := overwriter{b: b, api: api, server: s, data: d.data, region: uint64(b.cfg.scrubVolume) / 100 * scrubFull &^ (1<<20 - 1)}
	b.say("scrubber: filling %d MiB, %d %% of the volume", o.region>>20, scrubFull)
	if err := load.Fill(ctx, s.client, 0, o.region); err != nil {
		return fmt.Errorf("fill: %w", err)
	}
	without, err := o.overwrite(ctx, false)
	if err != nil {
		return fmt.Errorf("sequential overwrite: %w", err)
	}
	// Up to the steady state, and some time in it.
	b.say("scrubber: random overwrite, as fast as it goes")
	full, err := load.Run(ctx, s.client, load.Spec{
		Random: true, Depth: 32, RegionBytes: o.region, MaxOps: scrubPasses * o.region / scoriaCluster, Duration: time.Hour, Seed: 99,
		CPUs: []int{b.cfg.clientCPU},
	})
	if err != nil {
		return fmt.Errorf("random overwrite: %w", err)
	}
	burst := scrubUse{rate: full.IOPS, wait: waitsOf(&full)}
	if _, err := o.point(ctx, &burst); err != nil {
		return err
	}
	with, err := o.overwrite(ctx, true)
	if err != nil {
		return fmt.Errorf("random overwrite: %w", err)
	}
	for _, f := range scrubFigures(with, without, burst) {
		b.figure(rowScrub, f.Title, f.Value, f.Unit, f.Limit)
	}
	return nil
}

// scrubFigures are the lines of the report; burst is after writing at full speed.
func scrubFigures(with, without, burst scrubUse) []figure {
	return []figure{
		{Title: fmt.Sprintf("random 4 KiB overwrite at %d %% full: writes/s (asked for: %d)", scrubFull, scrubRate), Value: with.rate, Unit: "/s"},
		{Title: "bytes written to the disk per byte of the guest", Value: with.disk, Unit: "×"},
		{Title: "bytes put into the store per byte of the guest", Value: with.store, Unit: "×"},
		{Title: "bytes that the scrubber moved per byte of the guest", Value: with.moved, Unit: "×"},
		{Title: "CPU of the daemon per write", Value: with.cpu, Unit: "µs"},
		{Title: "p50 of the writes", Value: with.wait.p50, Unit: "µs"},
		{Title: "p99", Value: with.wait.p99, Unit: "µs"},
		{Title: "p99.9", Value: with.wait.p999, Unit: "µs"},
		{Title: "the longest", Value: with.wait.most, Unit: "µs"},
		{Title: "most space on the disk against live data, write buffer taken off", Value: with.onDisk, Unit: "×", Limit: scrubLimit},
		{Title: "the same in the store", Value: with.stored, Unit: "×", Limit: scrubLimit},
		{Title: fmt.Sprintf("overwriting all of it %d times at random as fast as it goes, depth 32: writes/s", scrubPasses), Value: burst.rate, Unit: "/s"},
		{Title: "p50 of these writes", Value: burst.wait.p50, Unit: "µs"},
		{Title: "p99 of these", Value: burst.wait.p99, Unit: "µs"},
		{Title: "p99.9 of these", Value: burst.wait.p999, Unit: "µs"},
		{Title: "the longest of these", Value: burst.wait.most, Unit: "µs"},
		{Title: "on the disk right after them", Value: burst.onDisk, Unit: "×", Limit: scrubLimit},
		{Title: "sequential overwrite, nothing to move: bytes written to the disk per byte", Value: without.disk, Unit: "×"},
		{Title: "the same: bytes that the scrubber moved per byte", Value: without.moved, Unit: "×"},
		{Title: "the same: CPU of the daemon per write", Value: without.cpu, Unit: "µs"},
		{Title: "the same: p99 of the writes", Value: without.wait.p99, Unit: "µs"},
	}
}

// overwriter writes over a filled region at a steady rate.
type overwriter struct {
	b      *bench
	api    *control.Client
	server *server
	data   string // the daemon's data directory
	region uint64
}

// overwrite is one stretch.
func (o *overwriter) overwrite(ctx context.Context, random bool) (u scrubUse, err error) {
	length, lead := o.b.cfg.scrub, o.b.cfg.scrub/2
	o.b.say("scrubber: overwrite at %d/s, random %s, %v", scrubRate, yesNo(random), length)
	type outcome struct {
		res load.Result
		err error
	}
	ended := make(chan outcome, 1)
	loaded, stop := context.WithCancel(ctx)
	defer stop()
	go func() {
		// It sleeps in between: the samples are taken on its CPU.
		res, err := load.Run(loaded, o.server.client, load.Spec{
			Random: random, Depth: 32, Rate: scrubRate, RegionBytes: o.region, Seed: 7, CPUs: []int{o.b.cfg.clientCPU},
			Warmup: lead, Duration: length + scrubStep,
		})
		ended <- outcome{res, err}
	}()
	u, err = o.watch(ctx, lead, length)
	if err != nil {
		stop()
	}
	end := <-ended
	if err == nil {
		err = end.err
	}
	u.wait = waitsOf(&end.res)
	return u, err
}

// watch samples the daemon while the load runs, for length after lead.
func (o *overwriter) watch(ctx context.Context, lead, length time.Duration) (u scrubUse, err error) {
	pause := func(d time.Duration) error {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(d):
			return nil
		}
	}
	if err := pause(lead); err != nil {
		return u, err
	}
	var most scrubUse
	first, err := o.point(ctx, &most)
	if err != nil {
		return u, err
	}
	last := first
	for last.at.Sub(first.at) < length {
		if err := pause(scrubStep); err != nil {
			return u, err
		}
		if last, err = o.point(ctx, &most); err != nil {
			return u, err
		}
	}
	u = between(first, last)
	u.onDisk, u.stored = most.onDisk, most.stored
	return u, nil
}

// point reads the counters and notes the space in most.
func (o *overwriter) point(ctx context.Context, most *scrubUse) (p usePoint, err error) {
	st, err := o.api.Stats(ctx, firstVolume)
	if err != nil {
		return p, err
	}
	a, err := o.server.proc.activity()
	if err != nil {
		return p, err
	}
	w := st.Ops["write"]
	p = usePoint{
		at: time.Now(), cpu: a.cpu, disk: a.written, writes: w.Count, bytes: w.Bytes,
		uploaded: st.Counters["uploaded_bytes"], scrubbed: st.Counters["scrubbed_bytes"],
	}
	onDisk, err := diskUse(o.data)
	most.space(onDisk, st.Space.Store, st.Space.Live)
	return p, err
}

// diskUse is what the files below dir occupy; one with several names counts once.
func diskUse(dir string) (bytes uint64, err error) {
	type file struct{ dev, inode uint64 }
	seen := map[file]bool{}
	err = filepath.WalkDir(dir, func(_ string, e fs.DirEntry, err error) error {
		var info fs.FileInfo
		if err == nil {
			info, err = e.Info()
		}
		if errors.Is(err, fs.ErrNotExist) {
			return nil // files come and go meanwhile
		}
		if err != nil {
			return err
		}
		st, ok := info.Sys().(*syscall.Stat_t)
		if !ok || seen[file{st.Dev, st.Ino}] {
			return nil
		}
		seen[file{st.Dev, st.Ino}] = true
		bytes += uint64(st.Blocks) * 512
		return nil
	})
	return bytes, err
}
