package proxy

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"golang.org/x/sync/errgroup"

	"scoria/alba"
	"scoria/alba/asd"
	"scoria/alba/erasure"
	"scoria/alba/place"
)

// ErrInProgress: somebody else is at work on the object, or was when it died; then
// maintenance removes its intent after a while.
var ErrInProgress = errors.New("another daemon is at work on the object")

// Mend says how an object's shards are to be mended.
type Mend struct {
	// Gone says that what the device had can't be read any more: its shards are
	// rebuilt elsewhere. Devices that are not in the registry are always gone.
	Gone func(id string) bool
	// Leave says that shards are to be moved away from a device, which can be read.
	Leave func(id string) bool
	// Bad are shards whose contents are damaged: they are written again where they are.
	Bad map[int]bool
	// To, if not empty, is where one of the shards that are to leave goes, if the policy
	// allows; the others stay where they are. For rebalancing.
	To string
	// Throttle is called before each chunk with the bytes that it will move.
	Throttle func(ctx context.Context, bytes int64) error
}

// Mended is what Mend did.
type Mended struct {
	Shards  int   // written
	Bytes   int64 // written
	Missing int   // shards for which there is no device
}

// mending is one object under repair.
type mending struct {
	p    *Proxy
	o    Mend
	ns   namespace
	e    *entry
	next *alba.Manifest // with the shards where they will be
	work []int          // shards to be written
	id   alba.ID        // of this attempt
	// was asserts, per shard that moves and can be deleted where it was, that no later
	// attempt has begun to move it back there.
	was   map[int]asd.Assert
	unfit map[int]bool // shards that can't be read
}

// Mend writes the shards of an object that are missing, gone, bad or to be moved: each
// is read from where it was if possible, or computed from k others. The manifest is
// changed in one transaction, which fails if the object was changed meanwhile; what
// was written then is deleted. It needs no owner: the contents stay the same.
func (p *Proxy) Mend(ctx context.Context, ns, object string, o Mend) (Mended, error) {
	err := p.check(ctx, ns, object)
	var done Mended
	if err == nil {
		done, err = p.mend(ctx, ns, object, o)
	}
	return done, opError("mend", ns, object, err)
}

func (p *Proxy) mend(ctx context.Context, ns, object string, o Mend) (Mended, error) {
	n, err := p.loadNamespace(ctx, ns)
	if err != nil {
		return Mended{}, err
	}
	m := &mending{p: p, o: o, ns: n, unfit: map[int]bool{}, id: alba.NewID(), was: map[int]asd.Assert{}}
	if m.e, err = p.loadManifest(ctx, n, object); err != nil {
		return Mended{}, err
	}
	missing := m.plan(p.fleet.States(ctx))
	if len(m.work) == 0 {
		return Mended{Missing: missing}, nil
	}
	intent := alba.IntentKey(n.ID, m.e.m.Upload)
	rec := alba.Intent{Namespace: ns, Object: object, Epoch: n.Epoch, Move: true, Policy: m.next.Policy, Shards: m.next.Shards,
		By: p.opts.Node, Since: now()}
	key := alba.ObjectKey(n.ID, object)
	active, err := p.fleet.assertActive(m.targets())
	if err != nil {
		return Mended{Missing: missing}, err
	}
	rev, err := p.reg.Commit(ctx, append(active, n.compare(), alba.Compare{Key: key, Revision: m.e.rev}, alba.Compare{Key: intent}),
		[]alba.Write{{Key: intent, Value: alba.Encode(rec)}})
	if errors.Is(err, alba.ErrConflict) {
		err = fmt.Errorf("%w: %w", ErrInProgress, err)
		if rerr := p.fleet.Reload(ctx); rerr != nil { // perhaps a device's record is another one
			err = rerr
		}
	}
	if err != nil {
		return Mended{Missing: missing}, err
	}
	p.active.Store(m.next.Upload, struct{}{})
	defer p.active.Delete(m.next.Upload)
	var moved int64
	written, err := m.write(ctx)
	if err == nil {
		m.noteAttempts(ctx)
		m.next.Generation++
		moved, err = p.reg.Commit(ctx, append(active, alba.Compare{Key: key, Revision: m.e.rev}, alba.Compare{Key: intent, Revision: rev}),
			[]alba.Write{{Key: key, Value: m.next.Encode()}, {Key: intent}})
		p.cache.drop(key)
		if err != nil && !errors.Is(err, alba.ErrConflict) {
			// It may have happened. The intent tells maintenance to look.
			return Mended{Missing: missing}, err
		}
	}
	if err == nil {
		m.cleanOld(moved)
	} else {
		m.cleanNew(intent, rev)
	}
	return Mended{Shards: len(m.work), Bytes: written, Missing: missing}, err
}

