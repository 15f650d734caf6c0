package registry_test

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"

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
	if err != nil || got.Record != v || got.Revision != e.Revision {
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
		"volume/a/newer":   `{"version":2,"id":"x"}`,
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

// TestGoldenRecords holds version 1 of the records.
func TestGoldenRecords(t *testing.T) {
	s := open(t, filepath.Join(t.TempDir(), "registry.db"))
	created := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	if _, err := registry.Create(t.Context(), s, "volume/default/vm1", sampleVolume()); err != nil {
		t.Fatal(err)
	}
	if _, err := registry.Create(t.Context(), s, "pool/default", registry.Pool{Name: "default", BlockSize: 512, SCOSize: 64 << 20, Created: created}); err != nil {
		t.Fatal(err)
	}
	if _, err := registry.Create(t.Context(), s, "node/n1", registry.Node{ID: "n1", Host: "h", Created: created, Attached: []string{"default/vm1"}}); err != nil {
		t.Fatal(err)
	}
	kvs, err := s.List(t.Context(), "")
	if err != nil {
		t.Fatal(err)
	}
	var got strings.Builder
	for _, kv := range kvs {
		got.WriteString(kv.Key + "\t" + string(kv.Value) + "\n")
	}
	golden := filepath.Join("testdata", "records_v1.txt")
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
