package vfs

import (
	"errors"
	"os"
	"path/filepath"
	"runtime"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestBlockedCallLetsOthersRun: while a call blocks, the collector runs, stacks are
// scanned, and the only processor does what ends it.
func TestBlockedCallLetsOthersRun(t *testing.T) {
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(1))
	name := filepath.Join(t.TempDir(), "locked")
	held, err := os.Create(name)
	if err != nil {
		t.Fatal(err)
	}
	defer held.Close()
	if err := unix.Flock(int(held.Fd()), unix.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	const callers = 8
	errs := make(chan error, callers)
	begun := make(chan struct{}, callers)
	for range callers {
		go func() {
			f, err := os.Open(name)
			if err != nil {
				errs <- err
				return
			}
			defer f.Close()
			begun <- struct{}{}
			// Each gets it when the one before has closed its file.
			errs <- syncError(syncCall(unix.SYS_FLOCK, f.Fd(), unix.LOCK_EX))
		}()
	}
	deadline := time.After(2 * time.Minute)
	for range callers {
		select {
		case <-begun:
		case <-deadline:
			buf := make([]byte, 1<<20)
			t.Fatalf("the callers don't begin:\n%s", buf[:runtime.Stack(buf, true)])
		}
	}
	for range 3 {
		runtime.Gosched()
		runtime.GC()
	}
	if err := unix.Flock(int(held.Fd()), unix.LOCK_UN); err != nil {
		t.Fatal(err)
	}
	for range callers {
		select {
		case err := <-errs:
			if err != nil {
				t.Error(err)
			}
		case <-deadline:
			buf := make([]byte, 1<<20)
			t.Fatalf("a call does not end:\n%s", buf[:runtime.Stack(buf, true)])
		}
	}
}

// TestSyncTellsErrors: what the kernel refuses is an error with the call's name.
func TestSyncTellsErrors(t *testing.T) {
	r, w, err := os.Pipe() // can't be synced
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	defer w.Close()
	fd, err := unix.Dup(int(w.Fd()))
	if err != nil {
		t.Fatal(err)
	}
	f, err := newOSFile(fd, "pipe", false)
	if err != nil {
		t.Fatal(err)
	}
	if err := f.Sync(); !errors.Is(err, unix.EINVAL) {
		t.Errorf("sync of a pipe: %v", err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	if err := f.Sync(); !errors.Is(err, os.ErrClosed) {
		t.Errorf("sync of a closed file: %v", err)
	}
	if err := fsync(-1); err != unix.EBADF {
		t.Errorf("fsync of no file: %v", err)
	}
	if err := OS().SyncDir(filepath.Join(t.TempDir(), "none")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("sync of no directory: %v", err)
	}
}
