package host

import (
	"path/filepath"
	"testing"

	"scoria/driver/control"
	"scoria/driver/registry"
)

// TestOlderRegistryRemovesNothingFinished: a registry that has a clone as being made, or
// an import as under way, does not take away the volume that was finished since.
func TestOlderRegistryRemovesNothingFinished(t *testing.T) {
	for _, c := range []Config{testConfig(t), objectConfig(t)} {
		h, client := startHost(t, c)
		ctx := testContext(t)
		check := func(err error) {
			t.Helper()
			if err != nil {
				t.Fatal(err)
			}
		}
		check(second(client.CreateVolume(ctx, control.CreateVolume{Name: "default/v", Size: 8 << 20})))
		fillVolume(t, h, "default/v", 4, 1)
		check(second(client.CreateSnapshot(ctx, "default/v", control.CreateSnapshot{Name: "s"})))
		names := []string{"default/clone", "default/import"}
		for _, name := range names {
			check(second(client.CloneVolume(ctx, control.CloneVolume{From: "default/v@s", Name: name})))
			fillVolume(t, h, name, 8, 2)
			copyIs(t, h, name)
		}
		stopHost(t, h)

		reg, err := registry.Open(filepath.Join(c.DataDir, "registry.db"))
		check(err)
		for _, name := range names {
			e, err := registry.Load[registry.Volume](ctx, reg, registry.VolumeKey("default", name[len("default/"):]))
			check(err)
			if name == "default/import" {
				e.Record.Incomplete = &registry.Incomplete{Kind: registry.IncompleteImport}
			} else {
				e.Record.State = registry.StateCreating
			}
			check(second(registry.Replace(ctx, reg, registry.VolumeKey("default", e.Record.Name), e)))
		}
		check(reg.Close())

		h, client = startHost(t, c)
		for _, name := range names {
			check(second(h.volumes.Open(ctx, name)))
			verifyVolume(t, h, name, 8, 2)
			v, err := client.Volume(ctx, name)
			check(err)
			found := false
			for _, cond := range v.Conditions {
				found = found || cond.Code == "registry-is-older"
			}
			if !found {
				t.Errorf("%s: nothing is said: %+v", name, v.Conditions)
			}
		}
		stopHost(t, h)
	}
}
