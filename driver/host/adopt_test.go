package host_test

import (
	"bytes"
	"context"
	"errors"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"scoria/alba"
	"scoria/alba/albatest"
	"scoria/alba/asd"
	"scoria/alba/vfs"
	"scoria/driver"
	"scoria/driver/host"
	"scoria/driver/host/objecttest"
	"scoria/driver/registry"
)

// sharesFile says whether a file below dir is the same as the named one.
func sharesFile(t *testing.T, dir, name string) bool {
	t.Helper()
	want, err := os.Stat(name)
	if err != nil {
		t.Fatal(err)
	}
	shared := false
	err = filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || path == name {
			return err
		}
		info, err := d.Info()
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		shared = shared || err == nil && os.SameFile(info, want)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return shared
}

// TestAdoptedObject: with one copy on a disk of this process the store shares the
// driver's file; the object is read, repeated, fenced, stored anew under another
// policy and deleted like a copied one.
func TestAdoptedObject(t *testing.T) {
	ctx := context.Background()
	dir := t.TempDir()
	reg, err := registry.Open(filepath.Join(dir, "registry.db"))
	if err != nil {
		t.Fatal(err)
	}
	defer reg.Close()
	ps := albatest.Preset(alba.Policy{K: 1, M: 0, C: 1, X: 1})
	store, err := objecttest.Open(host.AlbaRegistry{Store: reg}, vfs.OS(), dir, 1, ps)
	if err != nil {
		t.Fatal(err)
	}
	defer store.Close()
	p := store.Proxy
	check := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	check(store.CreateNamespace(ctx, "ns"))
	check(store.Fence(ctx, "ns", 2))

	b := make([]byte, 700<<10)
	rng := rand.NewChaCha8([32]byte{1})
	rng.Read(b)
	local := filepath.Join(dir, "sco")
	check(os.WriteFile(local, b, 0o600))
	obj := driver.Object{Data: bytes.NewReader(b), Size: int64(len(b)), LocalPath: local}
	if err := store.Put(ctx, "ns", "o", 1, obj); !errors.Is(err, driver.ErrStaleEpoch) {
		t.Fatalf("put by a stale owner: %v", err)
	}
	if sharesFile(t, filepath.Join(dir, "asd0"), local) {
		t.Fatal("a stale owner's file was taken")
	}
	check(store.Put(ctx, "ns", "o", 2, obj))
	check(store.Put(ctx, "ns", "o", 2, obj)) // repeated
	if n := p.Counters().Adopted.Load(); n != 1 || !sharesFile(t, filepath.Join(dir, "asd0"), local) {
		t.Fatalf("%d objects were adopted, want 1", n)
	}
	same := func(name string) {
		t.Helper()
		got := make([]byte, len(b))
		if err := store.ReadAt(ctx, "ns", name, got, 0); err != nil || !bytes.Equal(got, b) {
			t.Fatalf("read %s: equal %v, %v", name, bytes.Equal(got, b), err)
		}
		if err := store.ReadAt(ctx, "ns", name, got[:5000], 123_456); err != nil || !bytes.Equal(got[:5000], b[123_456:128_456]) {
			t.Fatalf("partial read of %s: %v", name, err)
		}
	}
	same("o")

	// The writer's checksums are what counts.
	sums := make([]uint32, len(b)/4096)
	for i := range sums {
		sums[i] = asd.CRC(b[i*4096 : (i+1)*4096])
	}
	sums[5] ^= 1
	obj.Sums = func() ([]uint32, error) { return sums, nil }
	check(store.Put(ctx, "ns", "rotten", 2, obj))
	if err := store.ReadAt(ctx, "ns", "rotten", make([]byte, 4096), 5*4096); err == nil {
		t.Fatal("a page that is not what its writer wrote is read")
	}
	check(store.Delete(ctx, "ns", "rotten", 2))

	// Two disks: real copies.
	_, err = p.AddDevice(ctx, alba.Device{Address: filepath.Join(dir, "asd1"), Host: "h"})
	check(err)
	ps.Policies = []alba.Policy{{K: 1, M: 1, C: 2, X: 1}, {K: 1, M: 0, C: 1, X: 1}}
	check(p.SetPreset(ctx, ps))
	check(p.Restore(ctx, "ns", "o", func(context.Context, int64) error { return nil }))
	same("o")
	obj.Sums = nil
	check(store.Put(ctx, "ns", "o2", 2, obj))
	same("o2")
	if n := p.Counters().Adopted.Load(); n != 2 {
		t.Fatalf("%d objects were adopted, want 2: a mirrored one is not", n)
	}
	check(os.Remove(local))
	same("o")
	check(store.DeleteNamespace(ctx, "ns"))
}
