package integration

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"scoria/integration/guest"
	"scoria/integration/qemu"
)

// TestGuestFileSystem: a guest makes ext4, writes files, runs fio with verify; the
// file system is sound when looked at from outside, and the files are there when
// the daemon and another guest have started anew.
func TestGuestFileSystem(t *testing.T) {
	e := start(t)
	e.must(e.Create(e.ctx, "root", "512M"))
	vm := e.boot(qemu.Options{Disks: []qemu.Disk{e.disk("root", 2)}})
	sum := e.guest(vm, `set -e
mkfs.ext4 -q /dev/vda
mount /dev/vda /mnt
cp -r /bin/busybox /modules /mnt
fio --name=f --directory=/mnt --rw=randwrite --bs=4k --size=48m --direct=1 --ioengine=libaio --iodepth=16 --verify=crc32c --verify_fatal=1 --eta=never --output=/tmp/fio.out || { cat /tmp/fio.out; exit 1; }
cd /mnt && find . -type f | sort | xargs sha256sum | sha256sum
cd / && umount /mnt`)
	e.powerOff(vm)
	e.fsck("root")

	e.must(e.Stop(e.ctx))
	e.restart()
	vm = e.boot(qemu.Options{Disks: []qemu.Disk{e.disk("root", 2)}})
	again := e.guest(vm, `set -e
mount -o ro /dev/vda /mnt
cd /mnt && find . -type f | sort | xargs sha256sum | sha256sum`)
	if again != sum {
		t.Fatalf("files changed: %s, were %s", again, sum)
	}
	e.powerOff(vm)
}

// TestGuestLiveResize: the running guest sees a larger disk at once and can use it.
func TestGuestLiveResize(t *testing.T) {
	e := start(t)
	e.must(e.Create(e.ctx, "v", "128M"))
	vm := e.boot(qemu.Options{Disks: []qemu.Disk{e.disk("v", 1)}})
	e.guest(vm, "set -e; mkfs.ext4 -q /dev/vda; mount /dev/vda /mnt; echo kept >/mnt/file")
	e.ok(e.CLI(e.ctx, "volume", "resize", "v", "384M"))
	e.poll("the guest to see the new size", func() (bool, error) {
		out, err := vm.Run(e.ctx, "cat /sys/block/vda/size")
		return strings.TrimSpace(out) == fmt.Sprint(384<<20/512), err
	})
	e.guest(vm, `set -e
resize2fs /dev/vda 2>&1
dd if=/dev/zero of=/mnt/big bs=1M count=250 2>&1
[ "$(cat /mnt/file)" = kept ]
umount /mnt`)
	// A kill and a reconnect must not shrink it again.
	e.must(e.Daemon.Kill())
	e.restart()
	e.guest(vm, `set -e
dd if=/dev/vda iflag=direct bs=1M skip=383 count=1 of=/dev/null 2>&1
[ $(cat /sys/block/vda/size) = 786432 ]`)
	e.powerOff(vm)
	e.fsck("v")
}

// TestGuestReadOnlyVolume: a guest can read a read-only volume and not write it.
func TestGuestReadOnlyVolume(t *testing.T) {
	e := start(t)
	e.must(e.Create(e.ctx, "ro", "64M", "--read-only"))
	vm := e.boot(qemu.Options{Disks: []qemu.Disk{e.disk("ro", 1)}})
	e.guest(vm, `[ $(cat /sys/block/vda/ro) = 1 ] || exit 1
dd if=/dev/vda of=/dev/null bs=1M 2>&1 || exit 2
! dd if=/dev/zero of=/dev/vda bs=4k count=1 oflag=direct 2>&1`)
	e.powerOff(vm)
	_, err := e.CLI(e.ctx, "volume", "show", "ro")
	e.must(err)
}

// TestP1WriteCacheOff: with its write cache switched off by the guest, what is
// written is durable when it completes. A process can't lose the host's power;
// what is seen here is that the mode is negotiated, works, and survives a kill.
func TestP1WriteCacheOff(t *testing.T) {
	e := start(t)
	e.must(e.Create(e.ctx, "v", "64M"))
	d := e.disk("v", 1)
	d.Options = "config-wce=on"
	vm := e.boot(qemu.Options{Disks: []qemu.Disk{d}})
	e.guest(vm, `set -e
[ "$(cat /sys/block/vda/cache_type)" = "write back" ]
echo "write through" >/sys/block/vda/cache_type
[ "$(cat /sys/block/vda/cache_type)" = "write through" ]`)
	e.must(vm.Background(e.ctx, "torture", "torture -workers 4 -stop /tmp/stop -run 4m"))
	time.Sleep(time.Second)
	e.kills(1, time.Second, "v")
	e.guest(vm, "touch /tmp/stop")
	e.tortureEnd(vm, "torture")
	e.guest(vm, `[ "$(cat /sys/block/vda/cache_type)" = "write through" ] && echo "write back" >/sys/block/vda/cache_type`)
	e.powerOff(vm)
}

