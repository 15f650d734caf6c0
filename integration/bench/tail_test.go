package main

import (
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"
)

// TestLook: of two looks at a process's threads the one that ran longest is the one
// that serves, and what the others used is told apart, new ones and ended ones
// included.
func TestLook(t *testing.T) {
	start := time.Now()
	before := look{at: start, gc: gcTime{3, 40, 500}, threads: map[string]threadTime{
		"worker": {1000, 10}, "writer": {5000, 7}, "gone": {99, 99},
	}}
	after := look{at: start.Add(time.Second), gc: gcTime{5, 100, 900}, threads: map[string]threadTime{
		"worker": {9000, 30}, "writer": {5600, 4000}, "new": {40, 2},
	}}
	want := shares{length: time.Second, waited: 20, others: 640, cycles: 2, paused: 60, gcCPU: 400}
	if got := after.since(before); got != want {
		t.Errorf("%+v, want %+v", got, want)
	}
}

func TestThreadTimes(t *testing.T) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	deadline(t, 2*time.Minute)
	for { // the kernel accounts for a running thread at its next tick
		if mine, err := myThread(); err != nil {
			t.Fatal(err)
		} else if mine.ran > 0 {
			break
		}
	}
	all, err := threadTimes(os.Getpid())
	if err != nil || len(all) == 0 {
		t.Fatalf("%v, %v", all, err)
	}
	if _, err := threadTimes(1 << 30); err == nil {
		t.Error("no error for a process that isn't there")
	}
	if d, err := stolen(0, 1); err != nil || d < 0 {
		t.Errorf("stolen %v, %v", d, err)
	}
}

// TestReadGC: the three metrics are found among others; a daemon that has not all
// of them is an error, not a collector that did nothing.
func TestReadGC(t *testing.T) {
	deadline(t, 2*time.Minute)
	const full = `# HELP go_gc_duration_seconds A summary
go_gc_duration_seconds{quantile="1"} 0.5
go_gc_duration_seconds_sum 0.25
go_gc_duration_seconds_count 7
go_cpu_classes_gc_total_cpu_seconds_total 1.5e+00
go_goroutines 12
`
	answer := full
	socket := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	s := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, answer) })}
	go s.Serve(l)
	defer s.Close()
	want := gcTime{cycles: 7, paused: 250 * time.Millisecond, cpu: 1500 * time.Millisecond}
	if got, err := readGC(socket); err != nil || got != want {
		t.Errorf("%+v, %v; want %+v", got, err, want)
	}
	for _, answer = range []string{
		strings.Replace(full, "go_gc_duration_seconds_sum 0.25\n", "", 1),
		strings.Replace(full, "_sum 0.25", "_sum many", 1),
	} {
		if _, err := readGC(socket); err == nil {
			t.Errorf("no error for %q", answer)
		}
	}
}
