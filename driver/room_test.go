package driver_test

import (
	"context"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"syscall"
	"testing"
	"time"

	"scoria/alba"
	"scoria/alba/albatest"
	"scoria/driver"
	"scoria/driver/block"
)

// outage is volumes whose store is away while writers fill a small disk.
type outage struct {
	*rig
	store *moodyStore
	crew  *crew
	twins []*driver.Volume // on the same disk, in the same store
	span  uint64           // clusters that a write covers at most
}

// embedded is the store of an installation as it comes: one storage daemon, on the file
// system of the volumes, whose SCOs it links.
var embedded = storeKind{"embedded", openObjects(albatest.Preset(alba.Policy{K: 1, M: 0, C: 1, X: 1}))}

// outageCase is how the write buffer, the reserve and what else is free compare, in MiB,
// how many clusters a write covers at most, and the stores that this is tried with:
// objects has all of its storage daemons on the same disk, too.
type outageCase struct {
	buffer, reserve, free int64
	span                  uint64
	stores                []storeKind
}

// bufferFits is the case in which half of the reserve holds the buffer.
func bufferFits(stores ...storeKind) outageCase { return outageCase{4, 24, 16, 200, stores} }

// bufferLarge: the whole reserve does not hold it.
func bufferLarge(stores ...storeKind) outageCase { return outageCase{32, 24, 20, 200, stores} }

// bufferHuge: neither does the whole disk.
func bufferHuge(stores ...storeKind) outageCase { return outageCase{64, 24, 12, 200, stores} }

// sparse: every SCO has something left that is live, and so has to be stored.
func sparse(stores ...storeKind) outageCase { return outageCase{4, 8, 36, 4, stores} }

var outageCases = []outageCase{
	bufferFits(directory, embedded), bufferLarge(directory, objects), bufferHuge(embedded, objects), sparse(directory, objects),
}

// restarts is how a daemon ends, and when that is tried.
var restarts = []struct {
	how string
	outageCase
}{
	{"killed", bufferLarge(directory, objects)},
	{"stopped", bufferLarge(embedded)},
	{"without power", bufferLarge(objects)},
}

func forOutages(t *testing.T, cases []outageCase, fn func(t *testing.T, o *outage)) {
	for i, c := range cases {
		for _, k := range c.stores {
			free := c.free
			switch k.name { // the data of all volumes must find room, and what storage daemons need
			case embedded.name:
				free += 12
			case objects.name:
				free += 40
			}
			t.Run(fmt.Sprintf("%s %d of %d+%d", k.name, c.buffer, c.reserve, free), func(t *testing.T) {
				r, m := moodyRig(t, k, rand.New(rand.NewPCG(uint64(i), 6)), 1024, c.buffer, func(r *rig) {
					r.reserve, r.cache = c.reserve<<20, 1<<20
					r.fs.SetCapacity((c.buffer + 2 + c.reserve + free) << 20) // the buffer is on it, too
				})
				o := &outage{rig: r, store: m, span: c.span}
				o.openTwins()
				r.must(r.write(0, 1024, 0))
				r.must(r.flush())
				m.fail.Store(true)
				fn(t, o)
			})
		}
	}
}

func (o *outage) openTwins() {
	o.t.Helper()
	o.twins = nil
	for _, name := range []string{"default/left", "default/right"} {
		o.twins = append(o.twins, o.second(name))
	}
}

// hireWriters has every volume written over and over, until the crew is fired.
func (o *outage) hireWriters() {
	o.crew = o.newCrew()
	o.crew.run("writer", o.rng.Uint64(), func(rng *rand.Rand) error {
		first, n := span(rng, 0, 1024, o.span)
		time.Sleep(time.Millisecond) // a history that is too long takes long to look at
		return o.write(first, n, 0)
	})
	for _, v := range o.twins {
		data := make([]byte, min(100, o.span)*cluster)
		o.crew.run("twin's writer", o.rng.Uint64(), func(rng *rand.Rand) error {
			return do(v, &block.Request{Op: block.OpWrite, Offset: rng.Uint64N(900) * cluster, Length: uint64(len(data)), Segments: [][]byte{data}})
		})
	}
}

func (o *outage) awaitPause() {
	o.t.Helper()
	eventually(o.t, "writers pause and the reasons show", func() bool {
		return o.has("disk-full") && o.has("store-unreachable") && hasCondition(o.twins[0], "disk-full")
	})
}

// awaitMore waits until the writers have got a good deal further.
func (o *outage) awaitMore() {
	o.t.Helper()
	done := o.crew.ops.Load()
	eventually(o.t, "writers go on by themselves", func() bool { return o.crew.ops.Load() > done+100 || o.t.Failed() })
}

