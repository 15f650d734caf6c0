package integration

import (
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"scoria/driver/control"
	"scoria/integration/bed"
)

// unreadable is how many objects can't be read, by what `scoria backend status` says.
func (r *diskRig) unreadable() (objects int64) {
	r.Helper()
	var st control.BackendStatus
	r.must(r.CLIJSON(r.ctx, &st, "backend", "status"))
	for _, c := range st.Classes {
		for _, s := range c.Safety {
			if s.Disks < 0 {
				objects += s.Objects
			}
		}
	}
	return objects
}

// loseTooMany has more disks lost than parity allows, each in this way, and then others
// until some object can't be read: it need not lie on all of the first ones.
func (r *diskRig) loseTooMany(lose func(d *rigDisk)) (lost []*rigDisk) {
	r.Helper()
	for _, i := range r.rng.Perm(rigDisks) {
		if len(lost) > rigParity && r.unreadable() > 0 {
			break
		}
		lost = append(lost, r.disks[i])
		lose(r.disks[i])
		r.poll("the loss to be noticed", func() (bool, error) {
			var d control.ASD
			err := r.CLIJSON(r.ctx, &d, "asd", "show", r.disks[i].id)
			return !d.Up, err
		})
	}
	if text := r.ok(r.CLI(r.ctx, "backend", "status")); !strings.Contains(text, "UNREADABLE NOW") {
		r.Fatalf("`scoria backend status` does not say so:\n%s", text)
	}
	return lost
}

// shows says whether the volume, or the daemon, shows a condition with these words.
func (r *diskRig) shows(code string, words ...string) bool {
	r.Helper()
	var v control.Volume
	r.must(r.CLIJSON(r.ctx, &v, "volume", "show", rigVolume))
	var st control.Status
	r.must(r.CLIJSON(r.ctx, &st, "status"))
	all := ""
	for _, c := range append(v.Conditions, st.Conditions...) {
		if c.Code == code {
			all += c.Message + "\n"
		}
	}
	for _, w := range words {
		if !strings.Contains(all, w) {
			return false
		}
	}
	return all != ""
}

// whole makes sure that all that was written can be read, that nothing is missing, and
// that no trouble shows.
func (r *diskRig) whole() {
	r.Helper()
	r.same(r.fixed, r.uri)
	r.safe()
	r.clean(true)
}

// eio has clients read what is partly lost: they get EIO, and fio, which goes on
// behind it, right data for the rest.
func (r *diskRig) eio() {
	r.Helper()
	out := filepath.Join(scratch(r.T, false), "read")
	_, err := bed.Run(r.ctx, "nbdcopy", r.uri, out)
	r.refused(err, "Input/output error")
	var reads []string
	for at := 0; at < rigFixed; at++ {
		reads = append(reads, "-c", fmt.Sprintf("read %dM 1M", at))
	}
	text, err := bed.Run(r.ctx, "qemu-io", append([]string{"-f", "raw", "-r", r.uri}, reads...)...)
	if err != nil {
		text += err.Error()
	}
	failed, good := strings.Count(text, "read failed: Input/output error"), strings.Count(text, "read 1048576/1048576 bytes")
	if failed == 0 || good == 0 || failed+good < rigFixed {
		r.Fatalf("qemu-io: %d reads failed, %d did not:\n%s", failed, good, text)
	}
	text, err = bed.Run(r.ctx, "fio", r.fio("--continue_on_error=io", "--name=read", "--rw=read", "--bs=16k", fmt.Sprintf("--size=%dM", rigFixed))...)
	if err != nil {
		text += err.Error()
	}
	if !strings.Contains(text, fmt.Sprintf("issued rwts: total=%d,", rigFixed<<20/(16<<10))) ||
		!strings.Contains(text, "first_error=5/<Input/output error>") || strings.Contains(text, "verify failed") {
		r.Fatalf("fio:\n%s", text)
	}
}

// TestP5MoreDisksLostThanParity: clients of NBD wait for what is on more disks than parity
// allows while these are away; they get EIO for it, and right data for the rest, when the
// disks were given up; the volume, the daemon and the store say so and name the disks; all
// of it is back when the disks are; and what is lost for good is whole when it was
// written over, and nothing of the loss shows any more.
func TestP5MoreDisksLostThanParity(t *testing.T) {
	r := startDiskRig(t, rand.New(rand.NewPCG(rand.Uint64(), 0)))
	t.Log("away")
	lost := r.loseTooMany(func(d *rigDisk) { r.must(d.Kill()) })
	read := make(chan error, 1)
	go func() {
		_, err := bed.Run(r.ctx, "nbdcopy", r.uri, filepath.Join(r.DataDir, "copy"))
		read <- err
	}()
	r.poll("a read that waits to be told", func() (bool, error) {
		if len(read) > 0 {
			return false, fmt.Errorf("it has ended: %w", <-read)
		}
		return r.shows("store-unreadable", "of 4 shards", "needed are 2"), nil
	})
	for _, d := range lost {
		if !r.shows("asd-down", d.id) {
			t.Fatalf("disk %s is not said to be down", d.id)
		}
	}
	select {
	case err := <-read:
		t.Fatalf("the read has ended while disks were away: %v", err)
	default:
	}
	for _, d := range lost {
		r.again(d)
	}
	select {
	case err := <-read:
		r.must(err)
	case <-r.ctx.Done():
		t.Fatal("the read does not end")
	}
	r.whole()

	t.Log("given up")
	lost = r.loseTooMany(func(d *rigDisk) { r.must(d.Kill()); r.giveUp(d) })
	r.eio()
	if !r.shows("data-lost", "bring back the disks", "of 4 shards", lost[0].id) {
		t.Fatalf("the loss does not show: %s", r.ok(r.CLI(r.ctx, "volume", "show", rigVolume)))
	}
	for _, d := range lost {
		r.again(d)
		r.ok(r.CLI(r.ctx, "asd", "add", d.relay.address()))
	}
	r.whole()

	t.Log("lost for good")
	lost = r.loseTooMany(func(d *rigDisk) { r.must(d.Kill()); r.must(os.RemoveAll(d.dir)); r.giveUp(d) })
	r.eio()
	for _, d := range lost {
		r.replace(d)
	}
	r.eio()
	r.run("fio", r.fio("--name=over", "--rw=write", "--bs=64k", fmt.Sprintf("--size=%dM", rigFixed+rigLoad), "--end_fsync=1")...)
	r.run("nbdcopy", r.uri, r.fixed)
	r.must(r.Stop(r.ctx))
	r.restart()
	r.whole()
}
