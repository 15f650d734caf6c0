package host

import (
	"context"
	"errors"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/rs/zerolog"

	"scoria/driver"
	"scoria/driver/block"
	"scoria/driver/registry"
	"scoria/driver/schedule"
)

const patience = 2 * time.Minute

// fakeEngine keeps volumes in memory and can be made to fail or wait.
type fakeEngine struct {
	mu      sync.Mutex
	made    map[uuid.UUID]bool
	opened  map[uuid.UUID]int // how often
	open    map[uuid.UUID]bool
	configs map[uuid.UUID]driver.VolumeConfig
	calls   []string
	fail    map[string]error         // by method
	hold    map[string]chan struct{} // by method: wait for it

	disks    map[uuid.UUID]*fakeDisk
	views    map[uuid.UUID]int // open ones, by snapshot
	sequence uint64
	crash    *crasher // nil: never
	late     error    // of deletions of snapshots, once those are gone
}

func newFakeEngine() *fakeEngine {
	return &fakeEngine{
		made: map[uuid.UUID]bool{}, opened: map[uuid.UUID]int{}, open: map[uuid.UUID]bool{},
		configs: map[uuid.UUID]driver.VolumeConfig{}, fail: map[string]error{}, hold: map[string]chan struct{}{},
		disks: map[uuid.UUID]*fakeDisk{}, views: map[uuid.UUID]int{},
	}
}

func (e *fakeEngine) LostInStore(string, string) {}

func (e *fakeEngine) GuestWaits() driver.GuestWaits { return driver.GuestWaits{} }

