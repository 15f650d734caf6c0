package integration

import (
	"context"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"scoria/driver/control"
	"scoria/integration/bed"
)

// diskRig is a volume in the object store, 2+2 on six scoria-asd, each on a small file
// system of its own and behind a relay, and fio, which writes and verifies the volume
// over NBD. Nothing of the volume is kept locally once it is stored.
type diskRig struct {
	*env
	client     *control.Client
	rng        *rand.Rand
	disks      []*rigDisk
	load       *bed.Process // fio, which writes; nil: there is no load
	reader     chan error   // why the fio that reads ended
	stopReader context.CancelFunc
	uri        string
	fixed      string // file with what the first rigFixed MiB of the volume hold
}

const (
	rigDisks  = 6
	rigParity = 2  // disks that may be lost
	rigFixed  = 24 // MiB of the volume that are written once and read all the time
	rigLoad   = 16 // MiB behind it that fio writes over and over
	rigVolume = "faults/v"
	rigPolicy = "2,2,4,1"
)

// rigDisk is a disk of its own with one storage daemon after the other.
type rigDisk struct {
	*asdProcess
	mount   string
	id      string // of the storage daemon that is in use
	relay   *slowRelay
	started int // how many storage daemons there were
}

// startDiskRig starts all of it but the load.
func startDiskRig(t *testing.T, rng *rand.Rand) *diskRig {
	r := &diskRig{env: prepare(t), rng: rng}
	r.Config = filepath.Join(r.DataDir, "scoria.toml")
	// No storage daemon within scoriad. Guests are slow here; that is no reason not to repair.
	r.must(os.WriteFile(r.Config, fmt.Appendf(nil, "data_dir = %q\nrun_dir = %q\n[write_buffer]\nsize = \"64M\"\n[cache]\nlocal = \"0\"\nread = \"0\"\n"+
		"[pool]\nstore = \"directory\"\n[backend]\nrepair_latency = \"10s\"\n", r.DataDir, r.RunDir), 0o600))
	r.must(r.Start(r.ctx))
	r.client = control.NewClient(r.ControlSocket())
	t.Cleanup(r.client.Close)
	for range rigDisks {
		d := &rigDisk{mount: smallDisk(t, "128M")}
		r.disks = append(r.disks, d)
		r.newASD(d)
	}
	r.ok(r.CLI(r.ctx, "preset", "create", "faults", "--policy", rigPolicy, "--fragment-size", "128K"))
	r.ok(r.CLI(r.ctx, "pool", "create", "faults", "--preset", "faults", "--sco-size", "1M"))
	r.ok(r.CLI(r.ctx, "volume", "create", rigVolume, "--size", fmt.Sprintf("%dM", rigFixed+rigLoad)))
	r.uri = "nbd+unix:///" + rigVolume + "?socket=" + r.NBDSocket()
	fixed := fmt.Sprintf("--size=%dM", rigFixed)
	r.run("fio", r.fio("--do_verify=0", "--name=lay", "--rw=write", "--bs=16k", fixed, "--end_fsync=1")...)
	r.fixed = filepath.Join(scratch(t, false), "fixed")
	r.run("nbdcopy", r.uri, r.fixed)
	r.must(os.Truncate(r.fixed, rigFixed<<20))
	r.safe()
	r.must(r.Stop(r.ctx)) // and what it had in memory is gone
	r.restart()
	return r
}

// rigASD are arguments of the storage daemons.
var rigASD = []string{"--reserve", "8M"}

// newASD runs a new storage daemon on an empty disk and takes it in.
func (r *diskRig) newASD(d *rigDisk) {
	r.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	r.must(err)
	dir := filepath.Join(d.mount, fmt.Sprintf("asd%d-%d", slices.Index(r.disks, d), d.started))
	d.asdProcess = &asdProcess{dir: dir, address: l.Addr().String()}
	r.must(l.Close())
	d.started++
	d.relay = relayTo(r.T, d.address)
	r.runASD(d.asdProcess, rigASD...)
	var added control.ASD
	r.must(r.CLIJSON(r.ctx, &added, "asd", "add", d.relay.address()))
	d.id = added.ID
}

// again runs a disk's storage daemon again, which was killed.
func (r *diskRig) again(d *rigDisk) { r.runASD(d.asdProcess, rigASD...) }

// tryAgain is again for one that may refuse to start.
func (r *diskRig) tryAgain(d *rigDisk) { r.spawnASD(d.asdProcess, rigASD...) }

// signal signals a disk's storage daemon.
func (r *diskRig) signal(p *bed.Process, s syscall.Signal) {
	r.Helper()
	r.must(syscall.Kill(p.PID(), s))
}

// giveUp removes a disk's storage daemon from the store.
func (r *diskRig) giveUp(d *rigDisk) {
	r.Helper()
	r.ok(r.CLI(r.ctx, "asd", "remove", "--force", d.id))
}

