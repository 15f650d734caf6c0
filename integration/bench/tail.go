package main

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"scoria/vhost/client/load"
)

// The tail rows measure p99.9 in an open loop at half of each server's own rate. A
// stall of a millisecond, whoever causes it, makes a thousand requests late, so what
// the machine does decides the figure unless it is told apart:
//
//   - Beside Scoria stands an ideal server (ideal.go) in the same seconds.
//   - How long the thread that serves waited for its CPU, how much CPU time the
//     server's other threads used meanwhile, and what its garbage collector did, are
//     read from the kernel and from the daemon, before and after.
//   - A measurement during which the hypervisor took a CPU away is repeated. Both
//     CPUs spin for all of it, and a virtual machine may be allowed less than that in
//     the long run; so it is short, and there is a rest before each.
const (
	tailTime    = 400 * time.Millisecond // at most
	tailRest    = time.Second
	tailRepeats = 3
)

// tails measures each server at half the rate that it has shown in this round, and
// an ideal server at Scoria's.
func (b *bench) tails(ctx context.Context, round int, servers []*server) error {
	for _, t := range []struct {
		row, of string
		percent int
	}{{rowTailWrite, "A-write-d32", 0}, {rowTailRead, "A-read-d32", 100}} {
		if !b.wants(t.row) {
			continue
		}
		for _, s := range servers {
			full := b.results[t.of][s.name]
			if len(full) <= round || full[round] == nil {
				continue
			}
			rate := full[round].IOPS / 2
			if err := b.undisturbed(ctx, t.row, s.name, round, func() (sample, error) { return b.tailOnce(ctx, s, t.percent, rate, round) }); err != nil {
				return fmt.Errorf("%s on %s: %w", t.row, s.name, err)
			}
			if s.name != scoriaName {
				continue
			}
			service := time.Duration(1e9 / full[round].IOPS)
			if err := b.undisturbed(ctx, t.row, idealName, round, func() (sample, error) { return b.measureIdeal(ctx, rate, service) }); err != nil {
				return fmt.Errorf("%s on an ideal server: %w", t.row, err)
			}
		}
	}
	return nil
}

// undisturbed measures until the hypervisor leaves both CPUs alone for as long as
// that takes, and keeps the last result.
func (b *bench) undisturbed(ctx context.Context, row, server string, round int, measure func() (sample, error)) error {
	for left := tailRepeats; ; left-- {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(tailRest):
		}
		before, err := stolen(b.cfg.clientCPU, b.cfg.serverCPU)
		if err != nil {
			return err
		}
		res, err := measure()
		if err != nil {
			return err
		}
		after, err := stolen(b.cfg.clientCPU, b.cfg.serverCPU)
		if err != nil {
			return err
		}
		if res.stolen = after - before; res.stolen > 0 && left > 0 {
			b.say("%s on %s: the hypervisor took %v of CPU time; once more", row, server, res.stolen)
			continue
		}
		b.results.put(row, server, round, res)
		return nil
	}
}

// tailOnce drives a server at a rate and says who had its CPU meanwhile.
func (b *bench) tailOnce(ctx context.Context, s *server, percent int, rate float64, round int) (res sample, err error) {
	if err := s.proc.settle(ctx, settleLimit); err != nil {
		return res, err
	}
	before, err := s.look()
	if err != nil {
		return res, err
	}
	length := b.tailTime()
	res.Result, err = load.Run(ctx, s.client, load.Spec{
		Random: true, Depth: idealDepth, ReadPercent: percent, Rate: rate, RegionBytes: uint64(b.cfg.region),
		Duration: length, Warmup: length / 10, Seed: uint64(round) + 1, CPUs: []int{b.cfg.clientCPU}, Poll: true,
		ServerPID: s.proc.pid(),
	})
	if err != nil {
		return res, err
	}
	after, err := s.look()
	if err != nil {
		return res, err
	}
	res.shares = after.since(before)
	return res, s.proc.settle(ctx, settleLimit)
}

func (b *bench) tailTime() time.Duration { return min(b.cfg.seconds, tailTime) }

// shares is who had the server's CPU during a measurement.
type shares struct {
	length time.Duration // between the two looks
	waited time.Duration // the serving thread was ready and did not run
	others time.Duration // CPU time of the process's other threads
	cycles int           // of the garbage collector
	paused time.Duration // the world was stopped for it
	gcCPU  time.Duration // it used, in cycles that ended
	stolen time.Duration // by the hypervisor, of both CPUs
}

// A look is what a server's threads have used so far.
type look struct {
	at      time.Time
	threads map[string]threadTime
	gc      gcTime
}

type threadTime struct{ ran, waited time.Duration }

type gcTime struct {
	cycles      int
	paused, cpu time.Duration
}

func (s *server) look() (l look, err error) {
	if s.metrics != "" {
		if l.gc, err = readGC(s.metrics); err != nil {
			return l, err
		}
	}
	l.at = time.Now()
	l.threads, err = threadTimes(s.proc.pid())
	return l, err
}

