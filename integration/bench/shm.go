package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"scoria/integration/shmtools"
	"scoria/vhost/client"
	"scoria/vhost/client/load"
)

// The shared-memory rows. fio drives all sides: Scoria with its own engine, a raw
// file on tmpfs with io_uring in fio's own process, and nbdkit's file plugin on
// that file with fio's nbd engine. The client is on its CPU and the server on its
// own, as in placement A, or, in the rows with -D-, both on the server's, where
// nobody polls for long and CPU time is that of the work. CPU time is that of client
// and server together, with io_uring's kernel threads, less what a fio needs that
// does nothing.
const (
	shmName    = "shm"
	tmpfsName  = "tmpfs"
	nbdkitName = "nbdkit"

	shmTarget = 3 // × tmpfs, I/Os per CPU second at depth 32
)

// shmSide is one of those compared.
type shmSide struct {
	name    string
	args    []string
	server  *process // nil: none
	settle  bool
	startup time.Duration // CPU time of a fio that does next to nothing
}

// shmJob is a row of them.
type shmJob struct {
	rw          string
	depth, jobs int
	together    bool // placement D
}

func (j shmJob) name() string {
	placement := ""
	if j.together {
		placement = "D-"
	}
	return fmt.Sprintf("shm-%s%s-d%d-j%d", placement, strings.TrimPrefix(j.rw, "rand"), j.depth, j.jobs)
}

func shmJobs() (all []shmJob) {
	for _, rw := range []string{"randwrite", "randread"} {
		for _, depth := range []int{1, 32} {
			for _, jobs := range []int{1, 4} {
				all = append(all, shmJob{rw: rw, depth: depth, jobs: jobs})
			}
			all = append(all, shmJob{rw: rw, depth: depth, jobs: 1, together: true})
		}
	}
	return all
}

// shmSample is one measurement.
type shmSample struct{ iops, p50, p999, cpu float64 }

// shmLine is a row for one side over the rounds.
type shmLine struct {
	Row       string  `json:"row"`
	Server    string  `json:"server"`
	IOPS      spread  `json:"iops"`
	P50       spread  `json:"p50_us"`
	P999      spread  `json:"p999_us"`
	CPU       spread  `json:"cpu_us_per_io"` // of client and server
	PerCPU    spread  `json:"ios_per_cpu_second"`
	AgainstIt spread  `json:"ratio_to_tmpfs"` // of I/Os per CPU second, of one round each
	Target    float64 `json:"target,omitempty"`
}

func (b *bench) wantsShm() bool {
	for _, j := range shmJobs() {
		if b.wants(j.name()) {
			return true
		}
	}
	return false
}

// measureShm goes through the shared-memory rows.
func (b *bench) measureShm(ctx context.Context) error {
	b.say("shared memory: building the fio engine, starting %s, %s and %s", shmName, tmpfsName, nbdkitName)
	sides, stop, err := b.shmSides(ctx)
	defer stop()
	if err != nil {
		return err
	}
	for _, s := range sides {
		if _, err := b.fio(ctx, s, b.cfg.clientCPU, "--rw=write", "--bs=1M", "--iodepth=4", "--size="+strconv.FormatInt(b.cfg.region, 10)); err != nil {
			return err
		}
		idle, err := b.fio(ctx, s, b.cfg.clientCPU, "--rw=read", "--bs=4k", "--iodepth=1", "--size=4k")
		if err != nil {
			return err
		}
		s.startup = idle.cpu
	}
	samples := map[string]map[string][]shmSample{}
	for round := range b.cfg.rounds {
		b.say("shared memory: round %d of %d", round+1, b.cfg.rounds)
		for _, j := range shmJobs() {
			if !b.wants(j.name()) {
				continue
			}
			if samples[j.name()] == nil {
				samples[j.name()] = map[string][]shmSample{}
			}
			for i := range sides {
				s := sides[(i+round)%len(sides)]
				sample, err := b.shmOne(ctx, s, j)
				if err != nil {
					return fmt.Errorf("%s, %s: %w", j.name(), s.name, err)
				}
				samples[j.name()][s.name] = append(samples[j.name()][s.name], sample)
			}
		}
	}
	b.shmLines = shmLinesOf(samples)
	return nil
}

