package main

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"
)

// TestObjectRows goes through the rows of the object store in small, and reads the
// report: what is counted is exact at any size.
func TestObjectRows(t *testing.T) {
	if runtime.NumCPU() < 2 {
		t.Skip("needs two CPUs")
	}
	ctx := deadline(t, 5*time.Minute)
	programs := t.TempDir()
	for _, name := range []string{"scoriad", "scoria"} {
		if err := os.WriteFile(filepath.Join(programs, name), nil, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	cfg, err := parseFlags(strings.Fields("-rows ^objects -rounds 1 -time 20ms -object-size 3M -o json -bin " + programs + " -shm-dir " + t.TempDir() + " -data-dir " + t.TempDir()))
	if err != nil {
		t.Fatal(err)
	}
	b := &bench{cfg: cfg, results: results{}}
	defer b.cleanup()
	if err := b.prepare(ctx); err != nil {
		t.Fatal(err)
	}
	b.measure(ctx)
	var out bytes.Buffer
	if err := b.report(&out); err != nil {
		t.Fatalf("%v\n%s", err, out.Bytes())
	}
	var doc document
	if err := json.Unmarshal(out.Bytes(), &doc); err != nil {
		t.Fatal(err)
	}
	if want := len(objectTargets()); len(doc.Ratios) != want {
		t.Errorf("%d lines, want %d", len(doc.Ratios), want)
	}
	exact := map[string]float64{
		"bytes fetched from storage daemons per byte asked":               1,
		"bytes fetched from storage daemons per byte asked, loopback TCP": 1,
		"with encryption: bytes fetched per byte asked":                   4112.0 / 4096,
		"repair of a lost device, 4+2: bytes read per byte rebuilt":       4,
	}
	others := map[string]float64{} // by row, on a machine that is slow just now
	for _, f := range doc.Figures {
		if f.Title == titleOthers {
			others[f.Row] = f.Value
		}
	}
	for _, f := range doc.Figures {
		if want, ok := exact[f.Title]; ok {
			delete(exact, f.Title)
			// Reading from others takes at most the five other shards of 4+2.
			if most := want * (1 + 5*others[f.Row]); f.Value < want*0.999 || f.Value > most*1.001 {
				t.Errorf("%s is %v, want %v to %v", f.Title, f.Value, want, most)
			}
		}
	}
	if len(others) != 3 {
		t.Errorf("%d rows say how many reads were asked of others too, want 3", len(others))
	}
	for title := range exact {
		t.Errorf("there is no figure %q", title)
	}
	out.Reset()
	if err := doc.print(&out); err != nil || !strings.Contains(out.String(), "SCO upload, 4+2") || !strings.Contains(out.String(), (readCase{tcp: true, cold: true}).row()) {
		t.Errorf("%v\n%s", err, out.String())
	}
	left, err := os.ReadDir(b.dataDir)
	if err != nil || len(left) > 0 {
		t.Errorf("%d entries are left in %s: %v", len(left), b.dataDir, err)
	}
}
