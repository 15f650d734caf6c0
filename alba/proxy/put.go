package proxy

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"

	"scoria/alba"
	"scoria/alba/asd"
	"scoria/alba/erasure"
	"scoria/alba/place"
)

// How an upload treats slow and failing devices.
const (
	attempts     = 8                // uploads of one Put: two for each of four devices that fail one after the other
	writeTimeout = 20 * time.Second // of one Apply, while fewer than c shards are durable
	lateTimeout  = 30 * time.Second // of shards that complete in the background
	graceMin     = 20 * time.Millisecond
	graceMax     = 2 * time.Second
	cleanTimeout = 10 * time.Second // of commits after the caller gave up
)

// errAgain: this upload is over, another may succeed.
var errAgain = errors.New("upload must be begun anew")

// Put stores size bytes of src as an object, whole or not at all: it returns when c
// shards and the manifest are durable, and completes the others in the background.
// Repeating a Put with the same contents is safe; ErrExists with others. ErrStaleEpoch
// if a later owner has fenced the namespace. It reads src at most once per
// attempt, from the calling goroutine.
func (p *Proxy) Put(ctx context.Context, ns, name string, epoch uint64, src io.ReaderAt, size int64) error {
	return p.PutSource(ctx, ns, name, epoch, Source{Data: src, Size: size})
}

// PutSource is Put; where the object is stored as it is on one device in this process,
// that may take the source's file in place of a copy.
func (p *Proxy) PutSource(ctx context.Context, ns, name string, epoch uint64, src Source) error {
	err := p.check(ctx, ns, name)
	if err == nil && (src.Size < 0 || src.Size > alba.MaxObjectBytes) {
		err = fmt.Errorf("size %d: must be 0 to %d", src.Size, int64(alba.MaxObjectBytes))
	}
	if err == nil {
		err = p.put(ctx, ns, name, epoch, &src)
	}
	if err == nil {
		p.counters.Puts.Add(1)
		p.counters.PutBytes.Add(uint64(src.Size))
	}
	return opError("put", ns, name, err)
}

func (p *Proxy) put(ctx context.Context, ns, name string, epoch uint64, src *Source) error {
	return p.untilStored(ctx, ns, epoch, func(n namespace) error {
		e, err := p.loadEntry(ctx, n, name)
		if err == nil {
			same, err := p.equalContents(ctx, e, src.Data, src.Size)
			if err == nil && !same {
				err = ErrExists
			}
			return err
		}
		if !errors.Is(err, ErrNoObject) {
			return err
		}
		return p.attempt(ctx, n, name, epoch, src)
	})
}

// untilStored makes attempts for the owner of that epoch until one does not end with errAgain;
// ErrBusy after too many.
func (p *Proxy) untilStored(ctx context.Context, ns string, epoch uint64, attempt func(namespace) error) error {
	var last error
	for range attempts {
		if err := ctx.Err(); err != nil {
			return err
		}
		n, err := p.owned(ctx, ns, epoch)
		if err != nil {
			return err
		}
		if last = attempt(n); !errors.Is(last, errAgain) {
			return last
		}
	}
	return fmt.Errorf("%w: %w", ErrBusy, last)
}

// upload is one attempt to store an object.
type upload struct {
	p      *Proxy
	ns     namespace
	m      *alba.Manifest // Shards: where they shall go. Fixed once the last chunk is handed out.
	final  *alba.Manifest // what was committed
	epoch  uint64
	lesser bool   // the devices there are would do for a better policy than those that can be used
	intent int64  // revision of the intent
	old    *entry // what it replaces, with the same contents; nil for a new object
	pri    asd.Priority
	shards []*shardWriter
	// adopted: the device has taken the source's file, there are no shardWriters.
	adopted bool
	window  chan struct{} // a token per chunk whose memory is in use

	mu   sync.Mutex // a leaf
	news chan struct{}
}

// attempt uploads and commits. errAgain if devices failed or the registry changed.
func (p *Proxy) attempt(ctx context.Context, n namespace, name string, epoch uint64, src *Source) error {
	p.counters.Attempts.Add(1)
	u, err := p.begin(ctx, n, name, epoch, src.Size, nil)
	if err != nil {
		return err
	}
	return u.store(ctx, src)
}

// store sends the source and commits, or abandons the upload.
func (u *upload) store(ctx context.Context, src *Source) error {
	done, err := u.adopt(ctx, src)
	if err == nil && !done {
		err = u.run(ctx, src.Data, src.Size)
	}
	if err == nil {
		return nil
	}
	u.abandon()
	if cause := ctx.Err(); cause != nil {
		return cause
	}
	return err
}

