package driver_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"runtime"
	"strconv"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/rs/zerolog"

	"scoria/alba/vfs"
	"scoria/driver"
	"scoria/driver/block"
)

const (
	cluster = block.ClusterSize
	sector  = block.SectorSize
)

// world is a volume on a file system that can crash, beside a flat model of it.
type world struct {
	t     *testing.T
	rng   *rand.Rand
	fs    *vfs.Mem
	eng   *driver.Engine
	vol   *driver.Volume
	kind  storeKind
	store storeCloser
	size  uint64
	cfg   driver.VolumeConfig
	pool  int64
	boot  int
	cache int64

	model   []byte   // what the volume must read as
	flushed []byte   // model at the last completed flush
	history []update // single effects since then, in log order
	trace   []string
	shots   []shot
	making  *shot                // it is being made
	dying   []driver.Snapshot    // are being deleted
	buried  []driver.Snapshot    // were deleted or dropped
	rolling *shot                // a rollback to it is under way
	locked  func(uuid.UUID) bool // a clone builds on the snapshot
}

// update is one effect that is in the log whole or not at all.
type update struct {
	off  uint64
	data []byte
}

func newWorld(t *testing.T, k storeKind, rng *rand.Rand, size uint64, scoBytes, pool int64) *world {
	t.Helper()
	w := &world{t: t, rng: rng, kind: k, fs: vfs.NewMem(), size: size, pool: pool, cache: 1 << 30,
		model: make([]byte, size), flushed: make([]byte, size)}
	w.cfg = driver.VolumeConfig{
		ID: uuid.UUID{1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16}, Name: "default/test", Serial: "s",
		Size: size, LogicalBlock: 512, SCOBytes: scoBytes, Epoch: 1,
	}
	t.Cleanup(func() { w.closeStore() })
	w.start()
	if err := w.eng.CreateVolume(context.Background(), w.cfg); err != nil {
		t.Fatal(err)
	}
	w.open()
	return w
}

func (w *world) start() {
	w.t.Helper()
	var err error
	w.closeStore()
	if w.store, err = w.kind.open(w.fs); err != nil {
		w.t.Fatalf("%s: %v", w.where(), err)
	}
	w.cfg.Store = w.store
	if err := w.fs.MkdirAll("run"); err != nil {
		w.t.Fatal(err)
	}
	log := zerolog.Nop()
	if os.Getenv("SCORIA_TEST_LOG") != "" {
		log = zerolog.New(zerolog.NewTestWriter(w.t))
	}
	w.eng, err = driver.OpenEngine(context.Background(), driver.Config{
		FS: w.fs, DataDir: "data", PoolFile: "run/pool", PoolBytes: w.pool, CacheBytes: w.cache,
		ReadCacheBytes: 1 << 20, BootID: "boot " + strconv.Itoa(w.boot), Log: log,
	})
	if err != nil {
		w.t.Fatalf("%s: %v", w.where(), err)
	}
}

// closeStore ends what of the store runs in this process.
func (w *world) closeStore() {
	if w.store != nil {
		_ = w.store.Close()
		w.store = nil
	}
}

func (w *world) open() {
	w.t.Helper()
	w.readRegistry()
	var err error
	if w.vol, err = w.eng.OpenVolume(context.Background(), w.cfg); err != nil {
		w.t.Fatalf("%s: %v", w.where(), err)
	}
	if w.cfg.Size > w.size { // it died before the guest knew
		w.grown(w.cfg.Size)
	}
	w.opened()
}

func (w *world) where() string {
	n := len(w.trace)
	return fmt.Sprintf("after %d operations, the last: %v", n, w.trace[max(0, n-12):])
}

func (w *world) note(format string, args ...any) {
	w.trace = append(w.trace, fmt.Sprintf(format, args...))
}

// do submits one request and waits for its end.
func do(dev block.Device, r *block.Request) error {
	done := make(chan struct{})
	r.Complete = func(*block.Request) { close(done) }
	dev.Submit([]*block.Request{r})
	if r.Ended {
		return r.Err
	}
	select {
	case <-done:
		return r.Err
	case <-time.After(2 * time.Minute):
		buf := make([]byte, 1<<20)
		panic(fmt.Sprintf("%s at %d does not end\n%s", r.Op, r.Offset, buf[:runtime.Stack(buf, true)]))
	}
}