// shmSides starts what is compared. stop is never nil.
func (b *bench) shmSides(ctx context.Context) (sides []*shmSide, stop func(), err error) {
	var procs []*process
	stop = func() {
		for _, p := range procs {
			p.stop()
		}
	}
	built, err := shmtools.Build(ctx, filepath.Join(b.shmDir, "tools"))
	if err != nil {
		return nil, stop, err
	}
	d, err := b.newScoriad(shmName, b.cfg.poll, b.cfg.buffer)
	if err != nil {
		return nil, stop, err
	}
	if err := d.start(ctx, b.cfg.serverCPU); err != nil {
		return nil, stop, err
	}
	procs = append(procs, d.proc)
	if _, err := d.create(ctx, "bench", b.volumeBytes()); err != nil {
		return nil, stop, err
	}
	raw := filepath.Join(b.shmDir, "raw.img")
	if err := os.WriteFile(raw, nil, 0o600); err != nil {
		return nil, stop, err
	}
	if err := os.Truncate(raw, b.cfg.region); err != nil {
		return nil, stop, err
	}
	socket := filepath.Join(b.shmDir, "nbdkit.sock")
	kit, err := startPinned(b.cfg.serverCPU, "nbdkit", "-f", "-U", socket, "file", raw)
	if err != nil {
		return nil, stop, err
	}
	procs = append(procs, kit)
	if err := kit.waitFor(ctx, "socket", func() bool { return client.Listening(socket) }); err != nil {
		return nil, stop, err
	}
	return []*shmSide{
		{name: shmName, server: d.proc, settle: true, args: []string{
			"--ioengine=external:" + built.Engine, "--volume=default/bench", "--scoria_socket=" + filepath.Join(d.run, "shm.sock"),
		}},
		{name: tmpfsName, args: []string{"--ioengine=io_uring", "--filename=" + raw}},
		{name: nbdkitName, server: kit, args: []string{"--ioengine=nbd", "--uri=nbd+unix:///?socket=" + socket}},
	}, stop, nil
}

// shmOne measures a row on a side.
func (b *bench) shmOne(ctx context.Context, s *shmSide, j shmJob) (shmSample, error) {
	if s.settle {
		if err := s.server.settle(ctx, settleLimit); err != nil {
			return shmSample{}, err
		}
	}
	args := []string{
		"--rw=" + j.rw, "--bs=4k", "--iodepth=" + strconv.Itoa(j.depth), "--numjobs=" + strconv.Itoa(j.jobs), "--group_reporting",
		"--norandommap", "--randrepeat=0", "--size=" + strconv.FormatInt(b.cfg.region, 10),
		// As much as fits into the write buffer, or as long as a measurement is.
		"--io_size=" + strconv.FormatInt(b.cfg.burst/int64(j.jobs), 10), "--runtime=" + strconv.FormatInt(b.cfg.seconds.Milliseconds(), 10) + "ms",
	}
	cpu := b.cfg.clientCPU
	if j.together {
		cpu = b.cfg.serverCPU
	}
	before, err := s.serverCPU()
	if err != nil {
		return shmSample{}, err
	}
	r, err := b.fio(ctx, s, cpu, args...)
	if err != nil {
		return shmSample{}, err
	}
	after, err := s.serverCPU()
	if err != nil {
		return shmSample{}, err
	}
	used := max(r.cpu-s.startup, 0) + after - before
	return shmSample{iops: r.iops, p50: r.p50, p999: r.p999, cpu: used.Seconds() * 1e6 / float64(r.ios)}, ctx.Err()
}

func (s *shmSide) serverCPU() (time.Duration, error) {
	if s.server == nil {
		return 0, nil
	}
	u, err := load.ReadUsage(s.server.pid())
	return u.CPU, err
}

// fioResult is what is taken from a run of fio.
type fioResult struct {
	ios             uint64
	iops, p50, p999 float64 // µs
	cpu             time.Duration
}

