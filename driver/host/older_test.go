package host

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/rs/zerolog"

	"scoria/driver/control"
)

// hasCondition says whether the daemon shows a condition, and with what text.
func hasCondition(t *testing.T, client *control.Client, code string) (text string, ok bool) {
	t.Helper()
	st, err := client.Status(testContext(t))
	if err != nil {
		t.Fatal(err)
	}
	i := slices.IndexFunc(st.Conditions, func(c control.Condition) bool { return c.Code == code })
	if i < 0 {
		return "", false
	}
	return st.Conditions[i].Message, true
}

// TestOlderRegistryIsRebuilt: a daemon whose registry was put back from a backup says so,
// touches nothing in the object store, and serves the volumes in the directory store. The
// registry is rebuilt without force, and has what the storage daemons have, and of the
// backup what they have not.
func TestOlderRegistryIsRebuilt(t *testing.T) {
	c := objectConfig(t)
	h, client := startHost(t, c)
	ctx := testContext(t)
	check := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	check(second(client.CreatePool(ctx, control.CreatePool{Name: "dir", Store: control.StoreDirectory})))
	check(second(client.CreatePool(ctx, control.CreatePool{Name: "none"})))
	for _, name := range []string{"default/v", "dir/d"} {
		check(second(client.CreateVolume(ctx, control.CreateVolume{Name: name, Size: 8 << 20})))
		fillVolume(t, h, name, 16, 1)
		check(second(client.CreateSnapshot(ctx, name, control.CreateSnapshot{Name: "s"})))
		copyIs(t, h, name)
	}
	stopHost(t, h)
	name := filepath.Join(c.DataDir, "registry.db")
	backup, err := os.ReadFile(name)
	check(err)

	h, client = startHost(t, c)
	check(second(client.CreateVolume(ctx, control.CreateVolume{Name: "default/later", Size: 8 << 20})))
	fillVolume(t, h, "default/later", 16, 3)
	copyIs(t, h, "default/later")
	check(second(client.RenameSnapshot(ctx, "default/v", "s", "renamed")))
	fillVolume(t, h, "default/v", 16, 2)
	check(second(client.CreateSnapshot(ctx, "default/v", control.CreateSnapshot{Name: "s2"})))
	fillVolume(t, h, "dir/d", 16, 2)
	storedWhole(t, h, "default/v")
	stopHost(t, h)
	_, err = RebuildRegistry(ctx, c, RebuildRequest{}, zerolog.Nop())
	refusedFor(t, err, control.CodeNeedsForce, "knows all")

	check(os.WriteFile(name, backup, 0o600))
	for range 2 {
		h, client = startHost(t, c)
		if text, ok := hasCondition(t, client, "registry-is-older"); !ok || !strings.Contains(text, "rebuild-registry") {
			t.Fatalf("nothing is said: %q", text)
		}
		if _, err := h.volumes.Open(ctx, "default/v"); err == nil || !strings.Contains(err.Error(), "rebuild-registry") {
			t.Fatalf("a volume is opened as it was: %v", err)
		}
		check(second(h.volumes.Open(ctx, "dir/d")))
		verifyVolume(t, h, "dir/d", 16, 2)
		stopHost(t, h)
	}

	report, err := RebuildRegistry(ctx, c, RebuildRequest{}, zerolog.Nop())
	check(err)
	if len(report.Volumes) != 3 || len(report.Pools) != 3 || report.Previous == "" {
		t.Fatalf("%+v", report)
	}
	h, client = startHost(t, c)
	if text, ok := hasCondition(t, client, "registry-is-older"); ok {
		t.Errorf("the rebuilt registry is older: %s", text)
	}
	for name, seed := range map[string]byte{"default/v": 2, "default/later": 3, "dir/d": 2} {
		check(second(h.volumes.Open(ctx, name)))
		verifyVolume(t, h, name, 16, seed)
	}
	for volume, want := range map[string][]string{"default/v": {"s", "s2"}, "dir/d": {"s"}} {
		list, err := client.Snapshots(ctx, volume)
		check(err)
		var names []string
		for _, s := range list {
			names = append(names, s.Name)
		}
		if !slices.Equal(names, want) {
			t.Errorf("volume %s has snapshots %v, want %v", volume, names, want)
		}
	}
	fillVolume(t, h, "default/v", 16, 4)
	stopHost(t, h)
	h, _ = startHost(t, c)
	check(second(h.volumes.Open(ctx, "default/v")))
	verifyVolume(t, h, "default/v", 16, 4)
	stopHost(t, h)
}
