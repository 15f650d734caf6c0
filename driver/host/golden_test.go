package host

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/rs/zerolog"

	"scoria/alba"
	"scoria/driver/control"
	"scoria/driver/registry"
)

// Golden data directories are what a daemon of some version left behind when it was
// stopped: registry, volumes' directories, and the directories of its embedded storage
// daemons, where all that the volumes hold is. Every later version must open them. A
// version whose formats are others adds its own, which
//
//	go test ./driver/host -run TestGoldenDataDirectories -update-golden NAME
//
// makes, to goldenVersions, as does who adds a directory to the last version; what is there is never changed, so the list has hashes.

const goldenFiles = "testdata/golden"

var updateGolden = flag.String("update-golden", "", "make the golden data directories of a new version of this `name`")

// goldenVersion is what one version wrote.
type goldenVersion struct {
	name string
	dirs []goldenDir
}

// goldenDir is one data directory: testdata/golden/VERSION-NAME.tar.zst, with the data
// directory as data and the storage daemons added to it as asd0, asd1 …. In the registry
// their addresses begin with goldenRoot.
type goldenDir struct {
	name, sha256 string
	asds         int // 0: the one that the daemon makes by itself; else any one may be away
	pools        []goldenPool
	history      func(g *goldenLife, d *goldenDir, root string) // how it is made, if not by adding the storage daemons first
}

// goldenPool is a pool with a preset, and what becomes of its volumes.
type goldenPool struct {
	preset control.Preset // and the pool's name; without policies it is the daemon's own
	life   func(g *goldenLife, pool string)
	sco    int64 // bytes; 0: goldenSCO
}

const goldenRoot = "/golden"

var goldenVersions = []goldenVersion{
	{"v1", []goldenDir{
		{name: "default", sha256: "ffeb781fa6fcfcd6958d86f2fdd6723e4a13d68db054dfe2093516575671f19d", pools: []goldenPool{{control.Preset{Name: registry.DefaultPool}, goldenAdopted, 0}}},
		{name: "presets", sha256: "62f08daad6a1fefd1893eadfa35e0f4b88db2483ed2cd6ef945f14895957a0fe", asds: 3, pools: goldenKinds()},
		{name: "history", sha256: "aae231aff53f32fcd11fa4b543b6944cb6e9635622677c362411a64d5fc9eb54", asds: 3, pools: []goldenPool{
			{goldenSafe("plain", "none"), goldenCompacted, goldenSmallSCO}, {goldenSafe("secret", "aes-256-gcm"), goldenTiny, 0}}, history: goldenHistory},
	}},
}

// goldenKinds has a pool for each way in which objects are stored, with 2+1.
func goldenKinds() []goldenPool {
	var list []goldenPool
	for _, compression := range []string{"none", "lz4", "zstd"} {
		for _, encryption := range []string{"none", "aes-256-gcm"} {
			p := goldenPool{life: goldenShort, preset: control.Preset{Name: compression + "-" + encryption, Policies: []control.Policy{{K: 2, M: 1, C: 3, X: 1}},
				FragmentBytes: alba.MinFragmentBytes, FailureDomain: "disk", Compression: compression, Encryption: encryption}}
			if encryption == "none" {
				p.life = goldenLong
			}
			list = append(list, p)
		}
	}
	return list
}

// goldenAdopted makes a SCO so large that the storage daemon that takes its file has several
// names for it.
func goldenAdopted(g *goldenLife, pool string) { g.volumes(pool, 2048, 1400) }

// goldenLong makes objects of several chunks.
func goldenLong(g *goldenLife, pool string) { g.volumes(pool, 512, 96) }

// goldenShort makes objects that take little room where they can't be compressed.
func goldenShort(g *goldenLife, pool string) { g.volumes(pool, 512, 8) }

