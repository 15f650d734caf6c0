package main

import (
	"bytes"
	"encoding/json"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"testing"
	"time"
)

// TestFirstWriteOps: most of the writes have to be first ones, on every side.
func TestFirstWriteOps(t *testing.T) {
	for _, test := range []struct{ region, unit, want uint64 }{
		{1 << 30, qcowCluster, 8192}, {1 << 30, scoriaCluster, 131072}, {qcowCluster, qcowCluster, 1},
	} {
		if got := firstWriteOps(test.region, test.unit); got != test.want {
			t.Errorf("%d bytes in units of %d: %d writes, want %d", test.region, test.unit, got, test.want)
		}
	}
}

// TestFirstWriteRatios: the row is compared with qcow2 after a snapshot, not with
// qcow2 without one, and with Scoria's plain volume.
func TestFirstWriteRatios(t *testing.T) {
	b := &bench{cfg: &config{}, results: results{}}
	for server, rate := range map[string]float64{scoriaName: 900, plainName: 1000, qcowName: 10, qcowPlainName: 100} {
		var s sample
		s.IOPS = rate
		b.results.put(rowSnapWrite, server, 0, s)
	}
	got := map[string]float64{}
	for _, target := range targets() {
		if line, ok := b.ratio(target); ok && target.workload == rowSnapWrite && line.Unit == "IOPS" {
			got[line.Against] = line.Ratio.Median
			if !line.Reached {
				t.Errorf("%s: %v does not reach %v", line.Title, line.Ratio.Median, line.Target)
			}
		}
	}
	if len(got) != 2 || got[qcowName] != 90 || got[plainName] != 0.9 {
		t.Errorf("%v", got)
	}
	doc := b.document()
	if len(doc.Workloads) != 4 {
		t.Errorf("%d lines of servers, want 4: %+v", len(doc.Workloads), doc.Workloads)
	}
}

// TestQcow: an overlay is measured beside the image below it, and what was made is
// removed.
func TestQcow(t *testing.T) {
	for _, program := range []string{"qemu-storage-daemon", "qemu-img"} {
		if _, err := exec.LookPath(program); err != nil {
			if os.Getenv("CI") != "" {
				t.Fatal(err)
			}
			t.Skip(program + " is not installed (make test installs it)")
		}
	}
	if runtime.NumCPU() < 2 {
		t.Skip("needs two CPUs")
	}
	ctx := deadline(t, 2*time.Minute)
	cfg, err := parseFlags(strings.Fields("-servers qsd -rounds 1 -time 100ms -o json -shm-dir " + t.TempDir() + " -data-dir " + t.TempDir()))
	if err != nil {
		t.Fatal(err)
	}
	b := &bench{cfg: cfg, results: results{}}
	if err := b.prepare(ctx); err != nil {
		t.Fatal(err)
	}
	defer b.cleanup()
	image, err := b.qcowImage(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if err := b.qcowWrites(ctx, image, 0); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{qcowName, qcowPlainName} {
		// On a busy machine no write may end within the time that are counted.
		if rounds := b.results[rowSnapWrite][name]; len(rounds) != 1 || rounds[0].AllOps == 0 {
			t.Errorf("%s: %+v", name, rounds)
		}
	}
	var out bytes.Buffer
	if err := b.report(&out); err != nil {
		t.Fatal(err)
	}
	var doc document
	if err := json.Unmarshal(out.Bytes(), &doc); err != nil || len(doc.Workloads) != 2 {
		t.Errorf("%v: %s", err, out.Bytes())
	}
}
