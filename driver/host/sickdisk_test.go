package host

import (
	"context"
	"errors"
	"io/fs"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/rs/zerolog"

	"scoria/alba/vfs"
	"scoria/driver/block"
	"scoria/driver/control"
)

// sickFS is a file system of which one tree can't be synced, or one file not be opened,
// for a while.
type sickFS struct {
	vfs.FS
	mu      sync.Mutex
	tree    string // "": all is well
	failed  int    // syncs
	missing string // "": all files are there

	hanging string        // opening it hangs
	hang    chan struct{} // until this is closed

	quota int64 // bytes that fit below root; 0: what the real one says
	root  string
}

// hangs makes the opening of a file hang until the function that it returns is called.
func (s *sickFS) hangs(name string) (goOn func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	hang := make(chan struct{})
	s.hanging, s.hang = name, hang
	return sync.OnceFunc(func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.hanging = ""
		close(hang)
	})
}

// miss makes a file unreadable; "": none is.
func (s *sickFS) miss(name string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.missing = name
}

// limit makes the file system seem that small. What has several links counts once.
func (s *sickFS) limit(root string, quota int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.root, s.quota = root, quota
}

func (s *sickFS) Free(name string) (uint64, error) {
	s.mu.Lock()
	root, quota := s.root, s.quota
	s.mu.Unlock()
	if quota == 0 {
		return s.FS.Free(name)
	}
	var used int64
	seen := map[uint64]bool{}
	err := filepath.WalkDir(root, func(_ string, d fs.DirEntry, err error) error {
		var info fs.FileInfo
		if err == nil {
			info, err = d.Info()
		}
		if errors.Is(err, fs.ErrNotExist) {
			return nil // removed meanwhile
		}
		if err != nil {
			return err
		}
		if st, ok := info.Sys().(*syscall.Stat_t); ok && !seen[st.Ino] {
			seen[st.Ino] = true
			used += st.Blocks * 512
		}
		return nil
	})
	return uint64(max(0, quota-used)), err
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
	s.mu.Lock()
	missing := s.missing != "" && s.missing == name
	var hang chan struct{}
	if s.hanging == name {
		hang = s.hang
	}
	s.mu.Unlock()
	if hang != nil {
		<-hang
	}
	if missing {
		return nil, &fs.PathError{Op: "open", Path: name, Err: syscall.EIO}
	}
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
	h, client := startOn(t, c, fsys)
	return h, client, fsys
}

func startOn(t *testing.T, c Config, fsys vfs.FS) (*Host, *control.Client) {
	t.Helper()
	h, err := StartOn(testContext(t), Parts{FS: fsys}, c, "test", zerolog.Nop())
	if err != nil {
		t.Fatal(err)
	}
	client := control.NewClient(c.controlSocket())
	t.Cleanup(client.Close)
	return h, client
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

// startOnlyDisk is a daemon as it is installed: with one storage daemon, below its
// own directory, and two volumes in it. What safe/old has is only there.
func startOnlyDisk(t *testing.T, c Config, pages int) (*Host, *control.Client, *sickFS) {
	t.Helper()
	h, client, _ := startSick(t, c)
	if _, err := client.CreatePool(testContext(t), control.CreatePool{Name: "safe", SCOSize: 1 << 20}); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"safe/old", "safe/v"} {
		if v, err := client.CreateVolume(testContext(t), control.CreateVolume{Name: name, Size: 64 << 20}); err != nil || v.Preset != DefaultPreset {
			t.Fatalf("%+v, %v", v, err)
		}
	}
	fillVolume(t, h, "safe/old", pages, 1)
	fillVolume(t, h, "safe/v", pages, 1)
	stopHost(t, h) // closes what is being written
	h, _, _ = startSick(t, c)
	if _, err := h.volumes.Open(testContext(t), "safe/old"); err != nil {
		t.Fatal(err)
	}
	await(t, "objects to be only in the store", func() bool {
		st := h.volumes.device("safe/old").Stats()
		return st.UploadBacklog == 0 && st.Space.Local == 0
	})
	stopHost(t, h) // and what is in memory
	h, client, fsys := startSick(t, c)
	for _, name := range []string{"safe/old", "safe/v"} {
		if _, err := h.volumes.Open(testContext(t), name); err != nil {
			t.Fatal(err)
		}
	}
	return h, client, fsys
}

