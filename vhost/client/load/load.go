// Package load puts load on a vhost-user-blk server through a client.Client and
// measures what comes back. `scoria bench` and `make bench` are made of it.
//
// Each queue has a worker: one goroutine locked to one OS thread, which may be
// pinned to a CPU. A worker keeps Spec.Depth requests in flight (closed loop),
// or starts them at a fixed rate whether or not earlier ones have ended (open
// loop, Spec.Rate); then latency counts from the moment at which a request was
// due. The loop allocates nothing and takes the time once per batch of
// completions.
//
// The arena of the client is filled once with random bytes; each write takes a
// block from its first half, each read fills one of the second half. A write
// also stamps its block's first 8 bytes with a counter, so that no two are alike.
package load

import (
	"context"
	"errors"
	"fmt"
	"math"
	"sync"
	"time"

	"scoria/vhost/client"
)

// Spec describes a load.
type Spec struct {
	ReadPercent int  `json:"read_percent"` // 0: writes only, 100: reads only
	Random      bool `json:"random"`       // else each worker goes sequentially through its part of the region
	FlushEach   bool `json:"flush_each"`   // each write is followed by a flush; the two are one operation
	BlockBytes  int  `json:"block_bytes"`  // a multiple of 512; default 4096
	Depth       int  `json:"depth"`        // requests in flight per queue; default 1
	Queues      int  `json:"queues"`       // how many of the client's queues are used; default all

	RegionOffset uint64 `json:"region_offset"` // bytes
	RegionBytes  uint64 `json:"region_bytes"`  // default: to the end of the device

	Duration time.Duration `json:"duration_ns"` // of the measurement
	Warmup   time.Duration `json:"warmup_ns"`   // before it
	MaxOps   uint64        `json:"max_ops"`     // ends the measurement earlier, per queue; 0: no limit
	Rate     float64       `json:"rate"`        // operations per second, all queues together; 0: as many as possible

	Poll bool   `json:"poll"` // spin for completions instead of sleeping
	CPUs []int  `json:"cpus"` // worker i is pinned to CPUs[i % len]; none: not pinned
	Seed uint64 `json:"seed"`

	// Background: the workers run when nothing else wants their CPU (SCHED_IDLE),
	// so that another load measured there does not wait for this client.
	Background bool `json:"background"`

	// ServerPID, if set, is the process whose CPU time and memory are measured.
	ServerPID int `json:"-"`
}

// Result is what Run measured.
type Result struct {
	Ops     uint64        `json:"ops"`
	Bytes   uint64        `json:"bytes"`
	AllOps  uint64        `json:"all_ops"` // those before and after the measurement included
	Elapsed time.Duration `json:"elapsed_ns"`
	IOPS    float64       `json:"iops"`
	MBps    float64       `json:"mb_per_s"` // 10^6 bytes

	P50  time.Duration `json:"p50_ns"`
	P99  time.Duration `json:"p99_ns"`
	P999 time.Duration `json:"p999_ns"`
	Mean time.Duration `json:"mean_ns"`
	Max  time.Duration `json:"max_ns"`

	Kicks uint64 `json:"kicks"` // the server wanted to be woken
	Waits uint64 `json:"waits"` // the client slept

	ServerCPU        time.Duration `json:"server_cpu_ns"`
	ServerCPUPerMOps float64       `json:"server_cpu_s_per_million"`
	ServerRSS        int64         `json:"server_rss_bytes"`
	ServerAnon       int64         `json:"server_anon_bytes"`

	Latency Histogram `json:"-"`
}

// ErrSpec refuses a Spec; the message names the field.
var ErrSpec = errors.New("bad load")

// ErrIO: a request failed.
var ErrIO = errors.New("request failed")

// complete fills in defaults and checks s against c.
func (s *Spec) complete(c *client.Client) error {
	if s.BlockBytes == 0 {
		s.BlockBytes = 4096
	}
	if s.Depth == 0 {
		s.Depth = 1
	}
	if s.Queues == 0 {
		s.Queues = c.Queues()
	}
	if s.RegionBytes == 0 && s.RegionOffset < c.Size() {
		s.RegionBytes = c.Size() - s.RegionOffset
	}
	half := len(c.Arena()) / 2 / max(s.Queues, 1)
	bs := uint64(s.BlockBytes)
	switch {
	case s.ReadPercent < 0 || s.ReadPercent > 100:
		return fmt.Errorf("%w: read percent %d: must be from 0 to 100", ErrSpec, s.ReadPercent)
	case s.BlockBytes < 0 || s.BlockBytes%512 != 0 || s.BlockBytes > half:
		return fmt.Errorf("%w: block of %d bytes: must be a multiple of 512 and at most %d, half the client's memory", ErrSpec, s.BlockBytes, half)
	case s.Queues < 0 || s.Queues > c.Queues():
		return fmt.Errorf("%w: %d queues: the client has %d", ErrSpec, s.Queues, c.Queues())
	case s.Depth < 0 || s.Depth > c.Queue(0).Depth():
		return fmt.Errorf("%w: depth %d: the queues take at most %d", ErrSpec, s.Depth, c.Queue(0).Depth())
	case s.RegionOffset%512 != 0 || s.RegionOffset > c.Size() || s.RegionBytes > c.Size()-s.RegionOffset:
		return fmt.Errorf("%w: region of %d bytes at %d: the device has %d", ErrSpec, s.RegionBytes, s.RegionOffset, c.Size())
	case s.RegionBytes/bs < uint64(s.Queues):
		return fmt.Errorf("%w: region of %d bytes: too small for blocks of %d", ErrSpec, s.RegionBytes, s.BlockBytes)
	case s.Duration <= 0:
		return fmt.Errorf("%w: duration %v: must be positive", ErrSpec, s.Duration)
	case s.Rate < 0 || math.IsNaN(s.Rate):
		return fmt.Errorf("%w: rate %v: must not be negative", ErrSpec, s.Rate)
	}
	return nil
}

