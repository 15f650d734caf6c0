package host

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"scoria/driver/block"
	"scoria/driver/control"
	"scoria/driver/registry"
)

// await waits for a condition that another goroutine brings about.
func await(t *testing.T, what string, cond func() bool) {
	t.Helper()
	for deadline := time.Now().Add(patience); !cond(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			buf := make([]byte, 1<<20)
			t.Fatalf("%s did not happen within %v\n%s", what, patience, buf[:runtime.Stack(buf, true)])
		}
	}
}

func (b *bench) mustCreate(t *testing.T, name string) control.Volume {
	t.Helper()
	v, err := b.api.CreateVolume(testContext(t), control.CreateVolume{Name: name, Size: 1 << 30})
	if err != nil {
		t.Fatal(err)
	}
	return v
}

func TestVolumeLife(t *testing.T) {
	b := newBench(t)
	ctx := testContext(t)
	v := b.mustCreate(t, "vm1")
	if v.Name != "default/vm1" || v.State != "ready" || v.Epoch != 1 || v.Owner != "node-1" || len(v.Serial) != 20 || v.BlockSize != 512 || v.SCOSize != 64<<20 || v.Open {
		t.Fatalf("created %+v", v)
	}
	if !b.front.has("default/vm1") {
		t.Fatal("the new volume is not served")
	}
	dev, err := b.Open(ctx, "vm1")
	if err != nil || dev.Info().Size != 1<<30 {
		t.Fatalf("Open: %v", err)
	}
	if again, err := b.Open(ctx, "default/vm1"); err != nil || again != dev {
		t.Fatalf("second Open: %v, %v", again, err)
	}
	if v, err = b.api.ResizeVolume(ctx, "default/vm1", 2<<30, false); err != nil || v.Size != 2<<30 || dev.Info().Size != 2<<30 {
		t.Fatalf("resize: %+v, %v; the device has %d", v, err, dev.Info().Size)
	}
	if st, err := b.api.Stats(ctx, "default/vm1"); err != nil || st.Counters["sync_count"] != 7 || st.Ops["write"].Bytes != 12288 || st.Space != (control.Space{Live: 8192, Snapshots: 4096, Garbage: 3, Overhead: 4, Inherited: 5, Local: 6, Store: 7}) || st.Conditions[0].Code != "throttled" {
		t.Fatalf("stats: %+v, %v", st, err)
	}
	if names := b.attached(); !slices.Equal(names, []string{"default/vm1"}) {
		t.Fatalf("attached %v", names)
	}
	if err := b.api.DeleteVolume(ctx, "default/vm1", false, nil); err != nil {
		t.Fatal(err)
	}
	if b.front.has("default/vm1") || len(b.engine.made) != 0 || len(b.attached()) != 0 {
		t.Fatal("the deleted volume is still there")
	}
	if _, err := b.Open(ctx, "vm1"); !errors.Is(err, block.ErrNotFound) {
		t.Fatalf("Open after the deletion: %v; want block.ErrNotFound", err)
	}
	want := []string{"create default/vm1", "open default/vm1", "resize default/vm1", "close default/vm1", "delete default/vm1"}
	if got := b.engine.log(); !slices.Equal(got, want) {
		t.Fatalf("the engine saw %q; want %q", got, want)
	}
	if second := b.mustCreate(t, "vm1"); second.ID == v.ID {
		t.Fatal("a new volume has the old one's ID")
	}
}

func TestDeleteInUseIsRefused(t *testing.T) {
	b := newBench(t)
	ctx := testContext(t)
	b.mustCreate(t, "vm1")
	dev, err := b.Open(ctx, "vm1")
	if err != nil {
		t.Fatal(err)
	}
	release, err := dev.Claim(block.Claimant{Kind: "vhost", ID: "7"})
	if err != nil {
		t.Fatal(err)
	}
	for _, err := range []error{b.api.CheckDelete(ctx, "default/vm1", false), b.api.DeleteVolume(ctx, "default/vm1", false, nil)} {
		if control.CodeOf(err) != control.CodeInUse || !strings.Contains(err.Error(), "vhost 7") {
			t.Fatalf("delete of a claimed volume: %v", err)
		}
	}
	release()
	b.front.users = []string{"nbd pid 9"}
	if err := b.api.DeleteVolume(ctx, "default/vm1", false, nil); control.CodeOf(err) != control.CodeInUse || !strings.Contains(err.Error(), "nbd pid 9") {
		t.Fatalf("delete of a volume with a reader: %v", err)
	}
	b.front.users = nil
	if err := b.api.DeleteVolume(ctx, "default/vm1", false, nil); err != nil {
		t.Fatal(err)
	}
}

