package repair

import (
	"context"
	"errors"
	"fmt"
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

func (m *Maintainer) collect(ctx context.Context, r *run) error {
	r.job.Done, r.job.Problems = 0, 0
	var errs []error
	errs = append(errs, m.p.FinishDeletes(ctx), m.removeIntents(ctx), m.emptyTrash(ctx, r))
	members := m.p.Fleet().Members()
	r.job.Total = int64(len(members))
	for _, d := range members {
		if m.condition(d.Record().ID) == Fine || m.condition(d.Record().ID) == Leaving {
			if err := m.collectDevice(ctx, r, d); err != nil {
				errs = append(errs, fmt.Errorf("device %s: %w", d.Record().ID, err))
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
	kvs, err := m.reg.List(ctx, alba.TrashPrefix)
	if err != nil {
		return err
	}
	waiting := 0
	for _, kv := range kvs {
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
	}
	if waiting > 0 {
		m.log.Info().Int("objects", waiting).Msg("deleted objects wait for devices that are out of reach")
	}
	return ctx.Err()
}

// references is what the registry speaks of.
type references struct {
	shards     map[string]bool  // shard keys with their devices
	busy       map[alba.ID]bool // uploads with an intent or in the trash
	trash      map[alba.ID]bool
	namespaces map[alba.ID]bool
}

func (m *Maintainer) references(ctx context.Context) (*references, error) {
	refs := &references{shards: map[string]bool{}, busy: map[alba.ID]bool{}, trash: map[alba.ID]bool{}, namespaces: map[alba.ID]bool{}}
	kvs, err := m.reg.List(ctx, alba.NamespacePrefix)
	if err != nil {
		return nil, err
	}
	for _, kv := range kvs {
		n, err := alba.Decode[alba.Namespace](kv.Value)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", kv.Key, err)
		}
		refs.namespaces[n.ID] = true
	}
	// Intents before manifests: an upload that commits in between is in one of them.
	for _, prefix := range []string{alba.IntentPrefix, alba.TrashPrefix} {
		kvs, err := m.reg.List(ctx, prefix)
		if err != nil {
			return nil, err
		}
		for _, kv := range kvs {
			_, upload, err := alba.SplitKey(kv.Key, prefix)
			if err != nil {
				return nil, err
			}
			refs.busy[upload] = true
			if prefix == alba.TrashPrefix {
				refs.trash[upload] = true
			}
		}
	}
	kvs, err = m.reg.List(ctx, alba.ObjectPrefix)
	if err != nil {
		return nil, err
	}
	for _, kv := range kvs {
		man, err := alba.DecodeManifest(kv.Value)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", kv.Key, err)
		}
		for i, id := range man.Shards {
			if id != "" {
				refs.shards[id+" "+alba.ShardKey(man.NamespaceID, man.Upload, i)] = true
			}
		}
	}
	return refs, nil
}

// used says whether a key of a device is spoken of; true for keys it does not know.
func (r *references) used(device, key string) bool {
	kind, rest, _ := strings.Cut(key, "/")
	switch kind + "/" {
	case alba.FragmentPrefix, alba.ShardPrefix:
		ns, upload, shard, _, err := alba.ParseShardKey(key)
		return err != nil || r.busy[upload] || r.shards[device+" "+alba.ShardKey(ns, upload, shard)]
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
func (r *references) unused(device string, infos []asd.Info) []asd.Update {
	var updates []asd.Update
	for _, info := range infos {
		if !r.used(device, info.Key) {
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
			updates := refs.unused(id, page.Infos)
			if len(updates) > 0 {
				if refs, err = m.references(ctx); err != nil {
					return err
				}
				updates = refs.unused(id, page.Infos)
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
