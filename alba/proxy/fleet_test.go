package proxy_test

import (
	"context"
	"errors"
	"sync"
	"testing"
	"time"

	"scoria/alba"
	"scoria/alba/albatest"
	"scoria/alba/asd"
	"scoria/alba/proxy"
)

// heldRegistry keeps the answer of its first List of the devices back.
type heldRegistry struct {
	alba.Registry
	once         sync.Once
	listed, goOn chan struct{}
}

func (r *heldRegistry) List(ctx context.Context, prefix string) ([]alba.KV, error) {
	kvs, err := r.Registry.List(ctx, prefix)
	r.once.Do(func() {
		close(r.listed)
		<-r.goOn
	})
	return kvs, err
}

// TestReloadsKeepTheirOrder: a reload that read the registry before a device was added
// does not make the fleet forget it.
func TestReloadsKeepTheirOrder(t *testing.T) {
	c := albatest.NewCluster(3, 3)
	p := c.Proxy(t, albatest.Preset(alba.Policy{K: 2, M: 1, C: 3, X: 1}), nil)
	reg := &heldRegistry{Registry: c.Reg, listed: make(chan struct{}), goOn: make(chan struct{})}
	f := proxy.NewFleet(reg, c.Dial, proxy.Location{Host: "host-0", Rack: "rack", Datacentre: "dc"})
	defer f.Close()
	first, second := make(chan error, 1), make(chan error, 1)
	go func() { first <- f.Reload(t.Context()) }()
	<-reg.listed
	_, err := p.AddDevice(t.Context(), c.Record(c.NewDisk()))
	must(t, err)
	go func() { second <- f.Reload(t.Context()) }()
	select {
	case err = <-second: // it did not wait for the first, which comes behind it
		second <- err
	case <-time.After(100 * time.Millisecond):
	}
	close(reg.goOn)
	must(t, <-first)
	must(t, <-second)
	if n := len(f.Members()); n != 4 {
		t.Fatalf("the fleet has %d devices, the registry 4", n)
	}
}

// closing is a client that notes that it was closed.
type closing struct {
	asd.Client
	closed chan struct{}
}

func (c *closing) Close() error {
	close(c.closed)
	return nil
}

// TestDialedMeanwhile: a client that was being dialed when its device was removed, or moved to
// another address, is not used, and is closed.
func TestDialedMeanwhile(t *testing.T) {
	for _, what := range []string{"removed", "moved"} {
		t.Run(what, func(t *testing.T) {
			c := albatest.NewCluster(1, 1)
			p := c.Proxy(t, albatest.Preset(alba.Policy{K: 1, M: 0, C: 1, X: 1}), nil)
			stale := &closing{c.Disks[0].Faulty, make(chan struct{})}
			var f *proxy.Fleet
			dial := func(ctx context.Context, d alba.Device) (asd.Client, error) {
				if d.Address != c.Disks[0].ID {
					return c.Dial(ctx, c.Record(c.Disks[0]))
				}
				if what == "removed" {
					must(t, p.SetDeviceState(t.Context(), d.ID, alba.DeviceRemoved))
				} else {
					d.Address = "elsewhere"
					_, err := c.Reg.Commit(t.Context(), nil, []alba.Write{{Key: alba.DeviceKey(d.ID), Value: alba.Encode(d)}})
					must(t, err)
				}
				must(t, f.Reload(t.Context()))
				return stale, nil
			}
			f = proxy.NewFleet(c.Reg, dial, proxy.Location{})
			defer f.Close()
			must(t, f.Reload(t.Context()))
			m := f.Member(c.Disks[0].ID)
			if _, err := m.Client(t.Context()); !errors.Is(err, asd.ErrUnavailable) {
				t.Fatalf("dialed before it was %s: %v", what, err)
			}
			albatest.Await(t, stale.closed, "the stale client's end")
			if _, err := m.Client(t.Context()); (err == nil) != (what == "moved") {
				t.Fatalf("after it was %s: %v", what, err)
			}
		})
	}
}
