package driver_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync/atomic"
	"testing"

	"scoria/alba/vfs"
	"scoria/driver"
	"scoria/driver/block"
)

func isGeneration(name string) bool {
	return strings.HasPrefix(name, "sco-") && strings.Contains(name, ".")
}

// TestP8CompactionAndTheStore: a store that does not take a compacted SCO, hangs, does
// not give it back, gives back something else or does not delete the old one costs
// nothing but space, until it works again.
func TestP8CompactionAndTheStore(t *testing.T) { overStores(t, testP8CompactionAndTheStore) }

func testP8CompactionAndTheStore(t *testing.T, k storeKind) {
	type trouble struct {
		what string
		set  func(s *liar, give func())
		ok   bool // the compaction succeeds
	}
	for _, c := range []trouble{
		{what: "no put", set: func(s *liar, _ func()) {
			s.on(func(_ context.Context, name string) error {
				if isGeneration(name) {
					return errAway
				}
				return nil
			}, nil)
		}},
		{what: "a put hangs", set: func(s *liar, give func()) {
			s.on(func(ctx context.Context, name string) error {
				if !isGeneration(name) {
					return nil
				}
				give()
				<-ctx.Done()
				return ctx.Err()
			}, nil)
		}},
		{what: "no answer", set: func(s *liar, _ func()) { s.lie.Store(1) }},
		{what: "a lie", set: func(s *liar, _ func()) { s.lie.Store(2) }},
		{what: "no deletion", ok: true, set: func(s *liar, _ func()) {
			s.on(nil, func(name string) error {
				if strings.HasPrefix(name, "sco-") {
					return errAway
				}
				return nil
			})
		}},
	} {
		t.Run(c.what, func(t *testing.T) {
			s := &liar{}
			r := newStillRig(t, k, rand.New(rand.NewPCG(9, 1)), 1024, 8)
			r.wrap = func(inner driver.Store) driver.Store {
				s.Store = copies{inner}
				return s
			}
			r.create()
			snaps := garbled(r)
			before := r.stored("sco-")
			ctx, give := context.WithCancel(context.Background())
			defer give()
			c.set(s, give)
			if err := r.vol.CompactAll(ctx); (err == nil) != c.ok {
				t.Fatalf("compaction: %v", err)
			}
			r.must(r.vol.CheckpointAnew(context.Background()))
			for range 2 {
				if _, err := r.vol.Publish(context.Background()); err != nil && !errors.Is(err, errAway) {
					t.Fatal(err)
				}
			}
			s.lie.Store(0) // reading is what shows whether anything is lost
			for _, n := range before {
				if _, err := r.cfg.Store.Size(context.Background(), r.cfg.ID.String(), n); err != nil {
					t.Errorf("%s: %v", n, err)
				}
			}
			r.seesAll(snaps...)
			r.check()
			r.crash().reopen()
			r.verify("while the store is in trouble", func(*effect) bool { return true })
			r.seesAll(snaps...)
			s.on(nil, nil)
			r.exact()
			r.verify("after it", func(*effect) bool { return true })
			r.seesAll(snaps...)
			r.check()
			r.close()
		})
	}
}

// liar is a store that can be made to give compacted SCOs back wrong.
type liar struct {
	touchyStore
	lie atomic.Int32 // 1: it does not answer, 2: it changes a byte
}

func (l *liar) ReadAt(ctx context.Context, ns, name string, p []byte, off int64) error {
	how := l.lie.Load()
	if how == 1 && isGeneration(name) {
		return errAway
	}
	err := l.Store.ReadAt(ctx, ns, name, p, off)
	if how == 2 && isGeneration(name) && off == cluster {
		p[17] ^= 1
	}
	return err
}

// TestP8CompactionAndTheDisk: a disk that is full, or fails a write or a sync of the new
// file, keeps the SCO as it was; flushes go on.
func TestP8CompactionAndTheDisk(t *testing.T) { overStores(t, testP8CompactionAndTheDisk) }

func testP8CompactionAndTheDisk(t *testing.T, k storeKind) {
	for _, op := range []vfs.Op{vfs.OpWrite, vfs.OpSync, vfs.OpOpen} {
		t.Run(fmt.Sprint(op), func(t *testing.T) {
			r := newStillRig(t, k, rand.New(rand.NewPCG(10, 1)), 1024, 8).create()
			snaps := garbled(r)
			before := r.stored("sco-")
			r.fs.SetHook(func(o vfs.Op, name string) error {
				if o == op && strings.HasSuffix(name, ".sco") && strings.Count(name, ".") == 2 {
					return errAway
				}
				return nil
			})
			if err := r.vol.CompactAll(context.Background()); !errors.Is(err, errAway) {
				t.Fatalf("compaction: %v", err)
			}
			r.fs.SetHook(nil)
			r.settle()
			if after := r.stored("sco-"); fmt.Sprint(after) != fmt.Sprint(before) {
				t.Errorf("the store has %v, it had %v", after, before)
			}
			names, err := r.fs.List("data/volumes/" + r.cfg.ID.String() + "/sco")
			r.must(err)
			for _, n := range names {
				if strings.Count(n, ".") == 2 {
					t.Errorf("%s is left", n)
				}
			}
			r.must(r.write(3, 1, 0))
			r.must(r.flush())
			r.seesAll(snaps...)
			r.exact()
			r.verify("after it", func(*effect) bool { return true })
			r.seesAll(snaps...)
			r.check()
			r.close()
		})
	}
}

// TestCheckFindsWrongCompaction: a compacted SCO that is damaged anywhere, in one copy,
// or that lacks what a snapshot reaches, is reported; and never reads as another.
func TestCheckFindsWrongCompaction(t *testing.T) { overStores(t, testCheckFindsWrongCompaction) }