// TestDeleteWaitsForAUserOnItsWayOut: that a client has gone its front end learns
// a moment later.
func TestDeleteWaitsForAUserOnItsWayOut(t *testing.T) {
	b := newBench(t)
	b.mustCreate(t, "vm1")
	b.front.mu.Lock()
	b.front.users = []string{"nbd pid 9"}
	b.front.mu.Unlock()
	asked := b.front.asked.Load()
	go func() {
		for b.front.asked.Load() < asked+3 {
			time.Sleep(time.Millisecond)
		}
		b.front.mu.Lock()
		b.front.users = nil
		b.front.mu.Unlock()
	}()
	if err := b.api.DeleteVolume(testContext(t), "default/vm1", false, nil); err != nil {
		t.Fatal(err)
	}
}

func TestRefusals(t *testing.T) {
	b := newBench(t)
	ctx := testContext(t)
	b.mustCreate(t, "there")
	create := func(r control.CreateVolume) error { _, err := b.api.CreateVolume(ctx, r); return err }
	resize := func(size uint64) error { _, err := b.api.ResizeVolume(ctx, "default/there", size, false); return err }
	for _, tt := range []struct {
		name string
		err  error
		code control.Code
		text string
	}{
		{"exists", create(control.CreateVolume{Name: "there", Size: 4096}), control.CodeExists, "exists already"},
		{"name", create(control.CreateVolume{Name: "No", Size: 4096}), control.CodeInvalid, "must be 1 to 63"},
		{"pool", create(control.CreateVolume{Name: "fast/v", Size: 4096}), control.CodeNotFound, "scoria pool create fast"},
		{"size 0", create(control.CreateVolume{Name: "v"}), control.CodeInvalid, "positive multiple of 4096"},
		{"odd size", create(control.CreateVolume{Name: "v", Size: 1000}), control.CodeInvalid, "multiple of 4096"},
		{"huge", create(control.CreateVolume{Name: "v", Size: 1 << 50}), control.CodeInvalid, "64T"},
		{"block", create(control.CreateVolume{Name: "v", Size: 4096, BlockSize: 1024}), control.CodeInvalid, "512 or 4096"},
		{"sco", create(control.CreateVolume{Name: "v", Size: 4096, SCOSize: 5}), control.CodeInvalid, "1 MiB"},
		{"serial", create(control.CreateVolume{Name: "v", Size: 4096, Serial: strings.Repeat("s", 21)}), control.CodeInvalid, "at most 20"},
		{"odd serial", create(control.CreateVolume{Name: "v", Size: 4096, Serial: "a\nb"}), control.CodeInvalid, "printable"},
		{"long", create(control.CreateVolume{Name: strings.Repeat("v", 63), Size: 4096, Serial: "ok"}), "", ""},
		{"shrink", resize(4096), control.CodeNeedsForce, "would be lost"},
		{"odd resize", resize(1<<30 + 5), control.CodeInvalid, "multiple of 4096"},
		{"pool in use", b.api.DeletePool(ctx, "default"), control.CodeInUse, "2 volumes"},
	} {
		if tt.code == "" {
			if tt.err != nil {
				t.Errorf("%s: %v", tt.name, tt.err)
			}
			continue
		}
		if tt.err == nil || control.CodeOf(tt.err) != tt.code || !strings.Contains(tt.err.Error(), tt.text) {
			t.Errorf("%s: %v (%s); want %s %q", tt.name, tt.err, control.CodeOf(tt.err), tt.code, tt.text)
		}
	}
	for _, name := range []string{"nosuch", "default/nosuch", "a/b/c", "v@snap", "../x", ""} {
		if _, err := b.Open(ctx, name); !errors.Is(err, block.ErrNotFound) || control.CodeOf(err) != control.CodeNotFound {
			t.Errorf("Open(%q): %v; want not found", name, err)
		}
	}
	if n := len(b.volumes); n > 2 {
		t.Errorf("%d entries remembered; names that nobody has must not pile up", n)
	}
}