// begin chooses the devices and commits the intent.
func (p *Proxy) begin(ctx context.Context, n namespace, name string, epoch uint64, size int64, old *entry) (*upload, error) {
	ps, err := LoadPreset(ctx, p.reg, n.Preset)
	if err != nil {
		return nil, err
	}
	if ps.Encryption != alba.EncryptNone && n.Key == nil {
		if n, err = p.addKey(ctx, n); err != nil {
			return nil, err
		}
	}
	id := alba.NewID()
	devices := p.fleet.States(ctx)
	choice, err := place.Choose(&ps, devices, id)
	if err != nil {
		return nil, p.whyUnsatisfiable(err)
	}
	unit := alba.Unit(ps.Compression, ps.Encryption)
	most := erasure.MaxStored(ps.Compression, ps.Encryption, size)
	u := &upload{p: p, ns: n, epoch: epoch, old: old, lesser: choice.Lesser(&ps, devices, id), m: &alba.Manifest{
		Namespace: n.Name, NamespaceID: n.ID, Object: name, Upload: id, Epoch: epoch, Size: size, Created: time.Now().UnixNano(),
		Preset: ps.Name, Policy: choice.Policy, Domain: ps.Domain, Compression: ps.Compression, Encryption: ps.Encryption,
		BlockBytes: alba.BlockBytes(ps.Compression), FragmentBytes: alba.PlanFragment(most, choice.Policy.K, ps.FragmentBytes, unit),
		Shards: choice.Shards,
	}}
	u.window = make(chan struct{}, windowChunks(u.m.Layout()))
	active, err := p.fleet.assertActive(u.m.Shards)
	if err != nil {
		return nil, err
	}
	p.active.Store(id, struct{}{})
	rev, err := p.reg.Commit(ctx, append(active, n.compare(), alba.Compare{Key: alba.ObjectKey(n.ID, name), Revision: u.oldRevision()}),
		[]alba.Write{{Key: alba.IntentKey(n.ID, id), Value: alba.Encode(u.intentRecord(false))}})
	u.intent = rev
	if err == nil {
		return u, nil
	}
	p.active.Delete(id)
	if errors.Is(err, alba.ErrConflict) {
		if err := p.fleet.Reload(ctx); err != nil { // perhaps a device's record is another one
			return nil, err
		}
		err = fmt.Errorf("%w: %w", errAgain, err)
	}
	return nil, err
}

// oldRevision is what the object's key must be at for the upload to be committed.
func (u *upload) oldRevision() int64 {
	if u.old == nil {
		return 0
	}
	return u.old.rev
}

// whyUnsatisfiable adds what is wrong with the devices.
func (p *Proxy) whyUnsatisfiable(err error) error {
	for _, m := range p.fleet.Members() {
		reason, _ := m.Down()
		rec := m.Record()
		switch {
		case rec.State != alba.DeviceActive:
			err = fmt.Errorf("%w; %s is %s", err, rec.ID, rec.State)
		case reason != "":
			err = fmt.Errorf("%w; %s: %w", err, rec.ID, m.lastError())
		case m.isFull():
			err = fmt.Errorf("%w; %s is full", err, rec.ID)
		}
	}
	return err
}

func (u *upload) intentRecord(move bool) alba.Intent {
	return alba.Intent{Namespace: u.m.Namespace, Object: u.m.Object, Epoch: u.epoch, Move: move, Policy: u.m.Policy,
		Shards: u.m.Shards, By: u.p.opts.Node, Since: now()}
}

// addKey gives a namespace its encryption key.
func (p *Proxy) addKey(ctx context.Context, n namespace) (namespace, error) {
	key, err := p.opts.Keys.NewKey(n.ID)
	if err != nil {
		return n, err
	}
	n.Key = key
	n.rev, err = p.reg.Commit(ctx, []alba.Compare{n.compare()}, []alba.Write{n.write()})
	if errors.Is(err, alba.ErrConflict) {
		err = fmt.Errorf("%w: %w", errAgain, err)
	}
	return n, err
}

