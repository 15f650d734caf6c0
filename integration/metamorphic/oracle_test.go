package metamorphic

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"scoria/driver/block"
)

// faulty is a device with a fault that is always the same for the same requests, so
// that a trace with it fails each time.
type faulty struct {
	block.Device
	corrupt func(q *block.Request) (drop bool)
}

func (f faulty) Submit(batch []*block.Request) {
	for _, q := range batch {
		if f.corrupt(q) {
			q.Ended = true
			continue
		}
		f.Device.Submit([]*block.Request{q})
	}
}

func (f faulty) Release() { block.Release(f.Device) }

// Changes and Since are what front ends ask a device for.
type faultyDiffer struct {
	faulty
	block.Differ
}

func (f faultyDiffer) Release() { f.faulty.Release() }

func withFault(corrupt func(q *block.Request) (drop bool)) func(block.Device) block.Device {
	return func(dev block.Device) block.Device {
		f := faulty{dev, corrupt}
		if d, ok := dev.(block.Differ); ok {
			return faultyDiffer{f, d}
		}
		return f
	}
}

// planted is where the operations come from that are to find a deliberate fault: kinds of
// its own, so that those which the generator learns change neither what is found nor how,
// and none that a failure could need besides the few that the fault itself needs, as a
// failure of a snapshot or a clone does, or one after a loss of power, which shows a lost
// discard behind a flush only.
var planted = source{
	weights: map[string]int{
		"write": 300, "zero": 30, "discard": 60, "batch": 60, "read": 200, "flush": 60,
		"create": 12, "delete": 5, "resize": 8, "verify": 1, "restart": 2, "kill": 6,
	},
	settings: &settings{SCO: 1, Pool: 8, Local: 4, Read: 64, Compress: "none", Encrypt: "none", DirOnly: true},
}

// TestOracleAndShrinker: deliberate faults of a device are found by random operations,
// and the shrinker leaves the few operations that they need.
func TestOracleAndShrinker(t *testing.T) {
	for _, c := range []struct {
		name    string
		corrupt func(q *block.Request) bool
		most    int // operations that are enough
		needs   string
	}{
		// create, write, discard, read
		{"a discard is lost", func(q *block.Request) bool {
			return q.Op == block.OpDiscard && q.Offset/cluster%4 == 1
		}, 4, "discard"},
		{"a write goes one cluster too far", func(q *block.Request) bool {
			if q.Op == block.OpWrite && q.Length == cluster && q.Offset/cluster%8 == 3 {
				q.Offset -= cluster
			}
			return false
		}, 3, "write"},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			from := planted
			from.dir, from.wrap = t.TempDir(), withFault(c.corrupt)
			var failed *trace
			var err error
			for seed := uint64(1); err == nil; seed++ {
				if seed > 20 {
					t.Fatal("the fault is not found")
				}
				failed, err = generate(t, from, seed, 400)
			}
			t.Logf("found by operation %d: %v", len(failed.ops), err)
			small := shrink(failed, err, shrinkLimits{attempts: 300, each: 1, total: time.Hour}, func(tr *trace) error {
				return replay(tr, testLog(t), from.wrap)
			})
			t.Logf("shrunk by %d attempts to\n%s", small.attempts, small.trace)
			if small.err == nil || len(small.trace.ops) > c.most || !slices.ContainsFunc(small.trace.ops, func(o op) bool { return o.Kind == c.needs }) {
				t.Fatalf("%d operations are left, of at most %d, which fail with: %v", len(small.trace.ops), c.most, small.err)
			}
			// What is printed can be read again, and is the same trace.
			again, err := parseTrace(strings.NewReader(small.trace.String()))
			if err != nil || again.String() != small.trace.String() {
				t.Fatalf("the trace reads as %v, %v", again, err)
			}
			if err := replay(again, testLog(t), from.wrap); err == nil {
				t.Fatal("the trace that was read does not fail")
			}
			if err := replay(again, testLog(t), nil); err != nil {
				t.Fatalf("without the fault: %v", err)
			}
		})
	}
}

// TestShrink: what is needed is found, wherever it is, and attempts are bounded.
func TestShrink(t *testing.T) {
	ops := make([]op, 500)
	for i := range ops {
		ops[i] = op{Kind: "flush", N: uint64(i)}
	}
	failure := errors.New("it fails at 7")
	attempts := 0
	run := func(tr *trace) error {
		attempts++
		for _, n := range []uint64{3, 250, 499} {
			if !slices.ContainsFunc(tr.ops, func(o op) bool { return o.N == n }) {
				return nil
			}
		}
		return fmt.Errorf("it fails at %d", len(tr.ops)) // another number, the same failure
	}
	s := shrink(&trace{ops: ops}, failure, shrinkLimits{attempts: 1000, each: 1, total: time.Hour}, run)
	if len(s.trace.ops) != 3 || s.err == nil {
		t.Fatalf("%d operations are left: %v", len(s.trace.ops), s.trace)
	}
	attempts = 0
	s = shrink(&trace{ops: ops}, failure, shrinkLimits{attempts: 10, each: 2, total: time.Hour}, run)
	if attempts > 20 || s.attempts != 10 {
		t.Fatalf("%d attempts, %d runs", s.attempts, attempts)
	}
	s = shrink(&trace{ops: ops}, errors.New("something else"), shrinkLimits{attempts: 10, each: 2, total: time.Hour}, run)
	if s.err != nil || len(s.trace.ops) != len(ops) {
		t.Fatalf("another failure was taken for this one: %v", s.err)
	}
}
