package host

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/rs/zerolog"
	"golang.org/x/sys/unix"

	"scoria/alba/vfs"
	"scoria/driver/block"
	"scoria/driver/control"
)

func testConfig(t *testing.T) Config {
	t.Helper()
	dir, err := os.MkdirTemp("/dev/shm", "scoria-host-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	c := DefaultConfig()
	c.DataDir, c.RunDir = t.TempDir(), dir
	c.WriteBuffer.Size = 64 << 20
	return c
}

func startHost(t *testing.T, c Config) (*Host, *control.Client) {
	t.Helper()
	h, err := Start(testContext(t), c, "test", zerolog.Nop())
	if err != nil {
		t.Fatal(err)
	}
	client := control.NewClient(c.controlSocket())
	t.Cleanup(client.Close)
	return h, client
}

func stopHost(t *testing.T, h *Host) {
	t.Helper()
	if err := h.Stop(nil); err != nil {
		t.Fatalf("Stop: %v", err)
	}
}

// write puts a page at the volume's begin through the daemon's own opener.
func write(t *testing.T, h *Host, name string, fill byte) {
	t.Helper()
	submit(t, h, name, block.OpWrite, []byte(strings.Repeat(string(fill), 4096)))
}

func submit(t *testing.T, h *Host, name string, op block.Op, p []byte) {
	t.Helper()
	dev, err := h.volumes.Open(testContext(t), name)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	r := &block.Request{Op: op, Length: uint64(len(p)), Segments: [][]byte{p}, Complete: func(*block.Request) { close(done) }}
	dev.Submit([]*block.Request{r})
	if !r.Ended {
		select {
		case <-done:
		case <-time.After(patience):
			t.Fatal("the request did not end")
		}
	}
	if r.Err != nil {
		t.Fatal(r.Err)
	}
}

func TestHostLife(t *testing.T) {
	c := testConfig(t)
	h, client := startHost(t, c)
	ctx := testContext(t)
	if _, err := client.CreateVolume(ctx, control.CreateVolume{Name: "vm1", Size: 64 << 20}); err != nil {
		t.Fatal(err)
	}
	write(t, h, "vm1", 'a')
	st, err := client.Status(ctx)
	if err != nil || st.Volumes != 1 || st.Open != 1 || st.Instance == "" || len(st.Conditions) != 0 || st.DataFree == 0 {
		t.Fatalf("status %+v, %v", st, err)
	}
	fi, err := os.Stat(c.vhostSocket("default", "vm1"))
	if err != nil || fi.Mode().Perm() != 0o660 {
		t.Fatalf("vhost socket: %v, %v", fi, err)
	}
	if text := scrape(t, c); !strings.Contains(text, `scoria_volume_requests_total{op="write",volume="default/vm1"} 1`) {
		t.Fatalf("metrics lack the write:\n%s", text)
	}
	stopHost(t, h)
	for _, s := range []string{c.controlSocket(), c.nbdSocket(), c.vhostSocket("default", "vm1")} {
		if _, err := os.Lstat(s); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s is left behind: %v", s, err)
		}
	}
	h, client = startHost(t, c)
	defer stopHost(t, h)
	if again, err := client.Status(ctx); err != nil || again.Instance != st.Instance {
		t.Fatalf("status after the restart: %+v, %v", again, err)
	}
	await(t, "the opening of the volume that was attached", func() bool { return h.volumes.device("default/vm1") != nil })
	p := make([]byte, 4096)
	submit(t, h, "vm1", block.OpRead, p)
	if p[0] != 'a' || p[4095] != 'a' {
		t.Fatalf("read %q", p[:4])
	}
}

func scrape(t *testing.T, c Config) string {
	t.Helper()
	tr := &http.Transport{DialContext: func(context.Context, string, string) (net.Conn, error) {
		return net.Dial("unix", c.controlSocket())
	}}
	defer tr.CloseIdleConnections()
	resp, err := (&http.Client{Transport: tr, Timeout: patience}).Get("http://scoriad/metrics")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil || resp.StatusCode != http.StatusOK {
		t.Fatalf("metrics: %s, %v", resp.Status, err)
	}
	return string(b)
}

