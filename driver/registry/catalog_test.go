package registry_test

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"

	"scoria/driver/limit"
	"scoria/driver/registry"
)

func TestNames(t *testing.T) {
	good := map[string][2]string{
		"vm1":                          {"default", "vm1"},
		"fast/vm-1.root_disk":          {"fast", "vm-1.root_disk"},
		"0/9":                          {"0", "9"},
		"p/" + strings.Repeat("a", 63): {"p", strings.Repeat("a", 63)},
	}
	for in, want := range good {
		pool, name, err := registry.SplitName(in)
		if err != nil || pool != want[0] || name != want[1] {
			t.Errorf("SplitName(%q) = %q, %q, %v; want %q", in, pool, name, err, want)
		}
	}
	bad := map[string]string{
		"":                      "volume name \"\" is empty",
		"/vm":                   "pool name \"\" is empty",
		"fast/":                 "volume name \"\" is empty",
		"VM1":                   "has capital letters",
		"-vm":                   "begins with \"-\"",
		".":                     "begins with \".\"",
		"a/b/c":                 "has a character that is not allowed",
		"a b":                   "has a character that is not allowed",
		"vm\n":                  "has a character that is not allowed",
		"../../etc":             "begins with \".\"",
		strings.Repeat("a", 64): "has 64 characters",
		"vm@snap":               "has a character that is not allowed",
	}
	for in, want := range bad {
		_, _, err := registry.SplitName(in)
		if err == nil || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), "must be 1 to 63 of a-z") {
			t.Errorf("SplitName(%q): %v; want %q and what would be right", in, err, want)
		}
	}
}

func sampleVolume() registry.Volume {
	return registry.Volume{
		ID:   uuid.MustParse("6ba7b810-9dad-41d1-80b4-00c04fd430c8"),
		Pool: "default", Name: "vm1", Size: 10 << 30, BlockSize: 512, SCOSize: 64 << 20,
		Serial: "6ba7b8109dad41d1", Created: time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC),
		State: registry.StateReady, Owner: "n1", Epoch: 3,
	}
}

func TestCatalog(t *testing.T) {
	s := open(t, filepath.Join(t.TempDir(), "registry.db"))
	ctx := t.Context()
	v := sampleVolume()
	key := registry.VolumeKey(v.Pool, v.Name)
	if _, err := registry.Load[registry.Volume](ctx, s, key); !errors.Is(err, registry.ErrNotFound) {
		t.Fatalf("Load of nothing: %v", err)
	}
	e, err := registry.Create(ctx, s, key, v)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := registry.Create(ctx, s, key, v); !errors.Is(err, registry.ErrExist) {
		t.Fatalf("second Create: %v; want ErrExist", err)
	}
	got, err := registry.Load[registry.Volume](ctx, s, key)
	v.Version = registry.RecordVersion
	if err != nil || !reflect.DeepEqual(got.Record, v) || got.Revision != e.Revision {
		t.Fatalf("Load: %+v, %v; want %+v", got, err, v)
	}
	var wg sync.WaitGroup
	for range 5 {
		wg.Go(func() {
			if _, err := registry.Update(ctx, s, key, func(v *registry.Volume) error { v.Epoch++; return nil }); err != nil {
				t.Errorf("Update: %v", err)
			}
		})
	}
	wg.Wait()
	all, err := registry.LoadAll[registry.Volume](ctx, s, registry.VolumePrefix)
	if err != nil || len(all) != 1 || all[0].Record.Epoch != 8 {
		t.Fatalf("LoadAll: %+v, %v; want epoch 8", all, err)
	}
	if err := registry.Remove(ctx, s, key, e.Revision); !errors.Is(err, registry.ErrConflict) {
		t.Fatalf("Remove at an old revision: %v; want ErrConflict", err)
	}
	if err := registry.Remove(ctx, s, key, all[0].Revision); err != nil {
		t.Fatal(err)
	}
}

func TestRecordsOfOthersAreRefused(t *testing.T) {
	s := open(t, filepath.Join(t.TempDir(), "registry.db"))
	for key, value := range map[string]string{
		"volume/a/newer":   `{"version":4,"id":"x"}`,
		"volume/a/none":    `{}`,
		"volume/a/unknown": `{"version":1,"colour":"red"}`,
		"volume/a/text":    `hello`,
	} {
		if _, err := s.Commit(t.Context(), nil, []registry.Write{{Key: key, Value: []byte(value)}}); err != nil {
			t.Fatal(err)
		}
		if e, err := registry.Load[registry.Volume](t.Context(), s, key); err == nil {
			t.Errorf("%s: %+v; want an error", key, e)
		}
	}
}

