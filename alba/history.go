package alba

import (
	"crypto/rand"
	"fmt"
	"slices"
	"time"
)

// History says which generations of the registry there were. A generation begins when
// a daemon opens the registry, and at the latest after MaxPosition changes.
type History struct {
	Version int         `json:"version"`
	Starts  []Beginning `json:"starts"` // ascending, at most MaxBeginnings: the latest
	// Read has the positions that devices were at when the registry was rebuilt from
	// what they hold: it knows all that they were told before.
	Read map[string]Position `json:"read,omitempty"`
}

// Beginning is where a generation of the registry begins.
type Beginning struct {
	Generation uint64 `json:"generation"`
	// Revision of the registry is that of the generation's first change, the one that
	// recorded it. In the record of that change it is 0.
	Revision int64 `json:"revision"`
}

// MaxBeginnings bounds History.Starts.
const MaxBeginnings = 1024

// Position is how far a registry is: its generation, and how many changes it is behind
// that one's beginning in the low 22 bits. Devices keep the latest that they were told
// (PositionName). A registry that was put back from an older backup does not know
// it: either the generation began after the backup was taken, or it ended there before
// that change.
type Position uint64

const positionBits = 22

// MaxPosition is how many changes behind its beginning a generation may be.
const MaxPosition = 1<<positionBits - 1

// Generation of a position.
func (p Position) Generation() uint64 { return uint64(p) >> positionBits }

func (p Position) String() string {
	return fmt.Sprintf("%d.%d", p.Generation(), uint64(p)&MaxPosition)
}

// NextGeneration returns a number for a generation that begins now and is larger than
// those before: units of 16 seconds since 2020 and 14 random bits, so that those of a
// registry and of one that was put back from its backup are different ones.
func (h *History) NextGeneration(now time.Time) uint64 {
	const randomBits = 14
	var b [2]byte
	_, _ = rand.Read(b[:]) // never fails
	random := (uint64(b[0])<<8 | uint64(b[1])) & (1<<randomBits - 1)
	least := uint64(max(0, now.Unix()-1_577_836_800)) / 16 << randomBits
	if n := len(h.Starts); n > 0 {
		least = max(least, h.Starts[n-1].Generation+1)
	}
	for _, p := range h.Read {
		least = max(least, p.Generation()+1)
	}
	return min(least+random, 1<<(64-positionBits)-1)
}

// DecodeHistory parses the value of HistoryKey; of none it is empty.
func DecodeHistory(kv KV) (History, error) {
	if kv.Revision == 0 {
		return History{}, nil
	}
	h, err := Decode[History](kv.Value)
	if n := len(h.Starts); err == nil && n > 0 {
		h.Starts[n-1].Revision = kv.Revision
	}
	if err != nil {
		err = fmt.Errorf("%s: %w", kv.Key, err)
	}
	return h, err
}

// Begin appends a generation. It takes the oldest away if there are too many.
func (h *History) Begin(generation uint64) {
	h.Starts = append(h.Starts, Beginning{Generation: generation})
	if n := len(h.Starts); n > MaxBeginnings {
		h.Starts = slices.Delete(h.Starts, 0, n-MaxBeginnings)
	}
}

// At returns the position of a revision, or that of the last generation's beginning if it
// is later; ok is false if that one is too long, or there is none.
func (h *History) At(revision int64) (p Position, ok bool) {
	n := len(h.Starts)
	if n == 0 {
		return 0, false
	}
	b := h.Starts[n-1]
	if revision-b.Revision > MaxPosition {
		return 0, false
	}
	return Position(b.Generation<<positionBits | uint64(max(0, revision-b.Revision))), true
}

// Knows says whether a registry with this history, which is at the revision, has all
// that the device was told when it was told the position.
func (h *History) Knows(device string, p Position, revision int64) bool {
	if p <= h.Read[device] {
		return true // also of a device that was never told anything
	}
	for i, b := range h.Starts {
		if b.Generation != p.Generation() {
			continue
		}
		end := revision
		if i+1 < len(h.Starts) {
			end = h.Starts[i+1].Revision - 1
		}
		return b.Revision+int64(uint64(p)&MaxPosition) <= end
	}
	// Of one so old that the history does not reach back to it nothing can be said.
	return len(h.Starts) == MaxBeginnings && p.Generation() < h.Starts[0].Generation
}
