package host

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"

	"scoria/alba"
	"scoria/alba/albatest"
	"scoria/alba/asd/asdtest"
	"scoria/driver"
	"scoria/driver/block"
	"scoria/driver/control"
)

// twoLost is a rig with 2+1 on three storage daemons, of which the first two are to go.
func twoLost(t *testing.T, spare int) *faultRig {
	r := newFaultRig(t, 3, spare, []control.Policy{{K: 2, M: 1, C: 3, X: 1}}, rand.New(rand.NewPCG(1, 2)), nil)
	r.await("nothing but the log's head to be kept locally", func() bool {
		st := r.h.volumes.device(faultWrite).Stats()
		return st.UploadBacklog == 0 && st.Space.Local == 0
	})
	return r
}

// volumeShows says whether the volume has a condition with these words.
func (r *faultRig) volumeShows(code string, words ...string) bool {
	r.Helper()
	return shows(r.T, r.client, faultWrite, code, words...)
}

// unreadable is how many objects can't be read, by what `scoria backend status` says.
func (r *faultRig) unreadable() (objects int64) {
	r.Helper()
	st, err := r.client.BackendStatus(testContext(r.T))
	r.must(err)
	for _, c := range st.Classes {
		for _, s := range c.Safety {
			if s.Disks < 0 {
				objects += s.Objects
			}
		}
	}
	return objects
}

// TestP8MoreDisksAwayThanParity: while more storage daemons are away than may be,
// reads of what only they have wait, and the volume, the daemon's status and that of
// the store say so and name them; writes go on, as do reads of what is written; and
// when they are back all of it ends well, without anybody's help.
func TestP8MoreDisksAwayThanParity(t *testing.T) {
	for _, kinds := range [][2]asdtest.Fault{{{Down: true}, {Down: true}}, {{Stopped: true}, {Stopped: true}}, {{Down: true}, {Stopped: true}}} {
		t.Run(fmt.Sprintf("%v %v", kinds[0].Stopped, kinds[1].Stopped), func(t *testing.T) {
			t.Parallel()
			moreAway(twoLost(t, 0), kinds)
		})
	}
}

func moreAway(r *faultRig, kinds [2]asdtest.Fault) {
	for i, f := range kinds {
		r.active[i].Faulty.Set(f)
	}
	const waiting = 16
	read := make(chan error, waiting)
	for i := range waiting {
		go func() { read <- r.read(i, 0, faultRegion) }()
	}
	r.await("reads that wait to be told", func() bool { return r.volumeShows("store-unreadable") })
	// Whole clusters, and more of them than a SCO has.
	for i := waiting; i < waiting+3*faultSCO/faultRegion; i++ {
		r.must(r.write(i, 0, faultRegion, r.rng))
		r.must(r.read(i, 0, faultRegion))
	}
	r.must(r.request(block.OpFlush, 0, 0, nil))
	r.await("uploads that wait to be told", func() bool { return r.volumeShows("store-unreachable") })
	r.await("the objects that can't be read to be counted", func() bool { return r.unreadable() > 0 })
	r.await("the disks to be named", func() bool {
		st, err := r.client.Status(testContext(r.T))
		r.must(err)
		text := fmt.Sprint(st.Conditions)
		return strings.Contains(text, "asd-down") && strings.Contains(text, r.active[0].ID) && strings.Contains(text, r.active[1].ID)
	})
	r.await("the wait to name what is missing", func() bool {
		return r.volumeShows("store-unreadable", "of 3 shards", "needed are 2", r.active[0].ID, r.active[1].ID)
	})
	if len(read) == waiting { // some may lie whole on the disk that is left
		r.Fatal("no read waits")
	}
	for i := range kinds {
		r.active[i].Faulty.Set(asdtest.Fault{})
	}
	r.await("the reads to end", func() bool { return len(read) == waiting })
	for range waiting {
		r.must(<-read)
	}
	r.settled(false)
}

