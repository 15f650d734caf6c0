package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/rs/zerolog"
	"golang.org/x/sys/unix"

	"scoria/alba"
	"scoria/alba/asd"
	"scoria/alba/asd/disk"
	"scoria/alba/asd/remote"
	"scoria/alba/proxy"
	"scoria/alba/repair"
	"scoria/alba/vfs"
	"scoria/driver/host"
	"scoria/driver/registry"
	"scoria/vhost/client/load"
)

// objectRig is an object store in this process: storage daemons in directories below
// one, which are spoken to directly or over loopback TCP, and a proxy.
type objectRig struct {
	rigOptions
	dir     string
	reg     registry.Store
	proxy   *proxy.Proxy
	closers []func() error

	mu      sync.Mutex
	clients map[string]*benchClient // by address
}

// benchClient is a storage daemon that can be made to fail or to be slow, and that
// counts what is read from it.
type benchClient struct {
	asd.Client
	disk  *disk.Disk
	down  atomic.Bool
	delay atomic.Int64 // ns, before each read
	bytes atomic.Int64 // read
}

// ReadAt implements asd.Client.
func (c *benchClient) ReadAt(ctx context.Context, key string, p []byte, off int64, pri asd.Priority) (asd.ReadInfo, error) {
	if c.down.Load() {
		return asd.ReadInfo{}, fmt.Errorf("taken away by the benchmark: %w", asd.ErrUnavailable)
	}
	if d := time.Duration(c.delay.Load()); d > 0 {
		t := time.NewTimer(d)
		defer t.Stop()
		select {
		case <-t.C:
		case <-ctx.Done():
			return asd.ReadInfo{}, ctx.Err()
		}
	}
	info, err := c.Client.ReadAt(ctx, key, p, off, pri)
	if err == nil {
		c.bytes.Add(int64(len(p)))
	}
	return info, err
}

// Close leaves the daemon to the rig.
func (c *benchClient) Close() error { return nil }

// rigOptions say what an objectRig is like.
type rigOptions struct {
	devices    int
	policy     alba.Policy
	encryption alba.Encryption
	tcp        bool
	handles    int // of value files that each storage daemon keeps; 0: its default
}

// newObjectRig opens storage daemons and makes a namespace "n".
func (b *bench) newObjectRig(ctx context.Context, o rigOptions) (_ *objectRig, err error) {
	r := &objectRig{rigOptions: o, clients: map[string]*benchClient{}}
	defer func() {
		if err != nil {
			r.close()
		}
	}()
	if r.dir, err = os.MkdirTemp(b.dataDir, "objects-"); err != nil {
		return nil, err
	}
	if r.reg, err = registry.Open(filepath.Join(r.dir, "registry")); err != nil {
		return nil, err
	}
	r.closers = append(r.closers, r.reg.Close)
	keys, err := alba.ParseMasterKeys([]byte(strings.Repeat("5a", alba.KeyBytes)))
	if err != nil {
		return nil, err
	}
	r.proxy, err = proxy.New(ctx, proxy.Options{Registry: host.AlbaRegistry{Store: r.reg}, Dial: r.dial, Node: "bench", Preset: "p", Keys: keys, Log: zerolog.Nop()})
	if err != nil {
		return nil, err
	}
	r.closers = append(r.closers, func() error { r.proxy.Close(); return nil })
	for i := range o.devices {
		address := filepath.Join(r.dir, fmt.Sprint("asd", i))
		if err := r.startASD(address); err != nil {
			return nil, err
		}
		if err := r.addDevice(ctx, address); err != nil {
			return nil, err
		}
	}
	ps := alba.Preset{Name: "p", Policies: []alba.Policy{o.policy}, FragmentBytes: alba.DefaultFragment, Encryption: o.encryption}
	if err := r.proxy.SetPreset(ctx, ps); err != nil {
		return nil, err
	}
	return r, r.proxy.CreateNamespaceWith(ctx, "n", "p")
}

// addDevice takes a storage daemon into the registry, which may take more than one
// attempt to connect to it while the machine is busy.
func (r *objectRig) addDevice(ctx context.Context, address string) error {
	for {
		_, err := r.proxy.AddDevice(ctx, alba.Device{Address: address, Host: "h"})
		if !errors.Is(err, asd.ErrUnavailable) {
			return err
		}
		select {
		case <-time.After(100 * time.Millisecond):
		case <-ctx.Done():
			return err
		}
	}
}

// startASD opens a storage daemon, and a server and a client for it if asked.
func (r *objectRig) startASD(address string) error {
	d, err := disk.Open(vfs.OS(), address, disk.Options{ReserveBytes: 1 << 20, Handles: r.handles, Log: zerolog.Nop()})
	if err != nil {
		return err
	}
	r.closers = append(r.closers, d.Close)
	c := &benchClient{Client: d, disk: d}
	if r.tcp {
		ln, err := remote.Listen("127.0.0.1:0", remote.Security{})
		if err != nil {
			return err
		}
		server, err := remote.NewServer(d, remote.ServerOptions{Log: zerolog.Nop()})
		if err != nil {
			return err
		}
		served := make(chan error, 1)
		go func() { served <- server.Serve(ln) }()
		r.closers = append(r.closers, func() error { return errors.Join(server.Close(), <-served) })
		client, err := remote.New(ln.Addr().String(), remote.Options{Log: zerolog.Nop()})
		if err != nil {
			return err
		}
		r.closers = append(r.closers, client.Close)
		c.Client = client
	}
	r.mu.Lock()
	r.clients[address] = c
	r.mu.Unlock()
	return nil
}

