package repair

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"scoria/alba"
	"scoria/alba/asd"
	"scoria/alba/proxy"
)

// verifyStretch is what one request of a verification reads, in bytes.
const verifyStretch = 8 << 20

// objectsCursor is the cursor of the second part of a verification; a device's ID
// can't begin so.
const objectsCursor = "/objects"

// verify has every device read and check all that it stores, then looks whether what
// the manifests speak of is there. What is wrong is reported to Faults, and so
// repaired. The cursor is the device and the device's own.
func (m *Maintainer) verify(ctx context.Context, r *run) error {
	var errs []error
	members := m.p.Fleet().Members()
	r.job.Total = 0
	for _, d := range members {
		st, _ := d.Stats()
		r.job.Total += st.Bytes
	}
	from, within, _ := strings.Cut(r.job.Cursor, "\n")
	for _, d := range members {
		id := d.Record().ID
		if from == objectsCursor || id < from {
			continue
		}
		if id != from {
			within = ""
		}
		if err := m.verifyDevice(ctx, r, d, within); err != nil {
			if ctx.Err() != nil || errors.Is(err, errLost) {
				return err
			}
			errs = append(errs, fmt.Errorf("device %s: %w", id, err))
		}
	}
	r.job.Cursor = objectsCursor
	if err := r.save(ctx, true); err != nil {
		return err
	}
	return errors.Join(append(errs, m.verifyPresence(ctx, r))...)
}

func (m *Maintainer) verifyDevice(ctx context.Context, r *run, d *proxy.Member, cursor string) error {
	id := d.Record().ID
	if m.condition(id) == Gone {
		return nil // its shards are rebuilt elsewhere
	}
	for {
		c, err := d.Client(ctx)
		if err != nil {
			return err
		}
		res, err := c.Verify(ctx, asd.VerifyRequest{Cursor: cursor, MaxBytes: verifyStretch})
		if err != nil {
			return err
		}
		for _, bad := range res.Bad {
			r.job.Problems++
			m.log.Error().Str("asd", id).Str("key", bad.Key).Int64("offset", bad.Off).Int64("size", bad.Size).Str("reason", bad.Reason).Msg("verification found damage")
			m.damaged(ctx, d, bad.Key)
		}
		r.job.Done += res.Bytes
		cursor = res.Next
		r.job.Cursor = id + "\n" + cursor
		if err := r.wait(ctx, res.Bytes, unhurried); err != nil {
			return err
		}
		if res.Done {
			return nil
		}
	}
}

// damaged has one value of a device repaired. Damage outside of values shows in the
// device's statistics: what it holds is moved elsewhere, and it must be replaced. What
// can't be read of it is found by verifyPresence.
func (m *Maintainer) damaged(ctx context.Context, d *proxy.Member, key string) {
	if ns, upload, shard, _, err := alba.ParseShardKey(key); err == nil {
		m.reportShard(ctx, ns, upload, shard, d.Record().ID)
		return
	}
	switch {
	case strings.HasPrefix(key, alba.TombstonePrefix):
		// A tombstone says all with its key: written again it is whole.
		if err := d.Apply(ctx, nil, []asd.Update{asd.Put(key, asd.NewValue([]byte("deleted")))}, asd.PriorityRepair); err != nil {
			m.log.Warn().Err(err).Str("asd", d.Record().ID).Msg("damaged tombstone is not repaired yet")
		}
	case strings.HasPrefix(key, alba.NamespaceCopyPrefix), strings.HasPrefix(key, alba.PresetCopyPrefix):
		m.p.CopyRecords(ctx, d)
	}
}

// reportShard reports a shard by its keys.
func (m *Maintainer) reportShard(ctx context.Context, ns, upload alba.ID, shard int, device string) {
	_ = alba.Each(ctx, m.reg, alba.ObjectKey(ns, ""), func(kv alba.KV) error { // what fails is found again next time
		man, err := alba.DecodeManifest(kv.Value)
		if err == nil && man.Upload == upload && shard < len(man.Shards) && man.Shards[shard] == device {
			m.o.Faults.Add(proxy.Fault{Namespace: man.Namespace, Object: man.Object, Upload: man.Upload, Shard: shard, Device: device})
			m.wake(JobRepair)
		}
		return nil
	})
}

// verifyPresence looks whether each shard that a manifest speaks of is on its device,
// whole.
func (m *Maintainer) verifyPresence(ctx context.Context, r *run) error {
	return m.eachObject(ctx, func(man *alba.Manifest) error {
		for shard, id := range man.Shards {
			if id == "" || m.condition(id) != Fine && m.condition(id) != Leaving {
				continue
			}
			whole, err := m.present(ctx, man, shard)
			if err != nil && !errors.Is(err, asd.ErrCorrupt) { // damage is found, not out of reach
				if ctx.Err() != nil {
					return ctx.Err()
				}
				m.log.Info().Err(err).Str("asd", id).Msg("shard can't be verified now")
				continue
			}
			if !whole && m.current(ctx, man, shard) {
				r.job.Problems++
				m.log.Error().Str("asd", id).Str("namespace", man.Namespace).Str("object", man.Object).Int("shard", shard).Msg("verification found a shard missing")
				m.reportShard(ctx, man.NamespaceID, man.Upload, shard, id)
			}
		}
		return r.wait(ctx, 0, unhurried)
	})
}

// current says whether a shard is still where a manifest that was read before says: the
// object may have been deleted, or the shard moved, since. If the registry can't tell,
// it is.
func (m *Maintainer) current(ctx context.Context, man *alba.Manifest, shard int) bool {
	kv, ok, err := m.reg.Get(ctx, alba.ObjectKey(man.NamespaceID, man.Object))
	if err != nil || !ok {
		return err != nil
	}
	now, err := alba.DecodeManifest(kv.Value)
	return err != nil || now.Upload == man.Upload && now.Shards[shard] == man.Shards[shard]
}

// present says whether a shard's fragments and its manifest are there in their sizes.
func (m *Maintainer) present(ctx context.Context, man *alba.Manifest, shard int) (bool, error) {
	d := m.p.Fleet().Member(man.Shards[shard])
	if d == nil {
		return false, fmt.Errorf("device %s is not in the registry: %w", man.Shards[shard], asd.ErrUnavailable)
	}
	c, err := d.Client(ctx)
	if err != nil {
		return false, err
	}
	return shardWhole(ctx, c, man, shard)
}

func shardWhole(ctx context.Context, c asd.Client, man *alba.Manifest, shard int) (bool, error) {
	l := man.Layout()
	keys := []string{alba.ShardKey(man.NamespaceID, man.Upload, shard)}
	for chunk := 0; ; {
		for ; chunk < l.Chunks() && len(keys) < asd.MaxKeys; chunk++ {
			keys = append(keys, alba.FragmentKey(man.NamespaceID, man.Upload, shard, chunk))
		}
		infos, err := c.Exists(ctx, keys, asd.PriorityRepair)
		if err != nil {
			return false, err
		}
		for _, info := range infos {
			if !info.Exists {
				return false, nil
			}
			if _, _, _, n, err := alba.ParseShardKey(info.Key); err != nil || n >= 0 && info.Size != int64(l.FragmentLen(n)) {
				return false, err
			}
		}
		if chunk == l.Chunks() {
			return true, nil
		}
		keys = keys[:0]
	}
}
