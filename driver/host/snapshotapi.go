package host

import (
	"context"
	"io"
	"slices"
	"strings"

	"github.com/google/uuid"

	"scoria/driver/control"
	"scoria/driver/registry"
)

var _ control.SnapshotBackend = (*backend)(nil)

// relate fills in, for a list of volumes, what concerns several records.
func (b *backend) relate(ctx context.Context, entries []registry.Entry[registry.Volume], list []control.Volume) error {
	all, err := registry.LoadAll[registry.Volume](ctx, b.reg, registry.VolumePrefix)
	if err != nil {
		return err
	}
	clones := map[uuid.UUID][]string{}
	for i := range all {
		for _, a := range all[i].Record.Ancestors {
			clones[a.Volume] = append(clones[a.Volume], all[i].Record.FullName())
		}
	}
	kvs, err := b.reg.List(ctx, registry.SnapshotPrefix)
	if err != nil {
		return err
	}
	count := map[string]int{}
	const idLength = 36
	for _, kv := range kvs {
		if id := kv.Key[len(registry.SnapshotPrefix):]; len(id) > idLength {
			count[id[:idLength]]++
		}
	}
	for i := range entries {
		id := entries[i].Record.ID
		list[i].Snapshots = count[id.String()]
		list[i].Clones = clones[id]
		slices.Sort(list[i].Clones)
		list[i].Parent = parentName(all, &entries[i].Record)
	}
	return nil
}

// parentName is what a volume was cloned from, with the parent's present name.
func parentName(all []registry.Entry[registry.Volume], r *registry.Volume) string {
	if r.Parent == nil {
		return ""
	}
	i := slices.IndexFunc(all, func(e registry.Entry[registry.Volume]) bool { return e.Record.ID == r.Parent.Volume })
	if _, snapshot, found := strings.Cut(r.Parent.Name, "@"); i >= 0 && found {
		return all[i].Record.FullName() + "@" + snapshot
	}
	return r.Parent.Name
}

func (b *backend) snapshotAnswer(v *registry.Volume, s *registry.Snapshot) control.Snapshot {
	a := control.Snapshot{
		Volume: v.FullName(), Name: s.Name, ID: s.ID, Created: s.Created, Size: s.Size, Metadata: s.Metadata,
		State: string(s.State), Temporary: s.Temporary, Adopted: s.Adopted,
	}
	if b.config.NBD.Enabled {
		a.NBD = "nbd+unix:///" + v.FullName() + "@" + s.Name + "?socket=" + b.config.nbdSocket()
	}
	return a
}

// Snapshots implements control.SnapshotBackend. Without the volume, which may be
// one that can't be opened, the space that each holds is not known.
func (b *backend) Snapshots(ctx context.Context, volume string) ([]control.Snapshot, error) {
	e, err := b.load(ctx, volume)
	if err != nil {
		return nil, err
	}
	var space map[uuid.UUID]uint64
	// First, as the opening may find some.
	if dev, err := b.open(ctx, e.Record.FullName()); err != nil {
		b.log.Warn().Err(err).Str("volume", e.Record.FullName()).Msg("the space of its snapshots is not known")
	} else if space, err = dev.SnapshotSpace(ctx); err != nil {
		return nil, err
	}
	records, err := registry.Snapshots(ctx, b.reg, e.Record.ID)
	if err != nil {
		return nil, err
	}
	list := make([]control.Snapshot, len(records))
	if len(list) == 0 {
		return list, nil
	}
	all, err := registry.LoadAll[registry.Volume](ctx, b.reg, registry.VolumePrefix)
	if err != nil {
		return nil, err
	}
	clones := map[uuid.UUID][]string{}
	for i := range all {
		for _, a := range all[i].Record.Ancestors {
			if a.Volume == e.Record.ID {
				clones[a.Snapshot] = append(clones[a.Snapshot], all[i].Record.FullName())
			}
		}
	}
	for i := range records {
		s := &records[i].Record
		list[i] = b.snapshotAnswer(&e.Record, s)
		list[i].Clones = clones[s.ID]
		if n, ok := space[s.ID]; ok {
			list[i].Alone = &n
		}
	}
	return list, nil
}

