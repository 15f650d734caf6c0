package main

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/rs/zerolog"

	"scoria/driver/control"
)

var update = flag.Bool("update", false, "rewrite the golden files")

const patience = 2 * time.Minute

// daemon answers with fixed data.
type daemon struct {
	control.ObjectBackend // for what the command line does not ask
}

func (daemon) BeginHold() string { return "hold" }

func (daemon) EndHold(string) {}

var created = time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)

func volume(name string) control.Volume {
	return control.Volume{
		Name: name, ID: uuid.MustParse("6ba7b810-9dad-41d1-80b4-00c04fd430c8"), Size: 10 << 30, BlockSize: 512, SCOSize: 64 << 20,
		Serial: "6ba7b8109dad41d180b4", Created: created, State: "ready", Owner: "n1", Epoch: 3,
		Socket: "/run/scoria/vhost/" + name + ".sock", NBD: "nbd+unix:///" + name + "?socket=/run/scoria/nbd.sock",
		Conditions: []control.Condition{},
	}
}

func (daemon) Status(context.Context) (control.Status, error) {
	return control.Status{
		Version: "1.2", Instance: "6ba7b810-9dad-41d1-80b4-00c04fd430c8", Host: "kvm1", PID: 17, Started: created,
		DataDir: "/var/lib/scoria", DataFree: 3 << 40, RunDir: "/run/scoria", PoolFile: "/run/scoria/x.pool", WriteBuffer: 1 << 30,
		Volumes: 3, Open: 2, InUse: 1, Conditions: []control.Condition{{Code: "write-buffer-lost", Message: "it is gone"}},
	}, nil
}

func (daemon) Pools(context.Context) ([]control.Pool, error) {
	return []control.Pool{{Name: "default", Store: "objects", Preset: "default", BlockSize: 512, SCOSize: 64 << 20, Created: created, Volumes: 2}, {Name: "fast", Store: "directory", BlockSize: 4096, SCOSize: 4 << 20, Created: created}}, nil
}

func (d daemon) Pool(ctx context.Context, name string) (control.Pool, error) {
	pools, _ := d.Pools(ctx)
	for _, p := range pools {
		if p.Name == name {
			return p, nil
		}
	}
	return control.Pool{}, control.Errorf(control.CodeNotFound, "no pool %s", name)
}

func (daemon) CreatePool(_ context.Context, req control.CreatePool) (control.Pool, error) {
	return control.Pool{Name: req.Name, Store: req.Store, Preset: req.Preset, BlockSize: req.BlockSize, SCOSize: req.SCOSize, Created: created}, nil
}

func (daemon) DeletePool(_ context.Context, name string) error {
	if name == "default" {
		return control.Errorf(control.CodeInUse, "pool default has 2 volumes: delete them first")
	}
	return nil
}

func (daemon) Volumes(context.Context, string) ([]control.Volume, error) {
	busy := volume("fast/db")
	busy.Open, busy.UsedBy, busy.Size = true, "vhost 3", 3<<39
	busy.LastDisconnect, busy.LastDisconnectTime = "ring 0: descriptor chain loops", created
	busy.Snapshots, busy.Parent, busy.Clones, busy.Template = 2, "default/golden@v1", []string{"default/a", "default/b"}, true
	busy.Incomplete = &control.Incomplete{Kind: "receive", Position: 4096, Resumable: true}
	busy.Space = &control.Space{Live: 1 << 30, Snapshots: 1 << 29, Garbage: 1 << 20, Overhead: 4096, Inherited: 1 << 28}
	busy.Conditions = []control.Condition{{Code: "disk-full", Message: "no room"}, {Code: "throttled", Message: "slow"}}
	return []control.Volume{volume("default/vm1"), busy}, nil
}

func (d daemon) Volume(ctx context.Context, name string) (control.Volume, error) {
	volumes, _ := d.Volumes(ctx, "")
	for _, v := range volumes {
		if v.Name == name {
			return v, nil
		}
	}
	return control.Volume{}, control.Errorf(control.CodeNotFound, "no volume %s", name)
}

