package integration

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"scoria/integration/bed"
	"scoria/integration/guest"
	"scoria/integration/qemu"
)

// cli calls the command line, which must succeed, in words.
func (e *env) cli(words string) string {
	e.Helper()
	return e.ok(e.CLI(e.ctx, strings.Fields(words)...))
}

// exit calls the command line, which must end with a status and name words.
func (e *env) exit(status int, words string, named ...string) {
	e.Helper()
	out, err := exec.CommandContext(e.ctx, e.Scoria, append([]string{"--socket", e.ControlSocket()}, strings.Fields(words)...)...).CombinedOutput()
	var ended *exec.ExitError
	if !errors.As(err, &ended) || ended.ExitCode() != status {
		e.Fatalf("scoria %s: %v, want status %d\n%s", words, err, status, out)
	}
	for _, w := range named {
		if !strings.Contains(string(out), w) {
			e.Fatalf("scoria %s: does not name %q: %s", words, w, out)
		}
	}
}

// sameImages compares two volumes, snapshots or raw files.
func (e *env) sameImages(a, b string) {
	e.Helper()
	e.run("qemu-img", "compare", "-s", "-f", "raw", "-F", "raw", a, b)
}

// scribble writes patterns to random places of a volume of size bytes, and zeroes
// and discards others.
func (e *env) scribble(volume string, size int64, seed uint64) {
	e.Helper()
	rng := rand.New(rand.NewPCG(seed, 7))
	args := []string{"-d", "unmap"}
	for range 25 {
		n := 4096 * (1 + rng.Int64N(100))
		off := rng.Int64N((size-n)/4096) * 4096
		switch rng.IntN(6) {
		case 0:
			args = append(args, "-c", fmt.Sprintf("discard %d %d", off, n))
		case 1:
			args = append(args, "-c", fmt.Sprintf("write -z -u %d %d", off, n))
		default:
			args = append(args, "-c", fmt.Sprintf("write -P %d %d %d", 1+rng.IntN(255), off, n))
		}
	}
	e.qemuIO(volume, append(args, "-c", "flush")...)
}

// changed adds up what a dirty context of a volume calls changed.
func (e *env) changed(volume, context string) (sum int64) {
	e.Helper()
	var extents []extent
	e.must(json.Unmarshal([]byte(e.run("nbdinfo", "--map="+context, "--json", e.NBD(volume))), &extents))
	for _, x := range extents {
		if x.Type&1 == 1 {
			sum += x.Length
		}
	}
	return sum
}

// TestSnapshotsThroughTools: snapshots as the command line and NBD clients see
// them, across a kill.
func TestSnapshotsThroughTools(t *testing.T) {
	e := start(t)
	e.must(e.Create(e.ctx, "v", "64M"))
	e.qemuIO("v", "-c", "write -P 1 0 8M", "-c", "flush")
	e.cli("snapshot create v@one --meta reason=test")
	e.qemuIO("v", "-c", "write -P 2 4M 4M", "-c", "write -P 2 32M 64k", "-c", "flush")
	e.cli("snapshot create v@two")
	e.qemuIO("v", "-d", "unmap", "-c", "discard 0 1M", "-c", "write -P 3 33M 4k", "-c", "flush")
	for range 2 {
		e.qemuIO("v@one", "-r", "-c", "read -P 1 0 8M", "-c", "read -P 0 8M 56M")
		e.qemuIO("v@two", "-r", "-c", "read -P 1 0 4M", "-c", "read -P 2 4M 4M", "-c", "read -P 2 32M 64k", "-c", "read -P 0 33M 1M")
		e.qemuIO("v", "-r", "-c", "read -P 0 0 1M", "-c", "read -P 1 1M 3M", "-c", "read -P 3 33M 4k")
		for _, prefix := range []string{"scoria:since=", "qemu:dirty-bitmap:"} {
			if one, two := e.changed("v", prefix+"one"), e.changed("v", prefix+"two"); one != 5<<20+68<<10 || two != 1<<20+4<<10 {
				t.Errorf("%s: %d bytes changed since one, %d since two", prefix, one, two)
			}
			if n := e.changed("v@two", prefix+"one"); n != 4<<20+64<<10 {
				t.Errorf("%s: %d bytes changed from one to two", prefix, n)
			}
		}
		var list []struct {
			Name     string
			Alone    *uint64
			Metadata map[string]string
		}
		e.must(e.CLIJSON(e.ctx, &list, "snapshot", "list", "v"))
		if len(list) != 2 || list[0].Name != "one" || list[0].Metadata["reason"] != "test" || list[0].Alone == nil || list[1].Alone == nil || *list[0].Alone != 4<<20 {
			t.Errorf("snapshots: %+v", list)
		}
		var v struct {
			Space struct{ Live, Snapshots uint64 }
		}
		e.must(e.CLIJSON(e.ctx, &v, "volume", "show", "v"))
		if v.Space.Live != 7<<20+68<<10 || v.Space.Snapshots != 5<<20 {
			t.Errorf("space: %+v", v.Space)
		}
		e.must(e.Daemon.Kill())
		e.restart()
	}
	out, err := bed.Run(e.ctx, "qemu-io", "-f", "raw", e.NBD("v@one"), "-c", "write 0 4k")
	if err == nil && !strings.Contains(out, "read-only") && !strings.Contains(out, "failed") {
		t.Errorf("a snapshot is written to: %s", out)
	}
	if out := e.run("nbdinfo", "--list", "nbd+unix://?socket="+e.NBDSocket()); !strings.Contains(out, "default/v@two") || !strings.Contains(out, "scoria:since=one") {
		t.Errorf("exports: %s", out)
	}
	e.exit(6, "snapshot rollback v@one", "two", "--force")
	e.exit(6, "volume delete v", "one", "--force")
	e.exit(3, "snapshot delete v@three", "no snapshot")
	e.cli("snapshot rollback v@one --force")
	e.qemuIO("v", "-r", "-c", "read -P 1 0 8M", "-c", "read -P 0 8M 56M")
	e.exit(3, "snapshot show v@two")
	e.cli("snapshot delete v@one")
	e.cli("volume check v")
	e.cli("volume delete v")
}

