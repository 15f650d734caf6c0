package shm

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"scoria/driver/block/blocktest"
)

// cFlags are what the C client is built with in tests: any warning is an error,
// and any undefined behaviour or bad memory access ends the program.
var cFlags = []string{"-std=c11", "-O1", "-g", "-Wall", "-Wextra", "-Wshadow", "-Wconversion", "-Wno-sign-conversion", "-Werror", "-pthread"}

// compilers are those that are there; both are where SCORIA_REQUIRE is set.
func compilers(t *testing.T) (found []string) {
	t.Helper()
	for _, cc := range []string{"gcc", "clang"} {
		if _, err := exec.LookPath(cc); err == nil {
			found = append(found, cc)
		} else if os.Getenv("SCORIA_REQUIRE") != "" {
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

// TestCLibraryBuilds makes the shared and the static library, the pkg-config file
// and what stands on them, and links a program with both.
func TestCLibraryBuilds(t *testing.T) {
	for _, tool := range []string{"make", "pkg-config"} {
		if _, err := exec.LookPath(tool); err != nil {
			if os.Getenv("SCORIA_REQUIRE") != "" {
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