func (daemon) CreateVolume(_ context.Context, req control.CreateVolume) (control.Volume, error) {
	v := volume(req.Name)
	v.Size, v.ReadOnly = req.Size, req.ReadOnly
	if req.BlockSize != 0 {
		v.BlockSize = req.BlockSize
	}
	if req.SCOSize != 0 {
		v.SCOSize = req.SCOSize
	}
	if req.Serial != "" {
		v.Serial = req.Serial
	}
	return v, nil
}

func (d daemon) ResizeVolume(ctx context.Context, name string, size uint64, force bool) (control.Volume, error) {
	v, err := d.Volume(ctx, name)
	if size < v.Size && !force {
		return v, control.Errorf(control.CodeNeedsForce, "volume %s: 4KiB that are written there would be lost", name)
	}
	v.Size = size
	return v, err
}

func (d daemon) Stats(ctx context.Context, name string) (control.VolumeStats, error) {
	v, err := d.Volume(ctx, name)
	return control.VolumeStats{
		Name: name, Ops: map[string]control.OpStats{"read": {Count: 10, Bytes: 40960}, "write": {Count: 5, Bytes: 5 << 20, Errors: 1}},
		Space:    control.Space{Live: 1 << 30, Snapshots: 1 << 29, Garbage: 1 << 20, Overhead: 4096, Local: 2 << 30, Store: 1 << 30},
		Counters: map[string]uint64{"sync_count": 7, "checksum_errors": 0}, Conditions: v.Conditions,
	}, err
}

func (d daemon) CheckDelete(ctx context.Context, name string, _ bool) error {
	v, err := d.Volume(ctx, name)
	if v.UsedBy != "" {
		return control.Errorf(control.CodeInUse, "volume %s is in use by %s", name, v.UsedBy)
	}
	return err
}

func (daemon) DeleteVolume(context.Context, string, bool, control.Progress) error { return nil }

func (daemon) CheckVolume(_ context.Context, name string, p control.Progress) (control.CheckReport, error) {
	p(1, 2)
	r := control.CheckReport{SCOs: 4, Clusters: 1000, Bytes: 4096000, Problems: []string{}}
	if name == "fast/db" {
		r.Problems = []string{"SCO 3: cluster 7 fails its checksum", "space: 5 clusters too many"}
	}
	return r, nil
}

// TestMain sets the time zone of what is printed before any goroutine asks for the time.
func TestMain(m *testing.M) {
	time.Local = time.UTC
	os.Exit(m.Run())
}

func serve(t *testing.T) (socket string) {
	t.Helper()
	socket = filepath.Join(t.TempDir(), "control.sock")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	s := control.NewServer(daemon{}, nil, zerolog.Nop())
	done := make(chan error, 1)
	go func() { done <- s.Serve(l) }()
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		if err := errors.Join(s.Close(ctx), <-done); err != nil {
			t.Error(err)
		}
	})
	return socket
}

// call runs the command line and returns what it would print and exit with.
func call(t *testing.T, socket string, args ...string) (out, errOut string, code int) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	var o, e bytes.Buffer
	a := &app{out: &o, errOut: &e, rebuild: rebuilt}
	cmd := a.command()
	cmd.SetArgs(append([]string{"--socket", socket}, args...))
	err := cmd.ExecuteContext(ctx)
	if err != nil {
		e.WriteString("scoria: " + err.Error() + "\n")
	}
	return o.String(), e.String(), exitCode(err)
}