// TestClonesThroughTools: clones read as their snapshot, go their own way, also
// after a kill, and outlive the parent when flattened.
func TestClonesThroughTools(t *testing.T) {
	e := start(t)
	e.must(e.Create(e.ctx, "golden", "64M"))
	e.scribble("golden", 64<<20, 1)
	raw := e.export("golden")
	e.cli("volume template golden")
	e.cli("volume clone golden c0 c1 c2 c3 c4 c5 c6 c7")
	out, err := bed.Run(e.ctx, "qemu-io", "-f", "raw", e.NBD("golden"), "-c", "write 0 4k")
	if err == nil && !strings.Contains(out, "read-only") && !strings.Contains(out, "failed") {
		t.Errorf("a template is written to: %s", out)
	}
	e.scribble("c0", 64<<20, 2)
	own := e.export("c0")
	e.cli("snapshot create c0@s")
	e.cli("volume clone c0@s d --size 96M")
	e.scribble("d", 96<<20, 3)
	deep := e.export("d")
	e.exit(4, "snapshot delete golden@template", "default/c0")
	e.exit(4, "volume delete golden --force", "default/c0")
	e.must(e.Daemon.Kill())
	e.restart()
	e.sameImages(deep, e.NBD("d"))
	e.sameImages(own, e.NBD("c0"))
	for i := 1; i < 8; i++ {
		e.sameImages(raw, e.NBD(fmt.Sprint("c", i)))
	}
	var v struct {
		Parent string
		Space  struct{ Live, Inherited uint64 }
	}
	e.must(e.CLIJSON(e.ctx, &v, "volume", "show", "c1"))
	if v.Parent != "default/golden@template" || v.Space.Live == 0 || v.Space.Inherited != v.Space.Live {
		t.Errorf("%+v", v)
	}
	e.cli("volume flatten d")
	e.sameImages(deep, e.NBD("d"))
	e.cli("volume delete c0 --force")
	for i := 1; i < 8; i++ {
		e.cli(fmt.Sprint("volume delete c", i))
	}
	e.cli("volume delete golden --force")
	e.must(e.Daemon.Kill())
	e.restart()
	e.sameImages(deep, e.NBD("d"))
	e.cli("volume check d")
}

// TestShrinkThroughTools: smaller only with force, and never silently.
func TestShrinkThroughTools(t *testing.T) {
	e := start(t)
	e.must(e.Create(e.ctx, "v", "64M"))
	e.qemuIO("v", "-c", "write -P 1 0 40M", "-c", "flush")
	e.exit(6, "volume resize v 32M", "8MiB", "would be lost")
	e.cli("volume resize v 32M --force")
	e.cli("volume resize v 64M")
	e.qemuIO("v", "-r", "-c", "read -P 1 0 32M", "-c", "read -P 0 32M 32M")
}

