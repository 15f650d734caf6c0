package proxy

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/rs/zerolog"
	"golang.org/x/sync/semaphore"

	"scoria/alba"
)

// Errors of a Proxy.
var (
	ErrStaleEpoch  = errors.New("stale epoch: another owner has taken the namespace")
	ErrNoObject    = errors.New("no such object")
	ErrExists      = errors.New("object exists with other contents")
	ErrNoNamespace = errors.New("no such namespace")
	ErrNoPreset    = errors.New("no such preset")
	ErrClosed      = errors.New("proxy is closed")
	// ErrUnreadable: more shards are lost or out of reach than the object's parity
	// makes up for. It can be read again when enough devices are back.
	ErrUnreadable = errors.New("too few shards can be read")
	// ErrLost is an ErrUnreadable that waiting does not end: so many shards are damaged,
	// missing or on devices that were removed that the others are not enough. Those of a
	// removed device come back if it is added again.
	ErrLost = fmt.Errorf("%w, and the others are lost", ErrUnreadable)
	// ErrBusy: the registry changed under an operation too many times.
	ErrBusy = errors.New("too many conflicts in the registry")
)

// NoShard is the shard of a Fault that is the whole object's.
const NoShard = -1

// Fault is a shard that should be repaired: bad, missing or never written; or an
// object that is stored under another policy than its preset's first.
type Fault struct {
	Namespace string
	Object    string
	Upload    alba.ID // whose shard it is; zero: of whichever is there
	Shard     int
	Device    string
	Reason    string
}

// Options of New.
type Options struct {
	Registry alba.Registry
	Dial     Dial
	// Node names this daemon in the registry. Only one proxy at a time may have it:
	// at its next start maintenance takes the uploads under that name for dead.
	Node     string
	Location Location
	Preset   string           // of namespaces that are created without one
	Keys     *alba.MasterKeys // nil: nothing can be encrypted
	// MemoryBytes bounds the chunks of uploads under way; 0 means 512 MiB. One
	// chunk is always allowed.
	MemoryBytes int64
	// CacheObjects bounds the manifests kept; 0 means 65536.
	CacheObjects int
	// Silent: devices are not told how far the registry is, as it may be thrown away.
	Silent bool
	// Report is told of faults; from any goroutine, must not block. May be nil.
	Report func(Fault)
	Log    zerolog.Logger
}

// Counters of a Proxy since it was made.
type Counters struct {
	Puts, Deletes  atomic.Uint64
	PutBytes       atomic.Uint64 // of objects
	Attempts       atomic.Uint64 // uploads begun, with those that were begun anew
	Adopted        atomic.Uint64 // objects whose file a device took in place of a copy
	Late           atomic.Uint64 // uploads acknowledged before all their shards were durable
	Reads          atomic.Uint64
	ReadBytes      atomic.Uint64 // asked for
	FetchedBytes   atomic.Uint64 // read from devices for that
	Hedged         atomic.Uint64 // pieces for which others were asked because of the time
	Decoded        atomic.Uint64 // pieces that were computed from others
	Faults         atomic.Uint64 // bad or missing fragments met
	ManifestMisses atomic.Uint64
}

// Proxy reads and writes objects on the fleet's devices. Safe from any goroutine.
type Proxy struct {
	opts   Options
	reg    alba.Registry
	fleet  *Fleet
	cache  cache
	hedges hedges

	memory   *semaphore.Weighted
	chunks   sync.Pool     // of *erasure.Chunk, to be used again; with Memory if that is small
	late     chan struct{} // tokens of uploads that complete in the background
	purges   chan struct{} // tokens of purges in the background
	counters Counters
	active   sync.Map // upload IDs under way here
	at       position
	refused  atomic.Pointer[error] // of Refuse

	writeTimeout time.Duration // the constant of that name, but for tests

	ctx    context.Context // of background work
	cancel context.CancelFunc
	mu     sync.Mutex
	closed bool
	wg     sync.WaitGroup // background work
}

const (
	defaultMemory = 512 << 20
	lateUploads   = 8
	purgesAtOnce  = 8
	tries         = 16 // of a registry transaction
)

