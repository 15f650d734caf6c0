package driver_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"os"
	"runtime"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/rs/zerolog"

	"scoria/alba/vfs"
	"scoria/driver"
	"scoria/driver/block"
)

// waitLimit is after how long a test that waits gives up with a dump of all
// goroutines.
const waitLimit = 3 * time.Minute

// rig is an engine with one volume on a file system that can die, beside a
// history of every cluster: who wrote it when. Any number of goroutines may use
// the volume at once.
type rig struct {
	t     *testing.T
	rng   *rand.Rand
	fs    *vfs.Mem
	eng   *driver.Engine
	vol   *driver.Volume
	cfg   driver.VolumeConfig
	pool  int64
	cache int64
	// reserve is what writers leave of the disk.
	reserve int64
	boot    int
	// still keeps the engine from housekeeping once a second: for tests that count, or
	// that say when a checkpoint or a publication is made.
	still bool
	// stores is what kind of store it has, which is open as store.
	stores storeKind
	store  storeCloser
	// wrap puts something between the volume and its store.
	wrap func(driver.Store) driver.Store

	clock    atomic.Int64 // ticks at each begin and end of a request
	versions atomic.Uint64

	mu      sync.Mutex
	history [][]*effect // by cluster
	flushes []period    // those that completed
}

// period is when a request began and ended.
type period struct{ begin, end int64 }

// effect is one request that changes clusters. A version of 0 stands for zeroes.
type effect struct {
	version    uint64
	begin, end int64 // end is math.MaxInt64 until it has been answered
	fua        bool
}

func newRig(t *testing.T, k storeKind, rng *rand.Rand, clusters uint64, poolMiB int64) *rig {
	t.Helper()
	r := &rig{t: t, rng: rng, fs: vfs.NewMem(), pool: poolMiB << 20, cache: 1 << 30, stores: k}
	t.Cleanup(func() { r.closeStore(); r.fs.Kill() })
	r.cfg = driver.VolumeConfig{
		ID: uuid.UUID{7, 1}, Name: "default/rig", Size: clusters * cluster, LogicalBlock: 512,
		SCOBytes: 1 << 20, Epoch: 1,
	}
	r.reset(clusters)
	return r
}

// newStillRig is newRig without housekeeping.
func newStillRig(t *testing.T, k storeKind, rng *rand.Rand, clusters uint64, poolMiB int64) *rig {
	t.Helper()
	r := newRig(t, k, rng, clusters, poolMiB)
	r.still = true
	return r
}

// create makes the volume and opens it.
func (r *rig) create() *rig {
	r.t.Helper()
	r.start()
	if err := r.eng.CreateVolume(context.Background(), r.cfg); err != nil {
		r.t.Fatal(err)
	}
	r.mustOpen()
	return r
}

func (r *rig) reset(clusters uint64) {
	r.history = make([][]*effect, clusters)
	for i := range r.history {
		r.history[i] = []*effect{{}}
	}
}

func testLog(t *testing.T) zerolog.Logger {
	if os.Getenv("SCORIA_TEST_LOG") != "" {
		return zerolog.New(zerolog.NewTestWriter(t))
	}
	return zerolog.Nop()
}

// start opens the store and the engine on the current file system.
func (r *rig) start() {
	r.t.Helper()
	if err := r.tryStart(); err != nil {
		r.t.Fatal(err)
	}
}

func (r *rig) tryStart() error {
	r.closeStore()
	store, err := r.stores.open(r.fs)
	if err != nil {
		return err
	}
	r.store, r.cfg.Store = store, store
	if r.wrap != nil {
		r.cfg.Store = r.wrap(store)
	}
	if err := r.fs.MkdirAll("run"); err != nil {
		return err
	}
	cfg := driver.Config{
		FS: r.fs, DataDir: "data", PoolFile: "run/pool", PoolBytes: r.pool, CacheBytes: r.cache, ReserveBytes: r.reserve,
		ReadCacheBytes: 1 << 20, BootID: "boot " + strconv.Itoa(r.boot), Log: testLog(r.t),
	}
	if r.still {
		r.eng, err = driver.OpenStillEngine(cfg)
	} else {
		r.eng, err = driver.OpenEngine(context.Background(), cfg)
	}
	return err
}

// closeStore ends what of the store runs in this process.
func (r *rig) closeStore() {
	if r.store != nil {
		_ = r.store.Close()
		r.store = nil
	}
}

