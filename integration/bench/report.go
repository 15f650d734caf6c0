package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
)

// spread is a figure over the rounds.
type spread struct {
	Median float64 `json:"median"`
	Min    float64 `json:"min"`
	Max    float64 `json:"max"`
	Rounds int     `json:"rounds"`
}

func spreadOf(values []float64) spread {
	if len(values) == 0 {
		return spread{}
	}
	v := slices.Sorted(slices.Values(values))
	s := spread{Min: v[0], Max: v[len(v)-1], Rounds: len(v), Median: v[len(v)/2]}
	if len(v)%2 == 0 {
		s.Median = (v[len(v)/2-1] + v[len(v)/2]) / 2
	}
	return s
}

// ratioLine is a line of §13 as measured.
type ratioLine struct {
	Row     string  `json:"row"`
	Title   string  `json:"title"`
	Unit    string  `json:"unit"`
	Scoria  spread  `json:"scoria"`
	Other   spread  `json:"other"`
	Against string  `json:"against,omitempty"`
	Ratio   spread  `json:"ratio"` // Scoria's figure itself where there is nothing to divide by
	Target  float64 `json:"target,omitempty"`
	Goal    float64 `json:"goal,omitempty"`
	AtMost  bool    `json:"at_most"`
	Reached bool    `json:"reached"`
}

// workloadLine is everything measured of one workload on one server.
type workloadLine struct {
	Row    string `json:"row"`
	Server string `json:"server"`
	IOPS   spread `json:"iops"`
	MBps   spread `json:"mb_per_s"`
	P50    spread `json:"p50_us"`
	P99    spread `json:"p99_us"`
	P999   spread `json:"p999_us"`
	CPU    spread `json:"server_cpu_s_per_million"`
	CPUAll spread `json:"server_cpu_until_quiet_s_per_million"`
	RSS    spread `json:"server_rss_mib"`
}

// document is what -o json prints.
type document struct {
	Machine   map[string]string `json:"machine"`
	Settings  map[string]string `json:"settings"`
	Ratios    []ratioLine       `json:"ratios"`
	Workloads []workloadLine    `json:"workloads"`
	Figures   []figure          `json:"figures"`
	Shm       []shmLine         `json:"shm"`
	Problems  []problem         `json:"problems"`
}

// errIncomplete: some rows could not be measured.
var errIncomplete = errors.New("not all rows could be measured")

func (b *bench) report(w io.Writer) error {
	if b.cfg.list {
		return listRows(w)
	}
	doc := b.document()
	var err error
	if b.cfg.output == "json" {
		enc := json.NewEncoder(w)
		enc.SetIndent("", "  ")
		err = enc.Encode(doc)
	} else {
		err = doc.print(w)
	}
	for _, p := range b.problems {
		if p.Row != rowRestartTiB || b.cfg.syntheticMap != "" {
			return errors.Join(err, errIncomplete)
		}
	}
	return err
}

func listRows(w io.Writer) error {
	for _, l := range workloads() {
		fmt.Fprintln(w, l.name)
	}
	for _, j := range shmJobs() {
		fmt.Fprintln(w, j.name())
	}
	_, err := fmt.Fprintln(w, strings.Join([]string{rowTailWrite, rowTailRead, strings.Join(objectRows(), "\n"), rowObjects + "-encrypted", rowObjects + "-degraded", rowObjects + "-repair", rowSnapWrite, rowCloneWrite, rowSnapshot, rowChain, rowCopy, rowSustained, rowScrub, rowNeighbour, rowIdle, rowRestart, rowRestartTiB}, "\n"))
	return err
}

func (b *bench) document() document {
	doc := document{Machine: machine(), Settings: b.settings(), Figures: b.figures, Shm: b.shmLines, Problems: b.problems}
	for _, t := range targets() {
		if line, ok := b.ratio(t); ok {
			doc.Ratios = append(doc.Ratios, line)
		}
	}
	for _, name := range b.rowOrder() {
		for _, server := range []string{scoriaName, plainName, peerName, qcowName, qcowPlainName, idealName, diskName, inPlaceName, erasureName, netName, bareName} {
			if rounds := b.results[name][server]; len(rounds) > 0 {
				doc.Workloads = append(doc.Workloads, lineOf(name, server, rounds))
			}
		}
	}
	return doc
}

