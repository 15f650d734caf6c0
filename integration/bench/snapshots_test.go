package main

import "testing"

// TestSnapshotFigures: the longest writes with snapshots and without do not change
// places, and the slowest snapshot is not lost in a median.
func TestSnapshotFigures(t *testing.T) {
	times := snapshotTimes{
		snapshots: []float64{1, 2, 9}, clones: []float64{3, 4, 5, 20},
		withMax: []float64{7, 8, 30}, withoutMax: []float64{0.5, 6, 0.25},
	}
	want := []float64{2, 9, 4.5, 20, 8, 30, 0.5, 6}
	figures := times.figures()
	if len(figures) != len(want) {
		t.Fatalf("%d figures, want %d: %+v", len(figures), len(want), figures)
	}
	for i, f := range figures {
		if f.Value != want[i] || f.Unit != "ms" {
			t.Errorf("%q is %v %s, want %v ms", f.Title, f.Value, f.Unit, want[i])
		}
	}
}