// run encodes and sends all chunks, waits for enough shards and commits.
func (u *upload) run(ctx context.Context, src io.ReaderAt, size int64) error {
	writing, cancel := context.WithCancel(context.WithoutCancel(ctx))
	stop := context.AfterFunc(ctx, cancel)
	u.start(writing)
	late := false
	err := u.send(ctx, src, size)
	if err == nil {
		late, err = u.wait(ctx)
	}
	if err == nil {
		err = u.commit(ctx, late)
	}
	stop()
	if err == nil && late {
		u.p.counters.Late.Add(1)
		if u.p.background(func() { defer cancel(); u.finish() }) {
			return nil
		}
	}
	cancel()
	u.join()
	if late {
		<-u.p.late
	}
	if err == nil {
		u.p.active.Delete(u.m.Upload)
	}
	if err == nil {
		u.reportMissing(u.final)
	}
	return err
}

// send encodes the object chunk by chunk and hands each to all shards.
func (u *upload) send(ctx context.Context, src io.ReaderAt, size int64) error {
	var key []byte
	var err error
	if u.m.Encryption != alba.EncryptNone {
		if key, err = u.p.opts.Keys.Unwrap(u.ns.ID, u.ns.Key); err != nil {
			return err
		}
	}
	blocks, err := erasure.NewBlocks(u.m.Compression, u.m.Encryption, key, u.m.Upload)
	if err != nil {
		return err
	}
	enc, err := erasure.NewEncoder(src, size, u.m.Layout(), blocks)
	if err != nil {
		return err
	}
	for !enc.Done() {
		c, err := u.acquire(ctx)
		if err != nil {
			return err
		}
		err = enc.Next(c.Chunk, ctx.Err, func(shard int) {
			if c.Last && shard == 0 {
				u.m.Stored = c.End
			}
			u.hand(c, shard)
		})
		c.release(1)
		if err != nil {
			return err
		}
		if alive := u.alive(); alive < u.m.Policy.C {
			return u.tooFew(alive)
		}
	}
	for _, s := range u.shards {
		s.end()
	}
	return nil
}

// wait returns when all shards are durable, or c of them and the others have had a
// grace that depends on how long these took: then late is true and a token of
// Proxy.late is taken.
func (u *upload) wait(ctx context.Context) (late bool, err error) {
	begun := time.Now()
	tick := time.NewTicker(watchEvery)
	defer tick.Stop()
	var grace <-chan time.Time
	for {
		changed := u.changed()
		done, pending := u.count()
		if done+pending < u.m.Policy.C {
			return false, u.tooFew(done + pending)
		}
		if pending == 0 {
			return false, nil
		}
		if done >= u.m.Policy.C && grace == nil {
			t := time.NewTimer(min(graceMax, max(graceMin, time.Since(begun)/2)))
			defer t.Stop()
			grace = t.C
		}
		select {
		case <-changed:
		case <-tick.C:
			u.stopDown()
		case <-grace:
			select {
			case u.p.late <- struct{}{}:
				return true, nil
			default: // too many already: these shards are left to repair
				u.stopLate()
			}
		case <-ctx.Done():
			return false, ctx.Err()
		}
	}
}

