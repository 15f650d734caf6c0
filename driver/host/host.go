package host

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"slices"
	"sync"
	"time"

	"github.com/rs/zerolog"

	"scoria/alba/vfs"
	"scoria/driver"
	"scoria/driver/block"
	"scoria/driver/control"
	"scoria/driver/dirstore"
	"scoria/driver/nbd"
	"scoria/driver/registry"
	"scoria/shm"
)

// attachmentsGrace is how long after a start the attachments of the last run
// are still remembered: guests need a moment to come back.
const attachmentsGrace = 2 * time.Minute

// The heap is small (the maps and buffers are outside), and what closes, checks and
// uploads an SCO allocates megabytes: in proportion to the heap alone, a busy volume
// would have it collected ten times a second. heapFloor counts as heap and holds
// nothing: its pages are never touched, so they take no memory. With it the heap is
// collected after gcPercent of heapFloorBytes at the earliest.
const (
	gcPercent      = 200
	heapFloorBytes = 64 << 20
)

var heapFloor []byte

// Host is a running daemon.
type Host struct {
	config  Config
	version string
	log     zerolog.Logger
	started time.Time

	id      instance
	volumes *VolumeSet
	engine  Engine
	reg     Registry
	parts   Parts
	objects *objectStore
	pool    string // the write buffer's file
	poolLen int64

	control *control.Server
	metrics *http.Server // nil: off
	failed  chan error
	wg      sync.WaitGroup // listeners
	bg      sync.WaitGroup // follower and openings of the start
	closers []func() error // what Stop undoes, in reverse
	busy    bool           // front ends did not close in time; used by Stop only

	mu         sync.Mutex
	conditions []control.Condition
	stopping   bool
	hurried    bool
	hurry      context.CancelFunc // ends what Stop waits for
}

// Start runs a daemon with the configuration until Stop. When it returns, the
// control API answers and the sockets of all volumes are there, but for those
// of awaited volumes: they come when these are open. ctx bounds the start only.
func Start(ctx context.Context, c Config, version string, log zerolog.Logger) (*Host, error) {
	return StartOn(ctx, Parts{}, c, version, log)
}

// StartOn is Start on other parts than this host's own.
func StartOn(ctx context.Context, p Parts, c Config, version string, log zerolog.Logger) (*Host, error) {
	if err := c.Validate(); err != nil {
		return nil, err
	}
	if err := p.complete(); err != nil {
		return nil, err
	}
	h := &Host{parts: p, config: c, version: version, log: log, started: time.Now().UTC().Truncate(time.Second), failed: make(chan error, 4)}
	if err := h.start(ctx, p.FS); err != nil {
		return nil, errors.Join(err, h.undo())
	}
	return h, nil
}

func (h *Host) start(ctx context.Context, fsys vfs.FS) error {
	if err := h.lock(ctx, fsys); err != nil {
		return err
	}
	if err := h.openParts(ctx, fsys); err != nil {
		return err
	}
	if err := h.prepareRegistry(ctx); err != nil {
		return err
	}
	if err := h.volumes.Finish(ctx); err != nil {
		return err
	}
	h.startFollowing(ctx)
	return h.serve(ctx)
}

// undo closes what was opened, last first.
func (h *Host) undo() error {
	var errs []error
	for _, c := range slices.Backward(h.closers) {
		errs = append(errs, c())
	}
	h.closers = nil
	return errors.Join(errs...)
}

func (h *Host) undoLater(c func() error) { h.closers = append(h.closers, c) }

func (h *Host) lock(ctx context.Context, fsys vfs.FS) error {
	for _, d := range []struct{ what, dir string }{{"data directory", h.config.DataDir}, {"run directory", h.config.RunDir}} {
		l, err := lockDir(ctx, fsys, d.what, d.dir)
		if err != nil {
			return err
		}
		h.undoLater(l.Close)
	}
	return nil
}

