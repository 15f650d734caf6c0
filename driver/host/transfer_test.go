package host

import (
	"bytes"
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"scoria/driver/block"
	"scoria/driver/control"
	"scoria/driver/stream"
)

// testImage is what a volume of a test should hold.
type testImage []byte

// put writes random data over the middle part of an image and a volume, and
// discards another.
func (m testImage) put(t *testing.T, h *Host, name string, seed uint64) {
	t.Helper()
	rng := rand.New(rand.NewPCG(seed, 1))
	for range 20 {
		off := rng.Uint64N(uint64(len(m)/4096)) * 4096
		n := min(4096*(1+rng.Uint64N(64)), uint64(len(m))-off)
		part := m[off : off+n]
		if rng.IntN(4) == 0 {
			clear(part)
			do(t, h, name, &block.Request{Op: block.OpDiscard, Offset: off, Length: n})
			continue
		}
		for i := range part {
			part[i] = byte(rng.Uint32())
		}
		do(t, h, name, &block.Request{Op: block.OpWrite, Offset: off, Length: n, Segments: [][]byte{bytes.Clone(part)}})
	}
}

func do(t *testing.T, h *Host, name string, r *block.Request) {
	t.Helper()
	dev, err := snapshotOpener{h.volumes}.Open(testContext(t), name)
	if err != nil {
		t.Fatal(err)
	}
	defer block.Release(dev)
	done := make(chan struct{})
	r.Complete = func(*block.Request) { close(done) }
	dev.Submit([]*block.Request{r})
	if !r.Ended {
		<-done
	}
	if r.Err != nil {
		t.Fatal(r.Err)
	}
}

// same compares a volume or snapshot with an image.
func (m testImage) same(t *testing.T, h *Host, name string) {
	t.Helper()
	dev, err := snapshotOpener{h.volumes}.Open(testContext(t), name)
	if err != nil {
		t.Fatal(err)
	}
	size := dev.Info().Size
	block.Release(dev)
	if size != uint64(len(m)) {
		t.Fatalf("%s has %d bytes, want %d", name, size, len(m))
	}
	got := make([]byte, size)
	do(t, h, name, &block.Request{Op: block.OpRead, Length: size, Segments: [][]byte{got}})
	if !bytes.Equal(got, m) {
		i := 0
		for got[i] == m[i] {
			i++
		}
		t.Fatalf("%s differs from byte %d on", name, i)
	}
}

// sender is a daemon with a volume that has snapshots a, b and c of images.
func sender(t *testing.T) (h *Host, client *control.Client, images map[string]testImage) {
	t.Helper()
	h, client = startHost(t, testConfig(t))
	ctx := testContext(t)
	if _, err := client.CreateVolume(ctx, control.CreateVolume{Name: "default/v", Size: 8 << 20, SCOSize: 1 << 20}); err != nil {
		t.Fatal(err)
	}
	images = map[string]testImage{}
	m := make(testImage, 8<<20)
	for i, name := range []string{"a", "b", "c"} {
		if name == "b" {
			if _, err := client.ResizeVolume(ctx, "default/v", 12<<20, false); err != nil {
				t.Fatal(err)
			}
			m = append(m, make([]byte, 4<<20)...)
		}
		m.put(t, h, "v", uint64(i))
		if _, err := client.CreateSnapshot(ctx, "default/v", control.CreateSnapshot{Name: name, Metadata: map[string]string{"n": name}}); err != nil {
			t.Fatal(err)
		}
		images[name] = slices.Clone(m)
	}
	m.put(t, h, "v", 9)
	return h, client, images
}

