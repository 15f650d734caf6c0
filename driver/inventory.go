package driver

import (
	"context"
	"maps"
	"slices"
	"strings"
)

// inventory is what was found of a volume's SCOs.
type inventory struct {
	local     map[uint64]bool // of generation 0, as is uploaded
	uploaded  map[uint64]bool
	compacted map[uint64]map[uint32]copies // later generations
	chunks    map[uint64][]foundChunk
	highest   uint64
	taken     []*replaySCO
}

// giveBack leaves the pool's chunks to the next opening after one that failed:
// what they hold may exist nowhere else.
func (inv *inventory) giveBack(v *Volume) {
	for _, s := range inv.taken {
		if s.log != nil {
			v.eng.pool.abandon(s.log)
		}
		s.closeFiles()
	}
	for _, chunks := range inv.chunks {
		v.eng.pool.putBack(v.cfg.ID, chunks)
	}
}

func (v *Volume) takeInventory(ctx context.Context) (*inventory, error) {
	inv := &inventory{
		local: map[uint64]bool{}, uploaded: map[uint64]bool{}, chunks: map[uint64][]foundChunk{},
		compacted: map[uint64]map[uint32]copies{},
	}
	names, err := v.eng.cfg.FS.List(v.scoDir())
	if err != nil {
		return nil, err
	}
	for _, name := range names {
		if name, ok := strings.CutSuffix(name, scoSuffix); ok {
			if n, generation, ok := parseSCO(name); ok {
				inv.see(n, generation, copies{local: true})
			}
		}
	}
	objects, err := v.cfg.Store.List(ctx, v.namespace(), scoPrefix)
	if err != nil {
		return nil, err
	}
	for _, name := range objects {
		if n, generation, ok := parseSCO(strings.TrimPrefix(name, scoPrefix)); ok {
			inv.see(n, generation, copies{uploaded: true})
		}
	}
	for _, c := range v.eng.pool.takeFound(v.cfg.ID) {
		inv.chunks[c.sco] = append(inv.chunks[c.sco], c)
		inv.highest = max(inv.highest, c.sco)
	}
	return inv, nil
}

// copies is where a generation of a SCO lies.
type copies struct{ local, uploaded bool }

// see notes that a generation is there.
func (inv *inventory) see(n uint64, generation uint32, c copies) {
	inv.highest = max(inv.highest, n)
	if generation == 0 {
		if c.local {
			inv.local[n] = true
		}
		if c.uploaded {
			inv.uploaded[n] = true
		}
		return
	}
	if inv.compacted[n] == nil {
		inv.compacted[n] = map[uint32]copies{}
	}
	was := inv.compacted[n][generation]
	inv.compacted[n][generation] = copies{was.local || c.local, was.uploaded || c.uploaded}
}

// at is where a generation lies.
func (inv *inventory) at(n uint64, generation uint32) copies {
	if generation > 0 {
		return inv.compacted[n][generation]
	}
	return copies{inv.local[n], inv.uploaded[n]}
}

// generations lists those of a SCO that are there, the newest first.
func (inv *inventory) generations(n uint64) []uint32 {
	out := slices.Sorted(maps.Keys(inv.compacted[n]))
	slices.Reverse(out)
	if inv.local[n] || inv.uploaded[n] {
		out = append(out, 0)
	}
	return out
}

// numbers lists the SCOs of which there is anything, ascending.
func (inv *inventory) numbers() []uint64 {
	set := map[uint64]bool{}
	maps.Copy(set, inv.local)
	maps.Copy(set, inv.uploaded)
	for n := range inv.chunks {
		set[n] = true
	}
	for n := range inv.compacted {
		set[n] = true
	}
	return slices.Sorted(maps.Keys(set))
}
