package qemu

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"scoria/integration/bed"
	"scoria/integration/guest"
	"scoria/vhost/client"
)

// TestGuestOnPeer holds the test bed itself: image, init, job port and monitor
// with a disk that QEMU's own storage daemon serves.
func TestGuestOnPeer(t *testing.T) {
	bed.Require(t)
	ctx, cancel := context.WithTimeout(context.Background(), 3*time.Minute)
	defer cancel()
	dir, err := bed.ScratchDir(true)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	img, err := guest.Build(ctx)
	if err != nil {
		t.Fatal(err)
	}
	raw := filepath.Join(dir, "disk")
	if err := os.WriteFile(raw, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(raw, 256<<20); err != nil {
		t.Fatal(err)
	}
	sock := filepath.Join(dir, "d.sock")
	qsd, err := bed.Start(bed.Spec{Path: "qemu-storage-daemon", Log: filepath.Join(dir, "qsd.log"), Args: []string{
		"--blockdev", "driver=file,node-name=n,discard=unmap,filename=" + raw,
		"--export", "vhost-user-blk,id=e,node-name=n,writable=on,num-queues=2,addr.type=unix,addr.path=" + sock,
	}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { qsd.Kill() })
	if err := bed.Poll(ctx, 10*time.Millisecond, "the peer's socket", func() (bool, error) {
		return client.Listening(sock), qsd.Dead()
	}); err != nil {
		t.Fatal(err)
	}

	vm, err := Boot(ctx, Options{Dir: dir, Image: img, Disks: []Disk{{Socket: sock, Queues: 2}}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { vm.Kill() })
	out, err := vm.Run(ctx, "cat /sys/block/vda/size; ls /sys/block/vda/mq | wc -l")
	if err != nil || strings.Join(strings.Fields(out), " ") != "524288 2" {
		t.Fatalf("size and queues: %q, %v", out, err)
	}
	if _, err := vm.Run(ctx, "exit 3"); err == nil || !strings.Contains(err.Error(), "exit code 3") {
		t.Fatalf("failing job: %v", err)
	}
	if out, err := vm.Run(ctx, "torture -run 3s -workers 8"); err != nil {
		t.Fatal(err)
	} else {
		t.Log(out)
	}
	if err := vm.Background(ctx, "load", "mkfs.ext4 -q /dev/vda && mount /dev/vda /mnt && echo hello >/mnt/f && umount /mnt && echo done"); err != nil {
		t.Fatal(err)
	}
	if out, err := vm.Join(ctx, "load"); err != nil || strings.TrimSpace(out) != "done" {
		t.Fatalf("background job: %q, %v", out, err)
	}
	if bad, err := vm.Complaints(ctx); err != nil || len(bad) > 0 {
		t.Fatalf("kernel complains: %q, %v", bad, err)
	}
	if s, err := vm.Status(ctx); err != nil || s != "running" {
		t.Fatalf("status %q, %v", s, err)
	}
	if err := vm.PowerOff(ctx); err != nil {
		t.Fatal(err)
	}
	if _, err := bed.Run(ctx, "e2fsck", "-fn", raw); err != nil {
		t.Fatal(err)
	}
}