// split cuts data into random pieces, as a guest's buffers would be.
func (w *world) split(data []byte) (segs [][]byte) {
	for len(data) > 0 {
		n := len(data)
		if w.rng.IntN(3) == 0 {
			n = 1 + w.rng.IntN(len(data))
		}
		segs = append(segs, data[:n])
		data = data[n:]
	}
	return segs
}

// span picks a range in units of unit bytes.
func (w *world) span(unit, most uint64) (off, length uint64) {
	n := 1 + w.rng.Uint64N(most)
	off = w.rng.Uint64N(w.size / unit)
	n = min(n, w.size/unit-off)
	return off * unit, n * unit
}

func (w *world) record(off uint64, data []byte) {
	for len(data) > 0 {
		n := min(uint64(len(data)), cluster-off%cluster)
		w.history = append(w.history, update{off, bytes.Clone(data[:n])})
		off += n
		data = data[n:]
	}
}

func (w *world) write(off, length uint64, fua bool) error {
	data := make([]byte, length)
	for i := 0; i < len(data); i += 8 {
		copy(data[i:], strconv.FormatUint(w.rng.Uint64()|1<<63, 16))
	}
	w.note("write %d+%d fua=%v", off, length, fua)
	r := &block.Request{Op: block.OpWrite, Offset: off, Length: length, Segments: w.split(data)}
	if fua {
		r.Flags = block.FUA
	}
	// What is under way when the world ends may have happened or not.
	w.record(off, data)
	if err := do(w.vol, r); err != nil {
		return err
	}
	copy(w.model[off:], data)
	if fua {
		w.settled()
	}
	return nil
}

func (w *world) clear(op block.Op, off, length uint64) error {
	w.note("%s %d+%d", op, off, length)
	zero := make([]byte, length)
	// Parts of clusters come first, then all whole clusters in one record.
	first, last := (off+cluster-1)/cluster*cluster, (off+length)/cluster*cluster
	if first > last {
		w.record(off, zero)
	} else {
		w.record(off, zero[:first-off])
		w.record(last, zero[:off+length-last])
		w.history = append(w.history, update{first, zero[:last-first]})
	}
	if err := do(w.vol, &block.Request{Op: op, Offset: off, Length: length}); err != nil {
		return err
	}
	copy(w.model[off:], zero)
	return nil
}

func (w *world) flush() error {
	w.note("flush")
	if err := do(w.vol, &block.Request{Op: block.OpFlush}); err != nil {
		return err
	}
	w.settled()
	return nil
}

func (w *world) settled() {
	w.flushed = bytes.Clone(w.model)
	w.history = w.history[:0]
}

func (w *world) read(off, length uint64) error {
	w.note("read %d+%d", off, length)
	got := make([]byte, length)
	if err := do(w.vol, &block.Request{Op: block.OpRead, Offset: off, Length: length, Segments: w.split(got)}); err != nil {
		return err
	}
	if want := w.model[off : off+length]; !bytes.Equal(got, want) {
		for i := range got {
			if got[i] != want[i] {
				w.t.Fatalf("%s: P5: byte %d (cluster %d): read %q, want %q", w.where(), off+uint64(i), (off+uint64(i))/cluster, got[i:i+8], want[i:i+8])
			}
		}
	}
	return nil
}

func (w *world) readAll() []byte {
	w.t.Helper()
	out := make([]byte, w.size)
	const step = 1 << 20
	for off := uint64(0); off < w.size; off += step {
		p := out[off:min(off+step, w.size)]
		if err := do(w.vol, &block.Request{Op: block.OpRead, Offset: off, Length: uint64(len(p)), Segments: [][]byte{p}}); err != nil {
			w.t.Fatalf("%s: read all: %v", w.where(), err)
		}
	}
	return out
}

// verifyPrefix checks P1 and P2: what is there now is the flushed state plus a
// prefix of what was done since. It becomes the model.
func (w *world) verifyPrefix() {
	w.t.Helper()
	got := w.readAll()
	wrong := map[uint64]bool{}
	state := bytes.Clone(w.flushed)
	mark := func(off, length uint64) {
		for c := off / cluster; c*cluster < off+length; c++ {
			a, b := c*cluster, (c+1)*cluster
			if bytes.Equal(state[a:b], got[a:b]) {
				delete(wrong, c)
			} else {
				wrong[c] = true
			}
		}
	}
	mark(0, w.size)
	k := 0
	for len(wrong) > 0 && k < len(w.history) {
		u := w.history[k]
		k++
		copy(state[u.off:], u.data)
		if len(u.data) > 0 {
			mark(u.off, uint64(len(u.data)))
		}
	}
	if len(wrong) > 0 {
		w.t.Fatalf("%s: P1/P2: no prefix of the %d updates since the last flush explains the volume; clusters %v differ at the end", w.where(), len(w.history), keys(wrong))
	}
	w.model = got
	w.settled()
}