// end stops the writers and looks at what they have left.
func (o *outage) end() {
	o.t.Helper()
	o.crew.fire()
	o.must(o.flush())
	eventually(o.t, "everything is stored", func() bool { return o.vol.Stats().UploadBacklog == 0 })
	o.settled("disk-full", "disk-error", "store-unreachable", "write-buffer-full", "checkpoint-failed")
	o.verify("P8", func(*effect) bool { return true })
	o.check()
	o.close()
}

// TestP8OutageFillsTheDisk: what is in the write buffer has its room on the disk. When
// the store is away for so long that the disk is full, writers wait, visibly; what they
// have written is flushed and goes into checkpoints all the same, and when the store is
// back they go on.
func TestP8OutageFillsTheDisk(t *testing.T) {
	forOutages(t, outageCases, func(t *testing.T, o *outage) {
		o.hireWriters()
		o.awaitPause()
		o.must(o.flush())
		for _, v := range o.twins {
			o.must(do(v, &block.Request{Op: block.OpFlush}))
		}
		o.must(o.read(0, 200))
		if free, err := o.fs.Free("data"); err != nil || free < uint64(o.reserve)/2 {
			t.Errorf("%d bytes are free, the reserve is %d: %v", free, o.reserve, err)
		}
		o.store.fail.Store(false)
		o.awaitMore()
		o.end()
	})
}

// TestP8RestartOnAFullDisk: a daemon that ends or dies while writers wait is started
// again, with the store still away; it goes on when that is back, and also if it dies
// once more before the disk is drained.
func TestP8RestartOnAFullDisk(t *testing.T) {
	for _, c := range restarts {
		t.Run(c.how, func(t *testing.T) {
			forOutages(t, []outageCase{c.outageCase}, func(t *testing.T, o *outage) {
				o.hireWriters()
				o.awaitPause()
				o.restart(c.how)
				o.hireWriters()
				o.awaitPause()
				o.must(o.flush())
				backlog := o.vol.Stats().UploadBacklog
				o.store.fail.Store(false)
				eventually(t, "something is stored", func() bool { return o.vol.Stats().UploadBacklog < backlog })
				o.restart(c.how)
				o.hireWriters()
				o.awaitMore()
				o.end()
			})
		})
	}
}

// restart ends the daemon in some way and starts it again, and sees what it has kept.
func (o *outage) restart(how string) {
	o.t.Helper()
	o.crew.stop.Store(true)
	kept := int64(math.MaxInt64)
	switch how {
	case "killed":
		o.kill()
	case "stopped":
		o.close()
	default:
		kept = o.flushedBefore(o.clock.Add(1))
		o.crash()
	}
	o.crew.fire()
	o.reopen()
	o.openTwins()
	o.verify("P3", func(e *effect) bool { return e.end < kept })
}

// TestP8OthersFillTheDisk: somebody else takes all of the disk, again and again, whatever
// the volume does then; it waits, nothing fails, and it goes on when the room is back.
// Storage daemons of the rig are not opened anew when their disk has failed.
func TestP8OthersFillTheDisk(t *testing.T) {
	forSeeds(t, raced(3, 1), func(t *testing.T, rng *rand.Rand) {
		r, m := moodyRig(t, directory, rng, 2048, 8, func(r *rig) { r.reserve, r.cache = 4<<20, 1<<20 })
		o := &outage{rig: r, store: m, span: 200}
		o.hireWriters()
		o.crew.run("flusher", rng.Uint64(), func(*rand.Rand) error { return r.flush() })
		o.crew.run("discarder", rng.Uint64(), func(rng *rand.Rand) error {
			first, n := span(rng, 0, 2000, 100)
			time.Sleep(5 * time.Millisecond)
			return r.discard(first, n)
		})
		o.crew.run("unaligned writer", rng.Uint64(), func(rng *rand.Rand) error {
			data := make([]byte, 1024) // nobody else writes there: the history knows whole clusters only
			return do(r.vol, &block.Request{Op: block.OpWrite, Offset: 2048*cluster - 512 - 1024, Length: 1024, Segments: [][]byte{data}})
		})
		for range 4 {
			for done := o.crew.ops.Load(); o.crew.ops.Load() < done+50+rng.Int64N(400) && !t.Failed(); {
				r.must(r.chore(context.Background(), rng))
			}
			r.fs.SetCapacity(1)
			eventually(t, "writers pause", func() bool { return r.has("disk-full") || t.Failed() })
			for range 5 {
				if err := r.vol.Checkpoint(context.Background()); err != nil && !driver.IsNoRoom(err) && !errors.Is(err, syscall.ENOSPC) {
					t.Errorf("checkpoint: %v", err)
				}
			}
			r.fs.SetCapacity(0)
			o.awaitMore()
		}
		o.end()
	})
}
