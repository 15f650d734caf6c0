package integration

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestRename: a volume has its contents, snapshots and sockets under its new name at
// once, and after the death of the daemon.
func TestRename(t *testing.T) {
	e := start(t)
	e.must(e.Create(e.ctx, "v", "64M"))
	e.qemuIO("v", "-c", "write -P 1 0 8M", "-c", "flush")
	e.cli("snapshot create v@one")
	e.qemuIO("v", "-c", "write -P 2 0 4M", "-c", "flush")
	e.cli("volume limit v --write-iops 1000")
	e.cli("volume rename v web")
	for range 2 {
		e.qemuIO("web", "-r", "-c", "read -P 2 0 4M", "-c", "read -P 1 4M 4M")
		e.qemuIO("web@one", "-r", "-c", "read -P 1 0 8M")
		old, now := filepath.Join(filepath.Dir(e.VhostSocket("web")), "v.sock"), e.VhostSocket("web")
		if _, err := os.Stat(old); !os.IsNotExist(err) {
			t.Fatalf("the old socket: %v", err)
		}
		if _, err := os.Stat(now); err != nil {
			t.Fatal(err)
		}
		e.exit(3, "volume show v", "no volume")
		if out := e.cli("volume limit web"); !strings.Contains(out, "1000") {
			t.Errorf("limits: %s", out)
		}
		e.must(e.Daemon.Kill())
		e.restart()
	}
}

// TestRegistryRestoredFromABackup: with the registry as it was earlier, snapshots made
// since are there and shown, and those deleted since are not: at once where a directory
// is the store; in the object store, which is not touched before, when the registry has
// been made anew from it.
func TestRegistryRestoredFromABackup(t *testing.T) {
	for _, store := range []string{"directory", "objects"} {
		t.Run(store, func(t *testing.T) { restoredFromABackup(t, store) })
	}
}

func restoredFromABackup(t *testing.T, store string) {
	e := prepare(t)
	e.Config = filepath.Join(scratch(t, false), "scoria.toml")
	e.must(os.WriteFile(e.Config, fmt.Appendf(nil, "data_dir = %q\nrun_dir = %q\n[pool]\nstore = %q\n", e.DataDir, e.RunDir, store), 0o600))
	e.must(e.Start(e.ctx))
	const v = "v"
	e.must(e.Create(e.ctx, v, "64M"))
	e.qemuIO(v, "-c", "write -P 1 0 4M", "-c", "flush")
	e.cli("snapshot create v@old")
	e.must(e.Daemon.Stop(e.ctx))
	registry := filepath.Join(e.DataDir, "registry.db")
	backup, err := os.ReadFile(registry)
	e.must(err)
	e.restart()
	e.qemuIO(v, "-c", "write -P 2 0 4M", "-c", "flush")
	e.cli("snapshot create v@new --meta reason=test")
	e.cli("snapshot delete v@old")
	e.qemuIO(v, "-c", "write -P 3 0 4M", "-c", "flush")
	if store == "objects" {
		e.must(e.Daemon.Stop(e.ctx)) // so that the storage daemons were told of all
	} else {
		e.must(e.Daemon.Kill())
	}
	e.must(os.WriteFile(registry, backup, 0o600))
	e.restart()
	if store == "objects" {
		if out := e.cli("status"); !strings.Contains(out, "registry-is-older") || !strings.Contains(out, "rebuild-registry") {
			t.Fatalf("status: %s", out)
		}
		e.must(e.Daemon.Stop(e.ctx))
		e.cli("backend rebuild-registry --data-dir " + e.DataDir)
		e.restart()
	}
	if out := e.cli("snapshot list v"); !strings.Contains(out, "new") || !strings.Contains(out, "ready,adopted") || !strings.Contains(out, "reason=test") || strings.Contains(out, "old") {
		t.Fatalf("snapshots: %s", out)
	}
	if out := e.cli("volume show v"); !strings.Contains(out, "snapshots-adopted") || store == "directory" && !strings.Contains(out, "snapshot-gone") {
		t.Errorf("conditions: %s", out)
	}
	e.qemuIO("v@new", "-r", "-c", "read -P 2 0 4M")
	e.qemuIO(v, "-r", "-c", "read -P 3 0 4M")
	e.cli("snapshot rename v@new kept")
	if out := e.cli("volume show v"); strings.Contains(out, "snapshots-adopted") {
		t.Errorf("conditions: %s", out)
	}
	e.cli("volume check v")
}
