package host

import (
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"scoria/driver/block"
	"scoria/driver/control"
	"scoria/driver/limit"
	"scoria/vhost/client"
	"scoria/vhost/client/load"
)

func ptr[T any](v T) *T { return &v }

// inForce is what the open device is held to.
func (b *bench) inForce(t *testing.T, name, setting string) string {
	t.Helper()
	l := b.limits(name)
	if l == nil {
		t.Fatalf("volume %s is not open", name)
	}
	v, _ := l.Settings().Value(setting)
	return v
}

// TestLimitsChangeLiveAndLast: a change holds at once for an open volume, for
// those of a pool that set none themselves, and after a restart.
func TestLimitsChangeLiveAndLast(t *testing.T) {
	b := newBench(t)
	ctx := testContext(t)
	for _, name := range []string{"a", "b"} {
		b.mustCreate(t, name)
		if _, err := b.Open(ctx, name); err != nil {
			t.Fatal(err)
		}
	}
	l, err := b.api.ChangeLimits(ctx, "a", control.ChangeLimits{Set: limit.Settings{WriteIOPS: ptr(uint64(100))}})
	if err != nil || *l.InForce.WriteIOPS != 100 || l.Stats == nil || l.Name != "default/a" {
		t.Fatalf("%+v, %v", l, err)
	}
	p, err := b.api.ChangePoolLimits(ctx, "default", control.ChangeLimits{Set: limit.Settings{WriteIOPS: ptr(uint64(7)), ReadBPS: ptr(uint64(1 << 20))}})
	if err != nil || *p.Own.WriteIOPS != 7 {
		t.Fatalf("%+v, %v", p, err)
	}
	check := func(b *bench) {
		t.Helper()
		for _, tt := range []struct{ name, setting, want string }{
			{"default/a", "write_iops", "100"}, {"default/a", "read_bps", "1048576"},
			{"default/b", "write_iops", "7"}, {"default/b", "read_bps", "1048576"}, {"default/b", "read_iops", ""},
		} {
			if got := b.inForce(t, tt.name, tt.setting); got != tt.want {
				t.Errorf("%s: %s is %q; want %q", tt.name, tt.setting, got, tt.want)
			}
		}
	}
	check(b)
	engine := newFakeEngine()
	for id := range b.engine.made {
		engine.made[id] = true
	}
	next := attach(t, b.reg, engine, "node-1")
	for _, name := range []string{"a", "b"} {
		if _, err := next.Open(ctx, name); err != nil {
			t.Fatal(err)
		}
	}
	check(next)
	if l, err = next.api.ChangeLimits(ctx, "a", control.ChangeLimits{Clear: true, Set: limit.Settings{ReadBPS: ptr(uint64(0))}}); err != nil {
		t.Fatal(err)
	}
	if w, r := next.inForce(t, "default/a", "write_iops"), next.inForce(t, "default/a", "read_bps"); w != "7" || r != "0" {
		t.Fatalf("after clearing: write_iops %q, read_bps %q", w, r)
	}
	for what, err := range map[string]error{
		"bad value":  second(next.api.ChangeLimits(ctx, "a", control.ChangeLimits{Set: limit.Settings{ReadBPS: ptr(uint64(5))}})),
		"bad burst":  second(next.api.ChangePoolLimits(ctx, "default", control.ChangeLimits{Set: limit.Settings{Burst: ptr(-1.0)}})),
		"no setting": second(next.api.ChangeLimits(ctx, "a", control.ChangeLimits{Unset: []string{"x"}})),
	} {
		if control.CodeOf(err) != control.CodeInvalid {
			t.Errorf("%s: %v", what, err)
		}
	}
	for what, err := range map[string]error{
		"volume": second(next.api.Limits(ctx, "none")), "pool": second(next.api.PoolLimits(ctx, "none")),
		"change of volume": second(next.api.ChangeLimits(ctx, "none", control.ChangeLimits{})),
		"change of pool":   second(next.api.ChangePoolLimits(ctx, "none", control.ChangeLimits{})),
	} {
		if control.CodeOf(err) != control.CodeNotFound {
			t.Errorf("%s: %v", what, err)
		}
	}
}

