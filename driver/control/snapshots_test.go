package control_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"

	"scoria/driver/control"
)

// Snapshots of the test's backend say what they were called with.

func (b *backend) Snapshots(ctx context.Context, volume string) ([]control.Snapshot, error) {
	n := uint64(7)
	_, err := b.Volume(ctx, volume)
	return []control.Snapshot{{Volume: volume, Name: "s", Alone: &n}}, err
}

func (b *backend) Snapshot(_ context.Context, volume, name string) (control.Snapshot, error) {
	return control.Snapshot{Volume: volume, Name: name}, nil
}

func (b *backend) CreateSnapshot(_ context.Context, volume string, req control.CreateSnapshot) (control.Snapshot, error) {
	return control.Snapshot{Volume: volume, Name: req.Name, Metadata: req.Metadata, Temporary: req.Temporary}, nil
}

func (b *backend) DeleteSnapshot(_ context.Context, volume, name string) error {
	return control.Errorf(control.CodeInUse, "snapshot %s@%s has clones", volume, name)
}

func (b *backend) RenameSnapshot(_ context.Context, volume, name, to string) (control.Snapshot, error) {
	return control.Snapshot{Volume: volume, Name: to, State: "was " + name}, nil
}

func (b *backend) Rollback(ctx context.Context, volume, name string, force bool) (control.Volume, error) {
	if !force {
		return control.Volume{}, control.Errorf(control.CodeNeedsForce, "would drop what is later than %s", name)
	}
	return b.Volume(ctx, volume)
}

func (b *backend) CloneVolume(_ context.Context, req control.CloneVolume) (control.Volume, error) {
	return control.Volume{Name: req.Name, Size: req.Size, Parent: req.From}, nil
}

func (b *backend) SetTemplate(_ context.Context, volume string, template bool) (control.Volume, error) {
	return control.Volume{Name: volume, Template: template}, nil
}

func (b *backend) FlattenVolume(_ context.Context, _ string, p control.Progress) error {
	p(2, 4)
	return nil
}

func (b *backend) Complete(_ context.Context, volume string) (control.Volume, error) {
	return control.Volume{Name: volume, State: "whole"}, nil
}

func (b *backend) AbortReceive(context.Context, string) error {
	return control.Errorf(control.CodeInvalid, "nothing to undo")
}

// Export writes as many bytes as the base's name says, then fails if Start is odd.
func (b *backend) Export(_ context.Context, req control.Export, w io.Writer) error {
	if req.Snapshot == "nosuch" {
		return control.Errorf(control.CodeNotFound, "no snapshot %s@%s", req.Volume, req.Snapshot)
	}
	if _, err := io.WriteString(w, strings.Repeat(req.Since, 1<<20)); err != nil {
		return err
	}
	if req.Start == 1 {
		return control.Errorf(control.CodeFailed, "the disk is gone")
	}
	return nil
}

// Receive refuses what begins with "bad" at once, and else takes all.
func (b *backend) Receive(_ context.Context, volume string, resumable bool, r io.Reader) (control.Received, error) {
	var head [3]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return control.Received{}, err
	}
	if string(head[:]) == "bad" {
		return control.Received{}, control.Errorf(control.CodeInvalid, "the stream is bad")
	}
	n, err := io.Copy(io.Discard, r)
	return control.Received{Volume: fmt.Sprint(volume, " ", resumable), Data: uint64(n) + 3}, err
}

