package driver_test

import (
	"context"
	"errors"
	"math/rand/v2"
	"strings"
	"syscall"
	"testing"
	"time"

	"scoria/alba/vfs"
	"scoria/driver"
)

// logFile says whether a file is of the log, not a compacted SCO.
func logFile(name string) bool {
	return strings.HasPrefix(name, "data/volumes/") && strings.HasSuffix(name, ".sco") && strings.Count(name, ".") == 1
}

// holdLog keeps the log from being written out until slow is closed; begun tells that it
// would be.
func (r *rig) holdLog() (slow, begun chan struct{}) {
	slow, begun = make(chan struct{}), make(chan struct{}, 1)
	r.fs.SetHook(func(op vfs.Op, name string) error {
		if op == vfs.OpOpen && logFile(name) {
			select {
			case begun <- struct{}{}:
			default:
			}
			<-slow
		}
		return nil
	})
	return slow, begun
}

// TestP8CompactionLeavesPromisedRoom: the room that is promised to what is in the write
// buffer is not taken by SCOs that are compacted meanwhile. Otherwise nothing could be
// flushed, nor go into the checkpoint for which the space of the old ones waits.
func TestP8CompactionLeavesPromisedRoom(t *testing.T) {
	overStores(t, testP8CompactionLeavesPromisedRoom)
}

func testP8CompactionLeavesPromisedRoom(t *testing.T, k storeKind) {
	const clusters = 1024
	ctx := context.Background()
	r := newStillRig(t, k, rand.New(rand.NewPCG(21, 1)), clusters, 16)
	r.reserve, r.cache = 4<<20, 1<<20
	r.create()
	snaps := garbled(r)
	slow, begun := r.holdLog()
	const written = 4
	room := int64(written + 2)
	if k.name == objects.name {
		room += written / 2 // for the parity
	}
	r.fs.SetCapacity(r.fs.Used() + r.reserve + room<<20)
	for first := range uint64(written) {
		r.must(r.write(first*256, 256, 0))
	}
	wait(t, "the log to be written out", begun)
	if err := r.vol.CompactAll(ctx); err != nil && !driver.IsNoRoom(err) && !errors.Is(err, syscall.ENOSPC) {
		t.Fatal(err)
	}
	flushed := make(chan error, 1)
	go func() { flushed <- r.flush() }()
	close(slow)
	r.must(func() error {
		for end := time.Now().Add(waitLimit); time.Now().Before(end); time.Sleep(time.Millisecond) {
			select {
			case err := <-flushed:
				return err
			default:
			}
			if r.has("disk-full") {
				t.Fatalf("the log has no room: %+v", r.vol.Stats().Conditions)
			}
		}
		t.Fatal("no flush ended")
		return nil
	}())
	r.fs.SetHook(nil)
	// As much as there is of it, all garbage is got rid of.
	err := errors.New("not tried yet")
	for try := 0; err != nil && try < 20; try++ {
		r.settle()
		err = r.vol.CompactAll(ctx)
		r.must(ignoreFull(err))
	}
	r.exact()
	r.verify("P8", func(*effect) bool { return true })
	r.seesAll(snaps...)
	r.check()
	r.close()
}

// TestP8FlattenOnAFullDisk: a clone is flattened as soon as the disk has room for that, or
// given up before; that it waited no longer shows then.
func TestP8FlattenOnAFullDisk(t *testing.T) { overStores(t, testP8FlattenOnAFullDisk) }

func testP8FlattenOnAFullDisk(t *testing.T, k storeKind) {
	for _, given := range []string{"room", "up"} {
		t.Run(given, func(t *testing.T) {
			ctx, cancel := context.WithCancel(context.Background())
			defer cancel()
			r := newRig(t, k, rand.New(rand.NewPCG(22, 1)), 1024, 8)
			r.reserve = 4 << 20
			r.create()
			r.must(r.write(0, 1024, 0))
			r.must(r.flush())
			s := r.snap("s")
			r.settle()
			cfg := r.cfg
			cfg.ID, cfg.Name, cfg.Snapshots = randomID(r.rng), "default/clone", nil
			r.must(r.eng.CreateClone(ctx, cfg, r.vol, s.ID))
			clone, err := r.eng.OpenVolume(ctx, cfg)
			r.must(err)
			r.fs.SetCapacity(r.fs.Used() + 2<<20) // storage daemons keep some of that
			flattened := make(chan error, 1)
			go func() { flattened <- clone.Flatten(ctx, nil) }()
			eventually(t, "it waits for room", func() bool { return hasCondition(clone, "disk-full") })
			if given == "up" {
				cancel()
				if err := wait(t, "it is given up", flattened); !errors.Is(err, context.Canceled) {
					t.Fatal(err)
				}
			}
			r.fs.SetCapacity(0)
			if given == "room" {
				r.must(wait(t, "the clone is flattened", flattened))
			}
			eventually(t, "the disk is no longer said to be full", func() bool {
				clone.Tick(time.Now().Add(time.Hour)) // what has ended lingers a little
				return !hasCondition(clone, "disk-full")
			})
			r.sees(s, clone)
			r.close()
		})
	}
}