// config is the daemon's for the data directory below root.
func (d *goldenDir) config(t *testing.T, root string) Config {
	t.Helper()
	c := testConfig(t)
	c.DataDir = filepath.Join(root, "data")
	c.WriteBuffer.Dir = c.RunDir // the same instance may run beside this test
	c.Backend.MasterKeys = filepath.Join(goldenFiles, "master-keys")
	c.Cache.Local, c.Cache.Read = 0, 0 // reads come from the object store
	c.Pool.Store, c.Pool.SCOSize = control.StoreObjects, goldenSCO
	if d.asds > 0 {
		c.Pool.Store = control.StoreDirectory
	}
	return c
}

// make writes the data directory anew and packs it.
func (d *goldenDir) make(t *testing.T) []byte {
	t.Helper()
	root := t.TempDir()
	c := d.config(t, root)
	h, client := startHost(t, c)
	g := &goldenLife{t, h, client, map[string]goldenImage{}}
	if d.history != nil {
		d.history(g, d, root)
	} else {
		for i := range d.asds {
			g.addASD(root, fmt.Sprintf("asd%d", i))
		}
		d.lives(g)
	}
	stopHost(t, g.h) // closes the logs, whose ends the next start uploads
	g.h, g.client = startHost(t, c)
	for _, name := range g.volumeNames() {
		g.must(second(g.h.volumes.Open(testContext(t), name)))
		storedWhole(t, g.h, name)
		await(t, "the local copies to be gone", func() bool { return nothingLocal(g.h, name) })
	}
	g.compare()
	stopHost(t, g.h)
	moveASDs(t, c.DataDir, root, goldenRoot)
	return packTree(t, root)
}

// lives makes the pools and what becomes of their volumes.
func (d *goldenDir) lives(g *goldenLife) {
	g.t.Helper()
	ctx := testContext(g.t)
	for _, p := range d.pools {
		if len(p.preset.Policies) > 0 {
			g.must(second(g.client.CreatePreset(ctx, p.preset)))
			g.must(second(g.client.CreatePool(ctx, control.CreatePool{Name: p.preset.Name, Preset: p.preset.Name, SCOSize: cmp.Or(p.sco, goldenSCO)})))
		}
		p.life(g, p.preset.Name)
	}
}

// nothingLocal says whether the object store has all that an open volume holds, and the
// volume's directory nothing of it.
func nothingLocal(h *Host, name string) bool {
	st := h.volumes.device(name).Stats()
	return st.UploadBacklog == 0 && st.LogHeadBytes == 0 && st.Space.Local == 0 && st.Space.Store > 0
}

// moveASDs changes the begin of the storage daemons' addresses in the registry.
func moveASDs(t *testing.T, dataDir, from, to string) {
	t.Helper()
	ctx := testContext(t)
	store, err := registry.Open(filepath.Join(dataDir, "registry.db"))
	if err != nil {
		t.Fatal(err)
	}
	reg := AlbaRegistry{store}
	kvs, err := reg.List(ctx, alba.DevicePrefix)
	if err != nil || len(kvs) == 0 {
		t.Fatalf("storage daemons %v, %v", kvs, err)
	}
	for _, kv := range kvs {
		d, err := alba.Decode[alba.Device](kv.Value)
		if err != nil {
			t.Fatal(err)
		}
		rest, ok := strings.CutPrefix(d.Address, from)
		if !ok {
			t.Fatalf("storage daemon at %s, want one below %s", d.Address, from)
		}
		d.Address = to + rest
		if _, err := reg.Commit(ctx, nil, []alba.Write{{Key: kv.Key, Value: alba.Encode(d)}}); err != nil {
			t.Fatal(err)
		}
	}
	if err := store.Close(); err != nil {
		t.Fatal(err)
	}
}

func (d *goldenDir) file(version string) string {
	return filepath.Join(goldenFiles, version+"-"+d.name+".tar.zst")
}