// Fill writes the region once, sequentially, so that reads find data.
func Fill(ctx context.Context, c *client.Client, offset, bytes uint64) error {
	const block = 64 << 10
	spec := Spec{
		BlockBytes: block, Depth: min(8, c.Queue(0).Depth()), Queues: 1, RegionOffset: offset, RegionBytes: bytes,
		Duration: time.Hour, MaxOps: (bytes + block - 1) / block,
	}
	_, err := Run(ctx, c, spec)
	return err
}

// Run puts the load of spec on c and measures it. The client's queues and arena
// must not be in use. It ends early, with ctx's error, when ctx is done.
func Run(ctx context.Context, c *client.Client, spec Spec) (Result, error) {
	if err := spec.complete(c); err != nil {
		return Result{}, err
	}
	r := &run{
		client: c, spec: spec, epoch: time.Now(),
		ready: make(chan struct{}, spec.Queues), open: make(chan struct{}), done: make(chan struct{}),
	}
	r.left.Store(int32(spec.Queues))
	stop := context.AfterFunc(ctx, r.cancel)
	defer stop()
	// A server that answers no more must not hold sleeping workers for ever.
	patience := time.AfterFunc(spec.Warmup+spec.Duration+drainTimeout, r.cancel)
	defer patience.Stop()
	workers := make([]*worker, spec.Queues)
	var wg sync.WaitGroup
	for i := range workers {
		workers[i] = newWorker(r, i)
		wg.Go(workers[i].run)
	}
	var before, after Usage
	err := r.watch(&before, &after)
	wg.Wait()
	if err == nil {
		err = context.Cause(ctx)
	}
	for _, w := range workers {
		if w.err != nil {
			err = w.err
		}
	}
	if err != nil {
		return Result{}, err
	}
	return r.result(workers, before, after), nil
}

// cancel ends the measurement from any goroutine.
func (r *run) cancel() {
	r.canceled.Store(true)
	for i := range r.spec.Queues {
		r.client.Queue(i).Wake()
	}
}

// watch marks the begin and the end of the measurement and reads the server's
// usage at both.
func (r *run) watch(before, after *Usage) (err error) {
	for range r.spec.Queues {
		<-r.ready
	}
	r.begin.Store(r.now() + int64(r.spec.Warmup))
	close(r.open)
	if r.spec.ServerPID == 0 {
		return nil
	}
	time.Sleep(r.spec.Warmup)
	if *before, err = ReadUsage(r.spec.ServerPID); err != nil {
		r.canceled.Store(true)
		return err
	}
	select {
	case <-time.After(r.spec.Duration):
	case <-r.done:
	}
	*after, err = ReadUsage(r.spec.ServerPID)
	return err
}

func (r *run) result(workers []*worker, before, after Usage) Result {
	var res Result
	var elapsed int64
	for _, w := range workers {
		res.Ops += w.hist.Count()
		res.AllOps += w.total
		res.Latency.Add(&w.hist)
		elapsed = max(elapsed, w.elapsed)
		kicks, waits := w.q.Counts()
		res.Kicks += kicks - w.kicks
		res.Waits += waits - w.waits
	}
	h := &res.Latency
	res.Bytes = res.Ops * uint64(r.spec.BlockBytes)
	res.Elapsed = time.Duration(elapsed)
	res.P50, res.P99, res.P999 = h.Quantile(0.5), h.Quantile(0.99), h.Quantile(0.999)
	res.Mean, res.Max = h.Mean(), h.Max()
	if s := res.Elapsed.Seconds(); s > 0 {
		res.IOPS = float64(res.Ops) / s
		res.MBps = float64(res.Bytes) / s / 1e6
	}
	if r.spec.ServerPID != 0 {
		res.ServerCPU = after.CPU - before.CPU
		res.ServerRSS, res.ServerAnon = after.RSS, after.Anon
		if res.Ops > 0 {
			res.ServerCPUPerMOps = res.ServerCPU.Seconds() / float64(res.Ops) * 1e6
		}
	}
	return res
}