// fio runs one on a CPU. Its CPU time is all of the process, with io_uring's kernel
// threads, which are the process's own.
func (b *bench) fio(ctx context.Context, s *shmSide, cpu int, args ...string) (fioResult, error) {
	all := append([]string{"--name=bench", "--thread", "--output-format=json", "--aux-path=" + b.shmDir}, append(s.args, args...)...)
	cmd := exec.CommandContext(ctx, "fio", all...)
	var out, problems bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &problems
	if err := runPinned(cpu, cmd); err != nil {
		return fioResult{}, fmt.Errorf("fio %s: %w: %s", strings.Join(all, " "), err, problems.String())
	}
	r, err := parseFio(out.Bytes())
	r.cpu = cmd.ProcessState.UserTime() + cmd.ProcessState.SystemTime()
	return r, err
}

// parseFio reads fio's JSON, before which it may print other things.
func parseFio(out []byte) (fioResult, error) {
	type direction struct {
		IOs     uint64  `json:"total_ios"`
		IOPS    float64 `json:"iops"`
		Latency struct {
			Percentile map[string]float64 `json:"percentile"`
		} `json:"clat_ns"`
	}
	var doc struct {
		Jobs []struct {
			Read  direction `json:"read"`
			Write direction `json:"write"`
		} `json:"jobs"`
	}
	start := bytes.IndexByte(out, '{')
	if start < 0 {
		return fioResult{}, fmt.Errorf("fio printed no JSON: %s", out)
	}
	if err := json.Unmarshal(out[start:], &doc); err != nil || len(doc.Jobs) != 1 {
		return fioResult{}, fmt.Errorf("fio's JSON with %d jobs: %w", len(doc.Jobs), err)
	}
	d := doc.Jobs[0].Read
	if doc.Jobs[0].Write.IOs > 0 {
		d = doc.Jobs[0].Write
	}
	if d.IOs == 0 {
		return fioResult{}, fmt.Errorf("fio did nothing: %s", out)
	}
	p := d.Latency.Percentile
	return fioResult{ios: d.IOs, iops: d.IOPS, p50: p["50.000000"] / 1e3, p999: p["99.900000"] / 1e3}, nil
}

func shmLinesOf(samples map[string]map[string][]shmSample) (lines []shmLine) {
	for _, j := range shmJobs() {
		for _, side := range []string{shmName, tmpfsName, nbdkitName} {
			rounds := samples[j.name()][side]
			if len(rounds) == 0 {
				continue
			}
			of := func(v func(shmSample) float64) spread {
				var all []float64
				for _, r := range rounds {
					all = append(all, v(r))
				}
				return spreadOf(all)
			}
			l := shmLine{
				Row: j.name(), Server: side, IOPS: of(func(r shmSample) float64 { return r.iops }), P50: of(func(r shmSample) float64 { return r.p50 }),
				P999: of(func(r shmSample) float64 { return r.p999 }), CPU: of(func(r shmSample) float64 { return r.cpu }),
				PerCPU: of(func(r shmSample) float64 { return 1e6 / r.cpu }),
			}
			var ratios []float64
			for i, base := range samples[j.name()][tmpfsName] {
				if i < len(rounds) {
					ratios = append(ratios, base.cpu/rounds[i].cpu)
				}
			}
			l.AgainstIt = spreadOf(ratios)
			if side == shmName && j.depth == 32 {
				l.Target = shmTarget
			}
			lines = append(lines, l)
		}
	}
	return lines
}

func printShm(w io.Writer, lines []shmLine) {
	if len(lines) > 0 {
		fmt.Fprintln(w, "\nshared memory\tside\tIOPS (min..max)\tp50 µs\tp99.9 µs\tCPU µs, client + server\tper CPU second, against tmpfs\ttarget\treached")
	}
	for _, l := range lines {
		target, reached := "", ""
		if l.Target > 0 {
			target, reached = bound(false)+number(l.Target), yesNo(l.AgainstIt.Median >= l.Target)
		}
		fmt.Fprintf(w, "%s\t%s\t%s (%s..%s)\t%s\t%s\t%s\t%s (%s..%s)\t%s\t%s\n", l.Row, l.Server, number(l.IOPS.Median), number(l.IOPS.Min), number(l.IOPS.Max),
			number(l.P50.Median), number(l.P999.Median), number(l.CPU.Median), number(l.AgainstIt.Median), number(l.AgainstIt.Min), number(l.AgainstIt.Max), target, reached)
	}
}
