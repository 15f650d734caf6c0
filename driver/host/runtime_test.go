package host

import (
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"runtime/debug"
	"runtime/metrics"
	"strings"
	"testing"
)

// TestHeapIsRarelyCollected: a small heap grows by what several SCOs need before it
// is collected, and what makes it so takes no memory itself. It runs in a process of
// its own, as the daemon's start does: a heap that was used before gives memory that
// it has, and clears it.
func TestHeapIsRarelyCollected(t *testing.T) {
	const fresh = "SCORIA_TEST_FRESH_HEAP"
	if os.Getenv(fresh) == "" {
		cmd := exec.Command(os.Args[0], "-test.run", "^TestHeapIsRarelyCollected$", "-test.v")
		cmd.Env = append(os.Environ(), fresh+"=1")
		if out, err := cmd.CombinedOutput(); err != nil || !strings.Contains(string(out), "--- PASS") {
			t.Fatalf("%v\n%s", err, out)
		}
		return
	}
	procs, percent := runtime.GOMAXPROCS(0), debug.SetGCPercent(100)
	defer func() {
		runtime.GOMAXPROCS(procs)
		debug.SetGCPercent(percent)
	}()
	before := residentBytes(t)
	c := DefaultConfig()
	TuneRuntime(&c)
	runtime.GC()
	goal := []metrics.Sample{{Name: "/gc/heap/goal:bytes"}, {Name: "/gc/heap/live:bytes"}}
	metrics.Read(goal)
	if room := goal[0].Value.Uint64() - goal[1].Value.Uint64(); room < 128<<20 {
		t.Errorf("the heap is collected after %d MiB, want at least 128", room>>20)
	}
	if grown := residentBytes(t) - before; grown > heapFloorBytes/2 {
		t.Errorf("the floor of %d MiB took %d MiB", heapFloorBytes>>20, grown>>20)
	}
}

// residentBytes is this process's memory that is no file.
func residentBytes(t *testing.T) int64 {
	t.Helper()
	text, err := os.ReadFile("/proc/self/status")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(text)) {
		if value, ok := strings.CutPrefix(line, "RssAnon:"); ok {
			var kib int64
			if _, err := fmt.Sscan(value, &kib); err != nil {
				t.Fatal(err)
			}
			return kib << 10
		}
	}
	t.Fatal("no RssAnon in /proc/self/status")
	return 0
}
