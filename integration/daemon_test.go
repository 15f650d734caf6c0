package integration

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"scoria/integration/bed"
	"scoria/integration/daemon"
	"scoria/integration/qemu"
)

// TestDaemonStopsClean: SIGTERM ends the daemon with exit code 0, leaves no
// sockets behind, and nothing is lost, flushed or not.
func TestDaemonStopsClean(t *testing.T) {
	e := start(t)
	e.must(e.Create(e.ctx, "v", "64M"))
	e.qemuIO("v", "-t", "writeback", "-c", "write -P 0x42 1M 2M", "-c", "sigraise 9")
	e.must(e.Stop(e.ctx))
	for _, s := range []string{e.ControlSocket(), e.NBDSocket(), e.VhostSocket("v")} {
		if _, err := os.Lstat(s); err == nil {
			t.Errorf("%s is left behind", s)
		}
	}
	e.restart()
	e.qemuIO("v", "-r", "-c", "read -P 0x42 1M 2M")
}

// TestDaemonStopsUnderAGuest: SIGTERM also ends a daemon that a guest uses; the
// guest waits for the next one.
func TestDaemonStopsUnderAGuest(t *testing.T) {
	e := start(t)
	e.must(e.Create(e.ctx, "v", "64M"))
	vm := e.boot(qemu.Options{Disks: []qemu.Disk{e.disk("v", 1)}})
	e.must(vm.Background(e.ctx, "torture", "torture -workers 4 -stop /tmp/stop -run 4m"))
	for range 3 {
		time.Sleep(time.Second)
		e.must(e.Stop(e.ctx))
		e.restart()
		e.attached("v")
	}
	e.guest(vm, "touch /tmp/stop")
	e.tortureEnd(vm, "torture")
	e.powerOff(vm)
}

// TestDaemonTakesOverStaleSockets: sockets and other traces of a killed daemon
// don't hinder the next.
func TestDaemonTakesOverStaleSockets(t *testing.T) {
	e := start(t)
	e.must(e.Create(e.ctx, "v", "64M"))
	for range 3 {
		e.must(e.Daemon.Kill())
		if _, err := os.Lstat(e.ControlSocket()); err != nil {
			t.Fatalf("a killed daemon can't have removed its socket: %v", err)
		}
		e.restart()
		e.qemuIO("v", "-c", "write -P 1 0 4k")
	}
}

// TestDaemonDataDirectoryHeld: a second daemon on the same data directory is
// refused with the reason and harms nothing.
func TestDaemonDataDirectoryHeld(t *testing.T) {
	e := start(t)
	e.must(e.Create(e.ctx, "v", "64M"))
	second := &daemon.Daemon{Programs: e.Programs, DataDir: e.DataDir, RunDir: scratch(t, true)}
	_, err := bed.Run(e.ctx, second.Scoriad, "--data-dir", second.DataDir, "--run-dir", second.RunDir)
	e.refused(err, e.DataDir)
	e.qemuIO("v", "-c", "write -P 1 0 4k")
}

// TestDeleteInUseRefused: a volume that a guest uses can't be deleted; afterwards
// it can, and its data is gone from the disk.
func TestDeleteInUseRefused(t *testing.T) {
	e := start(t)
	e.must(e.Create(e.ctx, "v", "64M"))
	vm := e.boot(qemu.Options{Disks: []qemu.Disk{e.disk("v", 1)}})
	e.guest(vm, "dd if=/dev/urandom of=/dev/vda bs=1M count=40 oflag=direct 2>&1; sync")
	_, err := e.CLI(e.ctx, "volume", "delete", "v")
	e.refused(err, "in use")
	e.guest(vm, "dd if=/dev/zero of=/dev/vda bs=1M count=1 oflag=direct 2>&1")
	e.powerOff(vm)
	e.ok(e.CLI(e.ctx, "volume", "delete", "v"))
	if _, err := os.Lstat(e.VhostSocket("v")); err == nil {
		t.Error("the deleted volume's socket is left behind")
	}
	e.poll("the volume's space to come back", func() (bool, error) { return diskUsage(e.DataDir) < 20<<20, nil })
}

// diskUsage sums the bytes of the files under a directory, as far as they can be
// seen: the daemon works on them at the same time.
func diskUsage(dir string) int64 {
	var sum int64
	_ = filepath.Walk(dir, func(_ string, info os.FileInfo, err error) error {
		if err == nil && info.Mode().IsRegular() {
			sum += info.Size()
		}
		return nil
	})
	return sum
}

