package proxy

import (
	"context"
	"errors"
	"fmt"
	"time"

	"golang.org/x/sync/errgroup"

	"scoria/alba"
	"scoria/alba/asd"
)

// purgeTimeout bounds what a purge waits for one device.
const purgeTimeout = 10 * time.Second

// fenceTimeout bounds what Fence waits for devices; the registry has decided already.
const fenceTimeout = 2 * time.Second

// Delete removes an object; no error if there is none. ErrStaleEpoch if a later owner
// has fenced the namespace. The room comes back a little later.
func (p *Proxy) Delete(ctx context.Context, ns, name string, epoch uint64) error {
	err := p.check(ctx, ns, name)
	if err == nil {
		err = p.delete(ctx, ns, name, epoch)
	}
	if errors.Is(err, ErrNoNamespace) {
		return nil
	}
	if err == nil {
		p.counters.Deletes.Add(1)
	}
	return opError("delete", ns, name, err)
}

func (p *Proxy) delete(ctx context.Context, ns, name string, epoch uint64) error {
	for range tries {
		n, err := p.owned(ctx, ns, epoch)
		if err != nil {
			return err
		}
		key := alba.ObjectKey(n.ID, name)
		kv, ok, err := p.reg.Get(ctx, key)
		if err != nil || !ok {
			return err
		}
		m, err := alba.DecodeManifest(kv.Value)
		if err != nil {
			return fmt.Errorf("%s: %w", key, err)
		}
		rec := p.trashRecord(m)
		rev, err := p.reg.Commit(ctx, []alba.Compare{n.compare(), {Key: key, Revision: kv.Revision}},
			[]alba.Write{{Key: key}, {Key: alba.TrashKey(n.ID, m.Upload), Value: alba.Encode(rec)}})
		if err == nil {
			p.cache.drop(key)
			p.purgeSoon(n.ID, m.Upload, rec, rev)
			return nil
		}
		if !errors.Is(err, alba.ErrConflict) {
			return err
		}
	}
	return ErrBusy
}

func (p *Proxy) trashRecord(m *alba.Manifest) alba.Intent {
	return alba.Intent{Namespace: m.Namespace, Object: m.Object, Epoch: m.Epoch, Policy: m.Policy, Shards: m.Shards,
		By: p.opts.Node, Since: now()}
}

// DeleteNamespace removes a namespace with all its objects; no error if there is none.
func (p *Proxy) DeleteNamespace(ctx context.Context, ns string) error {
	err := p.check(ctx, ns, "-")
	for range tries {
		if err != nil {
			break
		}
		var n namespace
		n, err = p.loadNamespace(ctx, ns)
		if errors.Is(err, ErrNoNamespace) && !n.Deleting {
			return nil
		}
		if err != nil && !n.Deleting {
			break
		}
		if !n.Deleting {
			n.Deleting = true
			n.rev, err = p.reg.Commit(ctx, []alba.Compare{n.compare()}, []alba.Write{n.write()})
			if errors.Is(err, alba.ErrConflict) {
				err = nil
				continue
			}
			if err != nil {
				break
			}
		}
		return opError("delete namespace", ns, "", p.finishDelete(ctx, n))
	}
	return opError("delete namespace", ns, "", err)
}

// FinishDeletes finishes the deletions of namespaces that were begun by daemons that
// died. Deletions that are under way elsewhere are helped along.
func (p *Proxy) FinishDeletes(ctx context.Context) error {
	kvs, err := p.reg.List(ctx, alba.NamespacePrefix)
	if err != nil {
		return err
	}
	for _, kv := range kvs {
		rec, err := alba.Decode[alba.Namespace](kv.Value)
		if err != nil {
			return fmt.Errorf("%s: %w", kv.Key, err)
		}
		if rec.Deleting {
			if err := p.finishDelete(ctx, namespace{rec, kv.Revision}); err != nil {
				return opError("delete namespace", rec.Name, "", err)
			}
		}
	}
	return nil
}

