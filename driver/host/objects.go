package host

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"github.com/rs/zerolog"

	"scoria/alba"
	"scoria/alba/asd"
	"scoria/alba/asd/disk"
	"scoria/alba/asd/remote"
	"scoria/alba/proxy"
	"scoria/alba/repair"
	"scoria/alba/vfs"
	"scoria/driver"
	"scoria/driver/control"
	"scoria/driver/registry"
)

// BackendConfig is section [backend].
type BackendConfig struct {
	MasterKeys    string   `toml:"master_keys" comment:"Master keys of presets that encrypt: a file with one key of 64 hex digits per line, the one\nin use first, or \"credential:NAME\" for a systemd credential; empty: none."`
	Rack          string   `toml:"rack" comment:"Rack of this host: storage daemons that are near are read first."`
	Datacentre    string   `toml:"datacentre" comment:"Datacentre of this host."`
	RepairAfter   Duration `toml:"repair_after" comment:"How long a storage daemon may be away before what it has is rebuilt on others, 1s to 168h."`
	RepairRate    Size     `toml:"repair_rate" comment:"Bytes per second that maintenance of the object store may move; 0: no limit."`
	RepairLatency Duration `toml:"repair_latency" comment:"Maintenance of the object store slows down while more than one in a hundred flushes and disk reads\nof guests takes longer than this, 1ms to 10s (rounded up to a power of two nanoseconds)."`

	TLSCert        string `toml:"tls_cert" comment:"PEM file with this daemon's certificate for storage daemons at HOST:PORT. All three or\nnone; without them only those on loopback are spoken to."`
	TLSKey         string `toml:"tls_key" comment:"PEM file with its key."`
	TLSCA          string `toml:"tls_ca" comment:"PEM file with the CA of the storage daemons' certificates."`
	AllowPlaintext string `toml:"allow_plaintext" comment:"\"unencrypted and unauthenticated\" allows storage daemons beyond loopback without TLS."`
}

func (c *BackendConfig) security() remote.Security {
	return remote.Security{CertFile: c.TLSCert, KeyFile: c.TLSKey, CAFile: c.TLSCA, AllowPlaintext: c.AllowPlaintext}
}

func (c *BackendConfig) validate() error {
	s := c.security()
	if err := s.Check(); err != nil {
		return fmt.Errorf("backend.tls_cert, tls_key, tls_ca, allow_plaintext: %w", err)
	}
	switch {
	case c.RepairAfter < Duration(time.Second) || c.RepairAfter > Duration(168*time.Hour):
		return fmt.Errorf("backend.repair_after %s: must be from 1s to 168h", time.Duration(c.RepairAfter))
	case c.RepairLatency < Duration(time.Millisecond) || c.RepairLatency > Duration(10*time.Second):
		return fmt.Errorf("backend.repair_latency %s: must be from 1ms to 10s", time.Duration(c.RepairLatency))
	case c.RepairRate > 1<<40:
		return fmt.Errorf("backend.repair_rate %s: must be at most 1TiB", c.RepairRate)
	}
	return nil
}

// objectStore is the daemon's part of the erasure-coded object store: its way to the
// storage daemons, those that run within it, and the maintenance. Safe from any
// goroutine. Lock order: embeddedASD.mu, which is held while a directory is closed; mu is a
// leaf.
type objectStore struct {
	proxy  *proxy.Proxy
	keeper *repair.Maintainer

	fs       vfs.FS
	config   *Config
	security remote.Security
	keys     *alba.MasterKeys // nil: none are configured
	host     string
	log      zerolog.Logger
	first    chan struct{}             // a token when there may be a first storage daemon
	guests   atomic.Pointer[guestLoad] // nil: there are none yet
	// notRepaired is told of objects that could not be repaired; nil: nobody is yet.
	notRepaired atomic.Pointer[func(namespace, object string)]

	mu       sync.Mutex
	embedded map[string]*embeddedASD // by directory
}

// embeddedASD is a storage daemon within this process. It is opened by a goroutine of
// its own: a disk that hangs must keep neither requests nor the daemon's end waiting.
type embeddedASD struct {
	mu      sync.Mutex
	disk    *disk.Supervised // nil: not open
	opening *embeddedOpening // under way; nil: none

	onDataDisk atomic.Bool // it is on the data directory's disk
}

