package vfs

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// lockEnv makes the test binary a process that holds the lock it names.
const lockEnv = "VFS_TEST_LOCK"

func TestMain(m *testing.M) {
	if name := os.Getenv(lockEnv); name != "" {
		if _, err := OS().Lock(name); err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		fmt.Println("locked")
		_, _ = bufio.NewReader(os.Stdin).ReadByte() // until the parent is gone
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// TestLockBetweenProcesses: another process's lock is refused by its pid and ends
// with a SIGKILL.
func TestLockBetweenProcesses(t *testing.T) {
	name := filepath.Join(t.TempDir(), "lock")
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), lockEnv+"="+name)
	stdin, err := cmd.StdinPipe()
	must(t, err)
	defer stdin.Close()
	stdout, err := cmd.StdoutPipe()
	must(t, err)
	must(t, cmd.Start())
	line, err := bufio.NewReader(stdout).ReadString('\n')
	if strings.TrimSpace(line) != "locked" {
		t.Fatalf("the other process says %q, %v", line, err)
	}
	_, err = OS().Lock(name)
	wantErr(t, err, ErrLocked)
	if !strings.Contains(err.Error(), "pid "+strconv.Itoa(cmd.Process.Pid)) {
		t.Fatalf("%v: does not name pid %d", err, cmd.Process.Pid)
	}
	must(t, cmd.Process.Kill())
	_ = cmd.Wait() // "signal: killed"
	deadline := time.Now().Add(2 * time.Minute)
	for {
		l, err := OS().Lock(name)
		if err == nil {
			must(t, l.Close())
			return
		}
		if !errors.Is(err, ErrLocked) || time.Now().After(deadline) {
			buf := make([]byte, 1<<16)
			t.Fatalf("%v\n%s", err, buf[:runtime.Stack(buf, true)])
		}
		time.Sleep(time.Millisecond)
	}
}

// TestRemovedLockFile: whoever locks a file that was removed meanwhile must not
// believe to hold the lock that others take on the new one.
func TestRemovedLockFile(t *testing.T) {
	name := filepath.Join(t.TempDir(), "lock")
	first, err := OS().Lock(name)
	must(t, err)
	must(t, os.Remove(name))
	second, err := OS().Lock(name)
	must(t, err)
	must(t, first.Close())
	_, err = OS().Lock(name)
	wantErr(t, err, ErrLocked)
	must(t, second.Close())
	must(t, second.Close())
}

// TestPartsAreUnderWayTogether: where the file system has direct I/O and the
// kernel asynchronous I/O, parts don't wait for each other.
func TestPartsAreUnderWayTogether(t *testing.T) {
	f := mustOpen(t, OS(), filepath.Join(t.TempDir(), "f"), Create|Direct).(*osFile)
	defer f.Close()
	must(t, f.Truncate(1<<20))
	fl, err := unix.FcntlInt(uintptr(f.fd), unix.F_GETFL, 0)
	must(t, err)
	c := takeAIO()
	if fl&unix.O_DIRECT == 0 || c == nil {
		t.Skip("no direct or no asynchronous I/O here")
	}
	c.giveBack()
	b := alignedBuffer(4 * directAlignment)
	parts := []Part{{Bufs: [][]byte{b, b}, Off: 0}, {Bufs: [][]byte{b[:directAlignment]}, Off: 1 << 19}}
	results := f.writeTogether(parts)
	if results[0] != 8*directAlignment || results[1] != directAlignment {
		t.Fatalf("results %v", results)
	}
}
