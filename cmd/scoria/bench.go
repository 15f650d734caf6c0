package main

import (
	"fmt"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"scoria/driver/control"
	"scoria/vhost/client"
	"scoria/vhost/client/load"
)

// benchFlags is what `scoria bench` can be told.
type benchFlags struct {
	rw          string
	mix         int
	block       size
	depth       int
	queues      int
	seconds     float64
	warmup      float64
	region      size
	rate        float64
	flush, poll bool
	fill        bool
	cpus        []int
	destroy     bool
}

func (a *app) benchCommand() *cobra.Command {
	f := benchFlags{block: 4096}
	cmd := &cobra.Command{
		Use:   "bench [POOL/]VOLUME",
		Short: "Measure a volume's speed through its vhost-user-blk socket",
		Long: `Put load on a volume as a guest's driver would and print rate, latency and the
daemon's CPU time. A volume that something uses is refused. Everything but
reading needs --destroy-data, as it overwrites the volume.

What is measured depends much on where client and daemon run: pin both (--cpus
here, taskset for the daemon) and say how.`,
		Example: "  scoria bench vm1 --rw read --depth 32 --seconds 10\n  scoria bench scratch --rw randrw --mix 70 --depth 32 --destroy-data",
		Args:    args("[POOL/]VOLUME"), ValidArgsFunction: a.completeVolumes,
		RunE: func(cmd *cobra.Command, got []string) error {
			name, err := fullName(got[0])
			if err != nil {
				return err
			}
			return a.bench(cmd, name, &f)
		},
	}
	fl := cmd.Flags()
	fl.StringVar(&f.rw, "rw", "randread", "read, write, rw (sequential), randread, randwrite or randrw")
	fl.IntVar(&f.mix, "mix", 70, "percentage of reads of rw and randrw")
	fl.Var(&f.block, "bs", "bytes of a request")
	fl.IntVar(&f.depth, "depth", 1, "requests in flight per queue")
	fl.IntVar(&f.queues, "queues", 1, "queues, each with a thread")
	fl.Float64Var(&f.seconds, "seconds", 5, "how long to measure")
	fl.Float64Var(&f.warmup, "warmup", 1, "seconds before measuring")
	fl.Var(&f.region, "region", "bytes of the volume to use (default: all)")
	fl.Float64Var(&f.rate, "rate", 0, "requests per second; 0: as many as possible")
	fl.BoolVar(&f.flush, "flush", false, "flush after each write")
	fl.BoolVar(&f.poll, "poll", false, "spin for completions instead of sleeping")
	fl.BoolVar(&f.fill, "fill", false, "write the region once before measuring, so that reads find data")
	fl.IntSliceVar(&f.cpus, "cpus", nil, "CPUs to pin the threads to")
	fl.BoolVar(&f.destroy, "destroy-data", false, "allow overwriting the volume's data")
	fl.SortFlags = false
	must(cmd.RegisterFlagCompletionFunc("rw", cobra.FixedCompletions([]string{"read", "write", "rw", "randread", "randwrite", "randrw"}, cobra.ShellCompDirectiveNoFileComp)))
	return cmd
}

// spec turns the flags into a load.
func (f *benchFlags) spec() (load.Spec, error) {
	s := load.Spec{
		Random: len(f.rw) > 4 && f.rw[:4] == "rand", FlushEach: f.flush, BlockBytes: int(f.block), Depth: f.depth, Queues: f.queues,
		RegionBytes: uint64(f.region), Duration: time.Duration(f.seconds * float64(time.Second)),
		Warmup: time.Duration(f.warmup * float64(time.Second)), Rate: f.rate, Poll: f.poll, CPUs: f.cpus, Seed: 1,
	}
	switch f.rw {
	case "read", "randread":
		s.ReadPercent = 100
	case "write", "randwrite":
	case "rw", "randrw":
		s.ReadPercent = f.mix
	default:
		return s, usagef("--rw %q: must be read, write, rw, randread, randwrite or randrw", f.rw)
	}
	switch {
	case f.block == 0 || f.block > 4<<20:
		return s, usagef("--bs %s: must be from 512 to 4M", f.block.String())
	case f.queues < 1 || f.queues > 16:
		return s, usagef("--queues %d: must be from 1 to 16", f.queues)
	case f.depth < 1 || f.depth > 128:
		return s, usagef("--depth %d: must be from 1 to 128", f.depth)
	case s.Duration <= 0 || s.Warmup < 0:
		return s, usagef("--seconds %v, --warmup %v: must be positive", f.seconds, f.warmup)
	case (s.ReadPercent < 100 || f.fill) && !f.destroy:
		return s, usagef("this overwrites the volume: say --destroy-data if its data is of no use")
	}
	return s, nil
}

func (a *app) bench(cmd *cobra.Command, name string, f *benchFlags) error {
	spec, err := f.spec()
	if err != nil {
		return err
	}
	api := a.client()
	v, err := api.Volume(cmd.Context(), name)
	if err != nil {
		return err
	}
	if v.UsedBy != "" {
		return control.Errorf(control.CodeInUse, "volume %s is in use by %s: the load would disturb it", name, v.UsedBy)
	}
	st, err := api.Status(cmd.Context())
	if err != nil {
		return err
	}
	spec.ServerPID = st.PID
	arena := max(16<<20, 2*f.queues*int(f.block)*2*f.depth)
	c, err := client.Connect(v.Socket, client.Options{Queues: f.queues, MemoryBytes: arena})
	if err != nil {
		return fmt.Errorf("volume %s: %w", name, err)
	}
	defer c.Close()
	if f.fill {
		fmt.Fprintln(a.errOut, "filling …")
		n := spec.RegionBytes
		if n == 0 {
			n = v.Size
		}
		if err := load.Fill(cmd.Context(), c, 0, n); err != nil {
			return fmt.Errorf("volume %s: fill: %w", name, err)
		}
	}
	r, err := load.Run(cmd.Context(), c, spec)
	if err != nil {
		return fmt.Errorf("volume %s: %w", name, err)
	}
	return a.print(r, func(w *tabwriter.Writer) { showResult(w, &r) })
}

func showResult(w *tabwriter.Writer, r *load.Result) {
	row(w, "requests", fmt.Sprintf("%d in %s", r.Ops, r.Elapsed.Round(time.Millisecond)))
	row(w, "rate", fmt.Sprintf("%.0f/s, %.1f MB/s", r.IOPS, r.MBps))
	row(w, "latency", fmt.Sprintf("p50 %s  p99 %s  p99.9 %s  max %s", r.P50, r.P99, r.P999, r.Max))
	row(w, "daemon's CPU", fmt.Sprintf("%.2f s per million requests", r.ServerCPUPerMOps))
	row(w, "daemon's memory", formatSize(uint64(max(r.ServerRSS, 0)))+" resident, "+formatSize(uint64(max(r.ServerAnon, 0)))+" its own")
}