func TestSocketPathTooLong(t *testing.T) {
	b := newBench(t)
	b.socketPath = func(pool, name string) string { return strings.Repeat("r", 60) + pool + name }
	_, err := b.api.CreateVolume(testContext(t), control.CreateVolume{Name: strings.Repeat("v", 63), Size: 4096})
	if control.CodeOf(err) != control.CodeInvalid || !strings.Contains(err.Error(), "shorten the name") {
		t.Fatalf("CreateVolume: %v", err)
	}
}

// TestP3UnfinishedVolumesAreFinished: a daemon that dies between the steps of a
// creation or deletion leaves a record; the next one finishes it.
func TestP3UnfinishedVolumesAreFinished(t *testing.T) {
	b := newBench(t)
	ctx := testContext(t)
	died := errors.New("injected: the daemon dies here")
	b.mustCreate(t, "going")
	b.engine.fail["delete"] = died
	if err := b.api.DeleteVolume(ctx, "default/going", false, nil); !errors.Is(err, died) {
		t.Fatal(err)
	}
	// A creation that dies in the engine, as the record alone tells.
	r := newRecord(control.CreateVolume{Size: 4096}, "default", "coming", &registry.Pool{BlockSize: 512, SCOSize: 1 << 20}, "node-1")
	if _, err := registry.Create(ctx, b.reg, registry.VolumeKey("default", "coming"), r); err != nil {
		t.Fatal(err)
	}
	if names, err := b.Names(ctx); err != nil || len(names) != 0 {
		t.Fatalf("unfinished volumes are listed: %v, %v", names, err)
	}
	if _, err := b.Open(ctx, "coming"); err == nil || errors.Is(err, block.ErrNotFound) {
		t.Fatalf("Open of an unfinished volume: %v", err)
	}
	b.engine.fail = map[string]error{}
	next := attach(t, b.reg, b.engine, "node-1")
	if names, err := next.Names(ctx); err != nil || !slices.Equal(names, []string{"default/coming"}) {
		t.Fatalf("after the restart: %v, %v", names, err)
	}
	if !next.front.has("default/coming") || next.front.has("default/going") {
		t.Fatal("the wrong volumes are served")
	}
}

// TestFailedCreationLeavesNothing: an error is no half volume.
func TestFailedCreationLeavesNothing(t *testing.T) {
	b := newBench(t)
	ctx := testContext(t)
	b.engine.fail["create"] = errors.New("injected: disk full")
	if err := b.Create(ctx, "v", 4096); err == nil || !strings.Contains(err.Error(), "disk full") {
		t.Fatalf("Create: %v", err)
	}
	if kvs, err := b.reg.List(ctx, registry.VolumePrefix); err != nil || len(kvs) != 0 {
		t.Fatalf("left %v, %v", kvs, err)
	}
	delete(b.engine.fail, "create")
	b.mustCreate(t, "v")
}

// TestP4EpochGrowsWithTheOwner: the same node keeps its epoch, another gets the next.
func TestP4EpochGrowsWithTheOwner(t *testing.T) {
	b := newBench(t)
	ctx := testContext(t)
	v := b.mustCreate(t, "v")
	for i, tt := range []struct {
		node  string
		epoch uint64
	}{{"node-1", 1}, {"node-1", 1}, {"node-2", 2}, {"node-2", 2}, {"node-1", 3}} {
		engine := newFakeEngine()
		engine.made[v.ID] = true
		next := attach(t, b.reg, engine, tt.node)
		if _, err := next.Open(ctx, "v"); err != nil {
			t.Fatal(err)
		}
		if got := engine.configs[v.ID].Epoch; got != tt.epoch {
			t.Fatalf("step %d: %s opens with epoch %d; want %d", i, tt.node, got, tt.epoch)
		}
	}
}

