package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// TestUnits: systemd accepts the units, and they say what the daemons rely on: the run
// directory, with the newest part of the log, outlives the daemon (P3), which is
// restarted whatever happened.
func TestUnits(t *testing.T) {
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	for name, wanted := range map[string][]string{
		"scoriad.service":     {"Type=notify", "Restart=always", "RuntimeDirectory=scoria", "RuntimeDirectoryPreserve=yes", "LimitMEMLOCK=infinity", "LimitNOFILE=", "KillMode=mixed", "LoadCredential=master-keys:"},
		"scoria-asd@.service": {"Type=notify", "Restart=always", "LimitNOFILE=", "KillMode=mixed", "--data-dir ${DATA_DIR}"},
	} {
		b, err := os.ReadFile(filepath.Join("../../packaging/systemd", name))
		if err != nil {
			t.Fatal(err)
		}
		text := string(b)
		for _, line := range wanted {
			if !strings.Contains(text, line) {
				t.Errorf("%s lacks %q", name, line)
			}
		}
		tool, err := exec.LookPath("systemd-analyze")
		if err != nil {
			continue // the lines are checked all the same
		}
		for _, program := range []string{"/usr/bin/scoriad ", "/usr/bin/scoria-asd "} {
			text = strings.ReplaceAll(text, program, self+" ")
		}
		file := filepath.Join(t.TempDir(), strings.Replace(name, "@", "@disk1", 1))
		if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		out, err := exec.Command(tool, "verify", "--man=no", file).CombinedOutput()
		if err != nil || strings.Contains(string(out), filepath.Base(file)) {
			t.Errorf("systemd-analyze verify %s: %v\n%s", name, err, out)
		}
	}
}
