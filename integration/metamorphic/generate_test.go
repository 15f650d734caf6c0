package metamorphic

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
)

// Bounds of what the generator makes.
const (
	maxVolumes   = 6
	maxSnapshots = 4   // of one volume
	maxClusters  = 768 // of one volume
	volumeNames  = 9   // of each pool
)

// generator makes operations that fit a run's model, now and then some that don't.
type generator struct {
	r    *run
	rng  *rand.Rand
	next version
	draw []string // names of kinds, each as often as its weight
}

// newGenerator makes one that picks kinds by these weights; nil: by those of kinds.
func newGenerator(r *run, rng *rand.Rand, weights map[string]int) *generator {
	if weights == nil {
		weights = map[string]int{}
		for name, k := range kinds {
			weights[name] = k.weight
		}
	}
	g := &generator{r: r, rng: rng, next: 1}
	for _, name := range slices.Sorted(maps.Keys(weights)) {
		g.draw = append(g.draw, slices.Repeat([]string{name}, weights[name])...)
	}
	return g
}

// op makes the next operation.
func (g *generator) op() op {
	for {
		o := op{Kind: g.draw[g.rng.IntN(len(g.draw))]}
		if len(g.r.m.volumes) == 0 {
			o.Kind = "create"
		}
		if kinds[o.Kind].make(g, &o) {
			return o
		}
	}
}

// seed returns n versions that were not used before, the first of them.
func (g *generator) seed(n uint64) version {
	v := g.next
	g.next += n
	return v
}

func (g *generator) pick() *volume {
	names := g.r.m.names()
	if len(names) == 0 {
		return nil
	}
	return g.r.m.volumes[names[g.rng.IntN(len(names))]]
}

func (g *generator) nothing(*op) bool { return true }

func (g *generator) volume(o *op) bool {
	v := g.pick()
	if v != nil {
		o.Vol = v.name
	}
	return v != nil
}

// span picks sectors of a volume, whole clusters more often than not.
func (g *generator) span(v *volume, o *op, most uint64) {
	unit := v.block
	if g.rng.IntN(3) > 0 {
		unit = perCluster
		most = max(1, most/perCluster)
	}
	// A part of the volume is written to more often, so that it has garbage.
	size := v.sectors()
	if g.rng.IntN(2) == 0 {
		size = max(size/4, perCluster)
	}
	o.Vol = v.name
	o.Off = g.rng.Uint64N(size/unit) * unit
	o.N = min((1+g.rng.Uint64N(most))*unit, v.sectors()-o.Off)
}

func (g *generator) write(o *op) bool {
	v := g.pick()
	if v == nil || (v.template || v.readOnly) && g.rng.IntN(8) > 0 {
		return false
	}
	most := uint64(64)
	if g.rng.IntN(12) == 0 {
		most = 1024
	}
	g.span(v, o, most)
	o.Seed = g.seed(1)
	if g.rng.IntN(12) == 0 {
		o.Seed = 0 // zeroes that are written are data
	}
	if g.rng.IntN(20) == 0 {
		o.Mod = "fua"
	}
	return true
}

func (g *generator) rangeOf(o *op) bool {
	v := g.pick()
	if v == nil {
		return false
	}
	most := uint64(128)
	if g.rng.IntN(10) == 0 {
		most = v.sectors()
	}
	g.span(v, o, most)
	return true
}

func (g *generator) readRange(o *op) bool {
	if !g.rangeOf(o) {
		return false
	}
	o.Seed = g.rng.Uint64()
	if v := g.r.m.volumes[o.Vol]; len(v.snaps) > 0 && g.rng.IntN(4) == 0 {
		o.Snap = v.snaps[g.rng.IntN(len(v.snaps))].name
	}
	return true
}

func (g *generator) batch(o *op) bool {
	o.N = 2 + g.rng.Uint64N(7)
	o.Seed = g.seed(o.N)
	return g.volume(o)
}

func (g *generator) rings(o *op) bool {
	v := g.pick()
	if v == nil {
		return false
	}
	g.span(v, o, 64)
	o.Seed = g.seed(1)
	return true
}

func poolOf(name string) string {
	pool, _, _ := strings.Cut(name, "/")
	return pool
}

// newName picks a name that is free, or, seldom, one that is not.
func (g *generator) newName(pool string) (string, bool) {
	if len(g.r.m.volumes) >= maxVolumes {
		return "", false
	}
	for range 20 {
		name := fmt.Sprintf("%s/v%d", pool, g.rng.IntN(volumeNames))
		if g.r.m.volumes[name] == nil || g.rng.IntN(20) == 0 {
			return name, true
		}
	}
	return "", false
}

func (g *generator) anyPool() string { return []string{dirPool, objectPool}[g.rng.IntN(2)] }

func (g *generator) create(o *op) (ok bool) {
	o.Vol, ok = g.newName(g.anyPool())
	o.N = (1 + g.rng.Uint64N(maxClusters/2)) * perCluster
	if g.rng.IntN(2) == 0 {
		o.Mod = "4096"
	}
	if o.Kind == "import" {
		o.Seed = g.seed(1)
	}
	return ok
}

