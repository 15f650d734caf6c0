package proxy_test

import (
	"bytes"
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	"scoria/alba"
	"scoria/alba/albatest"
	"scoria/alba/asd"
	"scoria/alba/proxy"
)

// hanging is a device that answers no put of a fragment.
type hanging struct {
	asd.Client
	ended chan error // why a put was given up
}

func (h hanging) Apply(ctx context.Context, asserts []asd.Assert, updates []asd.Update, pri asd.Priority) error {
	for i := range updates {
		if updates[i].Kind == asd.KindPut && len(updates[i].Value.Data) >= 4096 {
			<-ctx.Done()
			select {
			case h.ended <- ctx.Err():
			default:
			}
			return ctx.Err()
		}
	}
	return h.Client.Apply(ctx, asserts, updates, pri)
}

// TestHangingDeviceHoldsNoMemory: a device that hangs while an upload waits for memory is
// given up like one that hangs while it waits for its window: not only at the end of the
// longest time that a put may take.
func TestHangingDeviceHoldsNoMemory(t *testing.T) {
	c := albatest.NewCluster(5, 5)
	ps := albatest.Preset(alba.Policy{K: 3, M: 2, C: 4, X: 1})
	ended := make(chan error, 1)
	p := c.Proxy(t, ps, func(o *proxy.Options) {
		o.MemoryBytes = 2 * 5 * alba.MinFragmentBytes // two chunks
		o.Dial = func(ctx context.Context, d alba.Device) (asd.Client, error) {
			client, err := c.Dial(ctx, d)
			if err == nil && strings.HasSuffix(d.ID, c.Disks[0].ID) {
				client = hanging{client, ended}
			}
			return client, err
		}
	})
	proxy.SetWriteTimeout(p, 24*time.Hour) // nothing but the grace ends it
	must(t, p.CreateNamespace(t.Context(), ns))
	b := albatest.Pattern(1, 3*alba.MinFragmentBytes*12)
	stored := make(chan error, 1)
	go func() { stored <- p.Put(t.Context(), ns, "o", 1, bytes.NewReader(b), int64(len(b))) }()
	if err := albatest.Await(t, ended, "the put that hangs is given up"); !errors.Is(err, context.Canceled) {
		t.Errorf("it was given up for %v", err)
	}
	must(t, albatest.Await(t, stored, "the object is stored"))
	expect(t, p, "o", b)
}
