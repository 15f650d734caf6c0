package integration

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"scoria/integration/bed"
	"scoria/integration/qemu"
)

// TestP8DiskFull: the disk under the daemon fills up while a guest writes. The
// guest waits, without an error; `scoria volume show` says why; and when there is
// room again it goes on by itself.
func TestP8DiskFull(t *testing.T) {
	bed.Require(t)
	// The daemon leaves the last part of a disk for what gives room back; besides
	// that there is room for one SCO, and without the ballast for all.
	fs := smallDisk(t, "1200M")
	log := filepath.Join(scratch(t, false), "scoriad.log") // not on the disk that fills up
	e := prepare(t)
	e.LogTo = log
	e.DataDir = filepath.Join(fs, "data")
	e.must(os.Mkdir(e.DataDir, 0o700))
	ballast := filepath.Join(fs, "ballast")
	e.run("fallocate", "-l", "700M", ballast)
	e.must(e.Start(e.ctx))
	e.must(e.Create(e.ctx, "v", "512M"))
	vm := e.boot(qemu.Options{Disks: []qemu.Disk{e.disk("v", 1)}})
	e.must(vm.Background(e.ctx, "fill", `fio --name=f --filename=/dev/vda --rw=write --bs=256k --size=220m --direct=1 --ioengine=libaio --iodepth=8 `+
		`--fsync=8 --verify=crc32c --verify_fatal=1 --eta=never 2>&1`))
	e.poll("the volume to say that the disk is full", func() (bool, error) {
		if done, err := vm.Finished(e.ctx, "fill"); done || err != nil {
			out, jerr := vm.Join(e.ctx, "fill")
			t.Fatalf("the guest has ended (%v, %v):\n%s", err, jerr, out)
		}
		out, err := e.CLI(e.ctx, "volume", "show", "v")
		return strings.Contains(out, "disk-full"), err
	})
	time.Sleep(2 * time.Second) // nothing may fail while it waits
	e.must(os.Remove(ballast))
	out, err := vm.Join(e.ctx, "fill")
	e.Log(e.CLI(e.ctx, "volume", "show", "v"))
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	e.poll("the condition to end", func() (bool, error) {
		out, err := e.CLI(e.ctx, "volume", "show", "v")
		return !strings.Contains(out, "disk-full"), err
	})
	e.powerOff(vm)
	e.ok(e.CLI(e.ctx, "volume", "check", "v"))
}

// smallDisk mounts an ext4 file system of its own.
func smallDisk(t *testing.T, size string) string {
	t.Helper()
	dir := scratch(t, false)
	img, at := filepath.Join(dir, "img"), filepath.Join(dir, bed.MountPoint)
	if err := os.Mkdir(at, 0o755); err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{
		{"truncate", "-s", size, img},
		{"mke2fs", "-q", "-t", "ext4", "-m", "0", img},
		{"mount", "-o", "loop", img, at},
	} {
		if _, err := bed.Run(t.Context(), args[0], args[1:]...); err != nil {
			t.Fatal(err)
		}
	}
	t.Cleanup(func() {
		// The test's own context has ended by now.
		if _, err := bed.Run(context.Background(), "umount", at); err != nil {
			t.Error(err)
		}
	})
	return at
}
