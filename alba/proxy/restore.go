package proxy

import (
	"context"

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
