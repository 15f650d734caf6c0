package mem

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"sync/atomic"
	"syscall"
	"testing"

	"github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// stuckFile is a file of which no page ever comes while the test runs.
type stuckFile struct {
	fs.MemRegularFile
	reads atomic.Int32
	end   chan struct{}
}

func (f *stuckFile) Open(context.Context, uint32) (fs.FileHandle, uint32, syscall.Errno) {
	return nil, 0, 0
}

func (f *stuckFile) Read(context.Context, fs.FileHandle, []byte, int64) (fuse.ReadResult, syscall.Errno) {
	f.reads.Add(1)
	<-f.end
	return nil, syscall.EIO
}

// fuseRoot is the root of a file system with one file.
type fuseRoot struct {
	fs.Inode
	file *stuckFile
}

func (r *fuseRoot) OnAdd(ctx context.Context) {
	r.AddChild("memory", r.NewPersistentInode(ctx, r.file, fs.StableAttr{}), true)
}

// TestP7FUSEMemoryIsRefused: a page of a FUSE file may never come, and who touches it
// waits for ever: it is not mapped. The file is fit in all else.
func TestP7FUSEMemoryIsRefused(t *testing.T) {
	const size = 1 << 20
	file := &stuckFile{MemRegularFile: fs.MemRegularFile{Data: make([]byte, size)}, end: make(chan struct{})}
	file.Attr.Mode = 0o600
	dir := t.TempDir()
	srv, err := fs.Mount(dir, &fuseRoot{file: file}, &fs.Options{MountOptions: fuse.MountOptions{DirectMountStrict: true}})
	if err != nil {
		t.Skipf("no FUSE file system can be mounted here: %v", err)
	}
	t.Cleanup(func() {
		close(file.end)
		if err := srv.Unmount(); err != nil {
			t.Error(err)
		}
	})
	fd, err := unix.Open(filepath.Join(dir, "memory"), unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	whole, err := mmap(fd, 0, size)
	if err != nil {
		t.Fatalf("the kernel itself does not map it, so that this test shows nothing: %v", err)
	}
	munmap(whole)
	m, err := Map(fd, 0, size)
	if err == nil {
		m.Release()
	}
	if !errors.Is(err, ErrFileSystem) {
		t.Fatalf("memory on FUSE: %v", err)
	}
	if n := file.reads.Load(); n != 0 {
		t.Fatalf("%d pages were asked for", n)
	}
	budget := NewBudget(nil, size, 1)
	if _, err := budget.Map(fd, 0, size); !errors.Is(err, ErrFileSystem) {
		t.Fatalf("memory on FUSE, within a budget: %v", err)
	}
	if n, _ := budget.Used(); n != 0 {
		t.Fatalf("%d bytes are counted", n)
	}
}

// TestMapTakesWhatQEMUHas: memfds, sealed or not, and files on tmpfs and on a disk.
func TestMapTakesWhatQEMUHas(t *testing.T) {
	fds := map[string]int{"memfd": memfd(t, 4096)}
	huge, err := unix.MemfdCreate("huge", unix.MFD_CLOEXEC|unix.MFD_HUGETLB)
	if err == nil {
		// A file of no pages: none may be reserved here.
		t.Cleanup(func() { unix.Close(huge) })
		if err := checkFile(huge); err != nil {
			t.Errorf("huge pages: %v", err)
		}
	}
	for _, dir := range []string{"/dev/shm", t.TempDir()} {
		f, err := os.CreateTemp(dir, "scoria-mem-")
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		defer os.Remove(f.Name())
		defer f.Close()
		var st unix.Statfs_t
		if err := errors.Join(f.Truncate(4096), unix.Fstatfs(int(f.Fd()), &st)); err != nil {
			t.Fatal(err)
		}
		if !trusted(st.Type) {
			t.Logf("%s is %s", dir, fileSystemName(st.Type))
			continue
		}
		fds[dir] = int(f.Fd())
	}
	for name, fd := range fds {
		m, err := Map(fd, 0, 4096)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		m.Bytes()[0] = 1
		m.Release()
	}
}

// TestP7OnlyFilesAreMemory: devices, also those on tmpfs, files that are no memory, and
// what has no pages at all.
func TestP7OnlyFilesAreMemory(t *testing.T) {
	device := filepath.Join("/dev/shm", "scoria-mem-device-"+filepath.Base(t.TempDir()))
	if err := unix.Mknod(device, unix.S_IFCHR|0o600, int(unix.Mkdev(1, 5))); err == nil { // /dev/zero
		defer os.Remove(device)
	}
	for _, name := range []string{"/dev/zero", device, "/proc/self/environ", "/dev/shm", t.TempDir()} {
		fd, err := unix.Open(name, unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			t.Logf("%s: %v", name, err)
			continue
		}
		if _, err := Map(fd, 0, 4096); !errors.Is(err, ErrFileSystem) {
			t.Errorf("%s: %v", name, err)
		}
		unix.Close(fd)
	}
	event, err := NewEventFD()
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(event)
	if _, err := Map(event, 0, 8); !errors.Is(err, ErrFileSystem) {
		t.Errorf("eventfd: %v", err)
	}
}

// TestNetworkFileSystemsAreNotTrusted: what can't be mounted in a test.
func TestNetworkFileSystemsAreNotTrusted(t *testing.T) {
	const cifs, smb2, nineP, ceph = 0xff534d42, 0xfe534d42, unix.V9FS_MAGIC, 0x00c36400
	for _, magic := range []int64{unix.FUSE_SUPER_MAGIC, unix.NFS_SUPER_MAGIC, cifs, smb2, nineP, ceph, unix.AFS_SUPER_MAGIC, unix.OVERLAYFS_SUPER_MAGIC, 0} {
		if trusted(magic) {
			t.Errorf("%s is trusted", fileSystemName(magic))
		}
	}
}
