package host_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"path"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/rs/zerolog"

	"scoria/alba"
	"scoria/alba/albatest"
	"scoria/alba/asd"
	"scoria/alba/asd/disk"
	"scoria/alba/proxy"
	"scoria/alba/vfs"
	"scoria/driver"
	"scoria/driver/host"
	"scoria/driver/registry"
	"scoria/driver/storetest"
)

// embedded is storage daemons in process on one file system.
type embedded struct {
	mu    sync.Mutex
	fs    vfs.FS
	disks map[string]*disk.Disk
	dead  chan struct{} // closed when the file system was killed
}

type leftOpen struct{ *disk.Disk }

func (leftOpen) Close() error { return nil }

func (e *embedded) dial(_ context.Context, d alba.Device) (asd.Client, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if c := e.disks[d.Address]; c != nil {
		return leftOpen{c}, nil
	}
	c, err := disk.Open(e.fs, d.Address, disk.Options{CapacityBytes: 1 << 40, ReserveBytes: 1 << 20, Log: zerolog.Nop()})
	if err != nil {
		return nil, err
	}
	e.disks[d.Address] = c
	return leftOpen{c}, nil
}

func (e *embedded) close() {
	e.mu.Lock()
	defer e.mu.Unlock()
	for _, d := range e.disks {
		// On a file system that was killed the key-value store may never end.
		done := make(chan struct{})
		go func() { defer close(done); _ = d.Close() }()
		select {
		case <-done:
		case <-e.dead:
		}
	}
}

// albaStore opens n storage daemons below dir and a store on them, made before or not.
func albaStore(reg alba.Registry, fsys vfs.FS, dir string, n int, ps alba.Preset) (driver.Store, func(), error) {
	e := &embedded{fs: fsys, disks: map[string]*disk.Disk{}, dead: make(chan struct{})}
	keys, err := alba.ParseMasterKeys([]byte(strings.Repeat("5a", alba.KeyBytes)))
	if err != nil {
		return nil, nil, err
	}
	p, err := proxy.New(context.Background(), proxy.Options{Registry: reg, Dial: e.dial, Node: "node", Preset: ps.Name, Keys: keys, Log: zerolog.Nop()})
	if err != nil {
		return nil, nil, err
	}
	stop := func() {
		p.Close()
		if _, err := fsys.List(dir); errors.Is(err, vfs.ErrKilled) {
			close(e.dead)
		}
		e.close()
	}
	kvs, err := reg.List(context.Background(), alba.DevicePrefix)
	for i := len(kvs); i < n && err == nil; i++ {
		_, err = p.AddDevice(context.Background(), alba.Device{Address: fmt.Sprintf("%s/asd%d", dir, i), Host: "h"})
	}
	if err == nil {
		if _, err = proxy.LoadPreset(context.Background(), reg, ps.Name); err != nil {
			err = p.SetPreset(context.Background(), ps)
		}
	}
	if err != nil {
		stop()
		return nil, nil, err
	}
	return host.AlbaStore{Proxy: p, Preset: ps.Name}, stop, nil
}

// TestAlbaStore: the object store on embedded storage daemons and the embedded
// registry is a driver.Store.
func TestAlbaStore(t *testing.T) {
	for _, ps := range []alba.Preset{
		albatest.Preset(alba.Policy{K: 1, M: 0, C: 1, X: 1}),
		albatest.Preset(alba.Policy{K: 2, M: 1, C: 2, X: 1}),
	} {
		t.Run(ps.Policies[0].String(), func(t *testing.T) {
			storetest.Run(t, func(t *testing.T) driver.Store {
				dir := t.TempDir()
				reg, err := registry.Open(filepath.Join(dir, "registry"))
				if err != nil {
					t.Fatal(err)
				}
				s, stop, err := albaStore(host.AlbaRegistry{Store: reg}, vfs.OS(), dir, ps.Policies[0].Shards(), ps)
				if err != nil {
					t.Fatal(err)
				}
				t.Cleanup(func() {
					stop()
					if err := reg.Close(); err != nil {
						t.Error(err)
					}
				})
				return s
			})
		})
	}
}

