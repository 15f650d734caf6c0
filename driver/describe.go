package driver

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/google/uuid"

	"scoria/driver/block"
	"scoria/driver/lba"
)

// Describe reads what the newest readable root in the store says of a volume whose
// record is lost: its size in bytes and what it builds on. ErrNoObject if the store
// has no root of it; a fresh volume has none. For whoever rebuilds a registry, with
// the volume open nowhere.
func Describe(ctx context.Context, s Store, id uuid.UUID) (size uint64, ancestors []Ancestor, err error) {
	v := &Volume{cfg: VolumeConfig{ID: id, Name: id.String(), Store: s}}
	names, err := s.List(ctx, v.namespace(), rootPrefix)
	if err != nil {
		return 0, nil, fmt.Errorf("volume %s: roots: %w", id, err)
	}
	if len(names) == 0 {
		return 0, nil, fmt.Errorf("volume %s: roots: %w", id, ErrNoObject)
	}
	var errs []error
	for _, name := range slices.Backward(names) {
		root, blob, err := v.rootAndBlob(ctx, name)
		if err == nil {
			return root.Clusters * block.ClusterSize, blob.ancestry, nil
		}
		if ctx.Err() != nil {
			return 0, nil, ctx.Err()
		}
		errs = append(errs, fmt.Errorf("volume %s: %s: %w", id, name, err))
	}
	return 0, nil, errors.Join(errs...)
}

func (v *Volume) rootAndBlob(ctx context.Context, name string) (*lba.Root, *rootBlob, error) {
	root, err := v.storedRoot(ctx, name)
	if err != nil {
		return nil, nil, err
	}
	if root.Volume != v.cfg.ID {
		return nil, nil, fmt.Errorf("it is of volume %s: %w", root.Volume, lba.ErrFormat)
	}
	blob, err := decodeBlob(root.Blob)
	return root, blob, err
}