func export(t *testing.T, c *control.Client, e control.Export) []byte {
	t.Helper()
	var b bytes.Buffer
	e.Volume = "default/v"
	if err := c.Export(testContext(t), e, &b); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// TestChainOfChangesIsReceived: a whole stream and changes make the same volume
// elsewhere, with the same snapshots; and what doesn't fit is refused.
func TestChainOfChangesIsReceived(t *testing.T) {
	h, client, images := sender(t)
	defer stopHost(t, h)
	ctx := testContext(t)
	whole := export(t, client, control.Export{Snapshot: "a"})
	b := export(t, client, control.Export{Snapshot: "b", Since: "a"})
	c := export(t, client, control.Export{Snapshot: "c", Since: "b"})
	ac := export(t, client, control.Export{Snapshot: "c", Since: "a"})
	if err := client.Export(ctx, control.Export{Volume: "default/v", Snapshot: "a", Since: "b"}, io.Discard); control.CodeOf(err) != control.CodeInvalid {
		t.Errorf("changes backwards: %v", err)
	}

	other, oc := startHost(t, testConfig(t))
	defer stopHost(t, other)
	receive := func(name string, s []byte) (control.Received, error) {
		return oc.Receive(ctx, "default/"+name, false, bytes.NewReader(s))
	}
	_, err := receive("w", b)
	refused(t, "changes of nothing", err, control.CodeNotFound, "has to be received first")
	got, err := receive("w", whole)
	if err != nil || got.Snapshot.Name != "a" || got.Snapshot.Metadata["n"] != "a" || got.Data == 0 {
		t.Fatalf("%+v, %v", got, err)
	}
	images["a"].same(t, other, "w")
	_, err = receive("w", whole)
	refused(t, "a whole volume over another", err, control.CodeExists, "exists already")
	_, err = receive("w", c)
	refused(t, "a base that it has not", err, control.CodeInvalid, "does not have")
	write(t, other, "w", 'x')
	_, err = receive("w", b)
	refused(t, "changes on what was changed", err, control.CodeInvalid, "was changed since snapshot a")
	if _, err := oc.Rollback(ctx, "default/w", "a", false); err != nil {
		t.Fatal(err)
	}
	if _, err = receive("w", b); err != nil {
		t.Fatal(err)
	}
	images["b"].same(t, other, "w")
	_, err = receive("w", b)
	refused(t, "the same again", err, control.CodeExists, "already")
	_, err = receive("w", ac)
	refused(t, "a base that is not the newest", err, control.CodeInvalid, "later ones")
	if _, err = receive("w", c); err != nil {
		t.Fatal(err)
	}
	for _, s := range []string{"a", "b", "c"} {
		images[s].same(t, other, "w@"+s)
	}
	images["c"].same(t, other, "w")
	here, err := client.Snapshot(ctx, "default/v", "c")
	if err != nil {
		t.Fatal(err)
	}
	if there, err := oc.Snapshot(ctx, "default/w", "c"); err != nil || there.ID != here.ID {
		t.Fatalf("snapshot c is %v there, %v; here %v", there.ID, err, here.ID)
	}
	if r, err := oc.Volume(ctx, "default/w"); err != nil || r.Size != 12<<20 || r.Incomplete != nil {
		t.Fatalf("%+v, %v", r, err)
	}
}

// TestInterruptedReceiveLeavesNothingHalfMade: wherever the stream breaks off, the
// volume is what it was, also if the daemon dies then.
func TestInterruptedReceiveLeavesNothingHalfMade(t *testing.T) {
	h, client, images := sender(t)
	ctx := testContext(t)
	whole := export(t, client, control.Export{Snapshot: "a"})
	b := export(t, client, control.Export{Snapshot: "b", Since: "a"})
	stopHost(t, h)
	other, oc := startHost(t, testConfig(t))
	defer stopHost(t, other)
	cut := func(s []byte, n int) error {
		_, err := oc.Receive(ctx, "default/w", false, bytes.NewReader(s[:n]))
		return err
	}
	for _, part := range []int{3, 5, 10} {
		if err := cut(whole, len(whole)*part/11); err == nil || !strings.Contains(err.Error(), "ends in the middle") {
			t.Fatalf("%v", err)
		}
		if list, err := oc.Volumes(ctx, ""); err != nil || len(list) > 0 {
			t.Fatalf("left: %+v, %v", list, err)
		}
	}
	if err := cut(whole, len(whole)); err != nil {
		t.Fatal(err)
	}
	for _, part := range []int{3, 10} {
		if err := cut(b, len(b)*part/11); err == nil {
			t.Fatal("a part was taken for the whole")
		}
		images["a"].same(t, other, "w")
	}
	damaged := bytes.Clone(b)
	damaged[len(b)/2] ^= 1
	if err := cut(damaged, len(damaged)); err == nil || !strings.Contains(err.Error(), "checksum") {
		t.Fatalf("damaged: %v", err)
	}
	images["a"].same(t, other, "w")
	if err := cut(b, len(b)); err != nil {
		t.Fatal(err)
	}
	images["b"].same(t, other, "w")
}

// TestReceiveGoesOn: a resumable one is out of reach until a stream from where it
// stopped completes it, or it is undone; both also in the next daemon.
func TestReceiveGoesOn(t *testing.T) {
	h, client, images := sender(t)
	defer stopHost(t, h)
	ctx := testContext(t)
	whole := export(t, client, control.Export{Snapshot: "a"})
	config := testConfig(t)
	other, oc := startHost(t, config)
	interrupt := func(s []byte) uint64 {
		if _, err := oc.Receive(ctx, "default/w", true, bytes.NewReader(s[:len(s)/2])); err == nil || !strings.Contains(err.Error(), "--start") {
			t.Fatalf("%v", err)
		}
		v, err := oc.Volume(ctx, "default/w")
		if err != nil || v.Incomplete == nil || !v.Incomplete.Resumable || v.Incomplete.Position == 0 {
			t.Fatalf("%+v, %v", v.Incomplete, err)
		}
		return v.Incomplete.Position
	}
	goOn := func(at uint64, e control.Export) {
		t.Helper()
		e.Start = at + 4096
		_, err := oc.Receive(ctx, "default/w", true, bytes.NewReader(export(t, client, e)))
		refused(t, "a gap", err, control.CodeInvalid, "was received up to")
		e.Start = at
		if _, err := oc.Receive(ctx, "default/w", true, bytes.NewReader(export(t, client, e))); err != nil {
			t.Fatal(err)
		}
	}
	at := interrupt(whole)
	if _, err := (snapshotOpener{other.volumes}).Open(ctx, "w"); control.CodeOf(err) != control.CodeUnavailable {
		t.Fatalf("a half-received volume is opened: %v", err)
	}
	_, err := oc.CreateSnapshot(ctx, "default/w", control.CreateSnapshot{Name: "x"})
	refused(t, "a snapshot of it", err, control.CodeUnavailable, "being received")
	stopHost(t, other)
	other, oc = startHost(t, config)
	defer func() { stopHost(t, other) }()
	goOn(at, control.Export{Snapshot: "a"})
	images["a"].same(t, other, "w")

	b := export(t, client, control.Export{Snapshot: "b", Since: "a"})
	interrupt(b)
	if err := oc.AbortReceive(ctx, "default/w"); err != nil {
		t.Fatal(err)
	}
	images["a"].same(t, other, "w")
	at = interrupt(b)
	_, err = oc.Receive(ctx, "default/w", true, bytes.NewReader(export(t, client, control.Export{Snapshot: "c", Since: "a"})))
	refused(t, "another stream", err, control.CodeInvalid, "waits for another stream")
	goOn(at, control.Export{Snapshot: "b", Since: "a"})
	images["b"].same(t, other, "w")
}

// TestReceiveIsUndoneByTheNextDaemon: the one that received has died.
func TestReceiveIsUndoneByTheNextDaemon(t *testing.T) {
	h, client, images := sender(t)
	ctx := testContext(t)
	whole := export(t, client, control.Export{Snapshot: "a"})
	b := export(t, client, control.Export{Snapshot: "b", Since: "a"})
	stopHost(t, h)
	config := testConfig(t)
	other, oc := startHost(t, config)
	if _, err := oc.Receive(ctx, "default/w", false, bytes.NewReader(whole)); err != nil {
		t.Fatal(err)
	}
	// As receive does it, up to the moment at which it would undo.
	for _, s := range [][]byte{whole, b} {
		name := "default/w"
		if bytes.Equal(s, whole) {
			name = "default/new"
		}
		r := &receiver{set: other.volumes, name: name, resumable: false}
		var err error
		if r.stream, err = stream.NewReader(bytes.NewReader(s[:len(s)/2])); err != nil {
			t.Fatal(err)
		}
		r.header = r.stream.Header()
		if err := r.begin(ctx); err != nil {
			t.Fatal(err)
		}
		if err := r.apply(ctx); !errors.Is(err, stream.ErrTruncated) {
			t.Fatal(err)
		}
		r.release()
	}
	stopHost(t, other)
	other, oc = startHost(t, config)
	defer stopHost(t, other)
	if _, err := oc.Volume(ctx, "default/new"); control.CodeOf(err) != control.CodeNotFound {
		t.Fatalf("the new volume is still there: %v", err)
	}
	images["a"].same(t, other, "w")
	if v, err := oc.Volume(ctx, "default/w"); err != nil || v.Incomplete != nil || v.Size != 8<<20 {
		t.Fatalf("%+v, %v", v, err)
	}
}

// TestExportEndsWithItsClient: a client that goes away leaves no reader behind.
func TestExportEndsWithItsClient(t *testing.T) {
	h, client, _ := sender(t)
	defer stopHost(t, h)
	ctx, cancel := context.WithCancel(testContext(t))
	err := client.Export(ctx, control.Export{Volume: "default/v", Snapshot: "c"}, writerFunc(func(p []byte) (int, error) {
		cancel()
		return len(p), nil
	}))
	if !errors.Is(err, context.Canceled) {
		t.Fatal(err)
	}
	await(t, "end of the reader", func() bool { return client.DeleteSnapshot(testContext(t), "default/v", "c") == nil })
}

type writerFunc func([]byte) (int, error)

func (f writerFunc) Write(p []byte) (int, error) { return f(p) }