// shows says that a volume has a condition with these words.
func shows(t *testing.T, client *control.Client, volume, code string, words ...string) bool {
	t.Helper()
	v, err := client.Volume(testContext(t), volume)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range v.Conditions {
		ok := c.Code == code
		for _, w := range words {
			ok = ok && strings.Contains(c.Message, w)
		}
		if ok {
			return true
		}
	}
	return false
}

// onlyDisk is the storage daemon.
func onlyDisk(t *testing.T, client *control.Client) control.ASD {
	t.Helper()
	list, err := client.ASDs(testContext(t))
	if err != nil || len(list) != 1 {
		t.Fatalf("storage daemons %+v, %v", list, err)
	}
	return list[0]
}

// awaitHealed waits until all is well again without anybody's help.
func awaitHealed(t *testing.T, h *Host, client *control.Client) {
	t.Helper()
	await(t, "the disk to be used again", func() bool {
		a := onlyDisk(t, client)
		return a.Up && a.Reopened > 0 && strings.Contains(a.LastFailure, "input/output error")
	})
	await(t, "the uploads to go on", func() bool { return h.volumes.device("safe/v").Stats().UploadBacklog == 0 })
	await(t, "no trouble to show any more", func() bool {
		st, err := client.Status(testContext(t))
		if err != nil {
			t.Fatal(err)
		}
		old, v := h.volumes.device("safe/old").Stats(), h.volumes.device("safe/v").Stats()
		return len(st.Conditions)+len(old.Conditions)+len(v.Conditions) == 0
	})
}

// TestP8OnlyDiskIsSick: with one copy of everything, on the daemon's own storage
// daemon whose disk fails its syncs, guests write, flush and read; while that is
// opened anew, reads of what only it has wait, visibly, and they end right when it is
// back. What was flushed meanwhile is there after a restart.
func TestP8OnlyDiskIsSick(t *testing.T) {
	const pages = 64
	c := objectConfig(t)
	h, client, fsys := startOnlyDisk(t, c, pages)
	asd := embeddedDir(c.DataDir)
	fsys.sick(asd)
	fillVolume(t, h, "safe/v", pages, 2)
	await(t, "the failure to be told", func() bool {
		a := onlyDisk(t, client)
		return !a.Up && strings.Contains(a.Reason, "input/output error") && strings.Contains(a.Reason, "test write")
	})
	await(t, "uploads that wait to be told", func() bool { return shows(t, client, "safe/v", "store-unreachable", "input/output error") })
	fillVolume(t, h, "safe/v", pages, 3)
	verifyVolume(t, h, "safe/v", pages, 3)
	verifyVolume(t, h, "safe/old", pages/2, 1)

	fsys.miss(filepath.Join(asd, "identity"))
	fsys.sick("")
	await(t, "opening the disk anew to fail", func() bool { return strings.Contains(onlyDisk(t, client).Reason, "identity") })
	dev, err := h.volumes.Open(testContext(t), "safe/old")
	if err != nil {
		t.Fatal(err)
	}
	p := make([]byte, 64<<10)
	read := make(chan error, 1)
	r := &block.Request{Op: block.OpRead, Offset: (pages - 1) << 16, Length: uint64(len(p)), Segments: [][]byte{p}, Complete: func(r *block.Request) { read <- r.Err }}
	dev.Submit([]*block.Request{r})
	if r.Ended {
		t.Fatalf("a read of what nobody has ended with %v", r.Err)
	}
	await(t, "reads that wait to be told", func() bool { return shows(t, client, "safe/old", "store-unreadable") })
	fillVolume(t, h, "safe/v", pages, 4)
	select {
	case err := <-read:
		t.Fatalf("the read ended with %v", err)
	default:
	}

	fsys.miss("")
	await(t, "the read to end", func() bool { return len(read) == 1 })
	if err := <-read; err != nil || string(p) != string(page(pages-1, 1)) {
		t.Fatalf("read of the only disk: %v, right: %v", err, string(p) == string(page(pages-1, 1)))
	}
	awaitHealed(t, h, client)
	verifyVolume(t, h, "safe/v", pages, 4)
	stopHost(t, h)
	h, _ = startHost(t, c)
	verifyVolume(t, h, "safe/v", pages, 4)
	verifyVolume(t, h, "safe/old", pages, 1)
	stopHost(t, h)
}