// TestGoldenOutput holds what is printed, as a table and as JSON.
func TestGoldenOutput(t *testing.T) {
	t.Setenv("TZ", "UTC")
	socket := serve(t)
	for _, tt := range []struct {
		name string
		args string
		code int
	}{
		{"volume-list", "volume list", 0},
		{"volume-show", "volume show vm1", 0},
		{"volume-show-conditions", "volume show fast/db", 0},
		{"volume-create", "volume create new --size 1.5G --block-size 4096 --sco-size 4M --serial S1 --read-only", 0},
		{"volume-resize", "volume resize vm1 20G", 0},
		{"volume-resize-by", "volume resize vm1 +1T", 0},
		{"volume-stats", "volume stats vm1", 0},
		{"volume-delete", "volume delete vm1", 0},
		{"volume-check", "volume check vm1", 0},
		{"volume-resize-force", "volume resize vm1 1G --force", 0},
		{"volume-clone", "volume clone vm1@s c1 --size 20G", 0},
		{"volume-clone-many", "volume clone fast/db c1 fast/c2", 0},
		{"volume-template", "volume template vm1", 0},
		{"snapshot-create", "snapshot create vm1@s --meta b=2 --meta a=1", 0},
		{"snapshot-list", "snapshot list vm1", 0},
		{"snapshot-show", "snapshot show vm1@monday", 0},
		{"snapshot-rename", "snapshot rename vm1@monday first", 0},
		{"snapshot-delete", "snapshot delete vm1@monday", 0},
		{"snapshot-rollback", "snapshot rollback vm1@monday --force", 0},
		{"volume-receive-position", "volume receive fast/db --position", 0},
		{"volume-receive-abort", "volume receive fast/db --abort", 0},
		{"volume-check-problems", "volume check fast/db", 5},
		{"asd-add", "asd add 10.0.0.5:9711 --host node5 --rack r2 --datacentre dc1", 0},
		{"asd-list", "asd list", 0},
		{"asd-show", "asd show 2f0c", 0},
		{"asd-drain", "asd drain /srv/disk1", 0},
		{"asd-remove", "asd remove --force 1f0c0a52", 0},
		{"preset-create", "preset create two --policy 2,1,2,1 --fragment-size 1M --compression lz4", 0},
		{"preset-set", "preset set safe --encryption aes-256-gcm", 0},
		{"preset-list", "preset list", 0},
		{"preset-show", "preset show safe", 0},
		{"backend-status", "backend status", 0},
		{"backend-repair-status", "backend repair status", 0},
		{"backend-verify-start", "backend verify start", 0},
		{"backend-rebalance-stop", "backend rebalance stop", 0},
		{"backend-rotate-keys", "backend rotate-keys", 0},
		{"backend-rebuild-registry", "backend rebuild-registry --data-dir /srv/whole", 0},
		{"backend-rebuild-registry-force", "backend rebuild-registry --data-dir /srv/torn --asd 10.0.0.5:9711 --asd /srv/disk1 --master-keys /etc/keys --force -q", 0},
		{"volume-set", "volume set vm1 --serial S2 --read-only", 0},
		{"volume-rename", "volume rename vm1 web1", 0},
		{"volume-limit", "volume limit vm1", 0},
		{"volume-limit-set", "volume limit vm1 --write-iops 50 --read-bps 1.5M --iops none --burst 10s --burst-bytes default", 0},
		{"volume-limit-clear", "volume limit vm1 --clear", 0},
		{"pool-limit", "pool limit default --bps 200M", 0},
		{"schedule-list", "schedule list", 0},
		{"schedule-show", "schedule show --pool default", 0},
		{"schedule-set", "schedule set vm1 hourly --zone UTC", 0},
		{"schedule-set-none", "schedule set vm1 none", 0},
		{"schedule-delete", "schedule delete vm1", 0},
		{"pool-list", "pool list", 0},
		{"pool-show", "pool show fast", 0},
		{"pool-create", "pool create big --sco-size 256M --block-size 4096 --store objects", 0},
		{"pool-delete", "pool delete fast", 0},
		{"status", "status", 0},
	} {
		for _, format := range []string{"table", "json"} {
			if tt.name == "volume-delete" && format == "json" {
				continue // has times
			}
			t.Run(tt.name+"."+format, func(t *testing.T) {
				out, errOut, code := call(t, socket, append(strings.Fields(tt.args), "-o", format)...)
				if code != tt.code {
					t.Fatalf("exit %d, %s; want %d", code, errOut, tt.code)
				}
				golden := filepath.Join("testdata", tt.name+"."+format)
				if *update {
					if err := os.WriteFile(golden, []byte(out), 0o644); err != nil {
						t.Fatal(err)
					}
				}
				want, err := os.ReadFile(golden)
				if err != nil {
					t.Fatal(err)
				}
				if out != string(want) {
					t.Fatalf("printed\n%s\nwant\n%s", out, want)
				}
			})
		}
	}
}

