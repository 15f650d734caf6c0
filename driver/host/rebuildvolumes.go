package host

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/google/uuid"

	"scoria/alba"
	"scoria/driver"
	"scoria/driver/registry"
)

// recovered is a volume that was found in the object store.
type recovered struct {
	record registry.Volume
	copy   *recordCopy // nil: there was none
	notes  []string
}

func (v *recovered) note(format string, args ...any) {
	v.notes = append(v.notes, fmt.Sprintf(format, args...))
}

// restoreVolumes makes the records of pools, volumes, schedules and of this node.
func (r *rebuilder) restoreVolumes(ctx context.Context) error {
	kvs, err := r.reg.List(ctx, alba.NamespacePrefix)
	if err != nil {
		return err
	}
	var list []*recovered
	for i, kv := range kvs {
		r.say("volume %d of %d", i+1, len(kvs))
		n, err := alba.Decode[alba.Namespace](kv.Value)
		if err != nil {
			return err
		}
		v, err := r.recoverVolume(ctx, &n)
		switch {
		case ctx.Err() != nil:
			return ctx.Err()
		case err != nil:
			r.problem("namespace %s is no volume: %v; what it has is kept", n.Name, err)
		default:
			list = append(list, v)
		}
	}
	pools, err := r.restorePools(ctx, list)
	if err != nil {
		return err
	}
	r.complete(list, pools)
	r.nameVolumes(list)
	r.checkAncestors(list)
	names := []string{}
	for _, v := range list {
		if err := r.restoreVolume(ctx, v); err != nil {
			return err
		}
		names = append(names, v.record.FullName())
	}
	// The volumes that a start opens: their snapshots are recorded then.
	host, err := os.Hostname()
	if err == nil {
		_, err = registry.Create(ctx, r.reg, registry.NodeKey(r.node), registry.Node{ID: r.node, Host: host, Created: now(), Attached: names})
	}
	return err
}

func now() time.Time { return time.Now().UTC().Truncate(time.Second) }

// recoverVolume reads what a namespace says of its volume.
func (r *rebuilder) recoverVolume(ctx context.Context, n *alba.Namespace) (*recovered, error) {
	id, err := uuid.Parse(n.Name)
	if err != nil {
		return nil, err
	}
	s := r.objects.store(n.Preset)
	v := &recovered{copy: r.latestCopy(ctx, s, n.Name)}
	size, ancestors, err := driver.Describe(ctx, s, id)
	if err != nil {
		if v.copy == nil {
			return nil, err
		}
		if !errors.Is(err, driver.ErrNoObject) { // a fresh volume has no root
			v.note("no root of it can be read: %v", err)
		}
	}
	if v.copy != nil {
		v.record = v.copy.Volume
	} else {
		v.record = registry.Volume{ID: id, Size: size, Serial: strings.ReplaceAll(n.Name, "-", "")[:20], Created: n.Created, State: registry.StateReady}
		if v.record.Created.IsZero() {
			v.record.Created = now()
		}
	}
	if err == nil {
		setAncestors(&v.record, ancestors)
	}
	v.record.Preset, v.record.Owner = n.Preset, ""
	v.record.Epoch = max(v.record.Epoch, n.Epoch) + 1
	if err := s.Fence(ctx, n.Name, v.record.Epoch); err != nil {
		v.note("its epoch is not raised on the storage daemons before it is opened: %v", err)
	}
	return v, nil
}

// setAncestors records what the volume's root says that it builds on.
func setAncestors(r *registry.Volume, list []driver.Ancestor) {
	r.Ancestors = nil
	for _, a := range list {
		r.Ancestors = append(r.Ancestors, registry.Ancestor{Volume: a.Volume, Snapshot: a.Snapshot})
	}
	if len(list) == 0 {
		r.Parent = nil
	}
}

// latestCopy is the latest readable copy of a volume's records, or nil.
func (r *rebuilder) latestCopy(ctx context.Context, s driver.Store, ns string) *recordCopy {
	numbers, err := copies(ctx, s, ns)
	if err != nil {
		r.problem("volume %s: copies of its record: %v", ns, err)
	}
	for _, n := range slices.Backward(numbers) {
		_, c, err := readCopy(ctx, s, ns, n)
		if err == nil {
			return c
		}
		r.problem("volume %s: %v", ns, err)
	}
	return nil
}

