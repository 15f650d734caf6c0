package repair

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/rs/zerolog"

	"scoria/alba"
	"scoria/alba/asd"
	"scoria/alba/proxy"
)

// ErrNotEmpty: the registry has namespaces already; a registry is rebuilt only where
// there is none.
var ErrNotEmpty = errors.New("registry is not empty")

// ErrNoneRead: of all devices that were named none could be read.
var ErrNoneRead = errors.New("no storage daemon could be read")

// Rebuilt is what RebuildRegistry found.
type Rebuilt struct {
	Devices, Presets, Namespaces, Objects int
	// Lost are objects of which fewer than k shards were found, Superseded those of
	// which a later or better upload was taken, Problems all that could not be read.
	// As long as a device is missing, Lost may be what was never completed.
	Lost, Superseded, Problems []string
	// Missing are the IDs of devices that were not read and have shards of the objects
	// taken, or had them before these were moved to another one that was not read. What they alone have is not found, nor that it was there.
	Missing []string
}

// found is one upload as the devices have it.
type found struct {
	man    *alba.Manifest
	shards []string
}

func (f *found) live() int {
	n := 0
	for _, s := range f.shards {
		if s != "" {
			n++
		}
	}
	return n
}

// rebuild is a registry being rebuilt.
type rebuild struct {
	reg     alba.Registry
	log     zerolog.Logger
	report  Rebuilt
	cluster string

	presets    map[string]orderedPreset
	orders     map[string]alba.Position // of the copies of presets on the device that is being read
	namespaces map[alba.ID]alba.Namespace
	epochs     map[alba.ID]uint64
	uploads    map[alba.ID]*found
	deleted    map[alba.ID]bool
	devices    []alba.Device
	positions  map[string]alba.Position // of the devices that were read
	stated     map[string]statement     // of devices, by others
}

// orderedPreset is the latest copy of a preset.
type orderedPreset struct {
	alba.Preset
	at alba.Position // of the change that it is from; 0: not known
}

// statement is the latest that a device was told of whether another one was removed.
type statement struct {
	at      uint64
	removed []byte // its record then; nil: it was not
}

// RebuildRegistry restores what the registry held of the object store from the devices
// alone (P10): devices, presets, namespaces with their epochs and wrapped keys, and
// manifests. The registry must have none of it, and nobody may have told devices how far
// it is (proxy.Options.Silent). devices are all that there are,
// with addresses and places; their IDs are filled in. What lies on devices that are
// missing from the list, or can't be read, is found again when it is repeated with
// them on an empty registry. A device that others know to have been removed is left out:
// what it has may have been deleted since, and it is remembered as removed. Nothing on the
// devices is changed.
func RebuildRegistry(ctx context.Context, reg alba.Registry, dial proxy.Dial, devices []alba.Device, log zerolog.Logger) (Rebuilt, error) {
	b := &rebuild{reg: reg, log: log, presets: map[string]orderedPreset{}, namespaces: map[alba.ID]alba.Namespace{},
		epochs: map[alba.ID]uint64{}, uploads: map[alba.ID]*found{}, deleted: map[alba.ID]bool{}, positions: map[string]alba.Position{}, stated: map[string]statement{}}
	err := b.checkEmpty(ctx)
	for _, read := range []func(context.Context, proxy.Dial, alba.Device) error{b.statements, b.device} {
		for _, d := range devices {
			if err != nil {
				break
			}
			err = read(ctx, dial, d)
		}
	}
	if err == nil {
		err = b.commit(ctx)
	}
	if err != nil {
		return b.report, fmt.Errorf("rebuild registry: %w", err)
	}
	return b.report, nil
}

func (b *rebuild) checkEmpty(ctx context.Context) error {
	for _, prefix := range []string{alba.NamespacePrefix, alba.DevicePrefix} {
		kvs, err := b.reg.List(ctx, prefix)
		if err != nil {
			return err
		}
		if len(kvs) > 0 {
			return fmt.Errorf("%s is there: %w", kvs[0].Key, ErrNotEmpty)
		}
	}
	return nil
}

func (b *rebuild) problem(format string, args ...any) {
	text := fmt.Sprintf(format, args...)
	b.report.Problems = append(b.report.Problems, text)
	b.log.Warn().Msg("rebuilding the registry: " + text)
}