func (u *upload) tooFew(alive int) error {
	errs := []error{fmt.Errorf("%w: %d shards of %d can be stored, needed are %d", errAgain, alive, len(u.m.Shards), u.m.Policy.C)}
	for _, s := range u.shards {
		if err := s.err(); err != nil {
			if errors.Is(err, asd.ErrStaleEpoch) {
				// The registry decides: at the next attempt its epoch is compared.
				err = fmt.Errorf("%w (device %s)", err, s.m.Record().ID)
			}
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// commit puts the manifest in place of the intent, if the namespace is what it was
// or at least still this owner's.
func (u *upload) commit(ctx context.Context, late bool) error {
	final := u.m.Clone()
	if !u.adopted {
		final.Shards = u.durable()
	}
	for range tries {
		var known []alba.Compare
		final.Shards, known = u.p.fleet.withoutRemoved(final.Shards)
		if left := final.Live(); left < u.m.Policy.C {
			return fmt.Errorf("%w: %d shards are left on devices that were not removed meanwhile, needed are %d", errAgain, left, u.m.Policy.C)
		}
		n, err := u.p.owned(ctx, u.m.Namespace, u.epoch)
		if err != nil {
			return err
		}
		if n.ID != u.m.NamespaceID {
			return ErrNoNamespace
		}
		intent := alba.Write{Key: alba.IntentKey(n.ID, u.m.Upload)}
		if late {
			intent.Value = alba.Encode(u.intentRecord(true))
		}
		key := alba.ObjectKey(n.ID, u.m.Object)
		writes := []alba.Write{{Key: key, Value: final.Encode()}, intent}
		if u.old != nil {
			rec := u.p.trashRecord(u.old.m)
			writes = append(writes, alba.Write{Key: alba.TrashKey(n.ID, u.old.m.Upload), Value: alba.Encode(rec)})
		}
		rev, err := u.p.reg.Commit(ctx,
			append(known, n.compare(), alba.Compare{Key: key, Revision: u.oldRevision()}, alba.Compare{Key: intent.Key, Revision: u.intent}), writes)
		if err == nil {
			u.p.cache.drop(key)
			u.final, u.intent = final, rev
			if u.lesser { // the devices may be back before anybody looks at them
				u.p.opts.Report(Fault{Namespace: final.Namespace, Object: final.Object, Shard: NoShard, Reason: "was stored under a lesser policy: too few devices could be used"})
			}
			return nil
		}
		if !errors.Is(err, alba.ErrConflict) {
			return err
		}
		// Another put of the name, somebody who took this one for dead, a device that was
		// removed, or only a change of the namespace or of a device.
		kv, ok, err := u.p.reg.Get(ctx, intent.Key)
		if err != nil {
			return err
		}
		if !ok || kv.Revision != u.intent {
			return fmt.Errorf("%w: its intent was removed", errAgain)
		}
		if kv, _, err = u.p.reg.Get(ctx, key); err != nil {
			return err
		}
		if kv.Revision != u.oldRevision() {
			return fmt.Errorf("%w: another upload of it was first", errAgain)
		}
		if err := u.p.fleet.Reload(ctx); err != nil {
			return err
		}
	}
	return ErrBusy
}

// finish waits for the shards that were late and adds them to the manifest.
func (u *upload) finish() {
	defer func() { <-u.p.late; u.p.active.Delete(u.m.Upload) }()
	t := time.NewTimer(lateTimeout)
	defer t.Stop()
	for {
		changed := u.changed()
		if u.pending() == 0 {
			break
		}
		select {
		case <-changed:
		case <-t.C:
			u.stopLate()
			u.join()
		case <-u.p.ctx.Done():
			u.stopLate()
			u.join()
		}
	}
	ctx, cancel := context.WithTimeout(context.Background(), cleanTimeout)
	defer cancel()
	m := u.final.Clone()
	m.Shards = u.durable()
	kept, _ := u.p.fleet.withoutRemoved(m.Shards)
	for i, id := range u.final.Shards {
		if id == "" { // what was committed stays in the books: a device may be added again
			m.Shards[i] = kept[i]
		}
	}
	m.Generation++
	key := alba.ObjectKey(m.NamespaceID, m.Object)
	intent := alba.IntentKey(m.NamespaceID, m.Upload)
	// u.intent is the revision of the commit that wrote both.
	_, err := u.p.reg.Commit(ctx, []alba.Compare{{Key: key, Revision: u.intent}, {Key: intent, Revision: u.intent}},
		[]alba.Write{{Key: key, Value: m.Encode()}, {Key: intent}})
	u.p.cache.drop(key)
	if err != nil {
		// Deleted or moved meanwhile: then its shards are orphans and are collected.
		u.p.opts.Log.Debug().Err(err).Str("object", m.Object).Msg("late shards are not used")
		return
	}
	u.reportMissing(m)
}

// reportMissing has the shards repaired that could not be written.
func (u *upload) reportMissing(m *alba.Manifest) {
	for i, id := range m.Shards {
		if id == "" {
			u.p.opts.Report(Fault{Namespace: m.Namespace, Object: m.Object, Upload: m.Upload, Shard: i, Reason: "was not written with the others"})
		}
	}
}

// abandon gives the fragments of a failed upload to the trash. If that fails the
// intent stays, and maintenance finds it.
func (u *upload) abandon() {
	ctx, cancel := context.WithTimeout(context.Background(), cleanTimeout)
	defer cancel()
	defer u.p.active.Delete(u.m.Upload)
	rec := u.intentRecord(false)
	trash := alba.TrashKey(u.m.NamespaceID, u.m.Upload)
	rev, err := u.p.reg.Commit(ctx, []alba.Compare{{Key: alba.IntentKey(u.m.NamespaceID, u.m.Upload), Revision: u.intent}},
		[]alba.Write{{Key: alba.IntentKey(u.m.NamespaceID, u.m.Upload)}, {Key: trash, Value: alba.Encode(rec)}})
	if err != nil {
		u.p.opts.Log.Warn().Err(err).Str("object", u.m.Object).Msg("failed upload is left to the collection of orphans")
		return
	}
	u.p.purgeSoon(u.m.NamespaceID, u.m.Upload, rec, rev)
}