func TestDirectoriesAreHeld(t *testing.T) {
	c := testConfig(t)
	h, _ := startHost(t, c)
	defer stopHost(t, h)
	other := testConfig(t)
	for name, second := range map[string]Config{
		"data directory": {DataDir: c.DataDir, RunDir: other.RunDir},
		"run directory":  {DataDir: other.DataDir, RunDir: c.RunDir},
	} {
		d := DefaultConfig()
		d.DataDir, d.RunDir = second.DataDir, second.RunDir
		_, err := Start(testContext(t), d, "test", zerolog.Nop())
		if !errors.Is(err, vfs.ErrLocked) || !strings.Contains(err.Error(), name) || !strings.Contains(err.Error(), "pid") {
			t.Errorf("second daemon on the %s: %v; want who holds it", name, err)
		}
	}
}

// TestP3DyingHolderIsWaitedFor: a killed daemon holds its lock until its memory
// is torn down; the next start must not give up in that time.
func TestP3DyingHolderIsWaitedFor(t *testing.T) {
	self, err := os.ReadFile("/proc/self/status")
	if err != nil || dying(string(self)) {
		t.Fatalf("this process is dying? %v\n%s", err, self)
	}
	for _, status := range []string{
		"State:\tZ (zombie)\nVmSize:\t1 kB\n", "State:\tR (running)\nSigPnd:\t0000000000000000\n",
		"State:\tR (running)\nVmSize:\t1 kB\nShdPnd:\t0000000000000100\n", "State:\tX (dead)\n",
	} {
		if !dying(status) {
			t.Errorf("not dying: %q", status)
		}
	}
	dir := t.TempDir()
	held, err := vfs.OS().Lock(filepath.Join(dir, "lock"))
	if err != nil {
		t.Fatal(err)
	}
	gone := exec.Command("true")
	if err := gone.Run(); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "lock"), fmt.Appendf(nil, "%d\n", gone.Process.Pid), 0o600); err != nil {
		t.Fatal(err)
	}
	time.AfterFunc(30*time.Millisecond, func() { held.Close() })
	l, err := lockDir(testContext(t), vfs.OS(), "data directory", dir)
	if err != nil {
		t.Fatal(err)
	}
	l.Close()
}

func TestStaleSocketsAreTakenOver(t *testing.T) {
	c := testConfig(t)
	stale := []string{c.controlSocket(), c.nbdSocket(), c.vhostSocket("default", "gone"), filepath.Join(c.RunDir, ".s1")}
	for _, s := range stale {
		if err := os.MkdirAll(filepath.Dir(s), 0o755); err != nil {
			t.Fatal(err)
		}
		l, err := net.ListenUnix("unix", &net.UnixAddr{Name: s, Net: "unix"})
		if err != nil {
			t.Fatal(err)
		}
		l.SetUnlinkOnClose(false)
		l.Close()
	}
	h, client := startHost(t, c)
	defer stopHost(t, h)
	if _, err := client.Status(testContext(t)); err != nil {
		t.Fatal(err)
	}
	for _, s := range stale[2:] {
		if _, err := os.Lstat(s); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s is left behind: %v", s, err)
		}
	}
}

// TestP3LostWriteBufferIsSaid: the last run died on this boot, and its write
// buffer is gone.
func TestP3LostWriteBufferIsSaid(t *testing.T) {
	c := testConfig(t)
	h, _ := startHost(t, c)
	stopHost(t, h)
	boot, err := readBootID()
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(h.pool); err != nil {
		t.Fatal(err)
	}
	in := h.id
	in.Clean, in.BootID = false, boot
	if err := in.save(vfs.OS(), c.DataDir); err != nil {
		t.Fatal(err)
	}
	h, client := startHost(t, c)
	defer stopHost(t, h)
	st, err := client.Status(testContext(t))
	if err != nil || len(st.Conditions) != 1 || st.Conditions[0].Code != "write-buffer-lost" || !strings.Contains(st.Conditions[0].Message, "P3") {
		t.Fatalf("conditions %+v, %v", st.Conditions, err)
	}
}