// New returns a proxy; it watches the registry until Close.
func New(ctx context.Context, o Options) (*Proxy, error) {
	if o.MemoryBytes == 0 {
		o.MemoryBytes = defaultMemory
	}
	if o.CacheObjects == 0 {
		o.CacheObjects = 1 << 16
	}
	if o.Report == nil {
		o.Report = func(Fault) {}
	}
	p := &Proxy{opts: o, reg: o.Registry, fleet: NewFleet(o.Registry, o.Dial, o.Location), memory: semaphore.NewWeighted(o.MemoryBytes),
		late: make(chan struct{}, lateUploads), purges: make(chan struct{}, purgesAtOnce), writeTimeout: writeTimeout}
	p.at.news = make(chan struct{}, 1)
	p.fleet.check, p.fleet.now, p.fleet.refresh, p.fleet.silent = p.checkPosition, p.now, p.reread, o.Silent
	p.cache.init(o.CacheObjects)
	p.ctx, p.cancel = context.WithCancel(context.Background())
	events, err := p.reg.Watch(p.ctx, alba.Prefix, 0)
	if err == nil {
		err = p.beginGeneration(ctx)
	}
	if err == nil {
		err = p.fleet.Reload(ctx)
	}
	if err != nil {
		p.cancel()
		return nil, fmt.Errorf("object store: %w", err)
	}
	p.wg.Go(func() { p.follow(events) })
	p.wg.Go(p.poll)
	if !o.Silent {
		p.wg.Go(p.tell)
	}
	return p, nil
}

// Close ends background work and closes the clients. Calls under way fail.
func (p *Proxy) Close() {
	p.mu.Lock()
	p.closed = true
	p.mu.Unlock()
	p.cancel()
	p.wg.Wait()
	if !p.opts.Silent {
		p.tellLast()
	}
	p.fleet.Close()
}

// Fleet returns the devices.
func (p *Proxy) Fleet() *Fleet { return p.fleet }

// Registry returns the registry that was given to New.
func (p *Proxy) Registry() alba.Registry { return p.reg }

// MasterKey is the ID of the master key in use, "" if there is none.
func (p *Proxy) MasterKey() string { return p.opts.Keys.Current() }

// Node names this daemon.
func (p *Proxy) Node() string { return p.opts.Node }

// Counters returns the live counters.
func (p *Proxy) Counters() *Counters { return &p.counters }

// background runs fn unless the proxy is closed; false then.
func (p *Proxy) background(fn func()) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return false
	}
	p.wg.Go(fn)
	return true
}

// follow keeps caches in step with the registry.
func (p *Proxy) follow(events <-chan alba.Event) {
	for {
		for e := range events {
			p.saw(e.Revision, worthTelling(e.Key))
			p.changed(e.Key)
		}
		if p.ctx.Err() != nil {
			return
		}
		// The watch fell behind, or the registry was away: anything may have changed.
		var err error
		if events, err = p.reg.Watch(p.ctx, alba.Prefix, 0); err != nil {
			events = nil
		}
		p.cache.dropAll()
		if err == nil {
			err = p.reread(p.ctx)
		}
		if err == nil {
			err = p.fleet.Reload(p.ctx)
		}
		if err != nil {
			p.opts.Log.Warn().Err(err).Msg("can't follow the registry; trying again")
			closed := make(chan alba.Event)
			close(closed)
			events = closed
			select {
			case <-p.ctx.Done():
				return
			case <-time.After(time.Second):
			}
		}
	}
}

func (p *Proxy) changed(key string) {
	switch {
	case key == alba.HistoryKey:
		if err := p.reread(p.ctx); err != nil && p.ctx.Err() == nil {
			p.opts.Log.Warn().Err(err).Msg("the registry's generations can't be read")
		}
	case strings.HasPrefix(key, alba.DevicePrefix):
		if err := p.fleet.Reload(p.ctx); err != nil && p.ctx.Err() == nil {
			p.opts.Log.Error().Err(err).Msg("device list can't be read")
		}
	case strings.HasPrefix(key, alba.NamespacePrefix), strings.HasPrefix(key, alba.ObjectPrefix):
		p.cache.drop(key)
	}
}

