package host

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/google/uuid"

	"scoria/alba"
	"scoria/alba/proxy"
	"scoria/driver/registry"
)

// formerRegistry is a copy of the registry that is there when one is rebuilt.
type formerRegistry struct {
	*registry.Embedded
	volumes int
	history alba.History
	dir     string // of the copy
}

// openFormer opens the copy of a registry in dir that has anything in it.
func openFormer(ctx context.Context, dir string) (*formerRegistry, error) {
	reg, err := registry.Open(filepath.Join(dir, registryFile))
	if err != nil {
		return nil, err
	}
	f := &formerRegistry{Embedded: reg, dir: dir}
	fail := func(err error) (*formerRegistry, error) { return nil, errors.Join(err, reg.Close()) }
	all, err := reg.List(ctx, registry.VolumePrefix)
	if err != nil {
		return fail(err)
	}
	if f.volumes = len(all); reg.Revision() == 0 {
		return fail(errors.New("it has no record, though it is not empty"))
	}
	kv, _, err := reg.Get(ctx, alba.HistoryKey)
	if err == nil {
		f.history, err = alba.DecodeHistory(alba.KV(kv))
	}
	if err != nil {
		return fail(err)
	}
	return f, nil
}

// close ends the use of the copy and removes it.
func (f *formerRegistry) close() error { return errors.Join(f.Close(), os.RemoveAll(f.dir)) }

// isOlder asks the storage daemons whether one of them was told of changes that the
// registry which is there does not have: then it was put back from a backup.
func (r *rebuilder) isOlder(ctx context.Context, o *objectStore, devices []alba.Device) (bool, error) {
	for _, d := range devices {
		c, err := o.dial(ctx, d)
		if err != nil {
			continue // that is said later
		}
		st, err := c.Stats(ctx)
		var told alba.Position
		if err == nil {
			told, err = proxy.ToldPosition(ctx, c)
		}
		if err := errors.Join(c.Close(), ctx.Err()); err != nil {
			return false, err
		}
		if err == nil && !r.former.history.Knows(st.ID, told, r.former.Revision()) {
			r.say("the registry that is there is older than what storage daemon %s at %s was told", st.ID, d.Address)
			return true, nil
		}
	}
	return false, nil
}

// inherit takes from a registry that was put back from a backup what the storage daemons
// don't have: pools without volumes, volumes in the directory store, names of snapshots,
// schedules. What they have is later. Snapshots that are gone since, or came, are seen
// to when their volumes are opened.
func (r *rebuilder) inherit(ctx context.Context) error {
	pools, err := registry.LoadAll[registry.Pool](ctx, r.former, registry.PoolPrefix)
	if err != nil {
		return err
	}
	for _, p := range pools {
		key := registry.PoolKey(p.Record.Name)
		added, err := inheritRecord(ctx, r.reg, key, p.Record)
		if err != nil {
			return err
		}
		if added {
			r.report.Pools = append(r.report.Pools, p.Record.Name)
		}
	}
	there, err := r.inheritVolumes(ctx)
	if err != nil {
		return err
	}
	snapshots, err := registry.LoadAll[registry.Snapshot](ctx, r.former, registry.SnapshotPrefix)
	if err != nil {
		return err
	}
	for _, s := range snapshots {
		if !there[s.Record.Volume] {
			continue
		}
		if _, err := inheritRecord(ctx, r.reg, registry.SnapshotKey(s.Record.Volume, s.Record.Name), s.Record); err != nil {
			return err
		}
	}
	schedules, err := registry.LoadAll[registry.Schedule](ctx, r.former, registry.SchedulePrefix)
	if err != nil {
		return err
	}
	for _, s := range schedules {
		key := registry.PoolScheduleKey(s.Record.Pool)
		if s.Record.Pool == "" {
			key = registry.VolumeScheduleKey(s.Record.Volume)
		}
		if s.Record.Pool == "" && !there[s.Record.Volume] {
			continue
		}
		if _, err := inheritRecord(ctx, r.reg, key, s.Record); err != nil {
			return err
		}
	}
	return nil
}

// inheritVolumes takes over the volumes in the directory store and returns the IDs of
// all that the registry has then.
func (r *rebuilder) inheritVolumes(ctx context.Context) (map[uuid.UUID]bool, error) {
	there := map[uuid.UUID]bool{}
	have, err := registry.LoadAll[registry.Volume](ctx, r.reg, registry.VolumePrefix)
	if err != nil {
		return nil, err
	}
	for _, v := range have {
		there[v.Record.ID] = true
	}
	volumes, err := registry.LoadAll[registry.Volume](ctx, r.former, registry.VolumePrefix)
	if err != nil {
		return nil, err
	}
	for _, e := range volumes {
		v := e.Record
		if v.Preset != "" || there[v.ID] {
			continue
		}
		note := ""
		added, err := inheritRecord(ctx, r.reg, registry.VolumeKey(v.Pool, v.Name), v)
		if err == nil && !added {
			note = fmt.Sprintf("another volume has the name %s", v.FullName())
			suffix := "-" + v.ID.String()[:8]
			v.Name = v.Name[:min(len(v.Name), 63-len(suffix))] + suffix
			_, err = registry.Create(ctx, r.reg, registry.VolumeKey(v.Pool, v.Name), v)
		}
		if err != nil {
			return nil, err
		}
		there[v.ID] = true
		r.report.Volumes = append(r.report.Volumes, RebuiltVolume{Name: v.FullName(), ID: v.ID.String(), Size: v.Size, Note: note})
	}
	return there, nil
}

// inheritRecord creates a record unless there is one.
func inheritRecord[R registry.Record](ctx context.Context, reg registry.Store, key string, rec R) (bool, error) {
	_, err := registry.Create(ctx, reg, key, rec)
	if errors.Is(err, registry.ErrExist) {
		return false, nil
	}
	return err == nil, err
}