func (b *bench) rowOrder() (names []string) {
	for _, w := range workloads() {
		names = append(names, w.name)
	}
	return append(append(names, rowTailWrite, rowTailRead, rowSnapWrite, rowCloneWrite, rowSustained), objectRows()...)
}

// ratio forms one line; false if it was not measured. Each ratio is that of one
// round.
func (b *bench) ratio(t target) (ratioLine, bool) {
	var mine, other, ratios []float64
	theirs := b.results[t.workload][t.against]
	for round, res := range b.results[t.workload][scoriaName] {
		if res == nil {
			continue
		}
		v := t.value(res)
		mine = append(mine, v)
		switch {
		case t.against == "":
			ratios = append(ratios, v)
		case round < len(theirs) && theirs[round] != nil && t.value(theirs[round]) > 0:
			o := t.value(theirs[round])
			other = append(other, o)
			ratios = append(ratios, v/o)
		}
	}
	line := ratioLine{
		Row: t.workload, Title: t.title, Unit: t.unit, Against: t.against, Target: t.limit, Goal: t.goal, AtMost: t.atMost,
		Scoria: spreadOf(mine), Other: spreadOf(other), Ratio: spreadOf(ratios),
	}
	line.Reached = t.limit == 0 || t.atMost && line.Ratio.Median <= t.limit || !t.atMost && line.Ratio.Median >= t.limit
	return line, len(ratios) > 0
}

func lineOf(name, server string, rounds []*sample) workloadLine {
	of := func(f func(*sample) float64) spread {
		var v []float64
		for _, r := range rounds {
			if r != nil {
				v = append(v, f(r))
			}
		}
		return spreadOf(v)
	}
	return workloadLine{
		Row: name, Server: server, IOPS: of(iops), MBps: of(mbps), P50: of(p50), CPU: of(cpu), CPUAll: of(all),
		P99:  of(func(r *sample) float64 { return float64(r.P99) / 1e3 }),
		P999: of(p999),
		RSS:  of(func(r *sample) float64 { return float64(r.ServerRSS) / (1 << 20) }),
	}
}

func (d *document) print(w io.Writer) error {
	for _, m := range []map[string]string{d.Machine, d.Settings} {
		for _, k := range slices.Sorted(mapKeys(m)) {
			fmt.Fprintf(w, "%-14s %s\n", k, m[k])
		}
	}
	tab := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	if len(d.Ratios) > 0 {
		fmt.Fprintln(tab, "\nwork\tscoria\tagainst\tratio (min..max)\ttarget\treached\tgoal")
	}
	for _, r := range d.Ratios {
		other, target, reached, goal := "", "", "", ""
		if r.Against != "" {
			other = fmt.Sprintf("%s %s", r.Against, number(r.Other.Median))
		}
		if r.Target > 0 {
			target, reached = bound(r.AtMost)+number(r.Target), yesNo(r.Reached)
		}
		if r.Goal > 0 {
			goal = number(r.Goal)
		}
		fmt.Fprintf(tab, "%s\t%s %s\t%s\t%s (%s..%s)\t%s\t%s\t%s\n", r.Title, number(r.Scoria.Median), r.Unit, other,
			number(r.Ratio.Median), number(r.Ratio.Min), number(r.Ratio.Max), target, reached, goal)
	}
	if len(d.Figures) > 0 {
		fmt.Fprintln(tab, "\nwork\tscoria\ttarget\treached")
	}
	for _, f := range d.Figures {
		target, reached := "", ""
		if f.Limit > 0 {
			target, reached = bound(true)+number(f.Limit), yesNo(f.Reached)
		}
		fmt.Fprintf(tab, "%s\t%s %s\t%s\t%s\n", f.Title, number(f.Value), f.Unit, target, reached)
	}
	printShm(tab, d.Shm)
	if len(d.Workloads) > 0 {
		fmt.Fprintln(tab, "\nworkload\tserver\tIOPS (min..max)\tMB/s\tp50 µs\tp99 µs\tp99.9 µs\tCPU s/M\tuntil quiet\tRSS MiB")
	}
	for _, l := range d.Workloads {
		fmt.Fprintf(tab, "%s\t%s\t%s (%s..%s)\t%s\t%s\t%s\t%s\t%s\t%s\t%s\n", l.Row, l.Server, number(l.IOPS.Median), number(l.IOPS.Min), number(l.IOPS.Max),
			number(l.MBps.Median), number(l.P50.Median), number(l.P99.Median), number(l.P999.Median), number(l.CPU.Median), number(l.CPUAll.Median), number(l.RSS.Median))
	}
	if err := tab.Flush(); err != nil {
		return err
	}
	for _, p := range d.Problems {
		fmt.Fprintf(w, "\n%s: %s\n", p.Row, p.Error)
	}
	return nil
}