func (r *objectRig) dial(_ context.Context, d alba.Device) (asd.Client, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if c := r.clients[d.Address]; c != nil {
		return c, nil
	}
	return nil, fmt.Errorf("nobody at %q: %w", d.Address, asd.ErrUnavailable)
}

func (r *objectRig) close() {
	for i := len(r.closers) - 1; i >= 0; i-- {
		_ = r.closers[i]() // of a store that is thrown away
	}
	os.RemoveAll(r.dir)
}

// diskBytes is what the storage daemons read from their files for readers, heads with
// checksums included.
func (r *objectRig) diskBytes(ctx context.Context) (n uint64, err error) {
	for _, c := range r.clients {
		st, err := c.disk.Stats(ctx)
		if err != nil {
			return 0, err
		}
		n += st.DiskReadBytes
	}
	return n, nil
}

// device returns the client and the ID of one of the storage daemons.
func (r *objectRig) device(i int) (*benchClient, string) {
	m := r.proxy.Fleet().Members()[i]
	return r.clients[m.Record().Address], m.Record().ID
}

// dropCaches makes the next reads of the stored files go to the disk.
func (r *objectRig) dropCaches() error {
	return filepath.Walk(r.dir, func(name string, info os.FileInfo, err error) error {
		if err != nil || info.IsDir() || !strings.Contains(name, "/values/") {
			return err
		}
		f, err := os.Open(name)
		if err != nil {
			return err
		}
		defer f.Close()
		return unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED)
	})
}

// settle returns when what was deleted is gone from the file system and its journal:
// else the next measurement would free that room, and discard it on the disk.
func (r *objectRig) settle(ctx context.Context) error {
	for {
		left := ""
		err := filepath.WalkDir(r.dir, func(name string, entry fs.DirEntry, err error) error {
			if err == nil && !entry.IsDir() && strings.Contains(name, "/values/") {
				left = name
				err = filepath.SkipAll
			}
			if errors.Is(err, fs.ErrNotExist) { // removed meanwhile
				err = nil
			}
			return err
		})
		if err != nil {
			return err
		}
		if left == "" {
			break
		}
		select {
		case <-time.After(time.Millisecond):
		case <-ctx.Done():
			return fmt.Errorf("deleted, but there is still %s: %w", left, ctx.Err())
		}
	}
	dir, err := os.Open(r.dir)
	if err != nil {
		return err
	}
	defer dir.Close()
	return unix.Syncfs(int(dir.Fd()))
}

// repairOne has everything that a device held rebuilt on the others.
func (r *objectRig) repairOne(ctx context.Context, id string) (repair.Report, error) {
	if err := r.proxy.SetDeviceState(ctx, id, alba.DeviceRemoved); err != nil {
		return repair.Report{}, err
	}
	m := repair.New(repair.Options{Proxy: r.proxy, Log: zerolog.Nop()})
	report, err := m.Pass(ctx)
	if err == nil && (report.Left > 0 || report.Bytes == 0) {
		err = fmt.Errorf("repair of %d objects left %d and wrote %d bytes", report.Objects, report.Left, report.Bytes)
	}
	return report, err
}

// bareServer answers requests of 64 bytes with 4 KiB of a file read directly: what a
// round trip and a disk read take without a store.
func bareServer(f *os.File) (net.Listener, error) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	go func() {
		c, err := ln.Accept()
		if err != nil {
			return
		}
		defer c.Close()
		p, err := unix.Mmap(-1, 0, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANON)
		if err != nil {
			return
		}
		defer unix.Munmap(p)
		var q [64]byte
		for {
			if err := readFull(c, q[:]); err != nil {
				return
			}
			var off int64
			for i := range 8 {
				off |= int64(q[i]) << (8 * i)
			}
			if _, err := f.ReadAt(p, off); err != nil {
				return
			}
			if _, err := c.Write(p); err != nil {
				return
			}
		}
	}()
	return ln, nil
}

func readFull(c net.Conn, p []byte) error {
	for len(p) > 0 {
		n, err := c.Read(p)
		if err != nil {
			return err
		}
		p = p[n:]
	}
	return nil
}

// allCPUs lets this process use all CPUs until the function it returns is called: here
// the servers are in it.
func (b *bench) allCPUs() (undo func(), err error) {
	var set unix.CPUSet
	for _, cpu := range []int{b.cfg.clientCPU, b.cfg.serverCPU} {
		set.Set(cpu)
	}
	tasks, err := os.ReadDir("/proc/self/task")
	if err != nil {
		return nil, err
	}
	for _, task := range tasks {
		var tid int
		if _, err := fmt.Sscan(task.Name(), &tid); err != nil {
			return nil, err
		}
		if err := unix.SchedSetaffinity(tid, &set); err != nil && err != unix.ESRCH {
			return nil, err
		}
	}
	return func() { b.fail("objects", load.PinProcess(os.Getpid(), b.cfg.clientCPU)) }, nil
}
