package driver_test

import (
	"context"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"testing"

	"scoria/alba/vfs"
	"scoria/driver"
	"scoria/driver/block"
)

// kept is a snapshot of a rig beside the version of each cluster in it.
type kept struct {
	driver.Snapshot
	versions []uint64
}

// snap takes a snapshot when nobody writes.
func (r *rig) snap(name string) kept {
	r.t.Helper()
	s, err := r.vol.CreateSnapshot(context.Background(), randomID(r.rng), name, nil)
	r.must(err)
	r.cfg.Snapshots = append(r.cfg.Snapshots, s)
	k := kept{s, make([]uint64, len(r.history))}
	for c, h := range r.history {
		k.versions[c] = h[len(h)-1].version
	}
	return k
}

// unsnap deletes a snapshot.
func (r *rig) unsnap(k kept) {
	r.t.Helper()
	for i, s := range r.cfg.Snapshots {
		if s.ID == k.ID {
			r.cfg.Snapshots = append(r.cfg.Snapshots[:i:i], r.cfg.Snapshots[i+1:]...)
			break
		}
	}
	r.must(r.vol.DeleteSnapshot(context.Background(), k.ID))
}

// sees reads all of a snapshot, or of a clone of it.
func (r *rig) sees(k kept, dev block.Device) {
	r.t.Helper()
	if err := k.seen(dev); err != nil {
		r.t.Fatal(err)
	}
}

func (k *kept) seen(dev block.Device) error {
	buf := make([]byte, 64*cluster)
	for first := uint64(0); first < uint64(len(k.versions)); first += 64 {
		n := min(64, uint64(len(k.versions))-first)
		p := buf[:n*cluster]
		if err := do(dev, &block.Request{Op: block.OpRead, Offset: first * cluster, Length: uint64(len(p)), Segments: [][]byte{p}}); err != nil {
			return fmt.Errorf("snapshot %s: %w", k.Name, err)
		}
		for i := range n {
			version, ok := readStamp(p[i*cluster:(i+1)*cluster], first+i)
			if want := k.versions[first+i]; !ok || version != want {
				return fmt.Errorf("snapshot %s: cluster %d reads as version %d, ok %v; it is %d", k.Name, first+i, version, ok, want)
			}
		}
	}
	return nil
}

// seesAll reads snapshots by their views.
func (r *rig) seesAll(list ...kept) {
	r.t.Helper()
	for _, k := range list {
		view, err := r.vol.OpenSnapshot(context.Background(), k.ID)
		r.must(err)
		r.sees(k, view)
		r.must(view.Close())
	}
}

// settle seals, uploads and publishes everything, and deletes what has only to be
// deleted.
func (r *rig) settle() {
	r.t.Helper()
	for try := 0; try < 3 || !r.vol.Settled(); try++ {
		r.must(ignoreFull(r.vol.CheckpointAnew(context.Background())))
		r.vol.WaitSealed()
		for range 3 { // the one that waits, the one behind it, and what is dead
			_, err := r.vol.Publish(context.Background())
			r.must(err)
		}
		if try > 200 {
			r.t.Fatal("there is always something left to do")
		}
	}
}

// garbled fills a volume so that it has two snapshots in SCOs that are mostly garbage,
// all of it in the store.
func garbled(r *rig) (snaps []kept) {
	r.t.Helper()
	size := uint64(len(r.history))
	for i := range uint64(2) {
		r.must(r.write(0, size, 0))
		for k := range uint64(3) { // every SCO keeps some of it
			for c := uint64(0); c < size; c += 8 {
				r.must(r.write(c+k, 3+i, 0))
			}
		}
		snaps = append(snaps, r.snap(fmt.Sprint("s", i)))
	}
	r.must(r.write(size/10, size*6/10, 0))
	r.settle()
	return snaps
}

// compactedSCOs lists the SCOs of later generations in the store.
func (r *rig) compactedSCOs() (out []string) {
	r.t.Helper()
	for _, n := range r.stored("sco-") {
		if strings.Contains(n, ".") {
			out = append(out, n)
		}
	}
	return out
}

// exact compacts what can be and sees that nothing else takes space.
func (r *rig) exact() {
	r.t.Helper()
	r.settle()
	r.must(r.vol.CompactAll(context.Background()))
	r.settle()
	var want []string
	reached, _, err := r.vol.Reached(context.Background())
	r.must(err)
	for n := range reached {
		generation, clusters, pinned := r.vol.Generation(n)
		if pinned > 0 && clusters != pinned {
			r.t.Errorf("SCO %d has %d clusters, snapshots reach %d", n, clusters, pinned)
		}
		want = append(want, driver.ObjectName(n, generation))
	}
	have := map[string]bool{}
	for _, n := range r.stored("sco-") {
		have[n] = true
	}
	for _, n := range want {
		if !have[n] {
			r.t.Errorf("%s is reached and not in the store", n)
		}
		delete(have, n)
	}
	if len(have) > 0 {
		r.t.Errorf("the store has what nothing reaches: %v", have)
	}
}