func (r *rig) tryOpen() (err error) {
	r.vol, err = r.eng.OpenVolume(context.Background(), r.cfg)
	return err
}

func (r *rig) mustOpen() {
	r.t.Helper()
	if err := r.tryOpen(); err != nil {
		r.t.Fatal(err)
	}
}

// close ends the engine in good order.
func (r *rig) close() {
	r.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), waitLimit)
	defer cancel()
	if err := r.eng.Close(ctx); err != nil {
		r.t.Fatal(err)
	}
}

// kill ends the daemon now; what was mapped stays.
func (r *rig) kill() *rig {
	r.t.Helper()
	clone, err := r.fs.KillClone()
	if err != nil {
		r.t.Fatal(err)
	}
	r.eng.Abandon()
	r.fs = clone
	return r
}

// crash takes the power away now.
func (r *rig) crash() *rig {
	r.t.Helper()
	clone := r.fs.CrashClone(r.rng)
	r.fs.Kill()
	r.eng.Abandon()
	r.fs = clone
	r.boot++
	return r
}

// reopen starts again on what a kill or a crash left.
func (r *rig) reopen() *rig {
	r.t.Helper()
	r.start()
	r.mustOpen()
	return r
}

// stamp fills p as the content of a cluster at a version: every eight bytes tell
// both.
func stamp(p []byte, c, version uint64) {
	for i := 0; i < len(p); i += 8 {
		binary.LittleEndian.PutUint64(p[i:], (c<<40|version)^(uint64(i)*0x9e3779b97f4a7c15))
	}
}

var zeroCluster [cluster]byte

// readStamp returns the version of a cluster's content; ok is false if it is not
// one whole version of that cluster.
func readStamp(p []byte, c uint64) (version uint64, ok bool) {
	if bytes.Equal(p, zeroCluster[:]) {
		return 0, true
	}
	w := binary.LittleEndian.Uint64(p)
	if w>>40 != c {
		return 0, false
	}
	var want [cluster]byte
	stamp(want[:], c, w&(1<<40-1))
	return w & (1<<40 - 1), bytes.Equal(p, want[:])
}

// begin notes an effect before it is submitted.
func (r *rig) begin(first, n uint64, e *effect) {
	e.end = math.MaxInt64
	r.mu.Lock()
	defer r.mu.Unlock()
	e.begin = r.clock.Add(1)
	for c := first; c < first+n; c++ {
		r.history[c] = append(r.history[c], e)
	}
}

func (r *rig) done(e *effect, err error) error {
	if err == nil {
		r.mu.Lock()
		e.end = r.clock.Add(1)
		r.mu.Unlock()
	}
	return err
}

func (r *rig) write(first, n uint64, flags block.Flags) error {
	e := &effect{version: r.versions.Add(1), fua: flags&block.FUA != 0}
	data := make([]byte, n*cluster)
	for i := range n {
		stamp(data[i*cluster:(i+1)*cluster], first+i, e.version)
	}
	r.begin(first, n, e)
	return r.done(e, do(r.vol, &block.Request{
		Op: block.OpWrite, Flags: flags, Offset: first * cluster, Length: n * cluster, Segments: [][]byte{data},
	}))
}

func (r *rig) discard(first, n uint64) error {
	e := &effect{}
	r.begin(first, n, e)
	return r.done(e, do(r.vol, &block.Request{Op: block.OpDiscard, Offset: first * cluster, Length: n * cluster}))
}

func (r *rig) flush() error {
	begin := r.clock.Add(1)
	err := do(r.vol, &block.Request{Op: block.OpFlush})
	if err == nil {
		r.mu.Lock()
		r.flushes = append(r.flushes, period{begin, r.clock.Add(1)})
		r.mu.Unlock()
	}
	return err
}

// flushedBefore returns when the latest flush began that had completed at a time.
func (r *rig) flushedBefore(at int64) (begin int64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, p := range r.flushes {
		if p.end < at {
			begin = max(begin, p.begin)
		}
	}
	return begin
}

// explain returns "" if a cluster may read as version, given that every effect
// for which certain holds has happened; else why not.
func (r *rig) explain(c, version uint64, certain func(*effect) bool) string {
	r.mu.Lock()
	defer r.mu.Unlock()
	why := fmt.Sprintf("version %d was never written", version)
	for _, e := range r.history[c] {
		if e.version != version {
			continue
		}
		why = ""
		for _, later := range r.history[c] {
			if later.begin > e.end && certain(later) {
				why = fmt.Sprintf("version %d [%d,%d] was replaced by version %d [%d,%d]", version, e.begin, e.end, later.version, later.begin, later.end)
			}
		}
		if why == "" {
			return ""
		}
	}
	return why
}

