package remote

import (
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"testing"

	"scoria/alba/asd"
	"scoria/alba/wire"
)

// TestP8ConnectionThatEnds: a connection that ends, wherever, is an ASD that is not
// reached, and not a value that ends: a caller would take that for damage.
func TestP8ConnectionThatEnds(t *testing.T) {
	welcome := (&wire.Welcome{Version: wire.MaxVersion, Status: wire.Welcomed, MaxRequests: 4}).Encode()
	for name, answer := range map[string]struct{ welcome, header int }{
		"at once": {0, 0}, "in the welcome": {5, 0}, "before an answer": {len(welcome), 0}, "in an answer": {len(welcome), 7},
	} {
		t.Run(name, func(t *testing.T) {
			ln, err := net.Listen("tcp", "127.0.0.1:0")
			must(t, err)
			var served sync.WaitGroup
			served.Go(func() {
				for {
					c, err := ln.Accept()
					if err != nil {
						return
					}
					_, err = io.ReadFull(c, make([]byte, wire.HelloBytes))
					_, werr := c.Write(welcome[:answer.welcome])
					if answer.welcome == len(welcome) {
						// All of the request, or else the connection is reset.
						_, rerr := io.ReadAtLeast(c, make([]byte, 64<<10), wire.HeaderBytes)
						_, aerr := c.Write(make([]byte, answer.header))
						werr = errors.Join(werr, rerr, aerr)
					}
					if err := errors.Join(err, werr, c.Close()); err != nil {
						t.Error(err)
					}
				}
			})
			c := dial(t, ln.Addr().String(), impatient)
			for range 3 {
				_, got := c.Get(within(t), "key", guest)
				_, at := c.ReadAt(within(t), "key", make([]byte, 4096), 0, guest)
				for _, err := range []error{got, at} {
					wantErr(t, err, asd.ErrUnavailable)
					if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
						t.Error(fmt.Errorf("%w: would be taken for a value that ends", err))
					}
				}
			}
			must(t, ln.Close())
			served.Wait()
		})
	}
}