// replace puts an empty disk in a disk's place, whose storage daemon was given up.
func (r *diskRig) replace(d *rigDisk) {
	r.Helper()
	r.must(d.Kill())
	r.must(os.RemoveAll(d.dir))
	r.newASD(d)
}

// fill fills a disk with a file beside the storage daemon, but for so many bytes.
func (r *diskRig) fill(d *rigDisk, leave int64) {
	r.Helper()
	f, err := os.Create(filepath.Join(d.mount, "ballast"))
	r.must(err)
	defer f.Close()
	at := int64(0)
	for step := int64(8 << 20); step >= 4096; {
		var st unix.Statfs_t
		r.must(unix.Fstatfs(int(f.Fd()), &st))
		if int64(st.Bavail)*st.Bsize-leave >= step && unix.Fallocate(int(f.Fd()), 0, at, step) == nil {
			at += step
			continue
		}
		step /= 2
	}
}

func (r *diskRig) unfill(d *rigDisk) {
	r.Helper()
	r.must(os.Remove(filepath.Join(d.mount, "ballast")))
}

// flip changes a byte of each file of a disk's storage daemon below one of its
// directories whose name has the ending, and returns how to change them back.
func (r *diskRig) flip(d *rigDisk, below, ending string) (undo func()) {
	r.Helper()
	offsets := map[string]int64{}
	r.must(filepath.WalkDir(filepath.Join(d.dir, below), func(name string, e fs.DirEntry, err error) error {
		if os.IsNotExist(err) { // deleted meanwhile
			return nil
		}
		if err != nil || e.IsDir() || !strings.HasSuffix(name, ending) {
			return err
		}
		if info, err := e.Info(); err == nil && info.Size() > 0 {
			if at := r.rng.Int64N(info.Size()); flipByte(name, at) == nil {
				offsets[name] = at
			}
		}
		return nil
	}))
	if len(offsets) == 0 {
		r.Fatalf("no *%s below %s of %s", ending, below, d.dir)
	}
	return func() {
		for name, at := range offsets {
			_ = flipByte(name, at) // or it was replaced meanwhile
		}
	}
}