// finishDelete moves all manifests of a namespace that is marked to the trash, removes the
// namespace, and deletes what is in the trash; part by part, for a namespace may
// have millions of objects. Uploads under way can't commit any more.
func (p *Proxy) finishDelete(ctx context.Context, n namespace) error {
	var part []alba.KV
	err := alba.Each(ctx, p.reg, alba.ObjectKey(n.ID, ""), func(kv alba.KV) error {
		if part = append(part, kv); len(part) < alba.MaxCommitWrites/2 {
			return nil
		}
		defer func() { part = part[:0] }()
		return p.discard(ctx, n.ID, part)
	})
	if err == nil {
		err = p.discard(ctx, n.ID, part)
	}
	if err != nil {
		return err // or somebody else is at it: repeated by the caller, or by maintenance
	}
	_, err = p.reg.Commit(ctx, []alba.Compare{n.compare()}, []alba.Write{{Key: alba.NamespaceKey(n.Name)}})
	if err != nil && !errors.Is(err, alba.ErrConflict) {
		return err
	}
	p.cache.dropAll()
	return alba.Each(ctx, p.reg, alba.TrashPrefix+n.ID.String()+"/", func(kv alba.KV) error {
		rec, err := alba.Decode[alba.Intent](kv.Value)
		if err != nil {
			return fmt.Errorf("%s: %w", kv.Key, err)
		}
		_, upload, err := alba.SplitKey(kv.Key, alba.TrashPrefix)
		if err == nil {
			p.purgeSoon(n.ID, upload, rec, kv.Revision)
		}
		return err
	})
}

// discard moves manifests of a namespace to the trash in one transaction.
func (p *Proxy) discard(ctx context.Context, ns alba.ID, manifests []alba.KV) error {
	var compares []alba.Compare
	var writes []alba.Write
	for _, kv := range manifests {
		m, err := alba.DecodeManifest(kv.Value)
		if err != nil {
			return fmt.Errorf("%s: %w", kv.Key, err)
		}
		compares = append(compares, alba.Compare{Key: kv.Key, Revision: kv.Revision})
		writes = append(writes, alba.Write{Key: kv.Key}, alba.Write{Key: alba.TrashKey(ns, m.Upload), Value: alba.Encode(p.trashRecord(m))})
	}
	_, err := p.reg.Commit(ctx, compares, writes)
	return err
}

// purgeSoon purges in the background; at once if there is much of that already.
// What fails is left to maintenance.
func (p *Proxy) purgeSoon(ns, upload alba.ID, rec alba.Intent, rev int64) {
	run := func() {
		if err := p.Purge(p.ctx, ns, upload, rec, rev); err != nil && p.ctx.Err() == nil {
			p.opts.Log.Info().Err(err).Str("namespace", rec.Namespace).Str("object", rec.Object).
				Msg("deleted object still takes room on a device; maintenance goes on with it")
		}
	}
	select {
	case p.purges <- struct{}{}:
		if p.background(func() { defer func() { <-p.purges }(); run() }) {
			return
		}
		<-p.purges
	default:
		run()
	}
}