// TestImportAndExport: images of several formats go in and come out the same and
// sparse.
func TestImportAndExport(t *testing.T) {
	e := start(t)
	src := holeyImage(e, 64<<20)
	dir := filepath.Dir(src)
	for _, format := range []string{"raw", "qcow2", "vmdk"} {
		image := src
		if format != "raw" {
			image = filepath.Join(dir, "src."+format)
			e.run("qemu-img", "convert", "-f", "raw", "-O", format, src, image)
		}
		e.cli("volume import " + image + " " + format + " --format " + format)
		e.sameImages(src, e.NBD(format))
		if n := e.allocated(format); n > 17<<20 {
			t.Errorf("%s: %d bytes allocated for 16 MiB of data", format, n)
		}
	}
	e.cli("volume import " + e.NBD("raw") + " copy --format raw")
	e.sameImages(src, e.NBD("copy"))
	e.exit(1, "volume import "+src+" raw --format raw", "exists already")
	e.exit(1, "volume import /nosuch x", "nosuch")

	raw, qcow := filepath.Join(dir, "out.raw"), filepath.Join(dir, "out.qcow2")
	e.cli("volume export raw " + raw)
	e.run("cmp", src, raw)
	info, err := os.Stat(raw)
	e.must(err)
	if used := info.Sys().(*syscall.Stat_t).Blocks * 512; used > 18<<20 {
		t.Errorf("the exported file takes %d bytes for 16 MiB of data", used)
	}
	e.cli("volume export raw " + qcow + " --format qcow2")
	e.run("qemu-img", "compare", "-f", "raw", "-F", "qcow2", src, qcow)
	e.run("sh", "-c", fmt.Sprintf("%s --socket %s volume export raw - | cmp - %s", e.Scoria, e.ControlSocket(), src))
	if list := e.cli("snapshot list raw"); strings.Contains(list, "export") {
		t.Errorf("an export left its snapshot:\n%s", list)
	}
}

// TestInterruptedTransfersLeaveNothing: an import, export or receive that is
// interrupted or killed leaves nothing half made.
func TestInterruptedTransfersLeaveNothing(t *testing.T) {
	e := start(t)
	dir := scratch(t, false)
	fifo := filepath.Join(dir, "fifo")
	e.must(e.Create(e.ctx, "v", "64M"))
	e.scribble("v", 64<<20, 1)
	e.cli("snapshot create v@s")
	stream := filepath.Join(dir, "s.stream")
	e.cli("volume export v@s " + stream + " --format stream")
	whole, err := os.ReadFile(stream)
	e.must(err)

	// A receive whose sender stalls.
	e.must(syscall.Mkfifo(fifo, 0o600))
	cmd := exec.Command(e.Scoria, "--socket", e.ControlSocket(), "volume", "receive", "new", fifo)
	e.must(cmd.Start())
	w, err := os.OpenFile(fifo, os.O_WRONLY, 0)
	e.must(err)
	_, err = w.Write(whole[:len(whole)/2])
	e.must(err)
	e.poll("the volume that is being received", func() (bool, error) {
		out, err := e.CLI(e.ctx, "volume", "list")
		return strings.Contains(out, "incomplete"), err
	})
	e.must(cmd.Process.Signal(os.Interrupt))
	if err := cmd.Wait(); err == nil {
		t.Error("an interrupted receive ends as if it had succeeded")
	}
	e.must(w.Close())
	e.poll("the end of what was half received", func() (bool, error) {
		out, err := e.CLI(e.ctx, "volume", "list")
		return !strings.Contains(out, "new"), err
	})

	// An import that is interrupted, one whose daemon dies, and one that is killed.
	e.run("sh", "-c", "head -c 512M /dev/urandom >"+filepath.Join(dir, "big"))
	for _, end := range []string{"interrupt", "kill the daemon", "kill"} {
		cmd := exec.Command(e.Scoria, "--socket", e.ControlSocket(), "volume", "import", "--format", "raw", filepath.Join(dir, "big"), "imported")
		e.must(cmd.Start())
		e.poll("the volume that is being imported", func() (bool, error) {
			out, err := e.CLI(e.ctx, "volume", "list")
			return strings.Contains(out, "incomplete"), err
		})
		switch end {
		case "kill the daemon":
			e.must(e.Daemon.Kill())
			e.restart()
		case "kill":
			e.must(cmd.Process.Kill())
		default:
			e.must(cmd.Process.Signal(os.Interrupt))
		}
		if err := cmd.Wait(); err == nil {
			t.Fatal("an interrupted import ends as if it had succeeded; is it too small?")
		}
		if end == "kill" { // the daemon finds out
			e.poll("the end of the import", func() (bool, error) {
				out, err := e.CLI(e.ctx, "volume", "list")
				return !strings.Contains(out, "imported"), err
			})
		}
		if out := e.cli("volume list"); strings.Contains(out, "imported") {
			t.Errorf("left after an import (%s):\n%s", end, out)
		}
	}

	// An export that is killed, by itself and with its daemon.
	for _, restart := range []bool{false, true} {
		e.killedExport(restart)
	}
}

