package main

import (
	"bytes"
	"context"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"scoria/vhost/client/load"
)

func deadline(t *testing.T, d time.Duration) context.Context {
	t.Helper()
	timer := time.AfterFunc(d, func() {
		buf := make([]byte, 1<<20)
		panic(t.Name() + " hangs\n" + string(buf[:runtime.Stack(buf, true)]))
	})
	t.Cleanup(func() { timer.Stop() })
	return t.Context()
}

func TestSpread(t *testing.T) {
	for _, test := range []struct {
		in   []float64
		want spread
	}{
		{nil, spread{}},
		{[]float64{3}, spread{Median: 3, Min: 3, Max: 3, Rounds: 1}},
		{[]float64{9, 1, 5}, spread{Median: 5, Min: 1, Max: 9, Rounds: 3}},
		{[]float64{4, 1, 2, 9}, spread{Median: 3, Min: 1, Max: 9, Rounds: 4}},
	} {
		if got := spreadOf(test.in); got != test.want {
			t.Errorf("%v: %+v, want %+v", test.in, got, test.want)
		}
	}
}

func TestNumber(t *testing.T) {
	for v, want := range map[float64]string{0: "0", 0.29456: "0.295", 3.5: "3.5", 123.45: "123.5", 968001.3: "968001"} {
		if got := number(v); got != want {
			t.Errorf("%v prints as %q, want %q", v, got, want)
		}
	}
}

// TestRatio: ratios are formed within a round, and rounds that one side lacks
// are left out.
func TestRatio(t *testing.T) {
	of := func(iops float64) sample {
		return sample{Result: load.Result{IOPS: iops, P50: time.Duration(1e9 / iops)}}
	}
	b := &bench{results: results{}}
	b.results.put("A-write-d32", scoriaName, 0, of(800))
	b.results.put("A-write-d32", scoriaName, 2, of(900))
	b.results.put("A-write-d32", scoriaName, 3, of(1000))
	b.results.put("A-write-d32", peerName, 0, of(400))
	b.results.put("A-write-d32", peerName, 1, of(1))
	b.results.put("A-write-d32", peerName, 2, of(100))
	more := target{workload: "A-write-d32", value: iops, against: peerName, limit: 5.5}
	line, ok := b.ratio(more)
	if !ok || line.Ratio != (spread{Median: 5.5, Min: 2, Max: 9, Rounds: 2}) || !line.Reached || line.Scoria.Rounds != 3 {
		t.Errorf("%+v", line)
	}
	more.limit = 6
	if line, _ := b.ratio(more); line.Reached {
		t.Error("5.5 reaches 6")
	}
	less := target{workload: "A-write-d32", value: p50, against: peerName, limit: 0.3, atMost: true}
	if line, _ := b.ratio(less); line.Reached || line.Ratio.Max != 0.5 {
		t.Errorf("%+v", line)
	}
	if _, ok := b.ratio(target{workload: "D-write-d1", value: iops, against: peerName}); ok {
		t.Error("a ratio of nothing")
	}
}

