package host

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"

	"github.com/google/uuid"

	"scoria/driver/block"
	"scoria/driver/control"
	"scoria/driver/registry"
)

// snapshotOpener is the block.Opener of front ends that know snapshots: names may
// be POOL/VOLUME@SNAPSHOT, and devices tell what changed.
type snapshotOpener struct{ *VolumeSet }

var _ block.Opener = snapshotOpener{}

// Open implements block.Opener.
func (o snapshotOpener) Open(ctx context.Context, name string) (block.Device, error) {
	if strings.Contains(name, "@") {
		d, err := o.openSnapshot(ctx, name)
		if err != nil {
			return nil, err
		}
		if l, ok := d.volume.(*limited); ok {
			d.Device = l.limits.Share(d.view) // its readers are the volume's, too
		}
		return d, nil
	}
	name, err := fullName(name)
	if err != nil {
		return nil, &notFoundError{err.Error()}
	}
	dev, err := o.VolumeSet.Open(ctx, name)
	if err != nil {
		return nil, err
	}
	vol, err := o.open(ctx, name)
	if err != nil {
		return nil, err
	}
	e, err := o.load(ctx, name)
	if err != nil {
		return nil, err
	}
	return &differ{Device: dev, set: o.VolumeSet, volume: vol, id: e.Record.ID, holds: map[string]View{}}, nil
}

// Names implements block.Opener: every volume, followed by its snapshots.
func (o snapshotOpener) Names(ctx context.Context) ([]string, error) {
	volumes, err := registry.LoadAll[registry.Volume](ctx, o.reg, registry.VolumePrefix)
	if err != nil {
		return nil, err
	}
	snapshots, err := registry.LoadAll[registry.Snapshot](ctx, o.reg, registry.SnapshotPrefix)
	if err != nil {
		return nil, err
	}
	of := map[uuid.UUID][]string{}
	for i := range snapshots {
		if s := &snapshots[i].Record; s.State == registry.StateReady && !s.Temporary {
			of[s.Volume] = append(of[s.Volume], s.Name)
		}
	}
	var names []string
	for i := range volumes {
		r := &volumes[i].Record
		if r.State != registry.StateReady || r.Incomplete != nil {
			continue
		}
		names = append(names, r.FullName())
		for _, s := range of[r.ID] {
			names = append(names, r.FullName()+"@"+s)
		}
	}
	slices.Sort(names)
	return names, nil
}

// openSnapshot opens a snapshot for one user.
func (h *VolumeSet) openSnapshot(ctx context.Context, name string) (*snapshotDevice, error) {
	pool, vol, snapshot, err := registry.SplitSnapshot(name)
	if err != nil {
		return nil, &notFoundError{fmt.Sprintf("no snapshot %q: %v", name, err)}
	}
	full := pool + "/" + vol
	e, err := h.load(ctx, full)
	if err != nil {
		return nil, err
	}
	s, err := h.loadSnapshot(ctx, &e.Record, snapshot)
	if err != nil {
		return nil, err
	}
	if s.Record.State != registry.StateReady {
		return nil, control.Errorf(control.CodeUnavailable, "snapshot %s is not ready: %s", name, stateText(s.Record.State))
	}
	dev, err := h.open(ctx, full)
	if err != nil {
		return nil, err
	}
	v := h.volume(full)
	v.readers.Add(1)
	view, err := h.engine.OpenSnapshot(ctx, dev, s.Record.ID)
	if err != nil {
		v.readers.Add(-1)
		return nil, err
	}
	return &snapshotDevice{
		differ:  differ{Device: view, set: h, volume: dev, id: e.Record.ID, snapshot: &s.Record, holds: map[string]View{}},
		view:    view,
		readers: &v.readers,
	}, nil
}

// snapshotDevice is a snapshot that one user has open.
type snapshotDevice struct {
	differ
	view    View
	readers *atomic.Int64
}

// Release implements block.Releaser.
func (d *snapshotDevice) Release() {
	d.differ.Release()
	if err := d.view.Close(); err != nil {
		d.set.log.Warn().Err(err).Str("snapshot", d.Info().Name).Msg("closing a snapshot failed")
	}
	d.readers.Add(-1)
}

