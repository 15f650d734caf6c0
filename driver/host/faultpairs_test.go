package host

import (
	"flag"
	"fmt"
	"math/rand/v2"
	"testing"
	"time"

	"scoria/alba/albatest"
	"scoria/alba/asd/asdtest"
	"scoria/driver/control"
)

var (
	faultSeed = flag.Uint64("fault-seed", 0, "which disks the faults of TestP5EveryPairOfFaults hit; 0: others at each run")
	faultsAll = flag.Bool("faults-all", false, "let TestP5EveryPairOfFaults hit every pair of disks with every pair of faults: takes an hour")
	// For -faults-all in portions: with one seed, slices 0 to n-1 of n are all cases.
	faultSlice  = flag.Int("fault-slice", 0, "which of -fault-slices slices of its cases TestP5EveryPairOfFaults runs, counted from 0")
	faultSlices = flag.Int("fault-slices", 1, "into how many slices TestP5EveryPairOfFaults cuts its cases")
)

// diskFaults are what can happen to a storage daemon. begin has it happen, again
// makes the fault go on hitting, end takes it back.
var diskFaults = []struct {
	name              string
	begin, again, end func(r *faultRig, d *albatest.Disk, f *diskFault)
}{
	{"kill", set(asdtest.Fault{Down: true}), nil, set(asdtest.Fault{})},
	{"stop", set(asdtest.Fault{Stopped: true}), nil, set(asdtest.Fault{})},
	{"corrupt", rot, rot, nil},
	{"fill", set(asdtest.Fault{Full: true}), nil, set(asdtest.Fault{})},
	{"delay", set(asdtest.Fault{Delay: 20 * time.Millisecond}), nil, set(asdtest.Fault{})},
	{"remove", func(r *faultRig, d *albatest.Disk, _ *diskFault) { r.remove(d) }, nil,
		func(r *faultRig, _ *albatest.Disk, _ *diskFault) { r.replace() }},
}

// diskFault is one of diskFaults on one disk.
type diskFault struct {
	kind    int
	disk    *albatest.Disk
	changed map[string]bool // values that have a wrong byte
}

func set(f asdtest.Fault) func(*faultRig, *albatest.Disk, *diskFault) {
	return func(_ *faultRig, d *albatest.Disk, _ *diskFault) { d.Faulty.Set(f) }
}

func rot(r *faultRig, d *albatest.Disk, f *diskFault) { corrupt(r, d, f.changed) }

// faultCase is what happens in one round: kinds on disks, one after the other.
type faultCase struct{ kinds, disks []int }

func (c faultCase) String() string {
	s := ""
	for i, k := range c.kinds {
		s += fmt.Sprintf("%s %d ", diskFaults[k].name, c.disks[i])
	}
	return s
}

// faultPlan is a preset, on as many disks that with m of them gone there are enough for
// its last policy. All of its policies can lose m disks and are acknowledged when all
// is stored, so that no m faults may lose anything, at whatever time they come.
type faultPlan struct {
	policies []control.Policy
	disks    int
	parts    int // in which the cases run beside each other
}

var faultPlans = []faultPlan{
	{[]control.Policy{{K: 1, M: 1, C: 2, X: 1}}, 3, 1},
	{[]control.Policy{{K: 2, M: 1, C: 3, X: 1}, {K: 1, M: 1, C: 2, X: 1}}, 3, 1},
	{[]control.Policy{{K: 2, M: 2, C: 4, X: 1}, {K: 1, M: 2, C: 3, X: 1}}, 5, 2},
}

// cases are every kind of fault, or, where two disks may be lost, every pair of kinds:
// on one disk or pair of disks, either kind first, or, if all is set, on each.
func (p *faultPlan) cases(rng *rand.Rand, all bool) []faultCase {
	var list []faultCase
	hit := func(kinds ...int) {
		if !all {
			rng.Shuffle(len(kinds), func(i, j int) { kinds[i], kinds[j] = kinds[j], kinds[i] })
			list = append(list, faultCase{kinds, rng.Perm(p.disks)[:len(kinds)]})
			return
		}
		for i := range p.disks {
			if len(kinds) == 1 {
				list = append(list, faultCase{kinds, []int{i}})
				continue
			}
			for j := range p.disks {
				if i != j {
					list = append(list, faultCase{kinds, []int{i, j}})
				}
			}
		}
	}
	for a := range diskFaults {
		if p.policies[0].M == 1 {
			hit(a)
			continue
		}
		for b := range diskFaults {
			if b <= a || all {
				hit(a, b)
			}
		}
	}
	rng.Shuffle(len(list), func(i, j int) { list[i], list[j] = list[j], list[i] })
	return list
}

// TestP5EveryPairOfFaults: while a volume is written and verified, storage daemons are
// killed, stopped, filled, delayed, removed and replaced, and what they hold is
// corrupted, up to m of them at a time, each kind with each: no error, no wrong byte,
// and when it is over everything is as safe as before.
func TestP5EveryPairOfFaults(t *testing.T) {
	seed := *faultSeed
	if seed == 0 {
		seed = rand.Uint64()
	}
	for i := range faultPlans {
		p := &faultPlans[i]
		rng := rand.New(rand.NewPCG(seed, uint64(i)))
		cases := p.cases(rng, *faultsAll)
		cases = cases[len(cases)**faultSlice / *faultSlices : len(cases)*(*faultSlice+1) / *faultSlices]
		for part := range p.parts {
			cases, rng := cases[len(cases)*part/p.parts:len(cases)*(part+1)/p.parts], rand.New(rand.NewPCG(rng.Uint64(), 0))
			t.Run(fmt.Sprintf("%d+%d/%d", p.policies[0].K, p.policies[0].M, part), func(t *testing.T) {
				t.Parallel()
				t.Logf("-fault-seed %d, slice %d of %d", seed, *faultSlice, *faultSlices)
				r := newFaultRig(t, p.disks, 2*len(cases), p.policies, rng, func(c *Config) {
					if rng.IntN(2) == 0 {
						c.Backend.RepairAfter = Duration(time.Second) // rebuilt elsewhere while the fault lasts
					}
				})
				for n, c := range cases {
					begun := time.Now()
					r.round(c)
					t.Logf("%d of %d: %vin %v", n+1, len(cases), c, time.Since(begun))
				}
			})
		}
	}
}

// round has the faults of a case begin one after the other, last and end, under load.
func (r *faultRig) round(c faultCase) {
	r.Helper()
	defer func() {
		if r.Failed() {
			r.Logf("in the round of %v", c)
		}
	}()
	r.start()
	r.progress()
	var faults []*diskFault
	damaged := false
	for i, kind := range c.kinds {
		f := &diskFault{kind, r.active[c.disks[i]], map[string]bool{}}
		faults = append(faults, f)
		damaged = damaged || diskFaults[kind].again != nil
	}
	for _, f := range faults {
		diskFaults[f.kind].begin(r, f.disk, f)
		r.progress()
	}
	for _, f := range faults {
		if again := diskFaults[f.kind].again; again != nil {
			again(r, f.disk, f)
		}
	}
	r.progress()
	for _, f := range faults {
		if end := diskFaults[f.kind].end; end != nil {
			end(r, f.disk, f)
		}
		r.progress()
	}
	r.pause()
	r.settled(damaged)
}