func TestFlags(t *testing.T) {
	programs := t.TempDir()
	for _, name := range []string{"scoriad", "scoria"} {
		if err := os.WriteFile(filepath.Join(programs, name), nil, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	for args, want := range map[string]string{
		"-bin " + programs:                     "",
		"-bin " + programs + " -burst 512M":    "",
		"-servers qsd":                         "",
		"-bin /nowhere":                        "make build",
		"-servers qsd,other":                   "-servers",
		"-servers qsd -o xml":                  "-o",
		"-servers qsd -rounds 0":               "-rounds",
		"-servers qsd -rows (":                 "-rows",
		"-servers qsd more":                    "only flags",
		"-servers qsd -client-cpu 1":           "must differ",
		"-servers qsd -rows ^A-read -time 1ms": "10ms",
	} {
		if runtime.NumCPU() < 2 {
			t.Skip("needs two CPUs")
		}
		_, err := parseFlags(strings.Fields(args))
		if want == "" && err != nil || want != "" && (err == nil || !strings.Contains(err.Error(), want)) {
			t.Errorf("%s: %v, want %q", args, err, want)
		}
	}
}

// TestTargetsNameWorkloads: a line of §13 that names a workload which nobody
// measures would silently be missing from the report.
func TestTargetsNameWorkloads(t *testing.T) {
	known := map[string]bool{rowTailRead: true, rowTailWrite: true, rowSnapWrite: true, rowCloneWrite: true, rowSustained: true}
	for _, name := range objectRows() {
		known[name] = true
	}
	for _, w := range workloads() {
		known[w.name] = true
	}
	for _, line := range targets() {
		if !known[line.workload] {
			t.Errorf("%q is measured by %q, which does not exist", line.title, line.workload)
		}
	}
}

// TestPlacement: in every row that says A the client has a CPU of its own and polls; one
// that slept there would measure the machine's wake-ups.
func TestPlacement(t *testing.T) {
	b := &bench{cfg: &config{clientCPU: 3, serverCPU: 5, sustained: 3 * time.Second, seconds: time.Second, burst: 1 << 20}}
	inD := load.Spec{Poll: true}
	b.place(&inD, placementD)
	if inD.Poll || !slices.Equal(inD.CPUs, []int{5}) {
		t.Errorf("D: %+v", inD)
	}
	var inA load.Spec
	b.place(&inA, placementA)
	for name, spec := range map[string]load.Spec{"A": inA, rowSustained: b.sustainedSpec(1)} {
		if !spec.Poll || !slices.Equal(spec.CPUs, []int{3}) {
			t.Errorf("%s: polls: %v, CPUs %v; want it to poll on CPU 3", name, spec.Poll, spec.CPUs)
		}
	}
	if spec := b.sustainedSpec(1); spec.Warmup+spec.Duration != b.cfg.sustained {
		t.Errorf("%v + %v, want %v", spec.Warmup, spec.Duration, b.cfg.sustained)
	}
}

// TestPeer measures the peer for an instant and reads the report.
func TestPeer(t *testing.T) {
	if _, err := exec.LookPath("qemu-storage-daemon"); err != nil {
		if os.Getenv("CI") != "" {
			t.Fatal(err)
		}
		t.Skip("qemu-storage-daemon is not installed (make test installs it)")
	}
	if runtime.NumCPU() < 2 {
		t.Skip("needs two CPUs")
	}
	ctx := deadline(t, 2*time.Minute)
	cfg, err := parseFlags(strings.Fields("-servers qsd -rows (A-write-d32|D-read-d1)$ -rounds 2 -time 400ms -region 8M -o json -shm-dir " + t.TempDir() + " -data-dir " + t.TempDir()))
	if err != nil {
		t.Fatal(err)
	}
	b := &bench{cfg: cfg, results: results{}}
	if err := b.prepare(ctx); err != nil {
		t.Fatal(err)
	}
	b.measure(ctx)
	var out bytes.Buffer
	if err := b.report(&out); err != nil {
		t.Fatal(err)
	}
	var doc document
	if err := json.Unmarshal(out.Bytes(), &doc); err != nil {
		t.Fatal(err)
	}
	if len(doc.Workloads) != 2 || doc.Workloads[0].IOPS.Rounds != 2 || doc.Workloads[1].P50.Median <= 0 {
		t.Errorf("%s", out.Bytes())
	}
	b.cleanup()
	if _, err := os.Stat(b.shmDir); !os.IsNotExist(err) {
		t.Errorf("%s is left: %v", b.shmDir, err)
	}
	cfg.output = "table"
	if err := b.report(&out); err != nil || !strings.Contains(out.String(), "D-read-d1") {
		t.Errorf("%v\n%s", err, out.Bytes())
	}
}
