package host

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/rs/zerolog"

	"scoria/driver/block"
	"scoria/driver/control"
	"scoria/driver/registry"
)

// objectConfig keeps new pools in the object store, and nothing in caches.
func objectConfig(t *testing.T) Config {
	t.Helper()
	c := testConfig(t)
	c.Pool.Store, c.Pool.SCOSize = control.StoreObjects, 1<<20
	c.Cache.Local, c.Cache.Read = 0, 0
	return c
}

// TestDefaultPoolInTheObjectStore: a fresh data directory gets a storage daemon and a
// preset that one disk meets; what is written is read back from there after a
// restart, and is kept twice when a second disk is added.
func TestDefaultPoolInTheObjectStore(t *testing.T) {
	c := objectConfig(t)
	h, client := startHost(t, c)
	ctx := testContext(t)
	if p, err := client.Pool(ctx, registry.DefaultPool); err != nil || p.Store != control.StoreObjects || p.Preset != DefaultPreset {
		t.Fatalf("pool %+v, %v", p, err)
	}
	asds, err := client.ASDs(ctx)
	if err != nil || len(asds) != 1 || asds[0].Address != filepath.Join(c.DataDir, "asd") || !asds[0].Up {
		t.Fatalf("storage daemons %+v, %v", asds, err)
	}
	if _, err := client.CreateVolume(ctx, control.CreateVolume{Name: "v", Size: 64 << 20}); err != nil {
		t.Fatal(err)
	}
	const pages = 64
	fillVolume(t, h, "v", pages, 1)
	const closed = pages*64<<10/(1<<20) - 1 // the last SCO may be open still
	awaitSCOs(t, h, "v", closed)
	if n := h.objects.proxy.Counters().Adopted.Load(); n < closed {
		t.Fatalf("%d objects were adopted: of %d closed SCOs some were copied to the storage daemon on the same disk", n, closed)
	}
	if n, ok := worst(t, client); !ok || n != 0 {
		t.Fatalf("on one disk %d more may die (there are objects: %v), want 0", n, ok)
	}
	stopHost(t, h)

	h, client = startHost(t, c)
	defer stopHost(t, h)
	verifyVolume(t, h, "v", pages, 1)
	if h.objects.proxy.Counters().Reads.Load() == 0 {
		t.Fatal("nothing was read from the object store: the test reads elsewhere")
	}
	if asds, err := client.ASDs(ctx); err != nil || len(asds) != 1 {
		t.Fatalf("storage daemons after the restart %+v, %v", asds, err)
	}
	addDirs(t, client, 1)
	if _, err := client.StartBackendJob(ctx, "repair"); err != nil {
		t.Fatal(err)
	}
	await(t, "objects to be kept twice", func() bool { n, ok := worst(t, client); return ok && n == 1 })
	verifyVolume(t, h, "v", pages, 1)
}

// awaitSCOs waits until so many SCOs of an open volume are in the object store and their
// uploads have returned. Any object is not enough: the copy of the volume's record, which
// is small and not adopted, may be there before the first SCO is closed.
func awaitSCOs(t *testing.T, h *Host, name string, want int) {
	t.Helper()
	ctx := testContext(t)
	e, err := h.volumes.load(ctx, name)
	if err != nil {
		t.Fatal(err)
	}
	s, ns := h.volumes.storeOf(&e.Record), e.Record.ID.String()
	await(t, "SCOs to be in the object store", func() bool {
		stored, err := s.List(ctx, ns, "sco-")
		if err != nil {
			t.Fatal(err)
		}
		// A SCO is listed when it is committed, and leaves the backlog when its Put returned.
		return len(stored) >= want && h.volumes.device(e.Record.FullName()).Stats().UploadBacklog == 0
	})
}

func fillVolume(t *testing.T, h *Host, name string, pages int, seed byte) {
	t.Helper()
	dev, err := h.volumes.Open(testContext(t), name)
	if err != nil {
		t.Fatal(err)
	}
	for i := range pages {
		submitAt(t, dev, block.OpWrite, uint64(i)<<16, page(i, seed))
	}
	submitAt(t, dev, block.OpFlush, 0, nil)
}

