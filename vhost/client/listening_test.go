package client

import (
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

// TestListening: a socket that is bound has its file, and refuses connections until
// its owner listens.
func TestListening(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	if Listening(path) {
		t.Fatal("nobody made it")
	}
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	if err := unix.Bind(fd, &unix.SockaddrUnix{Name: path}); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(path); err != nil || Listening(path) {
		t.Fatalf("bound: stat %v, listening %v", err, Listening(path))
	}
	if err := unix.Listen(fd, 1); err != nil {
		t.Fatal(err)
	}
	if !Listening(path) {
		t.Fatal("it listens")
	}
}
