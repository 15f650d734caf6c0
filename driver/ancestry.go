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

// A clone begins as a snapshot of its parent. Its SCO numbers and page object
// numbers go on above those of the snapshot, so that a location or page address
// says by itself whose it is: the first ancestor's whose bound it does not exceed,
// or else the clone's own. The clone's first root has the directory of the
// snapshot's. So pages and clusters are shared as they are, and a read costs the
// same at any depth.
//
// What lies in an ancestor is read through that volume, which is open as long as
// the clone is; what it caches serves all its clones. The clone's root names its
// ancestors as long as its map or one of its snapshots refers to them.

// Ancestor is a volume that a clone builds on: the clone's SCOs up to SCO and its
// page objects up to Object, as far as no earlier ancestor has them, are that
// volume's, and Snapshot is what keeps them.
type Ancestor struct {
	Volume   uuid.UUID `json:"volume"`
	Snapshot uuid.UUID `json:"snapshot"`
	SCO      uint64    `json:"sco"`
	Object   uint32    `json:"object"`
}

// ErrAncestorClosed refuses to open a clone before the volumes that it builds on.
var ErrAncestorClosed = errors.New("a volume that the clone builds on is not open")

// kin is the ancestors of an open clone. It never changes.
type kin struct {
	list    []Ancestor
	volumes []*Volume
	held    []*snapshotState
	sco     uint64 // the last that is not the clone's own
	object  uint32 // likewise
}

// Ancestors lists what the volume builds on, oldest first; none if it is no clone
// or has been flattened. From any goroutine.
func (v *Volume) Ancestors() []Ancestor {
	if k := v.kin.Load(); k != nil {
		return slices.Clone(k.list)
	}
	return nil
}

// owner is whose SCO n is.
func (v *Volume) owner(n uint64) *Volume {
	k := v.kin.Load()
	if k == nil || n > k.sco {
		return v
	}
	i, _ := slices.BinarySearchFunc(k.list, n, func(a Ancestor, n uint64) int { return compare(a.SCO, n) })
	return k.volumes[i]
}

// pageOwner is whose page object o is.
func (v *Volume) pageOwner(o uint32) *Volume {
	k := v.kin.Load()
	if k == nil || o > k.object {
		return v
	}
	i, _ := slices.BinarySearchFunc(k.list, o, func(a Ancestor, o uint32) int { return compare(uint64(a.Object), uint64(o)) })
	return k.volumes[i]
}

func compare(a, b uint64) int {
	switch {
	case a < b:
		return -1
	case a > b:
		return 1
	}
	return 0
}

// link finds the ancestors among the open volumes and holds them and their
// snapshots. Caller is alone.
func (v *Volume) link(list []Ancestor) error {
	if len(list) == 0 {
		return nil
	}
	last := list[len(list)-1]
	k := &kin{list: list, sco: last.SCO, object: last.Object}
	v.origin = Snapshot{SCO: last.SCO, LastObject: last.Object}
	v.ckpt.object = max(v.ckpt.object, last.Object)
	for _, a := range list {
		v.eng.mu.Lock()
		parent := v.eng.volumes[a.Volume]
		v.eng.mu.Unlock()
		if parent == nil || !parent.clones.add() {
			k.release()
			return fmt.Errorf("%w: volume %s", ErrAncestorClosed, a.Volume)
		}
		k.volumes = append(k.volumes, parent)
		parent.metaMu.Lock()
		if i := parent.findSnapshot(a.Snapshot); i >= 0 {
			parent.snaps[i].clones++
			k.held = append(k.held, parent.snaps[i])
		}
		parent.metaMu.Unlock()
		if len(k.held) < len(k.volumes) {
			k.release()
			return fmt.Errorf("snapshot %s of volume %s, which the clone builds on: %w", a.Snapshot, a.Volume, ErrNoSnapshot)
		}
	}
	v.live.inherit(last.SCO)
	v.kin.Store(k)
	return nil
}

