package integration

import (
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"strings"
	"syscall"
	"testing"
	"time"

	"scoria/integration/qemu"
)

// fioMix is what a guest does to a disk while its daemon dies: random writes of
// mixed sizes, reads between writes, discards, flushes, all verified.
const fioMix = `cat >/tmp/mix.fio <<E
[global]
filename=/dev/vda
direct=1
ioengine=libaio
iodepth=16
verify=crc32c
verify_fatal=1
group_reporting=1
randrepeat=0
size=8m
[write]
rw=randwrite
bsrange=4k-64k
fsync=64
numjobs=2
offset_increment=8m
[read-write]
rw=randrw
bs=4k
fdatasync=32
offset=32m
[discard]
rw=randtrimwrite
bs=8k
offset=64m
E
n=0
while [ ! -e /tmp/stop ] || [ $n = 0 ]; do
	fio --eta=never --output=/tmp/mix.out /tmp/mix.fio || { cat /tmp/mix.out; exit 1; }
	n=$((n+1))
done
echo $n rounds of fio`

// tortured is what the guest's torture program reports.
type tortured struct {
	Reads, Writes, Discards, Zeroes, Flushes uint64
	Seconds                                  float64
	Kept                                     uint64
	KeptBegan, KeptEnded                     [2]uint64
	PausesMs                                 []int64
	LongestMs                                int64
}

