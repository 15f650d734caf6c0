package repair

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"scoria/alba"
	"scoria/alba/asd"
	"scoria/alba/proxy"
)

// Collect removes what nobody refers to: intents of uploads that died, trash,
// fragments, copies of namespaces that are gone. It returns how many keys it deleted
// from devices.
func (m *Maintainer) Collect(ctx context.Context) (int64, error) {
	var deleted int64
	err := m.job(ctx, JobOrphans, true, func(ctx context.Context, r *run) error {
		err := m.collect(ctx, r)
		deleted = r.job.Problems
		return err
	})
	return deleted, err
}

// orphanLoop collects everything once in a while, and after a device came back what it
// has missed.
func (m *Maintainer) orphanLoop(ctx context.Context) {
	seen := map[string]uint64{}
	var last time.Time
	m.loop(ctx, JobOrphans, m.o.OrphanEvery, func() error {
		returns := map[string]uint64{}
		back := map[string]bool{}
		for _, d := range m.p.Fleet().Members() {
			id := d.Record().ID
			returns[id] = d.Returns()
			back[id] = returns[id] != seen[id]
		}
		all := last.IsZero() || time.Since(last) >= m.o.OrphanEvery
		j, _, err := loadJob(ctx, m.reg, JobOrphans)
		if err != nil {
			return err
		}
		asked := j.State == JobRunning && j.By == "" // by the operator
		if !all && !asked && !slices.Contains(slices.Collect(maps.Values(back)), true) {
			return nil
		}
		only := func(id string) bool { return all || asked || back[id] }
		r, err := m.claim(ctx, JobOrphans, true)
		if err != nil || r == nil {
			return err // somebody else is at it, perhaps past that device: it is looked at again
		}
		if err := r.end(ctx, m.collectFrom(ctx, r, only)); err != nil {
			return err
		}
		seen = returns
		if all || asked {
			last = time.Now()
		}
		return nil
	})
}

func (m *Maintainer) collect(ctx context.Context, r *run) error {
	return m.collectFrom(ctx, r, func(string) bool { return true })
}

// collectFrom empties the trash and collects the orphans of the devices that only says.
func (m *Maintainer) collectFrom(ctx context.Context, r *run, only func(id string) bool) error {
	r.job.Done, r.job.Problems = 0, 0
	var errs []error
	errs = append(errs, m.p.FinishDeletes(ctx), m.removeIntents(ctx), m.emptyTrash(ctx, r))
	members := m.p.Fleet().Members()
	r.job.Total = int64(len(members))
	for _, d := range members {
		id := d.Record().ID
		if c := m.condition(id); only(id) && (c == Fine || c == Leaving) {
			if err := m.collectDevice(ctx, r, d); err != nil {
				errs = append(errs, fmt.Errorf("device %s: %w", id, err))
			}
		}
		r.job.Done++
		if err := r.save(ctx, false); err != nil {
			return err
		}
	}
	return errors.Join(errs...)
}

// removeIntents removes the intents of uploads and moves that nobody is at work on
// any more. Whoever is after all can't commit.
func (m *Maintainer) removeIntents(ctx context.Context) error {
	kvs, err := m.reg.List(ctx, alba.IntentPrefix)
	if err != nil {
		return err
	}
	var errs []error
	for _, kv := range kvs {
		rec, err := alba.Decode[alba.Intent](kv.Value)
		if err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", kv.Key, err))
			continue
		}
		ns, upload, err := alba.SplitKey(kv.Key, alba.IntentPrefix)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		mine := rec.By == m.node
		if mine && m.p.Active(upload) || !mine && time.Since(rec.Since) < m.o.IntentAge {
			continue
		}
		writes := []alba.Write{{Key: kv.Key}}
		if !rec.Move {
			writes = append(writes, alba.Write{Key: alba.TrashKey(ns, upload), Value: alba.Encode(rec)})
		}
		// What a move has left is found on the devices.
		_, err = m.reg.Commit(ctx, []alba.Compare{{Key: kv.Key, Revision: kv.Revision}}, writes)
		if err != nil && !errors.Is(err, alba.ErrConflict) {
			errs = append(errs, err)
			continue
		}
		m.log.Info().Str("namespace", rec.Namespace).Str("object", rec.Object).Str("by", rec.By).Time("since", rec.Since).Msg("removed the intent of an upload that died")
	}
	return errors.Join(errs...)
}

// emptyTrash deletes the fragments of what is in the trash. What is on a device that
// can't be reached stays for the next time.
func (m *Maintainer) emptyTrash(ctx context.Context, r *run) error {
	waiting := 0
	err := alba.Each(ctx, m.reg, alba.TrashPrefix, func(kv alba.KV) error {
		rec, err := alba.Decode[alba.Intent](kv.Value)
		if err != nil {
			return fmt.Errorf("%s: %w", kv.Key, err)
		}
		ns, upload, err := alba.SplitKey(kv.Key, alba.TrashPrefix)
		if err != nil {
			return err
		}
		if err := r.wait(ctx, 0, unhurried); err != nil {
			return err
		}
		if err := m.p.Purge(ctx, ns, upload, rec, kv.Revision); err != nil {
			waiting++
		}
		return nil
	})
	if err != nil {
		return err
	}
	if waiting > 0 {
		m.log.Info().Int("objects", waiting).Msg("deleted objects wait for devices that are out of reach")
	}
	return ctx.Err()
}

