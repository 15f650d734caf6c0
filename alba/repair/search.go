package repair

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"scoria/alba"
	"scoria/alba/asd"
	"scoria/alba/proxy"
)

// The search for a device's orphans goes through its namespaces, and through each
// namespace's manifests once for the keys of up to lookShards shards, with 20 bytes of
// memory for each. That look is older than the keys that it is compared with,
// so what it does not know is only suspected: the registry is read again for up to
// maxSuspects suspected keys at a time. Where there are no orphans it is read once.

// Bounds of a search.
const (
	lookShards  = 1 << 20 // 20 bytes each
	maxSuspects = 4096
	deleteBatch = asd.MaxUpdates / 2 // the attempts of as many shards can be asserted, and the position
)

// shardOf names a shard of an upload.
type shardOf struct {
	upload alba.ID
	shard  uint32
}

func compareShards(a, b shardOf) int {
	return cmp.Or(bytes.Compare(a.upload[:], b.upload[:]), cmp.Compare(a.shard, b.shard))
}

// search looks for the orphans of one device.
type search struct {
	m      *Maintainer
	r      *run
	d      *proxy.Member
	id     string
	shards int // lookShards, but for tests

	ns       alba.ID
	suspects []string
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
	s := &search{m: m, r: r, d: d, id: d.Record().ID, shards: m.look}
	for ns := range s.namespaces(ctx, &err) {
		if err := s.namespace(ctx, ns); err != nil {
			return err
		}
	}
	if err != nil {
		return err
	}
	return s.copies(ctx)
}

// namespaces yields all namespaces of which the device has anything but the record, in order.
func (s *search) namespaces(ctx context.Context, failed *error) func(yield func(alba.ID) bool) {
	return func(yield func(alba.ID) bool) {
		after := ""
		for {
			next := ""
			for _, kind := range []string{alba.FragmentPrefix, alba.ShardPrefix, alba.AttemptPrefix, alba.TombstonePrefix} {
				from := kind
				if after != "" {
					from = proxy.After(kind + after + "/")
				}
				page, err := s.d.Range(ctx, asd.RangeRequest{From: from, To: proxy.After(kind), Limit: 1}, asd.PriorityRepair)
				if err != nil {
					*failed = err
					return
				}
				if len(page.Infos) == 0 {
					continue
				}
				ns, _, _ := strings.Cut(page.Infos[0].Key[len(kind):], "/")
				if next == "" || ns < next {
					next = ns
				}
			}
			if next == "" {
				return
			}
			after = next
			// What is no namespace is no key of this program: it stays.
			if ns, err := alba.ParseID(next); err == nil && !yield(ns) {
				return
			}
		}
	}
}

// namespace deletes the device's orphans of one namespace.
func (s *search) namespace(ctx context.Context, ns alba.ID) error {
	s.ns = ns
	for from := (alba.ID{}); ; {
		look, end, more, err := s.look(ctx, from)
		if err != nil {
			return err
		}
		for _, kind := range []string{alba.FragmentPrefix, alba.ShardPrefix, alba.AttemptPrefix, alba.TombstonePrefix} {
			base := kind + ns.String() + "/"
			req := asd.RangeRequest{From: base + from.String(), To: proxy.After(base)}
			if more {
				req.To = base + end.String()
			}
			err := s.pages(ctx, req, func(key string) error {
				_, upload, shard, known := parseKey(key)
				if !known {
					return nil
				}
				if _, used := slices.BinarySearchFunc(look, shardOf{upload, uint32(shard)}, compareShards); used && kind != alba.TombstonePrefix {
					return nil
				}
				return s.suspect(ctx, key)
			})
			if err != nil {
				return err
			}
		}
		if !more {
			return s.settle(ctx)
		}
		from = end
	}
}

// parseKey parses a key of a device that is of an upload; the shard of a tombstone is 0.
func parseKey(key string) (ns, upload alba.ID, shard int, known bool) {
	var err error
	if strings.HasPrefix(key, alba.TombstonePrefix) {
		ns, upload, err = alba.SplitKey(key, alba.TombstonePrefix)
	} else {
		ns, upload, shard, _, err = alba.ParseShardKey(key)
	}
	return ns, upload, shard, err == nil
}

