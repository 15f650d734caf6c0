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
	"strings"
	"sync"
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
func ScratchDir(ram bool) (string, error) {
	base := ""
	if ram {
		if st, err := os.Stat("/dev/shm"); err == nil && st.IsDir() {
			base = "/dev/shm"
		}
	}
	return os.MkdirTemp(base, "scoria-")
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
