package proxy

import (
	"context"
	"errors"
	"fmt"

	"scoria/alba/asd"
)

// Restore stores an object anew under its namespace's preset, with the first policy that
// the devices can meet, and removes what was there: for maintenance. Readers
// see the one or the other. It needs no owner. throttle is called before each read
// with its bytes; nil: never.
func (p *Proxy) Restore(ctx context.Context, ns, name string, throttle func(ctx context.Context, bytes int64) error) error {
	err := p.check(ctx, ns, name)
	if err == nil {
		err = p.restore(ctx, ns, name, throttle)
	}
	return opError("store anew", ns, name, err)
}

func (p *Proxy) restore(ctx context.Context, ns, name string, throttle func(context.Context, int64) error) error {
	n, err := p.loadNamespace(ctx, ns)
	if err != nil {
		return err
	}
	e, err := p.loadEntry(ctx, n, name)
	if err != nil {
		return err
	}
	e.pri = asd.PriorityRepair // nobody else has this entry
	p.counters.Attempts.Add(1)
	u, err := p.begin(ctx, n, name, n.Epoch, e.m.Size, e)
	if err != nil {
		return err
	}
	u.pri = asd.PriorityRepair
	if err := u.run(ctx, entryReader{ctx, p, e, throttle}, e.m.Size); err != nil {
		u.abandon()
		return err
	}
	p.sweepTrash(ctx, n.ID, e.m.Upload)
	return nil
}

// PutLost stores an object anew that is lost (ErrLost), with the contents that it had, under its
// namespace's preset, and removes what is left of it; readers see the one or the other. It does
// nothing if the object can be read. ErrLost, with the reason, if it is lost but can't be
// stored now; ErrNoObject if there is none; ErrExists if what can be read of it differs;
// ErrStaleEpoch as Put. It reads src more than once.
func (p *Proxy) PutLost(ctx context.Context, ns, name string, epoch uint64, src Source) error {
	err := p.check(ctx, ns, name)
	if err == nil {
		err = p.putLost(ctx, ns, name, epoch, &src)
	}
	return opError("put what is lost of", ns, name, err)
}

func (p *Proxy) putLost(ctx context.Context, ns, name string, epoch uint64, src *Source) error {
	return p.untilStored(ctx, ns, epoch, func(n namespace) error {
		e, err := p.loadEntry(ctx, n, name)
		if err != nil {
			return err
		}
		same, err := p.equalContents(ctx, e, src.Data, src.Size)
		if err == nil && !same {
			return ErrExists
		}
		if !errors.Is(err, ErrLost) {
			return err
		}
		lost := err
		u, err := p.begin(ctx, n, name, epoch, src.Size, e)
		if err == nil {
			err = u.store(ctx, src)
		}
		switch {
		case err == nil:
			p.sweepTrash(ctx, n.ID, e.m.Upload)
			p.opts.Log.Warn().Str("namespace", ns).Str("object", name).Msg("object was lost, and is stored anew by who still had it")
			return nil
		case errors.Is(err, ErrStaleEpoch), errors.Is(err, ErrNoNamespace):
			return err
		}
		return fmt.Errorf("%w; it can't be stored anew: %w", lost, err)
	})
}

// entryReader reads an object as the source of an upload.
type entryReader struct {
	ctx      context.Context
	p        *Proxy
	e        *entry
	throttle func(ctx context.Context, bytes int64) error // may be nil
}

func (r entryReader) ReadAt(b []byte, off int64) (int, error) {
	if r.throttle != nil {
		if err := r.throttle(r.ctx, int64(len(b))); err != nil {
			return 0, err
		}
	}
	if err := r.p.readEntry(r.ctx, r.e, b, off); err != nil {
		return 0, err
	}
	return len(b), nil
}