func (k *kin) release() {
	for i, s := range k.held {
		k.volumes[i].metaMu.Lock()
		s.clones--
		k.volumes[i].metaMu.Unlock()
	}
	for _, p := range k.volumes {
		p.clones.done()
	}
}

// unlink lets go of the ancestors.
func (v *Volume) unlink() {
	if k := v.kin.Swap(nil); k != nil {
		k.release()
	}
}

// inherited is how many clusters of the map lie in ancestors. It is exact while
// the gate is closed.
func (v *Volume) inherited() uint64 {
	if v.kin.Load() == nil {
		return 0
	}
	return uint64(max(0, v.inheritedAtStart+v.live.lost(v.origin.SCO)))
}

// awaitClones waits until the clones of the volume are closed.
func (v *Volume) awaitClones(ctx context.Context) error {
	none := v.clones.shutting()
	select {
	case <-none:
		return nil
	default:
	}
	select {
	case <-none:
		return nil
	case <-ctx.Done():
		v.clones.reopen()
		return fmt.Errorf("volume %s: close: clones of it are open: %w", v.cfg.Name, ctx.Err())
	}
}

// CreateClone makes a volume that begins as a snapshot of parent, in the time that
// the map's directory takes. It may be repeated. OpenVolume follows, as for any
// volume, with all ancestors open. From any goroutine.
func (e *Engine) CreateClone(ctx context.Context, cfg VolumeConfig, parent *Volume, snapshot uuid.UUID) error {
	if err := cfg.Validate(); err != nil {
		return err
	}
	if err := e.createClone(ctx, cfg, parent, snapshot); err != nil {
		return fmt.Errorf("volume %s: clone of %s: %w", cfg.Name, parent.cfg.Name, err)
	}
	return nil
}

func (e *Engine) createClone(ctx context.Context, cfg VolumeConfig, parent *Volume, snapshot uuid.UUID) error {
	ctx, leave, err := parent.enter(ctx)
	if err != nil {
		return err
	}
	defer leave()
	s, release, err := parent.holdSnapshot(ctx, snapshot)
	if err != nil {
		return err
	}
	defer release()
	if cfg.Size < s.Size {
		return fmt.Errorf("size %d: must be at least the %d bytes of snapshot %s", cfg.Size, s.Size, s.Name)
	}
	source, _, err := parent.readSnapshotRoot(ctx, &s.Snapshot)
	if err != nil {
		return err
	}
	if err := e.CreateVolume(ctx, cfg); err != nil {
		return err
	}
	blob, err := (&rootBlob{ancestry: append(parent.Ancestors(), Ancestor{
		Volume: parent.cfg.ID, Snapshot: s.ID, SCO: s.SCO, Object: s.LastObject,
	})}).encode()
	if err != nil {
		return err
	}
	return e.placeFirstRoot(ctx, cfg, &lba.Root{
		Volume: cfg.ID, Sequence: 1, LogSCO: s.SCO, Clusters: max(source.Clusters, cfg.Size/block.ClusterSize),
		Mapped: source.Mapped, Blob: blob, Directory: source.Directory,
	})
}

// placeFirstRoot makes a volume's first root durable, here and in the store, unless
// there is any already.
func (e *Engine) placeFirstRoot(ctx context.Context, cfg VolumeConfig, root *lba.Root) error {
	v := &Volume{eng: e, cfg: cfg, dir: e.volumeDir(cfg.ID), log: e.cfg.Log}
	local, err := e.cfg.FS.List(v.mapDir())
	if err != nil {
		return err
	}
	stored, err := cfg.Store.List(ctx, v.namespace(), rootPrefix)
	if err != nil || len(stored) > 0 {
		return err
	}
	name := rootName(root.Sequence)
	c := &checkpoints{v: v}
	if !slices.Contains(local, name) {
		buf, err := encodeRoot(root)
		if err != nil {
			return err
		}
		if err := c.writeRoot(name, buf, nil); err != nil {
			return err
		}
	}
	return c.put(ctx, name)
}