// read reads clusters while others write and checks that each holds something
// that it may hold.
func (r *rig) read(first, n uint64) error {
	begin := r.clock.Add(1)
	buf := make([]byte, n*cluster)
	if err := do(r.vol, &block.Request{Op: block.OpRead, Offset: first * cluster, Length: n * cluster, Segments: [][]byte{buf}}); err != nil {
		return err
	}
	for i := range n {
		version, ok := readStamp(buf[i*cluster:(i+1)*cluster], first+i)
		if !ok {
			return fmt.Errorf("P5: cluster %d reads torn or as another: % x…", first+i, buf[i*cluster:i*cluster+16])
		}
		if why := r.explain(first+i, version, func(e *effect) bool { return e.end < begin }); why != "" {
			return fmt.Errorf("cluster %d: %s; read began at %d", first+i, why, begin)
		}
	}
	return nil
}

// verify reads everything when nobody writes and makes what it finds the only
// past of each cluster. certain says which effects must not be missing.
func (r *rig) verify(promise string, certain func(*effect) bool) {
	r.t.Helper()
	const step = 64
	size := uint64(len(r.history))
	found := make([]uint64, size)
	var wrong []string
	for first := uint64(0); first < size; first += step {
		n := min(step, size-first)
		buf := make([]byte, n*cluster)
		if err := do(r.vol, &block.Request{Op: block.OpRead, Offset: first * cluster, Length: n * cluster, Segments: [][]byte{buf}}); err != nil {
			r.t.Fatalf("%s: read of clusters %d+%d: %v", promise, first, n, err)
		}
		for i := range n {
			version, ok := readStamp(buf[i*cluster:(i+1)*cluster], first+i)
			if !ok {
				wrong = append(wrong, fmt.Sprintf("cluster %d is torn or another: % x…", first+i, buf[i*cluster:i*cluster+16]))
				continue
			}
			if why := r.explain(first+i, version, certain); why != "" {
				wrong = append(wrong, fmt.Sprintf("cluster %d: %s", first+i, why))
			}
			found[first+i] = version
		}
	}
	if len(wrong) > 0 {
		r.t.Fatalf("%s: %d clusters are wrong, the first: %q", promise, len(wrong), wrong[:min(8, len(wrong))])
	}
	now := r.clock.Add(1)
	r.mu.Lock()
	defer r.mu.Unlock()
	for c := range found {
		r.history[c] = []*effect{{version: found[c], begin: now, end: now}}
	}
}

// check has the volume check itself.
func (r *rig) check() driver.CheckReport {
	r.t.Helper()
	rep, err := r.vol.Check(context.Background(), nil)
	if err != nil || len(rep.Problems) > 0 {
		r.t.Fatalf("check: %v %q", err, rep.Problems)
	}
	return rep
}

func (r *rig) must(err error) {
	r.t.Helper()
	if err != nil {
		r.t.Fatal(err)
	}
}

// has reports whether a condition holds.
func (r *rig) has(code string) bool { return hasCondition(r.vol, code) }

func hasCondition(v *driver.Volume, code string) bool {
	return slices.ContainsFunc(v.Stats().Conditions, func(c driver.Condition) bool { return c.Code == code })
}

// settled waits until conditions have ended and are no longer listed.
func (r *rig) settled(codes ...string) {
	r.t.Helper()
	eventually(r.t, fmt.Sprintf("%q have ended", codes), func() bool {
		r.vol.Tick(time.Now().Add(time.Hour)) // what has ended lingers a little
		return !slices.ContainsFunc(codes, r.has)
	})
}

// eventually waits until cond holds.
func eventually(t *testing.T, what string, cond func() bool) {
	t.Helper()
	deadline := time.Now().Add(waitLimit)
	for !cond() {
		if time.Now().After(deadline) {
			buf := make([]byte, 1<<20)
			t.Fatalf("waited %v in vain until %s\n%s", waitLimit, what, buf[:runtime.Stack(buf, true)])
		}
		time.Sleep(time.Millisecond)
	}
}

