// Command deps installs what building and testing Scoria needs and this machine
// lacks, through apt, on Debian 12 or Ubuntu as root; the guest's kernel goes
// into the source tree's cache, not onto the machine. It says what it installs
// and why, and nothing if nothing is missing.
//
//	go run ./integration/deps
package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"

	"scoria/integration/guest"
	"scoria/integration/shmtools"
)

// need is a package with a file that shows it is there.
type need struct {
	pkg    string
	files  []string // program names, or absolute paths; all must exist
	reason string
}

var needs = []need{
	{"gcc", []string{"gcc"}, "the race detector links with it"},
	{"libc6-dev", []string{"/usr/include/stdlib.h"}, "the race detector links with it"},
	{"qemu-system-x86", []string{"qemu-system-x86_64", "qemu-storage-daemon"}, "runs the test guests, and is the peer of the benchmarks"},
	{"qemu-utils", []string{"qemu-img", "qemu-io"}, "clients of the helper socket"},
	{"seabios", []string{"/usr/share/seabios/bios-256k.bin"}, "the test guests' BIOS"},
	{"fio", []string{"fio"}, "the load in the guests, and a client of the helper socket"},
	{"libnbd-bin", []string{"nbdinfo", "nbdcopy"}, "clients of the helper socket"},
	{"nbdkit", []string{"nbdkit"}, "a peer of the benchmarks, and a client of shared memory"},
	{"nbdkit-plugin-dev", []string{"/usr/include/nbdkit-plugin.h"}, "the nbdkit plugin is compiled against it"},
	{"clang", []string{"clang"}, "a second compiler for the C client"},
	{"libclang-rt-dev", []string{"/usr/share/doc/libclang-rt-dev"}, "the C client is tested with its sanitizers"},
	{"make", []string{"make"}, "builds the C client"},
	{"pkg-config", []string{"pkg-config"}, "programs find the C client with it"},
	{"busybox-static", []string{"busybox"}, "the test guests' user space"},
	{"e2fsprogs", []string{"mke2fs", "e2fsck", "resize2fs"}, "makes and checks file systems, in the guest and outside"},
	{"libdevmapper1.02.1", []string{"/usr/lib/x86_64-linux-gnu/libdevmapper.so.1.02.1"}, "GRUB's image maker links with it"},
	{"systemd", []string{"/usr/lib/systemd/systemd", "systemctl"}, "a test guest starts the packaged units with it; this machine is not booted with it"},
	{"util-linux", []string{"blkdiscard", "fstrim"}, "gives space back in the guest"},
	{"zstd", []string{"zstd"}, "unpacks kernel modules"},
	{"xz-utils", []string{"xz"}, "unpacks kernel modules"},
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "deps:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context) error {
	var missing []need
	for _, n := range needs {
		if !present(n) {
			missing = append(missing, n)
		}
	}
	var fetch []unpacked
	for _, u := range unpackedNeeds {
		err := u.find()
		if errors.Is(err, fs.ErrNotExist) {
			fetch = append(fetch, u)
		} else if err != nil {
			return err
		}
	}
	if len(missing) == 0 && len(fetch) == 0 {
		return nil
	}
	if _, err := exec.LookPath("apt-get"); err != nil {
		return fmt.Errorf("this machine lacks %s, and there is no apt to install it with: install it by hand", names(missing, fetch))
	}
	if len(missing) > 0 && os.Geteuid() != 0 {
		return fmt.Errorf("must be root to install %s", names(missing, nil))
	}
	if err := apt(ctx, "update"); err != nil {
		return err
	}
	if len(missing) > 0 {
		if err := install(ctx, missing); err != nil {
			return err
		}
	}
	for _, u := range fetch {
		fmt.Printf("deps: fetching %s: %s (unpacked into .cache, not installed)\n", u.name, u.reason)
		if err := u.fetch(ctx); err != nil {
			return err
		}
	}
	return nil
}

// unpacked is something that is taken out of its packages without installing
// them, since installed they would change how this machine boots.
type unpacked struct {
	name, reason string
	find         func() error // fs.ErrNotExist if it isn't there
	fetch        func(context.Context) error
}

var unpackedNeeds = []unpacked{
	{
		name: "a guest kernel", reason: "the test guests boot it",
		find:  func() error { _, err := guest.FindKernel(); return err },
		fetch: func(ctx context.Context) error { _, err := guest.FetchKernel(ctx); return err },
	},
	{
		name: "fio's source", reason: "the fio engine is compiled against its headers",
		find:  func() error { _, err := shmtools.FindFioSource(context.Background()); return err },
		fetch: shmtools.FetchFioSource,
	},
	{
		name: "GRUB", reason: "a test guest boots from a volume with it",
		find: guest.FindGrub, fetch: guest.FetchGrub,
	},
}

func install(ctx context.Context, missing []need) error {
	args := []string{"install", "-y", "--no-install-recommends"}
	for _, n := range missing {
		fmt.Printf("deps: installing %s: %s\n", n.pkg, n.reason)
		args = append(args, n.pkg)
	}
	if err := apt(ctx, args...); err != nil {
		return err
	}
	for _, n := range missing {
		if !present(n) {
			return fmt.Errorf("package %s is installed but %s is still missing", n.pkg, strings.Join(n.files, " or "))
		}
	}
	return nil
}

// apt runs apt-get without questions; its output is shown only if it fails.
func apt(ctx context.Context, args ...string) error {
	cmd := exec.CommandContext(ctx, "apt-get", append([]string{"-q", "-o", "DPkg::Lock::Timeout=120"}, args...)...)
	cmd.Env = append(os.Environ(), "DEBIAN_FRONTEND=noninteractive", "NEEDRESTART_SUSPEND=1")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("apt-get %s: %w\n%s", args[0], err, out)
	}
	return nil
}

func present(n need) bool {
	for _, f := range n.files {
		if !exists(f) {
			return false
		}
	}
	return true
}

// exists looks for a program in PATH and in the administrator's directories,
// which a shell without login may lack, or for an absolute path.
func exists(name string) bool {
	candidates := []string{name}
	if !filepath.IsAbs(name) {
		if _, err := exec.LookPath(name); err == nil {
			return true
		}
		candidates = []string{"/usr/sbin/" + name, "/sbin/" + name}
	}
	for _, c := range candidates {
		if _, err := os.Stat(c); err == nil {
			return true
		}
	}
	return false
}

func names(missing []need, fetch []unpacked) string {
	var s []string
	for _, n := range missing {
		s = append(s, n.pkg)
	}
	for _, u := range fetch {
		s = append(s, u.name)
	}
	return strings.Join(s, ", ")
}