// TestGuestDiscardGivesSpaceBack: fstrim after deleting files frees the volume's space.
func TestGuestDiscardGivesSpaceBack(t *testing.T) {
	e := start(t)
	e.must(e.Create(e.ctx, "v", "512M"))
	vm := e.boot(qemu.Options{Disks: []qemu.Disk{e.disk("v", 1)}})
	e.guest(vm, `set -e
mkfs.ext4 -q /dev/vda; mount /dev/vda /mnt
dd if=/dev/urandom of=/mnt/big bs=1M count=200 2>&1; sync`)
	full := e.allocated("v")
	e.guest(vm, "set -e; rm /mnt/big; sync; fstrim -v /mnt; umount /mnt")
	e.powerOff(vm)
	if empty := e.allocated("v"); full < 200<<20 || empty > full-190<<20 {
		t.Fatalf("%d bytes allocated with a file of 200 MiB, %d after deleting and trimming it", full, empty)
	}
	e.fsck("v")
}

// TestFrontEndDies: QEMU is killed under load and a new one starts on the volume:
// what had been flushed before is there.
func TestFrontEndDies(t *testing.T) {
	e := start(t)
	e.must(e.Create(e.ctx, "v", "256M"))
	vm := e.boot(qemu.Options{Disks: []qemu.Disk{e.disk("v", 2)}})
	const verify = `fio --name=v --filename=/dev/vda --offset=128m --size=32m --rw=randwrite --bs=16k --direct=1 --ioengine=libaio --iodepth=16 --verify=crc32c --verify_fatal=1 --eta=never --end_fsync=1`
	e.guest(vm, verify+" --do_verify=0 2>&1")
	e.must(vm.Background(e.ctx, "torture", "torture -workers 8 -run 4m"))
	time.Sleep(time.Second)
	e.must(vm.Kill())
	vm = e.boot(qemu.Options{Disks: []qemu.Disk{e.disk("v", 2)}})
	e.guest(vm, verify+" --verify_only 2>&1")
	e.powerOff(vm)
	e.Log(e.ok(e.CLI(e.ctx, "volume", "check", "v")))
}

// TestGuestResets: a guest that reboots without warning its disk begins anew with
// fresh rings on the same connection.
func TestGuestResets(t *testing.T) {
	e := start(t)
	e.must(e.Create(e.ctx, "v", "64M"))
	vm := e.boot(qemu.Options{Disks: []qemu.Disk{e.disk("v", 2)}})
	e.guest(vm, "set -e; mkfs.ext4 -q /dev/vda; sync")
	for range 2 {
		must(e, vm, "system_reset")
		e.must(vm.Reattach(e.ctx))
		e.guest(vm, "set -e; mount /dev/vda /mnt; date >>/mnt/boots; umount /mnt")
	}
	e.powerOff(vm)
	e.fsck("v")
}

// must carries out a command of QEMU's monitor without arguments.
func must(e *env, vm *qemu.VM, command string) {
	e.Helper()
	_, err := vm.Monitor.Execute(e.ctx, command, nil)
	e.must(err)
}

// TestP4SecondGuestRefused: two QEMUs on one volume: the second may connect, but
// the moment it starts its rings it is refused, and the first goes on unharmed.
func TestP4SecondGuestRefused(t *testing.T) {
	e := start(t)
	e.must(e.Create(e.ctx, "v", "64M"))
	first := e.boot(qemu.Options{Disks: []qemu.Disk{e.disk("v", 1)}})
	e.must(first.Background(e.ctx, "torture", "torture -workers 4 -span-mib 4 -stop /tmp/stop -run 4m"))
	img, err := image()
	e.must(err)
	second := e.launch(qemu.Options{Image: img, Disks: []qemu.Disk{e.disk("v", 1)}, CPUs: 1, MemoryMiB: 384})
	e.poll("the daemon to refuse the second guest", func() (bool, error) {
		log, err := os.ReadFile(e.LogFile())
		return strings.Contains(string(log), "is in use by"), err
	})
	e.must(second.Kill())
	e.guest(first, "touch /tmp/stop")
	e.tortureEnd(first, "torture")
	e.powerOff(first)
}

// TestGuestBootsFromVolume: the BIOS loads GRUB from a volume with 512-byte
// blocks, GRUB the kernel and its initramfs, and Linux finds the same disk. The
// second time the daemon dies while GRUB reads the kernel, with the BIOS's driver.
func TestGuestBootsFromVolume(t *testing.T) {
	e := start(t)
	const size = 64 << 20
	e.must(e.Create(e.ctx, "boot", "64M"))
	file := filepath.Join(scratch(t, false), "boot.raw")
	e.must(guest.WriteBootDisk(e.ctx, file, size))
	e.run("nbdcopy", file, e.NBD("boot"))
	for _, kill := range []bool{false, true} {
		d := e.disk("boot", 1)
		d.Boot = true
		vm := e.launch(qemu.Options{Disks: []qemu.Disk{d}})
		e.must(vm.ConsoleHas(e.ctx, guest.GrubGreeting))
		if kill {
			e.must(e.Daemon.Kill())
			e.restart()
		}
		e.must(vm.Reattach(e.ctx))
		if n := e.guest(vm, "mount -o ro /dev/vda1 /mnt && ls /mnt/vmlinuz && umount /mnt"); n != "/mnt/vmlinuz" {
			t.Fatalf("the guest finds %q on its disk", n)
		}
		e.powerOff(vm)
	}
}
