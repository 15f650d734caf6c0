package host

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"scoria/alba/vfs"
	"scoria/driver/block"
	"scoria/driver/control"
)

// emptyConfig starts without a storage daemon.
func emptyConfig(t *testing.T) Config {
	t.Helper()
	c := testConfig(t)
	c.Pool.Store = control.StoreDirectory
	return c
}

// addDirs adds embedded storage daemons in fresh directories.
func addDirs(t *testing.T, client *control.Client, n int) []control.ASD {
	t.Helper()
	list := make([]control.ASD, n)
	for i := range list {
		a, err := client.AddASD(testContext(t), control.AddASD{Address: filepath.Join(t.TempDir(), "asd")})
		if err != nil {
			t.Fatal(err)
		}
		if !a.Up || a.Capacity == 0 || a.State != "active" || a.Host == "" {
			t.Fatalf("added %+v", a)
		}
		list[i] = a
	}
	return list
}

func refusedFor(t *testing.T, err error, code control.Code, words ...string) {
	t.Helper()
	if control.CodeOf(err) != code {
		t.Fatalf("error %v has code %q, want %q", err, control.CodeOf(err), code)
	}
	for _, w := range words {
		if !strings.Contains(err.Error(), w) {
			t.Fatalf("error %q lacks %q", err, w)
		}
	}
}

// objectPool makes three storage daemons, preset and pool "safe" with 2+1, and a
// volume safe/v. What is stored is on all three: any one may go at any time.
func objectPool(t *testing.T, client *control.Client) []control.ASD {
	t.Helper()
	ctx := testContext(t)
	asds := addDirs(t, client, 3)
	if _, err := client.CreatePreset(ctx, control.Preset{Name: "safe", Policies: []control.Policy{{K: 2, M: 1, C: 3, X: 1}}}); err != nil {
		t.Fatal(err)
	}
	if p, err := client.CreatePool(ctx, control.CreatePool{Name: "safe", Preset: "safe", SCOSize: 1 << 20}); err != nil || p.Preset != "safe" {
		t.Fatalf("pool %+v, %v", p, err)
	}
	if v, err := client.CreateVolume(ctx, control.CreateVolume{Name: "safe/v", Size: 64 << 20}); err != nil || v.Preset != "safe" {
		t.Fatalf("volume %+v, %v", v, err)
	}
	return asds
}

// worst is how many more disks may die for the least safe object; ok is false
// while there is no object.
func worst(t *testing.T, client *control.Client) (disks int, ok bool) {
	t.Helper()
	st, err := client.BackendStatus(testContext(t))
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range st.Classes {
		for _, s := range c.Safety {
			if !ok || s.Disks < disks {
				disks, ok = s.Disks, true
			}
		}
	}
	return disks, ok
}

// fill writes so many pages of 64 KiB from the begin of safe/v.
func fill(t *testing.T, h *Host, pages int, seed byte) {
	t.Helper()
	fillVolume(t, h, "safe/v", pages, seed)
}

func page(i int, seed byte) []byte {
	p := make([]byte, 64<<10)
	for j := range p {
		p[j] = byte(j) ^ byte(j>>8) ^ byte(i) ^ seed
	}
	return p
}

func submitAt(t *testing.T, dev block.Device, op block.Op, off uint64, p []byte) {
	t.Helper()
	done := make(chan struct{})
	r := &block.Request{Op: op, Offset: off, Length: uint64(len(p)), Complete: func(*block.Request) { close(done) }}
	if p != nil {
		r.Segments = [][]byte{p}
	}
	dev.Submit([]*block.Request{r})
	if !r.Ended {
		select {
		case <-done:
		case <-testContext(t).Done():
			t.Fatalf("%v at %d did not end", op, off)
		}
	}
	if r.Err != nil {
		t.Fatalf("%v at %d: %v", op, off, r.Err)
	}
}

func verify(t *testing.T, h *Host, pages int, seed byte) {
	t.Helper()
	verifyVolume(t, h, "safe/v", pages, seed)
}