func verifyVolume(t *testing.T, h *Host, name string, pages int, seed byte) {
	t.Helper()
	dev, err := h.volumes.Open(testContext(t), name)
	if err != nil {
		t.Fatal(err)
	}
	p := make([]byte, 64<<10)
	for i := range pages {
		submitAt(t, dev, block.OpRead, uint64(i)<<16, p)
		if string(p) != string(page(i, seed)) {
			t.Fatalf("page %d of %s differs", i, name)
		}
	}
}

// TestOldDataDirectoryKeepsItsStore: the pool of a data directory that was made with
// the directory store stays there, whatever the configuration says now; new pools
// follow the configuration, or what is asked for.
func TestOldDataDirectoryKeepsItsStore(t *testing.T) {
	c := objectConfig(t)
	c.Pool.Store = control.StoreDirectory
	h, client := startHost(t, c)
	ctx := testContext(t)
	if _, err := client.CreateVolume(ctx, control.CreateVolume{Name: "old", Size: 64 << 20}); err != nil {
		t.Fatal(err)
	}
	fillVolume(t, h, "old", 32, 2)
	if _, err := os.Stat(filepath.Join(c.DataDir, "asd")); !os.IsNotExist(err) {
		t.Fatalf("a storage daemon that nobody needs: %v", err)
	}
	stopHost(t, h)

	c.Pool.Store = control.StoreObjects
	h, client = startHost(t, c)
	defer stopHost(t, h)
	verifyVolume(t, h, "old", 32, 2)
	for _, want := range []control.Pool{
		{Name: "a", Store: control.StoreObjects, Preset: DefaultPreset},
		{Name: "b", Store: control.StoreDirectory},
	} {
		req := control.CreatePool{Name: want.Name}
		if want.Store == control.StoreDirectory {
			req.Store = want.Store
		}
		if p, err := client.CreatePool(ctx, req); err != nil || p.Store != want.Store || p.Preset != want.Preset {
			t.Fatalf("pool %+v, %v", p, err)
		}
		if _, err := client.CreateVolume(ctx, control.CreateVolume{Name: want.Name + "/v", Size: 64 << 20}); err != nil {
			t.Fatal(err)
		}
		fillVolume(t, h, want.Name+"/v", 32, 3)
		verifyVolume(t, h, want.Name+"/v", 32, 3)
	}
	if p, err := client.Pool(ctx, registry.DefaultPool); err != nil || p.Store != control.StoreDirectory {
		t.Fatalf("pool %+v, %v", p, err)
	}
	_, err := client.CreatePool(ctx, control.CreatePool{Name: "c", Store: "tape"})
	refusedFor(t, err, control.CodeInvalid, "tape", "objects or directory")
	_, err = client.CreatePool(ctx, control.CreatePool{Name: "c", Store: control.StoreDirectory, Preset: DefaultPreset})
	refusedFor(t, err, control.CodeInvalid, "only for store objects")
}

// TestP10LostRegistryIsNotReplaced: without its registry a data directory whose
// storage daemon holds data is not taken for a fresh one.
func TestP10LostRegistryIsNotReplaced(t *testing.T) {
	c := objectConfig(t)
	h, client := startHost(t, c)
	if _, err := client.CreateVolume(testContext(t), control.CreateVolume{Name: "v", Size: 64 << 20}); err != nil {
		t.Fatal(err)
	}
	stopHost(t, h)
	if err := os.Remove(filepath.Join(c.DataDir, "registry.db")); err != nil {
		t.Fatal(err)
	}
	h, err := Start(testContext(t), c, "test", zerolog.Nop())
	if err == nil {
		stopHost(t, h)
		t.Fatal("the daemon starts with an empty registry")
	}
	if !strings.Contains(err.Error(), "scoria backend rebuild-registry --data-dir "+c.DataDir) {
		t.Fatalf("error %q does not say what to do", err)
	}
}
