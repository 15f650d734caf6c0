package host

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"time"

	"github.com/rs/zerolog"

	"scoria/driver/block"
	"scoria/driver/control"
	"scoria/driver/nbd"
	"scoria/driver/registry"
	"scoria/shm/worker"
	"scoria/vhost"
)

// vhostFront serves each volume on a socket of its own.
type vhostFront struct {
	server     *vhost.Server
	opener     block.Opener
	socketPath func(pool, name string) string

	mu        sync.Mutex
	endpoints map[string]*vhost.Endpoint // by POOL/VOLUME
}

func newVhostFront(c *Config, workers *worker.Set, opener block.Opener, log zerolog.Logger) (*vhostFront, error) {
	gid, err := c.Sockets.gid()
	if err != nil {
		return nil, err
	}
	vc := vhost.Config{
		Set:        workers,
		SocketMode: os.FileMode(c.Sockets.Mode), SocketGroup: max(gid, 0),
		Log: log.With().Str("front_end", "vhost").Logger(),
	}
	server, err := vhost.NewServer(vc)
	if err != nil {
		return nil, err
	}
	return &vhostFront{server: server, opener: opener, socketPath: c.vhostSocket, endpoints: map[string]*vhost.Endpoint{}}, nil
}

// newWorkers starts the threads that serve the rings of all front ends.
func newWorkers(c *Config) (*worker.Set, error) {
	wc := worker.Config{Workers: workerCount(c), PollMax: time.Duration(c.Vhost.Poll), PollCPU: c.Vhost.PollShare}
	if wc.PollMax == 0 || wc.PollCPU == 0 {
		wc.PollMax = -1 // to worker 0 means its default
	}
	return worker.NewSet(wc)
}

// workerCount is the configured number, or half the CPUs: the guests need the
// others.
func workerCount(c *Config) int {
	if c.Vhost.Workers > 0 {
		return c.Vhost.Workers
	}
	return min(max(runtime.NumCPU()/2, 1), 8)
}

func (f *vhostFront) Add(name string) error {
	pool, vol, err := registry.SplitName(name)
	if err != nil {
		return err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.endpoints[name] != nil {
		return nil
	}
	path := f.socketPath(pool, vol)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return fmt.Errorf("vhost socket of volume %s: %w", name, err)
	}
	e, err := f.server.Listen(name, path, func(ctx context.Context) (block.Device, error) { return f.opener.Open(ctx, name) })
	if err != nil {
		return err
	}
	f.endpoints[name] = e
	return nil
}

func (f *vhostFront) Remove(name string) {
	f.mu.Lock()
	e := f.endpoints[name]
	delete(f.endpoints, name)
	f.mu.Unlock()
	if e != nil {
		e.Close()
	}
}

func (f *vhostFront) Users(name string) []string {
	f.mu.Lock()
	e := f.endpoints[name]
	f.mu.Unlock()
	if e == nil {
		return nil
	}
	st := e.Stats()
	if st.Sessions == 0 {
		return nil
	}
	return []string{fmt.Sprintf("vhost (%d connections, %d rings)", st.Sessions, st.Rings)}
}

func (f *vhostFront) LastDisconnect(name string) (reason string, when time.Time) {
	f.mu.Lock()
	e := f.endpoints[name]
	f.mu.Unlock()
	if e == nil {
		return "", time.Time{}
	}
	st := e.Stats()
	return st.LastDisconnect, st.LastDisconnectTime
}

// Troubles names front ends that lost an earlier connection at a bad moment: a
// fault of QEMU from 7.2 to 9.0; see package vhost.
func (f *vhostFront) Troubles(name string) []control.Condition {
	f.mu.Lock()
	e := f.endpoints[name]
	f.mu.Unlock()
	if e == nil {
		return nil
	}
	var list []control.Condition
	st := e.Stats()
	for _, pid := range st.Silent {
		list = append(list, control.Condition{Code: "front-end-silent", Message: fmt.Sprintf(
			"process %d is connected and says nothing. QEMU 7.2 to 9.0 does so after it lost its connection while it negotiated, or while its guest had no driver on the disk. "+
				"If the guest's disk hangs, stop that QEMU process and start the guest anew", pid)})
	}
	for _, pid := range st.Resumed {
		list = append(list, control.Condition{Code: "front-end-deaf", Message: fmt.Sprintf(
			"process %d goes on from a connection that ended while its guest had no driver on the disk, as QEMU 7.2 to 9.0 does. It is served, "+
				"but it sees no resize, and after the next restart of scoriad it won't come back: stop that QEMU process and start the guest anew, or migrate it, before", pid)})
	}
	return list
}

// Close ends the sessions. They end by themselves in bounded time: requests
// under way end, and those that wait for room stay in the guests' rings.
func (f *vhostFront) Close(ctx context.Context) error {
	return within(ctx, "vhost front end", f.server.Close)
}

func (f *vhostFront) stats() []vhost.Stats {
	f.mu.Lock()
	endpoints := make([]*vhost.Endpoint, 0, len(f.endpoints))
	for _, e := range f.endpoints {
		endpoints = append(endpoints, e)
	}
	f.mu.Unlock()
	stats := make([]vhost.Stats, len(endpoints))
	for i, e := range endpoints {
		stats[i] = e.Stats()
	}
	return stats
}

// nbdFront serves all volumes on one socket.
type nbdFront struct {
	server *nbd.Server
	socket string
	done   chan error
}

func newNBDFront(c *Config, l net.Listener, opener block.Opener, log zerolog.Logger) *nbdFront {
	f := &nbdFront{
		server: &nbd.Server{Opener: opener, Log: log.With().Str("front_end", "nbd").Logger()},
		socket: c.nbdSocket(), done: make(chan error, 1),
	}
	go func() { f.done <- f.server.Serve(context.Background(), l) }()
	return f
}

func (f *nbdFront) Add(string) error { return nil }

// Remove does nothing: a volume with connections is not removed, and the device
// of a removed one refuses what still comes.
func (f *nbdFront) Remove(string) {}

func (f *nbdFront) Users(name string) []string {
	var users []string
	for _, c := range f.server.Conns() {
		export, _, _ := strings.Cut(c.Export, ":")
		if full, err := fullName(export); err == nil && full == name {
			users = append(users, fmt.Sprintf("nbd pid %d", c.PID))
		}
	}
	return users
}

// LastDisconnect knows nothing: NBD clients are told why, and it is logged.
func (f *nbdFront) LastDisconnect(string) (reason string, when time.Time) { return "", time.Time{} }

func (f *nbdFront) Close(ctx context.Context) error {
	err := within(ctx, "nbd front end", f.server.Close)
	if err == nil {
		if served := <-f.done; !errors.Is(served, nbd.ErrServerClosed) {
			err = served
		}
	}
	return errors.Join(err, os.Remove(f.socket))
}

// within runs fn and waits for it until ctx ends.
func within(ctx context.Context, what string, fn func()) error {
	done := make(chan struct{})
	go func() {
		defer close(done)
		fn()
	}()
	select {
	case <-done:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("%s: still busy: %w", what, ctx.Err())
	}
}