// TestManyOpenAtOnce: one opening serves all who ask, and one who gives up does
// not end it.
func TestManyOpenAtOnce(t *testing.T) {
	b := newBench(t)
	v := b.mustCreate(t, "v")
	hold := make(chan struct{})
	b.engine.hold["open"] = hold
	impatient, cancel := context.WithCancel(t.Context())
	gaveUp := make(chan error, 1)
	go func() { _, err := b.Open(impatient, "v"); gaveUp <- err }()
	await(t, "the opening", func() bool { return slices.Contains(b.engine.log(), "open default/v") })
	cancel()
	if err := <-gaveUp; !errors.Is(err, context.Canceled) {
		t.Fatalf("the impatient: %v", err)
	}
	ctx := testContext(t)
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			if _, err := b.Open(ctx, "v"); err != nil {
				t.Errorf("Open: %v", err)
			}
		})
	}
	close(hold)
	wg.Wait()
	if n := b.engine.opened[v.ID]; n != 1 {
		t.Fatalf("opened %d times", n)
	}
}

// TestGuestDoesNotWaitForAnOfflineCheck: an opening ends the offline check, which
// goes on online.
func TestGuestDoesNotWaitForAnOfflineCheck(t *testing.T) {
	b := newBench(t)
	ctx := testContext(t)
	b.mustCreate(t, "v")
	b.engine.hold["check"] = make(chan struct{}) // never ends by itself
	type result struct {
		r   control.CheckReport
		err error
	}
	done := make(chan result, 1)
	go func() {
		r, err := b.api.CheckVolume(ctx, "default/v", func(int64, int64) {})
		done <- result{r, err}
	}()
	await(t, "the offline check", func() bool { return slices.Contains(b.engine.log(), "check default/v") })
	if _, err := b.Open(ctx, "v"); err != nil {
		t.Fatal(err)
	}
	if r := <-done; r.err != nil || r.r.SCOs != 2 {
		t.Fatalf("check: %+v; want the online one's report", r)
	}
}

// TestP11TroublesShow: what keeps a volume from being served is in its conditions.
func TestP11TroublesShow(t *testing.T) {
	b := newBench(t)
	ctx := testContext(t)
	b.front.fail = errors.New("injected: no socket")
	v := b.mustCreate(t, "v")
	if v.LastDisconnect != "ring 0 loops" {
		t.Fatalf("last disconnect %q", v.LastDisconnect)
	}
	if len(v.Conditions) != 1 || v.Conditions[0].Code != "not-served" || !strings.Contains(v.Conditions[0].Message, "no socket") {
		t.Fatalf("conditions %+v", v.Conditions)
	}
	b.engine.fail["open"] = fmt.Errorf("injected: %w", block.ErrCorrupt)
	if _, err := b.Open(ctx, "v"); err == nil {
		t.Fatal("Open succeeded")
	}
	v, err := b.api.Volume(ctx, "default/v")
	if err != nil || len(v.Conditions) != 2 || v.Conditions[1].Code != "open-failed" {
		t.Fatalf("conditions %+v, %v", v.Conditions, err)
	}
	delete(b.engine.fail, "open")
	if _, err := b.Open(ctx, "v"); err != nil {
		t.Fatalf("the next opening: %v", err)
	}
	if v, err = b.api.Volume(ctx, "default/v"); err != nil || !v.Open || v.Conditions[0].Code != "throttled" {
		t.Fatalf("volume %+v, %v", v, err)
	}
}

func TestCloseRefusesNewOpenings(t *testing.T) {
	b := newBench(t)
	ctx := testContext(t)
	b.mustCreate(t, "v")
	if err := b.Close(ctx); err != nil {
		t.Fatal(err)
	}
	if _, err := b.Open(ctx, "v"); control.CodeOf(err) != control.CodeUnavailable {
		t.Fatalf("Open: %v", err)
	}
}