func TestP3PlanOfTheWriteBuffer(t *testing.T) {
	for _, tt := range []struct {
		name string
		in   instance
		want poolPlan
	}{
		{"first start", instance{Clean: true}, poolPlan{file: "/new"}},
		{"after a clean stop", instance{Clean: true, BootID: "b", PoolFile: "/new"}, poolPlan{file: "/new"}},
		{"clean, moved", instance{Clean: true, BootID: "b", PoolFile: "/old"}, poolPlan{file: "/new", obsolete: "/old"}},
		{"after a kill", instance{BootID: "b", PoolFile: "/new"}, poolPlan{file: "/new", needed: true}},
		{"after a kill, moved", instance{BootID: "b", PoolFile: "/old"}, poolPlan{file: "/old", needed: true}},
		{"after a power loss", instance{BootID: "a", PoolFile: "/new"}, poolPlan{file: "/new"}},
		{"after a power loss, moved", instance{BootID: "a", PoolFile: "/old"}, poolPlan{file: "/new", obsolete: "/old"}},
	} {
		if got := planPool(tt.in, "b", "/new"); got != tt.want {
			t.Errorf("%s: %+v; want %+v", tt.name, got, tt.want)
		}
	}
}

func TestInstanceFile(t *testing.T) {
	dir := t.TempDir()
	fsys := vfs.OS()
	first, err := loadInstance(fsys, dir)
	if err != nil || !first.Clean {
		t.Fatalf("%+v, %v", first, err)
	}
	if err := first.save(fsys, dir); err != nil {
		t.Fatal(err)
	}
	if again, err := loadInstance(fsys, dir); err != nil || again != first {
		t.Fatalf("%+v, %v; want %+v", again, err, first)
	}
	for _, text := range []string{"", "{}", `{"version":2}`, `{"version":1,"id":"x"}`} {
		if err := os.WriteFile(filepath.Join(dir, instanceFile), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if in, err := loadInstance(fsys, dir); err == nil {
			t.Errorf("%q reads as %+v", text, in)
		}
	}
}

func TestNotify(t *testing.T) {
	for _, name := range []string{filepath.Join(t.TempDir(), "notify"), "@scoria-test-notify"} {
		addr := &net.UnixAddr{Name: name, Net: "unixgram"}
		l, err := net.ListenUnixgram("unixgram", addr)
		if err != nil {
			t.Fatal(err)
		}
		t.Setenv("NOTIFY_SOCKET", name)
		if err := Notify("READY=1"); err != nil {
			t.Fatal(err)
		}
		l.SetReadDeadline(time.Now().Add(patience))
		b := make([]byte, 64)
		n, err := l.Read(b)
		if err != nil || string(b[:n]) != "READY=1" {
			t.Fatalf("%q, %v", b[:n], err)
		}
		l.Close()
	}
	t.Setenv("NOTIFY_SOCKET", "")
	if err := Notify("READY=1"); err != nil {
		t.Fatal(err)
	}
}

func TestSocketModes(t *testing.T) {
	dir := t.TempDir()
	s := &sockets{dir: dir, mode: 0o600, gid: -1}
	path := filepath.Join(dir, "sub", "x.sock")
	for range 2 { // the second takes over from the first
		l, err := s.listen(path)
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		var st unix.Stat_t
		if err := unix.Stat(path, &st); err != nil || st.Mode&0o777 != 0o600 {
			t.Fatalf("mode %o, %v", st.Mode, err)
		}
	}
	if _, err := s.listen(filepath.Join(dir, strings.Repeat("x", 120))); err == nil || !strings.Contains(err.Error(), "at most") {
		t.Fatalf("a path that is too long: %v", err)
	}
}