// embeddedOpening is one attempt to open a storage daemon.
type embeddedOpening struct {
	done  chan struct{}
	since time.Time
	err   error // when done is closed
	given bool  // up: what is opened is closed again; guarded by embeddedASD.mu
}

var errHangs = errors.New("it is being opened, and its disk does not answer")

const (
	// openPatience is how long a request waits for a storage daemon that is being opened,
	// addPatience how long whoever adds it: a new one is made first, on a disk that may be busy.
	openPatience = 2 * time.Second
	addPatience  = time.Minute
	// openAtStop is how long the daemon's end waits for one.
	openAtStop = 2 * time.Second
)

// borrowed is an embedded storage daemon for the proxy, whose clients come and go.
type borrowed struct{ *disk.Supervised }

var (
	_ asd.Client  = borrowed{}
	_ asd.Adopter = borrowed{}
)

func (borrowed) Close() error { return nil }

// openObjectStore reads which storage daemons there are. None is needed to be up. Of
// parts it takes FS and DialASD. silent: they are not told how far this registry is.
func openObjectStore(ctx context.Context, parts Parts, reg registry.Store, node string, c *Config, silent bool, log zerolog.Logger) (*objectStore, error) {
	name, err := os.Hostname()
	if err != nil {
		return nil, err
	}
	o := &objectStore{fs: parts.FS, config: c, security: c.Backend.security(), host: name, first: make(chan struct{}, 1),
		log: log.With().Str("component", "objects").Logger(), embedded: map[string]*embeddedASD{}}
	if c.Backend.MasterKeys != "" {
		if o.keys, err = alba.LoadMasterKeys(c.Backend.MasterKeys); err != nil {
			return nil, fmt.Errorf("backend.master_keys: %w", err)
		}
	}
	dial := parts.DialASD
	if dial == nil {
		dial = o.dial
	}
	faults := repair.NewFaults()
	o.proxy, err = proxy.New(ctx, proxy.Options{Registry: AlbaRegistry{reg}, Dial: dial, Node: node, Keys: o.keys, Silent: silent,
		Location: proxy.Location{Host: name, Rack: c.Backend.Rack, Datacentre: c.Backend.Datacentre},
		Report:   o.report(faults), Log: o.log})
	if err != nil {
		return nil, err
	}
	o.keeper = repair.New(repair.Options{Proxy: o.proxy, Faults: faults, DownAfter: time.Duration(c.Backend.RepairAfter),
		BytesPerSecond: int64(c.Backend.RepairRate), Busy: o.guestsWait, Failed: o.repairFailed, Log: o.log})
	return o, nil
}

// refuseOlder looks, for as long as olderWait, whether the registry knows all that
// the storage daemons were told. If it does not, it was put back from an older backup,
// and nothing of the object store is used: volumes would be what they were then, and
// what they write would be mixed with what was written since. It says so.
func (o *objectStore) refuseOlder(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, olderWait)
	defer cancel()
	o.proxy.Fleet().Poll(ctx)
	err := o.proxy.Older()
	if err != nil {
		o.log.Error().Err(err).Str("condition", olderCode).Msg(o.olderAdvice())
		o.proxy.Refuse(fmt.Errorf("%w; %s", err, o.olderAdvice()))
	}
	return err
}

// olderWait bounds what a start waits for storage daemons; what is of one that does not
// answer until then is not used before it has said what it was told.
const olderWait = 500 * time.Millisecond

const olderCode = "registry-is-older"

func (o *objectStore) olderAdvice() string {
	return fmt.Sprintf("the registry was put back from an older copy: stop scoriad and run `scoria backend rebuild-registry --data-dir %s`, naming all storage daemons; "+
		"it makes the registry anew from them and keeps this one under another name", o.config.DataDir)
}

// guestsWait implements repair.Options.Busy.
func (o *objectStore) guestsWait() bool {
	g := o.guests.Load()
	return g != nil && g.busy()
}

// repairFailed implements repair.Options.Failed.
func (o *objectStore) repairFailed(namespace, object string) {
	if tell := o.notRepaired.Load(); tell != nil {
		(*tell)(namespace, object)
	}
}