// loadManifest is loadEntry without the key that reading would need.
func (p *Proxy) loadManifest(ctx context.Context, n namespace, name string) (*entry, error) {
	kv, ok, err := p.reg.Get(ctx, alba.ObjectKey(n.ID, name))
	if err != nil {
		return nil, err
	}
	if !ok {
		return nil, ErrNoObject
	}
	m, err := alba.DecodeManifest(kv.Value)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", kv.Key, err)
	}
	return &entry{m: m, rev: kv.Revision, ns: n}, nil
}

// plan decides what is written where and returns how many shards find no place.
func (m *mending) plan(devices []place.Device) (missing int) {
	old := m.e.m.Shards
	kept := slices.Clone(old)
	gone, leaving := map[int]bool{}, []int(nil)
	for i, id := range old {
		switch {
		case id == "":
			m.unfit[i] = true
		case m.p.fleet.Member(id) == nil || m.o.Gone != nil && m.o.Gone(id):
			m.unfit[i] = true
			kept[i], gone[i] = "", true
		case m.o.Leave != nil && m.o.Leave(id):
			leaving = append(leaving, i)
		}
		if m.o.Bad[i] {
			m.unfit[i] = true
		}
	}
	pol, domain := m.e.m.Policy, m.e.m.Domain
	if m.o.To != "" {
		m.prefer(kept, leaving, devices)
	} else {
		for _, i := range leaving {
			kept[i] = ""
		}
	}
	target, _ := place.Refill(pol, domain, kept, devices, m.e.m.Upload)
	m.next = m.e.m.Clone()
	for i, id := range old {
		switch {
		case target[i] == "" && m.o.Bad[i] && id != "" && !gone[i]:
			// It should leave, but there is no place: better whole where it is than bad.
			m.work = append(m.work, i)
			m.next.Shards[i] = id
		case target[i] == "": // no place: it stays in the books where it was
			if m.unfit[i] {
				missing++
			}
			continue
		case target[i] != id, m.o.Bad[i]:
			m.work = append(m.work, i)
			m.next.Shards[i] = target[i]
		}
	}
	return missing
}

// targets are the devices that get shards which were not there before.
func (m *mending) targets() []string {
	var list []string
	for _, i := range m.work {
		if m.next.Shards[i] != m.e.m.Shards[i] {
			list = append(list, m.next.Shards[i])
		}
	}
	return list
}

// prefer gives one of the shards that are to leave to the wanted device, if the rules
// allow.
func (m *mending) prefer(kept []string, leaving []int, devices []place.Device) {
	if !slices.ContainsFunc(devices, func(d place.Device) bool { return d.ID == m.o.To && d.Usable }) {
		return
	}
	for _, s := range leaving {
		kept[s] = m.o.To
		if place.Valid(m.e.m.Policy, m.e.m.Domain, kept, devices) {
			return
		}
		kept[s] = m.e.m.Shards[s]
	}
}

// write writes all chunks of the shards that need it.
func (m *mending) write(ctx context.Context) (int64, error) {
	l := m.e.m.Layout()
	var written int64
	for chunk := range l.Chunks() {
		bytes := int64(l.FragmentLen(chunk)) * int64(len(m.work))
		if m.o.Throttle != nil {
			if err := m.o.Throttle(ctx, bytes); err != nil {
				return written, err
			}
		}
		shards, err := m.fragments(ctx, chunk, l.FragmentLen(chunk))
		if err != nil {
			return written, err
		}
		if err := m.store(ctx, chunk, shards); err != nil {
			return written, err
		}
		written += bytes
	}
	if l.Chunks() == 0 {
		return 0, m.store(ctx, -1, nil)
	}
	return written, nil
}

// fragments returns the fragments of a chunk that are to be written.
func (m *mending) fragments(ctx context.Context, chunk, size int) ([][]byte, error) {
	shards, have := make([][]byte, len(m.e.m.Shards)), make([]bool, len(m.e.m.Shards))
	direct := true
	for _, i := range m.work {
		if m.unfit[i] {
			direct = false
			continue
		}
		b, err := m.get(ctx, i, chunk, size)
		if err != nil {
			direct = false
			continue
		}
		shards[i], have[i] = b, true
	}
	if direct {
		return shards, nil
	}
	if err := m.survivors(ctx, chunk, size, shards, have); err != nil {
		return nil, err
	}
	want := make([]bool, len(shards))
	for _, i := range m.work {
		if !have[i] {
			want[i], shards[i] = true, make([]byte, size)
		}
	}
	codec, err := erasure.CodecFor(m.e.m.Policy.K, m.e.m.Policy.M)
	if err != nil {
		return nil, err
	}
	return shards, codec.Reconstruct(shards, have, want)
}

