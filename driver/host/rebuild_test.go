package host

import (
	"bytes"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/rs/zerolog"

	"scoria/alba"
	"scoria/alba/vfs"
	"scoria/driver"
	"scoria/driver/block"
	"scoria/driver/control"
	"scoria/driver/limit"
	"scoria/driver/registry"
)

// storedWhole waits until the object store alone has a volume as it is: nothing is to
// be uploaded, the newest root and the snapshots' are there, and the copy of its record is the
// present one. The volume has to be open.
func storedWhole(t *testing.T, h *Host, name string) {
	t.Helper()
	ctx := testContext(t)
	e, err := h.volumes.load(ctx, name)
	if err != nil {
		t.Fatal(err)
	}
	s, ns := h.volumes.storeOf(&e.Record), e.Record.ID.String()
	await(t, "volume "+name+" to be in the object store", func() bool {
		stored, err := s.List(ctx, ns, "")
		if err != nil {
			t.Fatal(err)
		}
		have := map[string]bool{}
		for _, n := range stored {
			have[n] = true
		}
		files, err := os.ReadDir(filepath.Join(h.config.DataDir, "volumes", ns, "map"))
		if err != nil {
			t.Fatal(err)
		}
		// A root goes there after all that it refers to; the last is the newest.
		for i, f := range files {
			last := i+1 == len(files) || !strings.HasPrefix(files[i+1].Name(), "root-")
			if !have[f.Name()] && (strings.HasPrefix(f.Name(), "snap-") || last && strings.HasPrefix(f.Name(), "root-")) {
				return false
			}
		}
		return h.volumes.device(e.Record.FullName()).Stats().UploadBacklog == 0
	})
	copyIs(t, h, name)
}

// copyIs waits until the copy of a volume's record says what the registry does.
func copyIs(t *testing.T, h *Host, name string) {
	t.Helper()
	ctx := testContext(t)
	await(t, "the copy of the record of "+name, func() bool {
		e, err := h.volumes.load(ctx, name)
		if err != nil {
			t.Fatal(err)
		}
		s, ns := h.volumes.storeOf(&e.Record), e.Record.ID.String()
		numbers, err := copies(ctx, s, ns)
		if err != nil {
			t.Fatal(err)
		}
		if len(numbers) != 1 {
			return false
		}
		// It may be replaced meanwhile.
		_, c, err := readCopy(ctx, s, ns, numbers[0])
		return err == nil && reflect.DeepEqual(c.Volume, e.Record)
	})
}

const familyPages = 64

var familyNames = []string{"v", "c", "empty"}

// makeFamily makes, in a pool: v, with a snapshot between two fills, its clone c, and
// empty, that nobody writes to. It returns their records as they are in the end, when
// the object store has everything, and the daemon has stopped.
func makeFamily(t *testing.T, c Config, h *Host, client *control.Client, pool string) map[string]registry.Volume {
	t.Helper()
	ctx := testContext(t)
	check := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	v := pool + "/v"
	check(second(client.CreateVolume(ctx, control.CreateVolume{Name: pool + "/first", Size: 64 << 20, BlockSize: 4096, Serial: "abc"})))
	check(second(client.CreateVolume(ctx, control.CreateVolume{Name: pool + "/empty", Size: 8 << 20})))
	check(second(client.RenameVolume(ctx, pool+"/first", control.RenameVolume{Name: v})))
	fillVolume(t, h, v, familyPages, 1)
	check(second(client.CreateSnapshot(ctx, v, control.CreateSnapshot{Name: "s", Metadata: map[string]string{"by": "me"}})))
	fillVolume(t, h, v, familyPages/2, 2)
	check(second(client.CloneVolume(ctx, control.CloneVolume{From: v + "@s", Name: pool + "/c"})))
	fillVolume(t, h, pool+"/c", familyPages/4, 3)
	check(second(client.ResizeVolume(ctx, v, 128<<20, false)))
	check(second(client.ChangeLimits(ctx, v, control.ChangeLimits{Set: limit.Settings{WriteIOPS: ptr(uint64(100_000))}})))
	check(second(client.ChangePoolLimits(ctx, pool, control.ChangeLimits{Set: limit.Settings{ReadIOPS: ptr(uint64(200_000))}})))
	check(second(client.SetSchedule(ctx, v, control.SetSchedule{Rules: []string{"every 1d keep 2"}})))
	check(second(client.SetSchedule(ctx, pool, control.SetSchedule{Rules: []string{"every 1d keep 3"}})))
	stopHost(t, h) // closes the logs, whose ends the next start uploads

	h, _ = startHost(t, c)
	records := map[string]registry.Volume{}
	for _, name := range familyNames {
		check(second(h.volumes.Open(ctx, pool+"/"+name)))
	}
	for _, name := range familyNames {
		storedWhole(t, h, pool+"/"+name)
		e, err := h.volumes.load(ctx, pool+"/"+name)
		check(err)
		records[name] = e.Record
	}
	stopHost(t, h)
	return records
}

