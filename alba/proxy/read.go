package proxy

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"golang.org/x/sync/errgroup"

	"scoria/alba"
	"scoria/alba/asd"
	"scoria/alba/erasure"
)

// piecesAtOnce bounds the fragments that one read asks for at a time.
const piecesAtOnce = 16

// readTimeout is when a device that does not answer is given up.
const readTimeout = 10 * time.Second

// read is ReadAt after its checks. If what the cache says fails, the object may have
// been moved, deleted or stored again: then the registry is asked.
func (p *Proxy) read(ctx context.Context, ns, name string, b []byte, off int64) error {
	e, err := p.entry(ctx, ns, name, false)
	if err != nil {
		return err
	}
	for range tries {
		err = p.readEntry(ctx, e, b, off)
		if err == nil || errors.Is(err, io.ErrUnexpectedEOF) || ctx.Err() != nil {
			return err
		}
		again, loadErr := p.entry(ctx, ns, name, true)
		if loadErr != nil {
			return loadErr
		}
		if again.rev == e.rev {
			return err
		}
		e = again
	}
	return err
}

// readEntry reads a range of an object. If decryption or decompression finds
// damage that the checksums of fragments do not show, it tries without each of
// the shards in turn.
func (p *Proxy) readEntry(ctx context.Context, e *entry, b []byte, off int64) error {
	err := e.obj.ReadAt(b, off, func(b []byte, off int64) error { return p.fetch(ctx, e, b, off, -1) })
	if !errors.Is(err, erasure.ErrDamaged) {
		return err
	}
	certain := true // all shards can be read, and no k of them give what was stored
	for avoid, id := range e.m.Shards {
		if id == "" {
			continue
		}
		e.obj.Forget()
		again := e.obj.ReadAt(b, off, func(b []byte, off int64) error { return p.fetch(ctx, e, b, off, avoid) })
		if again == nil {
			p.fault(e, avoid, "holds bytes that are not what was stored there")
			return nil
		}
		certain = certain && (errors.Is(again, erasure.ErrDamaged) || errors.Is(again, ErrLost))
	}
	if certain {
		err = fmt.Errorf("%w: %w", ErrLost, err)
	}
	return err
}

// fault counts and reports a bad shard.
func (p *Proxy) fault(e *entry, shard int, reason string) {
	p.counters.Faults.Add(1)
	f := Fault{Namespace: e.m.Namespace, Object: e.m.Object, Upload: e.m.Upload, Shard: shard, Device: e.m.Shards[shard], Reason: reason}
	p.opts.Log.Error().Str("namespace", f.Namespace).Str("object", f.Object).Int("shard", shard).Str("asd", f.Device).
		Str("reason", reason).Msg("bad fragment; reading from others and repairing it")
	p.opts.Report(f)
}

// fetch fills b with the stream's bytes from off on, not using shard avoid (-1: any).
func (p *Proxy) fetch(ctx context.Context, e *entry, b []byte, off int64, avoid int) error {
	l := e.m.Layout()
	if off < 0 || off+int64(len(b)) > l.Stored {
		return fmt.Errorf("%d bytes at %d of a stream of %d: %w", len(b), off, l.Stored, erasure.ErrDamaged)
	}
	var pieces []alba.Piece
	single := true
	l.Pieces(off, len(b), func(pc alba.Piece) bool {
		if single = len(pieces) == 0 && pc.Len == len(b); single {
			pieces = []alba.Piece{pc}
			return false
		}
		pieces = append(pieces, pc)
		return true
	})
	if single {
		return p.piece(ctx, e, pieces[0], b, avoid)
	}
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(piecesAtOnce)
	for _, pc := range pieces {
		part := b[:pc.Len]
		b = b[pc.Len:]
		g.Go(func() error { return p.piece(ctx, e, pc, part, avoid) })
	}
	return g.Wait()
}

// member returns the device of a shard; nil if it has none that is known.
func (p *Proxy) member(m *alba.Manifest, shard int) *Member {
	if m.Shards[shard] == "" {
		return nil
	}
	return p.fleet.Member(m.Shards[shard])
}

