package control_test

import (
	"context"
	"net"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/rs/zerolog"

	"scoria/driver/control"
)

func (b *backend) BeginHold() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.begun++
	return "hold"
}

func (b *backend) EndHold(owner string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.ended = append(b.ended, owner)
}

// TestHoldEndsWithItsClient: however the connection ends; and the server's end does
// not wait for clients.
func TestHoldEndsWithItsClient(t *testing.T) {
	b := newBackend()
	c, socket := serve(t, b)
	ended := func(want int) {
		t.Helper()
		for end := time.Now().Add(patience); ; time.Sleep(time.Millisecond) {
			b.mu.Lock()
			got := slices.Clone(b.ended)
			b.mu.Unlock()
			if len(got) == want {
				return
			}
			if time.Now().After(end) || len(got) > want {
				t.Fatalf("ended: %q, want %d", got, want)
			}
		}
	}
	ctx, cancel := context.WithCancel(testContext(t))
	owner, release, err := c.Hold(ctx)
	if err != nil || owner != "hold" {
		t.Fatal(owner, err)
	}
	cancel() // which was for the request only
	if _, err := c.Status(testContext(t)); err != nil {
		t.Fatal(err)
	}
	ended(0)
	release()
	ended(1)
	// A client that dies says nothing.
	conn, err := net.Dial("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := conn.Write([]byte("POST /v1/hold HTTP/1.1\r\nHost: x\r\n\r\n")); err != nil {
		t.Fatal(err)
	}
	if _, err := conn.Read(make([]byte, 16)); err != nil {
		t.Fatal(err)
	}
	ended(1)
	conn.Close()
	ended(2)
	if _, _, err := c.Hold(ctx); err == nil {
		t.Fatal("a hold of a client that has given up")
	}

	l, err := net.Listen("unix", filepath.Join(t.TempDir(), "s"))
	if err != nil {
		t.Fatal(err)
	}
	s := control.NewServer(b, nil, zerolog.Nop())
	done := make(chan error, 1)
	go func() { done <- s.Serve(l) }()
	if _, _, err := control.NewClient(l.Addr().String()).Hold(testContext(t)); err != nil {
		t.Fatal(err)
	}
	if err := s.Close(testContext(t)); err != nil {
		t.Fatal(err)
	}
	if err := <-done; err != nil {
		t.Fatal(err)
	}
}