// statements reads what a device was told of others. What can't be read is a problem when
// the device is read.
func (b *rebuild) statements(ctx context.Context, dial proxy.Dial, d alba.Device) (err error) {
	c, err := dial(ctx, d)
	if err != nil {
		return ctx.Err()
	}
	defer func() { err = errors.Join(err, c.Close()) }()
	removed := map[string][]byte{}
	_ = b.each(ctx, c, d.ID, alba.RemovedCopyPrefix, func(ctx context.Context, c asd.Client, _, key string) error {
		id := key[len(alba.RemovedCopyPrefix):]
		// What it says can be made up, but not whether it says it.
		removed[id] = alba.Encode(alba.Device{ID: id, State: alba.DeviceRemoved})
		v, err := c.Get(ctx, key, asd.PriorityRepair)
		if err != nil {
			return err
		}
		was, err := alba.Decode[alba.Device](v.Data)
		if err == nil && was.ID == id && was.State == alba.DeviceRemoved {
			removed[id] = v.Data
		}
		return err
	})
	for after := alba.StatedPrefix; ; {
		list, more, err := c.Epochs(ctx, after)
		if err != nil || len(list) == 0 {
			return ctx.Err()
		}
		for _, e := range list {
			after = e.Namespace
			if id, ok := strings.CutPrefix(e.Namespace, alba.StatedPrefix); ok && e.Epoch >= b.stated[id].at {
				b.stated[id] = statement{e.Epoch, removed[id]}
			}
		}
		if !more {
			return ctx.Err()
		}
	}
}

// device reads one device. One that can't be read is a problem, not the end: the
// others may have enough.
func (b *rebuild) device(ctx context.Context, dial proxy.Dial, d alba.Device) (err error) {
	c, err := dial(ctx, d)
	if err != nil {
		b.problem("ASD at %s: %v", d.Address, err)
		return ctx.Err()
	}
	defer func() { err = errors.Join(err, c.Close()) }()
	st, err := c.Stats(ctx)
	if err != nil {
		b.problem("ASD at %s: %v", d.Address, err)
		return ctx.Err()
	}
	d.ID = st.ID
	if d.State == "" {
		d.State = alba.DeviceActive
	}
	if err := d.Check(); err != nil {
		return err
	}
	if b.stated[d.ID].removed != nil {
		b.problem("ASD %s at %s was removed, and what is on it is old: it is left out", d.ID, d.Address)
		return nil
	}
	cluster, err := c.Get(ctx, alba.ClusterCopyKey, asd.PriorityRepair)
	switch {
	case errors.Is(err, asd.ErrNoKey):
		b.problem("ASD %s at %s belongs to no cluster: it is left out", d.ID, d.Address)
		return nil
	case err != nil:
		b.problem("ASD %s at %s: %v", d.ID, d.Address, err)
		return ctx.Err()
	case b.cluster == "":
		b.cluster = string(cluster.Data)
	case b.cluster != string(cluster.Data):
		return fmt.Errorf("ASD %s is of cluster %s, others are of %s: name those of one cluster: %w", d.ID, cluster.Data, b.cluster, proxy.ErrForeign)
	}
	b.devices = append(b.devices, d)
	if err := b.readEpochs(ctx, c, d.ID); err != nil {
		b.problem("ASD %s: epochs: %v", d.ID, err)
	}
	for prefix, fn := range map[string]func(ctx context.Context, c asd.Client, d, key string) error{
		alba.PresetCopyPrefix: b.preset, alba.NamespaceCopyPrefix: b.namespace,
		alba.TombstonePrefix: b.tombstone, alba.ShardPrefix: b.shard,
	} {
		if err := b.each(ctx, c, d.ID, prefix, fn); err != nil {
			b.problem("ASD %s: %v", d.ID, err)
		}
	}
	return ctx.Err()
}

// each calls fn with all keys that have the prefix.
func (b *rebuild) each(ctx context.Context, c asd.Client, d, prefix string, fn func(ctx context.Context, c asd.Client, d, key string) error) error {
	req := asd.RangeRequest{From: prefix, To: proxy.After(prefix)}
	for {
		page, err := c.Range(ctx, req, asd.PriorityRepair)
		if err != nil {
			return err
		}
		for _, info := range page.Infos {
			if err := fn(ctx, c, d, info.Key); err != nil {
				b.problem("ASD %s: %s: %v", d, info.Key, err)
			}
		}
		if !page.More || len(page.Infos) == 0 {
			return nil
		}
		req.From, req.After = page.Infos[len(page.Infos)-1].Key, true
	}
}

