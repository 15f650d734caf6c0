package shm

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"scoria/driver/block/blocktest"
	"scoria/shm/wire"
)

// cFlags are what the C client is built with in tests: any warning is an error,
// and any undefined behaviour or bad memory access ends the program.
var cFlags = []string{"-std=c11", "-O1", "-g", "-Wall", "-Wextra", "-Wshadow", "-Wconversion", "-Wno-sign-conversion", "-Werror", "-pthread"}

// required reports whether a missing tool is a failure: in continuous integration, and
// where make test has installed all of them.
func required() bool { return os.Getenv("CI") != "" || os.Getenv("SCORIA_REQUIRE") != "" }

// compilers are those that are there; both are where they are required.
func compilers(t *testing.T) (found []string) {
	t.Helper()
	for _, cc := range []string{"gcc", "clang"} {
		if _, err := exec.LookPath(cc); err == nil {
			found = append(found, cc)
		} else if required() {
			t.Fatal(err)
		}
	}
	if len(found) == 0 {
		t.Skip("no C compiler")
	}
	return found
}

func buildC(t *testing.T, cc string, flags ...string) string {
	t.Helper()
	program := filepath.Join(t.TempDir(), "selftest")
	args := append(append(append([]string{}, cFlags...), flags...), "-Iclient/c", "client/c/test/selftest.c", "client/c/scoria_shm.c", "-o", program)
	if out, err := exec.Command(cc, args...).CombinedOutput(); err != nil {
		t.Fatalf("%s: %v\n%s", cc, err, out)
	}
	return program
}

func runC(t *testing.T, program string, args ...string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, program, args...)
	cmd.Env = append(os.Environ(), "UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1")
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	return string(out)
}

