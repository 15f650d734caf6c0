package integration

import (
	"bytes"
	"crypto/rand"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"scoria/integration/bed"
	"scoria/integration/qemu"
)

// qemuIO runs qemu-io commands on a volume. The output is searched for failures
// besides the exit code, which not every release sets for a pattern that differs.
// A client that kills itself with "sigraise 9" is all right.
func (e *env) qemuIO(volume string, args ...string) string {
	e.Helper()
	out, err := bed.Run(e.ctx, "qemu-io", append([]string{"-f", "raw", e.NBD(volume)}, args...)...)
	if err != nil && !strings.Contains(err.Error(), "signal: killed") {
		e.Fatal(err)
	}
	for _, bad := range []string{"Pattern verification failed", "failed:"} {
		if strings.Contains(out, bad) {
			e.Fatalf("qemu-io %q: %s", args, out)
		}
	}
	return out
}

// imageInfo is what `qemu-img info --output=json` says.
type imageInfo struct {
	Format      string `json:"format"`
	VirtualSize int64  `json:"virtual-size"`
}

// TestNBDQemuImgCreateAndInfo: `qemu-img create` makes a volume, `info` sees it,
// and the command line lists it.
func TestNBDQemuImgCreateAndInfo(t *testing.T) {
	e := start(t)
	e.run("qemu-img", "create", "-q", "-f", "raw", e.NBD("made"), "96M")
	var info imageInfo
	e.must(json.Unmarshal([]byte(e.run("qemu-img", "info", "-f", "raw", "--output=json", e.NBD("made"))), &info))
	if info.VirtualSize != 96<<20 {
		t.Fatalf("size %d, created with %d", info.VirtualSize, 96<<20)
	}
	if out := e.ok(e.CLI(e.ctx, "volume", "list")); !strings.Contains(out, "made") {
		t.Fatalf("not listed:\n%s", out)
	}
	// Creating again with the same size must not lose what is there; qemu-img
	// itself zeroes the first sector, lest an old image's header be found there.
	e.qemuIO("made", "-c", "write -P 0x5a 0 64k", "-c", "flush")
	e.run("qemu-img", "create", "-q", "-f", "raw", e.NBD("made"), "96M")
	e.qemuIO("made", "-r", "-c", "read -P 0 0 512", "-c", "read -P 0x5a 512 65024", "-c", "read -P 0 64k 1M")
}

// TestNBDQemuImgConvert: an image with data and holes goes in and comes out
// unchanged, by qemu-img and by nbdcopy, also after the daemon was killed, and
// its holes occupy nothing.
func TestNBDQemuImgConvert(t *testing.T) {
	e := start(t)
	src := holeyImage(e, 64<<20)
	e.must(e.Create(e.ctx, "v", "64M"))
	e.run("qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", src, e.NBD("v"))
	e.run("qemu-img", "compare", "-f", "raw", "-F", "raw", src, e.NBD("v"))
	if got := e.allocated("v"); got > 24<<20 {
		t.Errorf("%d bytes allocated for an image with 16 MiB of data", got)
	}
	e.must(e.Daemon.Kill())
	e.restart()
	e.run("qemu-img", "compare", "-f", "raw", "-F", "raw", src, e.NBD("v"))

	qcow := filepath.Join(filepath.Dir(src), "out.qcow2")
	e.run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", e.NBD("v"), qcow)
	e.run("qemu-img", "compare", "-f", "raw", "-F", "qcow2", src, qcow)

	e.must(e.Create(e.ctx, "w", "64M"))
	e.run("nbdcopy", "--connections=4", src, e.NBD("w"))
	e.run("qemu-img", "compare", "-f", "raw", "-F", "raw", e.NBD("v"), e.NBD("w"))
	e.run("cmp", src, e.export("w"))
}

// holeyImage makes a raw image with 16 MiB of random data in four places.
func holeyImage(e *env, size int64) string {
	e.Helper()
	name := filepath.Join(scratch(e.T, false), "src.raw")
	f, err := os.Create(name)
	e.must(err)
	data := make([]byte, 4<<20)
	_, err = rand.Read(data)
	e.must(err)
	for i := range int64(4) {
		_, err := f.WriteAt(data, i*size/4+i*12288)
		e.must(err)
	}
	e.must(f.Truncate(size))
	e.must(f.Close())
	return name
}

