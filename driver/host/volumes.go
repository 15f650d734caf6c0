package host

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/google/uuid"
	"github.com/rs/zerolog"

	"scoria/driver"
	"scoria/driver/block"
	"scoria/driver/control"
	"scoria/driver/registry"
)

// maxSocketPath is what fits into sockaddr_un with its final zero, less what a
// socket is called while it is being made.
const maxSocketPath = 107 - len(".new")

// VolumeSet creates, opens, resizes, checks and deletes volumes. It is the
// block.Opener of the front ends. See the package doc for the order in which
// things become durable and for the locks.
type VolumeSet struct {
	reg    registry.Store
	engine Engine
	store  driver.Store
	node   string // owner of what we open
	log    zerolog.Logger

	// presetStore returns the object store for volumes made with a preset; nil: the
	// daemon has none. Set before the first volume is touched.
	presetStore func(preset string) driver.Store

	// objectsOlder, if set, says that the registry is older than the object store: no
	// unfinished operation on a volume there is finished or undone. Set like presetStore.
	objectsOlder error

	// socketPath returns where a volume's vhost socket lies.
	socketPath func(pool, name string) string

	ctx    context.Context // of openings; ends with the daemon
	cancel context.CancelFunc
	wg     sync.WaitGroup
	holds  holds

	limitMu sync.Mutex // from reading limits until they hold; see applyLimits

	mu      sync.Mutex
	fronts  []FrontEnd
	volumes map[string]*volume // by POOL/VOLUME; those touched since the start
	used    map[string]bool    // opened by front ends in this run
	closed  bool

	transfers map[string]bool // volumes that are being received; guarded by mu
}

// volume is what the daemon remembers of one.
type volume struct {
	name string
	gate chan struct{} // one token; see the package doc

	// Guarded by VolumeSet.mu.
	dev         Volume             // nil: not open; a *limited
	opening     chan struct{}      // closed when the opening under way has ended; nil: none
	openErr     error              // of the last opening
	offline     context.CancelFunc // of a check of the closed volume; nil: none
	frontErrors []string           // why it is not served
	awaited     bool               // front ends get it when it is open; see openAwaited
	insisting   bool               // its opening is tried again in the background; see insist
	template    bool               // as of the record; set when it is opened or changed
	incomplete  string             // kind of the import or receive under way, likewise; or unfinishedRollback

	unsettled string              // why the records of its snapshots may be behind; empty: they are not
	notices   []control.Condition // what was found at openings, until the daemon ends

	readers atomic.Int64 // of its snapshots
}

// NewVolumeSet returns the volumes of a registry; store and engine are what ready
// volumes live in. Front ends are added with Serve.
func NewVolumeSet(reg registry.Store, engine Engine, store driver.Store, node string, socketPath func(pool, name string) string, log zerolog.Logger) *VolumeSet {
	ctx, cancel := context.WithCancel(context.Background())
	return &VolumeSet{
		reg: reg, engine: engine, store: store, node: node, socketPath: socketPath, log: log,
		ctx: ctx, cancel: cancel, volumes: map[string]*volume{}, used: map[string]bool{},
	}
}

var _ block.Opener = (*VolumeSet)(nil)

func (h *VolumeSet) volume(name string) *volume {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.volumeLocked(name)
}

func (h *VolumeSet) volumeLocked(name string) *volume {
	v, ok := h.volumes[name]
	if !ok {
		v = &volume{name: name, gate: make(chan struct{}, 1)}
		h.volumes[name] = v
	}
	return v
}

// enter takes the volume's gate. An entry that a deletion dropped meanwhile is
// replaced by the current one.
func (h *VolumeSet) enter(ctx context.Context, name string) (v *volume, leave func(), err error) {
	for {
		v := h.volume(name)
		select {
		case v.gate <- struct{}{}:
		case <-ctx.Done():
			return nil, nil, fmt.Errorf("volume %s: waiting for another operation on it: %w", name, ctx.Err())
		}
		if h.current(v) {
			return v, func() { <-v.gate }, nil
		}
		<-v.gate
	}
}

// enterLoaded takes the gate of a volume; the record is as of then.
func (h *VolumeSet) enterLoaded(ctx context.Context, name string) (v *volume, e registry.Entry[registry.Volume], leave func(), err error) {
	if name, err = fullName(name); err != nil {
		return nil, e, nil, &notFoundError{err.Error()}
	}
	if v, leave, err = h.enter(ctx, name); err != nil {
		return nil, e, nil, err
	}
	if e, err = h.load(ctx, name); err != nil {
		leave()
		return nil, e, nil, err
	}
	return v, e, leave, nil
}