// restorePools makes the pools of the copies, the latest of each, with their schedules.
func (r *rebuilder) restorePools(ctx context.Context, list []*recovered) (map[string]registry.Pool, error) {
	latest := map[string]*recordCopy{}
	for _, v := range list {
		if c := v.copy; c != nil && (latest[c.Pool.Name] == nil || latest[c.Pool.Name].PoolRevision < c.PoolRevision) {
			latest[c.Pool.Name] = c
		}
	}
	pools := map[string]registry.Pool{}
	for name, c := range latest {
		if _, err := registry.Create(ctx, r.reg, registry.PoolKey(name), c.Pool); err != nil {
			return nil, err
		}
		if c.PoolSchedule != nil {
			if _, err := registry.Create(ctx, r.reg, registry.PoolScheduleKey(name), *c.PoolSchedule); err != nil {
				return nil, err
			}
		}
		pools[name] = c.Pool
		r.report.Pools = append(r.report.Pools, name)
	}
	slices.Sort(r.report.Pools)
	return pools, nil
}

// complete gives volumes without a copy of their record what it would have said.
func (r *rebuilder) complete(list []*recovered, pools map[string]registry.Pool) {
	p, ok := pools[registry.DefaultPool]
	if !ok { // the start makes it
		p = registry.Pool{BlockSize: r.config.Pool.BlockSize, SCOSize: int64(r.config.Pool.SCOSize)}
	}
	for _, v := range list {
		if v.copy != nil {
			continue
		}
		v.record.Pool, v.record.Name = registry.DefaultPool, "recovered-"+v.record.ID.String()[:8]
		v.record.BlockSize, v.record.SCOSize = p.BlockSize, p.SCOSize
		v.note("no copy of its record was found: name, serial number, limits and the block size of %d bytes may have been others", p.BlockSize)
	}
}

// nameVolumes gives volumes names of their own. Of two with one name the one that was
// made later keeps it: the other was renamed or deleted.
func (r *rebuilder) nameVolumes(list []*recovered) {
	slices.SortFunc(list, func(a, b *recovered) int {
		return cmp.Or(b.record.Created.Compare(a.record.Created), cmp.Compare(a.record.ID.String(), b.record.ID.String()))
	})
	taken := map[string]bool{}
	for _, v := range list {
		was := v.record.FullName()
		for i := 0; taken[v.record.FullName()]; i++ {
			suffix := "-" + v.record.ID.String()[:8]
			if i > 0 {
				suffix += fmt.Sprint("-", i)
			}
			name := was[len(v.record.Pool)+1:]
			v.record.Name = name[:min(len(name), 63-len(suffix))] + suffix
		}
		taken[v.record.FullName()] = true
		if v.record.FullName() != was {
			v.note("another volume has the name %s", was)
		}
	}
	slices.SortFunc(list, func(a, b *recovered) int { return cmp.Compare(a.record.FullName(), b.record.FullName()) })
}

// checkAncestors notes clones of volumes that were not found.
func (r *rebuilder) checkAncestors(list []*recovered) {
	there := map[uuid.UUID]bool{}
	for _, v := range list {
		there[v.record.ID] = true
	}
	for _, v := range list {
		for _, a := range v.record.Ancestors {
			if !there[a.Volume] {
				v.note("it builds on volume %s, which was not found: it can't be opened", a.Volume)
			}
		}
	}
}

func (r *rebuilder) restoreVolume(ctx context.Context, v *recovered) error {
	rec := &v.record
	if _, err := registry.Create(ctx, r.reg, registry.VolumeKey(rec.Pool, rec.Name), *rec); err != nil {
		return err
	}
	if v.copy != nil && v.copy.Schedule != nil {
		if _, err := registry.Create(ctx, r.reg, registry.VolumeScheduleKey(rec.ID), *v.copy.Schedule); err != nil {
			return err
		}
	}
	r.report.Volumes = append(r.report.Volumes, RebuiltVolume{Name: rec.FullName(), ID: rec.ID.String(), Size: rec.Size, Note: strings.Join(v.notes, "; ")})
	return nil
}
