package load

import (
	"context"
	"errors"
	"math/rand/v2"
	"os"
	"runtime"
	"slices"
	"testing"
	"time"

	"scoria/vhost/client"
	"scoria/vhost/client/internal/peertest"
)

func deadline(t testing.TB, d time.Duration) context.Context {
	t.Helper()
	timer := time.AfterFunc(d, func() {
		buf := make([]byte, 1<<20)
		panic(t.Name() + " hangs\n" + string(buf[:runtime.Stack(buf, true)]))
	})
	t.Cleanup(func() { timer.Stop() })
	return t.Context()
}

func connect(t testing.TB, s *peertest.Server, opts client.Options) *client.Client {
	t.Helper()
	c, err := client.Connect(s.Socket, opts)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

func TestHistogram(t *testing.T) {
	for _, v := range []uint64{0, 1, 63, 64, 65, 127, 128, 1000, 4095, 4096, 1 << 20, 1<<36 + 12345, 1 << 41} {
		i := histIndex(v)
		if up := histUpper(i); up < v || up > v+v/64 {
			t.Errorf("%d is in bucket %d, which ends at %d", v, i, up)
		}
		if i > 0 && histUpper(i-1) >= v {
			t.Errorf("%d is in bucket %d, but the one before ends at %d", v, i, histUpper(i-1))
		}
	}
	var h, all Histogram
	rng := rand.New(rand.NewPCG(1, 2))
	var values []uint64
	for range 10000 {
		v := rng.Uint64N(1 << rng.UintN(40))
		values = append(values, v)
		h.Record(v)
	}
	all.Add(&h)
	slices.Sort(values)
	for _, q := range []float64{0, 0.5, 0.99, 0.999} {
		want := values[int(q*10000)]
		got := uint64(all.Quantile(q))
		if got < want || got > want+want/64 {
			t.Errorf("quantile %v is %d, want %d", q, got, want)
		}
	}
	if all.Max() != time.Duration(values[9999]) || all.Count() != 10000 {
		t.Errorf("max %v, count %d", all.Max(), all.Count())
	}
}

func TestReadUsage(t *testing.T) {
	u, err := ReadUsage(os.Getpid())
	if err != nil || u.RSS == 0 || u.Anon == 0 || u.Anon > u.RSS {
		t.Errorf("%+v, %v", u, err)
	}
	if _, err := ReadUsage(1 << 30); err == nil {
		t.Error("no error for a process that isn't there")
	}
}

func TestRun(t *testing.T) {
	specs := map[string]Spec{
		"write":     {Random: true, Depth: 16},
		"read":      {Random: true, Depth: 16, ReadPercent: 100},
		"mixed":     {Random: true, Depth: 64, ReadPercent: 70},
		"flush":     {FlushEach: true, Depth: 4},
		"large":     {BlockBytes: 64 << 10, Depth: 8},
		"polling":   {Poll: true, Depth: 4},
		"rate":      {Rate: 2000, Depth: 4},
		"poll rate": {Rate: 2000, Depth: 4, Poll: true},
		"region":    {RegionOffset: 1 << 20, RegionBytes: 1 << 20, ServerPID: os.Getpid()},
	}
	for name, spec := range specs {
		t.Run(name, func(t *testing.T) {
			ctx := deadline(t, 2*time.Minute)
			c := connect(t, peertest.Start(t), client.Options{Queues: 2})
			spec.Duration, spec.Warmup = 100*time.Millisecond, 10*time.Millisecond
			res, err := Run(ctx, c, spec)
			for ; err == nil && res.Ops == 0; res, err = Run(ctx, c, spec) {
				spec.Duration *= 2 // the machine is busy with something else
			}
			if err != nil {
				t.Fatal(err)
			}
			if res.Ops == 0 || res.IOPS <= 0 || res.P50 <= 0 || res.P50 > res.P99 || res.P99 > res.P999 || res.P999 > res.Max {
				t.Errorf("%+v", res)
			}
			if most := 1.1 * spec.Rate * res.Elapsed.Seconds(); spec.Rate > 0 && float64(res.Ops) > most {
				t.Errorf("%d operations in %v at %v per second", res.Ops, res.Elapsed, spec.Rate)
			}
			for i := range c.Queues() {
				if n := c.Queue(i).InFlight(); n != 0 {
					t.Errorf("queue %d: %d still in flight", i, n)
				}
			}
		})
	}
}

func TestMaxOps(t *testing.T) {
	ctx := deadline(t, 2*time.Minute)
	c := connect(t, peertest.Start(t), client.Options{})
	if err := Fill(ctx, c, 0, 8<<20); err != nil {
		t.Fatal(err)
	}
	res, err := Run(ctx, c, Spec{MaxOps: 100, Duration: time.Hour})
	if err != nil || res.Ops != 100 {
		t.Errorf("%d operations, want 100: %v", res.Ops, err)
	}
}

func TestBadSpec(t *testing.T) {
	ctx := deadline(t, 2*time.Minute)
	c := connect(t, peertest.Start(t), client.Options{})
	for name, spec := range map[string]Spec{
		"percent":  {ReadPercent: 101},
		"block":    {BlockBytes: 1000},
		"large":    {BlockBytes: 1 << 30},
		"queues":   {Queues: 2},
		"depth":    {Depth: 1000},
		"region":   {RegionOffset: 1 << 40},
		"small":    {RegionBytes: 512},
		"rate":     {Rate: -1},
		"duration": {Duration: -1},
	} {
		if spec.Duration == 0 {
			spec.Duration = time.Second
		}
		if _, err := Run(ctx, c, spec); !errors.Is(err, ErrSpec) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestRunEnds(t *testing.T) {
	for name, poll := range map[string]bool{"asleep": false, "polling": true} {
		t.Run(name, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(deadline(t, 2*time.Minute), 50*time.Millisecond)
			defer cancel()
			c := connect(t, peertest.Start(t), client.Options{})
			if _, err := Run(ctx, c, Spec{Duration: time.Hour, Poll: poll}); !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("canceled run: %v", err)
			}
			s := peertest.Start(t)
			c = connect(t, s, client.Options{})
			time.AfterFunc(50*time.Millisecond, s.Drop)
			if _, err := Run(t.Context(), c, Spec{Duration: time.Hour, Poll: poll}); !errors.Is(err, client.ErrDisconnected) {
				t.Errorf("server gone: %v", err)
			}
		})
	}
}

// BenchmarkClient is the client's own cost: the server does next to nothing.
func BenchmarkClient(b *testing.B) {
	for name, depth := range map[string]int{"d1": 1, "d32": 32} {
		b.Run(name, func(b *testing.B) {
			s := peertest.Start(b, func(s *peertest.Server) { s.CPU = 1 % runtime.NumCPU() })
			c := connect(b, s, client.Options{MemoryBytes: 32 << 20})
			c.FillArena(1)
			b.ReportAllocs()
			b.ResetTimer()
			res, err := Run(b.Context(), c, Spec{
				Random: true, Depth: depth, Poll: true, CPUs: []int{0}, MaxOps: uint64(b.N), Duration: time.Hour,
			})
			if err != nil {
				b.Fatal(err)
			}
			b.ReportMetric(res.IOPS, "IOPS")
			b.ReportMetric(float64(res.P50), "p50-ns")
		})
	}
}