// TestExitCodes holds what the manual says, and that messages help.
func TestExitCodes(t *testing.T) {
	socket := serve(t)
	for _, tt := range []struct {
		args string
		code int
		text string
	}{
		{"volume show nosuch", 3, "no volume default/nosuch"},
		{"volume delete fast/db", 4, "in use by vhost 3"},
		{"volume delete", 2, "takes [POOL/]VOLUME; got 0"},
		{"volume create v", 2, "--size is missing"},
		{"volume create v --size many", 2, "must be a number of bytes"},
		{"volume create v --size -1", 2, "must be a number of bytes"},
		{"volume create v --size 1G --colour red", 2, "unknown flag"},
		{"volume create a/b/c --size 1G", 2, "POOL/VOLUME"},
		{"volume resize vm1 1G", 6, "would be lost"},
		{"asd remove 1f0c", 6, "still holds"},
		{"asd show zzzz", 3, "no storage daemon"},
		{"asd add", 2, "DIRECTORY|HOST:PORT"},
		{"preset create p", 2, "--policy is needed"},
		{"preset create p --policy 2,1", 2, "four numbers"},
		{"preset create p --policy 2,1,x,1", 2, "is no number"},
		{"preset show nosuch", 3, "no preset"},
		{"volume set vm1", 2, "--serial or --read-only"},
		{"volume set fast/db --read-only", 4, "in use by vhost 3"},
		{"volume limit vm1 --read-iops many", 2, "number of requests"},
		{"volume limit vm1 --bps fast", 2, "powers of 1024"},
		{"volume limit vm1 --burst soon", 2, "must be a duration"},
		{"volume limit vm1 --read-bps 5", 2, "from 4096"},
		{"volume limit nosuch", 3, "no volume"},
		{"pool limit nosuch --iops 5", 3, "no pool"},
		{"schedule set vm1", 2, "takes a volume"},
		{"schedule show none", 3, "no schedule"},
		{"schedule show --pool a/b", 2, "name of a pool"},
		{"schedule delete --pool nosuch", 3, "no pool"},
		{"volume resize vm1 big", 2, "powers of 1024"},
		{"volume list -o xml", 2, "table or json"},
		{"snapshot create vm1", 2, "must be VOLUME@SNAPSHOT"},
		{"snapshot create vm1@a --meta x", 2, "must be formatted as key=value"},
		{"snapshot create vm1@a --quiesce-timeout 0s", 2, "must be positive"},
		{"snapshot create vm1@there", 1, "exists already"},
		{"snapshot rollback vm1@monday", 6, "tuesday"},
		{"snapshot delete vm1@nosuch", 3, "no snapshot"},
		{"volume clone vm1@s", 2, "at least one name"},
		{"volume clone vm1@s a b --serial X", 2, "for one clone"},
		{"volume export vm1 f --format tar", 2, "raw, qcow2 or stream"},
		{"volume export vm1 f --since monday", 2, "needs a snapshot"},
		{"volume export vm1@s - --format qcow2", 2, "name a file"},
		{"volume export vm1 /etc/passwd", 2, "--overwrite"},
		{"volume export vm1 f --format raw --start 4096", 2, "are for --format stream"},
		{"volume receive", 2, "takes [POOL/]NAME"},
		{"volume receive vm1 --position", 2, "not being received"},
		{"volume receive vm1 /nosuch", 1, "no such file"},
		{"volume frobnicate", 2, "unknown command"},
		{"frobnicate", 2, "unknown command"},
		{"pool delete default", 4, "2 volumes"},
		{"pool show nosuch", 3, "no pool nosuch"},
		{"job cancel 99", 3, "no job"},
		{"bench fast/db", 4, "in use by vhost 3"},
		{"bench vm1 --rw randwrite", 2, "--destroy-data"},
		{"bench vm1 --rw sideways", 2, "randread"},
		{"bench vm1 --depth 0", 2, "1 to 128"},
		{"bench nosuch", 3, "no volume"},
	} {
		_, errOut, code := call(t, socket, strings.Fields(tt.args)...)
		if code != tt.code || !strings.Contains(errOut, tt.text) {
			t.Errorf("scoria %s: exit %d, %s; want %d and %q", tt.args, code, errOut, tt.code, tt.text)
		}
	}
	_, errOut, code := call(t, filepath.Join(t.TempDir(), "nobody"), "status")
	if code != 1 || !strings.Contains(errOut, "is scoriad running?") {
		t.Errorf("without a daemon: exit %d, %s", code, errOut)
	}
}