func flipByte(name string, at int64) error {
	f, err := os.OpenFile(name, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	b := make([]byte, 1)
	if _, err := f.ReadAt(b, at); err != nil {
		return err
	}
	b[0] ^= 0x10
	_, err = f.WriteAt(b, at)
	return err
}

// fio is a command line of fio for the volume.
func (r *diskRig) fio(args ...string) []string {
	return append([]string{"--thread", "--ioengine=nbd", "--uri=" + r.uri, "--verify=crc32c", "--verify_fatal=1", "--verify_state_save=0",
		"--aux-path=" + r.DataDir, "--eta=never"}, args...)
}

// startLoad has fio write and verify one part of the volume, and read and verify another.
func (r *diskRig) startLoad() {
	r.Helper()
	log := filepath.Join(r.DataDir, "fio.log")
	p, err := bed.Start(bed.Spec{Path: "/usr/bin/fio", Log: log, Args: r.fio("--name=write", "--time_based", "--runtime=1h", "--thinktime=4ms",
		"--rw=randwrite", "--bsrange=4k-64k", "--iodepth=4", "--fsync=64", "--verify_backlog=64",
		fmt.Sprintf("--offset=%dM", rigFixed), fmt.Sprintf("--size=%dM", rigLoad))})
	r.must(err)
	r.load = p
	ctx, stop := context.WithCancel(r.ctx)
	r.reader, r.stopReader = make(chan error, 1), stop
	// With the nbd engine, a job that reads and verifies ends after each pass.
	read := r.fio("--name=read", "--rw=randread", "--bs=16k", "--iodepth=2", "--thinktime=4ms", fmt.Sprintf("--size=%dM", rigFixed))
	go func() {
		for {
			if _, err := bed.Run(ctx, "fio", read...); err != nil {
				r.reader <- err
				return
			}
		}
	}()
	r.Cleanup(func() {
		stop()
		if err := p.Kill(); err != nil {
			r.Error(err)
		}
		if r.Failed() {
			r.Logf("fio's output ends:\n%s", bed.Tail(log, 30))
		}
	})
}

// loaded is nil while the load goes on and has found nothing wrong.
func (r *diskRig) loaded() error {
	if r.load == nil {
		return nil
	}
	select {
	case err := <-r.reader:
		return err
	default:
		return r.load.Dead()
	}
}

// counter is what the daemon counts under a name in a metric.
func (r *diskRig) counter(text, line string) float64 {
	r.Helper()
	_, rest, ok := strings.Cut(text, line+" ")
	if !ok {
		r.Fatalf("no %s in the metrics", line)
	}
	value, _, _ := strings.Cut(rest, "\n")
	n, err := strconv.ParseFloat(value, 64)
	r.must(err)
	return n
}

// progress waits until the load has got somewhere in the object store.
func (r *diskRig) progress() {
	r.Helper()
	now := func() (puts, reads float64) {
		text := r.metrics()
		return r.counter(text, `scoria_objects_total{name="puts"}`), r.counter(text, `scoria_objects_total{name="reads"}`)
	}
	puts, reads := now()
	r.wait("the load to go on", func() bool { p, g := now(); return p >= puts+2 && g >= reads+20 })
}

// wait is poll that gives up when the load has failed.
func (r *diskRig) wait(what string, cond func() bool) {
	r.Helper()
	r.poll(what, func() (bool, error) {
		if err := r.loaded(); err != nil {
			return false, err
		}
		return cond(), nil
	})
}

// unsafe says what is not as safe as it should be; "" if all is.
func (r *diskRig) unsafe() string {
	r.Helper()
	var st control.BackendStatus
	r.must(r.CLIJSON(r.ctx, &st, "backend", "status"))
	objects := int64(0)
	for _, c := range st.Classes {
		for _, s := range c.Safety {
			p := c.Policy
			if text := fmt.Sprintf("%d,%d,%d,%d", p.K, p.M, p.C, p.X); text != rigPolicy || s.Disks < rigParity {
				return fmt.Sprintf("%d objects of policy %s can lose %d disks", s.Objects, text, s.Disks)
			}
			objects += s.Objects
		}
	}
	if objects < rigFixed || st.Uploads > 0 {
		return fmt.Sprintf("%d objects, %d uploads", objects, st.Uploads)
	}
	return ""
}

// safe waits until every object can lose as many disks as it should.
func (r *diskRig) safe() {
	r.Helper()
	why := ""
	defer func() {
		if r.Failed() {
			r.Log(why)
			out, err := r.CLI(context.Background(), "backend", "status")
			r.Log(out, err)
		}
	}()
	r.wait("all objects to be safe", func() bool {
		_, err := r.client.StartBackendJob(r.ctx, "repair")
		r.must(err)
		why = r.unsafe()
		return why == ""
	})
}

// verify has `scoria backend verify` read everything and returns what it found.
func (r *diskRig) verify() (problems int64) {
	r.Helper()
	r.ok(r.CLI(r.ctx, "backend", "verify", "start"))
	var job control.BackendJob
	r.wait("the verification to end", func() bool {
		var err error
		job, err = r.client.BackendJob(r.ctx, "verify")
		r.must(err)
		return job.State != "running"
	})
	if job.State != "done" || job.Message != "" {
		r.Logf("verify: %+v", job)
		return max(1, job.Problems)
	}
	return job.Problems
}

// settled pauses the load and makes sure that all is as if nothing had happened.
func (r *diskRig) settled(damaged bool) {
	r.Helper()
	r.signal(r.load, syscall.SIGSTOP)
	r.safe()
	r.clean(damaged)
	r.signal(r.load, syscall.SIGCONT)
}

// clean makes sure that a verification finds nothing bad, the first one or, if something
// was damaged, a later one, and that no trouble shows.
func (r *diskRig) clean(damaged bool) {
	r.Helper()
	for tries := 0; r.verify() > 0; tries++ {
		if !damaged || tries > 20 {
			r.Fatalf("a verification finds something, at try %d", tries)
		}
		_, err := r.client.StartBackendJob(r.ctx, "orphans")
		r.must(err)
		r.safe()
	}
	shown := ""
	defer func() {
		if r.Failed() {
			r.Log("shown at last: ", shown)
		}
	}()
	r.wait("no trouble to show any more", func() bool {
		st, err := r.client.Status(r.ctx)
		r.must(err)
		v, err := r.client.Volume(r.ctx, rigVolume)
		r.must(err)
		shown = fmt.Sprint(st.Conditions, v.Conditions)
		return len(st.Conditions)+len(v.Conditions) == 0
	})
}

// endLoad ends fio, which must have found nothing wrong.
func (r *diskRig) endLoad() {
	r.Helper()
	r.must(r.loaded())
	r.stopReader()
	r.signal(r.load, syscall.SIGINT)
	select {
	case <-r.load.Exited():
	case <-r.ctx.Done():
		r.Fatal("fio does not end")
	}
	r.load = nil
	if out := bed.Tail(filepath.Join(r.DataDir, "fio.log"), 1000); !strings.Contains(out, "err= 0") {
		r.Fatalf("fio:\n%s", out)
	}
}

// during names what is going on if fn fails.
func (r *diskRig) during(what string, fn func()) {
	r.Helper()
	defer func() {
		if r.Failed() {
			r.Log("during: ", what)
		}
	}()
	fn()
}
