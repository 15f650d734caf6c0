package host

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/rs/zerolog"

	"scoria/driver/control"
)

// eventually waits for a condition.
func eventually(t *testing.T, what string, cond func() bool) {
	t.Helper()
	for end := time.Now().Add(patience); !cond(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%s: not in time", what)
		}
	}
}

// TestP3AwaitedVolumesOpenBeforeTheyAreServed: a guest on its way back finds a
// socket only when the volume behind it is open; while that fails it is tried
// again, and shown.
func TestP3AwaitedVolumesOpenBeforeTheyAreServed(t *testing.T) {
	b := newBench(t)
	ctx := testContext(t)
	for _, name := range []string{"slow", "broken", "idle"} {
		if err := b.Create(ctx, name, 1<<20); err != nil {
			t.Fatal(err)
		}
	}
	goOn := make(chan struct{})
	b.engine.mu.Lock()
	b.engine.hold["open"], b.engine.fail["open"] = goOn, errors.New("disk is away")
	b.engine.mu.Unlock()

	h := NewVolumeSet(b.reg, b.engine, noStore{}, "node-1", b.socketPath, zerolog.Nop())
	api := &backend{VolumeSet: h, config: DefaultConfig(), schedules: newScheduler(h, b.snaps, zerolog.Nop())}
	awaited := []string{"default/broken", "default/gone", "default/slow"}
	h.await(awaited)
	front := &fakeFront{served: map[string]bool{}}
	if err := h.Serve(ctx, front); err != nil {
		t.Fatal(err)
	}
	opening, cancel := context.WithCancel(ctx)
	tried, ended := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(ended)
		h.openAwaited(opening, awaited, func() { close(tried) })
	}()
	if !front.has("default/idle") || front.has("default/slow") {
		t.Fatalf("served: %v", front.served)
	}
	show := func(name, code string) bool {
		v, err := api.Volume(ctx, name)
		return err == nil && len(v.Conditions) == 1 && v.Conditions[0].Code == code
	}
	if !show("slow", "opening") {
		t.Fatal("the opening does not show")
	}
	close(goOn)
	<-tried
	if front.has("default/slow") || !show("slow", "opening") {
		t.Fatal("a volume that did not open is served, or does not show why not")
	}
	b.engine.mu.Lock()
	b.engine.fail["open"] = nil
	b.engine.mu.Unlock()
	eventually(t, "both volumes to be served", func() bool { return front.has("default/slow") && front.has("default/broken") })
	<-ended
	cancel()
	if v, err := api.Volume(ctx, "slow"); err != nil || show("slow", "opening") || !v.Open {
		t.Fatalf("%+v, %v", v, err)
	}
	// Closing ends attempts that never succeed.
	again := NewVolumeSet(b.reg, newFakeEngine(), noStore{}, "node-1", b.socketPath, zerolog.Nop())
	again.await([]string{"default/slow"})
	opening, cancel = context.WithCancel(ctx)
	ended = make(chan struct{})
	go func() {
		defer close(ended)
		again.openAwaited(opening, []string{"default/slow"}, cancel)
	}()
	<-ended
}

// TestStopRightAfterStartIsQuiet: a daemon that is stopped while it still opens
// its volumes has nothing to complain of.
func TestStopRightAfterStartIsQuiet(t *testing.T) {
	c := testConfig(t)
	h, client := startHost(t, c)
	ctx := testContext(t)
	const volumes = 20
	for i := range volumes {
		if _, err := client.CreateVolume(ctx, control.CreateVolume{Name: fmt.Sprint("v", i), Size: 64 << 20}); err != nil {
			t.Fatal(err)
		}
		write(t, h, fmt.Sprint("v", i), 'x') // attached: the next start opens it
	}
	stopHost(t, h)
	for i := range 8 {
		var log lockedBuffer
		h, err := Start(ctx, c, "test", zerolog.New(&log).Level(zerolog.WarnLevel))
		if err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Duration(i) * time.Millisecond)
		stopHost(t, h)
		for line := range strings.Lines(log.String()) {
			// A stop waits copyAtStop for the last copies, which a busy machine may exceed.
			if !strings.Contains(line, "copies of the volumes' records are behind") {
				t.Fatalf("the log says:\n%s", line)
			}
		}
	}
	if _, err := os.Stat(c.controlSocket()); err == nil {
		t.Fatal("the control socket is left")
	}
}

// lockedBuffer is a log that several goroutines write.
type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return strings.TrimSpace(l.b.String())
}