// openParts opens registry, store and engine, and records that this run has
// begun.
func (h *Host) openParts(ctx context.Context, fsys vfs.FS) error {
	var err error
	if h.id, err = loadInstance(fsys, h.config.DataDir); err != nil {
		return err
	}
	h.log = h.log.With().Str("instance", h.id.ID[:8]).Logger()
	plan := h.planWriteBuffer(fsys)
	if h.reg, err = h.parts.OpenRegistry(filepath.Join(h.config.DataDir, registryFile)); err != nil {
		return err
	}
	h.undoLater(h.reg.Close)
	store, err := dirstore.Open(fsys, filepath.Join(h.config.DataDir, "store"), dirstore.Options{})
	if err != nil {
		return err
	}
	h.undoLater(store.Close)
	if h.objects, err = openObjectStore(ctx, h.parts, h.reg, h.id.ID, &h.config, false, h.log); err != nil {
		return err
	}
	h.undoLater(h.objects.close)
	older := h.objects.refuseOlder(ctx)
	h.engine, err = h.parts.OpenEngine(ctx, driver.Config{
		FS: fsys, DataDir: h.config.DataDir, PoolFile: h.pool, PoolBytes: h.poolLen,
		CacheBytes: int64(h.config.Cache.Local), ReadCacheBytes: int64(h.config.Cache.Read),
		SSDCacheBytes: int64(h.config.Cache.SSD), ReserveBytes: int64(h.config.Cache.Reserve),
		BootID: h.parts.BootID, Log: h.log,
	})
	if err != nil {
		return err
	}
	h.undoLater(func() error { return h.closeEngine(fsys) })
	if plan.needed && !h.engine.Adopted() {
		c := lostCondition(h.pool)
		h.log.Error().Str("condition", c.Code).Msg(c.Message)
		h.conditions = append(h.conditions, control.Condition{Code: c.Code, Message: c.Message})
	}
	if plan.obsolete != "" {
		if err := fsys.Remove(plan.obsolete); err != nil && !errors.Is(err, os.ErrNotExist) {
			h.log.Warn().Err(err).Msg("the write buffer of an earlier run can't be removed")
		}
	}
	// From here on the file counts; before, an unclean end lost nothing new.
	h.id.BootID, h.id.Clean, h.id.PoolFile = h.parts.BootID, false, h.pool
	if err := h.id.save(fsys, h.config.DataDir); err != nil {
		return err
	}
	h.volumes = NewVolumeSet(h.reg, h.engine, store, h.id.ID, h.config.vhostSocket, h.log)
	h.volumes.presetStore, h.volumes.objectsOlder = h.objects.store, older
	return nil
}

// planWriteBuffer sets pool and poolLen.
func (h *Host) planWriteBuffer(fsys vfs.FS) poolPlan {
	h.poolLen = int64(h.config.WriteBuffer.Size)
	if h.poolLen == 0 {
		h.poolLen = defaultWriteBuffer()
	}
	dir, why := poolDir(&h.config, fsys, h.poolLen)
	plan := planPool(h.id, h.parts.BootID, poolFileName(dir, h.id.ID))
	h.pool = plan.file
	if plan.needed {
		why = "the last run died and left it there"
	}
	h.log.Info().Str("file", h.pool).Str("because", why).Stringer("size", Size(h.poolLen)).Msg("write buffer")
	return plan
}

// closeEngine closes the volumes. The run was a clean one only if nothing in the
// write buffer is needed any more; its file stays for a quick next start.
func (h *Host) closeEngine(fsys vfs.FS) error {
	if h.busy {
		// A volume closed under requests would fail them, and a guest would see an
		// I/O error. Ending as if killed loses nothing.
		return errors.New("front ends are still busy, so volumes were not closed in order; the next start recovers them")
	}
	ctx, cancel := h.patience(context.Background())
	defer cancel()
	if err := h.engine.Close(ctx); err != nil {
		return fmt.Errorf("volumes were not closed in order; the next start recovers them: %w", err)
	}
	if !h.engine.Drained() {
		h.log.Warn().Str("file", h.pool).Msg("the write buffer still has data of volumes that were not opened or have failed; it is kept for the next start, do not remove it")
		return nil
	}
	h.id.Clean = true
	return h.id.save(fsys, h.config.DataDir)
}

// patience returns a context that ends when the operator hurries.
func (h *Host) patience(ctx context.Context) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancel(ctx)
	h.mu.Lock()
	defer h.mu.Unlock()
	h.hurry = cancel
	if h.hurried {
		cancel()
	}
	return ctx, cancel
}