// pages calls fn with the device's keys.
func (s *search) pages(ctx context.Context, req asd.RangeRequest, fn func(key string) error) error {
	req.Limit = asd.MaxUpdates
	for {
		if err := s.r.wait(ctx, 0, unhurried); err != nil {
			return err
		}
		page, err := s.d.Range(ctx, req, asd.PriorityRepair)
		if err != nil {
			return err
		}
		for _, info := range page.Infos {
			if err := fn(info.Key); err != nil {
				return err
			}
		}
		if !page.More {
			return nil
		}
		req.From, req.After = page.Infos[len(page.Infos)-1].Key, true
	}
}

// look returns the shards that manifests of the namespace have on the device, sorted, of
// the uploads from a first one to before end; more says that there may be some behind.
func (s *search) look(ctx context.Context, from alba.ID) (look []shardOf, end alba.ID, more bool, err error) {
	err = alba.Each(ctx, s.m.reg, alba.ObjectKey(s.ns, ""), func(kv alba.KV) error {
		man, err := alba.DecodeManifest(kv.Value)
		if err != nil {
			return fmt.Errorf("%s: %w", kv.Key, err)
		}
		if bytes.Compare(man.Upload[:], from[:]) < 0 || more && bytes.Compare(man.Upload[:], end[:]) >= 0 {
			return nil
		}
		for i, id := range man.Shards {
			if id == s.id {
				look = append(look, shardOf{man.Upload, uint32(i)})
			}
		}
		if len(look) < 2*s.shards {
			return nil
		}
		// The half with the smaller uploads: the others come later.
		slices.SortFunc(look, compareShards)
		end, more = look[s.shards].upload, true
		look = slices.DeleteFunc(look, func(x shardOf) bool { return bytes.Compare(x.upload[:], end[:]) >= 0 })
		return nil
	})
	slices.SortFunc(look, compareShards)
	return look, end, more, err
}

// suspect keeps a key that may be an orphan's.
func (s *search) suspect(ctx context.Context, key string) error {
	s.suspects = append(s.suspects, key)
	if len(s.suspects) < maxSuspects {
		return nil
	}
	return s.settle(ctx)
}

// settle deletes those of the suspected keys that neither a manifest, an intent nor a
// trash record speaks of now.
//
// Two moves to one device write the same keys. A move puts the ID of its attempt on the
// device with its first fragment; here it is read before the registry is, and asserted by
// the deletion: a move that began since keeps what it has written.
func (s *search) settle(ctx context.Context) error {
	keys := s.suspects
	s.suspects = nil
	if len(keys) == 0 {
		return nil
	}
	attempts, err := s.attempts(ctx, keys)
	if err != nil {
		return err
	}
	refs, err := s.references(ctx, keys)
	if err != nil {
		return err
	}
	keys = slices.DeleteFunc(keys, refs.used)
	for len(keys) > 0 {
		part := keys[:min(deleteBatch, len(keys))]
		keys = keys[len(part):]
		if err := s.delete(ctx, part, attempts); err != nil {
			return err
		}
	}
	return nil
}

// attempts reads which attempts wrote the shards of keys.
func (s *search) attempts(ctx context.Context, keys []string) (map[shardOf]asd.Assert, error) {
	attempts := map[shardOf]asd.Assert{}
	for _, key := range keys {
		_, upload, shard, known := parseKey(key)
		of := shardOf{upload, uint32(shard)}
		if _, ok := attempts[of]; ok || !known || strings.HasPrefix(key, alba.TombstonePrefix) {
			continue
		}
		a, err := s.d.AssertAttempt(ctx, s.ns, upload, shard)
		if err != nil {
			return nil, err
		}
		attempts[of] = a
	}
	return attempts, nil
}