// TestBadInputIsNamed: the command line says which field is wrong and what would
// be right, and changes nothing.
func TestBadInputIsNamed(t *testing.T) {
	e := start(t)
	e.must(e.Create(e.ctx, "v", "64M"))
	for _, c := range []struct {
		args  []string
		words []string
	}{
		{[]string{"volume", "create", "v", "--size", "64M"}, []string{"v", "exists"}},
		{[]string{"volume", "create", "bad name", "--size", "64M"}, []string{"bad name"}},
		{[]string{"volume", "create", "../up", "--size", "64M"}, []string{"up"}},
		{[]string{"volume", "create", "w", "--size", "0"}, []string{"size"}},
		{[]string{"volume", "create", "w", "--size", "65T"}, []string{"size", "64"}},
		{[]string{"volume", "create", "w", "--size", "many"}, []string{"size", "many"}},
		{[]string{"volume", "create", "w"}, []string{"size"}},
		{[]string{"volume", "resize", "v", "32M"}, []string{"size"}},
		{[]string{"volume", "show", "nosuch"}, []string{"nosuch"}},
		{[]string{"volume", "delete", "nosuch"}, []string{"nosuch"}},
	} {
		t.Run(strings.Join(c.args, "_"), func(t *testing.T) {
			_, err := e.CLI(e.ctx, c.args...)
			sub := &env{T: t, Daemon: e.Daemon, ctx: e.ctx}
			sub.refused(err, c.words...)
		})
	}
	if out := e.ok(e.CLI(e.ctx, "volume", "list")); strings.Contains(out, "default/w") {
		t.Errorf("a refused volume is listed:\n%s", out)
	}
}

// TestDaemonConfigFile: one file configures the daemon; a key it doesn't know is
// an error that names it; the pool's defaults reach the guest; metrics are there.
func TestDaemonConfigFile(t *testing.T) {
	e := prepare(t)
	e.Config = filepath.Join(e.DataDir, "scoria.toml")
	config := fmt.Sprintf("data_dir = %q\nrun_dir = %q\n[pool]\nblock_size = 4096\n", e.DataDir, e.RunDir)
	e.must(os.WriteFile(e.Config, []byte(config+"colour = \"blue\"\n"), 0o600))
	_, err := bed.Run(e.ctx, e.Scoriad, "--config", e.Config)
	e.refused(err, "colour")
	e.must(os.WriteFile(e.Config, []byte(config), 0o600))
	e.must(e.Start(e.ctx))
	e.must(e.Create(e.ctx, "v", "64M"))
	vm := e.boot(qemu.Options{Disks: []qemu.Disk{e.disk("v", 1)}})
	if bs := e.guest(vm, "cat /sys/block/vda/queue/logical_block_size /sys/block/vda/queue/physical_block_size"); bs != "4096\n4096" {
		t.Errorf("the guest's block sizes are %q", bs)
	}
	e.guest(vm, "set -e; mkfs.ext4 -q /dev/vda; mount /dev/vda /mnt; cp /bin/busybox /mnt; umount /mnt")
	e.powerOff(vm)
	e.fsck("v")
	metrics := e.metrics()
	for _, want := range []string{"scoria_", "default/v", "_bucket{"} {
		if !strings.Contains(metrics, want) {
			t.Errorf("metrics without %q:\n%s", want, metrics)
		}
	}
}

// metrics reads the daemon's metrics from its control socket.
func (e *env) metrics() string {
	e.Helper()
	client := http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", e.ControlSocket())
		},
	}}
	req, err := http.NewRequestWithContext(e.ctx, http.MethodGet, "http://scoriad/metrics", nil)
	e.must(err)
	resp, err := client.Do(req)
	e.must(err)
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	e.must(err)
	return string(body)
}

// metric returns the value of a series, named with its labels; 0 if there is none.
func (e *env) metric(series string) int {
	e.Helper()
	for line := range strings.Lines(e.metrics()) {
		if v, ok := strings.CutPrefix(line, series+" "); ok {
			n, err := strconv.ParseFloat(strings.TrimSpace(v), 64)
			e.must(err)
			return int(n)
		}
	}
	return 0
}

// TestManyVolumes: volumes come and go while others are in use.
func TestManyVolumes(t *testing.T) {
	e := start(t)
	for i := range 20 {
		e.must(e.Create(e.ctx, fmt.Sprintf("v%d", i), "1G"))
	}
	e.must(e.Daemon.Kill())
	e.restart()
	for i := range 20 {
		name := fmt.Sprintf("v%d", i)
		e.qemuIO(name, "-c", fmt.Sprintf("write -P %d 0 64k", i+1))
		if i%2 == 0 {
			e.ok(e.CLI(e.ctx, "volume", "delete", name))
		}
	}
	e.must(e.Stop(e.ctx))
	e.restart()
	for i := 1; i < 20; i += 2 {
		e.qemuIO(fmt.Sprintf("v%d", i), "-r", "-c", fmt.Sprintf("read -P %d 0 64k", i+1))
	}
}