func TestCompletion(t *testing.T) {
	socket := serve(t)
	out, _, code := call(t, socket, "__complete", "--socket", socket, "volume", "show", "")
	if code != 0 || !strings.HasPrefix(out, "vm1\nfast/db\n") {
		t.Errorf("volumes complete to %q", out)
	}
	out, _, code = call(t, socket, "__complete", "--socket", socket, "pool", "show", "")
	if code != 0 || !strings.HasPrefix(out, "default\nfast\n") {
		t.Errorf("pools complete to %q", out)
	}
	for _, shell := range []string{"bash", "zsh", "fish"} {
		if out, _, code := call(t, socket, "completion", shell); code != 0 || !strings.Contains(out, "scoria") {
			t.Errorf("completion %s: exit %d", shell, code)
		}
	}
}

func TestManualPages(t *testing.T) {
	dir := t.TempDir()
	if _, errOut, code := call(t, "none", "docs", dir); code != 0 {
		t.Fatal(errOut)
	}
	b, err := os.ReadFile(filepath.Join(dir, "scoria.1"))
	if err != nil || !strings.Contains(string(b), "Exit status") {
		t.Fatalf("scoria.1: %v\n%s", err, b)
	}
	if _, err := os.Stat(filepath.Join(dir, "scoria-volume-create.1")); err != nil {
		t.Fatal(err)
	}
}

func TestSizes(t *testing.T) {
	for n, want := range map[uint64]string{0: "0 B", 1023: "1023 B", 1 << 10: "1 KiB", 10 << 30: "10 GiB", 3 << 39: "1.5 TiB", 64 << 40: "64 TiB", 1<<64 - 1: "16 EiB"} {
		if got := formatSize(n); got != want {
			t.Errorf("%d is printed as %q; want %q", n, got, want)
		}
	}
}

func TestBar(t *testing.T) {
	for _, tt := range []struct {
		job   control.Job
		width int
		want  string
	}{
		{control.Job{Kind: "check", Volume: "default/v", Done: 1, Total: 2}, 60, "check default/v [===========            ]  50%       2s left"},
		{control.Job{Kind: "delete", Volume: "default/v"}, 30, "delete default/v … 2s         "},
		{control.Job{Kind: "check", Volume: "default/v", Done: 9, Total: 2}, 12, "check defaul"},
		{control.Job{Kind: "check", Volume: "default/v", Done: -5, Total: 2}, 0, ""},
	} {
		if got := bar(&tt.job, 2*time.Second, tt.width); got != tt.want {
			t.Errorf("bar is %q; want %q", got, tt.want)
		}
	}
}
