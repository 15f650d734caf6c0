package metamorphic

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/rs/zerolog"

	"scoria/alba/vfs"
	"scoria/driver"
	"scoria/driver/block"
	"scoria/driver/control"
	"scoria/driver/host"
	"scoria/driver/registry"
)

// patience is how long anything may take before the test fails with a dump of all
// goroutines.
var patience = 3 * time.Minute

// Pools of a world. Volumes of objectPool are on the object store, those of dirPool in the
// directory store, unless the settings have one of the two only.
const (
	dirPool    = "d"
	objectPool = "o"
)

// storageDaemons is how many storage daemons the preset needs; there is one more at first,
// of the daemon's own. The first one fails at times.
const storageDaemons = 3

const firstKey = "5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a"

// world is a daemon with everything that it stands on.
type world struct {
	settings settings
	dir      string // on the host's tmpfs: sockets, registry
	fs       *vfs.Mem
	boot     int
	log      zerolog.Logger
	wrap     func(block.Device) block.Device // between the test and the daemon; nil: nothing

	keyring []string        // the master keys, the one in use first
	moved   bool            // objects may be where the model does not expect them: a disk was drained or given up
	removed [diskSlots]bool // whose removal was asked for at least once

	life *life
}

// life is a run of the daemon.
type life struct {
	w      *world
	fs     *vfs.Mem
	host   *host.Host
	reg    *registry.Embedded
	engine mortalEngine
	client *control.Client
	ticks  chan time.Time

	asdDown   atomic.Bool
	countdown atomic.Int64 // calls to the disk until it dies; not positive: none
	doom      death        // what happens then; written before countdown

	mu     sync.RWMutex // held shared by commits, exclusively at the moment of death
	dead   chan struct{}
	buried bool     // nothing of it goes on; the test's own
	how    death    // written once, before dead is closed, as is what follows
	next   *vfs.Mem // what is left then
	err    error
}

// death is how a life ends before its time.
type death struct {
	power bool
	seed  uint64
}

// mortalEngine is the engine as tests see it.
type mortalEngine interface {
	host.Engine
	Doom()
	Abandon()
}

func newWorld(s settings, log zerolog.Logger) (*world, error) {
	dir, err := os.MkdirTemp("/dev/shm", "scoria-meta-")
	if err != nil {
		return nil, err
	}
	w := &world{settings: s, dir: dir, fs: vfs.NewMem(), log: log}
	err = w.writeKeys([]string{firstKey})
	if err == nil {
		err = w.start()
	}
	if err == nil {
		err = w.furnish()
	}
	if err != nil {
		return nil, errors.Join(err, os.RemoveAll(dir))
	}
	return w, nil
}

func (w *world) remove() { _ = os.RemoveAll(w.dir) }

func (w *world) shmSocket() string { return filepath.Join(w.dir, "shm.sock") }

func (w *world) registry() string { return filepath.Join(w.dir, "registry.db") }

func (w *world) keys() string { return filepath.Join(w.dir, "keys") }

func (w *world) config() host.Config {
	c := host.DefaultConfig()
	c.DataDir, c.RunDir = "/data", w.dir
	c.WriteBuffer.Size, c.WriteBuffer.Dir = 64<<20, w.dir
	c.Cache.Local, c.Cache.Read, c.Cache.SSD = host.Size(w.settings.Local<<20), host.Size(w.settings.Read<<10), host.Size(w.settings.SSD<<20)
	c.Cache.Reserve = 0
	c.Vhost.Workers, c.Vhost.Poll = 1, 0
	c.Backend.MasterKeys = w.keys()
	c.Pool.SCOSize = host.Size(w.settings.SCO << 20)
	return c
}

// start begins a life on what the last one left.
func (w *world) start() error {
	l := &life{w: w, fs: w.fs, ticks: make(chan time.Time), dead: make(chan struct{})}
	l.fs.SetHook(l.hook)
	parts := host.Parts{FS: w.fs, BootID: fmt.Sprint("boot ", w.boot)}
	parts.OpenRegistry = func(string) (host.Registry, error) {
		reg, err := registry.Open(w.registry())
		l.reg = reg
		return mortalRegistry{reg, l}, err
	}
	parts.OpenEngine = func(ctx context.Context, c driver.Config) (host.Engine, error) {
		c.PoolBytes, c.Ticks = int64(w.settings.Pool)<<20, l.ticks
		e, err := host.OpenEngine(ctx, c)
		if err != nil {
			return nil, err
		}
		l.engine = e.(mortalEngine)
		return closedOnce{l.engine, l}, nil
	}
	var err error
	c := w.config()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	w.life = l
	if l.host, err = host.StartOn(ctx, parts, c, "metamorphic", w.log); err != nil {
		return fmt.Errorf("start: %w", err)
	}
	l.client = control.NewClient(filepath.Join(w.dir, "control.sock"))
	return nil
}

// furnish makes pools and storage daemons.
func (w *world) furnish() error {
	if w.settings.DirOnly {
		return w.makePools()
	}
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	for i := range storageDaemons {
		if _, err := w.life.client.AddASD(ctx, control.AddASD{Address: asdDir(i)}); err != nil {
			return err
		}
	}
	return w.makePools()
}