// compactAndPublish compacts all that there is to compact and gives the space back.
func (r *rig) compactAndPublish() error {
	ctx := context.Background()
	if err := r.vol.CompactAll(ctx); err != nil {
		return err
	}
	if err := r.vol.CheckpointAnew(ctx); err != nil {
		return err
	}
	for range 2 {
		if _, err := r.vol.Publish(ctx); err != nil {
			return err
		}
	}
	return nil
}

// comesBack opens what a death left and sees that all is there, and that the work can
// be finished.
func (r *rig) comesBack(after string, snaps []kept) {
	r.t.Helper()
	r.reopen()
	r.verify(after, func(*effect) bool { return true })
	r.seesAll(snaps...)
	if rep, err := r.vol.Check(context.Background(), nil); err != nil || len(rep.Problems) > 0 {
		r.t.Fatalf("%s: check: %v %q", after, err, rep.Problems)
	}
	r.exact()
	r.seesAll(snaps...)
	r.check()
	if r.t.Failed() {
		r.t.Fatal(after)
	}
	r.close()
}

// TestP2CompactionCrashAtEveryStep: power is lost at any call to the disk, of the
// volume's or of its store's, while SCOs are compacted, the root that says so is written
// and published, and the old ones are deleted. The volume and its snapshots read as
// before, and when all is done no object too many is left.
func TestP2CompactionCrashAtEveryStep(t *testing.T) { overStores(t, testP2CompactionCrashAtEveryStep) }

func testP2CompactionCrashAtEveryStep(t *testing.T, k storeKind) {
	if testing.Short() {
		t.Skip("long")
	}
	r := newStillRig(t, k, rand.New(rand.NewPCG(5, 1)), 256, 4)
	r.wrap = func(s driver.Store) driver.Store { return copies{s} }
	r.create()
	snaps := garbled(r)
	type moment struct {
		call string
		fs   *vfs.Mem
	}
	var mu sync.Mutex
	var moments []moment
	fsys, n := r.fs, 0
	fsys.SetHook(func(op vfs.Op, file string) error {
		mu.Lock()
		defer mu.Unlock()
		if n++; op != vfs.OpRead && op != vfs.OpOpen {
			moments = append(moments, moment{fmt.Sprintf("power loss at call %d, %v of %s", n, op, file), fsys.CrashClone(r.rng)})
		}
		return nil
	})
	r.must(r.compactAndPublish())
	fsys.SetHook(nil)
	if len(r.compactedSCOs()) == 0 || len(moments) < 50 {
		t.Fatalf("%v were compacted in %d calls", r.compactedSCOs(), n)
	}
	t.Logf("%d moments", len(moments))
	r.exact()
	r.close()
	history := r.history
	for i := 0; i < len(moments); i += k.fewer(raced(1, 5), raced(25, 80)) {
		r.history = append([][]*effect(nil), history...)
		r.fs = moments[i].fs
		r.boot++
		r.comesBack(moments[i].call, snaps)
	}
}

// TestP3CompactionKilledAtEveryStep: likewise for the daemon's death.
func TestP3CompactionKilledAtEveryStep(t *testing.T) {
	overStores(t, testP3CompactionKilledAtEveryStep)
}

func testP3CompactionKilledAtEveryStep(t *testing.T, k storeKind) {
	if testing.Short() {
		t.Skip("long")
	}
	for call := 1; ; call += k.fewer(raced(9, 47), raced(91, 307)) {
		r := newStillRig(t, k, rand.New(rand.NewPCG(uint64(call), 9)), 256, 4)
		r.wrap = func(s driver.Store) driver.Store { return copies{s} }
		r.create()
		snaps := garbled(r)
		if _, died := r.killedAt(call, 100, r.compactAndPublish); !died {
			return
		}
		r.comesBack(fmt.Sprintf("kill at call %d", call), snaps)
	}
}

// TestP10CompactedFromTheStoreAlone: with the local disk lost, the store has the volume
// and its snapshots, whether or not the root that names the compacted SCOs got there.
func TestP10CompactedFromTheStoreAlone(t *testing.T) {
	overStores(t, testP10CompactedFromTheStoreAlone)
}

func testP10CompactedFromTheStoreAlone(t *testing.T, k storeKind) {
	for _, published := range []bool{false, true} {
		r := newStillRig(t, k, rand.New(rand.NewPCG(6, 1)), 1024, 8)
		r.wrap = func(s driver.Store) driver.Store { return copies{s} }
		r.create()
		ctx := context.Background()
		snaps := garbled(r)
		r.must(r.vol.CompactAll(ctx))
		r.must(r.vol.CheckpointAnew(ctx))
		if published {
			r.settle()
		}
		r.crash()
		for _, dir := range []string{"data/volumes", "run"} {
			r.must(r.fs.RemoveAll(dir))
		}
		r.start()
		found, err := r.eng.FindSnapshots(ctx, r.cfg)
		r.must(err)
		r.cfg.Snapshots = found
		r.mustOpen()
		r.verify("P10", func(*effect) bool { return true })
		r.seesAll(snaps...)
		r.check()
		r.exact()
		r.check()
		r.close()
	}
}

