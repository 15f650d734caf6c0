package host

import (
	"bytes"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"scoria/alba"
	"scoria/driver/control"
)

const goldenSmallSCO = 1 << 20

// goldenSafe is a preset with 2+1 on three disks, and copies on two where there are no
// more.
func goldenSafe(name, encryption string) control.Preset {
	return control.Preset{Name: name, Policies: []control.Policy{{K: 2, M: 1, C: 3, X: 1}, {K: 1, M: 1, C: 2, X: 1}},
		FragmentBytes: alba.MinFragmentBytes, FailureDomain: "disk", Compression: "zstd", Encryption: encryption}
}

// goldenCompacted has the scrubber write SCOs anew that a snapshot reaches little of:
// most of what they had is written over before the snapshot, and all of it behind.
func goldenCompacted(g *goldenLife, pool string) {
	const scos, sco = 3, goldenSmallSCO / goldenCluster
	v := pool + "/v"
	g.create(v, scos*sco)
	for i := range uint64(scos) {
		g.write(v, i*sco, sco, "first")
	}
	for i := range uint64(scos) {
		g.write(v, i*sco, sco-16, "second")
	}
	g.snapshot(v, "s")
	g.clone(v+"@s", pool+"/c")
	for i := range uint64(scos) {
		g.write(v, i*sco, sco, "third")
	}
	if g.h != nil {
		await(g.t, "SCOs to be compacted", func() bool {
			st := g.h.volumes.device(v).Stats()
			return st.CompactedBytes > 0
		})
	}
	g.write(pool+"/c", 3, 2, "clone")
}

// goldenTiny makes few objects, which are small.
func goldenTiny(g *goldenLife, pool string) { g.volumes(pool, 48, 3) }

// goldenHistory makes what lies behind a store that has seen some: objects that were
// stored on two disks and then under a better policy on three, a disk that was removed
// and what it had rebuilt on another, and a master key that was replaced.
func goldenHistory(g *goldenLife, d *goldenDir, root string) {
	g.t.Helper()
	key, err := os.ReadFile(filepath.Join(goldenFiles, "master-keys"))
	g.must(err)
	old := []byte(strings.Repeat("7b", alba.KeyBytes) + "\n")
	keys := filepath.Join(g.t.TempDir(), "keys")
	restart := func(content ...[]byte) {
		g.must(os.WriteFile(keys, bytes.Join(content, nil), 0o600))
		c := d.config(g.t, root)
		c.Backend.MasterKeys = keys
		stopHost(g.t, g.h)
		g.h, g.client = startHost(g.t, c)
	}
	restart(old)
	ctx := testContext(g.t)
	gone := g.addASD(root, "gone")
	g.addASD(root, "asd0")
	d.lives(g)
	for _, name := range g.volumeNames() {
		g.must(second(g.h.volumes.Open(ctx, name)))
	}
	g.awaitPolicy(1)
	g.addASD(root, "asd1")
	g.awaitPolicy(2)
	g.must(second(g.client.RemoveASD(ctx, gone.ID, true)))
	g.addASD(root, "asd2")
	g.awaitPolicy(2)
	restart(key, old)
	for _, name := range g.volumeNames() {
		g.must(second(g.h.volumes.Open(ctx, name)))
	}
	if k, err := g.client.RotateKeys(ctx); err != nil || k.Namespaces == 0 {
		g.t.Fatalf("rotated %+v, %v", k, err)
	}
	restart(key)
	g.must(os.RemoveAll(filepath.Join(root, "gone")))
}

// hasHistory makes sure that the data directory holds what goldenHistory is for: before
// anything is written to it.
func (g *goldenLife) hasHistory() {
	g.t.Helper()
	ctx := testContext(g.t)
	e, err := g.h.volumes.load(ctx, "plain/v")
	g.must(err)
	names, err := g.h.volumes.storeOf(&e.Record).List(ctx, e.Record.ID.String(), "")
	g.must(err)
	if !slices.ContainsFunc(names, func(n string) bool { return strings.Contains(n, ".") }) {
		g.t.Errorf("no SCO of a second generation among %q", names)
	}
	removed, err := AlbaRegistry{g.h.reg}.List(ctx, alba.RemovedKey(""))
	g.must(err)
	st, err := g.client.BackendStatus(ctx)
	g.must(err)
	gone := slices.ContainsFunc(st.ASDs, func(a control.ASD) bool { return a.State == string(alba.DeviceRemoved) })
	if len(removed) == 0 && !gone {
		g.t.Error("no storage daemon was removed")
	}
	for _, c := range st.Classes {
		if c.Policy.K != 2 {
			g.t.Errorf("objects under %v", c.Policy)
		}
	}
}

func (g *goldenLife) addASD(root, name string) control.ASD {
	g.t.Helper()
	a, err := g.client.AddASD(testContext(g.t), control.AddASD{Address: filepath.Join(root, name), Host: "host"})
	g.must(err)
	return a
}

// awaitPolicy waits until all objects are stored under the policy with that k, and can
// lose a disk.
func (g *goldenLife) awaitPolicy(k int) {
	g.t.Helper()
	await(g.t, "all objects to be safe", func() bool {
		ctx := testContext(g.t)
		time.Sleep(100 * time.Millisecond) // each start is a record in the registry, which is kept
		g.must(second(g.client.StartBackendJob(ctx, "repair")))
		st, err := g.client.BackendStatus(ctx)
		g.must(err)
		for _, c := range st.Classes {
			if c.Policy.K != k || len(c.Safety) != 1 || c.Safety[0].Disks != 1 {
				return false
			}
		}
		return len(st.Classes) > 0 && st.Uploads == 0 && st.Trash == 0
	})
}
