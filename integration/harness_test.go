package integration

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"scoria/integration/bed"
	"scoria/integration/daemon"
	"scoria/integration/guest"
	"scoria/integration/qemu"
)

// testWait bounds one test. The slowest needs about a minute on two cores that it has
// for itself, and five on a busy machine.
const testWait = 10 * time.Minute

var (
	programs = sync.OnceValues(func() (daemon.Programs, error) { return buildPrograms("integration-1") })
	// rebuilt is another build of the same source, as a package upgrade brings it.
	rebuilt = sync.OnceValues(func() (daemon.Programs, error) { return buildPrograms("integration-2") })
	image   = sync.OnceValues(func() (guest.Image, error) { return guest.Build(context.Background()) })
	binDir  string
)

func TestMain(m *testing.M) {
	code, err := runTests(m)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		code = 1
	}
	os.Exit(code)
}

func runTests(m *testing.M) (code int, err error) {
	if binDir, err = bed.ScratchDir(false); err != nil {
		return 1, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(binDir)) }()
	return m.Run(), nil
}

func buildPrograms(version string) (daemon.Programs, error) {
	return daemon.Build(context.Background(), filepath.Join(binDir, version), version)
}

// env is one test's daemon and its deadline.
type env struct {
	*testing.T
	*daemon.Daemon
	ctx context.Context
}

// start runs a daemon with fresh directories. Extra arguments go to scoriad.
func start(t *testing.T, args ...string) *env {
	t.Helper()
	e := prepare(t, args...)
	e.must(e.Start(e.ctx))
	return e
}

// prepare is start without the start.
func prepare(t *testing.T, args ...string) *env {
	t.Helper()
	bed.Require(t)
	ctx, cancel := context.WithTimeout(t.Context(), testWait)
	t.Cleanup(cancel)
	p, err := programs()
	if err != nil {
		t.Fatal(err)
	}
	e := &env{T: t, ctx: ctx, Daemon: &daemon.Daemon{Programs: p, Args: args, DataDir: scratch(t, false), RunDir: scratch(t, true)}}
	t.Cleanup(e.finish)
	return e
}

func scratch(t *testing.T, ram bool) string {
	t.Helper()
	dir, err := bed.ScratchDir(ram)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	return dir
}

// finish ends the daemon. After a failure the end of its log is in the test's
// output; after a missed deadline, with the goroutines of both processes.
func (e *env) finish() {
	p := e.Process()
	if p == nil {
		return
	}
	late := errors.Is(e.ctx.Err(), context.DeadlineExceeded)
	if late && p.Running() && syscall.Kill(p.PID(), syscall.SIGQUIT) == nil {
		select {
		case <-p.Exited():
		case <-time.After(10 * time.Second):
		}
	}
	if e.Failed() {
		lines := 40
		if late {
			lines = 5000
			stack := make([]byte, 1<<20)
			e.Logf("goroutines of the test:\n%s", stack[:runtime.Stack(stack, true)])
		}
		e.Logf("the daemon's log ends:\n%s", bed.Tail(e.LogFile(), lines))
	}
	if err := e.Daemon.Kill(); err != nil {
		e.Error(err)
	}
}

func (e *env) must(err error) {
	e.Helper()
	if err != nil {
		e.Fatal(err)
	}
}

// ok returns a call's output or fails the test.
func (e *env) ok(out string, err error) string {
	e.Helper()
	if err != nil {
		e.Fatal(err)
	}
	return out
}

// refused fails the test unless err is an error whose text has all the words.
func (e *env) refused(err error, words ...string) {
	e.Helper()
	if err == nil {
		e.Fatalf("not refused; the error was to name %q", words)
	}
	for _, w := range words {
		if !strings.Contains(err.Error(), w) {
			e.Fatalf("refused, but without naming %q: %v", w, err)
		}
	}
}

// run runs a program that must succeed and returns its output.
func (e *env) run(name string, args ...string) string {
	e.Helper()
	return e.ok(bed.Run(e.ctx, name, args...))
}

// poll waits for a condition.
func (e *env) poll(what string, cond func() (bool, error)) {
	e.Helper()
	e.must(bed.Poll(e.ctx, 20*time.Millisecond, what, cond))
}

// restart starts the daemon again after a kill or a stop.
func (e *env) restart() {
	e.Helper()
	e.must(e.Start(e.ctx))
}

// disk is a QEMU disk on a volume of the default pool.
func (e *env) disk(volume string, queues int) qemu.Disk {
	return qemu.Disk{Socket: e.VhostSocket(volume), Queues: queues}
}

// boot starts a guest with our init.
func (e *env) boot(o qemu.Options) *qemu.VM {
	e.Helper()
	img, err := image()
	e.must(err)
	o.Image, o.Dir = img, scratch(e.T, true)
	vm, err := qemu.Boot(e.ctx, o)
	e.must(err)
	e.endWith(vm)
	return vm
}

// launch starts QEMU without waiting for a guest.
func (e *env) launch(o qemu.Options) *qemu.VM {
	e.Helper()
	if o.Dir == "" {
		o.Dir = scratch(e.T, true)
	}
	vm, err := qemu.Launch(e.ctx, o)
	e.must(err)
	e.endWith(vm)
	return vm
}

func (e *env) endWith(vm *qemu.VM) {
	e.Cleanup(func() {
		if e.Failed() {
			e.Logf("the guest's console ends:\n%s\nQEMU's output ends:\n%s", vm.Console(40), vm.Output(20))
		}
		_ = vm.Kill() // it may have ended, and its connections with it
	})
}

// guest runs a script in the guest that must succeed.
func (e *env) guest(vm *qemu.VM, script string) string {
	e.Helper()
	return strings.TrimSpace(e.ok(vm.Run(e.ctx, script)))
}

// content checks that the guest's kernel has seen no trouble with its disks.
func (e *env) content(vm *qemu.VM) {
	e.Helper()
	bad, err := vm.Complaints(e.ctx)
	e.must(err)
	if len(bad) > 0 {
		e.Fatalf("the guest's kernel complains:\n%s", strings.Join(bad, "\n"))
	}
}

// powerOff ends a guest that must be content.
func (e *env) powerOff(vm *qemu.VM) {
	e.Helper()
	e.content(vm)
	e.must(vm.PowerOff(e.ctx))
}

// export copies a volume out through the helper socket.
func (e *env) export(volume string) string {
	e.Helper()
	raw := filepath.Join(scratch(e.T, false), volume+".raw")
	e.run("nbdcopy", e.NBD(volume), raw)
	return raw
}

// fsck checks the ext4 file system on a volume from outside.
func (e *env) fsck(volume string) {
	e.Helper()
	e.run("e2fsck", "-fn", e.export(volume))
}

// extent is a line of `nbdinfo --map --json`.
type extent struct {
	Offset int64 `json:"offset"`
	Length int64 `json:"length"`
	Type   int   `json:"type"` // bit 0: hole, bit 1: reads as zeroes
}

// allocated returns how many bytes of a volume its allocation map calls data.
func (e *env) allocated(volume string) int64 {
	e.Helper()
	var extents []extent
	e.must(json.Unmarshal([]byte(e.run("nbdinfo", "--map", "--json", e.NBD(volume))), &extents))
	var sum int64
	for _, x := range extents {
		if x.Type&1 == 0 {
			sum += x.Length
		}
	}
	return sum
}