// TestCompactionAgain: deleting a snapshot leaves garbage in what was compacted for it,
// which is compacted once more, or relocated if no snapshot is left.
func TestCompactionAgain(t *testing.T) { overStores(t, testCompactionAgain) }

func testCompactionAgain(t *testing.T, k storeKind) {
	r := newStillRig(t, k, rand.New(rand.NewPCG(7, 1)), 1024, 8).create()
	snaps := garbled(r)
	r.exact()
	first := len(r.compactedSCOs())
	r.unsnap(snaps[0])
	r.exact()
	r.verify("the first snapshot is deleted", func(*effect) bool { return true })
	r.seesAll(snaps[1])
	r.check()
	r.unsnap(snaps[1])
	r.settle()
	r.must(r.vol.ScrubAll(context.Background()))
	r.settle()
	r.verify("no snapshot is left", func(*effect) bool { return true })
	r.check()
	reached, _, err := r.vol.Reached(context.Background())
	r.must(err)
	for n := range r.vol.Held() {
		if generation, clusters, _ := r.vol.Generation(n); generation > 0 && int(clusters) != reached[n] {
			t.Errorf("SCO %d, generation %d, has %d clusters and %d are live", n, generation, clusters, reached[n])
		}
	}
	if first < 2 {
		t.Errorf("%d SCOs were compacted", first)
	}
	r.close()
}

// TestP5ReadersOfWhatIsCompacted: a view, a clone and the volume are read all the time
// while the SCOs under them are compacted, put, deleted, and evicted.
func TestP5ReadersOfWhatIsCompacted(t *testing.T) { overStores(t, testP5ReadersOfWhatIsCompacted) }

func testP5ReadersOfWhatIsCompacted(t *testing.T, k storeKind) {
	r := newRig(t, k, rand.New(rand.NewPCG(8, 1)), 1024, 8)
	r.wrap = func(s driver.Store) driver.Store { return copies{s} }
	r.create()
	ctx := context.Background()
	last := garbled(r)[1]
	view, err := r.vol.OpenSnapshot(ctx, last.ID)
	r.must(err)
	cfg := r.cfg
	cfg.ID, cfg.Name, cfg.Snapshots = randomID(r.rng), "default/clone", nil
	r.must(r.eng.CreateClone(ctx, cfg, r.vol, last.ID))
	clone, err := r.eng.OpenVolume(ctx, cfg)
	r.must(err)
	c := r.newCrew()
	for _, dev := range []block.Device{view, clone} {
		c.run("reader of "+dev.Info().Name, 1, func(*rand.Rand) error { return last.seen(dev) })
	}
	c.run("reader", 2, func(rng *rand.Rand) error {
		first, n := span(rng, 0, 1024, 16)
		return r.read(first, n)
	})
	c.run("forgetter", 3, func(rng *rand.Rand) error {
		r.eng.ForgetRAM()
		r.eng.ForgetClusters()
		if rng.IntN(4) == 0 {
			r.vol.DropLocalCopies()
		}
		return r.flush()
	})
	before := r.vol.Stats().CompactedBytes
	for round := range uint64(k.fewer(raced(12, 4), 3)) {
		var old []kept
		for k := range uint64(3) { // each pins a little of a full volume
			for at := uint64(0); at < 1024; at += 64 {
				r.must(r.write(at, 60-8*k, 0))
			}
			r.must(r.write(round*20, 20, 0))
			old = append(old, r.snapBeside(fmt.Sprint("r", round, "-", k)))
		}
		r.must(r.vol.Checkpoint(ctx))
		r.vol.WaitSealed()
		r.must(r.vol.CompactAll(ctx))
		for range 3 {
			r.must(ignoreFull(r.vol.CheckpointAnew(ctx)))
			r.vol.WaitSealed()
			_, err := r.vol.Publish(ctx)
			r.must(err)
		}
		for _, k := range old {
			r.unsnap(k)
		}
	}
	c.fire()
	if n := r.vol.Stats().CompactedBytes - before; n < 1<<20 {
		t.Errorf("%d bytes were compacted", n)
	}
	r.sees(last, view)
	r.sees(last, clone)
	r.must(view.Close())
	for _, v := range []*driver.Volume{r.vol, clone} {
		rep, err := v.Check(ctx, nil)
		if err != nil || len(rep.Problems) > 0 {
			t.Fatalf("check: %v %q", err, rep.Problems)
		}
	}
	r.close()
}

// snapBeside takes a snapshot while others read.
func (r *rig) snapBeside(name string) kept {
	r.t.Helper()
	s, err := r.vol.CreateSnapshot(context.Background(), randomID(r.rng), name, nil)
	r.must(err)
	r.cfg.Snapshots = append(r.cfg.Snapshots, s)
	return kept{Snapshot: s}
}

// isGeneration reports whether a name in the store is a compacted SCO's.