// TestObjectPoolSurvivesADisk: a volume of a pool with preset 2+1 on embedded storage
// daemons reads the same after a restart, with one disk removed, and after repair
// onto another one, which makes it as safe as before.
func TestObjectPoolSurvivesADisk(t *testing.T) {
	c := emptyConfig(t)
	c.Cache.Local, c.Cache.Read = 0, 0 // reads come from the store
	h, client := startHost(t, c)
	asds := objectPool(t, client)
	const pages = 256
	fill(t, h, pages, 1)
	await(t, "objects to be stored", func() bool { _, ok := worst(t, client); return ok })
	stopHost(t, h)

	h, client = startHost(t, c)
	ctx := testContext(t)
	verify(t, h, pages, 1)
	_, err := client.RemoveASD(ctx, asds[0].ID, false)
	refusedFor(t, err, control.CodeNeedsForce, asds[0].ID, "drain")
	if a, err := client.RemoveASD(ctx, asds[0].ID, true); err != nil || a.State != "removed" {
		t.Fatalf("removed %+v, %v", a, err)
	}
	if n, _ := worst(t, client); n != 0 {
		t.Fatalf("with a disk of 2+1 gone %d more may die, want 0", n)
	}
	verify(t, h, pages, 1)
	if n := h.objects.proxy.Counters(); n.Reads.Load() == 0 || n.Decoded.Load() == 0 {
		t.Fatalf("%d reads of the object store, %d decoded: the test reads elsewhere", n.Reads.Load(), n.Decoded.Load())
	}
	fill(t, h, pages, 2)
	addDirs(t, client, 1)
	if _, err := client.StartBackendJob(ctx, "repair"); err != nil {
		t.Fatal(err)
	}
	await(t, "repair", func() bool { n, ok := worst(t, client); return ok && n == 1 })
	verify(t, h, pages, 2)
	st, err := client.BackendStatus(ctx)
	if err != nil || len(st.ASDs) < 3 || st.Jobs[0].Name != "repair" || st.Jobs[0].State == "never" {
		t.Fatalf("status %+v, %v", st, err)
	}
	if text := scrape(t, c); !strings.Contains(text, "scoria_asd_up") || !strings.Contains(text, `scoria_objects_total{name="puts"}`) {
		t.Fatalf("metrics lack the object store:\n%s", text)
	}
	stopHost(t, h)
}

// TestDrainedASDIsEmpty: after draining, a storage daemon holds nothing and may be
// removed without force.
func TestDrainedASDIsEmpty(t *testing.T) {
	c := emptyConfig(t)
	h, client := startHost(t, c)
	defer stopHost(t, h)
	asds := objectPool(t, client)
	fill(t, h, 64, 1)
	await(t, "objects on the disk", func() bool { a, err := client.ASD(testContext(t), asds[1].ID); return err == nil && a.Shards > 0 })
	addDirs(t, client, 1)
	if a, err := client.DrainASD(testContext(t), asds[1].ID); err != nil || a.State != "draining" {
		t.Fatalf("draining %+v, %v", a, err)
	}
	// An upload that chose its disks before may end behind a look at all objects.
	await(t, "the disk to be empty and removed", func() bool {
		_, err := client.StartBackendJob(testContext(t), "repair")
		a, aerr := client.ASD(testContext(t), asds[1].ID)
		if err != nil || aerr != nil || a.Shards > 0 {
			return false
		}
		a, err = client.RemoveASD(testContext(t), asds[1].ID, false)
		if control.CodeOf(err) == control.CodeNeedsForce {
			return false
		}
		if err != nil || a.State != "removed" {
			t.Fatalf("removed %+v, %v", a, err)
		}
		return true
	})
	verify(t, h, 64, 1)
	// Another daemon may have the directory now.
	if l, err := vfs.OS().Lock(filepath.Join(asds[1].Address, "lock")); err != nil {
		t.Fatalf("the removed storage daemon is still open: %v", err)
	} else if err := l.Close(); err != nil {
		t.Fatal(err)
	}
}