// unpack makes the data directory below a new root, whose storage daemons have their
// new addresses if the registry is told to know.
func (d *goldenDir) unpack(t *testing.T, version string, tellRegistry bool) (root string, c Config) {
	t.Helper()
	packed, err := os.ReadFile(d.file(version))
	if err != nil {
		t.Fatal(err)
	}
	if sum := sha256.Sum256(packed); hex.EncodeToString(sum[:]) != d.sha256 {
		t.Fatalf("%s has the SHA-256 %x, want %s: what was written once is not changed", d.file(version), sum, d.sha256)
	}
	root = t.TempDir()
	unpackTree(t, root, packed)
	c = d.config(t, root)
	if tellRegistry {
		moveASDs(t, c.DataDir, goldenRoot, root)
	}
	return root, c
}

// expect is what the data directory's volumes hold.
func (d *goldenDir) expect(t *testing.T, h *Host, client *control.Client) *goldenLife {
	t.Helper()
	g := &goldenLife{t, nil, nil, map[string]goldenImage{}}
	for _, p := range d.pools {
		p.life(g, p.preset.Name)
	}
	g.h, g.client = h, client
	return g
}

// start opens the data directory and all its volumes.
func (d *goldenDir) start(t *testing.T, c Config) *goldenLife {
	t.Helper()
	h, client := startHost(t, c)
	g := d.expect(t, h, client)
	for _, name := range g.volumeNames() {
		g.must(second(h.volumes.Open(testContext(t), name)))
		await(t, name+" to be in the object store alone", func() bool { return nothingLocal(h, name) })
	}
	return g
}

// verified has everything checked: each volume against its log, and every byte that the storage
// daemons have.
func (g *goldenLife) verified() {
	g.t.Helper()
	ctx := testContext(g.t)
	for _, name := range g.volumeNames() {
		job, err := g.client.StartCheck(ctx, name)
		if err == nil {
			job, err = g.client.Await(ctx, job, nil)
		}
		if err != nil || len(job.Report.Problems) > 0 || job.Report.Clusters == 0 {
			g.t.Fatalf("check of %s: %+v, %v", name, job, err)
		}
	}
	_, err := g.client.StartBackendJob(ctx, "verify")
	g.must(err)
	await(g.t, "the verification to end", func() bool {
		j, err := g.client.BackendJob(testContext(g.t), "verify")
		if err != nil || j.State != "running" && j.State != "done" || j.Problems > 0 || j.Message != "" {
			g.t.Fatalf("verify: %+v, %v", j, err)
		}
		return j.State == "done" && j.Done > 0
	})
}

// TestGoldenDataDirectories: volumes that any version since the first stored, with each
// kind of preset, open in this one and read as they did, as do their snapshots
// and clones; they go on to be written, a storage daemon that is away is done without,
// and a registry is rebuilt from the storage daemons alone (P10).
func TestGoldenDataDirectories(t *testing.T) {
	if *updateGolden != "" {
		newGolden(t, *updateGolden)
	}
	want := []string{"master-keys"}
	for _, v := range goldenVersions {
		for i := range v.dirs {
			d := &v.dirs[i]
			want = append(want, filepath.Base(d.file(v.name)))
			t.Run(v.name+"/"+d.name, func(t *testing.T) {
				t.Run("opened", func(t *testing.T) { d.testOpen(t, v.name) })
				t.Run("rebuilt", func(t *testing.T) { d.testRebuild(t, v.name) })
				for i := range d.asds {
					t.Run(fmt.Sprintf("without asd%d", i), func(t *testing.T) { d.testAway(t, v.name, i) })
				}
			})
		}
	}
	entries, err := os.ReadDir(goldenFiles)
	if err != nil {
		t.Fatal(err)
	}
	var have []string
	for _, e := range entries {
		have = append(have, e.Name())
	}
	if slices.Sort(want); !slices.Equal(have, want) {
		t.Errorf("%s has %q, goldenVersions names %q", goldenFiles, have, want)
	}
}

