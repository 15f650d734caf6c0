package main

import "testing"

func TestParseFio(t *testing.T) {
	const out = `note: both iodepth >= 1 and synchronous I/O engine are selected
{"jobs": [{"read": {"total_ios": 0, "iops": 0}, "write": {"total_ios": 10, "iops": 20.5, "clat_ns": {"percentile": {"50.000000": 1500, "99.900000": 9000}}}}]}`
	r, err := parseFio([]byte(out))
	if want := (fioResult{ios: 10, iops: 20.5, p50: 1.5, p999: 9}); err != nil || r != want {
		t.Fatalf("%+v, %v; want %+v", r, err, want)
	}
	for _, bad := range []string{"", "no JSON", `{"jobs": []}`, `{"jobs": [{}]}`} {
		if _, err := parseFio([]byte(bad)); err == nil {
			t.Errorf("%q: accepted", bad)
		}
	}
}

// TestShmLines: ratios are of CPU time within a round.
func TestShmLines(t *testing.T) {
	row := shmJob{rw: "randwrite", depth: 32, jobs: 1}.name()
	lines := shmLinesOf(map[string]map[string][]shmSample{row: {
		shmName:   {{iops: 1000, cpu: 1}, {iops: 3000, cpu: 2}},
		tmpfsName: {{iops: 100, cpu: 4}, {iops: 300, cpu: 4}},
	}})
	if len(lines) != 2 || lines[0].Server != shmName || lines[0].IOPS.Median != 2000 || lines[0].AgainstIt != (spread{Median: 3, Min: 2, Max: 4, Rounds: 2}) || lines[0].Target != shmTarget {
		t.Fatalf("%+v", lines)
	}
	if lines[1].AgainstIt.Median != 1 || lines[1].Target != 0 {
		t.Fatalf("%+v", lines[1])
	}
}
