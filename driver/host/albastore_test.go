package host_test

import (
	"path/filepath"
	"testing"

	"scoria/alba"
	"scoria/alba/albatest"
	"scoria/alba/vfs"
	"scoria/driver"
	"scoria/driver/host"
	"scoria/driver/host/objecttest"
	"scoria/driver/registry"
	"scoria/driver/storetest"
)

// TestAlbaStore: the object store on embedded storage daemons and the embedded
// registry is a driver.Store.
func TestAlbaStore(t *testing.T) {
	for _, ps := range []alba.Preset{
		albatest.Preset(alba.Policy{K: 1, M: 0, C: 1, X: 1}),
		albatest.Preset(alba.Policy{K: 2, M: 1, C: 2, X: 1}),
	} {
		t.Run(ps.Policies[0].String(), func(t *testing.T) {
			storetest.Run(t, func(t *testing.T) driver.Store {
				dir := t.TempDir()
				reg, err := registry.Open(filepath.Join(dir, "registry"))
				if err != nil {
					t.Fatal(err)
				}
				s, err := objecttest.Open(host.AlbaRegistry{Store: reg}, vfs.OS(), dir, ps.Policies[0].Shards(), ps)
				if err != nil {
					t.Fatal(err)
				}
				t.Cleanup(func() {
					_ = s.Close()
					if err := reg.Close(); err != nil {
						t.Error(err)
					}
				})
				return s
			})
		})
	}
}

// TestAlbaStoreCrash: power lost, killed, a disk's call failed, at any time: what the
// store and its storage daemons acknowledged is there, and what was under way is
// there wholly or not at all.
func TestAlbaStoreCrash(t *testing.T) {
	ps := albatest.Preset(alba.Policy{K: 2, M: 1, C: 2, X: 1})
	storetest.RunCrashEvery(t, 5, func(fsys vfs.FS) (driver.Store, error) {
		if err := fsys.MkdirAll("store"); err != nil {
			return nil, err
		}
		reg, err := objecttest.OpenRegistry(fsys, "store/registry")
		if err != nil {
			return nil, err
		}
		return objecttest.Open(reg, fsys, "store", ps.Policies[0].Shards(), ps)
	})
}
