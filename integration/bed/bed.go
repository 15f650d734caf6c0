// Package bed is the test bed under the integration tests and the demo: where
// things lie, and processes that never outlive their test.
//
// Every process runs on a goroutine of its own that is locked to its thread and
// asks the kernel to kill the child when that thread ends (PR_SET_PDEATHSIG is
// per thread, not per process). So a test binary that panics or is killed takes
// its QEMUs and daemons along.
package bed

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
)

var root = sync.OnceValues(func() (string, error) {
	dir, err := os.Getwd()
	if err != nil {
		return "", err
	}
	for d := dir; ; d = filepath.Dir(d) {
		mod, err := os.ReadFile(filepath.Join(d, "go.mod"))
		if err == nil && strings.HasPrefix(string(mod), "module scoria\n") {
			return d, nil
		}
		if d == filepath.Dir(d) {
			return "", fmt.Errorf("no go.mod of module scoria above %s: run this inside a clone of scoria", dir)
		}
	}
})

// Root returns the top of the source tree, found upwards from the working directory.
func Root() (string, error) { return root() }

// CacheDir returns the tree's directory for downloads and built images
// (.cache, ignored by git), made if need be.
func CacheDir() (string, error) {
	r, err := Root()
	if err != nil {
		return "", err
	}
	dir := filepath.Join(r, ".cache")
	return dir, os.MkdirAll(dir, 0o755)
}

// ScratchDir makes a directory with a name short enough for Unix sockets in it
// (108 bytes). On tmpfs if ram is true: sockets and the log's head belong there.
// What earlier test processes left behind when they were killed goes first.
func ScratchDir(ram bool) (string, error) {
	base := os.TempDir()
	if ram {
		base = RAMDir()
	}
	if err := removeOrphans(base); err != nil {
		return "", err
	}
	return os.MkdirTemp(base, scratchPrefix+strconv.Itoa(os.Getpid())+"-")
}

// RAMDir returns a directory on tmpfs, or the one for temporary files where there
// is none.
func RAMDir() string {
	if st, err := os.Stat("/dev/shm"); err == nil && st.IsDir() {
		return "/dev/shm"
	}
	return os.TempDir()
}

// MountPoint is the name under which a test may mount something in a scratch directory.
const MountPoint = "mnt"

// scratchPrefix begins the names of scratch directories; their maker's process id follows.
const scratchPrefix = "scoria-test-"

// removeOrphans removes the scratch directories whose makers are gone: on tmpfs
// they hold memory until the machine restarts.
func removeOrphans(base string) error {
	dirs, err := filepath.Glob(filepath.Join(base, scratchPrefix+"*"))
	if err != nil {
		return err
	}
	for _, d := range dirs {
		name, _, _ := strings.Cut(strings.TrimPrefix(filepath.Base(d), scratchPrefix), "-")
		pid, err := strconv.Atoi(name)
		if err != nil || pid <= 0 {
			continue
		}
		if errors.Is(syscall.Kill(pid, 0), syscall.ESRCH) {
			// Best effort: a test's own file system may still be mounted in it,
			// and another process may be removing it too.
			_ = syscall.Unmount(filepath.Join(d, MountPoint), syscall.MNT_DETACH)
			_ = os.RemoveAll(d)
		}
	}
	return nil
}

// Tail returns the last n lines of a file for error messages; what went wrong
// with reading it stands in their place.
func Tail(path string, n int) string {
	b, err := os.ReadFile(path)
	if errors.Is(err, os.ErrNotExist) {
		return "(no log)"
	}
	if err != nil {
		return err.Error()
	}
	lines := strings.Split(strings.TrimRight(string(b), "\n"), "\n")
	if len(lines) > n {
		lines = lines[len(lines)-n:]
	}
	return strings.Join(lines, "\n")
}