func (e *fakeEngine) call(ctx context.Context, method string, c driver.VolumeConfig) error {
	e.mu.Lock()
	e.calls = append(e.calls, method+" "+c.Name)
	err, hold := e.fail[method], e.hold[method]
	e.mu.Unlock()
	if hold != nil {
		select {
		case <-hold:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return err
}

func (e *fakeEngine) CreateVolume(ctx context.Context, c driver.VolumeConfig) error {
	return e.do(ctx, "create", c, func(*fakeDisk) error {
		e.made[c.ID] = true
		e.disks[c.ID] = &fakeDisk{size: c.Size}
		return nil
	})
}

func (e *fakeEngine) OpenVolume(ctx context.Context, c driver.VolumeConfig) (Volume, error) {
	if err := e.call(ctx, "open", c); err != nil {
		return nil, err
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	if !e.made[c.ID] || e.open[c.ID] {
		return nil, errors.New("not made, or open twice")
	}
	d := e.disks[c.ID]
	if d == nil { // made by a test itself
		d = &fakeDisk{size: c.Size}
		e.disks[c.ID] = d
	}
	for _, a := range d.ancestors {
		if !e.open[a.Volume] {
			return nil, driver.ErrAncestorClosed
		}
	}
	d.size = max(d.size, c.Size)
	e.open[c.ID], e.configs[c.ID] = true, c
	e.opened[c.ID]++
	return &fakeVolume{engine: e, config: c, size: c.Size}, nil
}

func (e *fakeEngine) DeleteVolume(ctx context.Context, c driver.VolumeConfig) error {
	return e.do(ctx, "delete", c, func(*fakeDisk) error {
		if e.open[c.ID] {
			return errors.New("open volume deleted")
		}
		delete(e.made, c.ID)
		delete(e.disks, c.ID)
		return nil
	})
}

func (e *fakeEngine) CheckVolume(ctx context.Context, c driver.VolumeConfig, progress func(done, total int64)) (driver.CheckReport, error) {
	progress(1, 2)
	return driver.CheckReport{SCOs: 1}, e.call(ctx, "check", c)
}

func (e *fakeEngine) Adopted() bool               { return false }
func (e *fakeEngine) Drained() bool               { return true }
func (e *fakeEngine) Pending() []uuid.UUID        { return nil }
func (e *fakeEngine) Close(context.Context) error { return nil }

// log returns the calls so far.
func (e *fakeEngine) log() []string {
	e.mu.Lock()
	defer e.mu.Unlock()
	return slices.Clone(e.calls)
}

type fakeVolume struct {
	block.Device // nil: what isn't here is not called
	engine       *fakeEngine
	config       driver.VolumeConfig

	mu     sync.Mutex
	size   uint64
	holder block.Claimant
	claims int
}

func (v *fakeVolume) Info() block.Info {
	v.mu.Lock()
	defer v.mu.Unlock()
	return block.Info{Name: v.config.Name, Size: v.size}
}

func (v *fakeVolume) Claim(c block.Claimant) (func(), error) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.claims > 0 && v.holder != c {
		return nil, &block.InUseError{Volume: v.config.Name, Holder: v.holder}
	}
	v.holder = c
	v.claims++
	return func() {
		v.mu.Lock()
		defer v.mu.Unlock()
		v.claims--
	}, nil
}

func (v *fakeVolume) Holder() (block.Claimant, bool) {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.holder, v.claims > 0
}

// Submit answers everything at once.
func (v *fakeVolume) Submit(batch []*block.Request) {
	for _, r := range batch {
		r.Err, r.Ended = nil, true
	}
}

func (v *fakeVolume) Stats() driver.Stats {
	st := driver.Stats{SyncCount: 7, Conditions: []driver.Condition{{Code: "throttled", Message: "slow"}}}
	st.Ops[block.OpWrite] = driver.OpStats{Count: 3, Bytes: 12288}
	st.Space = driver.Space{Live: 8192, Snapshots: 4096, Garbage: 3, Overhead: 4, Inherited: 5, Local: 6, Store: 7}
	return st
}

func (v *fakeVolume) Resize(ctx context.Context, size uint64) error {
	if err := v.engine.call(ctx, "resize", v.config); err != nil {
		return err
	}
	v.engine.mu.Lock()
	v.engine.disks[v.config.ID].size = size
	v.engine.mu.Unlock()
	v.mu.Lock()
	defer v.mu.Unlock()
	v.size = size
	return nil
}

func (v *fakeVolume) Check(ctx context.Context, progress func(done, total int64)) (driver.CheckReport, error) {
	progress(2, 2)
	return driver.CheckReport{SCOs: 2}, v.engine.call(ctx, "online-check", v.config)
}

func (v *fakeVolume) Close(ctx context.Context) error {
	if err := v.engine.call(ctx, "close", v.config); err != nil {
		return err
	}
	v.engine.mu.Lock()
	defer v.engine.mu.Unlock()
	v.engine.open[v.config.ID] = false
	return nil
}

// fakeFront records which volumes it serves.
type fakeFront struct {
	mu     sync.Mutex
	served map[string]bool
	users  []string
	asked  atomic.Int64 // calls of Users
	fail   error
}

func (f *fakeFront) Add(name string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.fail == nil {
		f.served[name] = true
	}
	return f.fail
}

func (f *fakeFront) Remove(name string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	delete(f.served, name)
}

func (f *fakeFront) Users(string) []string {
	f.asked.Add(1)
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.users
}

func (f *fakeFront) LastDisconnect(string) (string, time.Time) {
	return "ring 0 loops", time.Unix(1, 0)
}

func (f *fakeFront) Close(context.Context) error { return nil }

func (f *fakeFront) has(name string) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.served[name]
}

// noStore satisfies VolumeConfig.Validate.
type noStore struct{ driver.Store }

func (noStore) Namespaces(context.Context) ([]string, error) { return nil, nil }

// bench is a VolumeSet on fakes.
type bench struct {
	*VolumeSet
	engine *fakeEngine
	front  *fakeFront
	reg    *registry.Embedded
	api    *backend
	snaps  *fakeSnapshots
}

// goThrough has the daemon use another registry from now on. Openings that are about to
// end read the one that was before.
func (b *bench) goThrough(reg registry.Store) {
	b.VolumeSet.wg.Wait()
	b.VolumeSet.reg = reg
}

func newBench(t *testing.T) *bench {
	t.Helper()
	reg, err := registry.Open(filepath.Join(t.TempDir(), "registry.db"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { reg.Close() })
	b := attach(t, reg, newFakeEngine(), "node-1")
	if _, err := registry.Create(t.Context(), reg, registry.PoolKey("default"), registry.Pool{Name: "default", BlockSize: 512, SCOSize: 64 << 20}); err != nil {
		t.Fatal(err)
	}
	return b
}

// attach makes a daemon on a registry and an engine that may have a past.
func attach(t *testing.T, reg *registry.Embedded, engine *fakeEngine, node string) *bench {
	t.Helper()
	config := DefaultConfig()
	b := &bench{
		VolumeSet: NewVolumeSet(reg, engine, noStore{}, node, config.vhostSocket, zerolog.Nop()),
		engine:    engine, front: &fakeFront{served: map[string]bool{}}, reg: reg,
	}
	b.snaps = &fakeSnapshots{of: map[string][]schedule.Snapshot{}, fail: map[string]error{}}
	b.api = &backend{VolumeSet: b.VolumeSet, config: config, schedules: newScheduler(b.VolumeSet, b.snaps, zerolog.Nop())}
	if err := b.Finish(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := b.Serve(t.Context(), b.front); err != nil {
		t.Fatal(err)
	}
	return b
}

func testContext(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	t.Cleanup(cancel)
	return ctx
}