func TestSnapshotCalls(t *testing.T) {
	b := newBackend()
	c, _ := serve(t, b)
	ctx := testContext(t)
	if _, err := c.CreateVolume(ctx, control.CreateVolume{Name: "p/v", Size: 4096}); err != nil {
		t.Fatal(err)
	}
	meta := map[string]string{"a": "b"}
	s, err := c.CreateSnapshot(ctx, "p/v", control.CreateSnapshot{Name: "x", Metadata: meta, Temporary: true})
	if err != nil || s.Volume != "p/v" || s.Name != "x" || !maps.Equal(s.Metadata, meta) || !s.Temporary {
		t.Errorf("create: %+v, %v", s, err)
	}
	for _, bad := range []map[string]string{{"": "x"}, {"x": strings.Repeat("x", control.MaxMetadataBytes)}} {
		if _, err := c.CreateSnapshot(ctx, "p/v", control.CreateSnapshot{Name: "x", Metadata: bad}); control.CodeOf(err) != control.CodeInvalid {
			t.Errorf("bad metadata: %v", err)
		}
	}
	if list, err := c.Snapshots(ctx, "p/v"); err != nil || len(list) != 1 || *list[0].Alone != 7 {
		t.Errorf("list: %+v, %v", list, err)
	}
	if s, err := c.Snapshot(ctx, "p/v", "odd/name"); err != nil || s.Name != "odd/name" {
		t.Errorf("show: %+v, %v", s, err)
	}
	if err := c.DeleteSnapshot(ctx, "p/v", "x"); control.CodeOf(err) != control.CodeInUse {
		t.Errorf("delete: %v", err)
	}
	if s, err := c.RenameSnapshot(ctx, "p/v", "x", "y"); err != nil || s.Name != "y" || s.State != "was x" {
		t.Errorf("rename: %+v, %v", s, err)
	}
	if _, err := c.Rollback(ctx, "p/v", "x", false); control.CodeOf(err) != control.CodeNeedsForce {
		t.Errorf("rollback: %v", err)
	}
	if v, err := c.Rollback(ctx, "p/v", "x", true); err != nil || v.Name != "p/v" {
		t.Errorf("rollback with force: %+v, %v", v, err)
	}
	if v, err := c.CloneVolume(ctx, control.CloneVolume{From: "p/v@x", Name: "p/c", Size: 8192}); err != nil || v.Parent != "p/v@x" || v.Size != 8192 {
		t.Errorf("clone: %+v, %v", v, err)
	}
	if v, err := c.SetTemplate(ctx, "p/v", true); err != nil || !v.Template {
		t.Errorf("template: %+v, %v", v, err)
	}
	j, err := c.StartFlatten(ctx, "p/v")
	if err == nil {
		j, err = c.Await(ctx, j, nil)
	}
	if err != nil || j.Kind != "flatten" || j.Total != 4 {
		t.Errorf("flatten: %+v, %v", j, err)
	}
	if v, err := c.Complete(ctx, "p/v"); err != nil || v.State != "whole" {
		t.Errorf("complete: %+v, %v", v, err)
	}
	if err := c.AbortReceive(ctx, "p/v"); control.CodeOf(err) != control.CodeInvalid {
		t.Errorf("abort: %v", err)
	}
	if v, err := c.ResizeVolume(ctx, "p/v", 0, true); err != nil || v.Size != 0 {
		t.Errorf("shrink: %+v, %v", v, err)
	}
	if id := uuid.Nil; s.ID != id {
		t.Errorf("an ID came from nowhere: %v", s.ID)
	}
}

// TestExportTellsWhyItEnded: also when it had begun.
func TestExportTellsWhyItEnded(t *testing.T) {
	c, _ := serve(t, newBackend())
	ctx := testContext(t)
	var got bytes.Buffer
	if err := c.Export(ctx, control.Export{Volume: "p/v", Snapshot: "s", Since: "abc"}, &got); err != nil || got.Len() != 3<<20 {
		t.Fatalf("%d bytes, %v", got.Len(), err)
	}
	err := c.Export(ctx, control.Export{Volume: "p/v", Snapshot: "nosuch"}, &got)
	if control.CodeOf(err) != control.CodeNotFound {
		t.Fatalf("refused: %v", err)
	}
	err = c.Export(ctx, control.Export{Volume: "p/v", Snapshot: "s", Since: "abc", Start: 1}, &got)
	if err == nil || err.Error() != "the disk is gone" {
		t.Fatalf("failed half-way: %v", err)
	}
}

// endless is a stream that does not end by itself.
type endless struct{ head io.Reader }

func (e endless) Read(p []byte) (int, error) {
	if n, err := e.head.Read(p); n > 0 || err == nil {
		return n, err
	}
	return len(p), nil
}

// TestReceiveIsRefusedAtOnce: the client learns why, though it has more to send
// than the daemon will ever read.
func TestReceiveIsRefusedAtOnce(t *testing.T) {
	c, _ := serve(t, newBackend())
	for range 20 {
		_, err := c.Receive(testContext(t), "p/v", true, endless{strings.NewReader("bad")})
		if control.CodeOf(err) != control.CodeInvalid || !strings.Contains(err.Error(), "is bad") {
			t.Fatalf("%v", err)
		}
	}
	got, err := c.Receive(testContext(t), "p/v", true, strings.NewReader("good stream"))
	if err != nil || got.Volume != "p/v true" || got.Data != 11 {
		t.Fatalf("%+v, %v", got, err)
	}
}

// TestReceiveEndsWithItsClient: what the client's reader fails with ends the
// receive, and the daemon's side hears of it.
func TestReceiveEndsWithItsClient(t *testing.T) {
	c, _ := serve(t, newBackend())
	broken := errors.New("the pipe broke")
	r, w := io.Pipe()
	go func() {
		_, _ = w.Write([]byte("good"))
		w.CloseWithError(broken)
	}()
	if _, err := c.Receive(testContext(t), "p/v", false, r); !errors.Is(err, broken) {
		t.Fatalf("%v; want %v", err, broken)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := c.Receive(ctx, "p/v", false, endless{strings.NewReader("good")}); !errors.Is(err, context.DeadlineExceeded) {
		t.Fatalf("%v; want the deadline", err)
	}
}