// current says whether v still stands for its name: a deletion ends that.
func (h *VolumeSet) current(v *volume) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.volumes[v.name] == v
}

// device returns the open device of a volume, nil if it is not open.
func (h *VolumeSet) device(name string) Volume {
	h.mu.Lock()
	defer h.mu.Unlock()
	if v, ok := h.volumes[name]; ok {
		return v.dev
	}
	return nil
}

// load reads a volume's record. The name is validated; an unknown or impossible
// one fails with block.ErrNotFound and control.CodeNotFound.
func (h *VolumeSet) load(ctx context.Context, name string) (registry.Entry[registry.Volume], error) {
	pool, vol, err := registry.SplitName(name)
	if err != nil {
		return registry.Entry[registry.Volume]{}, &notFoundError{fmt.Sprintf("no volume %q: %v", name, err)}
	}
	e, err := registry.Load[registry.Volume](ctx, h.reg, registry.VolumeKey(pool, vol))
	if errors.Is(err, registry.ErrNotFound) {
		return e, &notFoundError{fmt.Sprintf("no volume %s/%s", pool, vol)}
	}
	return e, err
}

// notFoundError says it to both sides: front ends and the control API.
type notFoundError struct{ text string }

func (e *notFoundError) Error() string { return e.text }

func (e *notFoundError) Unwrap() []error {
	return []error{block.ErrNotFound, control.Errorf(control.CodeNotFound, "%s", e.text)}
}

