package repair

import (
	"os"
	"testing"
	"time"

	"scoria/alba"
)

func conditions(m map[string]Condition) func(string) Condition {
	return func(id string) Condition {
		if c, ok := m[id]; ok {
			return c
		}
		return Gone
	}
}

func TestAssess(t *testing.T) {
	cond := conditions(map[string]Condition{"a": Fine, "b": Fine, "c": Away, "d": Leaving, "e": Fine})
	for _, tt := range []struct {
		k      int
		shards []string
		want   Assessment
	}{
		{2, []string{"a", "b", "e"}, Assessment{Spare: 1, Disks: 1}},
		{2, []string{"a", "b", ""}, Assessment{Spare: 0, Missing: 1}},
		{2, []string{"a", "c", "x"}, Assessment{Spare: -1, Disks: -1, Missing: 1}},
		{1, []string{"a", "d", "c"}, Assessment{Spare: 1, Disks: 1, Leaving: 1}},
		{2, []string{"a", "a", "b", "b", "e"}, Assessment{Spare: 3, Disks: 1}}, // two of the full ones are too many
		{1, []string{"a", "b", "e"}, Assessment{Spare: 2, Disks: 2}},
	} {
		m := &alba.Manifest{Policy: alba.Policy{K: tt.k}, Shards: tt.shards}
		if got := Assess(m, cond); got != tt.want {
			t.Errorf("k %d of %q: %+v, want %+v", tt.k, tt.shards, got, tt.want)
		}
	}
}

// TestOrder: what can lose the fewest more disks comes first.
func TestOrder(t *testing.T) {
	tasks := []task{
		{object: "upgrade", Assessment: Assessment{Spare: 2}, upgrade: true},
		{object: "drain", Assessment: Assessment{Spare: 2, Leaving: 1}},
		{object: "one missing", Assessment: Assessment{Spare: 1, Missing: 1}},
		{object: "last chance", Assessment: Assessment{Spare: 0, Missing: 2}},
		{object: "bad", Assessment: Assessment{Spare: 1}, bad: map[int]bool{1: true, 2: true}},
		{object: "unreadable", Assessment: Assessment{Spare: -1, Missing: 3}},
	}
	order(tasks)
	for i, want := range []string{"unreadable", "last chance", "bad", "one missing", "drain", "upgrade"} {
		if tasks[i].object != want {
			t.Errorf("%d: %s, want %s", i, tasks[i].object, want)
		}
	}
}

func TestBetter(t *testing.T) {
	first, second := alba.Policy{K: 4, M: 2, C: 5, X: 1}, alba.Policy{K: 2, M: 1, C: 2, X: 1}
	ps := &alba.Preset{Policies: []alba.Policy{first, second}}
	for _, tt := range []struct {
		now   alba.Policy
		index int
		want  bool
	}{{first, 0, false}, {second, 0, true}, {second, 1, false}, {first, 1, false}, {alba.Policy{K: 1, C: 1, X: 1}, 1, true}} {
		if got := Better(ps, tt.now, tt.index); got != tt.want {
			t.Errorf("%v and policy %d: %v", tt.now, tt.index, got)
		}
	}
}

// TestGoldenJob: jobs that an earlier version left are understood.
func TestGoldenJob(t *testing.T) {
	at := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	j := Job{Version: JobVersion, Name: JobVerify, State: JobRunning, By: "n", Started: at, Updated: at.Add(time.Minute), Done: 1, Total: 4, Bytes: 5, Problems: 6, Cursor: "d\nx", Message: "m"}
	const name = "testdata/job.json"
	want, err := os.ReadFile(name)
	if err != nil {
		t.Fatalf("%v; want %s", err, j.encode())
	}
	if string(j.encode())+"\n" != string(want) {
		t.Errorf("job is encoded as %s", j.encode())
	}
	got, err := decodeJob(want)
	if err != nil || got != j {
		t.Errorf("%+v: %v", got, err)
	}
	if eta, ok := got.ETA(); !ok || eta != 3*time.Minute {
		t.Errorf("ETA %v, %v", eta, ok)
	}
	for _, bad := range []string{`{"version":2}`, `{"version":1,"x":1}`, `{`} {
		if _, err := decodeJob([]byte(bad)); err == nil {
			t.Errorf("%s was accepted", bad)
		}
	}
}
