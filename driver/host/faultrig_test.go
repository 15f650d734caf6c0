package host

import (
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/rs/zerolog"

	"scoria/alba"
	"scoria/alba/albatest"
	"scoria/alba/asd"
	"scoria/alba/asd/asdtest"
	"scoria/alba/proxy"
	"scoria/driver"
	"scoria/driver/block"
	"scoria/driver/control"
)

// faultRig is a daemon with a volume in the object store, on storage daemons that can
// be made to fail, and a flat model of what the volume holds. Nothing of the volume is
// kept locally once it is stored, so that reads are reads of the store.
type faultRig struct {
	*testing.T
	h       *Host
	client  *control.Client
	cluster *albatest.Cluster
	active  []*albatest.Disk // those that are in use; the cluster has others to replace them
	next    int              // of the others
	policy  control.Policy   // that all objects are stored under when nothing is wrong
	rng     *rand.Rand

	dev     block.Device
	model   []byte
	regions []sync.Mutex // of faultRegion bytes of the model and the volume
	load    *faultLoad   // nil: none is running
}

const (
	faultVolume = 16 << 20
	faultRegion = 32 << 10
	faultSCO    = 1 << 20
	faultWrite  = "faults/v"
)

// newFaultRig starts a daemon with so many storage daemons, each a host of its own, and
// spare ones to replace them.
func newFaultRig(t *testing.T, disks, spare int, policies []control.Policy, rng *rand.Rand, change func(c *Config)) *faultRig {
	t.Helper()
	r := &faultRig{T: t, cluster: albatest.NewCluster(disks+spare, disks+spare), next: disks, policy: policies[0], rng: rng,
		model: make([]byte, faultVolume), regions: make([]sync.Mutex, faultVolume/faultRegion)}
	c := emptyConfig(t)
	c.Cache.Local, c.Cache.Read = 0, 0
	c.Backend.RepairLatency = Duration(10 * time.Second) // guests are slow here: that is no reason not to repair
	if change != nil {
		change(&c)
	}
	var err error
	r.h, err = StartOn(testContext(t), Parts{DialASD: r.dial, OpenEngine: openForgetful}, c, "test", zerolog.Nop())
	r.must(err)
	t.Cleanup(func() {
		r.pause()
		for _, d := range r.cluster.Disks {
			d.Faulty.Set(asdtest.Fault{})
		}
		stopHost(t, r.h)
	})
	r.client = control.NewClient(c.controlSocket())
	t.Cleanup(r.client.Close)
	for _, d := range r.cluster.Disks[:disks] {
		r.add(d)
	}
	ctx := testContext(t)
	r.must(second(r.client.CreatePreset(ctx, control.Preset{Name: "faults", Policies: policies, FragmentBytes: 128 << 10, FailureDomain: "host"})))
	r.must(second(r.client.CreatePool(ctx, control.CreatePool{Name: "faults", Preset: "faults", SCOSize: faultSCO})))
	r.must(second(r.client.CreateVolume(ctx, control.CreateVolume{Name: faultWrite, Size: faultVolume})))
	r.dev, err = r.h.volumes.Open(ctx, faultWrite)
	r.must(err)
	for i := range r.regions {
		r.must(r.write(i, 0, faultRegion, r.rng))
	}
	r.safe()
	return r
}

// openForgetful opens an engine with so little memory that hardly anything is read from it.
func openForgetful(ctx context.Context, c driver.Config) (Engine, error) {
	c.PoolBytes = faultVolume / 4 // the least that it takes
	return OpenEngine(ctx, c)
}

// dial implements proxy.Dial: an address is a disk's ID and a port that is none.
func (r *faultRig) dial(ctx context.Context, d alba.Device) (asd.Client, error) {
	d.Address = strings.TrimSuffix(d.Address, ":1")
	return r.cluster.Dial(ctx, d)
}

var _ proxy.Dial = (*faultRig)(nil).dial

// add takes a disk in.
func (r *faultRig) add(d *albatest.Disk) {
	r.Helper()
	r.must(second(r.client.AddASD(testContext(r.T), control.AddASD{Address: d.ID + ":1", Host: "host of " + d.ID})))
	r.active = append(r.active, d)
}

func (r *faultRig) must(err error) {
	r.Helper()
	if err != nil {
		r.Fatal(err)
	}
}