// TestP5MoreIsLostThanParity: reads of what is damaged or was given up on more disks than
// may be fail, at once and each time, with an error that says so, as do writes of parts of
// a cluster; the volume shows it. What is written over is whole again; and
// when the disks are as they were, all of it can be read.
func TestP5MoreIsLostThanParity(t *testing.T) {
	t.Run("corrupt", func(t *testing.T) {
		t.Parallel()
		r := twoLost(t, 0)
		keys := map[string][]string{}
		for _, d := range r.active[:2] {
			keys[d.ID] = d.Keys(t)
		}
		flip := func() {
			for _, d := range r.active[:2] {
				flipFragments(d, keys[d.ID])
			}
		}
		moreLost(r, flip, flip, "checksum")
	})
	t.Run("removed", func(t *testing.T) {
		t.Parallel()
		r := twoLost(t, 0)
		gone := []*albatest.Disk{r.active[0], r.active[1]}
		moreLost(r, func() {
			for _, d := range gone {
				r.remove(d)
				d.Faulty.Set(asdtest.Fault{Down: true}) // pulled out
			}
		}, func() {
			for _, d := range gone {
				d.Faulty.Set(asdtest.Fault{})
				r.add(d)
			}
		}, gone[0].ID)
	})
}

// flipFragments changes all blocks of the fragments among a disk's values, or changes
// them back.
func flipFragments(d *albatest.Disk, keys []string) {
	for _, key := range keys {
		if strings.HasPrefix(key, alba.FragmentPrefix) {
			for off := int64(0); d.Model.Corrupt(key, off); off += goldenCluster {
			}
		}
	}
}

func moreLost(r *faultRig, lose, bringBack func(), word string) {
	lose()
	var lost []int
	for i := range r.regions {
		err := r.read(i, 0, faultRegion)
		switch {
		case err == nil: // in memory, or whole on the disk that is left
		case errors.Is(err, driver.ErrLost) && errors.Is(err, block.ErrCorrupt) && strings.Contains(err.Error(), "of 3 shards") && strings.Contains(err.Error(), word):
			lost = append(lost, i)
		default:
			r.Fatalf("read of what is lost: %v", err)
		}
	}
	if len(lost) < len(r.regions)/4 {
		r.Fatalf("%d of %d reads failed: the test reads elsewhere", len(lost), len(r.regions))
	}
	if !r.volumeShows("data-lost", "of 3 shards") {
		r.Fatal("the loss does not show")
	}
	for _, i := range lost[1:4] {
		r.must(r.write(i, 0, faultRegion, r.rng))
		r.must(r.read(i, 0, faultRegion))
	}
	r.must(r.request(block.OpFlush, 0, 0, nil))
	var failed error
	for at := uint64(lost[0]) * faultRegion; failed == nil && at < uint64(lost[0]+1)*faultRegion; at += goldenCluster {
		failed = r.request(block.OpWrite, at+512, 512, r.model[at+512:][:512]) // of what is there
	}
	if !errors.Is(failed, driver.ErrLost) {
		r.Fatalf("writes of parts of clusters that are lost: %v", failed)
	}
	bringBack()
	for i := range r.regions {
		r.must(r.read(i, 0, faultRegion))
	}
	r.settled(true)
}

// TestP5LostForGoodIsWrittenOver: what is on disks that never come back is gone, and shows
// no more, when it was written over and no snapshot has it: nothing of it is needed to
// give its space back.
func TestP5LostForGoodIsWrittenOver(t *testing.T) {
	t.Parallel()
	r := twoLost(t, 2)
	for _, d := range []*albatest.Disk{r.active[0], r.active[1]} {
		r.remove(d)
		d.Faulty.Set(asdtest.Fault{Down: true})
	}
	r.replace()
	r.replace()
	lost := 0
	for i := range r.regions {
		if err := r.read(i, 0, faultRegion); errors.Is(err, driver.ErrLost) {
			lost++
		}
	}
	if lost == 0 || r.unreadable() == 0 || !r.volumeShows("data-lost") {
		r.Fatalf("%d reads failed, %d objects are lost", lost, r.unreadable())
	}
	for i := range r.regions {
		r.must(r.write(i, 0, faultRegion, r.rng))
	}
	r.must(r.request(block.OpFlush, 0, 0, nil))
	// A snapshot that has none of it is looked at, too.
	r.must(second(r.client.CreateSnapshot(testContext(t), faultWrite, control.CreateSnapshot{Name: "later"})))
	r.settled(true)
}
