package main

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"sync/atomic"
	"time"

	"scoria/vhost/client/load"
)

// An ideal server is what the machine itself allows: a thread on the server's CPU
// that takes requests from a ring and spins for as long as each of Scoria's takes
// at full rate. It makes no system call, waits for nothing and shares nothing.
// Driven as Scoria is, at the same rate from the same CPU, it has the latencies
// that timer ticks, other processes, kernel threads and the hypervisor cause; no
// server can have better ones in these minutes.
const idealName = "ideal"

// idealDepth is the depth of the tail rows.
const idealDepth = 32

// idealRing is one producer's and one consumer's; each counter is written by one
// of them and has its cache line to itself.
type idealRing struct {
	_     [64]byte
	added atomic.Uint64
	_     [56]byte
	done  atomic.Uint64
	_     [56]byte
	stop  atomic.Bool
}

// measureIdeal puts rate operations per second on an ideal server that needs
// service for each, for as long as another measurement.
func (b *bench) measureIdeal(ctx context.Context, rate float64, service time.Duration) (res sample, err error) {
	ring := &idealRing{}
	var served error
	epoch := time.Now()
	ready, ended := make(chan error), make(chan struct{})
	go func() {
		defer close(ended)
		runtime.LockOSThread() // never unlocked: the thread is pinned and ends here
		err := load.PinThread(b.cfg.serverCPU)
		ready <- err
		if err != nil {
			return
		}
		first, from := myThread()
		ring.serve(epoch, service)
		last, to := myThread()
		served = errors.Join(from, to)
		res.waited = last.waited - first.waited
		res.length = time.Since(epoch)
	}()
	if err := <-ready; err != nil {
		return res, fmt.Errorf("pin to CPU %d: %w", b.cfg.serverCPU, err)
	}
	driven := make(chan error)
	go func() {
		runtime.LockOSThread()
		err := load.PinThread(b.cfg.clientCPU)
		if err == nil {
			ring.drive(ctx, epoch, rate, b.tailTime(), &res)
		}
		driven <- err
	}()
	err = <-driven
	ring.stop.Store(true)
	<-ended
	if err != nil {
		return res, fmt.Errorf("pin to CPU %d: %w", b.cfg.clientCPU, err)
	}
	if served != nil {
		return res, served
	}
	return res, ctx.Err()
}

// serve ends one request after the other.
func (r *idealRing) serve(epoch time.Time, service time.Duration) {
	for done := uint64(0); !r.stop.Load(); {
		if r.added.Load() == done {
			continue
		}
		for until := time.Since(epoch) + service; time.Since(epoch) < until; {
		}
		done++
		r.done.Store(done)
	}
}

// drive adds requests when they are due, as an open-loop load does, and counts
// their latencies from then on.
func (r *idealRing) drive(ctx context.Context, epoch time.Time, rate float64, length time.Duration, res *sample) {
	var start [idealDepth]int64
	interval := 1e9 / rate
	warm := int64(time.Since(epoch)) + int64(length/10)
	end := warm + int64(length)
	due := float64(time.Since(epoch))
	added, seen := uint64(0), uint64(0)
	for ctx.Err() == nil {
		done := r.done.Load()
		now := int64(time.Since(epoch))
		for ; seen < done; seen++ {
			if now >= warm {
				res.Latency.Record(uint64(now - start[seen%idealDepth]))
			}
		}
		if now >= end {
			break
		}
		for added-seen < idealDepth && due <= float64(now) {
			start[added%idealDepth] = int64(due)
			due += interval
			added++
		}
		r.added.Store(added)
	}
	res.Ops = res.Latency.Count()
	finish(res, epoch.Add(time.Duration(warm)), 4096)
}
