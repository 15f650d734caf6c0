// Package objecttest opens the object store as a driver.Store for tests: with storage
// daemons in this process and, if wanted, a registry, all on one vfs.FS, so that a
// crash of it takes everything that the store stands on. Package driver's tests of volumes
// run over it and the directory store; stores_test.go there lists the few that do not.
//
// A Store has the goroutines of its proxy and of its storage daemons. Close ends them,
// also on a file system that was killed, where what a storage daemon's key-value store
// still waits for may never come: that much is left behind.
package objecttest

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"

	"github.com/rs/zerolog"

	"scoria/alba"
	"scoria/alba/asd"
	"scoria/alba/asd/disk"
	"scoria/alba/proxy"
	"scoria/alba/repair"
	"scoria/alba/vfs"
	"scoria/driver"
	"scoria/driver/host"
)

// Store is a driver.Store on storage daemons in this process. Any goroutine may use it.
type Store struct {
	host.AlbaStore
	fs      vfs.FS
	dir     string
	faults  *repair.Faults // what reads have met
	dead    chan struct{}  // closed when a stop finds the file system killed
	closing sync.Once

	mu    sync.Mutex
	disks map[string]*disk.Disk // by directory
}

var _ driver.Store = (*Store)(nil)

// Open opens n storage daemons in directories below dir of fsys, made before or not,
// and a store on them, whose namespaces have preset ps. The caller closes it before it
// opens what it leaves, and closes reg after it.
func Open(reg alba.Registry, fsys vfs.FS, dir string, n int, ps alba.Preset) (*Store, error) {
	ctx := context.Background()
	keys, err := alba.ParseMasterKeys([]byte(strings.Repeat("5a", alba.KeyBytes)))
	if err != nil {
		return nil, err
	}
	s := &Store{fs: fsys, dir: dir, faults: repair.NewFaults(), dead: make(chan struct{}), disks: map[string]*disk.Disk{}}
	p, err := proxy.New(ctx, proxy.Options{Registry: reg, Dial: s.dial, Node: "node", Preset: ps.Name, Keys: keys, Report: s.faults.Add, Log: zerolog.Nop()})
	if err != nil {
		return nil, err
	}
	s.AlbaStore = host.AlbaStore{Proxy: p, Preset: ps.Name, OnDisk: func(alba.Device) bool { return true }}
	kvs, err := reg.List(ctx, alba.DevicePrefix)
	for i := len(kvs); i < n && err == nil; i++ {
		_, err = p.AddDevice(ctx, alba.Device{Address: fmt.Sprintf("%s/asd%d", dir, i), Host: "h"})
	}
	if err == nil {
		if _, err = proxy.LoadPreset(ctx, reg, ps.Name); err != nil {
			err = p.SetPreset(ctx, ps)
		}
	}
	if err != nil {
		_ = s.Close()
		return nil, err
	}
	return s, nil
}

// leftOpen is a client of a storage daemon that outlives it.
type leftOpen struct{ *disk.Disk }

func (leftOpen) Close() error { return nil }

// dial implements proxy.Dial.
func (s *Store) dial(_ context.Context, d alba.Device) (asd.Client, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if c := s.disks[d.Address]; c != nil {
		return leftOpen{c}, nil
	}
	c, err := disk.Open(s.fs, d.Address, disk.Options{CapacityBytes: 1 << 40, ReserveBytes: 1 << 20, Log: zerolog.Nop()})
	if err != nil {
		return nil, err
	}
	s.disks[d.Address] = c
	return leftOpen{c}, nil
}

// Close ends the store and its storage daemons. It may be repeated.
func (s *Store) Close() error {
	s.closing.Do(func() {
		s.Proxy.Close()
		if _, err := s.fs.List(s.dir); errors.Is(err, vfs.ErrKilled) {
			close(s.dead)
		}
		s.mu.Lock()
		defer s.mu.Unlock()
		for _, d := range s.disks {
			done := make(chan struct{})
			go func() { defer close(done); _ = d.Close() }()
			select {
			case <-done:
			case <-s.dead:
			}
		}
	})
	return nil
}

// killed adds vfs.ErrKilled to an error that it caused: a storage daemon keeps the text
// of why it failed, not the error.
func killed(err error) error {
	if err != nil && !errors.Is(err, vfs.ErrKilled) && strings.Contains(err.Error(), vfs.ErrKilled.Error()) {
		err = fmt.Errorf("%w (%w)", err, vfs.ErrKilled)
	}
	return err
}

// CreateNamespace implements driver.Store.
func (s *Store) CreateNamespace(ctx context.Context, ns string) error {
	return killed(s.AlbaStore.CreateNamespace(ctx, ns))
}

// DeleteNamespace implements driver.Store.
func (s *Store) DeleteNamespace(ctx context.Context, ns string) error {
	return killed(s.AlbaStore.DeleteNamespace(ctx, ns))
}

// Namespaces implements driver.Store.
func (s *Store) Namespaces(ctx context.Context) ([]string, error) {
	names, err := s.AlbaStore.Namespaces(ctx)
	return names, killed(err)
}

// Fence implements driver.Store.
func (s *Store) Fence(ctx context.Context, ns string, epoch uint64) error {
	return killed(s.AlbaStore.Fence(ctx, ns, epoch))
}

// Put implements driver.Store.
func (s *Store) Put(ctx context.Context, ns, name string, epoch uint64, obj driver.Object) error {
	return killed(s.AlbaStore.Put(ctx, ns, name, epoch, obj))
}

// ReadAt implements driver.Store.
func (s *Store) ReadAt(ctx context.Context, ns, name string, p []byte, off int64) error {
	return killed(s.AlbaStore.ReadAt(ctx, ns, name, p, off))
}

// Size implements driver.Store.
func (s *Store) Size(ctx context.Context, ns, name string) (int64, error) {
	n, err := s.AlbaStore.Size(ctx, ns, name)
	return n, killed(err)
}

// Delete implements driver.Store.
func (s *Store) Delete(ctx context.Context, ns, name string, epoch uint64) error {
	return killed(s.AlbaStore.Delete(ctx, ns, name, epoch))
}

// List implements driver.Store.
func (s *Store) List(ctx context.Context, ns, prefix string) ([]string, error) {
	names, err := s.AlbaStore.List(ctx, ns, prefix)
	return names, killed(err)
}