// journaled is a registry whose commits are durable in a file of a vfs.FS.
type journaled struct {
	*albatest.Registry
	mu     sync.Mutex
	f      vfs.File
	size   int64
	failed error
}

func openJournaled(fsys vfs.FS, name string) (*journaled, error) {
	f, err := fsys.Open(name, vfs.Create)
	if err != nil {
		return nil, err
	}
	if err := fsys.SyncDir(path.Dir(name)); err != nil {
		return nil, err
	}
	r := &journaled{Registry: albatest.NewRegistry(), f: f}
	size, err := f.Size()
	if err != nil {
		return nil, err
	}
	all := make([]byte, size)
	if _, err := f.ReadAt(all, 0); err != nil && err != io.EOF {
		return nil, err
	}
	for len(all) >= 8 {
		n := int(binary.LittleEndian.Uint32(all))
		if n == 0 || n > len(all)-8 || crc32.ChecksumIEEE(all[8:8+n]) != binary.LittleEndian.Uint32(all[4:]) {
			break // torn
		}
		var writes []alba.Write
		if err := json.Unmarshal(all[8:8+n], &writes); err != nil {
			return nil, err
		}
		if _, err := r.Registry.Commit(context.Background(), nil, writes); err != nil {
			return nil, err
		}
		r.size += int64(8 + n)
		all = all[8+n:]
	}
	if err := f.Truncate(r.size); err != nil {
		return nil, err
	}
	return r, f.Sync() // what was read may not be on the disk yet
}

func (r *journaled) Commit(ctx context.Context, compares []alba.Compare, writes []alba.Write) (int64, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.failed != nil {
		return 0, r.failed
	}
	if _, err := r.Registry.Commit(ctx, compares, nil); err != nil {
		return 0, err
	}
	b, err := json.Marshal(writes)
	if err != nil {
		return 0, err
	}
	var head [8]byte
	binary.LittleEndian.PutUint32(head[:], uint32(len(b)))
	binary.LittleEndian.PutUint32(head[4:], crc32.ChecksumIEEE(b))
	rec := bytes.Join([][]byte{head[:], b}, nil)
	if _, err = r.f.WriteAt(rec, r.size); err == nil {
		err = r.f.Sync()
	}
	if err != nil {
		r.failed = err
		return 0, err
	}
	r.size += int64(len(rec))
	return r.Registry.Commit(context.WithoutCancel(ctx), nil, writes)
}

// closing is a store that stops with what it stands on.
type closing struct {
	host.AlbaStore
	stop func()
}

func (c closing) Close() error { c.stop(); return nil }

// Put says so if the file system was killed: a storage daemon keeps the text of why
// it failed, not the error.
func (c closing) Put(ctx context.Context, ns, name string, epoch uint64, obj driver.Object) error {
	err := c.AlbaStore.Put(ctx, ns, name, epoch, obj)
	if err != nil && strings.Contains(err.Error(), vfs.ErrKilled.Error()) {
		err = fmt.Errorf("%w (%w)", err, vfs.ErrKilled)
	}
	return err
}

// TestAlbaStoreCrash: power lost, killed, a disk's call failed, at any time: what the
// store and its storage daemons acknowledged is there, and what was under way is
// there wholly or not at all.
func TestAlbaStoreCrash(t *testing.T) {
	ps := albatest.Preset(alba.Policy{K: 2, M: 1, C: 2, X: 1})
	storetest.RunCrashEvery(t, 5, func(fsys vfs.FS) (driver.Store, error) {
		if err := fsys.MkdirAll("store"); err != nil {
			return nil, err
		}
		reg, err := openJournaled(fsys, "store/registry")
		if err != nil {
			return nil, err
		}
		s, stop, err := albaStore(reg, fsys, "store", ps.Policies[0].Shards(), ps)
		if err != nil {
			return nil, err
		}
		return closing{s.(host.AlbaStore), stop}, nil
	})
}