// verifyFamily compares everything with what makeFamily made.
func verifyFamily(t *testing.T, h *Host, client *control.Client, pool string, records map[string]registry.Volume) {
	t.Helper()
	ctx := testContext(t)
	v := pool + "/v"
	verifyMixed(t, h, v, 2, familyPages/2)
	verifyMixed(t, h, pool+"/c", 3, familyPages/4)
	verifyMixed(t, h, v+"@s", 1, familyPages)
	verifyMixed(t, h, pool+"/empty", 0, 0)
	for name, want := range records {
		e, err := h.volumes.load(ctx, pool+"/"+name)
		if err != nil {
			t.Fatal(err)
		}
		got := e.Record
		if got.Epoch <= want.Epoch || got.Owner != want.Owner {
			t.Fatalf("epoch %d of %s was %d before", got.Epoch, got.Owner, want.Epoch)
		}
		if got.Epoch = want.Epoch; !reflect.DeepEqual(got, want) {
			t.Fatalf("record\n%+v\nwant\n%+v", got, want)
		}
	}
	// The schedules may have made others at midnight.
	if snap, err := client.Snapshot(ctx, v, "s"); err != nil || snap.Metadata["by"] != "me" {
		t.Fatalf("snapshot %+v, %v", snap, err)
	}
	if l, err := client.PoolLimits(ctx, pool); err != nil || l.Own.ReadIOPS == nil || *l.Own.ReadIOPS != 200_000 {
		t.Fatalf("limits of the pool %+v, %v", l, err)
	}
	if s, err := client.Schedule(ctx, v); err != nil || len(s.Rules) != 1 || s.Rules[0] != "every 1d keep 2" {
		t.Fatalf("schedule %+v, %v", s, err)
	}
	if s, err := client.Schedule(ctx, pool); err != nil || len(s.Rules) != 1 || s.Rules[0] != "every 1d keep 3" {
		t.Fatalf("schedule of the pool %+v, %v", s, err)
	}
}

// verifyMixed verifies that the first pages were written with a seed and the others,
// but in the empty volume, with 1.
func verifyMixed(t *testing.T, h *Host, name string, seed byte, pages int) {
	t.Helper()
	dev, err := h.Devices().Open(testContext(t), name)
	if err != nil {
		t.Fatal(err)
	}
	p, zero := make([]byte, 64<<10), make([]byte, 64<<10)
	for i := range familyPages {
		submitAt(t, dev, block.OpRead, uint64(i)<<16, p)
		want := page(i, 1)
		switch {
		case pages == 0:
			want = zero
		case i < pages:
			want = page(i, seed)
		}
		if string(p) != string(want) {
			t.Fatalf("page %d of %s differs", i, name)
		}
	}
}

// loseAllBut takes everything from the data directory but what is named.
func loseAllBut(t *testing.T, dir string, keep ...string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	for _, e := range entries {
		if err == nil && !slices.Contains(keep, e.Name()) {
			err = os.RemoveAll(filepath.Join(dir, e.Name()))
		}
	}
	if err != nil {
		t.Fatal(err)
	}
}

