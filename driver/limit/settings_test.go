package limit

import (
	"math"
	"strings"
	"testing"
)

func TestSettingsOver(t *testing.T) {
	pool := Settings{ReadIOPS: ptr(uint64(100)), WriteBPS: ptr(uint64(1 << 20)), Burst: ptr(2.0)}
	volume := Settings{ReadIOPS: ptr(uint64(0)), TotalIOPS: ptr(uint64(7))}
	got := volume.Over(pool)
	if *got.ReadIOPS != 0 || *got.TotalIOPS != 7 || *got.WriteBPS != 1<<20 || *got.Burst != 2 || got.WriteIOPS != nil {
		t.Fatalf("%+v", got)
	}
	if *pool.ReadIOPS != 100 || volume.WriteBPS != nil {
		t.Fatal("Over changed what it was given")
	}
	for _, name := range Names {
		if err := got.Unset(name); err != nil {
			t.Fatal(err)
		}
		if _, set := got.Value(name); set {
			t.Fatalf("%s is still set", name)
		}
	}
	if !got.IsZero() {
		t.Fatalf("%+v is left", got)
	}
	if err := got.Unset("colour"); err == nil || !strings.Contains(err.Error(), "read_iops") {
		t.Fatalf("unknown name: %v", err)
	}
}

func TestSettingsCheck(t *testing.T) {
	for _, tt := range []struct {
		set  Settings
		want string // in the error; empty: valid
	}{
		{Settings{}, ""},
		{Settings{ReadBPS: ptr(uint64(0)), Burst: ptr(0.0)}, ""},
		{Settings{ReadBPS: ptr(uint64(MinBPS)), ReadIOPS: ptr(uint64(1)), BurstBytes: ptr(MaxDepth)}, ""},
		{Settings{ReadBPS: ptr(uint64(MinBPS - 1))}, "read_bps 4095"},
		{Settings{TotalBPS: ptr(uint64(MaxRate + 1))}, "total_bps"},
		{Settings{WriteIOPS: ptr(uint64(MaxRate + 1))}, "write_iops"},
		{Settings{BurstRequests: ptr(MaxDepth + 1)}, "burst_requests"},
		{Settings{Burst: ptr(-1.0)}, "burst_seconds -1"},
		{Settings{Burst: ptr(0.001)}, "burst_seconds"},
		{Settings{Burst: ptr(math.NaN())}, "burst_seconds"},
		{Settings{Burst: ptr(math.Inf(1))}, "burst_seconds"},
	} {
		err := tt.set.Check()
		if tt.want == "" && err != nil || tt.want != "" && (err == nil || !strings.Contains(err.Error(), tt.want)) {
			t.Errorf("%+v: %v; want %q", tt.set, err, tt.want)
		}
	}
}