// makePools makes the pools, and the preset of those on the object store, that are not there.
func (w *world) makePools() error {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	ps := control.Preset{Name: "p", FragmentBytes: 64 << 10, FailureDomain: "disk", Compression: w.settings.Compress, Encryption: w.settings.Encrypt,
		Policies: []control.Policy{{K: 2, M: 1, C: 3, X: 1}, {K: 2, M: 0, C: 2, X: 1}}}
	if !w.settings.DirOnly {
		if _, err := w.life.client.CreatePreset(ctx, ps); err != nil && control.CodeOf(err) != control.CodeExists {
			return err
		}
	}
	for _, name := range []string{dirPool, objectPool} {
		p := control.CreatePool{Name: name, Preset: ps.Name}
		if w.settings.DirOnly || name == dirPool && !w.settings.Objects {
			p = control.CreatePool{Name: name, Store: control.StoreDirectory}
		}
		if _, err := w.life.client.CreatePool(ctx, p); err != nil && control.CodeOf(err) != control.CodeExists {
			return err
		}
	}
	return nil
}

// asdDir is the directory of a slot; the last one's is that which the daemon makes by itself.
func asdDir(i int) string {
	if i == diskSlots-1 {
		return "/data/asd"
	}
	return fmt.Sprint("/asd", i)
}

// close ends the world, in order if it lives.
func (w *world) close() error {
	err := w.stop()
	return errors.Join(err, os.RemoveAll(w.dir))
}

// stop ends a life in order, and the process with it: what that still had open or locked,
// as a disk that has failed is, it has no more.
func (w *world) stop() error {
	l := w.life
	l.client.Close()
	err := within("the daemon's stop", func() error { return l.host.Stop(nil) })
	next, cloned := l.fs.KillClone()
	if cloned == nil {
		w.fs = next
	}
	if onlyFailedDisks(err) {
		err = nil
	}
	return errors.Join(err, cloned)
}

// die ends a life now; the daemon notices by and by. Only the first death counts.
func (l *life) die(d death) {
	l.mu.Lock()
	defer l.mu.Unlock()
	select {
	case <-l.dead:
		return
	default:
	}
	l.how = d
	if d.power {
		l.next = l.fs.CrashClone(rand.New(rand.NewPCG(d.seed, 7)))
		l.fs.Kill()
		l.w.boot++
	} else {
		l.next, l.err = l.fs.KillClone()
	}
	close(l.dead)
}

// died reports whether the life has ended. What ended before the answer is false did
// so in it.
func (l *life) died() bool {
	l.mu.RLock()
	defer l.mu.RUnlock()
	select {
	case <-l.dead:
		return true
	default:
		return false
	}
}

// bury ends what goes on of a dead daemon.
func (w *world) bury() error {
	l := w.life
	if l.buried {
		return nil
	}
	l.buried = true
	return within("the burial of a dead daemon", func() error {
		if l.engine != nil {
			l.engine.Abandon()
		}
		if l.client != nil {
			l.client.Close()
		}
		if l.host != nil {
			hurry := make(chan struct{})
			close(hurry)
			_ = l.host.Stop(hurry) // its disk is gone: nothing works
		}
		w.fs = l.next
		return errors.Join(l.err, l.reg.Close())
	})
}

// hook sees every call to the disk.
func (l *life) hook(op vfs.Op, name string) error {
	if l.countdown.Load() > 0 && l.countdown.Add(-1) == 0 {
		l.die(l.doom)
	}
	if l.asdDown.Load() && strings.HasPrefix(name, asdDir(0)) {
		return &fs.PathError{Op: op.String(), Path: name, Err: syscall.EIO}
	}
	return nil
}

// mortalRegistry takes no commit after the daemon's death.
type mortalRegistry struct {
	*registry.Embedded
	l *life
}

func (r mortalRegistry) Commit(ctx context.Context, compares []registry.Compare, writes []registry.Write) (int64, error) {
	if r.l.countdown.Load() > 0 && r.l.countdown.Add(-1) == 0 {
		r.l.die(r.l.doom)
	}
	r.l.mu.RLock()
	defer r.l.mu.RUnlock()
	select {
	case <-r.l.dead:
		return 0, vfs.ErrKilled
	default:
	}
	return r.Embedded.Commit(ctx, compares, writes)
}

// closedOnce is an engine that is abandoned, not closed, when the daemon is dead.
type closedOnce struct {
	mortalEngine
	l *life
}

func (e closedOnce) Close(ctx context.Context) error {
	if e.l.died() {
		e.Abandon()
		return vfs.ErrKilled
	}
	return e.mortalEngine.Close(ctx)
}

// within runs fn, which must end in time.
func within(what string, fn func() error) error {
	done := make(chan error, 1)
	go func() { done <- fn() }()
	select {
	case err := <-done:
		return err
	case <-time.After(patience):
		return fmt.Errorf("%s has not ended after %v\n%s", what, patience, dump())
	}
}

func dump() []byte {
	buf := make([]byte, 4<<20)
	return buf[:runtime.Stack(buf, true)]
}