func (g *generator) delete(o *op) bool {
	if len(g.r.m.volumes) < 3 {
		return false
	}
	if g.rng.IntN(3) > 0 {
		o.Mod = "force"
	}
	if !g.volume(o) {
		return false
	}
	// Refused after a second of patience.
	return g.r.attached[o.Vol] == nil || g.rng.IntN(10) == 0
}

func (g *generator) snapshot(o *op) bool {
	v := g.pick()
	if v == nil || len(v.snaps) >= maxSnapshots {
		return false
	}
	o.Vol = v.name
	o.Snap = fmt.Sprint("s", g.rng.IntN(3*maxSnapshots))
	s, _ := v.find(o.Snap)
	return s == nil || g.rng.IntN(10) == 0
}

func (g *generator) snapshotOf(o *op) bool {
	v := g.pick()
	if v == nil || len(v.snaps) == 0 {
		return false
	}
	o.Vol, o.Snap = v.name, v.snaps[g.rng.IntN(len(v.snaps))].name
	return true
}

func (g *generator) renameSnapshot(o *op) bool {
	o.To = fmt.Sprint("s", g.rng.IntN(3*maxSnapshots))
	return g.snapshotOf(o) && o.To != o.Snap
}

func (g *generator) rollback(o *op) bool {
	if g.rng.IntN(4) > 0 {
		o.Mod = "force"
	}
	return g.snapshotOf(o)
}

func (g *generator) clone(o *op) (ok bool) {
	if !g.snapshotOf(o) {
		return false
	}
	if g.r.m.volumes[o.Vol].template && g.rng.IntN(2) == 0 {
		o.Snap = ""
	}
	if g.rng.IntN(3) == 0 {
		o.N = g.rng.Uint64N(64) * perCluster
	}
	o.To, ok = g.newName(poolOf(o.Vol))
	return ok
}

func (g *generator) resize(o *op) bool {
	v := g.pick()
	if v == nil {
		return false
	}
	o.Vol = v.name
	n := 1 + g.rng.IntN(maxClusters)
	if n < len(v.cells)/2 && g.rng.IntN(3) > 0 {
		n += len(v.cells) / 2
	}
	o.N = uint64(n) * perCluster
	if g.rng.IntN(4) > 0 {
		o.Mod = "force"
	}
	return true
}

// toggle turns what a volume is on, or, more often, off.
func (g *generator) toggle(o *op) bool {
	v := g.pick()
	if v == nil || len(v.snaps) > maxSnapshots || g.r.attached[v.name] != nil && g.rng.IntN(20) > 0 {
		return false
	}
	o.Vol = v.name
	o.To = "off"
	if is := o.Kind == "template" && v.template || o.Kind == "readonly" && v.readOnly; !is {
		o.To = "on"
	}
	return true
}

func (g *generator) copy(o *op) (ok bool) {
	if !g.snapshotOf(o) {
		return false
	}
	o.To, ok = g.newName(g.anyPool())
	return ok
}

// increment finds two volumes of which one has the other's newest snapshot and a later
// one.
func (g *generator) increment(o *op) bool {
	for range 10 {
		if !g.snapshotOf(o) {
			return false
		}
		to := g.pick()
		if to.name == o.Vol || len(to.snaps) == 0 || len(to.snaps) > maxSnapshots {
			continue
		}
		v := g.r.m.volumes[o.Vol]
		_, upTo := v.find(o.Snap)
		since := slices.IndexFunc(v.snaps, func(s *snapshot) bool { return s.id == to.snaps[len(to.snaps)-1].id })
		if since >= 0 && since < upTo {
			o.To = to.name
			return true
		}
	}
	return false
}

func (g *generator) tick(o *op) bool {
	o.N = []uint64{0, 4, 70}[g.rng.IntN(3)]
	return true
}

func (g *generator) diskFails(*op) bool { return !g.r.w.settings.DirOnly }

// disk leaves which one to what there is then.
func (g *generator) disk(o *op) bool {
	o.N = g.rng.Uint64N(diskSlots)
	return !g.r.w.settings.DirOnly
}

func (g *generator) addDisk(o *op) bool {
	if g.rng.IntN(2) == 0 {
		o.Mod = "wipe"
	}
	return g.disk(o)
}

func (g *generator) newKey(o *op) bool {
	return g.rotate(o) && len(g.r.w.keyring) < maxKeys && g.death(o)
}

func (g *generator) rotate(*op) bool {
	s := g.r.w.settings
	return !s.DirOnly && s.Encrypt != "none"
}

// rebuild picks how the daemon ends before its registry is lost.
func (g *generator) rebuild(o *op) bool {
	o.Mod = []string{"", "kill", "power"}[g.rng.IntN(3)]
	if g.rng.IntN(3) == 0 {
		o.Mod = strings.TrimPrefix(o.Mod+",twice", ",")
	}
	return g.r.w.settings.Objects && g.death(o)
}

func (g *generator) death(o *op) bool {
	o.Seed = g.rng.Uint64()
	return true
}

func (g *generator) doom(o *op) bool {
	o.N = 1 + g.rng.Uint64N(400)
	if g.rng.IntN(2) == 0 {
		o.Mod = "power"
	}
	return g.death(o)
}