// Open implements block.Opener: it opens the volume if need be, which may take
// as long as its recovery, and goes on doing so when ctx ends first.
func (h *VolumeSet) Open(ctx context.Context, name string) (block.Device, error) {
	name, err := fullName(name)
	if err != nil {
		return nil, &notFoundError{err.Error()}
	}
	dev, err := h.open(ctx, name)
	if err != nil {
		return nil, err
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	v := h.volumeLocked(name)
	switch v.incomplete {
	case registry.IncompleteReceive:
		return nil, control.Errorf(control.CodeUnavailable, "volume %s is being received", name)
	case unfinishedRollback:
		return nil, control.Errorf(control.CodeUnavailable, "volume %s is being rolled back", name)
	}
	h.used[name] = true
	if v.template {
		return readOnly{dev}, nil
	}
	return dev, nil
}

func fullName(name string) (string, error) {
	pool, vol, err := registry.SplitName(name)
	return pool + "/" + vol, err
}

func (h *VolumeSet) open(ctx context.Context, name string) (Volume, error) {
	h.mu.Lock()
	v := h.volumeLocked(name)
	if v.dev != nil {
		defer h.mu.Unlock()
		return v.dev, nil
	}
	if h.closed {
		h.mu.Unlock()
		return nil, errStopping
	}
	if v.offline != nil {
		v.offline() // a guest does not wait for a check; that goes on online
	}
	if v.opening == nil {
		v.opening = make(chan struct{})
		h.wg.Go(func() { h.runOpening(v) })
	}
	done := v.opening
	h.mu.Unlock()
	select {
	case <-done:
	case <-ctx.Done():
		return nil, fmt.Errorf("volume %s: is being opened: %w", name, ctx.Err())
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if v.dev != nil {
		return v.dev, nil
	}
	if v.openErr != nil {
		return nil, v.openErr
	}
	return nil, fmt.Errorf("volume %s: %w", name, block.ErrClosed) // opened and closed again since
}

var errStopping = control.Errorf(control.CodeUnavailable, "the daemon is stopping")

func (h *VolumeSet) runOpening(v *volume) {
	dev, err := h.openNow(v)
	h.endOpening(v, dev, err)
	if err == nil {
		// They may have changed since openNow read them.
		h.applyLimits(h.ctx, v.name)
		h.serveAwaited(h.ctx, v.name)
	}
}

func (h *VolumeSet) endOpening(v *volume, dev Volume, err error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	// A guest asks again every second: the same reason is logged once. That the
	// daemon stops is none.
	if err != nil && h.ctx.Err() == nil && !errors.Is(err, block.ErrNotFound) && (v.openErr == nil || v.openErr.Error() != err.Error()) {
		h.log.Error().Err(err).Str("volume", v.name).Msg("volume can't be opened")
	}
	if err == nil {
		v.dev = dev
	} else if errors.Is(err, block.ErrNotFound) && h.volumes[v.name] == v && len(v.gate) == 0 {
		delete(h.volumes, v.name) // names that clients make up don't pile up
	}
	v.openErr = err
	if err != nil {
		h.insist(v, err)
	}
	close(v.opening)
	v.opening = nil
}

func (h *VolumeSet) openNow(v *volume) (Volume, error) {
	select {
	case v.gate <- struct{}{}:
		defer func() { <-v.gate }()
	case <-h.ctx.Done():
		return nil, errStopping
	}
	if !h.current(v) {
		return nil, &notFoundError{fmt.Sprintf("volume %s was deleted", v.name)}
	}
	e, err := h.load(h.ctx, v.name)
	if err != nil {
		return nil, err
	}
	if e.Record.State != registry.StateReady {
		return nil, control.Errorf(control.CodeUnavailable, "volume %s is not ready: %s", v.name, stateText(e.Record.State))
	}
	if e, err = h.takeOwnership(h.ctx, e); err != nil {
		return nil, fmt.Errorf("volume %s: take ownership: %w", v.name, err)
	}
	if err := h.openAncestors(h.ctx, &e.Record); err != nil {
		return nil, err
	}
	config, err := h.fullConfig(h.ctx, &e.Record)
	if err != nil {
		return nil, fmt.Errorf("open volume %s: %w", v.name, err)
	}
	dev, err := h.engine.OpenVolume(h.ctx, config)
	if err != nil {
		return nil, fmt.Errorf("open volume %s: %w", v.name, &engineError{err})
	}
	if err := h.catchUp(h.ctx, dev, e); err != nil {
		return nil, errors.Join(fmt.Errorf("open volume %s: %w", v.name, err), dev.Close(context.WithoutCancel(h.ctx)))
	}
	h.mu.Lock()
	v.template, v.incomplete = e.Record.Template, ""
	if i := e.Record.Incomplete; i != nil {
		v.incomplete = i.Kind
	}
	h.mu.Unlock()
	return h.limit(h.ctx, dev, &e.Record), nil
}

// takeOwnership makes this node the owner. Anew after another: the epoch grows,
// and everything the other still writes is refused.
func (h *VolumeSet) takeOwnership(ctx context.Context, e registry.Entry[registry.Volume]) (registry.Entry[registry.Volume], error) {
	if e.Record.Owner == h.node {
		return e, nil
	}
	before := e.Record.Owner
	e.Record.Owner = h.node
	e.Record.Epoch++
	e, err := registry.Replace(ctx, h.reg, registry.VolumeKey(e.Record.Pool, e.Record.Name), e)
	if err == nil {
		h.log.Info().Str("volume", e.Record.FullName()).Str("from", before).Uint64("epoch", e.Record.Epoch).Msg("ownership taken")
	}
	return e, err
}

func (h *VolumeSet) config(r *registry.Volume) driver.VolumeConfig {
	return driver.VolumeConfig{
		ID: r.ID, Name: r.FullName(), Serial: r.Serial, Size: r.Size, LogicalBlock: r.BlockSize,
		SCOBytes: r.SCOSize, ReadOnly: r.ReadOnly, Epoch: r.Epoch, Store: h.storeOf(r),
	}
}

// storeOf returns where a volume's objects are; nil, which the engine refuses, if
// the daemon can't reach that kind of store.
func (h *VolumeSet) storeOf(r *registry.Volume) driver.Store {
	switch {
	case r.Preset == "":
		return h.store
	case h.presetStore == nil:
		return nil
	}
	return h.presetStore(r.Preset)
}

func stateText(s registry.State) string {
	switch s {
	case registry.StateCreating:
		return "it is being created"
	case registry.StateDeleting:
		return "it is being deleted"
	}
	return string(s)
}

// Names implements block.Opener.
func (h *VolumeSet) Names(ctx context.Context) ([]string, error) {
	entries, err := registry.LoadAll[registry.Volume](ctx, h.reg, registry.VolumePrefix)
	if err != nil {
		return nil, err
	}
	var names []string
	for i := range entries {
		if r := &entries[i].Record; r.State == registry.StateReady && r.Incomplete == nil {
			names = append(names, r.FullName())
		}
	}
	slices.Sort(names)
	return names, nil
}

// Create implements block.Opener.
func (h *VolumeSet) Create(ctx context.Context, name string, size uint64) error {
	_, err := h.createAs(ctx, control.CreateVolume{Name: name, Size: size}, nil)
	return err
}

// Resize implements block.Opener.
func (h *VolumeSet) Resize(ctx context.Context, name string, size uint64) error {
	_, err := h.resize(ctx, name, size, false)
	return err
}

// create makes a volume, for an import if asked to.
func (h *VolumeSet) create(ctx context.Context, req control.CreateVolume) (registry.Volume, error) {
	if !req.Import {
		return h.createAs(ctx, req, nil)
	}
	r, err := h.createAs(ctx, req, &registry.Incomplete{Kind: registry.IncompleteImport})
	if err == nil {
		err = h.hold(ctx, req.Owner, held{volume: r.FullName(), id: r.ID})
	}
	return r, err
}

// createAs makes a volume that is incomplete, unless that is nil.
func (h *VolumeSet) createAs(ctx context.Context, req control.CreateVolume, incomplete *registry.Incomplete) (registry.Volume, error) {
	pool, vol, err := registry.SplitName(req.Name)
	if err != nil {
		return registry.Volume{}, control.Errorf(control.CodeInvalid, "%v", err)
	}
	p, err := h.poolOf(ctx, pool)
	if err != nil {
		return registry.Volume{}, err
	}
	r := newRecord(req, pool, vol, &p, h.node)
	r.Incomplete = incomplete
	if err := h.checkRecord(&r); err != nil {
		return r, control.Errorf(control.CodeInvalid, "%v", err)
	}
	v, leave, err := h.enter(ctx, r.FullName())
	if err != nil {
		return r, err
	}
	defer leave()
	key := registry.VolumeKey(pool, vol)
	e, err := registry.Create(ctx, h.reg, key, r)
	if errors.Is(err, registry.ErrExist) {
		return r, control.Errorf(control.CodeExists, "volume %s exists already", r.FullName())
	}
	if err != nil {
		return r, err
	}
	// From here on it is finished one way or the other, whatever becomes of ctx.
	ctx = context.WithoutCancel(ctx)
	if err := h.engine.CreateVolume(ctx, h.config(&r)); err != nil {
		return r, errors.Join(fmt.Errorf("create volume %s: %w", r.FullName(), err), h.removeNow(ctx, e))
	}
	e.Record.State = registry.StateReady
	if e, err = registry.Replace(ctx, h.reg, key, e); err != nil {
		return r, fmt.Errorf("create volume %s: %w", r.FullName(), err)
	}
	if incomplete == nil {
		h.serve(v)
	}
	h.log.Info().Str("volume", r.FullName()).Uint64("size", r.Size).Stringer("id", r.ID).Msg("volume created")
	return e.Record, nil
}

func newRecord(req control.CreateVolume, pool, vol string, p *registry.Pool, node string) registry.Volume {
	r := registry.Volume{
		ID: uuid.New(), Pool: pool, Name: vol, Size: req.Size, BlockSize: req.BlockSize, SCOSize: req.SCOSize,
		Serial: req.Serial, ReadOnly: req.ReadOnly, Created: time.Now().UTC().Truncate(time.Second),
		State: registry.StateCreating, Owner: node, Epoch: 1, Preset: p.Preset,
	}
	if r.BlockSize == 0 {
		r.BlockSize = p.BlockSize
	}
	if r.SCOSize == 0 {
		r.SCOSize = p.SCOSize
	}
	if r.Serial == "" {
		r.Serial = strings.ReplaceAll(r.ID.String(), "-", "")[:20]
	}
	return r
}

func (h *VolumeSet) checkRecord(r *registry.Volume) error {
	for i := range len(r.Serial) {
		if r.Serial[i] <= ' ' || r.Serial[i] > '~' {
			return fmt.Errorf("volume %s: serial %q: must be 1 to 20 printable ASCII characters without spaces", r.FullName(), r.Serial)
		}
	}
	if path := h.socketPath(r.Pool, r.Name); len(path) > maxSocketPath {
		return fmt.Errorf("volume name %s: its socket %s has a path of %d characters: must be at most %d, so shorten the name or the run directory", r.FullName(), path, len(path), maxSocketPath)
	}
	c := h.config(r)
	return c.Validate()
}

// usedBy names the front end that writes to a volume, or else those connected.
func (h *VolumeSet) usedBy(name string) string {
	if dev := h.device(name); dev != nil {
		if who, held := dev.Holder(); held {
			return who.String()
		}
	}
	return strings.Join(h.users(name), ", ")
}

func (h *VolumeSet) users(name string) []string {
	h.mu.Lock()
	fronts := h.fronts
	h.mu.Unlock()
	var users []string
	for _, f := range fronts {
		users = append(users, f.Users(name)...)
	}
	return users
}
