package remote

import (
	"context"
	"errors"
	"net"
	"testing"
	"time"

	"scoria/alba/asd"
	"scoria/alba/asd/asdtest"
	"scoria/alba/asd/disk"
	"scoria/alba/vfs"
)

const guest = asd.PriorityGuest

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func wantErr(t testing.TB, err, want error) {
	t.Helper()
	if !errors.Is(err, want) {
		t.Fatalf("error %v, want %v", err, want)
	}
}

func within(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), 3*time.Minute)
	t.Cleanup(cancel)
	return ctx
}

func newDisk(t testing.TB) *disk.Disk {
	t.Helper()
	d, err := disk.Open(vfs.NewMem(), "/asd", disk.Options{ReserveBytes: 1 << 20, CacheBytes: 1 << 20})
	must(t, err)
	t.Cleanup(func() { _ = d.Close() })
	return d
}

// serve serves a backend on loopback until the test ends.
func serve(t testing.TB, b Backend, opts ServerOptions, sec Security) (s *Server, addr string) {
	t.Helper()
	ln, err := Listen("127.0.0.1:0", sec)
	must(t, err)
	return serveOn(t, ln, b, opts), ln.Addr().String()
}

func serveOn(t testing.TB, ln net.Listener, b Backend, opts ServerOptions) *Server {
	t.Helper()
	s, err := NewServer(b, opts)
	must(t, err)
	done := make(chan error, 1)
	go func() { done <- s.Serve(ln) }()
	t.Cleanup(func() {
		must(t, s.Close())
		must(t, <-done)
	})
	return s
}

func dial(t testing.TB, addr string, opts Options) *Client {
	t.Helper()
	c, err := New(addr, opts)
	must(t, err)
	t.Cleanup(func() { must(t, c.Close()) })
	return c
}

func TestConformance(t *testing.T) {
	t.Run("plain", func(t *testing.T) {
		asdtest.Run(t, func(t *testing.T) asd.Client {
			_, addr := serve(t, newDisk(t), ServerOptions{}, Security{})
			return dial(t, addr, Options{})
		})
	})
	t.Run("few at once", func(t *testing.T) {
		asdtest.Run(t, func(t *testing.T) asd.Client {
			_, addr := serve(t, newDisk(t), ServerOptions{MaxRequests: 1, ConnBytes: 1, TotalBytes: 1}, Security{})
			return dial(t, addr, Options{})
		})
	})
	t.Run("TLS", func(t *testing.T) {
		server, client := certificates(t)
		asdtest.Run(t, func(t *testing.T) asd.Client {
			_, addr := serve(t, newDisk(t), ServerOptions{}, server)
			return dial(t, addr, Options{Security: client})
		})
	})
}
