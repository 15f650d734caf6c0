package driver

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"scoria/driver/block"
	"scoria/driver/lba"
)

// findRoot returns the newest readable root and forgets temporary files.
func (v *Volume) findRoot(ctx context.Context, found *foundSnaps) (*lba.Root, error) {
	local, err := v.eng.cfg.FS.List(v.mapDir())
	if err != nil {
		return nil, err
	}
	stored, err := v.cfg.Store.List(ctx, v.namespace(), "")
	if err != nil {
		return nil, err
	}
	var roots []string
	for i, n := range append(slices.Clone(local), stored...) {
		var object uint32
		switch {
		case strings.HasSuffix(n, ".tmp"):
			if err := v.eng.cfg.FS.Remove(v.mapPath(n)); err != nil {
				return nil, err
			}
		case strings.HasPrefix(n, rootPrefix):
			roots = append(roots, n)
			var sequence uint64
			if _, err := fmt.Sscanf(n, rootPrefix+"%016x", &sequence); err == nil {
				v.ckpt.sequence = max(v.ckpt.sequence, sequence)
			}
		case strings.HasPrefix(n, snapPrefix):
			if sequence, ok := found.see(n, i >= len(local)); ok {
				v.ckpt.sequence = max(v.ckpt.sequence, sequence)
			}
		case strings.HasPrefix(n, pagesPrefix):
			if _, err := fmt.Sscanf(n, pagesPrefix+"%08x", &object); err == nil {
				v.ckpt.object = max(v.ckpt.object, object)
				if i >= len(local) {
					v.ckpt.inStore[object] = true
				}
			}
		}
	}
	slices.Sort(roots)
	roots = slices.Compact(roots)
	slices.Reverse(roots)
	for _, n := range roots {
		root, err := v.readRoot(ctx, n)
		if err == nil {
			v.ckpt.rootStored = slices.Contains(stored, n)
			return root, nil
		}
		if failed := (*storeError)(nil); errors.As(err, &failed) {
			return nil, err // it may be sound; an older one would lose what came after
		}
		v.log.Error().Err(err).Str("root", n).Msg("checkpoint root is not readable; trying the one before")
		v.checksumTrouble(err)
	}
	if len(roots) > 0 {
		return nil, fmt.Errorf("none of %d checkpoint roots is readable: %w", len(roots), block.ErrCorrupt)
	}
	return nil, nil
}

func (v *Volume) checksumTrouble(err error) {
	if errors.Is(err, lba.ErrFormat) {
		v.stats.checksumErrors.Add(1)
	}
}

// readRoot reads a root from the local disk or, if that one is damaged, the store.
func (v *Volume) readRoot(ctx context.Context, name string) (*lba.Root, error) {
	r, size, err := v.openMapObject(ctx, name)
	if err != nil {
		return nil, err
	}
	root, err := lba.ReadRoot(r, size)
	if err == nil || !errors.Is(err, lba.ErrFormat) {
		return root, err
	}
	if _, isLocal := r.(mapFile); !isLocal {
		return nil, err
	}
	root, serr := v.storedRoot(ctx, name)
	if errors.Is(serr, ErrNoObject) || errors.Is(serr, ErrStaleEpoch) {
		return nil, err // there is the local one only
	}
	return root, serr
}

// storedRoot reads a root in the store.
func (v *Volume) storedRoot(ctx context.Context, name string) (*lba.Root, error) {
	size, err := v.storeSize(ctx, name)
	if err != nil {
		return nil, err
	}
	return lba.ReadRoot(storeObject{ctx, v, name}, size)
}