// prepareRegistry makes the default pool and this node's record.
func (h *Host) prepareRegistry(ctx context.Context) error {
	if err := h.makeDefaultPool(ctx); err != nil {
		return err
	}
	name, err := os.Hostname()
	if err != nil {
		return err
	}
	_, err = registry.Create(ctx, h.reg, registry.NodeKey(h.id.ID), registry.Node{ID: h.id.ID, Host: name, Created: h.started})
	if err != nil && !errors.Is(err, registry.ErrExist) {
		return err
	}
	return nil
}

// serve starts control API, front ends and metrics.
func (h *Host) serve(ctx context.Context) error {
	gid, err := h.config.Sockets.gid()
	if err != nil {
		return err
	}
	socks := &sockets{dir: h.config.RunDir, mode: os.FileMode(h.config.Sockets.Mode), gid: gid}
	keep, err := h.socketsOfVolumes(ctx)
	if err != nil {
		return err
	}
	if err := socks.sweep(keep); err != nil {
		return fmt.Errorf("stale sockets: %w", err)
	}
	workers, err := newWorkers(&h.config)
	if err != nil {
		return err
	}
	h.undoLater(func() error {
		if !h.busy { // front ends that are still busy have queues
			workers.Close()
		}
		return nil
	})
	h.undoLater(h.closeFronts)
	vf, err := newVhostFront(&h.config, workers, h.volumes, h.log)
	if err != nil {
		return err
	}
	if err := h.volumes.Serve(ctx, vf); err != nil {
		return err
	}
	var nbdServer *nbd.Server
	if h.config.NBD.Enabled {
		l, err := socks.listen(h.config.nbdSocket())
		if err != nil {
			return err
		}
		nf := newNBDFront(&h.config, l, snapshotOpener{h.volumes}, h.log)
		if err := h.volumes.Serve(ctx, nf); err != nil {
			return err
		}
		nbdServer = nf.server
	}
	var shmServer *shm.Server
	if h.config.Shm.Enabled {
		sf, err := newShmFront(&h.config, socks, workers, h.volumes, h.log)
		if err != nil {
			return err
		}
		if err := h.volumes.Serve(ctx, sf); err != nil {
			return err
		}
		shmServer = sf.server
	}
	schedules := newScheduler(h.volumes, h.volumes, h.log)
	metrics := metricsHandler(newCollector(h.volumes, h.version, h.id.ID), newLimitCollector(h.volumes), schedules.events, newFrontCollector(workers, vf, nbdServer, shmServer), newObjectCollector(h.objects))
	if err := h.serveMetrics(metrics); err != nil {
		return err
	}
	if err := h.serveControl(socks, metrics, schedules); err != nil {
		return err
	}
	h.startSchedules(ctx, schedules)
	h.objects.guests.Store(newGuestLoad(h.engine.GuestWaits, time.Duration(h.config.Backend.RepairLatency), time.Now))
	h.undoLater(h.objects.maintain(ctx))
	h.undoLater(h.copyRecords(ctx))
	return nil
}

// startSchedules has snapshots made and deleted by the clock.
func (h *Host) startSchedules(ctx context.Context, s *scheduler) {
	ctx, cancel := context.WithCancel(context.WithoutCancel(ctx))
	done := make(chan struct{})
	h.undoLater(func() error {
		cancel()
		<-done
		return nil
	})
	go func() {
		defer close(done)
		s.run(ctx)
	}()
}

func (h *Host) socketsOfVolumes(ctx context.Context) (map[string]bool, error) {
	entries, err := registry.LoadAll[registry.Volume](ctx, h.reg, registry.VolumePrefix)
	keep := map[string]bool{}
	for i := range entries {
		keep[h.config.vhostSocket(entries[i].Record.Pool, entries[i].Record.Name)] = true
	}
	return keep, err
}

// closeFronts lets requests under way end. Those that wait for room are
// canceled and stay in the guests' rings; nothing else takes long, unless a disk
// hangs.
func (h *Host) closeFronts() error {
	const drain = 20 * time.Second
	bounded, stop := context.WithTimeout(context.Background(), drain)
	defer stop()
	ctx, cancel := h.patience(bounded)
	defer cancel()
	err := h.volumes.Close(ctx)
	h.busy = err != nil
	return err
}