// samples are records of every kind, with every field set.
func samples() map[string]any {
	created := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	parent, snapshot := uuid.MustParse("6ba7b811-9dad-41d1-80b4-00c04fd430c8"), uuid.MustParse("6ba7b812-9dad-41d1-80b4-00c04fd430c8")
	clone := sampleVolume()
	clone.Name, clone.Template, clone.RollingBack = "vm2", true, &snapshot
	clone.Parent = &registry.Parent{Volume: parent, Snapshot: snapshot, Name: "default/vm1@s"}
	clone.Ancestors = []registry.Ancestor{{Volume: parent, Snapshot: snapshot}}
	limits := &limit.Settings{ReadIOPS: new(uint64), Burst: new(float64)}
	*limits.Burst = 2.5
	clone.Limits = limits
	clone.Incomplete = &registry.Incomplete{Kind: registry.IncompleteReceive, Base: parent, Snapshot: snapshot, Position: 4096, Resumable: true}
	return map[string]any{
		"volume/default/vm1": sampleVolume(),
		"volume/default/vm2": clone,
		"pool/default":       registry.Pool{Name: "default", BlockSize: 512, SCOSize: 64 << 20, Created: created},
		"pool/fast":          registry.Pool{Name: "fast", BlockSize: 4096, SCOSize: 4 << 20, Created: created, Limits: limits},
		"node/n1":            registry.Node{ID: "n1", Host: "h", Created: created, Attached: []string{"default/vm1"}},
		registry.SnapshotKey(sampleVolume().ID, "s"): registry.Snapshot{
			ID: snapshot, Volume: sampleVolume().ID, Name: "s", Created: created, Metadata: map[string]string{"by": "me"},
			Size: 1 << 30, SCO: 7, Sequence: 9, LastObject: 11, State: registry.StateReady, Temporary: true,
		},
		registry.SnapshotKey(sampleVolume().ID, "found"): registry.Snapshot{
			ID: parent, Volume: sampleVolume().ID, Name: "found", Created: created, Size: 1 << 30, Sequence: 10,
			State: registry.StateReady, Adopted: true,
		},
		registry.PoolScheduleKey("fast"):     registry.Schedule{Pool: "fast", Rules: []string{"daily at 02:30 keep 7"}, Zone: "Europe/Brussels", Since: created},
		registry.VolumeScheduleKey(clone.ID): registry.Schedule{Volume: clone.ID, Rules: []string{}, Since: created},
		registry.RunKey(clone.ID): registry.ScheduleRun{
			Volume: clone.ID, Since: created, Done: created, Made: "auto-20260102-030405", MadeAt: created, MissedAt: created,
			Missed: []registry.MissedSlots{{Rule: "daily at 02:30 keep 7", Count: 3, First: created, Last: created}},
		},
	}
}

// TestGoldenRecords holds the present version of the records.
func TestGoldenRecords(t *testing.T) {
	s := open(t, filepath.Join(t.TempDir(), "registry.db"))
	for key, r := range samples() {
		var err error
		switch r := r.(type) {
		case registry.Volume:
			_, err = registry.Create(t.Context(), s, key, r)
		case registry.Pool:
			_, err = registry.Create(t.Context(), s, key, r)
		case registry.Node:
			_, err = registry.Create(t.Context(), s, key, r)
		case registry.Snapshot:
			_, err = registry.Create(t.Context(), s, key, r)
		case registry.Schedule:
			_, err = registry.Create(t.Context(), s, key, r)
		case registry.ScheduleRun:
			_, err = registry.Create(t.Context(), s, key, r)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	kvs, err := s.List(t.Context(), "")
	if err != nil {
		t.Fatal(err)
	}
	var got strings.Builder
	for _, kv := range kvs {
		got.WriteString(kv.Key + "\t" + string(kv.Value) + "\n")
	}
	golden := filepath.Join("testdata", "records_v3.txt")
	if *update {
		if err := os.WriteFile(golden, []byte(got.String()), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(golden)
	if err != nil {
		t.Fatal(err)
	}
	if got.String() != string(want) {
		t.Fatalf("records\n%s\nwant\n%s", &got, want)
	}
}

// TestRecordsOfEveryVersionOpen: what earlier programs wrote is read, and means
// what it meant.
func TestRecordsOfEveryVersionOpen(t *testing.T) {
	for _, version := range []int{1, 2, 3} {
		s := open(t, filepath.Join(t.TempDir(), "registry.db"))
		b, err := os.ReadFile(filepath.Join("testdata", fmt.Sprintf("records_v%d.txt", version)))
		if err != nil {
			t.Fatal(err)
		}
		want := samples()
		for line := range strings.Lines(string(b)) {
			key, value, _ := strings.Cut(strings.TrimSpace(line), "\t")
			if _, err := s.Commit(t.Context(), nil, []registry.Write{{Key: key, Value: []byte(value)}}); err != nil {
				t.Fatal(err)
			}
			switch w := want[key].(type) {
			case registry.Volume:
				w.Version = version
				same(t, s, key, w)
			case registry.Pool:
				w.Version = version
				same(t, s, key, w)
			case registry.Node:
				w.Version = version
				same(t, s, key, w)
			case registry.Snapshot:
				w.Version = version
				same(t, s, key, w)
			case registry.Schedule:
				w.Version = version
				same(t, s, key, w)
			case registry.ScheduleRun:
				w.Version = version
				same(t, s, key, w)
			default:
				t.Errorf("version %d: nothing to compare %s with", version, key)
			}
		}
	}
}

func same[R registry.Record](t *testing.T, s registry.Store, key string, want R) {
	t.Helper()
	e, err := registry.Load[R](t.Context(), s, key)
	if err != nil || !reflect.DeepEqual(e.Record, want) {
		t.Errorf("%s: %+v, %v; want %+v", key, e.Record, err, want)
	}
}
