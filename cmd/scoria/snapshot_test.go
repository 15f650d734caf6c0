package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"

	"scoria/driver/control"
	"scoria/driver/stream"
)

func snapshot(volume, name string) control.Snapshot {
	n := uint64(3 << 20)
	return control.Snapshot{
		Volume: volume, Name: name, ID: uuid.MustParse("6ba7b811-9dad-41d1-80b4-00c04fd430c8"), Created: created, Size: 10 << 30,
		Metadata: map[string]string{"by": "cron", "a": "1"}, State: "ready", Alone: &n, Clones: []string{"default/c1"},
		NBD: "nbd+unix:///" + volume + "@" + name + "?socket=/run/scoria/nbd.sock",
	}
}

func (d daemon) Snapshots(ctx context.Context, volume string) ([]control.Snapshot, error) {
	_, err := d.Volume(ctx, volume)
	later := snapshot(volume, "tuesday")
	later.Alone, later.Clones, later.Metadata = nil, nil, nil
	return []control.Snapshot{snapshot(volume, "monday"), later}, err
}

func (d daemon) Snapshot(_ context.Context, volume, name string) (control.Snapshot, error) {
	if name == "nosuch" {
		return control.Snapshot{}, control.Errorf(control.CodeNotFound, "no snapshot %s@%s", volume, name)
	}
	return snapshot(volume, name), nil
}

func (d daemon) CreateSnapshot(_ context.Context, volume string, req control.CreateSnapshot) (control.Snapshot, error) {
	if req.Name == "there" {
		return control.Snapshot{}, control.Errorf(control.CodeExists, "snapshot %s@there exists already", volume)
	}
	s := snapshot(volume, req.Name)
	s.Metadata, s.Clones = req.Metadata, nil
	return s, nil
}

func (d daemon) DeleteSnapshot(ctx context.Context, volume, name string) error {
	_, err := d.Snapshot(ctx, volume, name)
	return err
}

func (d daemon) RenameSnapshot(_ context.Context, volume, _, to string) (control.Snapshot, error) {
	return snapshot(volume, to), nil
}

func (d daemon) Rollback(ctx context.Context, volume, _ string, force bool) (control.Volume, error) {
	if !force {
		return control.Volume{}, control.Errorf(control.CodeNeedsForce, "rollback would drop 1 later snapshots: tuesday")
	}
	return d.Volume(ctx, volume)
}

func (d daemon) CloneVolume(_ context.Context, req control.CloneVolume) (control.Volume, error) {
	v := volume(req.Name)
	v.Parent = req.From
	if req.Size > 0 {
		v.Size = req.Size
	}
	return v, nil
}

func (d daemon) SetTemplate(_ context.Context, name string, template bool) (control.Volume, error) {
	v := volume(name)
	v.Template, v.Snapshots = template, 1
	return v, nil
}

func (daemon) FlattenVolume(context.Context, string, control.Progress) error { return nil }

func (daemon) Complete(_ context.Context, name string) (control.Volume, error) {
	return volume(name), nil
}

func (daemon) AbortReceive(context.Context, string) error { return nil }

const exported = 1 << 20

// Export: 64 KiB at 4096 and the last 4 KiB of a volume of 1 MiB.
func (daemon) Export(_ context.Context, req control.Export, w io.Writer) error {
	s, err := stream.NewWriter(w, stream.Header{
		Volume: req.Volume, Size: exported, BlockSize: 512, Snapshot: stream.Snapshot{ID: uuid.New(), Name: req.Snapshot}, DataBytes: 68 << 10,
	})
	if err == nil {
		err = s.Data(4096, bytes.Repeat([]byte{7}, 64<<10))
	}
	if err == nil && req.Snapshot == "broken" {
		return control.Errorf(control.CodeFailed, "a disk is gone")
	}
	if err == nil {
		err = s.Data(exported-4096, bytes.Repeat([]byte{9}, 4096))
	}
	if err == nil {
		err = s.End()
	}
	return err
}

func (daemon) Receive(_ context.Context, volume string, _ bool, r io.Reader) (control.Received, error) {
	s, err := stream.NewReader(r)
	for err == nil {
		_, err = s.Next()
	}
	if !errors.Is(err, io.EOF) {
		return control.Received{}, err
	}
	return control.Received{Volume: volume, Snapshot: snapshot(volume, s.Header().Snapshot.Name), Data: s.Totals().DataBytes}, nil
}

func exportedImage() []byte {
	want := make([]byte, exported)
	copy(want[4096:], bytes.Repeat([]byte{7}, 64<<10))
	copy(want[exported-4096:], bytes.Repeat([]byte{9}, 4096))
	return want
}