func (h *Host) serveMetrics(metrics http.Handler) error {
	if h.config.Metrics.Address == "" {
		return nil
	}
	l, err := net.Listen("tcp", h.config.Metrics.Address)
	if err != nil {
		return fmt.Errorf("metrics.address: %w", err)
	}
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", metrics)
	h.metrics = &http.Server{Handler: mux, ReadTimeout: 10 * time.Second, WriteTimeout: time.Minute, IdleTimeout: time.Minute, MaxHeaderBytes: 16 << 10}
	h.undoLater(h.metrics.Close)
	h.log.Info().Stringer("address", l.Addr()).Msg("metrics")
	h.listen(func() error {
		if err := h.metrics.Serve(l); !errors.Is(err, http.ErrServerClosed) {
			return fmt.Errorf("metrics: %w", err)
		}
		return nil
	})
	return nil
}

func (h *Host) serveControl(socks *sockets, metrics http.Handler, schedules *scheduler) error {
	l, err := socks.listen(h.config.controlSocket())
	if err != nil {
		return err
	}
	log := h.log.With().Str("component", "control").Logger()
	h.control = control.NewServer(&backend{VolumeSet: h.volumes, status: h.status, config: h.config, schedules: schedules, objects: h.objects}, metrics, log)
	h.undoLater(func() error {
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		defer cancel()
		return errors.Join(h.control.Close(ctx), os.Remove(h.config.controlSocket()))
	})
	h.listen(func() error { return h.control.Serve(l) })
	return nil
}

// listen runs a listener; its failure ends the daemon.
func (h *Host) listen(serve func() error) {
	h.wg.Go(func() {
		if err := serve(); err != nil {
			h.failed <- err
		}
	})
}

// Devices opens volumes and snapshots as the front ends get them.
func (h *Host) Devices() block.Opener { return snapshotOpener{h.volumes} }

// Failed yields an error if the daemon can't go on and should be stopped.
func (h *Host) Failed() <-chan error { return h.failed }

// Stop ends the daemon in order: see the package doc. When hurry is closed
// meanwhile, it stops waiting for what the next start can recover.
func (h *Host) Stop(hurry <-chan struct{}) error {
	h.mu.Lock()
	h.stopping = true
	h.mu.Unlock()
	done := make(chan struct{})
	defer close(done)
	go func() {
		select {
		case <-hurry:
			h.hurryUp()
		case <-done:
		}
	}()
	err := h.undo()
	h.wg.Wait()
	return err
}

func (h *Host) hurryUp() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.hurried = true
	if h.hurry != nil {
		h.hurry()
	}
}

func (h *Host) status(context.Context) control.Status {
	h.mu.Lock()
	defer h.mu.Unlock()
	host, _ := os.Hostname() // it is there, or prepareRegistry had failed
	st := control.Status{
		Version: h.version, Instance: h.id.ID, Host: host, PID: os.Getpid(), Started: h.started,
		DataDir: h.config.DataDir, RunDir: h.config.RunDir, PoolFile: h.pool, WriteBuffer: h.poolLen,
		Stopping: h.stopping, Conditions: append([]control.Condition{}, h.conditions...),
	}
	free, err := h.parts.FS.Free(h.config.DataDir)
	if err != nil {
		st.Conditions = append(st.Conditions, control.Condition{Code: "data-dir", Message: err.Error()})
	}
	if err := h.reg.Err(); err != nil {
		st.Conditions = append(st.Conditions, control.Condition{Code: "registry-failed", Message: err.Error()})
	}
	st.DataFree = free
	st.Conditions = append(st.Conditions, h.objects.conditions()...)
	st.Conditions = append(st.Conditions, h.volumes.waiting()...)
	return st
}

// TuneRuntime sizes Go's scheduler and collector for the daemon: threads that
// poll must not take the place of those that work, and a collection, which takes
// milliseconds from them where they share a CPU, must be rare.
func TuneRuntime(c *Config) {
	runtime.GOMAXPROCS(runtime.NumCPU() + workerCount(c) + 2)
	debug.SetGCPercent(gcPercent)
	if heapFloor == nil {
		heapFloor = make([]byte, heapFloorBytes)
	}
}
