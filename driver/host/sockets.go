package host

import (
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
)

// sockets makes listening unix sockets under RUN. The daemon holds RUN's lock,
// so whatever lies at a path is of a dead daemon and is replaced.
type sockets struct {
	dir  string
	mode fs.FileMode
	gid  int // -1: the daemon's
	seq  atomic.Uint64
}

// listen makes the socket at path with mode and group. It appears there at once
// with both, and in place of one that a dead daemon left.
func (s *sockets) listen(path string) (*net.UnixListener, error) {
	return s.listenAs("unix", path, s.mode)
}

// listenAs does the same for a network of package net and a mode of its own.
func (s *sockets) listenAs(network, path string, mode fs.FileMode) (*net.UnixListener, error) {
	if len(path) > maxSocketPath {
		return nil, fmt.Errorf("socket %s: path of %d characters: must be at most %d", path, len(path), maxSocketPath)
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return nil, fmt.Errorf("socket %s: %w", path, err)
	}
	tmp := filepath.Join(s.dir, fmt.Sprintf(".s%d", s.seq.Add(1)))
	if err := os.Remove(tmp); err != nil && !os.IsNotExist(err) {
		return nil, fmt.Errorf("socket %s: %w", path, err)
	}
	l, err := net.ListenUnix(network, &net.UnixAddr{Name: tmp, Net: network})
	if err != nil {
		return nil, fmt.Errorf("socket %s: %w", path, err)
	}
	l.SetUnlinkOnClose(false)
	err = os.Chmod(tmp, mode)
	if err == nil {
		err = os.Chown(tmp, -1, s.gid)
	}
	if err == nil {
		err = os.Rename(tmp, path)
	}
	if err != nil {
		os.Remove(tmp)
		l.Close()
		return nil, fmt.Errorf("socket %s: %w", path, err)
	}
	return l, nil
}

// sweep removes sockets under RUN/vhost that belong to no volume, and half-made
// ones.
func (s *sockets) sweep(keep map[string]bool) error {
	half, err := filepath.Glob(filepath.Join(s.dir, ".s[0-9]*"))
	if err != nil {
		return err
	}
	for _, name := range half {
		if err := os.Remove(name); err != nil && !os.IsNotExist(err) {
			return err
		}
	}
	return filepath.WalkDir(filepath.Join(s.dir, "vhost"), func(path string, d fs.DirEntry, err error) error {
		if os.IsNotExist(err) {
			return nil
		}
		if err != nil || d.IsDir() || !strings.HasSuffix(path, ".sock") || keep[path] {
			return err
		}
		return os.Remove(path)
	})
}