func (b *rebuild) readEpochs(ctx context.Context, c asd.Client, d string) error {
	b.orders = map[string]alba.Position{}
	for after := ""; ; {
		list, more, err := c.Epochs(ctx, after)
		if err != nil {
			return err
		}
		for _, e := range list {
			after = e.Namespace
			if e.Namespace == alba.PositionName {
				b.positions[d] = alba.Position(e.Epoch)
			}
			if name, ok := strings.CutPrefix(e.Namespace, alba.PresetOrderPrefix); ok {
				b.orders[name] = alba.Position(e.Epoch)
			}
			if id, err := alba.ParseID(e.Namespace); err == nil {
				b.epochs[id] = max(b.epochs[id], e.Epoch)
			}
		}
		if !more || len(list) == 0 {
			return nil
		}
	}
}

func (b *rebuild) preset(ctx context.Context, c asd.Client, _, key string) error {
	v, err := c.Get(ctx, key, asd.PriorityRepair)
	if err != nil {
		return err
	}
	ps, err := alba.Decode[alba.Preset](v.Data)
	if err == nil {
		err = ps.Check()
	}
	if err != nil {
		return err
	}
	at := b.orders[ps.Name]
	if old, ok := b.presets[ps.Name]; !ok || at > old.at {
		b.presets[ps.Name] = orderedPreset{ps, at}
	}
	return nil
}

func (b *rebuild) namespace(ctx context.Context, c asd.Client, _, key string) error {
	v, err := c.Get(ctx, key, asd.PriorityRepair)
	if err != nil {
		return err
	}
	n, err := alba.Decode[alba.Namespace](v.Data)
	if err != nil {
		return err
	}
	old, ok := b.namespaces[n.ID]
	// Of several copies the latest: the one with the largest epoch, and with a key, that
	// which was wrapped last. An older one may need a master key that is gone.
	if !ok || n.CopyOrder() > old.CopyOrder() {
		b.namespaces[n.ID] = n
	}
	return nil
}

func (b *rebuild) tombstone(_ context.Context, _ asd.Client, _, key string) error {
	_, upload, err := alba.SplitKey(key, alba.TombstonePrefix)
	b.deleted[upload] = true
	return err
}

// shard takes a shard in if it is whole.
func (b *rebuild) shard(ctx context.Context, c asd.Client, d, key string) error {
	_, _, shard, _, err := alba.ParseShardKey(key)
	if err != nil {
		return err
	}
	v, err := c.Get(ctx, key, asd.PriorityRepair)
	if err != nil {
		return err
	}
	man, err := alba.DecodeManifest(v.Data)
	if err != nil {
		return err
	}
	if shard >= len(man.Shards) || key != alba.ShardKey(man.NamespaceID, man.Upload, shard) {
		return fmt.Errorf("holds the manifest of shard %s: %w", alba.ShardKey(man.NamespaceID, man.Upload, shard), alba.ErrRecord)
	}
	whole, err := shardWhole(ctx, c, man, shard)
	if err != nil || !whole {
		return err
	}
	f := b.uploads[man.Upload]
	if f == nil {
		f = &found{man: man, shards: make([]string, len(man.Shards))}
		b.uploads[man.Upload] = f
	}
	if man.Generation > f.man.Generation {
		f.man = man
	}
	// A shard that was being moved may be on two devices: the manifest's counts.
	if f.shards[shard] == "" || f.man.Shards[shard] == d {
		f.shards[shard] = d
	}
	return nil
}

// chosen returns the uploads to be taken, one per object: of the largest epoch, then
// with the most shards, then the latest.
func (b *rebuild) chosen() []*found {
	best := map[string]*found{}
	for id, f := range b.uploads {
		name := f.man.Namespace + "/" + f.man.Object
		switch {
		case b.deleted[id]:
			continue
		case f.live() < f.man.Policy.K:
			b.report.Lost = append(b.report.Lost, fmt.Sprintf("%s: %d of %d shards found, needed are %d", name, f.live(), len(f.shards), f.man.Policy.K))
			continue
		case b.namespaces[f.man.NamespaceID].Name == "":
			b.report.Superseded = append(b.report.Superseded, name)
			continue
		}
		key := alba.ObjectKey(f.man.NamespaceID, f.man.Object)
		other := best[key]
		if other == nil {
			best[key] = f
			continue
		}
		b.report.Superseded = append(b.report.Superseded, name)
		if cmp.Or(cmp.Compare(f.man.Epoch, other.man.Epoch), cmp.Compare(f.live(), other.live()), cmp.Compare(f.man.Created, other.man.Created)) > 0 {
			best[key] = f
		}
	}
	list := make([]*found, 0, len(best))
	for _, f := range best {
		list = append(list, f)
	}
	slices.SortFunc(list, func(x, y *found) int {
		return strings.Compare(alba.ObjectKey(x.man.NamespaceID, x.man.Object), alba.ObjectKey(y.man.NamespaceID, y.man.Object))
	})
	slices.Sort(b.report.Lost)
	slices.Sort(b.report.Superseded)
	return list
}