// killedExport sees that the temporary snapshot of an export goes when that is killed.
func (e *env) killedExport(restart bool) {
	e.Helper()
	cmd := exec.Command(e.Scoria, "--socket", e.ControlSocket(), "volume", "export", "v", "-")
	cmd.Stdout = stalled(e.T)
	e.must(cmd.Start())
	e.poll("the export's snapshot", func() (bool, error) {
		out, err := e.CLI(e.ctx, "snapshot", "list", "v")
		return strings.Contains(out, "export-"), err
	})
	if restart {
		e.must(e.Daemon.Kill())
	}
	e.must(cmd.Process.Kill())
	_ = cmd.Wait()
	if restart {
		e.restart()
	}
	e.poll("the end of the export's snapshot", func() (bool, error) {
		out, err := e.CLI(e.ctx, "snapshot", "list", "v")
		return !strings.Contains(out, "export-"), err
	})
}

// stalled is a pipe that nobody reads.
func stalled(t *testing.T) *os.File {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		r.Close()
		w.Close()
	})
	return w
}

// TestIncrementalChainElsewhere: a whole copy and a chain of changes, through
// pipes into another daemon that is killed in between, give the same snapshots.
func TestIncrementalChainElsewhere(t *testing.T) {
	a, b := start(t), start(t)
	const size = 128 << 20
	a.must(a.Create(a.ctx, "v", "128M", "--sco-size", "4M"))
	ship := func(words string) {
		t.Helper()
		a.run("bash", "-c", fmt.Sprintf("set -o pipefail; %s --socket %s volume export %s - | %s --socket %s volume receive copy",
			a.Scoria, a.ControlSocket(), words, b.Scoria, b.ControlSocket()))
	}
	for i := range 6 {
		a.scribble("v", size, uint64(i))
		a.cli(fmt.Sprint("snapshot create v@s", i))
		if i == 3 {
			a.cli("volume resize v 160M")
		}
		if i == 0 {
			ship("v@s0 --format stream")
		} else {
			ship(fmt.Sprintf("--since s%d v@s%d", i-1, i))
		}
		if i%2 == 1 {
			b.must(b.Daemon.Kill())
			b.restart()
		}
	}
	for i := range 6 {
		name := fmt.Sprint("@s", i)
		a.sameImages(a.NBD("v"+name), b.NBD("copy"+name))
	}
	a.sameImages(a.NBD("v"), b.NBD("copy"))
	b.cli("volume check copy")

	// Interrupted half-way and gone on with, the daemon having died meanwhile.
	a.scribble("v", size, 99)
	a.cli("snapshot create v@last")
	var whole bytes.Buffer
	cmd := exec.CommandContext(a.ctx, a.Scoria, "--socket", a.ControlSocket(), "volume", "export", "--since", "s5", "v@last", "-")
	cmd.Stdout = &whole
	a.must(cmd.Run())
	half := filepath.Join(scratch(t, false), "half")
	a.must(os.WriteFile(half, whole.Bytes()[:whole.Len()/2], 0o600))
	b.exit(1, "volume receive --resumable copy "+half, "--start")
	b.must(b.Daemon.Kill())
	b.restart()
	at := strings.TrimSpace(b.cli("volume receive --position copy"))
	if n, err := strconv.ParseUint(at, 10, 64); err != nil || n == 0 {
		t.Fatalf("position %q", at)
	}
	ship("--since s5 --start " + at + " v@last")
	a.sameImages(a.NBD("v@last"), b.NBD("copy@last"))
	a.sameImages(a.NBD("v"), b.NBD("copy"))
}