// TestObjectRequestsRefused: what can't be is refused with the reason, and the default
// pool of a data directory that was made with the directory store stays there.
func TestObjectRequestsRefused(t *testing.T) {
	c := emptyConfig(t)
	h, client := startHost(t, c)
	defer stopHost(t, h)
	ctx := testContext(t)
	_, err := client.CreatePool(ctx, control.CreatePool{Name: "p", Preset: "nosuch"})
	refusedFor(t, err, control.CodeNotFound, "nosuch", "preset create")
	_, err = client.CreatePreset(ctx, control.Preset{Name: "bad", Policies: []control.Policy{{K: 2, M: 1, C: 4, X: 1}}})
	refusedFor(t, err, control.CodeInvalid, "c is 4")
	_, err = client.CreatePreset(ctx, control.Preset{Name: "bad", Policies: []control.Policy{{K: 1, C: 1, X: 1}}, Compression: "rar"})
	refusedFor(t, err, control.CodeInvalid, "rar", "zstd")
	_, err = client.CreatePreset(ctx, control.Preset{Name: "bad", Policies: []control.Policy{{K: 1, C: 1, X: 1}}, Encryption: "aes-256-gcm"})
	refusedFor(t, err, control.CodeInvalid, "master key")
	_, err = client.AddASD(ctx, control.AddASD{Address: "relative/dir"})
	refusedFor(t, err, control.CodeInvalid, "relative/dir", "HOST:PORT")
	_, err = client.StartBackendJob(ctx, "verify")
	refusedFor(t, err, control.CodeInvalid, "asd add")
	_, err = client.BackendJob(ctx, "nosuch")
	refusedFor(t, err, control.CodeNotFound, "rebalance")
	other := t.TempDir()
	if err := os.WriteFile(filepath.Join(other, "photo"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	_, err = client.AddASD(ctx, control.AddASD{Address: other})
	refusedFor(t, err, control.CodeInvalid, "photo")
	objectPool(t, client)
	_, err = client.CreatePreset(ctx, control.Preset{Name: "safe", Policies: []control.Policy{{K: 1, C: 1, X: 1}}})
	refusedFor(t, err, control.CodeExists, "preset set")
	_, err = client.SetPreset(ctx, control.Preset{Name: "nosuch", Policies: []control.Policy{{K: 1, C: 1, X: 1}}})
	refusedFor(t, err, control.CodeNotFound, "nosuch")
	if p, err := client.Pool(ctx, "default"); err != nil || p.Preset != "" {
		t.Fatalf("default pool %+v, %v", p, err)
	}
	if _, err := client.CreateVolume(ctx, control.CreateVolume{Name: "plain", Size: 1 << 20}); err != nil {
		t.Fatal(err)
	}
	if _, err := client.CreateSnapshot(ctx, "default/plain", control.CreateSnapshot{Name: "s"}); err != nil {
		t.Fatal(err)
	}
	_, err = client.CloneVolume(ctx, control.CloneVolume{From: "default/plain@s", Name: "safe/c"})
	refusedFor(t, err, control.CodeInvalid, "object store")
}

// TestBackendConfigRefused names the key.
func TestBackendConfigRefused(t *testing.T) {
	for text, words := range map[string][]string{
		"tls_cert = \"/c\"":         {"tls_key", "all three"},
		"allow_plaintext = \"yes\"": {"allow_plaintext", "unencrypted"},
		"repair_after = \"1ms\"":    {"repair_after", "1s"},
		"repair_latency = \"1m\"":   {"repair_latency", "10s"},
		"repair_rate = \"2T\"":      {"repair_rate", "1TiB"},
	} {
		_, err := parseConfig("f", fmt.Appendf(nil, "[backend]\n%s\n", text))
		if err == nil {
			t.Fatalf("%s is accepted", text)
		}
		for _, w := range words {
			if !strings.Contains(err.Error(), w) {
				t.Errorf("%s: %q lacks %q", text, err, w)
			}
		}
	}
}

// TestStartWithoutADisk: the daemon starts although the directory of a storage daemon
// is empty (not mounted, say): nothing new is made there, the status says so, and
// an encrypted volume is read from the other disks.
func TestStartWithoutADisk(t *testing.T) {
	c := emptyConfig(t)
	c.Cache.Local, c.Cache.Read = 0, 0
	c.Backend.MasterKeys = filepath.Join(t.TempDir(), "keys")
	if err := os.WriteFile(c.Backend.MasterKeys, []byte(strings.Repeat("5a", 32)+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	h, client := startHost(t, c)
	asds := objectPool(t, client)
	if p, err := client.SetPreset(testContext(t), control.Preset{Name: "safe", Policies: []control.Policy{{K: 2, M: 1, C: 3, X: 1}}, Encryption: "aes-256-gcm"}); err != nil || p.Encryption != "aes-256-gcm" {
		t.Fatalf("preset %+v, %v", p, err)
	}
	fill(t, h, 64, 3)
	await(t, "objects on the disk", func() bool { a, err := client.ASD(testContext(t), asds[2].ID); return err == nil && a.Shards > 0 })
	stopHost(t, h)
	away := asds[2].Address + ".away"
	if err := os.Rename(asds[2].Address, away); err != nil {
		t.Fatal(err)
	}

	h, client = startHost(t, c)
	defer stopHost(t, h)
	verify(t, h, 64, 3)
	await(t, "the condition", func() bool {
		st, err := client.Status(testContext(t))
		return err == nil && len(st.Conditions) == 1 && st.Conditions[0].Code == "asd-down" && strings.Contains(st.Conditions[0].Message, asds[2].ID)
	})
	if _, err := os.Stat(filepath.Join(asds[2].Address, "identity")); !os.IsNotExist(err) {
		t.Fatalf("a new storage daemon was made in place of the missing one: %v", err)
	}
}