// piece fills b with a range of one fragment: from its device; from others if that
// is known to be down, fails, or has not answered after its hedge.
func (p *Proxy) piece(ctx context.Context, e *entry, pc alba.Piece, b []byte, avoid int) error {
	m := p.member(e.m, pc.Shard)
	nearer := e.m.Policy.K == 1 && p.nearestCopy(e, avoid) != pc.Shard
	if m == nil || !m.Up() || pc.Shard == avoid || nearer {
		// Others first; the device itself is among them as the last resort.
		return p.decode(ctx, e, pc, b, -1, avoid, nil)
	}
	direct, cancel := context.WithCancel(ctx)
	defer cancel()
	var other []byte
	var otherErr error
	decoded := make(chan struct{})
	hedge := p.hedges.after(e.patience(m.hedge()), func() {
		defer close(decoded)
		p.counters.Hedged.Add(1)
		other = make([]byte, len(b))
		if otherErr = p.decode(direct, e, pc, other, pc.Shard, avoid, nil); otherErr == nil {
			cancel()
		}
	})
	err := p.readShard(direct, e, pc, pc.Shard, b)
	late := direct.Err() != nil
	switch {
	case p.hedges.stop(hedge):
		if err == nil || ctx.Err() != nil {
			return err
		}
		return p.decode(ctx, e, pc, b, pc.Shard, avoid, err)
	case err == nil:
		cancel()
		<-decoded
		return nil
	}
	<-decoded
	if otherErr != nil {
		return fmt.Errorf("%w (%w)", otherErr, err)
	}
	if late {
		m.hedged(time.Now())
	}
	copy(b, other)
	return nil
}

// nearestCopy is the shard of a replicated object (k = 1) to read from.
func (p *Proxy) nearestCopy(e *entry, avoid int) int {
	list := p.candidates(e, -1, avoid)
	if len(list) == 0 {
		return 0
	}
	return list[0].shard
}

// candidates returns the shards that have a device, best first, without skip and
// avoid.
func (p *Proxy) candidates(e *entry, skip, avoid int) []candidate {
	list := make([]candidate, 0, len(e.m.Shards))
	for i := range e.m.Shards {
		if m := p.member(e.m, i); m != nil && i != skip && i != avoid {
			list = append(list, candidate{i, m})
		}
	}
	p.fleet.nearest(list)
	return list
}

// readShard reads a range of a shard's fragment from its device and reports what
// is bad there.
func (p *Proxy) readShard(ctx context.Context, e *entry, pc alba.Piece, shard int, b []byte) error {
	m := p.member(e.m, shard)
	if m == nil {
		return fmt.Errorf("shard %d: device %q is not in the registry: %w", shard, e.m.Shards[shard], asd.ErrUnavailable)
	}
	key := alba.FragmentKey(e.m.NamespaceID, e.m.Upload, shard, pc.Chunk)
	limited, cancel := context.WithTimeout(ctx, readTimeout)
	err := m.ReadAt(limited, key, b, int64(pc.Off), e.pri)
	cancel()
	if err == nil {
		p.counters.FetchedBytes.Add(uint64(len(b)))
		return nil
	}
	if ctx.Err() != nil {
		return ctx.Err()
	}
	err = fmt.Errorf("shard %d on device %s: %w", shard, e.m.Shards[shard], noEOF(err))
	if errors.Is(err, asd.ErrCorrupt) || errors.Is(err, asd.ErrNoKey) || errors.Is(err, asd.ErrInvalid) {
		// A shard that was moved away is no fault.
		now, loadErr := p.entry(ctx, e.m.Namespace, e.m.Object, true)
		if loadErr == nil && now.m.Upload == e.m.Upload && now.m.Shards[shard] == e.m.Shards[shard] {
			p.fault(e, shard, err.Error())
		}
	}
	return err
}

// noEOF: a fragment that is shorter than the manifest says is damage, not the end of
// the object.
func noEOF(err error) error {
	if errors.Is(err, io.ErrUnexpectedEOF) {
		return fmt.Errorf("fragment is too short: %w", asd.ErrCorrupt)
	}
	return err
}

