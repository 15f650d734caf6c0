package host_test

import (
	"context"
	"fmt"
	"path/filepath"
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
}

type leftOpen struct{ asd.Client }

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
		_ = d.Close()
	}
}

// albaStore opens n storage daemons below dir and a store on them, made before or not.
func albaStore(reg alba.Registry, fsys vfs.FS, dir string, n int, ps alba.Preset) (driver.Store, func(), error) {
	e := &embedded{fs: fsys, disks: map[string]*disk.Disk{}}
	p, err := proxy.New(context.Background(), proxy.Options{Registry: reg, Dial: e.dial, Node: "node", Preset: ps.Name, Log: zerolog.Nop()})
	if err != nil {
		return nil, nil, err
	}
	stop := func() { p.Close(); e.close() }
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