// TestNBDQemuImgMap: written ranges are data, discarded and untouched ones holes.
func TestNBDQemuImgMap(t *testing.T) {
	e := start(t)
	e.must(e.Create(e.ctx, "v", "32M"))
	e.qemuIO("v", "-d", "unmap", "-c", "write -P 1 4M 4M", "-c", "discard 5M 1M", "-c", "write -z -u 7M 512k", "-c", "flush")
	var extents []struct {
		Start  int64 `json:"start"`
		Length int64 `json:"length"`
		Data   bool  `json:"data"`
		Zero   bool  `json:"zero"`
	}
	e.must(json.Unmarshal([]byte(e.run("qemu-img", "map", "-f", "raw", "--output=json", e.NBD("v"))), &extents))
	data := make([]bool, 64) // per half MiB
	for _, x := range extents {
		for at := x.Start; at < x.Start+x.Length; at += 512 << 10 {
			data[at>>19] = x.Data
		}
	}
	for i, d := range data {
		at := float64(i) / 2
		if want := at >= 4 && at < 8 && !(at >= 5 && at < 6) && at != 7; d != want {
			t.Errorf("at %.1f MiB: data %v, want %v (%+v)", at, d, want, extents)
		}
	}
	e.qemuIO("v", "-r", "-c", "read -P 0 0 4M", "-c", "read -P 1 4M 1M", "-c", "read -P 0 5M 1M", "-c", "read -P 1 6M 1M",
		"-c", "read -P 0 7M 512k", "-c", "read -P 1 7680k 512k", "-c", "read -P 0 8M 24M")
}

// TestNBDQemuIO: unaligned requests, FUA, zeroes and the end of the volume.
func TestNBDQemuIO(t *testing.T) {
	e := start(t)
	e.must(e.Create(e.ctx, "v", "16M"))
	e.qemuIO("v", "-c", "write -P 7 0 1M", "-c", "write -P 8 512 512", "-c", "write -f -P 9 4608 1024", "-c", "write -z 8192 4096",
		"-c", "write -P 10 16776704 512", "-c", "aio_write -P 11 2M 1M", "-c", "aio_write -P 12 3M 1M", "-c", "aio_flush", "-c", "flush")
	e.qemuIO("v", "-r", "-c", "read -P 7 0 512", "-c", "read -P 8 512 512", "-c", "read -P 7 1024 3584", "-c", "read -P 9 4608 1024",
		"-c", "read -P 0 8192 4096", "-c", "read -P 7 12288 4096", "-c", "read -P 10 16776704 512", "-c", "read -P 11 2M 1M", "-c", "read -P 12 3M 1M")
	out, err := bed.Run(e.ctx, "qemu-io", "-f", "raw", "-r", e.NBD("v"), "-c", "read 16M 512")
	if err == nil && !strings.Contains(out, "failed") && !strings.Contains(out, "out") {
		t.Errorf("a read behind the end is answered: %s", out)
	}
}

// TestNBDQemuImgBench: qemu-img's own load, with several requests under way.
func TestNBDQemuImgBench(t *testing.T) {
	e := start(t)
	e.must(e.Create(e.ctx, "v", "64M"))
	e.run("qemu-img", "bench", "-f", "raw", "-t", "none", "-w", "-c", "5000", "-d", "32", "-s", "4096", e.NBD("v"))
	e.run("qemu-img", "bench", "-f", "raw", "-t", "none", "-w", "-c", "500", "-d", "8", "-s", "65536", "--flush-interval=10", e.NBD("v"))
	e.run("qemu-img", "bench", "-f", "raw", "-t", "none", "-c", "5000", "-d", "32", "-s", "4096", e.NBD("v"))
}