// report collects faults for repair, and says so in the log: a disk that is away
// makes one for each object, of which some are enough.
func (o *objectStore) report(faults *repair.Faults) func(proxy.Fault) {
	log := o.log.Sample(&zerolog.BurstSampler{Burst: 10, Period: time.Minute})
	return func(f proxy.Fault) {
		faults.Add(f)
		if f.Shard == proxy.NoShard {
			log.Warn().Str("namespace", f.Namespace).Str("object", f.Object).Str("reason", f.Reason).Msg("an object is less safe than it might be; it will be stored anew")
			return
		}
		log.Warn().Str("namespace", f.Namespace).Str("object", f.Object).Int("shard", f.Shard).Str("asd", f.Device).Str("reason", f.Reason).
			Msg("a piece of an object is bad or missing; it will be repaired")
	}
}

// store is where volumes made with a preset are kept.
func (o *objectStore) store(preset string) driver.Store {
	return AlbaStore{Proxy: o.proxy, Preset: preset, OnDisk: o.onDataDisk}
}

// onDataDisk says whether a device lies on the data directory's disk, as far as an attempt
// to open it has shown.
func (o *objectStore) onDataDisk(d alba.Device) bool {
	return filepath.IsAbs(d.Address) && o.entry(d.Address).onDataDisk.Load()
}