func keys(m map[uint64]bool) (out []uint64) {
	for k := range m {
		out = append(out, k)
	}
	return out
}

// verifyAll checks P3: after a kill everything completed is there; the update
// under way may be.
func (w *world) verifyAll() {
	w.t.Helper()
	got := w.readAll()
	if bytes.Equal(got, w.model) {
		return
	}
	w.t.Fatalf("%s: P3: a completed write is gone or a wrong byte is there: clusters %v", w.where(), diff(got, w.model))
}

func diff(a, b []byte) (out []int) {
	for c := 0; c < len(a)/cluster; c++ {
		if !bytes.Equal(a[c*cluster:(c+1)*cluster], b[c*cluster:(c+1)*cluster]) {
			out = append(out, c)
		}
	}
	return out
}

func (w *world) check() {
	w.t.Helper()
	rep, err := w.vol.Check(context.Background(), nil)
	if err != nil || len(rep.Problems) > 0 {
		w.t.Fatalf("%s: check: %v %q", w.where(), err, rep.Problems)
	}
}

// kill ends the daemon without warning; the host goes on.
func (w *world) kill() {
	w.t.Helper()
	w.note("kill -9")
	clone, err := w.fs.KillClone()
	if err != nil {
		w.t.Fatal(err)
	}
	w.eng.Abandon()
	w.fs = clone
	w.start()
	w.open()
}

// crash takes the power away.
func (w *world) crash() {
	w.t.Helper()
	w.note("power loss")
	clone := w.fs.CrashClone(w.rng)
	w.die(clone)
}

// die leaves the current instance behind and goes on from clone.
func (w *world) die(clone *vfs.Mem) {
	w.t.Helper()
	w.fs.Kill()
	w.eng.Abandon()
	w.fs = clone
	w.boot++
	w.start()
	w.open()
}

func (w *world) restart() {
	w.t.Helper()
	w.note("clean restart")
	if err := w.eng.Close(context.Background()); err != nil {
		w.t.Fatalf("%s: close: %v", w.where(), err)
	}
	w.settled()
	w.start()
	w.open()
}

// step does one random operation that doesn't end the world.
func (w *world) step() error {
	ctx := context.Background()
	switch n := w.rng.IntN(112); {
	case n >= 110:
		return w.resize()
	case n >= 100:
		return w.snapshotStep()
	case n < 35:
		off, length := w.span(cluster, 20)
		return w.write(off, length, false)
	case n < 45:
		off, length := w.span(sector, 40)
		return w.write(off, length, w.rng.IntN(4) == 0)
	case n < 50:
		off, length := w.span(cluster, 400)
		return w.write(off, length, false)
	case n < 70:
		off, length := w.span(sector, 400)
		return w.read(off, length)
	case n < 78:
		off, length := w.span(sector, 300)
		return w.clear(block.OpDiscard+block.Op(w.rng.IntN(2)), off, length)
	case n < 84:
		return w.flush()
	case n < 87:
		w.note("checkpoint")
		return w.vol.Checkpoint(ctx)
	case n < 90:
		w.note("publish")
		_, err := w.vol.Publish(ctx)
		return err
	case n < 93:
		w.note("scrub")
		if w.rng.IntN(2) == 0 {
			return w.vol.CompactAll(ctx)
		}
		return w.vol.ScrubAll(ctx)
	case n < 96:
		w.note("evict")
		w.vol.DropLocalCopies()
	case n < 98:
		w.note("spill")
		w.vol.SpillNow()
	default:
		w.note("seal")
		w.vol.WaitSealed()
	}
	return nil
}

// seeds returns the seeds to try: SCORIA_SEED if set, else n new ones.
func seeds(t *testing.T, n int) []uint64 {
	if s := os.Getenv("SCORIA_SEED"); s != "" {
		v, err := strconv.ParseUint(s, 10, 64)
		if err != nil {
			t.Fatal(err)
		}
		return []uint64{v}
	}
	if testing.Short() {
		n = max(1, n/5)
	}
	out := make([]uint64, n)
	for i := range out {
		out[i] = rand.Uint64()
	}
	return out
}

