package dirstore

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"scoria/alba/vfs"
	"scoria/driver"
	"scoria/driver/storetest"
)

func open(t testing.TB, fsys vfs.FS, dir string, opts Options) *Store {
	t.Helper()
	s, err := Open(fsys, dir, opts)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func object(s string) driver.Object {
	return driver.Object{Data: strings.NewReader(s), Size: int64(len(s))}
}

func TestConformance(t *testing.T) {
	t.Run("os", func(t *testing.T) {
		storetest.Run(t, func(t *testing.T) driver.Store { return open(t, vfs.OS(), t.TempDir(), Options{}) })
	})
	t.Run("os-few-files", func(t *testing.T) {
		storetest.Run(t, func(t *testing.T) driver.Store { return open(t, vfs.OS(), t.TempDir(), Options{OpenFiles: 1}) })
	})
	t.Run("tmpfs", func(t *testing.T) { // another file system than t.TempDir: LocalPath is copied
		storetest.Run(t, func(t *testing.T) driver.Store {
			dir, err := os.MkdirTemp("/dev/shm", "dirstore-test-")
			if err != nil {
				t.Skip("no tmpfs at /dev/shm:", err)
			}
			t.Cleanup(func() { os.RemoveAll(dir) })
			return open(t, vfs.OS(), dir, Options{})
		})
	})
	t.Run("mem", func(t *testing.T) {
		storetest.Run(t, func(t *testing.T) driver.Store { return open(t, vfs.NewMem(), "/store", Options{}) })
	})
}

func TestP1P4Crash(t *testing.T) {
	storetest.RunCrash(t, func(fsys vfs.FS) (driver.Store, error) { return Open(fsys, "/data/store", Options{}) })
}

// TestTwoInstances: two processes on one directory see each other's objects and
// fences, and an opening does not take a living instance's temporary files.
func TestTwoInstances(t *testing.T) {
	ctx := t.Context()
	dir := t.TempDir()
	a := open(t, vfs.OS(), dir, Options{})
	must(t, a.CreateNamespace(ctx, "v"))
	data := bytes.Repeat([]byte("x"), 3<<20)
	var b *Store
	src := readerAt(func(p []byte, off int64) (int, error) {
		if b == nil {
			b = open(t, vfs.OS(), dir, Options{})
		}
		return bytes.NewReader(data).ReadAt(p, off)
	})
	must(t, a.Put(ctx, "v", "o", 1, driver.Object{Data: src, Size: int64(len(data))}))
	size, err := b.Size(ctx, "v", "o")
	must(t, err)
	if size != int64(len(data)) {
		t.Fatalf("size %d", size)
	}
	must(t, b.Fence(ctx, "v", 2))
	if err := a.Put(ctx, "v", "p", 1, object("p")); !errors.Is(err, driver.ErrStaleEpoch) {
		t.Fatalf("put past another process's fence: %v", err)
	}
}

type readerAt func(p []byte, off int64) (int, error)

func (f readerAt) ReadAt(p []byte, off int64) (int, error) { return f(p, off) }

// TestLockHonoursContext: a lock that another process holds for long delays a
// put only until its context ends.
func TestLockHonoursContext(t *testing.T) {
	m := vfs.NewMem()
	s := open(t, m, "d", Options{})
	must(t, s.CreateNamespace(t.Context(), "v"))
	l, err := m.Lock("d/v/lock")
	must(t, err)
	ctx, cancel := context.WithCancel(t.Context())
	m.SetHook(func(op vfs.Op, name string) error {
		if op == vfs.OpLock {
			cancel()
		}
		return nil
	})
	err = s.Put(ctx, "v", "o", 1, object("x"))
	if !errors.Is(err, context.Canceled) || !errors.Is(err, vfs.ErrLocked) {
		t.Fatalf("put under another's lock: %v", err)
	}
	m.SetHook(nil)
	must(t, l.Close())
	must(t, s.Put(t.Context(), "v", "o", 1, object("x")))
	if names, _ := m.List(s.temp); len(names) != 1 {
		t.Fatalf("temporary files left: %v", names)
	}
}

func TestOrphansAreRemoved(t *testing.T) {
	m := vfs.NewMem()
	s, err := Open(m, "d", Options{})
	must(t, err)
	must(t, s.CreateNamespace(t.Context(), "v"))
	var killed *vfs.Mem
	m.SetHook(func(op vfs.Op, name string) error {
		if op == vfs.OpRename && killed == nil {
			killed, err = m.KillClone()
		}
		return nil
	})
	if err := s.Put(t.Context(), "v", "o", 1, object("x")); !errors.Is(err, vfs.ErrKilled) {
		t.Fatal(err)
	}
	must(t, err)
	old := path.Join("d", tempDir)
	if names, _ := killed.List(s.temp); len(names) != 2 {
		t.Fatalf("the killed put left %v", names)
	}
	s = open(t, killed, "d", Options{})
	if names, _ := killed.List(old); len(names) != 1 || path.Join(old, names[0]) != s.temp {
		t.Fatalf("instances left: %v", names)
	}
}

func TestForeignDirectory(t *testing.T) {
	dir := t.TempDir()
	must(t, os.WriteFile(filepath.Join(dir, "precious"), nil, 0o600))
	if _, err := Open(vfs.OS(), dir, Options{}); !errors.Is(err, ErrFormat) {
		t.Fatalf("opened a foreign directory: %v", err)
	}
	dir = t.TempDir()
	must(t, os.WriteFile(filepath.Join(dir, formatName), []byte("scoria directory store 2\n"), 0o600))
	if _, err := Open(vfs.OS(), dir, Options{}); !errors.Is(err, ErrFormat) {
		t.Fatalf("opened another version's directory: %v", err)
	}
}

// TestLinkedCopyFailsToSync: after a linked file failed to sync, a repetition
// must not take the same file's word for it.
func TestLinkedCopyFailsToSync(t *testing.T) {
	m := vfs.NewMem()
	s := open(t, m, "d", Options{})
	must(t, s.CreateNamespace(t.Context(), "v"))
	f, err := m.Open("sco", vfs.Create)
	must(t, err)
	_, err = f.WriteAt([]byte("contents"), 0)
	must(t, err)
	fail := true
	linked := 0
	m.SetHook(func(op vfs.Op, name string) error {
		if op == vfs.OpLink {
			linked++
		}
		if op == vfs.OpSync && fail {
			return syscall.EIO
		}
		return nil
	})
	obj := object("contents")
	obj.LocalPath = "sco"
	if err := s.Put(t.Context(), "v", "o", 1, obj); !errors.Is(err, syscall.EIO) {
		t.Fatalf("put: %v", err)
	}
	fail = false
	must(t, s.Put(t.Context(), "v", "o", 1, obj))
	if linked != 1 {
		t.Fatalf("linked %d times", linked)
	}
}

func TestDiskFull(t *testing.T) {
	m := vfs.NewMem()
	s := open(t, m, "d", Options{})
	must(t, s.CreateNamespace(t.Context(), "v"))
	m.SetCapacity(1 << 20)
	big := object(strings.Repeat("x", 2<<20))
	if err := s.Put(t.Context(), "v", "o", 1, big); !errors.Is(err, syscall.ENOSPC) {
		t.Fatalf("put on a full disk: %v", err)
	}
	if used := m.Used(); used > 64<<10 {
		t.Fatalf("a failed put keeps %d bytes", used)
	}
	m.SetCapacity(0)
	must(t, s.Put(t.Context(), "v", "o", 1, big))
}

func TestOpenFilesAreBounded(t *testing.T) {
	m := vfs.NewMem()
	s := open(t, m, "d", Options{OpenFiles: 4})
	ctx := t.Context()
	must(t, s.CreateNamespace(ctx, "v"))
	for i := range 20 {
		name := fmt.Sprint(i)
		must(t, s.Put(ctx, "v", name, 1, object(name)))
		must(t, s.ReadAt(ctx, "v", name, make([]byte, 1), 0))
		if n := len(s.files.files); n > 4 || n != s.files.recent.Len() {
			t.Fatalf("%d files open", n)
		}
	}
	must(t, s.Close())
	if err := s.ReadAt(ctx, "v", "1", make([]byte, 1), 0); !errors.Is(err, ErrClosed) {
		t.Fatalf("read after close: %v", err)
	}
	if n := len(s.files.files); n != 0 {
		t.Fatalf("%d files open after close", n)
	}
}

func TestEpochGolden(t *testing.T) {
	golden, err := os.ReadFile("testdata/epoch-v1")
	if errors.Is(err, os.ErrNotExist) && os.Getenv("UPDATE_GOLDEN") != "" {
		must(t, os.MkdirAll("testdata", 0o755))
		must(t, os.WriteFile("testdata/epoch-v1", encodeEpoch(0x0102030405060708), 0o644))
		t.Skip("written")
	}
	must(t, err)
	if !bytes.Equal(golden, encodeEpoch(0x0102030405060708)) {
		t.Fatal("the epoch file's format changed")
	}
	epoch, err := decodeEpoch(golden)
	must(t, err)
	if epoch != 0x0102030405060708 {
		t.Fatalf("epoch %#x", epoch)
	}
	for i := range golden {
		bad := bytes.Clone(golden)
		bad[i] ^= 1
		if _, err := decodeEpoch(bad); !errors.Is(err, ErrEpochFile) {
			t.Fatalf("byte %d flipped: %v", i, err)
		}
	}
}

func TestDamagedEpochFailsChanges(t *testing.T) {
	m := vfs.NewMem()
	s := open(t, m, "d", Options{})
	must(t, s.CreateNamespace(t.Context(), "v"))
	must(t, s.Put(t.Context(), "v", "o", 1, object("x")))
	must(t, s.Fence(t.Context(), "v", 3))
	must(t, m.Corrupt("d/v/epoch", 20))
	for what, err := range map[string]error{
		"put":    s.Put(t.Context(), "v", "p", 3, object("x")),
		"delete": s.Delete(t.Context(), "v", "o", 3),
		"fence":  s.Fence(t.Context(), "v", 4),
	} {
		if !errors.Is(err, ErrEpochFile) {
			t.Errorf("%s: %v", what, err)
		}
	}
	must(t, s.ReadAt(t.Context(), "v", "o", make([]byte, 1), 0))
}

func FuzzDecodeEpoch(f *testing.F) {
	f.Add(encodeEpoch(1))
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, b []byte) {
		if epoch, err := decodeEpoch(b); err == nil && !bytes.Equal(b, encodeEpoch(epoch)) {
			t.Fatalf("%x is accepted as epoch %d", b, epoch)
		}
	})
}

func BenchmarkReadAt4K(b *testing.B) {
	s := open(b, vfs.OS(), b.TempDir(), Options{})
	must(b, s.CreateNamespace(b.Context(), "v"))
	must(b, s.Put(b.Context(), "v", "sco", 1, object(strings.Repeat("x", 1<<20))))
	p := make([]byte, 4096)
	b.ReportAllocs()
	for i := 0; b.Loop(); i++ {
		if err := s.ReadAt(b.Context(), "v", "sco", p, int64(i%256)*4096); err != nil {
			b.Fatal(err)
		}
	}
}