// kills makes n kills of the daemon at random moments under guests that use the
// volumes. One kind of moment is left out, since QEMU 7.2 to 9.0 loses the disk in
// it: from its connect() to the first messages, about a millisecond.
// TestP3DaemonDiesWhileQEMUConnects goes through those one by one.
func (e *env) kills(n int, between time.Duration, volumes ...string) {
	e.Helper()
	seed := uint64(time.Now().UnixNano())
	e.Logf("moments from seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 0))
	for i := range n {
		time.Sleep(time.Duration(rng.Int64N(int64(between))))
		killed := time.Now()
		e.must(e.Daemon.Kill())
		// Sometimes it stays away longer than the guest's requests take.
		time.Sleep(time.Duration(rng.IntN(3)) * 100 * time.Millisecond)
		e.restart()
		answers := time.Since(killed)
		e.attached(volumes...)
		e.Logf("kill %d: daemon answers again after %v, QEMU is back after %v", i+1,
			answers.Round(time.Millisecond), time.Since(killed).Round(time.Millisecond))
	}
}

// attached waits until a front end has started the first ring of each of the volumes.
func (e *env) attached(volumes ...string) {
	e.Helper()
	for _, v := range volumes {
		e.poll("QEMU to use volume "+v, func() (bool, error) {
			var show struct {
				UsedBy string `json:"used_by"`
			}
			err := e.CLIJSON(e.ctx, &show, "volume", "show", v)
			return strings.HasPrefix(show.UsedBy, "vhost session"), err
		})
	}
}

// tortureEnd waits for the guest's torture and reports the pauses it saw.
func (e *env) tortureEnd(vm *qemu.VM, job string) tortured {
	e.Helper()
	out, err := vm.Join(e.ctx, job)
	e.must(err)
	var r tortured
	if err := json.Unmarshal([]byte(out), &r); err != nil {
		e.Fatalf("%v in %q", err, out)
	}
	e.Logf("guest: %d writes, %d reads, %d discards, %d zeroes, %d flushes, all right; pauses seen by one thread: %v ms, longest wait %d ms",
		r.Writes, r.Reads, r.Discards, r.Zeroes, r.Flushes, r.PausesMs, r.LongestMs)
	return r
}

// TestP3KillUnderLoad: the daemon dies again and again under two disks with
// several queues, one under fio with verify, the other under the torture program,
// which knows every sector. The guest sees pauses, no error, and no wrong byte.
func TestP3KillUnderLoad(t *testing.T) {
	e := start(t)
	e.must(e.Create(e.ctx, "a", "256M"))
	e.must(e.Create(e.ctx, "b", "256M"))
	vm := e.boot(qemu.Options{CPUs: 4, Disks: []qemu.Disk{e.disk("a", 4), e.disk("b", 4)}})
	e.must(vm.Background(e.ctx, "fio", fioMix))
	e.must(vm.Background(e.ctx, "torture", "torture -device /dev/vdb -workers 16 -stop /tmp/stop -run 4m"))
	time.Sleep(time.Second)
	e.kills(8, 2500*time.Millisecond, "a", "b")
	e.guest(vm, "touch /tmp/stop")
	e.tortureEnd(vm, "torture")
	e.Log(e.ok(vm.Join(e.ctx, "fio")))
	e.powerOff(vm)
	e.Log(e.ok(e.CLI(e.ctx, "volume", "check", "a")))
	e.Log(e.ok(e.CLI(e.ctx, "volume", "check", "b")))
}

// TestP3KillFullRing: as many requests under way as the ring holds, first with
// indirect descriptors (each request takes one slot), then without them (a
// request takes several, and the ring is full of chains).
func TestP3KillFullRing(t *testing.T) {
	for _, c := range []struct {
		indirect string
		maxKiB   int // of a request
		full     int // requests that a full ring of 128 holds at least
	}{
		{"on", 256, 120},
		{"off", 16, 20}, // four pages, header and status: at most six descriptors each
	} {
		t.Run("indirect_"+c.indirect, func(t *testing.T) {
			e := start(t)
			e.must(e.Create(e.ctx, "a", "256M"))
			d := e.disk("a", 1)
			// The ring must hold the largest request without an indirect table,
			// else the guest's driver waits forever for room.
			d.QueueSize, d.Options = 128, "indirect_desc="+c.indirect
			vm := e.boot(qemu.Options{Disks: []qemu.Disk{d}})
			e.must(vm.Background(e.ctx, "torture",
				// Those who wait for another one's flush or discard have nothing in the ring.
				fmt.Sprintf("torture -workers 160 -span-mib 1 -flush=false -discard=false -max-kib %d -stop /tmp/stop -run 4m", c.maxKiB)))
			time.Sleep(time.Second)
			e.kills(3, 1500*time.Millisecond, "a")
			for range 3 {
				e.freezeAndKill("a", vm, c.full)
			}
			e.guest(vm, "touch /tmp/stop")
			e.tortureEnd(vm, "torture")
			e.powerOff(vm)
		})
	}
}

// TestP3KillWithFreshRings: the daemon dies before anything was ever completed on
// the rings, with the first requests of the BIOS's driver in them, and then with
// the first of the kernel's. The guest boots all the same.
func TestP3KillWithFreshRings(t *testing.T) {
	for n, who := range []string{"BIOS", "kernel"} {
		t.Run(who, func(t *testing.T) {
			e := start(t)
			e.must(e.Create(e.ctx, "a", "64M"))
			m := between(t, e.VhostSocket("a"))
			frozen := make(chan error, 1)
			m.driverOK = func(count int) {
				if count == n+1 {
					frozen <- syscall.Kill(e.Process().PID(), syscall.SIGSTOP)
				}
			}
			img, err := image()
			e.must(err)
			vm := e.launch(qemu.Options{Image: img, Disks: []qemu.Disk{{Socket: m.path, Queues: 2}}})
			select {
			case err := <-frozen:
				e.must(err)
			case <-e.ctx.Done():
				t.Fatalf("the %s's driver does not start: %v; console:\n%s", who, vm.Dead(), vm.Console(20))
			}
			time.Sleep(500 * time.Millisecond) // the first requests come
			e.must(e.Daemon.Kill())
			m.drop(cut{})
			e.restart()
			e.must(vm.Reattach(e.ctx))
			e.guest(vm, writeSome("/dev/vda"))
			e.powerOff(vm)
		})
	}
}

// TestP3KillBeforeFirstCompletion: a daemon dies with requests in the ring of
// which it has not completed a single one, nor has the guest's driver seen any
// completion since the daemon before.
func TestP3KillBeforeFirstCompletion(t *testing.T) {
	e := start(t)
	e.must(e.Create(e.ctx, "a", "64M"))
	vm := e.boot(qemu.Options{Disks: []qemu.Disk{e.disk("a", 1)}})
	for range 3 {
		e.must(e.Daemon.Kill())
		e.restart()
		e.attached("a")
		e.freeze()
		e.must(vm.Background(e.ctx, "io", "fio --name=f --filename=/dev/vda --rw=randwrite --bs=4k --size=8m --direct=1 --ioengine=libaio "+
			"--iodepth=32 --verify=crc32c --verify_fatal=1 --eta=never 2>&1"))
		e.waitPiledUp(vm)
		e.must(e.Daemon.Kill())
		e.restart()
		e.ok(vm.Join(e.ctx, "io"))
	}
	e.powerOff(vm)
}

// freeze stops the daemon's threads, so that what the guest submits stays in the ring.
func (e *env) freeze() {
	e.Helper()
	e.must(syscall.Kill(e.Process().PID(), syscall.SIGSTOP))
}

// waitPiledUp waits until the guest's kernel has requests under way that nobody
// completes, and no more of them join: the ring is full, or its users all wait.
func (e *env) waitPiledUp(vm *qemu.VM) int {
	e.Helper()
	same, last := 0, 0
	e.poll("requests to pile up", func() (bool, error) {
		out, err := vm.Run(e.ctx, "cat /sys/block/vda/inflight")
		if err != nil {
			return false, err
		}
		var reads, writes int
		if _, err := fmt.Sscan(out, &reads, &writes); err != nil {
			return false, fmt.Errorf("%q: %w", out, err)
		}
		if same++; reads+writes != last || last == 0 {
			same, last = 0, reads+writes
		}
		return same >= 5, nil
	})
	e.Logf("%d requests pile up", last)
	return last
}

// freezeAndKill kills the daemon when the frozen ring has filled up with at least
// full requests.
func (e *env) freezeAndKill(volume string, vm *qemu.VM, full int) {
	e.Helper()
	e.poll("the ring to fill", func() (bool, error) {
		e.freeze()
		if e.waitPiledUp(vm) >= full {
			return true, nil
		}
		return false, syscall.Kill(e.Process().PID(), syscall.SIGCONT) // the guest is busy with something else
	})
	e.must(e.Daemon.Kill())
	e.restart()
	e.attached(volume)
	time.Sleep(200 * time.Millisecond)
}

// TestP3Upgrade: the daemon is stopped and a rebuilt one takes over, back and
// forth, killed in between, while the guest goes on.
func TestP3Upgrade(t *testing.T) {
	e := start(t)
	first := e.Programs
	second, err := rebuilt()
	e.must(err)
	e.must(e.Create(e.ctx, "a", "256M"))
	vm := e.boot(qemu.Options{Disks: []qemu.Disk{e.disk("a", 2)}})
	e.must(vm.Background(e.ctx, "torture", "torture -workers 8 -stop /tmp/stop -run 4m"))
	for i := range 4 {
		time.Sleep(time.Second)
		if i%2 == 0 {
			e.must(e.Stop(e.ctx))
			e.Programs = second
		} else {
			e.must(e.Daemon.Kill())
			e.Programs = first
		}
		e.restart()
		e.attached("a")
	}
	e.guest(vm, "touch /tmp/stop")
	e.tortureEnd(vm, "torture")
	e.powerOff(vm)
}

// TestP3UnflushedWritesSurvive: what completed without a flush is there after a
// kill, also for somebody who never wrote it: a helper-socket client reads it.
func TestP3UnflushedWritesSurvive(t *testing.T) {
	e := start(t)
	e.must(e.Create(e.ctx, "a", "64M"))
	for i := range 5 {
		// qemu-io with writeback cache and an abort before close: no flush is sent.
		pattern := fmt.Sprintf("write -P %d %dM 1M", 0x11*(i+1), i)
		e.qemuIO("a", "-t", "writeback", "-c", pattern, "-c", "sigraise 9")
		e.must(e.Daemon.Kill())
		e.restart()
		for j := range i + 1 {
			e.qemuIO("a", "-r", "-c", fmt.Sprintf("read -P %d %dM 1M", 0x11*(j+1), j))
		}
	}
}
