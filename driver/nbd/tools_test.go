package nbd

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"scoria/driver/block"
	"scoria/driver/block/blocktest"
)

// tool returns a function that runs a real client. Under CI a missing one fails
// the test, elsewhere it skips it.
func tool(t *testing.T, name string) func(args ...string) (string, error) {
	t.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		if os.Getenv("CI") == "true" {
			t.Fatalf("%s is not installed (Debian: qemu-utils, libnbd-bin, fio)", name)
		}
		t.Skipf("%s is not installed (Debian: qemu-utils, libnbd-bin, fio)", name)
	}
	return func(args ...string) (string, error) {
		ctx, cancel := context.WithTimeout(context.Background(), 2*patience)
		defer cancel()
		out, err := exec.CommandContext(ctx, path, args...).CombinedOutput()
		if ctx.Err() != nil {
			hang(name + " " + strings.Join(args, " ") + " did not end: " + string(out))
		}
		return string(out), err
	}
}

// must runs a tool that has to succeed and returns what it prints.
func must(t *testing.T, run func(...string) (string, error), args ...string) string {
	t.Helper()
	out, err := run(args...)
	if err != nil {
		t.Fatalf("%s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return out
}

func (f *fixture) uri(export string) string {
	return "nbd+unix:///" + export + "?socket=" + f.path
}

// devices are the kinds of devices that the clients are tried with.
var devices = map[string]blocktest.Options{
	"512":  {Mode: blocktest.Mixed},
	"4096": {Mode: blocktest.Async, LogicalBlock: 4096},
}

func TestQemuImgCreateMakesTheVolume(t *testing.T) {
	img := tool(t, "qemu-img")
	f := serve(t, nil)
	size := func(name string) uint64 {
		if d := f.pool.Get(name); d != nil {
			return d.Info().Size
		}
		return 0
	}
	must(t, img, "create", "-f", "raw", f.uri("default/vm1"), "10G")
	must(t, img, "create", f.uri("vm2"), "-f", "raw", "5001")
	must(t, img, "create", "-f", "raw", "nbd:unix:"+f.path+":exportname=fast/vm3", "1.5M")
	for name, want := range map[string]uint64{"default/vm1": 10 << 30, "default/vm2": 8192, "fast/vm3": 3 << 19} {
		if got := size(name); got != want {
			t.Errorf("%s has %d bytes, want %d", name, got, want)
		}
	}
	// As on every NBD export, create on one that exists zeroes its first sector
	// and fails if that is smaller.
	p := pattern(8192, 1)
	c := f.connect(t, "vm2")
	c.write(0, p)
	c.nc.Close()
	await("the release of the claim", func() bool { return f.Stats().Connections == 0 })
	must(t, img, "create", "-f", "raw", f.uri("vm2"), "4096")
	clear(p[:512])
	c = f.connect(t, "vm2")
	if !bytes.Equal(c.read(0, 8192), p) {
		t.Error("create on an existing volume did not zero the first sector, or more than it")
	}
	if out, err := img("create", "-f", "raw", f.uri("vm2"), "1M"); err == nil || !strings.Contains(out, "grow") {
		t.Errorf("create larger than the volume: %v %s", err, out)
	}
	// Nothing else makes a volume, and the error says what does.
	for _, args := range [][]string{{"info", f.uri("typo")}, {"create", "-f", "raw", f.uri("typo")}, {"create", "-f", "qcow2", f.uri("typo"), "1M"}} {
		if out, err := img(args...); err == nil || args[0] == "info" && !strings.Contains(out, "scoria volume create default/typo") {
			t.Errorf("%v: %v %s", args, err, out)
		}
	}
	if size("default/typo") != 0 || f.Stats().Created != 3 {
		t.Errorf("%d volumes were created, want 3", f.Stats().Created)
	}
}

func TestQemuImgInfoMapConvertCompareBench(t *testing.T) {
	img := tool(t, "qemu-img")
	for name, opts := range devices {
		t.Run(name, func(t *testing.T) {
			opts.Name = "default/vm1"
			f := serve(t, nil, blocktest.NewRAM(32<<20, opts))
			dir := t.TempDir()
			src := filepath.Join(dir, "src")
			data := make([]byte, 20<<20+512) // holes, and an end inside a cluster
			copy(data[1<<20:], pattern(3<<20+1000, 1))
			copy(data[len(data)-700:], pattern(700, 2))
			if err := os.WriteFile(src, data, 0o600); err != nil {
				t.Fatal(err)
			}
			var info struct {
				Size uint64 `json:"virtual-size"`
			}
			if err := json.Unmarshal([]byte(must(t, img, "info", "--output=json", f.uri("vm1"))), &info); err != nil || info.Size != 32<<20 {
				t.Errorf("info: size %d, %v", info.Size, err)
			}
			must(t, img, "convert", "-n", "-f", "raw", "-O", "raw", src, f.uri("vm1"))
			must(t, img, "compare", "-f", "raw", "-F", "raw", src, f.uri("vm1"))
			// A new volume by its name, in one step.
			must(t, img, "convert", "-W", "-m", "8", "-f", "raw", "-O", "raw", src, f.uri(fmt.Sprintf("copy:size=%d", len(data))))
			must(t, img, "compare", "-f", "raw", "-F", "raw", src, f.uri("copy"))
			if out, err := img("convert", "-f", "raw", "-O", "raw", src, f.uri("none")); err == nil || !strings.Contains(out, "none:size=") {
				t.Errorf("convert to an unknown export: %v %s", err, out)
			}
			var extents []struct {
				Start, Length uint64
				Zero, Present bool
			}
			if err := json.Unmarshal([]byte(must(t, img, "map", "--output=json", "-f", "raw", f.uri("vm1"))), &extents); err != nil {
				t.Fatal(err)
			}
			if len(extents) < 5 || !extents[0].Zero || extents[0].Length != 1<<20 {
				t.Errorf("map: %+v", extents)
			}
			back := filepath.Join(dir, "back.qcow2")
			must(t, img, "convert", "-f", "raw", "-O", "qcow2", f.uri("vm1"), back)
			must(t, img, "compare", "-f", "qcow2", "-F", "raw", back, f.uri("vm1"))
			must(t, img, "bench", "-f", "raw", "-c", "2000", "-d", "32", "-s", "4096", f.uri("vm1"))
			must(t, img, "bench", "-f", "raw", "-w", "-c", "2000", "-d", "16", "-s", "5000", "-S", "7001", "--flush-interval=50", f.uri("vm1"))
		})
	}
}

func TestQemuIO(t *testing.T) {
	qio := tool(t, "qemu-io")
	for name, opts := range devices {
		t.Run(name, func(t *testing.T) {
			opts.Name = "default/vm1"
			f := serve(t, nil, blocktest.NewRAM(16<<20, opts))
			var args []string
			for _, c := range []string{
				"write -P 1 0 1M", "write -f -P 2 4k 4k", "write -P 3 511 3", "write -z 64k 64k", "write -z -u 128k 1000", "discard 256k 64k", "flush",
				"aio_write -P 4 2M 1M", "aio_write -P 5 4M 8k", "aio_flush",
				"read -P 1 0 511", "read -P 3 511 3", "read -P 1 514 3582", "read -P 2 4k 4k", "read -P 0 64k 64k", "read -P 0 128k 1000", "read -P 0 256k 64k",
				"read -P 1 320k 8k", "read -P 4 2M 1M", "read -P 5 4M 8k", "writev -P 6 5M 512 1024 4096", "read -P 6 5M 5632", "read -P 0 15M 1M",
			} {
				args = append(args, "-c", c)
			}
			out := must(t, qio, append(append([]string{"-f", "raw"}, args...), f.uri("vm1"))...)
			if strings.Contains(out, "fail") || strings.Contains(out, "rror") {
				t.Error(out)
			}
			if out, err := qio("-f", "raw", "-c", "write 16M 512", f.uri("vm1")); err == nil {
				t.Errorf("write behind the end: %s", out)
			}
		})
	}
}

func TestSecondProcessMayReadButNotWrite(t *testing.T) {
	qio := tool(t, "qemu-io")
	d := ram(1<<20, blocktest.Options{})
	f := serve(t, nil, d)
	c := f.connect(t, "vm1")
	c.write(0, bytes.Repeat([]byte{9}, 4096))
	must(t, qio, "-f", "raw", "-r", "-c", "read -P 9 0 4k", f.uri("vm1"))
	if out, err := qio("-f", "raw", "-c", "write 0 4k", f.uri("vm1")); err == nil || !strings.Contains(out, "not permitted") {
		t.Errorf("write to a volume in use: %v %s", err, out)
	}
	c.nc.Close()
	await("the release of the claim", func() bool { _, ok := d.Claimed(); return !ok })
	must(t, qio, "-f", "raw", "-c", "write 0 4k", f.uri("vm1"))
	// qemu-io has gone and with it its claim.
	await("the release of the claim", func() bool { _, ok := d.Claimed(); return !ok })
	if _, err := d.Claim(block.Claimant{Kind: "vhost", ID: "1"}); err != nil {
		t.Error(err)
	}
}

func TestLibnbdTools(t *testing.T) {
	info, cp := tool(t, "nbdinfo"), tool(t, "nbdcopy")
	for name, opts := range devices {
		t.Run(name, func(t *testing.T) {
			opts.Name = "default/vm1"
			f := serve(t, nil, blocktest.NewRAM(32<<20, opts), ram(1<<20, blocktest.Options{Name: "fast/vm2", ReadOnly: true}))
			out := must(t, info, "--list", f.uri(""))
			for _, want := range []string{`export="default/vm1"`, `export="fast/vm2"`} {
				if !strings.Contains(out, want) {
					t.Errorf("the list has no %s:\n%s", want, out)
				}
			}
			out = must(t, info, f.uri("vm1"))
			for _, want := range []string{"structured", "can_multi_conn: true", "can_fast_zero: true", "can_fua: true", "can_df: true", "is_read_only: false", "block_size_preferred: 4096", "base:allocation"} {
				if !strings.Contains(out, want) {
					t.Errorf("nbdinfo has no %q:\n%s", want, out)
				}
			}
			// A file whose size fits no block, over several connections.
			src, back := filepath.Join(t.TempDir(), "src"), filepath.Join(t.TempDir(), "back")
			data := make([]byte, 9_999_999)
			copy(data[2<<20:], pattern(4<<20, 3))
			copy(data[len(data)-1000:], pattern(1000, 4))
			if err := os.WriteFile(src, data, 0o600); err != nil {
				t.Fatal(err)
			}
			must(t, cp, "--flush", "--connections=4", src, f.uri("vm1"))
			if err := os.WriteFile(back, nil, 0o600); err != nil {
				t.Fatal(err)
			}
			must(t, cp, f.uri("vm1"), back)
			got, err := os.ReadFile(back)
			if err != nil || len(got) != 32<<20 || !bytes.Equal(got[:len(data)], data) || !bytes.Equal(got[len(data):], make([]byte, 32<<20-len(data))) {
				t.Errorf("nbdcopy there and back: %d bytes, %v", len(got), err)
			}
			must(t, cp, src, f.uri("other:size=10000000"))
			if out := must(t, info, "--map", f.uri("other")); !strings.Contains(out, "hole,zero") || !strings.Contains(out, "data") {
				t.Errorf("map of a sparse volume:\n%s", out)
			}
			if out := must(t, info, "--size", f.uri("other")); strings.TrimSpace(out) != "10002432" {
				t.Errorf("size %s", out)
			}
		})
	}
}

func TestFio(t *testing.T) {
	fio := tool(t, "fio")
	if out, _ := fio("--enghelp"); !strings.Contains(out, "nbd") {
		if os.Getenv("CI") == "true" {
			t.Fatal("this fio has no nbd engine")
		}
		t.Skip("this fio has no nbd engine")
	}
	f := serve(t, nil, ram(32<<20, blocktest.Options{Mode: blocktest.Mixed}))
	t.Chdir(t.TempDir()) // fio leaves its verify state there
	out := must(t, fio, "--name=job", "--ioengine=nbd", "--uri="+f.uri("vm1"), "--rw=randwrite", "--bsrange=512-128k", "--iodepth=32", "--size=32M",
		"--io_size=32M", "--verify=crc32c", "--do_verify=1", "--fsync=64", "--randseed=7")
	if !strings.Contains(out, "err= 0") {
		t.Error(out)
	}
	must(t, fio, "--name=job", "--ioengine=nbd", "--uri="+f.uri("vm1"), "--rw=randtrim", "--bs=64k", "--iodepth=8", "--size=32M", "--io_size=8M")
	if f.Stats().Ops["flush"].Count == 0 || f.Stats().Ops["trim"].Count == 0 {
		t.Error("fio's fsync or trim did not arrive")
	}
}