// TestGuestSnapshotUnderLoad: a guest writes with fio; meanwhile its disk is
// snapshotted and cloned. The clones mount and their file systems are clean, the
// guest notices nothing, and a quiesced snapshot needs no recovery at all.
func TestGuestSnapshotUnderLoad(t *testing.T) {
	e := start(t)
	e.must(e.Create(e.ctx, "v", "512M"))
	vm := e.boot(qemu.Options{Disks: []qemu.Disk{e.disk("v", 2)}})
	e.guest(vm, `set -e
mkfs.ext4 -q /dev/vda; mount /dev/vda /mnt
dd if=/dev/urandom of=/mnt/kept bs=1M count=20 2>&1; sync
md5sum </mnt/kept >/mnt/sum; sync`)
	e.must(vm.Background(e.ctx, "fio", `fio --name=l --directory=/mnt --size=64m --rw=randwrite --bs=4k --ioengine=libaio --iodepth=16 --direct=1 `+
		`--time_based --runtime=240 --fsync=64 --trigger-file=/tmp/stop --eta=never 2>&1`))
	time.Sleep(2 * time.Second)
	for i := range 5 {
		began := time.Now()
		e.cli(fmt.Sprint("snapshot create v@s", i))
		t.Logf("snapshot %d under load: %v", i, time.Since(began))
		time.Sleep(500 * time.Millisecond)
	}
	e.cli("volume clone v@s2 c")
	e.cli("volume clone v@s4 d")
	e.guest(vm, "kill -INT $(pidof fio) 2>/dev/null; for i in $(seq 600); do pidof fio >/dev/null || break; sleep 0.2; done; ! pidof fio")
	e.guest(vm, "set -e; umount /mnt; mount /dev/vda /mnt; md5sum </mnt/kept | cmp - /mnt/sum; umount /mnt")
	e.powerOff(vm)

	// Another guest boots with the clones as disks: their journals recover.
	vm = e.boot(qemu.Options{Disks: []qemu.Disk{e.disk("c", 1), e.disk("d", 1)}})
	e.guest(vm, `set -e
for d in vda vdb; do
	mount /dev/$d /mnt; md5sum </mnt/kept | cmp - /mnt/sum
	dd if=/dev/urandom of=/mnt/more bs=1M count=20 2>&1; umount /mnt
done`)
	e.powerOff(vm)
	for _, v := range []string{"v", "c", "d"} {
		e.fsck(v)
	}
	e.cli("volume flatten c")
	e.fsck("c")
	for _, v := range []string{"v", "c", "d"} {
		e.cli("volume check " + v)
	}
	e.cli("volume delete d")
	e.cli("volume delete v --force")
	e.fsck("c")
}

// TestGuestsBootFromClones: a template's clones boot, two at once, and each keeps to
// itself what its guest writes.
func TestGuestsBootFromClones(t *testing.T) {
	e := start(t)
	e.must(e.Create(e.ctx, "gold", "64M"))
	file := filepath.Join(scratch(t, false), "boot.raw")
	e.must(guest.WriteBootDisk(e.ctx, file, 64<<20))
	e.run("nbdcopy", file, e.NBD("gold"))
	e.cli("snapshot create gold@v1")
	e.cli("volume template gold")
	e.cli("volume clone gold@v1 a b")
	var vms []*qemu.VM
	for _, name := range []string{"a", "b"} {
		d := e.disk(name, 1)
		d.Boot = true
		vm := e.launch(qemu.Options{Disks: []qemu.Disk{d}})
		vms = append(vms, vm)
		e.must(vm.ConsoleHas(e.ctx, guest.GrubGreeting))
	}
	for i, vm := range vms {
		e.must(vm.Reattach(e.ctx))
		e.guest(vm, fmt.Sprintf("set -e; mount /dev/vda1 /mnt; ls /mnt/vmlinuz; test ! -e /mnt/mine; echo %d >/mnt/mine; umount /mnt", i))
	}
	for i, vm := range vms {
		e.guest(vm, fmt.Sprintf("set -e; mount -o ro /dev/vda1 /mnt; test $(cat /mnt/mine) = %d; umount /mnt", i))
		e.powerOff(vm)
	}
	for _, v := range []string{"gold", "a", "b"} {
		e.cli("volume check " + v)
	}
}