// await is await that gives up when the load has failed.
func (r *faultRig) await(what string, cond func() bool) {
	r.Helper()
	await(r.T, what, func() bool {
		if r.Failed() {
			r.FailNow()
		}
		if cond() {
			return true
		}
		time.Sleep(10 * time.Millisecond)
		return false
	})
}

// request carries out one request; it may be called from any goroutine.
func (r *faultRig) request(op block.Op, off, length uint64, p []byte) error {
	done := make(chan struct{})
	q := &block.Request{Op: op, Offset: off, Length: length, Complete: func(*block.Request) { close(done) }}
	if p != nil {
		q.Segments = [][]byte{p}
	}
	r.dev.Submit([]*block.Request{q})
	if q.Ended {
		return q.Err
	}
	timer := time.NewTimer(patience)
	defer timer.Stop()
	select {
	case <-done:
		return q.Err
	case <-timer.C:
		buf := make([]byte, 1<<20)
		return fmt.Errorf("%v of %d bytes at %d did not end\n%s", op, length, off, buf[:runtime.Stack(buf, true)])
	}
}

// write writes part of a region, of which half can be compressed.
func (r *faultRig) write(region int, off, n uint64, rng *rand.Rand) error {
	p := make([]byte, n)
	for i := 0; i+8 <= len(p); i += 8 {
		x := rng.Uint64()
		for j := range 8 {
			p[i+j] = byte(x >> (8 * (j &^ (i >> 9 & 1))))
		}
	}
	at := uint64(region)*faultRegion + off
	r.regions[region].Lock()
	defer r.regions[region].Unlock()
	copy(r.model[at:], p)
	return r.request(block.OpWrite, at, n, p)
}

func (r *faultRig) discard(region int) error {
	at := uint64(region) * faultRegion
	r.regions[region].Lock()
	defer r.regions[region].Unlock()
	clear(r.model[at : at+faultRegion])
	return r.request(block.OpDiscard, at, faultRegion, nil)
}

// read reads part of a region and compares it with the model.
func (r *faultRig) read(region int, off, n uint64) error {
	p := make([]byte, n)
	at := uint64(region)*faultRegion + off
	r.regions[region].Lock()
	defer r.regions[region].Unlock()
	if err := r.request(block.OpRead, at, n, p); err != nil {
		return fmt.Errorf("read %d bytes at %d: %w", n, at, err)
	}
	if want := r.model[at : at+n]; !bytes.Equal(p, want) {
		i := 0
		for p[i] == want[i] {
			i++
		}
		return fmt.Errorf("read %d bytes at %d: the first wrong one is at %d", n, at, at+uint64(i))
	}
	return nil
}

// faultLoad is a writer and two verifiers.
type faultLoad struct {
	stop          chan struct{}
	wg            sync.WaitGroup
	writes, reads atomic.Int64
}

// start sets the load to work.
func (r *faultRig) start() {
	l := &faultLoad{stop: make(chan struct{})}
	r.load = l
	each := func(n *atomic.Int64, fn func(rng *rand.Rand) error) {
		rng := rand.New(rand.NewPCG(r.rng.Uint64(), 0))
		l.wg.Go(func() {
			for tick := time.NewTicker(2 * time.Millisecond); ; <-tick.C {
				select {
				case <-l.stop:
					return
				default:
				}
				if err := fn(rng); err != nil {
					r.Error(err)
					return
				}
				n.Add(1)
			}
		})
	}
	each(&l.writes, r.someWrite)
	for range 2 {
		each(&l.reads, func(rng *rand.Rand) error {
			off := rng.Uint64N(faultRegion/512) * 512
			return r.read(rng.IntN(len(r.regions)), off, 512+rng.Uint64N((faultRegion-off)/512)*512)
		})
	}
}

// someWrite is mostly a write of whole clusters, at times of parts, a discard or a flush.
func (r *faultRig) someWrite(rng *rand.Rand) error {
	region := rng.IntN(len(r.regions))
	switch rng.IntN(16) {
	case 0:
		return r.request(block.OpFlush, 0, 0, nil)
	case 1:
		return r.discard(region)
	case 2, 3:
		off := rng.Uint64N(faultRegion/512) * 512
		return r.write(region, off, 512+rng.Uint64N(min(16, (faultRegion-off)/512))*512, rng)
	}
	off := rng.Uint64N(faultRegion/goldenCluster/2) * goldenCluster
	return r.write(region, off, faultRegion-off, rng)
}

// pause ends the load.
func (r *faultRig) pause() {
	if r.load != nil {
		close(r.load.stop)
		r.load.wg.Wait()
		r.load = nil
	}
}