// since attributes what went on between two looks. The serving thread is the one
// that ran longest: it polls.
func (l look) since(o look) shares {
	sh := shares{
		length: l.at.Sub(o.at), cycles: l.gc.cycles - o.gc.cycles,
		paused: l.gc.paused - o.gc.paused, gcCPU: l.gc.cpu - o.gc.cpu,
	}
	var serving threadTime
	for tid, t := range l.threads {
		t.ran, t.waited = t.ran-o.threads[tid].ran, t.waited-o.threads[tid].waited
		sh.others += t.ran
		if t.ran > serving.ran {
			serving = t
		}
	}
	sh.others -= serving.ran
	sh.waited = serving.waited
	return sh
}

// threadTimes reads what each thread of a process has run and has waited for a
// CPU. Threads that have ended are missing.
func threadTimes(pid int) (map[string]threadTime, error) {
	dir := fmt.Sprintf("/proc/%d/task", pid)
	tasks, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	times := map[string]threadTime{}
	for _, task := range tasks {
		if t, err := readThread(filepath.Join(dir, task.Name())); err == nil { // else it has just ended
			times[task.Name()] = t
		}
	}
	return times, nil
}

// readThread reads the schedstat file of a thread's directory in /proc.
func readThread(dir string) (t threadTime, err error) {
	text, err := os.ReadFile(filepath.Join(dir, "schedstat"))
	if err != nil {
		return t, err
	}
	_, err = fmt.Sscan(string(text), (*int64)(&t.ran), (*int64)(&t.waited))
	return t, err
}

// stolen is how long the hypervisor has kept the CPUs from running so far.
func stolen(cpus ...int) (total time.Duration, err error) {
	text, err := os.ReadFile("/proc/stat")
	if err != nil {
		return 0, err
	}
	for line := range bytes.Lines(text) {
		f := strings.Fields(string(line))
		for _, cpu := range cpus {
			const steal = 8 // field of a CPU's line
			if len(f) <= steal || f[0] != "cpu"+strconv.Itoa(cpu) {
				continue
			}
			ticks, err := strconv.ParseInt(f[steal], 10, 64)
			if err != nil {
				return 0, fmt.Errorf("/proc/stat: %w", err)
			}
			total += time.Duration(ticks) * 10 * time.Millisecond // USER_HZ is 100
		}
	}
	return total, nil
}

// readGC asks the daemon behind a control socket what its garbage collector has
// done.
func readGC(socket string) (t gcTime, err error) {
	c := http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", socket)
		},
	}}
	res, err := c.Get("http://scoriad/metrics")
	if err != nil {
		return t, err
	}
	defer res.Body.Close()
	if res.StatusCode != http.StatusOK {
		return t, fmt.Errorf("metrics of %s: %s", socket, res.Status)
	}
	found := 0
	in := bufio.NewScanner(res.Body)
	for in.Scan() {
		name, text, _ := strings.Cut(in.Text(), " ")
		seconds := func(d *time.Duration) {
			v, parseErr := strconv.ParseFloat(text, 64)
			if parseErr != nil {
				err = fmt.Errorf("metric %s: %w", name, parseErr)
			}
			*d = time.Duration(v * 1e9)
			found++
		}
		switch name {
		case "go_gc_duration_seconds_count":
			var v time.Duration
			seconds(&v)
			t.cycles = int(v.Seconds())
		case "go_gc_duration_seconds_sum":
			seconds(&t.paused)
		case "go_cpu_classes_gc_total_cpu_seconds_total":
			seconds(&t.cpu)
		}
	}
	if err == nil {
		err = in.Err()
	}
	if err == nil && found != 3 {
		err = fmt.Errorf("metrics of %s: %d of 3 about the garbage collector", socket, found)
	}
	return t, err
}

// tailFigures are the lines that say whose the tail is.
func (b *bench) tailFigures() {
	for _, t := range [][2]string{{rowTailWrite, "write"}, {rowTailRead, "read"}} {
		row, what := t[0], t[1]
		if len(b.results[row][scoriaName]) == 0 {
			continue
		}
		line := func(title, server, unit string, of func(*sample) float64) {
			var v []float64
			for _, r := range b.results[row][server] {
				if r != nil {
					v = append(v, of(r))
				}
			}
			b.figure(row, what+", half load: "+title, spreadOf(v).Median, unit, 0)
		}
		share := func(of func(*sample) time.Duration) func(*sample) float64 {
			return func(r *sample) float64 { return 100 * of(r).Seconds() / max(r.length.Seconds(), 1e-9) }
		}
		line("the worker was ready and did not have its CPU", scoriaName, "% of the time", share(func(r *sample) time.Duration { return r.waited }))
		line("the same of an ideal server", idealName, "% of the time", share(func(r *sample) time.Duration { return r.waited }))
		line("Scoria's other threads used the CPU", scoriaName, "% of the time", share(func(r *sample) time.Duration { return r.others }))
		line("garbage collections meanwhile", scoriaName, "", func(r *sample) float64 { return float64(r.cycles) })
		line("garbage collector's CPU time", scoriaName, "% of the time", share(func(r *sample) time.Duration { return r.gcCPU }))
		line("the world was stopped for it", scoriaName, "% of the time", share(func(r *sample) time.Duration { return r.paused }))
		line("CPU time that the hypervisor took", scoriaName, "ms", func(r *sample) float64 { return r.stolen.Seconds() * 1e3 })
	}
}

// myThread is the calling thread's times.
func myThread() (threadTime, error) {
	return readThread(fmt.Sprintf("/proc/self/task/%d", unix.Gettid()))
}
