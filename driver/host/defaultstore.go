package host

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"syscall"

	"scoria/alba"
	"scoria/alba/proxy"
	"scoria/driver/control"
	"scoria/driver/registry"
)

// DefaultPreset is the preset that the daemon makes if it is needed and not there.
const DefaultPreset = "default"

// builtInPreset is satisfied by one disk; with every disk that is added, up to six,
// what is stored is stored anew so that more of them may die. An upload is
// acknowledged when one disk may die.
func builtInPreset() alba.Preset {
	return alba.Preset{Name: DefaultPreset, FragmentBytes: alba.DefaultFragment, Policies: []alba.Policy{
		{K: 4, M: 2, C: 6, X: 1}, {K: 3, M: 2, C: 5, X: 1}, {K: 2, M: 2, C: 4, X: 1}, {K: 2, M: 1, C: 3, X: 1}, {K: 1, M: 1, C: 2, X: 1}, {K: 1, M: 0, C: 1, X: 1},
	}}
}

// poolStore is the kind of store that a pool's volumes are in.
func poolStore(r *registry.Pool) string {
	if r.Preset == "" {
		return control.StoreDirectory
	}
	return control.StoreObjects
}

// choosePoolStore fills in the preset of a new pool.
func (b *backend) choosePoolStore(ctx context.Context, r *registry.Pool, store string) error {
	if store == "" && r.Preset == "" {
		store = b.config.Pool.Store
	}
	switch store {
	case "", control.StoreObjects:
	case control.StoreDirectory:
		if r.Preset != "" {
			return control.Errorf(control.CodeInvalid, "pool %s: preset %s: only for store %s", r.Name, r.Preset, control.StoreObjects)
		}
		return nil
	default:
		return control.Errorf(control.CodeInvalid, "pool %s: store %q: must be %s or %s", r.Name, store, control.StoreObjects, control.StoreDirectory)
	}
	if r.Preset != "" {
		_, err := b.objects.preset(ctx, r.Preset)
		return err
	}
	r.Preset = DefaultPreset
	return b.objects.prepareDefault(ctx)
}

// makeDefaultPool makes the pool of volumes that are named without one, unless it is
// there: what data directories were made with stays.
func (h *Host) makeDefaultPool(ctx context.Context) error {
	key := registry.PoolKey(registry.DefaultPool)
	_, err := registry.Load[registry.Pool](ctx, h.reg, key)
	if !errors.Is(err, registry.ErrNotFound) {
		return err
	}
	r := registry.Pool{Name: registry.DefaultPool, BlockSize: h.config.Pool.BlockSize, SCOSize: int64(h.config.Pool.SCOSize), Created: h.started}
	if h.config.Pool.Store == control.StoreObjects {
		r.Preset = DefaultPreset
		if err := h.objects.prepareDefault(ctx); err != nil {
			return fmt.Errorf("object store of pool %s: %w", r.Name, err)
		}
	}
	_, err = registry.Create(ctx, h.reg, key, r)
	return err
}

// embeddedDir is where the storage daemon lies that the daemon makes by itself.
func embeddedDir(dataDir string) string { return filepath.Join(dataDir, "asd") }

// prepareDefault makes the built-in preset and a storage daemon below the data
// directory, unless there is a preset of that name or any storage daemon.
func (o *objectStore) prepareDefault(ctx context.Context) error {
	if len(o.proxy.Fleet().Members()) == 0 {
		_, err := o.add(ctx, control.AddASD{Address: embeddedDir(o.config.DataDir)})
		if control.CodeOf(err) == control.CodeInUse { // proxy.ErrForeign
			return control.Errorf(control.CodeInvalid, "%s holds volumes' data that this registry knows nothing of: if registry.db was lost, `scoria backend rebuild-registry --data-dir %s` makes it anew, or put one back from a backup; the data was not changed (%v)",
				embeddedDir(o.config.DataDir), o.config.DataDir, err)
		}
		if err != nil {
			return err
		}
	}
	if _, err := proxy.LoadPreset(ctx, o.proxy.Registry(), DefaultPreset); !errors.Is(err, proxy.ErrNoPreset) {
		return err
	}
	return objectError(o.proxy.SetPreset(ctx, builtInPreset()))
}

// embeddedReserve is what a storage daemon on the data directory's disk leaves free.
// It is less than what writers leave (cache.reserve), so that checkpoints,
// without which no room can be given back, are still taken when writers pause.
const embeddedReserve = 64 << 20

// reserve is the room that a storage daemon on the data directory's disk keeps free.
func (o *objectStore) reserve() int64 {
	return max(1, min(embeddedReserve, int64(o.config.Cache.Reserve)/4))
}

// sameDisk says whether two directories, of which the first may be missing yet, are on
// one file system.
func sameDisk(dir, other string) bool {
	a, err := os.Stat(dir)
	if errors.Is(err, os.ErrNotExist) {
		a, err = os.Stat(filepath.Dir(dir))
	}
	if err != nil {
		return false
	}
	b, err := os.Stat(other)
	if err != nil {
		return false
	}
	x, ok := a.Sys().(*syscall.Stat_t)
	y, also := b.Sys().(*syscall.Stat_t)
	return ok && also && x.Dev == y.Dev
}