func second[T any](_ T, err error) error { return err }

// TestP11LimitedShows: a volume that is held up by its limits says so, and which.
func TestP11LimitedShows(t *testing.T) {
	b := newBench(t)
	ctx := testContext(t)
	b.mustCreate(t, "v")
	dev, err := b.Open(ctx, "v")
	if err != nil {
		t.Fatal(err)
	}
	set := func(n uint64) {
		t.Helper()
		_, err := b.api.ChangeLimits(ctx, "v", control.ChangeLimits{Set: limit.Settings{ReadIOPS: ptr(n), BurstRequests: ptr(uint64(1))}})
		if err != nil {
			t.Fatal(err)
		}
	}
	set(1)
	ended := make(chan error, 2)
	var batch []*block.Request
	for range 2 {
		batch = append(batch, &block.Request{
			Op: block.OpRead, Length: 4096, Segments: [][]byte{make([]byte, 4096)}, Owner: b,
			Complete: func(r *block.Request) { ended <- r.Err },
		})
	}
	dev.Submit(batch)
	if !batch[0].Ended || batch[1].Ended {
		t.Fatalf("ended at once: %v, %v; want the first alone", batch[0].Ended, batch[1].Ended)
	}
	v, err := b.api.Volume(ctx, "default/v")
	if err != nil || !strings.Contains(v.Conditions[len(v.Conditions)-1].Message, "read_iops of 1") || v.Conditions[len(v.Conditions)-1].Code != "limited" {
		t.Fatalf("%+v, %v", v.Conditions, err)
	}
	if st, err := b.api.Stats(ctx, "default/v"); err != nil || st.Counters["reads_delayed"] != 1 || st.Counters["delayed_now"] != 1 {
		t.Fatalf("%+v, %v", st.Counters, err)
	}
	w := httptest.NewRecorder()
	metricsHandler(newCollector(b.VolumeSet, "1", "i"), newLimitCollector(b.VolumeSet)).ServeHTTP(w, httptest.NewRequest("GET", "/metrics", nil))
	for _, want := range []string{
		`scoria_volume_condition{code="limited",volume="default/v"} 1`,
		`scoria_volume_limit{limit="read_iops",volume="default/v"} 1`,
		`scoria_volume_delayed_requests_total{op="read",volume="default/v"} 1`,
		`scoria_volume_delayed_requests{volume="default/v"} 1`,
	} {
		if !strings.Contains(w.Body.String(), want) {
			t.Errorf("metrics lack %s", want)
		}
	}
	block.Hasten(dev, b)
	if err := <-ended; err != nil {
		t.Fatal(err)
	}
}

// TestSetVolume: serial and access mode change while nobody uses the volume.
func TestSetVolume(t *testing.T) {
	b := newBench(t)
	ctx := testContext(t)
	made := b.mustCreate(t, "v")
	dev, err := b.Open(ctx, "v")
	if err != nil {
		t.Fatal(err)
	}
	release, err := dev.Claim(block.Claimant{Kind: "vhost", ID: "7"})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := b.api.SetVolume(ctx, "default/v", control.SetVolume{Serial: ptr("S2")}); control.CodeOf(err) != control.CodeInUse {
		t.Fatalf("in use: %v", err)
	}
	release()
	v, err := b.api.SetVolume(ctx, "v", control.SetVolume{Serial: ptr("S2"), ReadOnly: ptr(true)})
	if err != nil || v.Serial != "S2" || !v.ReadOnly || v.Open || !b.front.has("default/v") {
		t.Fatalf("%+v, %v", v, err)
	}
	if _, err := b.Open(ctx, "v"); err != nil {
		t.Fatal(err)
	}
	if c := b.engine.configs[made.ID]; c.Serial != "S2" || !c.ReadOnly {
		t.Fatalf("opened again with %+v", c)
	}
	if v, err = b.api.SetVolume(ctx, "v", control.SetVolume{ReadOnly: ptr(false)}); err != nil || v.Serial != "S2" || v.ReadOnly {
		t.Fatalf("%+v, %v", v, err)
	}
	for what, serial := range map[string]string{"empty": "", "long": strings.Repeat("s", 21), "odd": "a b"} {
		if _, err := b.api.SetVolume(ctx, "v", control.SetVolume{Serial: &serial}); control.CodeOf(err) != control.CodeInvalid {
			t.Errorf("%s serial: %v", what, err)
		}
	}
}