// TestP10RegistryIsRebuilt: with nothing left but the storage daemon, everything comes
// back as it was; an owner of before is fenced; the rebuilding may be repeated.
func TestP10RegistryIsRebuilt(t *testing.T) {
	c := objectConfig(t)
	h, client := startHost(t, c)
	records := makeFamily(t, c, h, client, registry.DefaultPool)
	loseAllBut(t, c.DataDir, "asd")
	if err := os.WriteFile(filepath.Join(c.DataDir, "asd", "garbage"), []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	said := 0
	for i := range 2 { // an interruption leaves what is rebuilt unfinished
		report, err := RebuildRegistry(testContext(t), c, RebuildRequest{Force: i > 0, Progress: func(string) { said++ }}, zerolog.Nop())
		if err != nil {
			t.Fatal(err)
		}
		if report.ASDs != 1 || report.Presets != 1 || len(report.Volumes) != len(records) || len(report.Pools) != 1 || said == 0 ||
			len(report.Problems)+len(report.Lost)+len(report.Missing) > 0 || (report.Previous != "") != (i > 0) {
			t.Fatalf("%+v", report)
		}
		for _, v := range report.Volumes {
			if want := records[strings.TrimPrefix(v.Name, "default/")]; v.Size != want.Size || v.ID != want.ID.String() || v.Note != "" {
				t.Fatalf("%+v, want %+v", v, want)
			}
		}
		if i == 0 {
			writeFileT(t, filepath.Join(c.DataDir, "registry.db.rebuilding"), "half of one")
		}
	}
	h, client = startHost(t, c)
	defer stopHost(t, h)
	await(t, "the volumes to be opened by the start", func() bool {
		return !slices.ContainsFunc(familyNames, func(name string) bool { return h.volumes.device("default/"+name) == nil })
	})
	// The instance is another one; its records are as they were but for the owner.
	for name, r := range records {
		r.Owner = h.id.ID
		records[name] = r
		s := h.volumes.storeOf(&r)
		err := s.Put(testContext(t), r.ID.String(), "stale", r.Epoch, driver.Object{Data: strings.NewReader("x"), Size: 1})
		if !errors.Is(err, driver.ErrStaleEpoch) {
			t.Fatalf("the owner of before writes to %s: %v", name, err)
		}
	}
	verifyFamily(t, h, client, registry.DefaultPool, records)
	for _, name := range familyNames { // the copies follow
		copyIs(t, h, "default/"+name)
	}
}

func writeFileT(t *testing.T, name, text string) {
	t.Helper()
	if err := os.WriteFile(name, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

// TestP10RebuiltWithoutADisk: with 2+1 on three storage daemons two suffice, if the
// operator says so.
func TestP10RebuiltWithoutADisk(t *testing.T) {
	c := emptyConfig(t)
	c.Cache.Local, c.Cache.Read = 0, 0
	c.Pool.SCOSize = 1 << 20
	h, client := startHost(t, c)
	ctx := testContext(t)
	asds := addDirs(t, client, 3)
	if err := errors.Join(second(client.CreatePreset(ctx, control.Preset{Name: "safe", Policies: []control.Policy{{K: 2, M: 1, C: 3, X: 1}}})),
		second(client.CreatePool(ctx, control.CreatePool{Name: "safe", Preset: "safe", SCOSize: 1 << 20}))); err != nil {
		t.Fatal(err)
	}
	records := makeFamily(t, c, h, client, "safe")
	loseAllBut(t, c.DataDir, "instance.json")
	req := RebuildRequest{ASDs: []string{asds[0].Address, asds[1].Address}}
	_, err := RebuildRegistry(ctx, c, req, zerolog.Nop())
	refusedFor(t, err, control.CodeNeedsForce, asds[2].ID, "--force")
	if files, err := filepath.Glob(filepath.Join(c.DataDir, "registry.db*")); err != nil || len(files) > 0 {
		t.Fatalf("a refusal leaves %v, %v", files, err)
	}
	req.Force = true
	report, err := RebuildRegistry(ctx, c, req, zerolog.Nop())
	if err != nil || len(report.Lost) > 0 || !slices.Equal(report.Missing, []string{asds[2].ID}) {
		t.Fatalf("%+v, %v", report, err)
	}
	h, client = startHost(t, c)
	defer stopHost(t, h)
	verifyFamily(t, h, client, "safe", records)
}

// TestP10RebuiltWithoutTheKey: without the master key of an encrypted volume it is
// refused; done all the same, the others come back, and a daemon that ran with them
// has taken nothing from it: with the key it comes back as it was.
func TestP10RebuiltWithoutTheKey(t *testing.T) {
	c := emptyConfig(t)
	c.Cache.Local, c.Cache.Read = 0, 0
	right := filepath.Join(t.TempDir(), "keys")
	writeFileT(t, right, strings.Repeat("5a", alba.KeyBytes)+"\n")
	c.Backend.MasterKeys = right
	h, client := startHost(t, c)
	ctx := testContext(t)
	asds := addDirs(t, client, 1)
	one := []control.Policy{{K: 1, C: 1, X: 1}}
	if err := errors.Join(second(client.CreatePreset(ctx, control.Preset{Name: "open", Policies: one})),
		second(client.CreatePreset(ctx, control.Preset{Name: "secret", Policies: one, Encryption: "aes-256-gcm"})),
		second(client.CreatePool(ctx, control.CreatePool{Name: "open", Preset: "open"})),
		second(client.CreatePool(ctx, control.CreatePool{Name: "secret", Preset: "secret"})),
		second(client.CreateVolume(ctx, control.CreateVolume{Name: "open/p", Size: 8 << 20}))); err != nil {
		t.Fatal(err)
	}
	copyIs(t, h, "open/p")
	records := makeFamily(t, c, h, client, "secret")
	loseAllBut(t, c.DataDir, "instance.json")
	req := RebuildRequest{ASDs: []string{asds[0].Address}}
	wrong := filepath.Join(t.TempDir(), "keys")
	writeFileT(t, wrong, strings.Repeat("a5", alba.KeyBytes)+"\n")
	for _, keys := range []string{"", wrong} {
		c.Backend.MasterKeys = keys
		_, err := RebuildRegistry(ctx, c, req, zerolog.Nop())
		refusedFor(t, err, control.CodeNeedsForce, "3 volumes are encrypted", records["v"].ID.String(), "--master-keys", "--force")
	}
	if files, err := filepath.Glob(filepath.Join(c.DataDir, "registry.db*")); err != nil || len(files) > 0 {
		t.Fatalf("a refusal leaves %v, %v", files, err)
	}
	req.Force = true
	report, err := RebuildRegistry(ctx, c, req, zerolog.Nop())
	if err != nil || len(report.Volumes) != 1 || report.Volumes[0].Name != "open/p" {
		t.Fatalf("%+v, %v", report, err)
	}
	for name, r := range records {
		if !slices.ContainsFunc(report.Problems, func(p string) bool { return strings.Contains(p, r.ID.String()) && strings.Contains(p, "master key") }) {
			t.Errorf("no problem says that %s was left out: %q", name, report.Problems)
		}
	}
	h, _ = startHost(t, c)
	stopHost(t, h)

	c.Backend.MasterKeys, req.Force = right, false
	_, err = RebuildRegistry(ctx, c, req, zerolog.Nop())
	refusedFor(t, err, control.CodeNeedsForce, "1 volumes")
	req.Force = true
	if report, err = RebuildRegistry(ctx, c, req, zerolog.Nop()); err != nil || len(report.Volumes) != 1+len(records) || len(report.Problems) > 0 {
		t.Fatalf("%+v, %v", report, err)
	}
	h, client = startHost(t, c)
	defer stopHost(t, h)
	verifyFamily(t, h, client, "secret", records)
}

// TestP10VolumesWithoutACopy: what has no copy of its record comes back under a name
// that says so, with its contents, size and what it is a clone of.
func TestP10VolumesWithoutACopy(t *testing.T) {
	c := objectConfig(t)
	h, client := startHost(t, c)
	records := makeFamily(t, c, h, client, registry.DefaultPool)
	ctx := testContext(t)
	reg, err := registry.Open(filepath.Join(c.DataDir, "registry.db"))
	if err != nil {
		t.Fatal(err)
	}
	o, err := openObjectStore(ctx, Parts{FS: vfs.OS()}, reg, "test", &c, true, zerolog.Nop())
	for _, name := range []string{"v", "c"} {
		if err != nil {
			break
		}
		r := records[name]
		s, ns := o.store(r.Preset), r.ID.String()
		var numbers []uint64
		numbers, err = copies(ctx, s, ns)
		if len(numbers) != 1 {
			t.Fatalf("copies %v", numbers)
		}
		err = errors.Join(err, s.Delete(ctx, ns, copyName(numbers[0]), r.Epoch))
	}
	await(t, "the copies to be gone from the storage daemon", func() bool {
		trash, err := reg.List(ctx, alba.TrashPrefix)
		if err != nil {
			t.Fatal(err)
		}
		return len(trash) == 0
	})
	if err := errors.Join(err, o.close(), reg.Close()); err != nil {
		t.Fatal(err)
	}
	loseAllBut(t, c.DataDir, "asd")
	report, err := RebuildRegistry(ctx, c, RebuildRequest{}, zerolog.Nop())
	if err != nil || len(report.Volumes) != 3 {
		t.Fatalf("%+v, %v", report, err)
	}
	h, _ = startHost(t, c)
	defer stopHost(t, h)
	names := map[string]string{}
	for _, v := range report.Volumes {
		names[v.ID] = v.Name
		if v.Name != "default/empty" && (!strings.HasPrefix(v.Name, "default/recovered-") || v.Note == "") {
			t.Fatalf("%+v", v)
		}
	}
	v, clone := records["v"], records["c"]
	verifyMixed(t, h, names[v.ID.String()], 2, familyPages/2)
	verifyMixed(t, h, names[clone.ID.String()], 3, familyPages/4)
	verifyMixed(t, h, names[v.ID.String()]+"@s", 1, familyPages)
	e, err := h.volumes.load(ctx, names[clone.ID.String()])
	if err != nil || e.Record.Size != clone.Size || !reflect.DeepEqual(e.Record.Ancestors, clone.Ancestors) {
		t.Fatalf("clone %+v, %v", e.Record, err)
	}
}

// TestRebuildIsRefused: where a daemon runs, where there is a registry with volumes or
// a damaged one, and where there is nothing to rebuild it from; nothing changes then.
func TestRebuildIsRefused(t *testing.T) {
	c := objectConfig(t)
	h, client := startHost(t, c)
	ctx := testContext(t)
	if _, err := client.CreateVolume(ctx, control.CreateVolume{Name: "v", Size: 8 << 20}); err != nil {
		t.Fatal(err)
	}
	copyIs(t, h, "v")
	rebuild := func(req RebuildRequest) error {
		_, err := RebuildRegistry(ctx, c, req, zerolog.Nop())
		return err
	}
	refusedFor(t, rebuild(RebuildRequest{Force: true}), control.CodeInUse, "data directory")
	stopHost(t, h)
	name := filepath.Join(c.DataDir, "registry.db")
	refusedFor(t, rebuild(RebuildRequest{}), control.CodeNeedsForce, "1 volumes")
	refusedFor(t, rebuild(RebuildRequest{Force: true, ASDs: []string{t.TempDir()}}), control.CodeNotFound, "identity")
	asd := embeddedDir(c.DataDir)
	refusedFor(t, rebuild(RebuildRequest{Force: true, ASDs: []string{asd, asd}}), control.CodeInvalid, "twice")
	h, client = startHost(t, c)
	if v, err := client.Volume(ctx, "default/v"); err != nil || v.Size != 8<<20 {
		t.Fatalf("a refusal changed the registry: %+v, %v", v, err)
	}
	stopHost(t, h)
	damaged := []byte(strings.Repeat("garbage\r\n", 100))
	if err := os.WriteFile(name, damaged, 0o600); err != nil {
		t.Fatal(err)
	}
	refusedFor(t, rebuild(RebuildRequest{}), control.CodeNeedsForce, "can't be read")
	report, err := RebuildRegistry(ctx, c, RebuildRequest{Force: true}, zerolog.Nop())
	if err != nil {
		t.Fatal(err)
	}
	if kept, err := os.ReadFile(report.Previous); err != nil || string(kept) != string(damaged) {
		t.Fatalf("the registry of before was not kept: %v", err)
	}
	c.DataDir = filepath.Join(c.DataDir, "none")
	refusedFor(t, rebuild(RebuildRequest{}), control.CodeNotFound, "none")
}

// TestRecordCopyGolden holds the format of the copies, and what is refused.
func TestRecordCopyGolden(t *testing.T) {
	b, err := os.ReadFile(filepath.Join("testdata", "record_copy_v1.json"))
	if err != nil {
		t.Fatal(err)
	}
	b = bytes.TrimSpace(b)
	c, err := decodeCopy(b)
	if err != nil {
		t.Fatal(err)
	}
	if again, err := json.Marshal(c); err != nil || string(again) != string(b) {
		t.Fatalf("encoded anew\n%s\n%v, want\n%s", again, err, b)
	}
	if c.Volume.Name != "vm1" || c.Pool.Preset != "default" || c.PoolRevision != 7 || c.Schedule == nil || c.PoolSchedule == nil || c.Volume.Limits == nil {
		t.Fatalf("%+v", c)
	}
	for what, change := range map[string][2]string{
		"version":          {`{"version":1`, `{"version":2`},
		"record's version": {`"volume":{"version":3`, `"volume":{"version":99`},
		"name":             {`"name":"vm1"`, `"name":"../x"`},
		"pool":             {`"pool":"default"`, `"pool":"other"`},
		"field":            {`"pool_revision"`, `"colour"`},
	} {
		if c, err := decodeCopy([]byte(strings.Replace(string(b), change[0], change[1], 1))); err == nil {
			t.Errorf("%s: %+v; want an error", what, c)
		}
	}
}

// FuzzRecordCopy: no contents of a copy does more than be refused, and what is taken
// has names that a registry takes.
func FuzzRecordCopy(f *testing.F) {
	b, err := os.ReadFile(filepath.Join("testdata", "record_copy_v1.json"))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Fuzz(func(t *testing.T, b []byte) {
		c, err := decodeCopy(b)
		if err == nil && (registry.CheckName("volume", c.Volume.Name) != nil || registry.CheckName("pool", c.Pool.Name) != nil) {
			t.Fatalf("%+v", c)
		}
	})
}
