package client

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"scoria/shm/mem"
	"scoria/shm/ring"
	"scoria/shm/wire"
)

// Defaults of Options.
const (
	DefaultSocket     = "/run/scoria/shm.sock"
	DefaultEntries    = 128
	DefaultArenaBytes = 8 << 20
	DefaultPoll       = 50 * time.Microsecond

	maxPiece = 1 << 20 // bytes of one request that ReadAt and WriteAt make
)

// Errors.
var (
	// ErrLost: the server is gone and did not come back in time. What a write did
	// is not known.
	ErrLost = errors.New("the server is gone")
	// ErrClosed: the Disk was closed.
	ErrClosed = errors.New("disk is closed")
)

// Options say what to open and how. Zero values are replaced by defaults.
type Options struct {
	Socket   string // default DefaultSocket
	Volume   string // POOL/VOLUME
	ReadOnly bool

	Rings      int           // that requests are spread over; default 1
	Entries    int           // of a ring, a power of two; default DefaultEntries
	ArenaBytes int           // of a ring, a multiple of 4096; default DefaultArenaBytes
	Poll       time.Duration // longest time that a caller polls; default DefaultPoll; negative: never
	// Reconnect bounds how long requests wait for a server that is gone; default:
	// for good; negative: they fail at once.
	Reconnect time.Duration
}

func (o *Options) setDefaults() {
	if o.Socket == "" {
		o.Socket = DefaultSocket
	}
	if o.Rings == 0 {
		o.Rings = 1
	}
	if o.Entries == 0 {
		o.Entries = DefaultEntries
	}
	if o.ArenaBytes == 0 {
		o.ArenaBytes = DefaultArenaBytes
	}
	if o.Poll == 0 {
		o.Poll = DefaultPoll
	}
	o.Poll = max(o.Poll, 0)
}

// Disk is an open volume. Its methods may be called from any goroutine.
type Disk struct {
	options    Options
	rings      []*diskRing // until Close
	pieceBytes int
	turn       atomic.Uint32
	info       atomic.Pointer[wire.Volume]
	reconnects atomic.Uint64
	ctx        context.Context // ends with Close
	cancel     context.CancelFunc
	ended      chan struct{} // closed when run has ended

	mu   sync.Mutex
	conn *conn

	// using is held to read by whoever uses the rings' memory, and to write to
	// unmap it.
	using sync.RWMutex
}

// Open opens a volume. It fails with *ServerError if the server refuses. ctx
// bounds the opening only.
func Open(ctx context.Context, o Options) (*Disk, error) {
	o.setDefaults()
	l := ring.Layout{Entries: o.Entries, ArenaBytes: uint64(o.ArenaBytes)}
	if err := l.Check(); err != nil {
		return nil, fmt.Errorf("opening %s: %w", o.Volume, err)
	}
	d := &Disk{options: o, ended: make(chan struct{})}
	d.ctx, d.cancel = context.WithCancel(context.Background())
	for range o.Rings {
		r := &diskRing{d: d, memfd: -1, kick: -1, layout: l, room: make(chan struct{}, l.Entries), slots: make([]slot, l.Entries), down: true}
		for i := range l.Entries {
			r.free = append(r.free, uint16(i))
		}
		r.spinFor.Store(int64(o.Poll))
		d.rings = append(d.rings, r)
	}
	d.pieceBytes = max(min(maxPiece, o.ArenaBytes/4&^(allocUnit-1)), allocUnit)
	if err := d.connect(ctx); err != nil {
		d.cancel()
		d.release()
		return nil, fmt.Errorf("opening %s: %w", o.Volume, err)
	}
	go d.run()
	return d, nil
}

// connect makes a connection with the volume open and all rings attached.
func (d *Disk) connect(ctx context.Context) error {
	k, err := dial(ctx, d.options.Socket)
	if err != nil {
		return err
	}
	k.event = func(v wire.Volume) { d.info.Store(&v) }
	v, err := k.open(ctx, d.options.Volume, d.options.ReadOnly)
	if err == nil {
		d.info.Store(&v)
		for _, r := range d.rings {
			if err = r.attach(ctx, k); err != nil {
				break
			}
		}
	}
	if err == nil && d.ctx.Err() != nil {
		err = ErrClosed
	}
	if err != nil {
		k.sock.Close()
		for _, r := range d.rings {
			r.disconnect()
		}
		return err
	}
	d.mu.Lock()
	d.conn = k
	d.mu.Unlock()
	return nil
}

// run reads the socket, and connects again when it ends, until Close.
func (d *Disk) run() {
	defer close(d.ended)
	for {
		d.mu.Lock()
		k := d.conn
		d.mu.Unlock()
		stop := context.AfterFunc(d.ctx, func() { k.sock.Close() })
		for {
			_, _, fds, err := k.read(wire.MaxFDs)
			mem.CloseAll(fds)
			if err != nil {
				break
			}
		}
		stop()
		k.sock.Close()
		for _, r := range d.rings {
			r.disconnect()
		}
		if err := d.reconnect(); err != nil {
			for _, r := range d.rings {
				r.abandon(err)
			}
			return
		}
		d.reconnects.Add(1)
	}
}

// reconnect tries to connect until it succeeds, time is up or Close is called.
func (d *Disk) reconnect() error {
	const first, last = time.Millisecond, 100 * time.Millisecond
	ctx := d.ctx
	switch limit := d.options.Reconnect; {
	case limit < 0:
		if d.ctx.Err() != nil {
			return ErrClosed
		}
		return ErrLost
	case limit > 0:
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, limit)
		defer cancel()
	}
	for pause := first; ; pause = min(2*pause, last) {
		err := d.connect(ctx)
		switch {
		case err == nil:
			return nil
		case d.ctx.Err() != nil:
			return ErrClosed
		case IsCode(err, wire.NotFound), IsCode(err, wire.Denied), IsCode(err, wire.Invalid):
			return fmt.Errorf("%w: it is back, but: %w", ErrLost, err)
		}
		select {
		case <-ctx.Done():
			if d.ctx.Err() != nil {
				return ErrClosed
			}
			return fmt.Errorf("%w: %w", ErrLost, err)
		case <-time.After(pause):
		}
	}
}

// Info describes the volume; its size changes with a resize.
func (d *Disk) Info() wire.Volume { return *d.info.Load() }

// Reconnects returns how often the server was gone and came back.
func (d *Disk) Reconnects() uint64 { return d.reconnects.Load() }

// Close ends the connection. Operations under way end with ErrClosed; what they
// did is not known. Memory from Alloc is gone.
func (d *Disk) Close() error {
	d.cancel()
	<-d.ended
	d.release()
	return nil
}

// release gives back the rings' memory when nobody uses it any more. Nothing is
// under way, and nothing new begins.
func (d *Disk) release() {
	d.using.Lock()
	defer d.using.Unlock()
	for _, r := range d.rings {
		if r.memory != nil {
			r.memory.Release()
		}
		mem.CloseFD(&r.memfd)
	}
	d.rings = nil
}
