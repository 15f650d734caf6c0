package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/rs/zerolog"

	"scoria/driver/host"
)

// rebuilt answers for the directories /srv/whole and /srv/torn with fixed data; all
// others are real.
func rebuilt(ctx context.Context, c host.Config, req host.RebuildRequest, log zerolog.Logger) (host.RebuildReport, error) {
	r := host.RebuildReport{
		ASDs: 1, Presets: 1, Objects: 120, Pools: []string{"default"}, Missing: []string{}, Lost: []string{}, Superseded: []string{}, Problems: []string{},
		Volumes: []host.RebuiltVolume{{Name: "default/vm1", ID: "6ba7b810-9dad-41d1-80b4-00c04fd430c8", Size: 10 << 30}},
	}
	switch c.DataDir {
	case "/srv/whole":
		req.Progress("storage daemons to be read: 1")
		return r, nil
	case "/srv/torn":
		if !req.Force || req.Progress != nil || !slices.Equal(req.ASDs, []string{"10.0.0.5:9711", "/srv/disk1"}) || c.Backend.MasterKeys != "/etc/keys" {
			return r, fmt.Errorf("asked for %+v with %+v", req, c.Backend)
		}
		r.ASDs, r.Pools = 2, []string{"default", "fast"}
		r.Volumes = append(r.Volumes, host.RebuiltVolume{Name: "fast/recovered-7ba7b810", ID: "7ba7b810-9dad-41d1-80b4-00c04fd430c8", Size: 1 << 40,
			Note: "no copy of its record was found: name, serial number, limits and the block size of 512 bytes may have been others"})
		r.Missing, r.Lost = []string{"2f0c8a52-95fd-4a29-8db4-5f4e7b3b3f3c"}, []string{"6ba7b810-9dad-41d1-80b4-00c04fd430c8/sco-7: 1 of 3 shards found, needed are 2"}
		r.Superseded, r.Problems = []string{"6ba7b810-9dad-41d1-80b4-00c04fd430c8/record-1"}, []string{"ASD at 10.0.0.6:9711: connection refused"}
		r.Previous = "/srv/torn/registry.db.20260102T030405.000Z"
		return r, nil
	}
	return host.RebuildRegistry(ctx, c, req, log)
}

// TestRebuildRefusals holds what is said, and exited with, where a registry can't be
// rebuilt, and that nothing is made there then.
func TestRebuildRefusals(t *testing.T) {
	dir := t.TempDir()
	file := func(name, text string) {
		t.Helper()
		name = filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(name), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(name, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	file("empty/instance.json.was", "")
	file("garbage/registry.db", strings.Repeat("garbage\r\n", 100))
	file("keys", "no key\n")
	file("tls.toml", "data_dir = \""+dir+"/empty\"\n[backend]\ntls_ca = \"/nosuch\"\n")
	file("keys.toml", "data_dir = \""+dir+"/empty\"\n[backend]\nmaster_keys = \"credential:master-keys\"\n")
	t.Setenv("CREDENTIALS_DIRECTORY", "")
	var got strings.Builder
	for _, args := range []string{
		"--data-dir DIR/nosuch",
		"--data-dir DIR/empty extra",
		"--data-dir DIR/empty",
		"--data-dir DIR/empty --asd DIR/disk1 --asd DIR/disk2",
		"--data-dir DIR/empty --asd 127.0.0.1:1 --asd 127.0.0.1:1",
		"--data-dir DIR/empty --asd 127.0.0.1:1",
		"--data-dir DIR/empty --asd 127.0.0.1:1 --force",
		"--data-dir DIR/empty --asd 127.0.0.1:1 --master-keys DIR/nosuch",
		"--data-dir DIR/empty --asd 127.0.0.1:1 --master-keys DIR/keys",
		"--config DIR/nosuch.toml",
		"--config DIR/tls.toml",
		"--config DIR/keys.toml --asd 127.0.0.1:1",
		"--data-dir DIR/garbage",
	} {
		out, errOut, code := call(t, "none", strings.Fields("backend rebuild-registry "+strings.ReplaceAll(args, "DIR", dir))...)
		fmt.Fprintf(&got, "$ scoria backend rebuild-registry %s\n%s%sexit status %d\n\n", args, strings.ReplaceAll(out, dir, "DIR"), strings.ReplaceAll(errOut, dir, "DIR"), code)
	}
	golden := filepath.Join("testdata", "backend-rebuild-registry.refused")
	if *update {
		if err := os.WriteFile(golden, []byte(got.String()), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(golden)
	if err != nil {
		t.Fatal(err)
	}
	if got.String() != string(want) {
		t.Errorf("printed\n%s\nwant\n%s", &got, want)
	}
	if left, err := filepath.Glob(filepath.Join(dir, "*", "registry.db*")); err != nil || len(left) != 1 {
		t.Errorf("registries are %v, %v; want the one that was there", left, err)
	}
}