func testCheckFindsWrongCompaction(t *testing.T, k storeKind) {
	ctx := context.Background()
	r := newStillRig(t, k, rand.New(rand.NewPCG(11, 1)), 1024, 8)
	r.wrap = func(s driver.Store) driver.Store { return copies{s} }
	r.create()
	garbled(r)
	r.exact()
	name := r.compactedSCOs()[0]
	r.close()
	file := "data/volumes/" + r.cfg.ID.String() + "/sco/" + strings.TrimPrefix(name, "sco-") + ".sco"
	info, err := r.fs.Stat(file)
	r.must(err)
	for _, s := range r.scoSpots(file, info.Size()) {
		for what, flip := range map[string]func(){
			"the local copy": func() { r.must(r.fs.Corrupt(s.file, s.off)) },
			"the store's":    func() { r.damage(name, s.off) },
		} {
			r.start()
			flip()
			r.mustOpen()
			rep, err := r.vol.Check(ctx, nil)
			if err != nil || len(rep.Problems) == 0 {
				t.Errorf("%s of %s of %s is damaged: %v %q", s.what, what, name, err, rep.Problems)
			}
			flip() // back
			r.close()
		}
	}
	r.reopen()
	r.check()
	r.close()
}

// TestCheckFindsWhatWasNotKept: see there.
func TestCheckFindsWhatWasNotKept(t *testing.T) { overStores(t, testCheckFindsWhatWasNotKept) }

func testCheckFindsWhatWasNotKept(t *testing.T, k storeKind) {
	ctx := context.Background()
	r := newStillRig(t, k, rand.New(rand.NewPCG(12, 1)), 1024, 8).create()
	snaps := garbled(r)
	lost, err := r.vol.CompactWrongly(ctx)
	r.must(err)
	r.settle()
	r.eng.ForgetRAM()
	r.eng.ForgetClusters()
	rep, err := r.vol.Check(ctx, nil)
	if text := fmt.Sprint(rep.Problems); err != nil || !strings.Contains(text, "was not kept") {
		t.Errorf("check: %v %q", err, rep.Problems)
	}
	wrong := 0
	buf := make([]byte, cluster)
	for _, k := range snaps {
		view, err := r.vol.OpenSnapshot(ctx, k.ID)
		r.must(err)
		for c, want := range k.versions {
			if err := do(view, readOf(uint64(c), buf)); err != nil {
				if !errors.Is(err, block.ErrCorrupt) {
					t.Errorf("cluster %d: %v", c, err)
				}
				wrong++
			} else if version, ok := readStamp(buf, uint64(c)); !ok || version != want {
				t.Errorf("P5: cluster %d reads as version %d, it is %d", c, version, want)
			}
		}
		r.must(view.Close())
	}
	if wrong == 0 || wrong > 2 {
		t.Errorf("%d clusters can't be read, %s was not kept", wrong, lost)
	}
	r.close()
}

// TestCompactedSCOLost: the generation that counts is gone; the one before it, which a
// crash kept from being deleted, takes its place.
func TestCompactedSCOLost(t *testing.T) { overStores(t, testCompactedSCOLost) }

func testCompactedSCOLost(t *testing.T, k storeKind) {
	r := newStillRig(t, k, rand.New(rand.NewPCG(13, 1)), 1024, 8)
	r.wrap = func(s driver.Store) driver.Store { return copies{s} }
	r.create()
	ctx := context.Background()
	snaps := garbled(r)
	r.must(r.vol.CompactAll(ctx))
	r.must(r.vol.CheckpointAnew(ctx)) // on the local disk only
	ns := r.cfg.ID.String()
	names := r.compactedSCOs()
	for _, n := range names {
		r.must(r.cfg.Store.Delete(ctx, ns, n, 1))
	}
	r.crash()
	for _, n := range names {
		r.must(r.fs.Remove("data/volumes/" + ns + "/sco/" + strings.TrimPrefix(n, "sco-") + ".sco"))
	}
	r.reopen()
	r.verify("the generation before", func(*effect) bool { return true })
	r.seesAll(snaps...)
	r.check()
	r.exact()
	r.seesAll(snaps...)
	r.check()
	r.close()
}

// TestP2CompactedBehindTheCheckpoint: with only a root from before them, compacted SCOs
// can't be replayed: the volume is refused, not opened with less than it had.
func TestP2CompactedBehindTheCheckpoint(t *testing.T) {
	overStores(t, testP2CompactedBehindTheCheckpoint)
}

func testP2CompactedBehindTheCheckpoint(t *testing.T, k storeKind) {
	ctx := context.Background()
	r := newStillRig(t, k, rand.New(rand.NewPCG(14, 1)), 1024, 8)
	r.wrap = func(s driver.Store) driver.Store { return copies{s} }
	r.create()
	r.must(r.write(0, 5, 0))
	r.settle()
	old := r.stored("root-")[0]
	size, err := r.cfg.Store.Size(ctx, r.cfg.ID.String(), old)
	r.must(err)
	root := make([]byte, size)
	r.must(r.cfg.Store.ReadAt(ctx, r.cfg.ID.String(), old, root, 0))
	garbled(r)
	r.exact()
	for _, n := range r.stored("root-") {
		r.must(r.cfg.Store.Delete(ctx, r.cfg.ID.String(), n, 1))
	}
	r.must(r.cfg.Store.Put(ctx, r.cfg.ID.String(), old, 1, driver.Object{Data: bytes.NewReader(root), Size: size}))
	r.crash()
	r.must(r.fs.RemoveAll("data/volumes"))
	r.start()
	if err := r.tryOpen(); !errors.Is(err, block.ErrCorrupt) {
		t.Fatalf("opened: %v", err)
	}
	r.close()
}