// survivors reads fragments until k are there.
func (m *mending) survivors(ctx context.Context, chunk, size int, shards [][]byte, have []bool) error {
	var errs []error
	list := m.p.candidates(m.e, -1, -1)
	list = slices.DeleteFunc(list, func(c candidate) bool { return have[c.shard] || m.unfit[c.shard] })
	count := 0
	for _, h := range have {
		if h {
			count++
		}
	}
	for count < m.e.m.Policy.K {
		batch := list[:min(len(list), m.e.m.Policy.K-count)]
		list = list[len(batch):]
		if len(batch) == 0 {
			return because(fmt.Errorf("%d of %d shards can be read, needed are %d: %w", count, len(have), m.e.m.Policy.K, ErrUnreadable), errs)
		}
		var g errgroup.Group
		got := make([][]byte, len(batch))
		failed := make([]error, len(batch))
		for i, c := range batch {
			g.Go(func() error { got[i], failed[i] = m.get(ctx, c.shard, chunk, size); return nil })
		}
		_ = g.Wait()
		for i, c := range batch {
			if failed[i] != nil {
				errs = append(errs, failed[i])
				continue
			}
			shards[c.shard], have[c.shard] = got[i], true
			count++
		}
	}
	return nil
}

// get reads a whole fragment, verified by its device.
func (m *mending) get(ctx context.Context, shard, chunk, size int) ([]byte, error) {
	d := m.p.member(m.e.m, shard)
	if d == nil {
		return nil, fmt.Errorf("shard %d: %w", shard, asd.ErrUnavailable)
	}
	ctx, cancel := context.WithTimeout(ctx, m.p.writeTimeout)
	defer cancel()
	b := make([]byte, size)
	err := d.ReadAt(ctx, alba.FragmentKey(m.next.NamespaceID, m.next.Upload, shard, chunk), b, 0, asd.PriorityRepair)
	if err != nil {
		return nil, fmt.Errorf("shard %d on device %s: %w", shard, m.e.m.Shards[shard], noEOF(err))
	}
	return b, nil
}

// store makes the new fragments of a chunk durable, with the manifest behind the last.
func (m *mending) store(ctx context.Context, chunk int, shards [][]byte) error {
	man := m.next
	g, ctx := errgroup.WithContext(ctx)
	for _, i := range m.work {
		g.Go(func() error {
			d := m.p.fleet.Member(man.Shards[i])
			if d == nil {
				return fmt.Errorf("shard %d: device %s was taken out of the registry: %w", i, man.Shards[i], asd.ErrUnavailable)
			}
			var updates []asd.Update
			if chunk <= 0 {
				updates = append(updates, asd.Put(alba.AttemptKey(man.NamespaceID, man.Upload, i), asd.NewValue(m.id[:])))
			}
			if chunk >= 0 {
				v := asd.NewValueBlocks(shards[i], alba.Unit(man.Compression, man.Encryption))
				updates = append(updates, asd.Put(alba.FragmentKey(man.NamespaceID, man.Upload, i, chunk), v))
			}
			if chunk == man.Layout().Chunks()-1 {
				updates = append(updates, asd.Put(alba.ShardKey(man.NamespaceID, man.Upload, i), asd.NewValue(man.Encode())))
			}
			ctx, cancel := context.WithTimeout(ctx, m.p.writeTimeout)
			defer cancel()
			if err := d.ApplyOwned(ctx, &m.ns, m.ns.Epoch, updates, asd.PriorityRepair); err != nil {
				return fmt.Errorf("shard %d on device %s: %w", i, man.Shards[i], err)
			}
			return nil
		})
	}
	return g.Wait()
}

// noteAttempts reads which attempts put the shards that move to where they were. As long as
// this one's intent is there no other begins, and if it is not there any more, the commit that follows fails.
func (m *mending) noteAttempts(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, cleanTimeout)
	defer cancel()
	for _, i := range m.work {
		d := m.p.fleet.Member(m.e.m.Shards[i])
		if d == nil || m.unfit[i] || m.e.m.Shards[i] == m.next.Shards[i] {
			continue
		}
		if a, err := d.AssertAttempt(ctx, m.next.NamespaceID, m.next.Upload, i); err == nil {
			m.was[i] = a
		}
	}
}