func mapKeys(m map[string]string) func(func(string) bool) {
	return func(yield func(string) bool) {
		for k := range m {
			if !yield(k) {
				return
			}
		}
	}
}

func bound(atMost bool) string {
	if atMost {
		return "≤ "
	}
	return "≥ "
}

func yesNo(b bool) string {
	if b {
		return "yes"
	}
	return "no"
}

// number prints three significant digits, large numbers in whole units.
func number(v float64) string {
	switch {
	case v >= 1000:
		return fmt.Sprintf("%.0f", v)
	case v >= 100:
		return fmt.Sprintf("%.1f", v)
	}
	return fmt.Sprintf("%.3g", v)
}

// busyLoad is the load average from which on the figures say more about what
// else runs than about the servers. A build just before leaves more than 0.
const busyLoad = 1.5

// loadAverage is that of the last minute, with a warning if it is high.
func loadAverage() (string, error) {
	b, err := os.ReadFile("/proc/loadavg")
	if err != nil {
		return "", err
	}
	first, _, _ := strings.Cut(string(b), " ")
	v, err := strconv.ParseFloat(first, 64)
	if err != nil {
		return "", fmt.Errorf("/proc/loadavg: %w", err)
	}
	if v > busyLoad {
		first += ": something else runs, the figures can't be trusted"
	}
	return first, nil
}

// machine says what the figures were measured on.
func machine() map[string]string {
	m := map[string]string{"go": runtime.Version(), "peer": "not installed"}
	if out, err := exec.Command("qemu-storage-daemon", "--version").Output(); err == nil {
		m["peer"], _, _ = strings.Cut(string(out), "\n")
	}
	if b, err := os.ReadFile("/proc/sys/kernel/osrelease"); err == nil {
		m["kernel"] = strings.TrimSpace(string(b))
	}
	if b, err := os.ReadFile("/proc/cpuinfo"); err == nil {
		for line := range strings.Lines(string(b)) {
			if k, v, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(k) == "model name" {
				m["cpu"] = fmt.Sprintf("%s, %d of them", strings.TrimSpace(v), runtime.NumCPU())
				break
			}
		}
	}
	return m
}

func (b *bench) settings() map[string]string {
	c := b.cfg
	return map[string]string{
		"load average": b.load,
		"rounds":       fmt.Sprintf("%d of %v", c.rounds, c.seconds),
		"placement":    fmt.Sprintf("A: client on CPU %d, server on CPU %d, both poll; D: both on CPU %d, both sleep", c.clientCPU, c.serverCPU, c.serverCPU),
		"disk":         fmt.Sprintf("%d MiB of %d MiB used; writes end after %d MiB, write buffer %d MiB", c.region>>20, b.volumeBytes()>>20, c.burst>>20, c.buffer>>20),
	}
}
