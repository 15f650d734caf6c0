package integration

import (
	"strings"
	"testing"

	"scoria/integration/qemu"
)

// fill writes what hold reads: the helper socket answers for holes without a read.
func (e *env) fill(volume string) {
	e.Helper()
	e.qemuIO(volume, "-c", "write -P 7 0 32M")
}

// hold makes the daemon take requests of a volume without completing any: the
// volume has a limit, and a read through the helper socket has used up all that it
// allows for hours. A daemon that starts anew knows the limit and not the debt.
func (e *env) hold(volume string) {
	e.Helper()
	e.ok(e.CLI(e.ctx, "volume", "limit", volume, "--bps", "4K"))
	e.qemuIO(volume, "-r", "-c", "read 0 32M")
}

// held waits until requests of a volume are held by its limit.
func (e *env) held(volume string) {
	e.Helper()
	e.poll("requests to be held by the limit", func() (bool, error) {
		out, err := e.CLI(e.ctx, "volume", "show", volume)
		return strings.Contains(out, "limited"), err
	})
}

// resubmitted returns how many requests this daemon has taken over from the rings'
// in-flight areas.
func (e *env) resubmitted(volume string) int {
	e.Helper()
	return e.metric(`scoria_vhost_resubmitted_total{volume="default/` + volume + `"}`)
}

// TestP3KillBeforeAnyCompletion: the daemon dies when it has taken the first request
// that was ever made on the disk's rings and completed none: descriptor 0 is in
// flight and all indices are 0. The next one carries it out, and the guest boots.
func TestP3KillBeforeAnyCompletion(t *testing.T) {
	e := start(t)
	e.must(e.Create(e.ctx, "a", "64M"))
	e.fill("a")
	e.hold("a")
	img, err := image()
	e.must(err)
	vm := e.launch(qemu.Options{Image: img, Disks: []qemu.Disk{e.disk("a", 2)}})
	e.held("a")
	e.must(e.Daemon.Kill())
	e.restart()
	e.attached("a")
	if n := e.resubmitted("a"); n == 0 {
		t.Fatal("nothing was in flight")
	}
	e.ok(e.CLI(e.ctx, "volume", "limit", "a", "--clear"))
	e.must(vm.Reattach(e.ctx))
	e.guest(vm, writeSome("/dev/vda"))
	e.powerOff(vm)
}

// TestP3KillWithTheRingInFlight: the daemon has taken all that the ring holds, of which
// it lets one request pass a second, when it dies, and so has the next one; the ring is
// full of indirect descriptors, or of chains. All of it is carried out in the end.
func TestP3KillWithTheRingInFlight(t *testing.T) {
	for _, c := range []struct {
		indirect string
		full     int // requests that fill the ring of 128 at least
	}{{"on", 100}, {"off", 30}} {
		t.Run("indirect_"+c.indirect, func(t *testing.T) {
			e := start(t)
			e.must(e.Create(e.ctx, "a", "256M"))
			d := e.disk("a", 1)
			d.QueueSize, d.Options = 128, "indirect_desc="+c.indirect
			vm := e.boot(qemu.Options{Disks: []qemu.Disk{d}})
			e.ok(e.CLI(e.ctx, "volume", "limit", "a", "--bps", "4K"))
			e.must(vm.Background(e.ctx, "fio", "fio --name=f --filename=/dev/vda --rw=randwrite --bs=4k --size=8m --direct=1 --ioengine=libaio "+
				"--iodepth=256 --verify=crc32c --verify_fatal=1 --eta=never 2>&1"))
			for i := range 2 {
				e.poll("the ring to fill", func() (bool, error) { return e.waitPiledUp(vm) >= c.full, nil })
				e.held("a")
				e.must(e.Daemon.Kill())
				e.restart()
				e.attached("a")
				n := e.resubmitted("a")
				t.Logf("kill %d: %d requests were in flight", i+1, n)
				if n < c.full {
					t.Fatalf("%d requests were in flight, want %d", n, c.full)
				}
			}
			e.ok(e.CLI(e.ctx, "volume", "limit", "a", "--clear"))
			e.ok(vm.Join(e.ctx, "fio"))
			e.powerOff(vm)
			e.ok(e.CLI(e.ctx, "volume", "check", "a"))
		})
	}
}
