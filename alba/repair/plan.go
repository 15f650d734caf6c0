package repair

import (
	"cmp"
	"maps"
	"slices"

	"scoria/alba"
)

// Condition is what a device means for the shards on it.
type Condition uint8

// Conditions of a device.
const (
	Fine    Condition = iota
	Away              // down, but not for long: nothing is done yet
	Leaving           // readable, to be emptied: drained, or its key-value store is damaged
	Gone              // down for long, removed, or unknown
)

// Assessment is how safe an object is.
type Assessment struct {
	// Spare is how many more devices may be lost before the object is: the shards
	// that can be read now, less k. Negative: it can't be read now.
	Spare int
	// Disks is the same in whole disks, the worst ones: fewer if a disk may hold
	// several shards.
	Disks int
	// Missing are shards that must be written elsewhere, Leaving those to be moved.
	Missing, Leaving int
}

// Needs says whether there is something to do.
func (a Assessment) Needs() bool { return a.Missing+a.Leaving > 0 }

// Assess looks at an object's shards. Pure.
func Assess(m *alba.Manifest, condition func(device string) Condition) Assessment {
	a := Assessment{Spare: -m.Policy.K}
	onDisk := map[string]int{}
	for _, id := range m.Shards {
		if id == "" {
			a.Missing++
			continue
		}
		switch condition(id) {
		case Fine:
			a.Spare++
			onDisk[id]++
		case Leaving:
			a.Spare++
			a.Leaving++
			onDisk[id]++
		case Gone:
			a.Missing++
		}
	}
	if a.Disks = a.Spare; a.Spare > 0 {
		a.Disks = disksToLose(onDisk, a.Spare)
	}
	return a
}

// disksToLose is how many of the fullest disks hold at most spare shards together.
func disksToLose(onDisk map[string]int, spare int) int {
	counts := slices.Sorted(maps.Values(onDisk))
	slices.Reverse(counts)
	for i, n := range counts {
		if spare -= n; spare < 0 {
			return i
		}
	}
	return len(counts)
}

// task is an object that needs something.
type task struct {
	namespace, object string
	Assessment
	bad     map[int]bool
	upgrade bool
}

// urgency is the spare by which the object is paced: what has lost nothing and is only
// to be moved can wait, however few disks it may lose by its policy.
func (t *task) urgency() int {
	if t.Missing == 0 && len(t.bad) == 0 {
		return unhurried
	}
	return t.Spare
}

// order sorts tasks by risk: those that can lose the fewest more devices first; of
// these the ones with shards missing before those with shards to be moved, then
// those that only can be stored better. Pure.
func order(tasks []task) {
	slices.SortStableFunc(tasks, func(a, b task) int {
		return cmp.Or(cmp.Compare(a.Spare, b.Spare), cmp.Compare(b.Missing+len(b.bad), a.Missing+len(a.bad)), cmp.Compare(b.Leaving, a.Leaving))
	})
}

// Better says whether an object that is stored under policy had better be stored
// anew under the policy of that index in its preset. Pure.
func Better(ps *alba.Preset, policy alba.Policy, index int) bool {
	at := slices.Index(ps.Policies, policy)
	return at < 0 || index < at
}