// shardOf names a shard of an upload.
type shardOf struct {
	upload alba.ID
	shard  int
}

// references is what the registry speaks of on one device, in some namespaces.
type references struct {
	shards     map[shardOf]bool
	busy       map[alba.ID]bool // uploads with an intent or in the trash
	trash      map[alba.ID]bool
	namespaces map[alba.ID]bool // all that there are
}

// references reads the registry for the keys of one page of a device. The manifests of
// their namespaces are gone through in parts; what is kept of them is the device's.
func (m *Maintainer) references(ctx context.Context, device string, infos []asd.Info) (*references, error) {
	refs := &references{shards: map[shardOf]bool{}, busy: map[alba.ID]bool{}, trash: map[alba.ID]bool{}, namespaces: map[alba.ID]bool{}}
	err := alba.Each(ctx, m.reg, alba.NamespacePrefix, func(kv alba.KV) error {
		n, err := alba.Decode[alba.Namespace](kv.Value)
		if err != nil {
			return fmt.Errorf("%s: %w", kv.Key, err)
		}
		refs.namespaces[n.ID] = true
		return nil
	})
	if err != nil {
		return nil, err
	}
	// Intents before manifests: an upload that commits in between is in one of them.
	for _, prefix := range []string{alba.IntentPrefix, alba.TrashPrefix} {
		err := alba.Each(ctx, m.reg, prefix, func(kv alba.KV) error {
			_, upload, err := alba.SplitKey(kv.Key, prefix)
			refs.busy[upload] = true
			if prefix == alba.TrashPrefix {
				refs.trash[upload] = true
			}
			return err
		})
		if err != nil {
			return nil, err
		}
	}
	of := map[alba.ID]bool{}
	for _, info := range infos {
		if ns, _, _, _, err := alba.ParseShardKey(info.Key); err == nil {
			of[ns] = true
		}
	}
	for ns := range of {
		err := alba.Each(ctx, m.reg, alba.ObjectKey(ns, ""), func(kv alba.KV) error {
			man, err := alba.DecodeManifest(kv.Value)
			if err != nil {
				return fmt.Errorf("%s: %w", kv.Key, err)
			}
			for i, id := range man.Shards {
				if id == device {
					refs.shards[shardOf{man.Upload, i}] = true
				}
			}
			return nil
		})
		if err != nil {
			return nil, err
		}
	}
	return refs, nil
}

// used says whether a key of the device is spoken of; true for keys it does not know.
func (r *references) used(key string) bool {
	kind, rest, _ := strings.Cut(key, "/")
	switch kind + "/" {
	case alba.FragmentPrefix, alba.ShardPrefix:
		_, upload, shard, _, err := alba.ParseShardKey(key)
		return err != nil || r.busy[upload] || r.shards[shardOf{upload, shard}]
	case alba.TombstonePrefix:
		_, upload, err := alba.SplitKey(key, alba.TombstonePrefix)
		return err != nil || r.trash[upload]
	case alba.NamespaceCopyPrefix:
		ns, err := alba.ParseID(rest)
		return err != nil || r.namespaces[ns]
	}
	return true
}

// unused returns the deletions of what is not spoken of.
func (r *references) unused(infos []asd.Info) []asd.Update {
	var updates []asd.Update
	for _, info := range infos {
		if !r.used(info.Key) {
			updates = append(updates, asd.Delete(info.Key))
		}
	}
	return updates
}

// collectDevice deletes a device's orphans. The registry is read after the keys were:
// what is written meanwhile had its intent before.
func (m *Maintainer) collectDevice(ctx context.Context, r *run, d *proxy.Member) error {
	c, err := d.Client(ctx)
	if err != nil {
		return err
	}
	if err := m.p.Own(ctx, c); err != nil {
		return err
	}
	m.p.CopyRecords(ctx, d)
	id := d.Record().ID
	refs := new(references)
	for _, prefix := range []string{alba.FragmentPrefix, alba.ShardPrefix, alba.TombstonePrefix, alba.NamespaceCopyPrefix} {
		req := asd.RangeRequest{From: prefix, To: proxy.After(prefix), Limit: asd.MaxUpdates}
		for {
			if err := r.wait(ctx, 0, unhurried); err != nil {
				return err
			}
			page, err := d.Range(ctx, req, asd.PriorityRepair)
			if err != nil {
				return err
			}
			// What an older look says is used may stay; the rest is looked up now.
			updates := refs.unused(page.Infos)
			if len(updates) > 0 {
				if refs, err = m.references(ctx, id, page.Infos); err != nil {
					return err
				}
				updates = refs.unused(page.Infos)
			}
			if len(updates) > 0 {
				if err := d.Apply(ctx, nil, updates, asd.PriorityRepair); err != nil {
					return err
				}
				r.job.Problems += int64(len(updates))
				m.log.Info().Str("asd", id).Int("keys", len(updates)).Msg("orphans deleted")
			}
			if !page.More {
				break
			}
			req.From, req.After = page.Infos[len(page.Infos)-1].Key, true
		}
	}
	return nil
}