// TestP8OnlyDiskIsSickForLong: when what can't be stored has filled the disk up to
// the reserve, writers pause, visibly; when the storage daemon's disk takes writes
// again, they go on by themselves, and no request has failed.
func TestP8OnlyDiskIsSickForLong(t *testing.T) {
	for _, c := range []struct {
		name            string
		reserve, beside Size
	}{
		{"write buffer larger than the reserve", 32 << 20, 80 << 20},
		{"write buffer larger than the disk", 40 << 20, 16 << 20},
	} {
		t.Run(c.name, func(t *testing.T) { sickForLong(t, c.reserve, c.beside) })
	}
}

func sickForLong(t *testing.T, reserve, beside Size) {
	const pages, rounds = 64, 48 // 192 MiB, of which the write buffer takes 64
	c := objectConfig(t)
	c.Cache.Reserve = reserve
	h, client, fsys := startOnlyDisk(t, c, pages)
	fsys.limit(c.DataDir, int64(reserve+beside))
	fsys.sick(embeddedDir(c.DataDir))
	dev, err := h.volumes.Open(testContext(t), "safe/v")
	if err != nil {
		t.Fatal(err)
	}
	written := make(chan error, 1)
	go func() { written <- writeRounds(t.Context(), dev, pages, rounds) }()
	await(t, "writers to pause", func() bool {
		if len(written) > 0 {
			t.Fatalf("they ended with %v", <-written)
		}
		return shows(t, client, "safe/v", "disk-full") && shows(t, client, "safe/v", "store-unreachable", "input/output error")
	})
	fsys.sick("")
	await(t, "writers to end", func() bool { return len(written) == 1 })
	if err := <-written; err != nil {
		t.Fatal(err)
	}
	awaitHealed(t, h, client)
	verifyVolume(t, h, "safe/v", pages, rounds)
	stopHost(t, h)
	h, _ = startHost(t, c)
	verifyVolume(t, h, "safe/v", pages, rounds)
	verifyVolume(t, h, "safe/old", pages, 1)
	stopHost(t, h)
}

// writeRounds writes the same pages again and again, with a flush behind each round.
func writeRounds(ctx context.Context, dev block.Device, pages, rounds int) error {
	do := func(r *block.Request) error {
		done := make(chan struct{})
		r.Complete = func(*block.Request) { close(done) }
		dev.Submit([]*block.Request{r})
		if !r.Ended {
			select {
			case <-done:
			case <-ctx.Done():
				return ctx.Err()
			}
		}
		return r.Err
	}
	for seed := 1; seed <= rounds; seed++ {
		for i := range pages {
			p := page(i, byte(seed))
			if err := do(&block.Request{Op: block.OpWrite, Offset: uint64(i) << 16, Length: uint64(len(p)), Segments: [][]byte{p}}); err != nil {
				return err
			}
		}
		if err := do(&block.Request{Op: block.OpFlush}); err != nil {
			return err
		}
	}
	return nil
}