func forSeeds(t *testing.T, n int, fn func(t *testing.T, rng *rand.Rand)) {
	for _, seed := range seeds(t, n) {
		t.Run(fmt.Sprintf("SCORIA_SEED=%d", seed), func(t *testing.T) {
			fn(t, rand.New(rand.NewPCG(seed, 1)))
		})
	}
}

func randomWorld(t *testing.T, k storeKind, rng *rand.Rand) *world {
	scoBytes := int64(1+rng.IntN(3)) << 20
	pool := int64(4+rng.IntN(10)) << 20
	w := newWorld(t, k, rng, uint64(2+rng.IntN(6))<<20, scoBytes, pool)
	if rng.IntN(3) == 0 {
		w.cache = 1 << 20
	}
	return w
}

// TestP2Model: random operations with clean restarts, kills and losses of power
// in between give the answers of a flat model.
func TestP2Model(t *testing.T) {
	forStores(t, raced(14, 4), raced(3, 1), func(t *testing.T, k storeKind, rng *rand.Rand) {
		w := randomWorld(t, k, rng)
		for range k.fewer(400, raced(400, 150)) {
			if err := w.step(); err != nil {
				t.Fatalf("%s: %v", w.where(), err)
			}
			switch w.rng.IntN(60) {
			case 0:
				w.kill()
				w.verifyAll()
				w.check()
			case 1:
				w.crash()
				w.verifyPrefix()
				w.verifyShots()
				w.check()
			case 2:
				w.restart()
				w.verifyAll()
			case 3:
				w.check()
			}
		}
		w.restart()
		w.verifyAll()
		w.verifyShots()
		w.verifySpace()
		w.check()
		if err := w.eng.Close(context.Background()); err != nil {
			t.Fatal(err)
		}
	})
}

// TestP2CrashAtEveryStep: the power goes or the daemon is killed between any two
// calls to the disk.
func TestP2CrashAtEveryStep(t *testing.T) {
	forStores(t, raced(20, 5), raced(4, 1), func(t *testing.T, k storeKind, rng *rand.Rand) {
		w := randomWorld(t, k, rng)
		for range k.fewer(12, raced(12, 5)) {
			countdown := 1 + w.rng.IntN(150)
			clone := stepsUntilPowerLoss(t, w.rng, w.fs, w.eng, countdown, w.step)
			if clone == nil {
				continue
			}
			w.note("power lost at disk call %d", countdown)
			w.goOnFrom(clone)
			w.verifyPrefix()
			w.verifyShots()
			w.check()
		}
	})
}

// stepsUntilPowerLoss does steps until the power goes at the given call to the disk,
// and returns what the disk then holds; nil if it did not come so far.
func stepsUntilPowerLoss(t *testing.T, rng *rand.Rand, fsys *vfs.Mem, eng *driver.Engine, countdown int, step func() error) (clone *vfs.Mem) {
	t.Helper()
	crashRNG := rand.New(rand.NewPCG(rng.Uint64(), 2))
	dead := make(chan struct{})
	var left *vfs.Mem // by the power loss; to be read when dead is closed
	var calls counter
	fsys.SetHook(func(op vfs.Op, name string) error {
		n := calls.next()
		if n == countdown {
			left = fsys.CrashClone(crashRNG)
			close(dead)
		}
		if n >= countdown {
			return vfs.ErrKilled
		}
		return nil
	})
	for range 400 {
		errc := make(chan error, 1)
		go func() { errc <- step() }()
		select {
		case err := <-errc:
			if errors.Is(err, vfs.ErrKilled) || errors.Is(err, block.ErrFailed) {
				<-dead // another goroutine's call is taking the picture
			} else if err != nil {
				t.Fatal(err)
			}
			select {
			case <-dead:
				fsys.Kill()
				eng.Abandon()
				return left
			default:
			}
		case <-dead:
			// The step may wait for the dead disk; it ends with the engine.
			fsys.Kill()
			ended := make(chan struct{})
			go func() { <-errc; close(ended) }()
			doomUntil(t, eng, ended)
			eng.Abandon()
			return left
		}
	}
	fsys.SetHook(nil)
	select {
	case <-dead: // behind the last step
		fsys.Kill()
		eng.Abandon()
		return left
	default:
		return nil
	}
}