// missingNamespaces makes records for namespaces of which no copy was found: all but
// the key is in the manifests.
func (b *rebuild) missingNamespaces() {
	for _, f := range b.uploads {
		if _, ok := b.namespaces[f.man.NamespaceID]; !ok {
			b.namespaces[f.man.NamespaceID] = alba.Namespace{Name: f.man.Namespace, ID: f.man.NamespaceID, Preset: f.man.Preset}
			b.problem("namespace %s: no copy of its record was found", f.man.Namespace)
		}
	}
	// A name that was used again after a deletion: the later one counts.
	byName := map[string]alba.Namespace{}
	for id, n := range b.namespaces {
		n.Epoch = max(n.Epoch, b.epochs[id])
		b.namespaces[id] = n
		if o, ok := byName[n.Name]; ok {
			older := o
			if o.Created.After(n.Created) {
				older = n
			} else {
				byName[n.Name] = n
			}
			b.problem("namespace %s was deleted and made again: %v is left out", n.Name, older.ID)
			delete(b.namespaces, older.ID)
			continue
		}
		byName[n.Name] = n
	}
}

// history is the new registry's: it knows what the devices that were read were told, and
// of no other device.
func (b *rebuild) history(ctx context.Context) (alba.History, error) {
	kv, _, err := b.reg.Get(ctx, alba.HistoryKey)
	if err != nil {
		return alba.History{}, err
	}
	h, err := alba.DecodeHistory(kv)
	h.Read = b.positions
	return h, err
}

// commit writes all to the registry; the namespaces last, so that one that is cut
// short is seen to be empty and is repeated.
func (b *rebuild) commit(ctx context.Context) error {
	if len(b.devices) == 0 {
		return fmt.Errorf("%w: %s", ErrNoneRead, strings.Join(b.report.Problems, "; "))
	}
	b.missingNamespaces()
	history, err := b.history(ctx)
	if err != nil {
		return err
	}
	writes := []alba.Write{{Key: alba.ClusterKey, Value: []byte(b.cluster)}, {Key: alba.HistoryKey, Value: alba.Encode(history)}}
	for _, ps := range b.presets {
		b.report.Presets++
		writes = append(writes, alba.Write{Key: alba.PresetKey(ps.Name), Value: alba.Encode(ps.Preset)})
	}
	missing := map[string]bool{}
	for _, f := range b.chosen() {
		man := f.man.Clone()
		for i, d := range man.Shards {
			if d != "" && f.shards[i] == "" && b.stated[d].removed == nil && !slices.ContainsFunc(b.devices, func(have alba.Device) bool { return have.ID == d }) {
				missing[d] = true
			}
		}
		man.Shards = f.shards
		man.Generation++
		b.report.Objects++
		writes = append(writes, alba.Write{Key: alba.ObjectKey(man.NamespaceID, man.Object), Value: man.Encode()})
	}
	for _, n := range b.namespaces {
		b.report.Namespaces++
		n.Deleting = false
		writes = append(writes, alba.Write{Key: alba.NamespaceKey(n.Name), Value: alba.Encode(n)})
	}
	for _, d := range b.devices {
		b.report.Devices++
		writes = append(writes, alba.Write{Key: alba.DeviceKey(d.ID), Value: alba.Encode(d)})
	}
	for id, s := range b.stated {
		if s.removed != nil {
			writes = append(writes, alba.Write{Key: alba.RemovedKey(id), Value: s.removed})
		}
	}
	b.report.Missing = slices.Sorted(maps.Keys(missing))
	for len(writes) > 0 {
		part := writes[:min(len(writes), alba.MaxCommitWrites)]
		writes = writes[len(part):]
		if _, err := b.reg.Commit(ctx, nil, part); err != nil {
			return err
		}
	}
	return nil
}