// AssertAttempt asserts that the shard is, or is to be, what the attempt has left on the
// device that was the last one there when this was called.
func (m *Member) AssertAttempt(ctx context.Context, ns, upload alba.ID, shard int) (asd.Assert, error) {
	key := alba.AttemptKey(ns, upload, shard)
	c, err := m.Client(ctx)
	if err != nil {
		return asd.Assert{}, err
	}
	v, err := c.Get(ctx, key, asd.PriorityRepair)
	if err := m.note(ctx, 0, err); errors.Is(err, asd.ErrNoKey) {
		return asd.AssertAbsent(key), nil
	}
	return asd.AssertValue(key, v.Data), err
}

// cleanOld deletes the shards that have moved, by a change of that revision, from where they
// were, unless another attempt has begun to write them since. What can't be deleted now
// is an orphan and is collected.
func (m *mending) cleanOld(moved int64) {
	ctx, cancel := context.WithTimeout(context.Background(), cleanTimeout)
	defer cancel()
	mark, err := m.p.mark(ctx, moved)
	if err != nil {
		m.p.opts.Log.Info().Err(err).Msg("shards are left to the collection of orphans")
		return
	}
	for _, i := range m.work {
		was, ok := m.was[i]
		if !ok {
			continue // it is gone, or what is there can't be told: an orphan
		}
		m.cleanShard(ctx, i, m.e.m.Shards[i], mark, was)
	}
}

// cleanNew deletes what was written when the manifest was not changed, as cleanOld does.
func (m *mending) cleanNew(intent string, rev int64) {
	ctx, cancel := context.WithTimeout(context.Background(), cleanTimeout)
	defer cancel()
	for _, i := range m.work {
		mine := asd.AssertValue(alba.AttemptKey(m.next.NamespaceID, m.next.Upload, i), m.id[:])
		m.cleanShard(ctx, i, m.next.Shards[i], 0, mine)
	}
	// Only now: who finds the intent gone may begin at once.
	_, err := m.p.reg.Commit(ctx, []alba.Compare{{Key: intent, Revision: rev}}, []alba.Write{{Key: intent}})
	if err != nil && !errors.Is(err, alba.ErrConflict) {
		m.p.opts.Log.Warn().Err(err).Str("object", m.next.Object).Msg("intent of a failed repair is left to the collection of orphans")
	}
}

// cleanShard deletes a shard from a device that is not its place.
func (m *mending) cleanShard(ctx context.Context, shard int, id string, mark alba.Position, attempt asd.Assert) {
	d := m.p.fleet.Member(id)
	if id == "" || d == nil || m.e.m.Shards[shard] == m.next.Shards[shard] { // nothing, or written in place
		return
	}
	if err := d.deleteShard(ctx, m.next.NamespaceID, m.next.Upload, shard, mark, attempt); err != nil {
		m.p.opts.Log.Info().Err(err).Str("asd", id).Msg("shard is left to the collection of orphans")
	}
}

// deleteShard deletes one shard of an upload as long as the assert holds.
func (m *Member) deleteShard(ctx context.Context, ns, upload alba.ID, shard int, mark alba.Position, attempt asd.Assert) error {
	base := alba.ShardKey(ns, upload, shard)
	ctx, cancel := context.WithTimeout(ctx, purgeTimeout)
	defer cancel()
	err := m.deletePrefix(ctx, alba.FragmentPrefix+base[len(alba.ShardPrefix):]+"/", mark, []asd.Assert{attempt})
	if err == nil {
		err = m.ApplyKnowing(ctx, []asd.Assert{attempt}, []asd.Update{asd.Delete(base), asd.Delete(alba.AttemptKey(ns, upload, shard))})
	}
	if err != nil {
		return fmt.Errorf("device %s: %w", m.Record().ID, err)
	}
	return nil
}

// Active says that this process is at work on an upload.
func (p *Proxy) Active(upload alba.ID) bool {
	_, ok := p.active.Load(upload)
	return ok
}

// sweepTrash purges one record of the trash in the background, if it is there.
func (p *Proxy) sweepTrash(ctx context.Context, ns, upload alba.ID) {
	kv, ok, err := p.reg.Get(ctx, alba.TrashKey(ns, upload))
	if err != nil || !ok {
		return
	}
	if rec, err := alba.Decode[alba.Intent](kv.Value); err == nil {
		p.purgeSoon(ns, upload, rec, kv.Revision)
	}
}
