package proxy_test

import (
	"context"
	"sync"
	"testing"
	"time"

	"scoria/alba"
	"scoria/alba/albatest"
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
