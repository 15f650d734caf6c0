package main

import (
	"bytes"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"
)

// TestScrubFigures: each byte is counted against the guest's, the time against the
// guest's writes, and space without the write buffer against live data.
func TestScrubFigures(t *testing.T) {
	start := time.Now()
	a := usePoint{at: start, cpu: time.Second, disk: 100, writes: 10, bytes: 1000, uploaded: 50, scrubbed: 7}
	z := usePoint{at: start.Add(2 * time.Second), cpu: 3 * time.Second, disk: 3100, writes: 1010, bytes: 2000, uploaded: 2550, scrubbed: 1507}
	u := between(a, z)
	if want := (scrubUse{rate: 500, cpu: 2000, disk: 3, store: 2.5, moved: 1.5}); u != want {
		t.Errorf("%+v, want %+v", u, want)
	}
	if u := between(a, a); u != (scrubUse{}) {
		t.Errorf("nothing written: %+v", u)
	}
	u.space(scrubBuffer+150, scrubBuffer+120, 100)
	u.space(scrubBuffer+130, scrubBuffer+125, 100)
	u.space(scrubBuffer/2, 0, 100) // all of it may be in the write buffer
	if u.onDisk != 1.5 || u.stored != 1.25 {
		t.Errorf("space: %v, %v; want the most of each, 1.5 and 1.25", u.onDisk, u.stored)
	}
	limits := 0
	for _, f := range scrubFigures(u, scrubUse{}, u) {
		if f.Limit == scrubLimit {
			limits++
			if f.Value != u.onDisk && f.Value != u.stored {
				t.Errorf("%q is %v", f.Title, f.Value)
			}
		}
	}
	if limits != 3 {
		t.Errorf("%d bounds of space, want those of the disk and of the store, and of the disk after a burst", limits)
	}
}

// TestDiskUse: a local copy and the object that is linked to it take space once.
func TestDiskUse(t *testing.T) {
	dir := t.TempDir()
	one := filepath.Join(dir, "sco")
	if err := os.WriteFile(one, bytes.Repeat([]byte{1}, 256<<10), 0o600); err != nil {
		t.Fatal(err)
	}
	before, err := diskUse(dir)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Link(one, filepath.Join(dir, "object")); err != nil {
		t.Skipf("no hard links here: %v", err)
	}
	if after, err := diskUse(dir); err != nil || after != before || after < 256<<10 {
		t.Errorf("%d bytes, with a second name %d (%v)", before, after, err)
	}
}

// TestScrubRow goes through the row with a real daemon, in small.
func TestScrubRow(t *testing.T) {
	if runtime.NumCPU() < 2 {
		t.Skip("needs two CPUs")
	}
	ctx := deadline(t, 5*time.Minute)
	programs := t.TempDir()
	build := exec.CommandContext(ctx, "go", "build", "-o", programs, "scoria/cmd/scoriad", "scoria/cmd/scoria")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build: %v\n%s", err, out)
	}
	cfg, err := parseFlags(strings.Fields("-rows ^scrub$ -scrub 400ms -scrub-volume 64M -o json -bin " + programs + " -data-dir " + t.TempDir()))
	if err != nil {
		t.Fatal(err)
	}
	b := &bench{cfg: cfg, results: results{}}
	if err := b.prepare(ctx); err != nil {
		t.Fatal(err)
	}
	defer b.cleanup()
	b.measure(ctx)
	var out bytes.Buffer
	if err := b.report(&out); err != nil {
		t.Fatalf("%v\n%s", err, out.Bytes())
	}
	var doc document
	if err := json.Unmarshal(out.Bytes(), &doc); err != nil {
		t.Fatal(err)
	}
	want := scrubFigures(scrubUse{}, scrubUse{}, scrubUse{})
	if len(doc.Figures) != len(want) {
		t.Fatalf("%d figures, want %d\n%s", len(doc.Figures), len(want), out.Bytes())
	}
	out.Reset()
	if err := doc.print(&out); err != nil {
		t.Fatal(err)
	}
	for i, f := range doc.Figures {
		if f.Row != rowScrub || f.Title != want[i].Title || !strings.Contains(out.String(), f.Title) {
			t.Errorf("figure %d is %+v, want %q in\n%s", i, f, want[i].Title, out.String())
		}
	}
}
