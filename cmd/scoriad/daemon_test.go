package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"scoria/driver/control"
)

const patience = 2 * time.Minute

// The test binary is scoriad when it is told so.
func TestMain(m *testing.M) {
	if os.Getenv("SCORIAD_CHILD") != "" {
		main()
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// daemon is a scoriad as a process of its own.
type daemon struct {
	t      *testing.T
	data   string
	run    string
	config string
	cmd    *exec.Cmd
	log    *bytes.Buffer
	client *control.Client
}

func newDaemon(t *testing.T) *daemon {
	t.Helper()
	run, err := os.MkdirTemp("/dev/shm", "scoriad-")
	if err != nil {
		t.Fatal(err)
	}
	d := &daemon{t: t, data: t.TempDir(), run: run}
	d.config = filepath.Join(t.TempDir(), "scoria.toml")
	if err := os.WriteFile(d.config, []byte("[write_buffer]\nsize = \"64M\"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	d.client = control.NewClient(filepath.Join(run, "control.sock"))
	t.Cleanup(func() {
		d.kill()
		d.client.Close()
		os.RemoveAll(run)
	})
	return d
}

func (d *daemon) command(args ...string) *exec.Cmd {
	cmd := exec.Command(os.Args[0], append([]string{"--config", d.config, "--data-dir", d.data, "--run-dir", d.run}, args...)...)
	cmd.Env = append(os.Environ(), "SCORIAD_CHILD=1")
	return cmd
}

func (d *daemon) start() {
	d.t.Helper()
	d.cmd, d.log = d.command(), &bytes.Buffer{}
	d.cmd.Stderr = d.log
	if err := d.cmd.Start(); err != nil {
		d.t.Fatal(err)
	}
	for deadline := time.Now().Add(patience); ; time.Sleep(5 * time.Millisecond) {
		ctx, cancel := context.WithTimeout(d.t.Context(), time.Second)
		_, err := d.client.Status(ctx)
		cancel()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			d.cmd.Process.Signal(syscall.SIGQUIT)
			d.cmd.Wait()
			d.t.Fatalf("the daemon did not come up: %v\n%s", err, d.log)
		}
	}
}

func (d *daemon) kill() {
	if d.cmd != nil {
		d.cmd.Process.Kill()
		d.cmd.Wait()
		d.cmd = nil
	}
}

// stop sends SIGTERM and returns the exit status.
func (d *daemon) stop() int {
	d.t.Helper()
	d.cmd.Process.Signal(syscall.SIGTERM)
	watchdog := time.AfterFunc(patience, func() { d.cmd.Process.Signal(syscall.SIGQUIT) })
	err := d.cmd.Wait()
	if !watchdog.Stop() {
		d.t.Fatalf("the daemon did not stop\n%s", d.log)
	}
	code := d.cmd.ProcessState.ExitCode()
	if err != nil {
		d.t.Logf("%v\n%s", err, d.log)
	}
	d.cmd = nil
	return code
}

func TestTermStopsInOrder(t *testing.T) {
	d := newDaemon(t)
	d.start()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	if _, err := d.client.CreateVolume(ctx, control.CreateVolume{Name: "v", Size: 64 << 20}); err != nil {
		t.Fatal(err)
	}
	d.cmd.Process.Signal(syscall.SIGHUP) // nothing fatal
	if _, err := d.client.Stats(ctx, "default/v"); err != nil {
		t.Fatal(err)
	}
	if code := d.stop(); code != 0 {
		t.Fatalf("exit status %d; want 0", code)
	}
	if left, err := filepath.Glob(filepath.Join(d.run, "*")); err != nil || len(left) > 3 { // lock, vhost, the write buffer's file for the next start
		t.Fatalf("left behind: %v, %v", left, err)
	}
}

// TestP1HurriedStopLosesNothing: a second SIGTERM cuts the stop short; the next
// start finds everything in order.
func TestP1HurriedStopLosesNothing(t *testing.T) {
	d := newDaemon(t)
	d.start()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	if _, err := d.client.CreateVolume(ctx, control.CreateVolume{Name: "v", Size: 64 << 20}); err != nil {
		t.Fatal(err)
	}
	if _, err := d.client.Stats(ctx, "default/v"); err != nil { // opens it
		t.Fatal(err)
	}
	d.cmd.Process.Signal(syscall.SIGTERM)
	d.stop() // in order or in a hurry, depending on which was faster
	d.start()
	job, err := d.client.StartCheck(ctx, "default/v")
	if err == nil {
		job, err = d.client.Await(ctx, job, nil)
	}
	if err != nil || len(job.Report.Problems) > 0 {
		t.Fatalf("check: %+v, %v", job, err)
	}
	st, err := d.client.Status(ctx)
	if err != nil || len(st.Conditions) > 0 {
		t.Fatalf("status: %+v, %v", st, err)
	}
}

func TestSecondDaemonIsRefused(t *testing.T) {
	d := newDaemon(t)
	d.start()
	out, err := d.command().CombinedOutput()
	if err == nil || !strings.Contains(string(out), d.data) || !strings.Contains(string(out), fmt.Sprintf("pid %d", d.cmd.Process.Pid)) {
		t.Fatalf("second daemon: %v\n%s", err, out)
	}
}

func TestBadConfigurationIsRefused(t *testing.T) {
	d := newDaemon(t)
	if err := os.WriteFile(d.config, []byte("\ncolour = \"red\"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	out, err := d.command().CombinedOutput()
	if err == nil || !strings.Contains(string(out), "line 2") || !strings.Contains(string(out), "colour") {
		t.Fatalf("unknown key: %v\n%s", err, out)
	}
}

func TestPrintConfig(t *testing.T) {
	d := newDaemon(t)
	out, err := d.command("--print-config").Output()
	if err != nil || !strings.Contains(string(out), d.data) || !strings.Contains(string(out), "64MiB") {
		t.Fatalf("%v\n%s", err, out)
	}
}

// TestMasterKeysFromCredential: the daemon reads its master keys from the directory of
// credentials that systemd makes for it, and does not start without them.
func TestMasterKeysFromCredential(t *testing.T) {
	d := newDaemon(t)
	if err := os.WriteFile(d.config, []byte("[write_buffer]\nsize = \"64M\"\n[backend]\nmaster_keys = \"credential:master-keys\"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	for _, c := range []struct{ dir, want string }{{"", "CREDENTIALS_DIRECTORY is not set"}, {dir, "no such file"}} {
		t.Setenv("CREDENTIALS_DIRECTORY", c.dir)
		out, err := d.command().CombinedOutput()
		if err == nil || !strings.Contains(string(out), "backend.master_keys") || !strings.Contains(string(out), c.want) {
			t.Fatalf("without the credential: %v\n%s", err, out)
		}
	}
	if err := os.WriteFile(filepath.Join(dir, "master-keys"), []byte(strings.Repeat("5a", 32)+"\n"), 0o400); err != nil {
		t.Fatal(err)
	}
	d.start()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	// Refused without a master key.
	p, err := d.client.CreatePreset(ctx, control.Preset{Name: "secret", Policies: []control.Policy{{K: 1, M: 0, C: 1, X: 1}}, Encryption: "aes-256-gcm"})
	if err != nil || p.Encryption != "aes-256-gcm" {
		t.Fatalf("preset %+v, %v", p, err)
	}
	if code := d.stop(); code != 0 {
		t.Fatalf("exit status %d; want 0", code)
	}
}

// journal is what clients were told about their volumes.
type journal struct {
	mu      sync.Mutex
	there   map[string]bool // created, and no deletion was asked for
	unknown map[string]bool // an operation was under way when the daemon died
}

// churn creates and deletes volumes until the daemon dies, and notes what it was
// told.
func (d *daemon) churn(ctx context.Context, j *journal, prefix string, round int) {
	for i := 0; ; i++ {
		name := fmt.Sprintf("%s%d-%d", prefix, round, i)
		full := "default/" + name
		j.set(full, false, true)
		if _, err := d.client.CreateVolume(ctx, control.CreateVolume{Name: name, Size: 16 << 20}); err != nil {
			return
		}
		j.set(full, true, false)
		if i%2 == 0 {
			continue
		}
		j.set(full, false, true)
		job, err := d.client.StartDelete(ctx, full, false)
		if err == nil {
			_, err = d.client.Await(ctx, job, nil)
		}
		if err != nil {
			return
		}
		j.set(full, false, false)
	}
}

func (j *journal) set(name string, there, unknown bool) {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.there[name], j.unknown[name] = there, unknown
}

// TestP3KillDuringCreateAndDelete: whatever the moment of the kill, a volume is
// there whole or not at all after the next start, and as its client was told.
func TestP3KillDuringCreateAndDelete(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	random := rand.New(rand.NewPCG(seed, 0))
	d := newDaemon(t)
	j := &journal{there: map[string]bool{}, unknown: map[string]bool{}}
	for round := range 5 {
		d.start()
		ctx, cancel := context.WithTimeout(t.Context(), patience)
		d.verify(ctx, j)
		var wg sync.WaitGroup
		for _, prefix := range []string{"a", "b"} {
			wg.Go(func() { d.churn(ctx, j, prefix, round) })
		}
		time.Sleep(time.Duration(random.IntN(300)) * time.Millisecond)
		d.kill()
		wg.Wait()
		cancel()
	}
	d.start()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	d.verify(ctx, j)
	if code := d.stop(); code != 0 {
		t.Fatalf("exit status %d", code)
	}
}

func (d *daemon) verify(ctx context.Context, j *journal) {
	d.t.Helper()
	volumes, err := d.client.Volumes(ctx, "")
	if err != nil {
		d.t.Fatal(err)
	}
	seen := map[string]bool{}
	for _, v := range volumes {
		seen[v.Name] = true
		if v.State != "ready" || !(j.there[v.Name] || j.unknown[v.Name]) {
			d.t.Errorf("%s is %s; its client was told that it is gone: %v", v.Name, v.State, !j.unknown[v.Name])
		}
		if _, err := os.Stat(v.Socket); err != nil {
			d.t.Error(err)
		}
		if _, err := os.Stat(filepath.Join(d.data, "volumes", v.ID.String())); err != nil {
			d.t.Error(err)
		}
		if _, err := d.client.Stats(ctx, v.Name); err != nil { // opens it
			d.t.Errorf("%s: %v", v.Name, err)
		}
	}
	for name, there := range j.there {
		if there && !seen[name] {
			d.t.Errorf("%s is gone; its client was told that it is there", name)
		}
		// What was not known is, from now on.
		j.there[name], j.unknown[name] = seen[name], false
	}
	dirs, err := os.ReadDir(filepath.Join(d.data, "volumes"))
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		d.t.Fatal(err)
	}
	if len(dirs) != len(volumes) {
		d.t.Errorf("%d directories for %d volumes", len(dirs), len(volumes))
	}
}