// progress waits until the load has got somewhere, and that in the object store.
func (r *faultRig) progress() {
	r.Helper()
	n, l := r.h.objects.proxy.Counters(), r.load
	puts, gets, writes, reads := n.Puts.Load(), n.Reads.Load(), l.writes.Load(), l.reads.Load()
	r.await("the load to go on", func() bool {
		return n.Puts.Load() >= puts+2 && n.Reads.Load() >= gets+10 && l.writes.Load() >= writes+20 && l.reads.Load() >= reads+20
	})
}

// safe waits until every object is stored under the first policy and can lose as many
// disks as that says, and no upload is under way.
func (r *faultRig) safe() {
	r.Helper()
	var st control.BackendStatus
	defer func() {
		if r.Failed() {
			r.Logf("status: %+v", st)
		}
	}()
	r.await("all objects to be safe", func() bool {
		ctx := testContext(r.T)
		r.h.objects.proxy.Fleet().Poll(ctx)
		r.must(second(r.client.StartBackendJob(ctx, "repair")))
		var err error
		st, err = r.client.BackendStatus(ctx)
		r.must(err)
		objects := int64(0)
		for _, c := range st.Classes {
			for _, s := range c.Safety {
				if c.Policy != r.policy || s.Disks < r.policy.M {
					return false
				}
				objects += s.Objects
			}
		}
		return objects > 0 && st.Uploads == 0
	})
}

// verify has everything that is stored verified and says whether nothing was found.
func (r *faultRig) verify() bool {
	r.Helper()
	ctx := testContext(r.T)
	r.must(second(r.client.StartBackendJob(ctx, "verify")))
	var job control.BackendJob
	r.await("the verification to end", func() (ended bool) {
		var err error
		job, err = r.client.BackendJob(ctx, "verify")
		r.must(err)
		return job.State != "running"
	})
	if job.State != "done" || job.Message != "" {
		r.Logf("verify: %+v", job)
		return false
	}
	return job.Problems == 0
}

// settled makes sure that all is as if nothing had happened: every object safe, nothing
// bad found by a verification, the volume's log right, every byte as the model has it,
// and no trouble shown.
func (r *faultRig) settled(damaged bool) {
	r.Helper()
	r.must(r.request(block.OpFlush, 0, 0, nil))
	r.safe()
	for tries := 0; !r.verify(); tries++ {
		if !damaged || tries > 20 {
			r.Fatalf("a verification finds something, at try %d", tries)
		}
		ctx := testContext(r.T)
		r.must(second(r.client.StartBackendJob(ctx, "orphans")))
		r.safe()
	}
	for i := range r.regions {
		r.must(r.read(i, 0, faultRegion))
	}
	ctx := testContext(r.T)
	job, err := r.client.StartCheck(ctx, faultWrite)
	if err == nil {
		job, err = r.client.Await(ctx, job, nil)
	}
	if err != nil || len(job.Report.Problems) > 0 || job.Report.Clusters == 0 {
		r.Fatalf("check: %+v, %v", job, err)
	}
	var shown string
	defer func() {
		if r.Failed() {
			r.Log("shown at last: ", shown)
		}
	}()
	r.await("no trouble to show any more", func() bool {
		st, err := r.client.Status(testContext(r.T))
		r.must(err)
		v, err := r.client.Volume(testContext(r.T), faultWrite)
		r.must(err)
		shown = fmt.Sprint(st.Conditions, v.Conditions)
		return len(st.Conditions)+len(v.Conditions) == 0
	})
}

// corrupt changes a byte of everything that a disk has of objects and that was not
// changed before.
func corrupt(r *faultRig, d *albatest.Disk, changed map[string]bool) {
	for _, key := range d.Keys(r.T) {
		if (strings.HasPrefix(key, alba.FragmentPrefix) || strings.HasPrefix(key, alba.ShardPrefix)) && !changed[key] {
			changed[key] = true
			d.Model.Corrupt(key, 77)
		}
	}
}

// remove takes a disk out, or what came in its place.
func (r *faultRig) remove(d *albatest.Disk) {
	r.Helper()
	r.must(second(r.client.RemoveASD(testContext(r.T), d.ID, true)))
	r.active = slices.DeleteFunc(r.active, func(a *albatest.Disk) bool { return a == d })
}

// replace adds a disk that was not used before.
func (r *faultRig) replace() {
	r.Helper()
	r.add(r.cluster.Disks[r.next])
	r.next++
}