// decode fills b with a range of a fragment from the same range of k others, or from
// the fragment itself if that turns up first. It asks k shards at first, and one more
// for each that fails or is late. skip was asked already and failed with cause.
func (p *Proxy) decode(ctx context.Context, e *entry, pc alba.Piece, b []byte, skip, avoid int, cause error) error {
	list := p.candidates(e, skip, avoid)
	k := e.m.Policy.K
	ctx, cancel := context.WithCancel(ctx)
	type answer struct {
		i   int
		err error
	}
	answers := make(chan answer, len(list))
	bufs := make([][]byte, len(list))
	asked, answered, good := 0, 0, 0
	// The readers must be gone before b, which one of them may fill, is returned.
	defer func() {
		cancel()
		for ; answered < asked; answered++ {
			<-answers
		}
	}()
	ask := func() bool {
		if asked == len(list) {
			return false
		}
		i := asked
		asked++
		bufs[i] = make([]byte, len(b))
		go func() { answers <- answer{i, p.readShard(ctx, e, pc, list[i].shard, bufs[i])} }()
		return true
	}
	for asked < k && ask() {
	}
	have := make([]bool, len(e.m.Shards))
	shards := make([][]byte, len(e.m.Shards))
	failed := make([]error, len(e.m.Shards))
	if skip >= 0 {
		failed[skip] = cause
	}
	if avoid >= 0 {
		failed[avoid] = fmt.Errorf("shard %d is taken for changed: %w", avoid, asd.ErrCorrupt)
	}
	late := time.NewTimer(e.patience(p.lateness(list[:asked])))
	defer late.Stop()
	for good < k && answered < asked {
		select {
		case a := <-answers:
			answered++
			if a.err != nil {
				failed[list[a.i].shard] = a.err
				ask()
				continue
			}
			s := list[a.i].shard
			if s == pc.Shard {
				copy(b, bufs[a.i])
				return nil
			}
			have[s], shards[s] = true, bufs[a.i]
			good++
		case <-late.C:
			if ask() {
				p.counters.Hedged.Add(1)
				late.Reset(e.patience(p.lateness(list[:asked])))
			}
		}
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	if good < k {
		why := ErrUnreadable
		if len(failed)-p.lost(e.m, failed) < k {
			why = ErrLost
		}
		return because(fmt.Errorf("%d of %d shards of %s/%s can be read, needed are %d: %w",
			good, len(e.m.Shards), e.m.Namespace, e.m.Object, k, why), failed)
	}
	codec, err := erasure.CodecFor(k, e.m.Policy.M)
	if err != nil {
		return err
	}
	want := make([]bool, len(shards))
	want[pc.Shard], shards[pc.Shard] = true, b
	p.counters.Decoded.Add(1)
	return codec.Reconstruct(shards, have, want)
}

// because adds why shards can't be read, as far as that was asked.
func because(err error, shards []error) error {
	if why := errors.Join(shards...); why != nil {
		return fmt.Errorf("%w (%w)", err, why)
	}
	return err
}

// lost counts the shards that no waiting brings back, by what reading them failed with:
// those that were never written, are damaged or missing, or on devices that were removed.
func (p *Proxy) lost(m *alba.Manifest, failed []error) (n int) {
	for i, err := range failed {
		bad := errors.Is(err, asd.ErrCorrupt) || errors.Is(err, asd.ErrNoKey) || errors.Is(err, asd.ErrInvalid)
		d := p.member(m, i)
		if m.Shards[i] == "" || bad || err != nil && d != nil && d.Record().State == alba.DeviceRemoved {
			n++
		}
	}
	return n
}

// patience is how long to wait where a guest's read would wait for hedge: maintenance
// has others before it, which makes nobody late.
func (e *entry) patience(hedge time.Duration) time.Duration {
	if e.pri == asd.PriorityRepair {
		return readTimeout
	}
	return hedge
}

// lateness is how long to wait for the slowest of these before another is asked.
func (p *Proxy) lateness(list []candidate) time.Duration {
	d := hedgeMin
	for _, c := range list {
		d = max(d, c.m.hedge())
	}
	return d
}
