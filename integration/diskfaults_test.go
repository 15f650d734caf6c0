package integration

import (
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"syscall"
	"testing"
	"time"
)

var diskFaultSeed = flag.Uint64("disk-fault-seed", 0, "which disks TestP5EachDiskFaultWithEachOther hits, and in which order; 0: another one at each run")

// diskFault is something that happens to one disk at a time.
type diskFault struct {
	kind  string
	begin func(r *diskRig, d *rigDisk)
	again func(r *diskRig, d *rigDisk) // nil: it has its full effect from the begin on
	end   func(r *diskRig, d *rigDisk) // nil: repair ends it
}

// damages says that the fault leaves something for a verification to find.
func (f *diskFault) damages() bool { return f.kind == "corrupt" }

// rigFaults are the ways in which each kind of fault comes; they take turns.
var rigFaults = [][]diskFault{
	{
		{"kill", func(r *diskRig, d *rigDisk) { r.must(d.Kill()) }, nil, (*diskRig).again},
	},
	{
		{"stop", func(r *diskRig, d *rigDisk) { r.signal(d.Process, syscall.SIGSTOP) }, nil,
			func(r *diskRig, d *rigDisk) { r.signal(d.Process, syscall.SIGCONT) }},
	},
	{
		{"delay", delay(30 * time.Millisecond), nil, delay(0)},
		{"delay", delay(time.Second), nil, delay(0)}, // later than any answer is waited for
	},
	{
		{"fill", func(r *diskRig, d *rigDisk) { r.fill(d, 4<<20) }, nil, (*diskRig).unfill}, // puts are refused
		{"fill", func(r *diskRig, d *rigDisk) { r.fill(d, 0) }, nil, (*diskRig).unfill},     // every write fails
	},
	{
		{"corrupt", flipValues, flipValues, nil},
		// While it does not run; its caches are gone.
		{"corrupt", func(r *diskRig, d *rigDisk) { r.must(d.Kill()); flipValues(r, d); r.again(d) }, nil, nil},
		// The key-value store, in part or all of it: it does not start, or says that it is damaged.
		{"corrupt", func(r *diskRig, d *rigDisk) {
			r.must(d.Kill())
			r.flip(d, "kv", "")
			r.tryAgain(d)
		}, nil, func(r *diskRig, d *rigDisk) { r.giveUp(d); r.replace(d) }},
	},
	{
		// Dead with all that it had.
		{"remove", func(r *diskRig, d *rigDisk) { r.must(d.Kill()); r.must(os.RemoveAll(d.dir)); r.giveUp(d) }, nil, (*diskRig).replace},
		// Given up while it works.
		{"remove", (*diskRig).giveUp, nil, (*diskRig).replace},
	},
}

func delay(by time.Duration) func(*diskRig, *rigDisk) {
	return func(_ *diskRig, d *rigDisk) { d.relay.delay.Store(int64(by)) }
}

func flipValues(r *diskRig, d *rigDisk) { r.flip(d, "values", "") }

// TestP5EachDiskFaultWithEachOther: while fio writes and verifies a volume of 2+2 on six
// scoria-asd over NBD, these are killed, stopped, delayed, filled, damaged, and removed
// and replaced by empty ones, two at a time, each kind of fault with each other one: no
// error, no wrong byte, and each time full safety again, and nothing left that a
// verification finds.
func TestP5EachDiskFaultWithEachOther(t *testing.T) {
	seed := *diskFaultSeed
	if seed == 0 {
		seed = rand.Uint64()
	}
	t.Logf("-disk-fault-seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 0))
	r := startDiskRig(t, rng)
	r.startLoad()
	var pairs [][2]int
	for a := range rigFaults {
		for b := range a {
			pairs = append(pairs, [2]int{a, b})
		}
	}
	rng.Shuffle(len(pairs), func(i, j int) { pairs[i], pairs[j] = pairs[j], pairs[i] })
	turn := make([]int, len(rigFaults))
	for n, p := range pairs {
		rng.Shuffle(len(p), func(i, j int) { p[i], p[j] = p[j], p[i] })
		begun, disks := time.Now(), rng.Perm(rigDisks)
		text := ""
		var faults [2]*diskFault
		for i, k := range p {
			way := turn[k] % len(rigFaults[k])
			turn[k]++
			faults[i] = &rigFaults[k][way]
			text += fmt.Sprintf("%s (%d) of disk %d, ", faults[i].kind, way, disks[i])
		}
		r.during(text, func() {
			for i, f := range faults {
				f.begin(r, r.disks[disks[i]])
				r.progress()
			}
			for i, f := range faults {
				if f.again != nil {
					f.again(r, r.disks[disks[i]])
				}
			}
			r.progress()
			for i, f := range faults {
				if f.end != nil {
					f.end(r, r.disks[disks[i]])
					r.progress()
				}
			}
			r.settled(faults[0].damages() || faults[1].damages())
		})
		t.Logf("%d of %d: %s%v", n+1, len(pairs), text, time.Since(begun).Round(time.Millisecond))
	}
	r.endLoad()
	r.same(r.fixed, r.uri)
	r.ok(r.CLI(r.ctx, "volume", "check", rigVolume))
}