// differ is a volume, or a snapshot of it, that tells what changed. Snapshots that
// it was asked about are held until it is released: they can't be deleted under a
// backup, and asking again is cheap.
type differ struct {
	block.Device
	set      *VolumeSet
	volume   Volume
	id       uuid.UUID
	snapshot *registry.Snapshot // nil: the volume itself

	gate  sync.Mutex
	holds map[string]View // by name; guarded by gate
}

var _ block.Differ = (*differ)(nil)

// Since implements block.Differ.
func (d *differ) Since(ctx context.Context) ([]string, error) {
	list, err := registry.Snapshots(ctx, d.set.reg, d.id)
	if err != nil {
		return nil, err
	}
	var names []string
	for i := range list {
		s := &list[i].Record
		if s.State == registry.StateReady && !s.Temporary && (d.snapshot == nil || s.Sequence < d.snapshot.Sequence) {
			names = append(names, s.Name)
		}
	}
	return names, nil
}

// Changes implements block.Differ.
func (d *differ) Changes(ctx context.Context, since string, off, length uint64, fn func(block.Extent) bool) error {
	id, err := d.hold(ctx, since)
	if err != nil {
		return err
	}
	upTo := uuid.Nil
	if d.snapshot != nil {
		upTo = d.snapshot.ID
	}
	return d.volume.Changes(ctx, id, upTo, off, length, fn)
}

// hold returns the ID of a snapshot and keeps the snapshot.
func (d *differ) hold(ctx context.Context, name string) (uuid.UUID, error) {
	d.gate.Lock()
	defer d.gate.Unlock()
	if v, ok := d.holds[name]; ok {
		return v.Snapshot().ID, nil
	}
	s, err := registry.Load[registry.Snapshot](ctx, d.set.reg, registry.SnapshotKey(d.id, name))
	if err != nil {
		return uuid.Nil, &notFoundError{fmt.Sprintf("no snapshot %s of %s", name, d.Info().Name)}
	}
	view, err := d.set.engine.OpenSnapshot(ctx, d.volume, s.Record.ID)
	if err != nil {
		return uuid.Nil, err
	}
	d.holds[name] = view
	return s.Record.ID, nil
}

// Hasten implements block.Delayer.
func (d *differ) Hasten(owner any) { block.Hasten(d.Device, owner) }

// Release implements block.Releaser.
func (d *differ) Release() {
	d.gate.Lock()
	defer d.gate.Unlock()
	for name, v := range d.holds {
		if err := v.Close(); err != nil {
			d.set.log.Warn().Err(err).Str("snapshot", name).Msg("closing a snapshot failed")
		}
		delete(d.holds, name)
	}
}

// readOnly is a template as front ends get it.
type readOnly struct{ Volume }

// Info implements block.Device.
func (d readOnly) Info() block.Info {
	i := d.Volume.Info()
	i.ReadOnly = true
	return i
}

// Claim implements block.Device.
func (d readOnly) Claim(block.Claimant) (func(), error) { return nil, block.ErrReadOnly }

// Watch implements block.Device.
func (d readOnly) Watch(fn func(block.Info)) (cancel func()) {
	return d.Volume.Watch(func(i block.Info) {
		i.ReadOnly = true
		fn(i)
	})
}

// Hasten implements block.Delayer.
func (d readOnly) Hasten(owner any) { block.Hasten(d.Volume, owner) }

// Submit implements block.Device: reads and flushes go on, in order; the rest is
// refused.
func (d readOnly) Submit(batch []*block.Request) {
	for len(batch) > 0 {
		n := slices.IndexFunc(batch, func(r *block.Request) bool { return r.Op != block.OpRead && r.Op != block.OpFlush })
		if n < 0 {
			n = len(batch)
		}
		d.Volume.Submit(batch[:n])
		if n == len(batch) {
			return
		}
		batch[n].Err, batch[n].Ended = block.ErrReadOnly, true
		batch = batch[n+1:]
	}
}