// TestLimitsHoldForAGuest: through a vhost socket no more passes than a limit
// allows, and a client that goes away does not wait for what is held back.
func TestLimitsHoldForAGuest(t *testing.T) {
	h, api := startHost(t, testConfig(t))
	defer stopHost(t, h)
	ctx := testContext(t)
	v, err := api.CreateVolume(ctx, control.CreateVolume{Name: "default/v", Size: 64 << 20})
	if err != nil {
		t.Fatal(err)
	}
	const rate, ops = 40, 61
	_, err = api.ChangeLimits(ctx, "default/v", control.ChangeLimits{Set: limit.Settings{TotalIOPS: ptr(uint64(rate)), BurstRequests: ptr(uint64(1))}})
	if err != nil {
		t.Fatal(err)
	}
	c, err := client.Connect(v.Socket, client.Options{MemoryBytes: 1 << 20})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	began := time.Now()
	if _, err := load.Run(ctx, c, load.Spec{Random: true, Depth: 8, ReadPercent: 50, MaxOps: ops, Duration: time.Minute}); err != nil {
		t.Fatal(err)
	}
	// The first passes at once, the others 1/rate apart.
	if took, least := time.Since(began), time.Duration(ops-1)*time.Second/rate; took < least {
		t.Fatalf("%d requests took %v; at %d per second they take at least %v", ops, took, rate, least)
	}
	if st, err := api.Stats(ctx, "default/v"); err != nil || st.Counters["reads_delayed"]+st.Counters["writes_delayed"] < ops/2 {
		t.Fatalf("%v, %v", st.Counters, err)
	}
	// A minute for each request: whoever waits for them would be seen to.
	if _, err := api.ChangeLimits(ctx, "default/v", control.ChangeLimits{Set: limit.Settings{TotalBPS: ptr(uint64(limit.MinBPS)), BurstBytes: ptr(uint64(1))}}); err != nil {
		t.Fatal(err)
	}
	for range 2 { // the first passes, and takes the bucket's next minute
		c.Queue(0).Write(0, c.Buffer(0, 256<<10), 1)
	}
	c.Queue(0).Kick()
	await(t, "a request that waits", func() bool {
		l, err := api.Limits(ctx, "default/v")
		return err == nil && l.Stats.Waiting > 0
	})
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	await(t, "the session's end", func() bool {
		v, err := api.Volume(ctx, "default/v")
		return err == nil && v.UsedBy == ""
	})
}

// TestSnapshotReadersShareTheLimits: what is read from a volume's snapshots takes from
// the volume's limits, and can be canceled while it waits for them.
func TestSnapshotReadersShareTheLimits(t *testing.T) {
	b := newBench(t)
	ctx := testContext(t)
	b.mustCreate(t, "v")
	b.mustSnap(t, "v", "s")
	if _, err := b.api.ChangeLimits(ctx, "v", control.ChangeLimits{Set: limit.Settings{ReadIOPS: ptr(uint64(1)), BurstRequests: ptr(uint64(1))}}); err != nil {
		t.Fatal(err)
	}
	dev, err := snapshotOpener{b.VolumeSet}.Open(ctx, "v@s")
	if err != nil {
		t.Fatal(err)
	}
	const n = 20 // as many seconds
	ended := make(chan *block.Request, n)
	batch := make([]*block.Request, n)
	for i := range batch {
		batch[i] = &block.Request{Op: block.OpRead, Owner: t, Complete: func(r *block.Request) { ended <- r }}
	}
	dev.Submit(batch)
	if st := b.limits("default/v").Stats(); !batch[0].Ended || st.ReadsDelayed != n-1 {
		t.Fatalf("the first ended: %v, %+v", batch[0].Ended, st)
	}
	dev.Cancel(t)
	for range n - 1 {
		select {
		case <-ended:
		case <-ctx.Done():
			t.Fatal("a request does not end")
		}
	}
	block.Release(dev)
}