// TestNBDInfo: what the server announces, and its list of exports.
func TestNBDInfo(t *testing.T) {
	e := start(t)
	e.must(e.Create(e.ctx, "v1", "64M"))
	e.must(e.Create(e.ctx, "v2", "1G"))
	var all struct {
		Protocol   string `json:"protocol"`
		Structured bool   `json:"structured"`
		Exports    []struct {
			Name      string   `json:"export-name"`
			Size      int64    `json:"export-size"`
			Contexts  []string `json:"contexts"`
			Trim      bool     `json:"can_trim"`
			Zero      bool     `json:"can_zero"`
			FUA       bool     `json:"can_fua"`
			Flush     bool     `json:"can_flush"`
			MultiConn bool     `json:"can_multi_conn"`
			ReadOnly  bool     `json:"is_read_only"`
			Minimum   int64    `json:"block_size_minimum"`
			Preferred int64    `json:"block_size_preferred"`
			Maximum   int64    `json:"block_size_maximum"`
		} `json:"exports"`
	}
	e.must(json.Unmarshal([]byte(e.run("nbdinfo", "--json", "--list", "nbd+unix://?socket="+e.NBDSocket())), &all))
	if all.Protocol != "newstyle-fixed" || !all.Structured || len(all.Exports) != 2 {
		t.Fatalf("%+v", all)
	}
	sizes := map[string]int64{"default/v1": 64 << 20, "default/v2": 1 << 30}
	for _, x := range all.Exports {
		if x.Size != sizes[x.Name] {
			t.Errorf("%s: size %d, want %d", x.Name, x.Size, sizes[x.Name])
		}
		if !x.Trim || !x.Zero || !x.FUA || !x.Flush || !x.MultiConn || x.ReadOnly {
			t.Errorf("%s: lacks an ability: %+v", x.Name, x)
		}
		if x.Minimum < 1 || x.Preferred != 4096 || x.Maximum < 1<<20 {
			t.Errorf("%s: block sizes %d, %d, %d", x.Name, x.Minimum, x.Preferred, x.Maximum)
		}
		if !strings.Contains(fmt.Sprint(x.Contexts), "base:allocation") {
			t.Errorf("%s: contexts %q", x.Name, x.Contexts)
		}
	}
	_, err := bed.Run(e.ctx, "nbdinfo", e.NBD("nosuch"))
	e.refused(err, "nosuch")
}

// TestNBDFio: fio's nbd engine, with verify.
func TestNBDFio(t *testing.T) {
	e := start(t)
	e.must(e.Create(e.ctx, "v", "64M"))
	out := e.run("fio", "--name=n", "--ioengine=nbd", "--uri="+e.NBD("v"), "--rw=randwrite", "--bsrange=4k-128k", "--size=48M",
		"--iodepth=16", "--fsync=128", "--verify=crc32c", "--verify_fatal=1", "--verify_state_save=0", "--eta=never")
	if !bytes.Contains([]byte(out), []byte("err= 0")) {
		t.Fatal(out)
	}
}

// TestNBDSurvivesItsClients: clients that die in the middle leave the volume usable.
func TestNBDSurvivesItsClients(t *testing.T) {
	e := start(t)
	e.must(e.Create(e.ctx, "v", "64M"))
	for range 5 {
		e.qemuIO("v", "-c", "write -P 1 0 8M", "-c", "aio_write -P 2 8M 8M", "-c", "sigraise 9")
	}
	e.qemuIO("v", "-c", "read -P 1 0 8M", "-c", "write -P 3 0 4k", "-c", "flush")
}

// TestOneWriterNBDAndGuest: while a guest writes to a volume, a helper-socket
// client can't; once the guest is gone it can.
func TestOneWriterNBDAndGuest(t *testing.T) {
	e := start(t)
	e.must(e.Create(e.ctx, "v", "64M"))
	vm := e.boot(qemu.Options{Disks: []qemu.Disk{e.disk("v", 1)}})
	e.guest(vm, "dd if=/dev/zero bs=64k count=16 of=/dev/vda oflag=direct 2>&1")
	out, err := bed.Run(e.ctx, "qemu-io", "-f", "raw", e.NBD("v"), "-c", "write -P 1 0 64k")
	if err == nil && !strings.Contains(out, "failed") {
		t.Errorf("a second writer got through: %s", out)
	}
	e.powerOff(vm)
	e.qemuIO("v", "-c", "read -P 0 0 64k", "-c", "write -P 1 0 64k")
}