func (p *Proxy) poll() {
	t := time.NewTicker(pollEvery)
	defer t.Stop()
	for {
		p.fleet.Poll(p.ctx)
		if !p.opts.Silent {
			p.tellNow(p.ctx) // those that are back
		}
		select {
		case <-t.C:
		case <-p.ctx.Done():
			return
		}
	}
}

// check begins every call: it validates the names ("-" where there is none).
func (p *Proxy) check(ctx context.Context, ns, name string) error {
	if p.ctx.Err() != nil {
		return ErrClosed
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	if err := p.refused.Load(); err != nil {
		return *err
	}
	if err := alba.CheckName("namespace", ns); err != nil {
		return err
	}
	return alba.CheckName("object", name)
}

// now is the time for records: whole seconds, UTC.
func now() time.Time { return time.Now().UTC().Truncate(time.Second) }

// opError names the operation and what it was about.
func opError(op, ns, name string, err error) error {
	if err == nil {
		return nil
	}
	if name != "" {
		ns += "/" + name
	}
	return fmt.Errorf("object store: %s %s: %w", op, ns, err)
}

// Size returns an object's size in bytes, or ErrNoObject.
func (p *Proxy) Size(ctx context.Context, ns, name string) (int64, error) {
	err := p.check(ctx, ns, name)
	if err == nil {
		var e *entry
		if e, err = p.entry(ctx, ns, name, false); err == nil {
			return e.m.Size, nil
		}
	}
	return 0, opError("size", ns, name, err)
}

// List returns the names of objects with the prefix, sorted.
func (p *Proxy) List(ctx context.Context, ns, prefix string) ([]string, error) {
	err := p.check(ctx, ns, "-")
	var names []string
	if err == nil {
		names, err = p.list(ctx, ns, prefix)
	}
	return names, opError("list", ns, prefix, err)
}

func (p *Proxy) list(ctx context.Context, ns, prefix string) ([]string, error) {
	n, err := p.loadNamespace(ctx, ns)
	if err != nil {
		return nil, err
	}
	base := alba.ObjectKey(n.ID, "")
	kvs, err := p.reg.List(ctx, base+prefix)
	if err != nil {
		return nil, err
	}
	names := make([]string, len(kvs))
	for i, kv := range kvs {
		names[i] = strings.TrimPrefix(kv.Key, base)
	}
	return names, nil
}

// ReadAt fills b from the object's offset: ErrNoObject if there is none,
// io.ErrUnexpectedEOF if it ends before, ErrUnreadable if too few shards are within
// reach, ErrLost if they will not be again.
func (p *Proxy) ReadAt(ctx context.Context, ns, name string, b []byte, off int64) error {
	err := p.check(ctx, ns, name)
	if err == nil {
		err = p.read(ctx, ns, name, b, off)
	}
	if err == nil {
		p.counters.Reads.Add(1)
		p.counters.ReadBytes.Add(uint64(len(b)))
		return nil
	}
	return opError("read", ns, name, err)
}

// equalContents says whether the stored object is what src holds.
func (p *Proxy) equalContents(ctx context.Context, e *entry, src io.ReaderAt, size int64) (bool, error) {
	if e.m.Size != size {
		return false, nil
	}
	const step = 1 << 20
	a, b := make([]byte, min(step, size)), make([]byte, min(step, size))
	for off := int64(0); off < size; off += step {
		n := min(step, size-off)
		if got, err := src.ReadAt(a[:n], off); int64(got) < n {
			return false, sourceError(err, off+int64(got), size)
		}
		if err := p.readEntry(ctx, e, b[:n], off); err != nil {
			return false, err
		}
		if string(a[:n]) != string(b[:n]) {
			return false, nil
		}
	}
	return true, nil
}

func sourceError(err error, off, size int64) error {
	if err == nil || errors.Is(err, io.EOF) {
		err = io.ErrUnexpectedEOF
	}
	return fmt.Errorf("read the object at %d of %d: %w", off, size, err)
}