// newGolden makes the files of a version that are not there, with what the last one in
// the list has.
func newGolden(t *testing.T, version string) {
	for _, d := range goldenVersions[len(goldenVersions)-1].dirs {
		name := d.file(version)
		if _, err := os.Lstat(name); err == nil {
			t.Logf("%s is there already and is not changed", name)
			continue
		}
		packed := d.make(t)
		if err := os.WriteFile(name, packed, 0o644); err != nil {
			t.Fatal(err)
		}
		t.Logf("%s: %d bytes, SHA-256 %x: add it to goldenVersions", name, len(packed), sha256.Sum256(packed))
	}
}

func (d *goldenDir) testOpen(t *testing.T, version string) {
	_, c := d.unpack(t, version, true)
	g := d.start(t, c)
	ctx := testContext(t)
	if st, err := g.client.Status(ctx); err != nil || len(st.Conditions) > 0 {
		t.Fatalf("status %+v, %v", st, err)
	}
	d.testPresets(ctx, g)
	if d.history != nil {
		g.hasHistory()
	}
	g.compare()
	if g.h.objects.proxy.Counters().Reads.Load() == 0 {
		t.Fatal("nothing was read from the object store: the test reads elsewhere")
	}
	g.verified()
	// The volumes go on.
	for _, name := range g.volumeNames() {
		g.write(name, 2, 9, "later")
		g.snapshot(name, "later")
		g.write(name, 5, 40, "latest")
	}
	stopHost(t, g.h)
	g.h, g.client = startHost(t, c)
	defer func() { stopHost(t, g.h) }()
	g.compare()
	g.verified()
	if n, ok := worst(t, g.client); !ok || n != min(d.asds, 1) {
		t.Fatalf("%d more disks may die (there are objects: %v), want %d", n, ok, min(d.asds, 1))
	}
}

func (d *goldenDir) testPresets(ctx context.Context, g *goldenLife) {
	g.t.Helper()
	for _, p := range d.pools {
		want := p.preset
		if len(want.Policies) == 0 {
			builtIn := builtInPreset()
			want = presetAnswer(&builtIn)
		}
		got, err := g.client.Preset(ctx, want.Name)
		got.Warnings, want.Warnings = nil, nil
		if err != nil || fmt.Sprintf("%+v", got) != fmt.Sprintf("%+v", want) {
			g.t.Fatalf("preset %+v, %v, want %+v", got, err, want)
		}
		if pool, err := g.client.Pool(ctx, p.preset.Name); err != nil || pool.Preset != want.Name || pool.Store != control.StoreObjects {
			g.t.Fatalf("pool %+v, %v", pool, err)
		}
	}
}

func (d *goldenDir) testRebuild(t *testing.T, version string) {
	root, c := d.unpack(t, version, false)
	loseAllBut(t, c.DataDir, "asd")
	req := RebuildRequest{}
	for i := range d.asds {
		req.ASDs = append(req.ASDs, filepath.Join(root, fmt.Sprintf("asd%d", i)))
	}
	report, err := RebuildRegistry(testContext(t), c, req, zerolog.Nop())
	if err != nil || len(report.Problems)+len(report.Lost)+len(report.Missing) > 0 {
		t.Fatalf("%+v, %v", report, err)
	}
	g := d.start(t, c)
	defer stopHost(t, g.h)
	g.compare()
}

func (d *goldenDir) testAway(t *testing.T, version string, asd int) {
	root, c := d.unpack(t, version, true)
	if err := os.RemoveAll(filepath.Join(root, fmt.Sprintf("asd%d", asd))); err != nil {
		t.Fatal(err)
	}
	g := d.start(t, c)
	defer stopHost(t, g.h)
	g.compare()
	if g.h.objects.proxy.Counters().Decoded.Load() == 0 {
		t.Fatal("nothing was decoded: the test reads elsewhere")
	}
}