// Purge deletes what an upload left on the devices of its trash record, then the
// record, which must be of revision rev. While a device is out of reach the others
// remember the deletion, and the record stays; so it does, and nothing is deleted, while a
// device knows more than the registry (ErrOlder).
func (p *Proxy) Purge(ctx context.Context, ns, upload alba.ID, rec alba.Intent, rev int64) error {
	if err := p.Older(); err != nil {
		return err
	}
	mark, err := p.mark(ctx, rev)
	if err != nil {
		return err
	}
	var g errgroup.Group
	errs := make([]error, len(rec.Shards))
	for i, id := range rec.Shards {
		m := p.fleet.Member(id)
		if id == "" || m == nil {
			continue // it was taken out of the registry, with all that it had
		}
		if m.Record().State == alba.DeviceRemoved {
			continue
		}
		g.Go(func() error {
			errs[i] = m.deleteUpload(ctx, ns, upload, mark)
			return nil
		})
	}
	_ = g.Wait()
	failed := errors.Join(errs...)
	for i, id := range rec.Shards {
		m := p.fleet.Member(id)
		if m == nil || errs[i] != nil || id == "" || m.Record().State == alba.DeviceRemoved {
			continue
		}
		key := alba.TombstoneKey(ns, upload)
		limited, cancel := context.WithTimeout(ctx, purgeTimeout)
		var err error
		if failed != nil {
			err = m.Apply(limited, nil, []asd.Update{asd.Put(key, asd.NewValue([]byte(rec.Object)))}, asd.PriorityRepair)
		} else {
			err = m.dropTombstone(limited, key)
		}
		cancel()
		if err != nil {
			failed = errors.Join(failed, err)
		}
	}
	if failed != nil {
		return failed
	}
	_, err = p.reg.Commit(ctx, []alba.Compare{{Key: alba.TrashKey(ns, upload), Revision: rev}}, []alba.Write{{Key: alba.TrashKey(ns, upload)}})
	if errors.Is(err, alba.ErrConflict) {
		return nil // somebody else did the same
	}
	return err
}

// deleteUpload deletes all fragments of an upload and their manifests.
func (m *Member) deleteUpload(ctx context.Context, ns, upload alba.ID, mark alba.Position) error {
	ctx, cancel := context.WithTimeout(ctx, purgeTimeout)
	defer cancel()
	id := ns.String() + "/" + upload.String() + "/"
	for _, prefix := range []string{alba.FragmentPrefix + id, alba.ShardPrefix + id, alba.AttemptPrefix + id} {
		if err := m.deletePrefix(ctx, prefix, mark, nil); err != nil {
			return fmt.Errorf("device %s: %w", m.Record().ID, err)
		}
	}
	return nil
}

// deletePrefix deletes all keys that begin with prefix while the asserts hold.
func (m *Member) deletePrefix(ctx context.Context, prefix string, mark alba.Position, asserts []asd.Assert) error {
	for {
		r, err := m.Range(ctx, asd.RangeRequest{From: prefix, To: After(prefix), Limit: asd.MaxUpdates - 1}, asd.PriorityRepair)
		if err != nil {
			return err
		}
		updates := make([]asd.Update, len(r.Infos))
		for i, info := range r.Infos {
			updates[i] = asd.Delete(info.Key)
		}
		if len(updates) > 0 {
			if err := m.applyMarked(ctx, mark, asserts, updates); err != nil {
				return err
			}
		}
		if !r.More {
			return nil
		}
	}
}

// After is the first key behind all that begin with prefix, which must not end with
// byte 255.
func After(prefix string) string {
	return prefix[:len(prefix)-1] + string(prefix[len(prefix)-1]+1)
}

// Range is asd.Client.Range on the device.
func (m *Member) Range(ctx context.Context, req asd.RangeRequest, pri asd.Priority) (asd.RangeResult, error) {
	c, err := m.Client(ctx)
	if err != nil {
		return asd.RangeResult{}, err
	}
	r, err := c.Range(ctx, req, pri)
	return r, m.note(ctx, 0, err)
}

// fenceDevices tells all devices that are up of the namespace's epoch, so that they
// refuse smaller ones. Those that can't be told learn of it with the next write of
// the owner; until then it is the registry that refuses a stale owner's commit.
func (p *Proxy) fenceDevices(ctx context.Context, n *namespace) {
	ctx, cancel := context.WithTimeout(ctx, fenceTimeout)
	defer cancel()
	var g errgroup.Group
	for _, m := range p.fleet.Members() {
		if !m.Up() || m.Record().State == alba.DeviceRemoved {
			continue
		}
		g.Go(func() error {
			if err := m.ApplyOwned(ctx, n, n.Epoch, nil, asd.PriorityGuest); err != nil {
				p.opts.Log.Info().Err(err).Str("asd", m.Record().ID).Str("namespace", n.Name).Uint64("epoch", n.Epoch).
					Msg("device was not told of the new epoch; the next write tells it")
			}
			return nil
		})
	}
	_ = g.Wait()
}
