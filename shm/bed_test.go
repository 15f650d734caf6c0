package shm

import (
	"bytes"
	"context"
	"net"
	"path/filepath"
	"runtime"
	"testing"
	"time"

	"github.com/rs/zerolog"

	"scoria/driver/block/blocktest"
	"scoria/shm/client"
	"scoria/shm/worker"
)

const (
	testVolume = "default/vol"
	testSize   = 64 << 20
)

// bed is a server over volumes in RAM.
type bed struct {
	t    testing.TB
	path string
	pool *blocktest.Pool
	ram  *blocktest.RAM
	set  *worker.Set
	srv  *Server
}

func newBed(t testing.TB, opts blocktest.Options, change func(*Config)) *bed {
	t.Helper()
	opts.Name = testVolume
	b := &bed{t: t, path: filepath.Join(t.TempDir(), "shm.sock"), pool: &blocktest.Pool{}, ram: blocktest.NewRAM(testSize, opts)}
	b.pool.Add(b.ram)
	t.Cleanup(b.ram.Close)
	var err error
	if b.set, err = worker.NewSet(worker.Config{Workers: 2}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(b.set.Close)
	b.start(change)
	t.Cleanup(func() { b.srv.Close() })
	return b
}

// start begins to serve, anew after the server was closed.
func (b *bed) start(change func(*Config)) {
	b.t.Helper()
	c := Config{Opener: b.pool, Set: b.set, Log: zerolog.Nop()}
	if change != nil {
		change(&c)
	}
	l, err := net.ListenUnix("unixpacket", &net.UnixAddr{Name: b.path, Net: "unixpacket"})
	if err != nil {
		b.t.Fatal(err)
	}
	b.srv = NewServer(c)
	go b.srv.Serve(l)
}

func (b *bed) open(change func(*client.Options)) *client.Disk {
	b.t.Helper()
	o := client.Options{Socket: b.path, Volume: testVolume}
	if change != nil {
		change(&o)
	}
	d, err := client.Open(soon(b.t), o)
	if err != nil {
		b.t.Fatal(err)
	}
	b.t.Cleanup(func() { d.Close() })
	return d
}

// soon is a context that ends when a test has taken far too long.
func soon(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	t.Cleanup(cancel)
	return ctx
}

// hurry waits for something that happens soon.
func hurry(t testing.TB, what string, done func() bool) {
	t.Helper()
	for end := time.Now().Add(2 * time.Minute); !done(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			buf := make([]byte, 1<<20)
			t.Fatalf("no %s in time\n%s", what, buf[:runtime.Stack(buf, true)])
		}
	}
}

func pattern(n int, seed byte) []byte {
	return bytes.Repeat([]byte{seed, seed + 1, seed ^ 0x55, 7}, (n+3)/4)[:n]
}
