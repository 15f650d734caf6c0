package integration

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"scoria/integration/bed"
	"scoria/integration/shmtools"
)

var tools = sync.OnceValues(func() (shmtools.Tools, error) {
	return shmtools.Build(context.Background(), filepath.Join(binDir, "shm"))
})

// shmTools returns what stands on the C client, or skips where fio's headers are
// not there and need not be.
func shmTools(t *testing.T) shmtools.Tools {
	t.Helper()
	built, err := tools()
	if errors.Is(err, fs.ErrNotExist) && os.Getenv("SCORIA_REQUIRE") == "" {
		t.Skip(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	return built
}

// fioArgs is a fio job on a volume through the engine.
func (e *env) fioArgs(t shmtools.Tools, volume string, args ...string) []string {
	return append([]string{
		"--name=job", "--ioengine=external:" + t.Engine, "--volume=default/" + volume, "--scoria_socket=" + e.ShmSocket(),
		"--bs=4k", "--iodepth=32", "--verify_state_save=0", "--aux-path=" + e.DataDir,
	}, args...)
}

// TestShmFio: fio's own verification through the engine, several jobs and sizes.
func TestShmFio(t *testing.T) {
	built := shmTools(t)
	e := start(t)
	e.must(e.Create(e.ctx, "v", "512M"))
	e.run("fio", e.fioArgs(built, "v", "--rw=randwrite", "--size=64M", "--verify=crc32c", "--fsync=64")...)
	e.run("fio", e.fioArgs(built, "v", "--rw=write", "--bsrange=512-256k", "--size=96M", "--verify=crc32c", "--verify_backlog=64")...)
	e.run("fio", e.fioArgs(built, "v", "--rw=randrw", "--numjobs=4", "--size=32M", "--offset_increment=64M", "--verify=crc32c")...)
	e.run("fio", e.fioArgs(built, "v", "--rw=randtrim", "--size=16M", "--poll_us=0")...)
	e.refused(e.error("fio", e.fioArgs(built, "none", "--rw=read", "--size=4k")...), "none")
}

func (e *env) error(name string, args ...string) error {
	_, err := bed.Run(e.ctx, name, args...)
	return err
}

// nbdkit runs a shell command with $uri of nbdkit serving a volume.
func (e *env) nbdkit(t shmtools.Tools, volume, command string) string {
	e.Helper()
	return e.run("nbdkit", "-U", "-", t.Plugin, "volume="+volume, "socket="+e.ShmSocket(), "--run", command)
}

// TestShmNbdkit: nbdcopy and qemu-img through the plugin.
func TestShmNbdkit(t *testing.T) {
	built := shmTools(t)
	e := start(t)
	const size = 128 << 20
	e.must(e.Create(e.ctx, "v", fmt.Sprint(size)))
	image, back := holeyImage(e, size), filepath.Join(e.DataDir, "back.img")
	e.nbdkit(built, "v", fmt.Sprintf("nbdcopy %s $uri && nbdcopy --flush $uri %s", image, back))
	e.run("cmp", image, back)
	e.nbdkit(built, "v", fmt.Sprintf("qemu-img compare -f raw -F raw %s $uri", image))
	e.nbdkit(built, "v", fmt.Sprintf("qemu-img convert -n -f raw -O raw %s $uri && qemu-img compare -f raw -F raw %s $uri", image, image))
	info := e.nbdkit(built, "v", "nbdinfo $uri")
	for _, want := range []string{"can_fua: true", "can_multi_conn: true", "can_trim: true", "block_size_minimum: 1\n"} {
		if !strings.Contains(info, want) {
			t.Errorf("nbdinfo does not say %q:\n%s", want, info)
		}
	}
	// What came through shared memory is the same through the helper socket.
	e.run("qemu-img", "compare", "-f", "raw", "-F", "raw", image, e.NBD("v"))
}

// TestShmNbdkitUnaligned: requests through the plugin begin and end at any byte,
// whatever the volume's block, and change nothing beside what they say; several
// at once that share blocks lose nothing of each other's.
func TestShmNbdkitUnaligned(t *testing.T) {
	built := shmTools(t)
	e := start(t)
	script := " -c 'write -P 0x11 0 1M' -c 'write -P 0x22 1 1' -c 'write -P 0x33 4095 2' -c 'write -P 0x44 8192 4097' -c 'write -f -P 0x55 20001 30000'" +
		" -c 'write -P 0x66 65000 536' -c 'write -z 70001 3' -c 'write -z 80000 9001' -c 'write -z -u 100001 99999' -c 'aio_write -P 0x77 300001 250' -c 'aio_write -P 0x88 300251 250' -c aio_flush"
	for _, block := range []string{"512", "4096"} {
		volume := "v" + block
		e.ok(e.CLI(e.ctx, "volume", "create", volume, "--size", "4M", "--block-size", block))
		model := filepath.Join(e.DataDir, "model"+block)
		e.must(os.WriteFile(model, nil, 0o600))
		e.must(os.Truncate(model, 4<<20))
		e.run("sh", "-c", "qemu-io -f raw "+model+script)
		e.nbdkit(built, volume, "qemu-io -f raw $uri"+script+" && qemu-img compare -f raw -F raw $uri "+model)
		// Whole blocks are gone, the rest of the range is not.
		e.nbdkit(built, volume, "qemu-io -f raw $uri -c 'discard 524289 20000' -c 'read -P 0x11 524288 2' -c 'read -P 0 528384 8192' -c 'read -P 0x11 544288 1' -c 'read -P 0x11 544289 4096'")
		e.nbdkit(built, volume, "fio --name=job --ioengine=nbd --uri=$uri --rw=randwrite --bs=300 --iodepth=16 --size=600000 --verify=crc32c --verify_state_save=0 --aux-path="+e.DataDir)
		odd, back := filepath.Join(e.DataDir, "odd"), filepath.Join(e.DataDir, "back")
		e.must(os.WriteFile(odd, []byte(strings.Repeat("odd sizes", 111_111)), 0o600))
		e.nbdkit(built, volume, fmt.Sprintf("nbdcopy %s $uri && nbdcopy $uri %s && cmp -n 999999 %s %s", odd, back, odd, back))
	}
}

// TestP3ShmDaemonKilled: kill -9 of the daemon, again and again, under clients
// that check what they read: C client, and fio with verify in several rings.
func TestP3ShmDaemonKilled(t *testing.T) {
	built := shmTools(t)
	e := start(t)
	e.must(e.Create(e.ctx, "a", "256M"))
	e.must(e.Create(e.ctx, "b", "512M"))
	type load struct {
		name string
		args []string
	}
	ended := make(chan error, 2)
	for _, l := range []load{
		{built.SelfTest, []string{e.ShmSocket(), "default/a", "verify", "1500000"}},
		{"fio", e.fioArgs(built, "b", "--rw=randrw", "--numjobs=2", "--size=64M", "--io_size=768M", "--offset_increment=128M", "--verify=crc32c", "--verify_backlog=256", "--fsync=500")},
	} {
		go func() {
			out, err := bed.Run(e.ctx, l.name, l.args...)
			if err == nil && l.name == built.SelfTest && strings.Contains(out, " 0 reconnects") {
				err = errors.New("the load ended before the daemon was killed: " + out)
			}
			ended <- err
		}()
	}
	e.pollRings("a", 1)
	e.pollRings("b", 2)
	rnd := rand.New(rand.NewPCG(1, 1))
	kills := 0
	for left := 2; left > 0; {
		select {
		case err := <-ended:
			e.must(err)
			left--
		case <-time.After(time.Duration(50+rnd.IntN(300)) * time.Millisecond):
			if kills < 12 {
				e.must(e.Kill())
				e.must(e.Start(e.ctx))
				kills++
			}
		}
	}
	t.Logf("%d kills", kills)
	if kills == 0 {
		t.Fatal("the daemon was never killed")
	}
}

// TestP7ShmClientsKilled: kill -9 of clients in the middle of their work, again
// and again: the next one may write at once, and nothing of them stays.
func TestP7ShmClientsKilled(t *testing.T) {
	built := shmTools(t)
	e := start(t)
	e.must(e.Create(e.ctx, "v", "256M"))
	verify := []string{e.ShmSocket(), "default/v", "verify", "2000"}
	e.run(built.SelfTest, verify...)
	// The descriptors of clients: of the volume's files, the daemon keeps open what it likes.
	descriptors := func() (list []string) {
		dir := fmt.Sprintf("/proc/%d/fd", e.Process().PID())
		all, err := os.ReadDir(dir)
		e.must(err)
		for _, fd := range all {
			target, _ := os.Readlink(filepath.Join(dir, fd.Name())) // it may be closed by now
			if strings.HasPrefix(target, "socket:") || strings.HasPrefix(target, "/memfd:") || strings.HasPrefix(target, "anon_inode:[eventfd]") {
				list = append(list, target)
			}
		}
		return list
	}
	e.pollUnused("v")
	before := descriptors()
	rnd := rand.New(rand.NewPCG(2, 2))
	for range 40 {
		p, err := bed.Start(bed.Spec{Path: built.SelfTest, Args: []string{e.ShmSocket(), "default/v", "verify", "100000000"}, Log: filepath.Join(e.DataDir, "client.log")})
		e.must(err)
		select {
		case <-p.Exited():
			t.Fatalf("the client ended: %s", bed.Tail(filepath.Join(e.DataDir, "client.log"), 5))
		case <-time.After(time.Duration(1+rnd.IntN(30)) * time.Millisecond):
		}
		e.must(p.Kill())
	}
	e.run(built.SelfTest, verify...)
	e.pollUnused("v")
	e.poll("descriptors to be closed", func() (bool, error) { return len(descriptors()) <= len(before), nil })
	metrics := e.metrics()
	for _, want := range []string{"scoria_shm_connections 0", "scoria_shm_memory_bytes 0"} {
		if !strings.Contains(metrics, want) {
			t.Errorf("the metrics do not say %q", want)
		}
	}
	e.ok(e.CLI(e.ctx, "volume", "delete", "v"))
}

// pollUnused waits until nobody uses a volume.
func (e *env) pollUnused(volume string) {
	e.Helper()
	var v struct {
		UsedBy string `json:"used_by"`
	}
	e.poll("volume "+volume+" to be unused", func() (bool, error) {
		err := e.CLIJSON(e.ctx, &v, "volume", "show", volume)
		return v.UsedBy == "", err
	})
}

// pollRings waits until so many rings of a volume are served.
func (e *env) pollRings(volume string, n int) {
	e.Helper()
	want := fmt.Sprintf("scoria_shm_rings{volume=\"default/%s\"} %d\n", volume, n)
	e.poll(want, func() (bool, error) { return strings.Contains(e.metrics(), want), nil })
}