// delete deletes keys of which nobody speaks.
func (s *search) delete(ctx context.Context, keys []string, attempts map[shardOf]asd.Assert) error {
	updates := make([]asd.Update, len(keys))
	var asserts []asd.Assert
	asserted := map[shardOf]bool{}
	for i, key := range keys {
		updates[i] = asd.Delete(key)
		_, upload, shard, _ := parseKey(key)
		of := shardOf{upload, uint32(shard)}
		if a, ok := attempts[of]; ok && !asserted[of] {
			asserted[of] = true
			asserts = append(asserts, a)
		}
	}
	err := s.d.ApplyKnowing(ctx, asserts, updates)
	if errors.Is(err, asd.ErrAssert) {
		s.m.log.Info().Err(err).Str("asd", s.id).Msg("shards are being moved to where they were orphans: left to the next search")
		return nil
	}
	if err != nil {
		return err
	}
	s.r.job.Problems += int64(len(updates))
	s.m.log.Info().Str("asd", s.id).Int("keys", len(updates)).Msg("orphans deleted")
	return nil
}

// references is what the registry speaks of on one device, of some uploads.
type references struct {
	shards map[shardOf]bool
	busy   map[alba.ID]bool // uploads with an intent or in the trash
	trash  map[alba.ID]bool
}

// references reads the registry for suspected keys.
func (s *search) references(ctx context.Context, keys []string) (*references, error) {
	of := map[alba.ID]bool{}
	for _, key := range keys {
		_, upload, _, _ := parseKey(key)
		of[upload] = true
	}
	refs := &references{shards: map[shardOf]bool{}, busy: map[alba.ID]bool{}, trash: map[alba.ID]bool{}}
	// Intents before manifests: an upload that commits in between is in one of them.
	for _, prefix := range []string{alba.IntentPrefix, alba.TrashPrefix} {
		err := alba.Each(ctx, s.m.reg, prefix+s.ns.String()+"/", func(kv alba.KV) error {
			_, upload, err := alba.SplitKey(kv.Key, prefix)
			if err == nil && of[upload] {
				refs.busy[upload] = true
				refs.trash[upload] = refs.trash[upload] || prefix == alba.TrashPrefix
			}
			return err
		})
		if err != nil {
			return nil, err
		}
	}
	err := alba.Each(ctx, s.m.reg, alba.ObjectKey(s.ns, ""), func(kv alba.KV) error {
		man, err := alba.DecodeManifest(kv.Value)
		if err != nil {
			return fmt.Errorf("%s: %w", kv.Key, err)
		}
		for i, id := range man.Shards {
			if id == s.id && of[man.Upload] {
				refs.shards[shardOf{man.Upload, uint32(i)}] = true
			}
		}
		return nil
	})
	return refs, err
}

// used says whether a key of the device is spoken of.
func (r *references) used(key string) bool {
	_, upload, shard, _ := parseKey(key)
	if strings.HasPrefix(key, alba.TombstonePrefix) {
		return r.trash[upload]
	}
	return r.busy[upload] || r.shards[shardOf{upload, uint32(shard)}]
}

// copies deletes the copies of records of namespaces that are gone.
func (s *search) copies(ctx context.Context) error {
	var keys []string
	settle := func() error {
		there := map[alba.ID]bool{}
		err := alba.Each(ctx, s.m.reg, alba.NamespacePrefix, func(kv alba.KV) error {
			n, err := alba.Decode[alba.Namespace](kv.Value)
			if err != nil {
				return fmt.Errorf("%s: %w", kv.Key, err)
			}
			there[n.ID] = true
			return nil
		})
		if err != nil {
			return err
		}
		keys = slices.DeleteFunc(keys, func(key string) bool {
			ns, err := alba.ParseID(key[len(alba.NamespaceCopyPrefix):])
			return err != nil || there[ns]
		})
		for len(keys) > 0 {
			part := keys[:min(deleteBatch, len(keys))]
			keys = keys[len(part):]
			if err := s.delete(ctx, part, nil); err != nil {
				return err
			}
		}
		return nil
	}
	req := asd.RangeRequest{From: alba.NamespaceCopyPrefix, To: proxy.After(alba.NamespaceCopyPrefix)}
	err := s.pages(ctx, req, func(key string) error {
		if keys = append(keys, key); len(keys) < maxSuspects {
			return nil
		}
		return settle()
	})
	if err != nil || len(keys) == 0 {
		return err
	}
	return settle()
}
