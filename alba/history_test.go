package alba

import (
	"testing"
	"time"
)

// TestHistoryKnows: a registry knows the changes of its generations, no other ones, and
// what it was rebuilt from.
func TestHistoryKnows(t *testing.T) {
	h := History{Starts: []Beginning{{5, 10}, {9, 20}, {12, 40}}, Read: map[string]Position{"read": 7<<positionBits | 3}}
	at := func(generation uint64, n uint64) Position { return Position(generation<<positionBits | n) }
	for _, c := range []struct {
		device string
		p      Position
		want   bool
	}{
		{"d", 0, true},          // was told nothing
		{"d", at(5, 0), true},   // a generation's beginning
		{"d", at(5, 9), true},   // its last change
		{"d", at(5, 10), false}, // a change of it that came after the backup
		{"d", at(9, 19), true},
		{"d", at(9, 20), false},
		{"d", at(12, 10), true}, // now
		{"d", at(12, 11), false},
		{"d", at(7, 0), false}, // generations that began after the backup
		{"d", at(13, 0), false},
		{"read", at(7, 3), true},
		{"read", at(7, 4), false},
	} {
		if got := h.Knows(c.device, c.p, 50); got != c.want {
			t.Errorf("%s at %v: %v", c.device, c.p, got)
		}
	}
	if p, ok := h.At(50); !ok || p != at(12, 10) {
		t.Errorf("revision 50 is at %v, %v", p, ok)
	}
	if p, ok := h.At(30); !ok || p != at(12, 0) {
		t.Errorf("revision 30 is at %v, %v", p, ok)
	}
	if _, ok := h.At(40 + MaxPosition + 1); ok {
		t.Error("a generation has no end")
	}
}

// TestHistoryGrows: generations grow whatever the clock says, two that begin at the same
// time differ, and the record stays small.
func TestHistoryGrows(t *testing.T) {
	var h History
	now := time.Date(2026, 11, 21, 0, 0, 0, 0, time.UTC)
	for i := range 2 * MaxBeginnings {
		h.Begin(h.NextGeneration(now.Add(-time.Duration(i) * time.Hour)))
	}
	for i := range h.Starts[1:] {
		if h.Starts[i+1].Generation <= h.Starts[i].Generation {
			t.Fatal("a generation is not larger than the one before")
		}
	}
	if len(h.Starts) != MaxBeginnings || len(Encode(h)) > 100<<10 {
		t.Errorf("%d generations in %d bytes", len(h.Starts), len(Encode(h)))
	}
	back, err := DecodeHistory(KV{Key: HistoryKey, Value: Encode(h), Revision: 77})
	if err != nil || back.Starts[MaxBeginnings-1].Revision != 77 {
		t.Errorf("decoded: %v", err)
	}
	if !back.Knows("d", Position(1<<positionBits), 100) {
		t.Error("what lies before the history is taken for unknown")
	}
	same := map[uint64]bool{}
	for range 8 {
		same[h.NextGeneration(now)] = true
	}
	if len(same) == 1 {
		t.Error("generations that begin at the same time are the same")
	}
	old := History{Starts: []Beginning{{1 << 41, 1}}}
	if old.NextGeneration(now) <= 1<<41 {
		t.Error("a clock that went back")
	}
}