// TestExportRaw: to a file that is sparse, and to standard output; one that fails
// leaves nothing.
func TestExportRaw(t *testing.T) {
	socket := serve(t)
	dir := t.TempDir()
	file := filepath.Join(dir, "v.raw")
	if _, errOut, code := call(t, socket, "volume", "export", "vm1", file); code != 0 {
		t.Fatal(errOut)
	}
	got, err := os.ReadFile(file)
	if err != nil || !bytes.Equal(got, exportedImage()) {
		t.Fatalf("%d bytes, %v", len(got), err)
	}
	if out, errOut, code := call(t, socket, "volume", "export", "vm1@s", "-"); code != 0 || !bytes.Equal([]byte(out), exportedImage()) {
		t.Fatalf("%d bytes, %s", len(out), errOut)
	}
	_, errOut, code := call(t, socket, "volume", "export", "vm1@broken", filepath.Join(dir, "x"))
	if code != 1 || !strings.Contains(errOut, "a disk is gone") {
		t.Fatalf("exit %d, %s; want the daemon's reason", code, errOut)
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) != 1 {
		t.Fatalf("left: %v, %v", left, err)
	}
}

// TestStreamOutAndIn: what export writes receive takes.
func TestStreamOutAndIn(t *testing.T) {
	socket := serve(t)
	file := filepath.Join(t.TempDir(), "s")
	if _, errOut, code := call(t, socket, "volume", "export", "vm1@tuesday", file, "--since", "monday"); code != 0 {
		t.Fatal(errOut)
	}
	out, errOut, code := call(t, socket, "volume", "receive", "other", file)
	if code != 0 || !strings.Contains(out, "default/other@tuesday") || !strings.Contains(out, "68 KiB") {
		t.Fatalf("exit %d: %s %s", code, out, errOut)
	}
	if err := os.Truncate(file, 1<<14); err != nil {
		t.Fatal(err)
	}
	if _, errOut, code = call(t, socket, "volume", "receive", "other", file); code != 1 || !strings.Contains(errOut, "ends in the middle") {
		t.Fatalf("exit %d: %s", code, errOut)
	}
}

// TestQuiesceAlwaysThaws: whatever happens between, and with the phase as argument
// and in the environment.
func TestQuiesceAlwaysThaws(t *testing.T) {
	socket := serve(t)
	log := filepath.Join(t.TempDir(), "log")
	script := filepath.Join(t.TempDir(), "q")
	write := func(body string) {
		t.Helper()
		text := fmt.Sprintf("#!/bin/sh\necho \"$1 $2 $SCORIA_PHASE $SCORIA_VOLUME@$SCORIA_SNAPSHOT\" >>%s\n%s\n", log, body)
		if err := os.WriteFile(script, []byte(text), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	const frozen, thawed = "vm freeze freeze default/vm1@%[1]s\n", "vm thaw thaw default/vm1@%[1]s\n"
	for _, tt := range []struct {
		name, body, want, text string
		code                   int
	}{
		{"s", "", frozen + thawed, "", 0},
		{"there", "", frozen + thawed, "exists already", 1},
		{"s", `[ "$2" != freeze ]`, frozen + thawed, "freeze: exit status 1", 1},
		{"s", `[ "$2" != thaw ]`, frozen + thawed, "thaw: exit status 1", 1},
		{"s", `[ "$2" = thaw ] || sleep 100`, frozen + thawed, "took longer than 1s", 1},
	} {
		write(tt.body)
		out, errOut, code := call(t, socket, "snapshot", "create", "vm1@"+tt.name, "--quiesce", script+" vm", "--quiesce-timeout", "1s")
		got, err := os.ReadFile(log)
		if err != nil || code != tt.code || !strings.Contains(errOut, tt.text) || string(got) != fmt.Sprintf(tt.want, tt.name) {
			t.Errorf("%q: exit %d, %s%s; the command saw\n%s%v", tt.body, code, out, errOut, got, err)
		}
		if err := os.Remove(log); err != nil {
			t.Fatal(err)
		}
	}
}

func TestMeter(t *testing.T) {
	m := meter{title: "export v", width: 70}
	m.done.Store(1 << 30)
	if got, want := m.line(2*time.Second), "export v 1 GiB 512 MiB/s"; strings.TrimSpace(got) != want || len(got) != 70 {
		t.Errorf("%q; want %q", got, want)
	}
	m.total.Store(4 << 30)
	if got, want := m.line(2*time.Second), "export v [=========                           ]  25% 512 MiB/s 6s left"; strings.TrimSpace(got) != want || len(got) != 70 {
		t.Errorf("%q; want %q", got, want)
	}
	m.width = 5
	if got := m.line(time.Second); got != "expor" {
		t.Errorf("%q", got)
	}
}
