package bed

import (
	"os"
	"testing"
)

// Require skips a test that needs root, QEMU and the rest of `make deps` when
// those are absent on a developer's machine. Where the test is the point (CI is
// set, or SCORIA_REQUIRE by make test) absence is a failure.
func Require(t *testing.T) {
	t.Helper()
	must := os.Getenv("CI") != "" || os.Getenv("SCORIA_REQUIRE") != ""
	lack := t.Skipf
	if must {
		lack = t.Fatalf
	}
	if os.Geteuid() != 0 {
		lack("needs root")
	}
	for _, name := range []string{"qemu-system-x86_64", "qemu-storage-daemon", "fio", "nbdinfo", "busybox"} {
		if _, err := Run(t.Context(), "sh", "-c", `command -v "$1"`, "sh", name); err != nil {
			lack("%s is not installed: run make deps", name)
		}
	}
	cache, err := CacheDir()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(cache + "/kernel"); err != nil {
		lack("no guest kernel: run make deps")
	}
}