// dial implements proxy.Dial: an address is a directory or HOST:PORT. That a caller gives
// up must not make others believe that a disk can't be used: the wait has its own bound.
func (o *objectStore) dial(_ context.Context, d alba.Device) (asd.Client, error) {
	if !filepath.IsAbs(d.Address) {
		return remote.New(d.Address, remote.Options{ID: d.ID, Security: o.security, Log: o.log})
	}
	e := o.entry(d.Address)
	e.mu.Lock()
	if e.disk != nil {
		defer e.mu.Unlock()
		return borrowed{e.disk}, nil
	}
	attempt := o.beginOpening(e, d)
	e.mu.Unlock()
	patience := time.NewTimer(openPatience)
	defer patience.Stop()
	select {
	case <-attempt.done:
	case <-patience.C:
		return nil, fmt.Errorf("%w since %s", errHangs, attempt.since.UTC().Format(time.RFC3339))
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	switch {
	case e.disk != nil:
		return borrowed{e.disk}, nil
	case attempt.err != nil:
		return nil, attempt.err
	}
	return nil, asd.ErrClosed
}

// beginOpening is the attempt to open a storage daemon that is under way, or a new one.
// Caller holds e.mu, and e.disk is nil.
func (o *objectStore) beginOpening(e *embeddedASD, d alba.Device) *embeddedOpening {
	if e.opening == nil {
		e.opening = &embeddedOpening{done: make(chan struct{}), since: time.Now()}
		go o.openEmbedded(e, e.opening, d)
	}
	return e.opening
}

// awaitOpening begins to open a storage daemon that is to be added, and waits for the end
// of that: the error, if there is one, is for the next who dials. It gives up with ctx and
// after addPatience.
func (o *objectStore) awaitOpening(ctx context.Context, d alba.Device) {
	e := o.entry(d.Address)
	e.mu.Lock()
	if e.disk != nil {
		e.mu.Unlock()
		return
	}
	attempt := o.beginOpening(e, d)
	e.mu.Unlock()
	patience := time.NewTimer(addPatience)
	defer patience.Stop()
	for hint := time.NewTimer(openPatience); ; {
		select {
		case <-attempt.done:
			hint.Stop()
			return
		case <-hint.C:
			o.log.Warn().Str("address", d.Address).Msg("a storage daemon is being opened for the first time, and its disk is slow; waiting for it")
		case <-patience.C:
			return
		case <-ctx.Done():
			return
		}
	}
}

// openEmbedded carries an attempt out.
func (o *objectStore) openEmbedded(e *embeddedASD, attempt *embeddedOpening, d alba.Device) {
	var reserve int64 // the default
	if sameDisk(d.Address, o.config.DataDir) {
		reserve = o.reserve()
		e.onDataDisk.Store(true)
	}
	opened, err := disk.Supervise(o.fs, d.Address, disk.Options{ID: d.ID, Version: "embedded", ReserveBytes: reserve, Log: o.log})
	e.mu.Lock()
	if attempt.given && err == nil {
		err = opened.Close()
		opened = nil
	}
	e.disk, attempt.err = opened, err
	e.opening = nil
	e.mu.Unlock()
	close(attempt.done)
}

func (o *objectStore) entry(dir string) *embeddedASD {
	o.mu.Lock()
	defer o.mu.Unlock()
	e, ok := o.embedded[dir]
	if !ok {
		e = new(embeddedASD)
		o.embedded[dir] = e
	}
	return e
}

// release closes an embedded storage daemon; no error if it is not open. One whose
// opening hangs is left to that: it is closed when the opening ends, if ever.
func (o *objectStore) release(dir string) error {
	e := o.entry(dir)
	e.mu.Lock()
	if attempt := e.opening; attempt != nil {
		attempt.given = true
		e.mu.Unlock()
		select {
		case <-attempt.done:
		case <-time.After(openAtStop):
			return fmt.Errorf("storage daemon in %s: %w since %s", dir, errHangs, attempt.since.UTC().Format(time.RFC3339))
		}
		e.mu.Lock()
	}
	defer e.mu.Unlock()
	d := e.disk
	if e.disk = nil; d == nil {
		return nil
	}
	return d.Close()
}

// maintain starts the maintenance as soon as there is a storage daemon: a daemon
// without any has nothing to do. The function that it returns ends it.
func (o *objectStore) maintain(ctx context.Context) (stop func() error) {
	ctx, cancel := context.WithCancel(context.WithoutCancel(ctx))
	done := make(chan struct{})
	go func() {
		defer close(done)
		for len(o.proxy.Fleet().Members()) == 0 {
			select {
			case <-o.first:
			case <-ctx.Done():
				return
			}
		}
		o.keeper.Run(ctx)
	}()
	return func() error {
		cancel()
		<-done
		return nil
	}
}

// close ends everything; maintenance and volumes have ended before.
func (o *objectStore) close() error {
	o.proxy.Close()
	o.mu.Lock()
	dirs := make([]string, 0, len(o.embedded))
	for dir := range o.embedded {
		dirs = append(dirs, dir)
	}
	o.mu.Unlock()
	var errs []error
	for _, dir := range dirs {
		err := o.release(dir)
		if errors.Is(err, errHangs) { // nothing is in it that the end of the process could lose
			o.log.Warn().Err(err).Msg("left as it is")
			continue
		}
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// conditions are what is wrong with storage daemons.
func (o *objectStore) conditions() []control.Condition {
	var list []control.Condition
	for _, m := range o.proxy.Fleet().Members() {
		r := m.Record()
		if r.State == alba.DeviceRemoved {
			continue
		}
		if err := m.Older(); err != nil {
			list = append(list, control.Condition{Code: olderCode, Message: fmt.Sprintf("storage daemon %s at %s is not used, and maintenance stands still: %v; %s; or, if that storage daemon alone is to be given up, `scoria asd remove %s`",
				r.ID, r.Address, err, o.olderAdvice(), r.ID)})
			continue
		}
		if reason, since := m.Down(); reason != "" {
			list = append(list, control.Condition{Code: "asd-down", Message: fmt.Sprintf("storage daemon %s at %s is down since %s: %s; bring it back, or replace it: `scoria asd add` another, then `scoria asd remove %s`",
				r.ID, r.Address, since.UTC().Format(time.RFC3339), reason, r.ID)})
		}
		if reason := m.Damaged(); reason != "" {
			list = append(list, control.Condition{Code: "asd-damaged", Message: fmt.Sprintf("storage daemon %s at %s has a damaged key-value store (%s): what it holds is moved to others; `scoria asd add` another, then `scoria asd remove %s`",
				r.ID, r.Address, reason, r.ID)})
		}
		if st, _ := m.Stats(); st.Full {
			list = append(list, control.Condition{Code: "asd-full", Message: fmt.Sprintf("storage daemon %s at %s is full: add another with `scoria asd add`, then `scoria backend rebalance start`", r.ID, r.Address)})
		}
	}
	return list
}

// addressHost is the host of a storage daemon unless the operator says otherwise.
func (o *objectStore) addressHost(address string) string {
	if host, _, err := net.SplitHostPort(address); err == nil && !filepath.IsAbs(address) {
		return host
	}
	return o.host
}
