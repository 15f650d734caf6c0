package host

import (
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/rs/zerolog"

	"scoria/alba/vfs"
	"scoria/driver/control"
)

// sickFS is a file system of which one tree can't be synced for a while.
type sickFS struct {
	vfs.FS
	mu     sync.Mutex
	tree   string // "": all is well
	failed int    // syncs
}

func (s *sickFS) sick(tree string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.tree, s.failed = tree, 0
}

func (s *sickFS) failures() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.failed
}

func (s *sickFS) sync(name string, fn func() error) error {
	s.mu.Lock()
	sick := s.tree != "" && strings.HasPrefix(name, s.tree)
	if sick {
		s.failed++
	}
	s.mu.Unlock()
	if sick {
		return syscall.EIO
	}
	return fn()
}

func (s *sickFS) Open(name string, flags vfs.OpenFlag) (vfs.File, error) {
	f, err := s.FS.Open(name, flags)
	if err != nil {
		return nil, err
	}
	return sickFile{f, s, name}, nil
}

func (s *sickFS) SyncDir(name string) error {
	return s.sync(name, func() error { return s.FS.SyncDir(name) })
}

type sickFile struct {
	vfs.File
	fs   *sickFS
	name string
}

func (f sickFile) Sync() error { return f.fs.sync(f.name, f.File.Sync) }

func startSick(t *testing.T, c Config) (*Host, *control.Client, *sickFS) {
	t.Helper()
	fsys := &sickFS{FS: vfs.OS()}
	h, err := StartOn(testContext(t), Parts{FS: fsys}, c, "test", zerolog.Nop())
	if err != nil {
		t.Fatal(err)
	}
	client := control.NewClient(c.controlSocket())
	t.Cleanup(client.Close)
	return h, client, fsys
}

// TestP8GuestsOutliveASickDisk: while an embedded storage daemon's disk fails its
// syncs, guests write, flush and read; the daemon says which disk and why; when the
// disk takes writes again it is used again, without a restart.
func TestP8GuestsOutliveASickDisk(t *testing.T) {
	c := emptyConfig(t)
	c.Cache.Local, c.Cache.Read = 0, 0 // reads come from the store
	h, client, fsys := startSick(t, c)
	defer stopHost(t, h)
	asds := objectPool(t, client)
	if _, err := client.SetPreset(testContext(t), control.Preset{Name: "safe", Policies: []control.Policy{{K: 2, M: 1, C: 3, X: 1}, {K: 1, M: 1, C: 2, X: 1}}}); err != nil {
		t.Fatal(err)
	}
	const pages = 128
	fill(t, h, pages, 1)
	await(t, "objects to be stored", func() bool { _, ok := worst(t, client); return ok })

	sick := asds[1]
	fsys.sick(sick.Address)
	fill(t, h, pages, 2)
	await(t, "the failure to be told", func() bool {
		a, err := client.ASD(testContext(t), sick.ID)
		return err == nil && !a.Up && strings.Contains(a.Reason, "input/output error") && strings.Contains(a.Reason, "attempt")
	})
	await(t, "test writes to fail", func() bool { return fsys.failures() > 3 })
	verify(t, h, pages, 2)
	fill(t, h, pages, 3)
	st, err := client.Status(testContext(t))
	if err != nil || len(st.Conditions) != 1 || st.Conditions[0].Code != "asd-down" || !strings.Contains(st.Conditions[0].Message, sick.ID) {
		t.Fatalf("status %+v, %v", st, err)
	}

	fsys.sick("")
	await(t, "the disk to be used again", func() bool {
		a, err := client.ASD(testContext(t), sick.ID)
		return err == nil && a.Up && a.Reopened == 1 && strings.Contains(a.LastFailure, "input/output error")
	})
	verify(t, h, pages, 3)
	if _, err := client.StartBackendJob(testContext(t), "repair"); err != nil {
		t.Fatal(err)
	}
	await(t, "all objects to be as safe as before", func() bool { n, ok := worst(t, client); return ok && n == 1 })
	fill(t, h, pages, 4)
	verify(t, h, pages, 4)
}
