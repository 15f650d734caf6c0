package host

import (
	"context"
	"errors"
	"strings"
	"sync"
	"testing"

	"github.com/rs/zerolog"

	"scoria/driver/control"
	"scoria/driver/registry"
)

// awayRegistry is a registry that fails or does not answer while it is told to.
type awayRegistry struct {
	Registry
	mu    sync.Mutex
	how   string        // "fails", "hangs"; empty: it works
	back  chan struct{} // closed when it works again
	asked int           // what did not get an answer
}

var errRegistryAway = errors.New("the registry is away")

func (r *awayRegistry) set(how string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.back != nil {
		close(r.back)
	}
	r.how, r.back, r.asked = how, make(chan struct{}), 0
}

func (r *awayRegistry) missed() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.asked
}

func (r *awayRegistry) ask(ctx context.Context) error {
	r.mu.Lock()
	how, back := r.how, r.back
	if how != "" {
		r.asked++
	}
	r.mu.Unlock()
	switch how {
	case "fails":
		return errRegistryAway
	case "hangs":
		select {
		case <-back:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return nil
}

func (r *awayRegistry) Get(ctx context.Context, key string) (kv registry.KV, ok bool, err error) {
	if err := r.ask(ctx); err != nil {
		return kv, false, err
	}
	return r.Registry.Get(ctx, key)
}

func (r *awayRegistry) List(ctx context.Context, prefix string) ([]registry.KV, error) {
	if err := r.ask(ctx); err != nil {
		return nil, err
	}
	return r.Registry.List(ctx, prefix)
}

func (r *awayRegistry) Commit(ctx context.Context, compares []registry.Compare, writes []registry.Write) (int64, error) {
	if err := r.ask(ctx); err != nil {
		return 0, err
	}
	return r.Registry.Commit(ctx, compares, writes)
}

// TestP8RegistryDoesNotAnswer: guests of volumes in the object store write, flush and
// read on while the registry fails or hangs; what can't be uploaded meanwhile shows;
// and when the registry is back all of it goes on by itself. A daemon that is stopped
// meanwhile stops, and the next one has everything.
func TestP8RegistryDoesNotAnswer(t *testing.T) {
	for _, how := range []string{"fails", "hangs"} {
		for _, stop := range []bool{false, true} {
			t.Run(how+map[bool]string{true: "/stopped meanwhile"}[stop], func(t *testing.T) { registryAway(t, how, stop) })
		}
	}
}

func registryAway(t *testing.T, how string, stop bool) {
	const pages = 96 // of 64 KiB: several SCOs
	c := testConfig(t)
	away := &awayRegistry{}
	parts := Parts{OpenRegistry: func(file string) (Registry, error) {
		r, err := registry.Open(file)
		away.Registry = r
		return away, err
	}}
	start := func() (*Host, *control.Client) {
		h, err := StartOn(testContext(t), parts, c, "test", zerolog.Nop())
		if err != nil {
			t.Fatal(err)
		}
		client := control.NewClient(c.controlSocket())
		t.Cleanup(client.Close)
		return h, client
	}
	h, client := start()
	if v, err := client.CreateVolume(testContext(t), control.CreateVolume{Name: "default/v", Size: 64 << 20, SCOSize: 1 << 20}); err != nil || v.Preset == "" {
		t.Fatalf("%+v, %v: not in the object store?", v, err)
	}
	fillVolume(t, h, "default/v", pages, 1)
	backlog := func() uint64 {
		return h.volumes.device("default/v").Stats().UploadBacklog
	}
	await(t, "the first uploads", func() bool { return backlog() == 0 })
	away.set(how)
	fillVolume(t, h, "default/v", pages, 2)
	verifyVolume(t, h, "default/v", pages, 2)
	await(t, "the registry to be asked", func() bool { return away.missed() > 0 })
	if backlog() == 0 {
		t.Fatal("uploaded without a registry")
	}
	if how == "fails" {
		await(t, "the trouble to show", func() bool {
			for _, c := range h.volumes.device("default/v").Stats().Conditions {
				if c.Code == "store-unreachable" && strings.Contains(c.Message, errRegistryAway.Error()) {
					return true
				}
			}
			return false
		})
	}
	fillVolume(t, h, "default/v", pages, 3)
	if stop {
		// What the stop itself could not record is said; it ends all the same.
		if err := h.Stop(nil); err != nil {
			t.Logf("stop: %v", err)
		}
		away.set("")
		h, _ = start()
	} else {
		away.set("")
	}
	verifyVolume(t, h, "default/v", pages, 3)
	await(t, "the uploads to go on", func() bool { return backlog() == 0 })
	verifyVolume(t, h, "default/v", pages, 3)
	stopHost(t, h)
}
