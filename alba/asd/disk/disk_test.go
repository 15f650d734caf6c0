package disk

import (
	"testing"

	"scoria/alba/asd"
	"scoria/alba/asd/asdtest"
	"scoria/alba/vfs"
)

// testOptions suit file systems of a few MiB.
var testOptions = Options{ReserveBytes: 1 << 20, CacheBytes: 1 << 20}

func open(t testing.TB, fsys vfs.FS, dir string, opts Options) *Disk {
	t.Helper()
	d, err := Open(fsys, dir, opts)
	if err != nil {
		t.Fatal(err)
	}
	return d
}

func TestConformance(t *testing.T) {
	t.Run("mem", func(t *testing.T) {
		asdtest.Run(t, func(t *testing.T) asd.Client { return open(t, vfs.NewMem(), "/asd", testOptions) })
	})
	t.Run("os", func(t *testing.T) {
		asdtest.Run(t, func(t *testing.T) asd.Client { return open(t, vfs.OS(), t.TempDir(), testOptions) })
	})
	t.Run("files only", func(t *testing.T) {
		opts := testOptions
		opts.InlineBytes, opts.Handles, opts.Slots = 1, 2, 2
		asdtest.Run(t, func(t *testing.T) asd.Client { return open(t, vfs.NewMem(), "/asd", opts) })
	})
}