// wait waits for a channel to be closed or to deliver.
func wait[T any](t *testing.T, what string, ch <-chan T) (v T) {
	t.Helper()
	select {
	case v = <-ch:
	case <-time.After(waitLimit):
		buf := make([]byte, 1<<20)
		t.Fatalf("waited %v in vain for %s\n%s", waitLimit, what, buf[:runtime.Stack(buf, true)])
	}
	return v
}

// crew is goroutines that use the volume until they are stopped or it dies.
type crew struct {
	r      *rig
	mortal bool // the disk will die under it: syncs may fail
	stop   atomic.Bool
	ctx    context.Context
	cancel context.CancelFunc
	wg     sync.WaitGroup
	ops    atomic.Int64
}

func (r *rig) newCrew() *crew {
	c := &crew{r: r}
	c.ctx, c.cancel = context.WithCancel(context.Background())
	return c
}

// over reports whether an error is how the end of the world looks from inside.
func (c *crew) over(err error) bool {
	return c.stop.Load() || errors.Is(err, vfs.ErrKilled) || errors.Is(err, block.ErrClosed) ||
		errors.Is(err, block.ErrFailed) && c.mortal
}

// run repeats fn until the crew is stopped.
func (c *crew) run(what string, seed uint64, fn func(rng *rand.Rand) error) {
	c.wg.Go(func() {
		rng := rand.New(rand.NewPCG(seed, 3))
		for !c.stop.Load() {
			if err := fn(rng); err != nil {
				if !c.over(err) {
					c.r.t.Errorf("%s: %v", what, err)
				}
				return
			}
			c.ops.Add(1)
		}
	})
}

// span picks up to most clusters in [from, to).
func span(rng *rand.Rand, from, to, most uint64) (first, n uint64) {
	first = from + rng.Uint64N(to-from)
	return first, min(1+rng.Uint64N(most), to-first)
}

// hire starts writers on disjoint and on overlapping clusters, readers,
// discarders and, if asked for, flushers and what else the volume does.
func (r *rig) hire(flushers bool) *crew {
	c := r.newCrew()
	c.mortal = true
	size := uint64(len(r.history))
	half := size / 2
	for i := range uint64(3) { // each its own part of the first half
		from, to := half*i/3, half*(i+1)/3
		c.run("writer", r.rng.Uint64(), func(rng *rand.Rand) error {
			first, n := span(rng, from, to, 8)
			if rng.IntN(8) == 0 {
				return r.discard(first, n)
			}
			return r.write(first, n, 0)
		})
	}
	for range 2 { // the second half belongs to all
		c.run("overlapping writer", r.rng.Uint64(), func(rng *rand.Rand) error {
			first, n := span(rng, half, size, 40)
			if rng.IntN(10) == 0 {
				return r.discard(first, n)
			}
			return r.write(first, n, block.Flags(0))
		})
	}
	c.run("reader", r.rng.Uint64(), func(rng *rand.Rand) error {
		first, n := span(rng, 0, size, 16)
		return r.read(first, n)
	})
	if flushers {
		c.run("flusher", r.rng.Uint64(), func(rng *rand.Rand) error {
			if rng.IntN(3) == 0 {
				first, n := span(rng, 0, size, 4)
				return r.write(first, n, block.FUA)
			}
			return r.flush()
		})
	}
	c.run("housekeeper", r.rng.Uint64(), func(rng *rand.Rand) error { return r.chore(c.ctx, rng) })
	return c
}

// chore does one of the things that a volume does beside its requests.
func (r *rig) chore(ctx context.Context, rng *rand.Rand) error {
	switch rng.IntN(7) {
	case 0:
		return ignoreFull(r.vol.Checkpoint(ctx))
	case 1:
		_, err := r.vol.Publish(ctx)
		return err
	case 2:
		return ignoreFull(r.vol.ScrubAll(ctx))
	case 3:
		r.vol.DropLocalCopies()
	case 4:
		r.vol.SpillNow()
	case 5:
		r.vol.WaitSealed()
	case 6:
		time.Sleep(time.Duration(rng.IntN(2000)) * time.Microsecond)
	}
	return nil
}

// ignoreFull forgives what gives way to writers when the pool is full.
func ignoreFull(err error) error {
	if driver.IsNoRoom(err) {
		return nil
	}
	return err
}

// fire stops the crew.
func (c *crew) fire() {
	c.r.t.Helper()
	c.stop.Store(true)
	c.cancel()
	done := make(chan struct{})
	go func() { c.wg.Wait(); close(done) }()
	wait(c.r.t, "the end of all requests", done)
}