// Snapshot implements control.SnapshotBackend.
func (b *backend) Snapshot(ctx context.Context, volume, name string) (control.Snapshot, error) {
	e, err := b.load(ctx, volume)
	if err != nil {
		return control.Snapshot{}, err
	}
	s, err := b.loadSnapshot(ctx, &e.Record, name)
	if err != nil {
		return control.Snapshot{}, err
	}
	list, err := b.Snapshots(ctx, volume)
	if err != nil {
		return control.Snapshot{}, err
	}
	for i := range list {
		if list[i].ID == s.Record.ID {
			return list[i], nil
		}
	}
	return b.snapshotAnswer(&e.Record, &s.Record), nil // as it was a moment ago
}

// CreateSnapshot implements control.SnapshotBackend.
func (b *backend) CreateSnapshot(ctx context.Context, volume string, req control.CreateSnapshot) (control.Snapshot, error) {
	v, s, err := b.createSnapshot(ctx, volume, uuid.New(), req)
	if err == nil && req.Temporary {
		err = b.hold(ctx, req.Owner, held{volume: v.FullName(), id: s.ID, snapshot: s.Name})
	}
	if err != nil {
		return control.Snapshot{}, err
	}
	return b.snapshotAnswer(&v, &s), nil
}

// DeleteSnapshot implements control.SnapshotBackend.
func (b *backend) DeleteSnapshot(ctx context.Context, volume, name string) error {
	return b.deleteSnapshot(ctx, volume, name)
}

// RenameSnapshot implements control.SnapshotBackend.
func (b *backend) RenameSnapshot(ctx context.Context, volume, name, to string) (control.Snapshot, error) {
	v, s, err := b.renameSnapshot(ctx, volume, name, to)
	if err != nil {
		return control.Snapshot{}, err
	}
	return b.snapshotAnswer(&v, &s), nil
}

// Rollback implements control.SnapshotBackend.
func (b *backend) Rollback(ctx context.Context, volume, name string, force bool) (control.Volume, error) {
	r, err := b.rollback(ctx, volume, name, force)
	if err != nil {
		return control.Volume{}, err
	}
	return b.Volume(ctx, r.FullName())
}

// CloneVolume implements control.SnapshotBackend.
func (b *backend) CloneVolume(ctx context.Context, req control.CloneVolume) (control.Volume, error) {
	r, err := b.clone(ctx, req)
	if err != nil {
		return control.Volume{}, err
	}
	return b.answer(&r), nil
}

// SetTemplate implements control.SnapshotBackend.
func (b *backend) SetTemplate(ctx context.Context, volume string, template bool) (control.Volume, error) {
	r, err := b.setTemplate(ctx, volume, template)
	if err != nil {
		return control.Volume{}, err
	}
	return b.Volume(ctx, r.FullName())
}

// FlattenVolume implements control.SnapshotBackend.
func (b *backend) FlattenVolume(ctx context.Context, volume string, p control.Progress) error {
	return b.flatten(ctx, volume, p)
}

// Complete implements control.SnapshotBackend.
func (b *backend) Complete(ctx context.Context, volume string) (control.Volume, error) {
	r, err := b.complete(ctx, volume)
	if err != nil {
		return control.Volume{}, err
	}
	return b.answer(&r), nil
}

// Export implements control.SnapshotBackend.
func (b *backend) Export(ctx context.Context, req control.Export, w io.Writer) error {
	return b.export(ctx, req, w)
}

// Receive implements control.SnapshotBackend.
func (b *backend) Receive(ctx context.Context, volume string, resumable bool, r io.Reader) (control.Received, error) {
	v, s, totals, err := b.receive(ctx, volume, resumable, r)
	if err != nil {
		return control.Received{}, err
	}
	return control.Received{Volume: v.FullName(), Snapshot: b.snapshotAnswer(&v, &s), Data: totals.DataBytes, Zeroes: totals.ZeroBytes}, nil
}

// AbortReceive implements control.SnapshotBackend.
func (b *backend) AbortReceive(ctx context.Context, volume string) error {
	return b.abortReceive(ctx, volume)
}