func TestCClient(t *testing.T) {
	for _, cc := range compilers(t) {
		t.Run(cc, func(t *testing.T) {
			program := buildC(t, cc, "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
			for _, mode := range []blocktest.Mode{blocktest.Sync, blocktest.Mixed} {
				b := newBed(t, blocktest.Options{Mode: mode}, nil)
				runC(t, program, b.path, testVolume)
				hurry(t, "end of its sessions", func() bool { return b.srv.Totals() == Totals{} })
			}
		})
	}
}

// TestP3CClientReconnects restarts the server under a load that is checked.
func TestP3CClientReconnects(t *testing.T) {
	program := buildC(t, compilers(t)[0], "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
	b := newBed(t, blocktest.Options{Mode: blocktest.Mixed}, nil)
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	var out bytes.Buffer
	cmd := exec.CommandContext(ctx, program, b.path, testVolume, "verify", "60000")
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	restarts := 0
	for {
		hurry(t, "client", func() bool { st, ok := b.srv.VolumeStats(testVolume); return ok && st.Rings == 1 || len(ended) > 0 })
		select {
		case err := <-ended:
			if err != nil {
				t.Fatalf("%v\n%s", err, out.String())
			}
			if !strings.Contains(out.String(), "reconnects") || strings.Contains(out.String(), " 0 reconnects") {
				t.Fatalf("after %d restarts: %s", restarts, out.String())
			}
			return
		case <-time.After(20 * time.Millisecond):
			if restarts < 20 {
				b.srv.Close()
				b.start(nil)
				restarts++
			}
		}
	}
}

// waiter is the C client with a write under way that the device does not end,
// once it has waited for it so many times for 1 ms and begins to wait for good.
func (b *bed) waiter(t *testing.T, program string, times int) (pid int, result func() (hits, misses, sleeps int)) {
	t.Helper()
	cmd := exec.CommandContext(soon(t), program, b.path, testVolume, "wait", fmt.Sprint(times))
	var problems bytes.Buffer
	cmd.Stderr = &problems
	pipe, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	out := bufio.NewReader(pipe)
	if line, err := out.ReadString('\n'); err != nil || line != "waiting\n" {
		err = errors.Join(err, cmd.Wait())
		t.Fatalf("%q, %v\n%s", line, err, problems.String())
	}
	hurry(t, "write at the device", func() bool { return b.ram.Waiting() == 1 })
	return cmd.Process.Pid, func() (hits, misses, sleeps int) {
		t.Helper()
		line, err := io.ReadAll(out)
		if err = errors.Join(err, cmd.Wait()); err != nil {
			t.Fatalf("%v\n%s", err, problems.String())
		}
		if _, err := fmt.Sscanf(string(line), "hits %d misses %d sleeps %d", &hits, &misses, &sleeps); err != nil {
			t.Fatalf("%v: %s", err, line)
		}
		return hits, misses, sleeps
	}
}

// switches returns whether a process of one thread sleeps, and how often it has
// given its CPU away or lost it: a process for which that stays has not run.
func switches(t *testing.T, pid int) (asleep bool, count string) {
	t.Helper()
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(status)) {
		if strings.HasPrefix(line, "State:") {
			asleep = strings.Contains(line, "S (")
		}
		if strings.Contains(line, "ctxt_switches") {
			count += line
		}
	}
	return asleep, count
}

// TestCClientThatWaitsUsesNoCPU: it polls once, in vain, sleeps once, and does
// not run before its write has ended.
func TestCClientThatWaitsUsesNoCPU(t *testing.T) {
	program := buildC(t, compilers(t)[0], "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
	b := newBed(t, blocktest.Options{}, nil)
	resume := b.ram.Stall()
	pid, result := b.waiter(t, program, 0)
	hurry(t, "sleep of the client", func() bool { asleep, _ := switches(t, pid); return asleep })
	_, before := switches(t, pid)
	// What others do meanwhile wakes nobody.
	r := b.dial(t)
	r.must(wire.Hello, hello())
	for range 200 {
		r.must(wire.Stat, wire.Named{Name: testVolume}.Append(nil))
	}
	if _, after := switches(t, pid); after != before {
		t.Errorf("the client ran while it waited:\n%s%s", before, after)
	}
	resume()
	if hits, misses, sleeps := result(); hits != 0 || misses != 1 || sleeps != 1 {
		t.Errorf("%d polls that paid, %d that did not, %d sleeps: want 0, 1, 1", hits, misses, sleeps)
	}
}

// TestCClientPollsLessWhenItDoesNotPay: of a hundred waits in vain a few poll.
func TestCClientPollsLessWhenItDoesNotPay(t *testing.T) {
	program := buildC(t, compilers(t)[0])
	b := newBed(t, blocktest.Options{}, nil)
	resume := b.ram.Stall()
	_, result := b.waiter(t, program, 100)
	resume()
	// Three windows, each a quarter of the one before, and probes after 16 and 32
	// waits without polling.
	if _, misses, sleeps := result(); misses > 5 || sleeps == 0 {
		t.Errorf("%d polls in vain, %d sleeps: want at most 5, some", misses, sleeps)
	}
}

// TestCLibraryBuilds makes the shared and the static library, the pkg-config file
// and what stands on them, and links a program with both.
func TestCLibraryBuilds(t *testing.T) {
	for _, tool := range []string{"make", "pkg-config"} {
		if _, err := exec.LookPath(tool); err != nil {
			if required() {
				t.Fatal(err)
			}
			t.Skip(err)
		}
	}
	b := newBed(t, blocktest.Options{}, nil)
	for _, cc := range compilers(t) {
		t.Run(cc, func(t *testing.T) {
			build, dest := t.TempDir(), t.TempDir()
			mk := exec.Command("make", "-C", "client/c", "CC="+cc, "BUILD="+build, "DESTDIR="+dest, "prefix=/usr", "install-lib")
			if out, err := mk.CombinedOutput(); err != nil {
				t.Fatalf("%v\n%s", err, out)
			}
			pc := exec.Command("pkg-config", "--define-variable=prefix="+dest+"/usr", "--cflags", "--libs", "scoria-shm")
			pc.Env = append(os.Environ(), "PKG_CONFIG_PATH="+dest+"/usr/lib/pkgconfig")
			flags, err := pc.Output()
			if err != nil {
				t.Fatal(err)
			}
			program := filepath.Join(build, "linked")
			args := append([]string{"client/c/test/selftest.c", "-o", program, "-Wl,-rpath," + dest + "/usr/lib"}, strings.Fields(string(flags))...)
			if out, err := exec.Command(cc, args...).CombinedOutput(); err != nil {
				t.Fatalf("%v\n%s", err, out)
			}
			runC(t, program, b.path, testVolume, "verify", "1000")
			symbols, err := exec.Command("nm", "-D", "--defined-only", dest+"/usr/lib/libscoria_shm.so").Output()
			if err != nil {
				t.Fatal(err)
			}
			checkSymbols(t, string(symbols))
		})
	}
}

// checkSymbols: the library exports what version 1 of the ABI has, and nothing else.
func checkSymbols(t *testing.T, listing string) {
	t.Helper()
	var got []string
	for line := range strings.Lines(listing) {
		if f := strings.Fields(line); len(f) == 3 && f[1] == "T" {
			got = append(got, strings.Split(f[2], "@")[0])
		}
	}
	want, err := os.ReadFile("client/c/abi.txt")
	if err != nil {
		t.Fatal(err)
	}
	if text := fmt.Sprintln(strings.Join(got, "\n")); text != string(want) {
		t.Fatalf("the library exports\n%swant client/c/abi.txt:\n%s", text, want)
	}
}
