package mem

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// ErrFileSystem: a file that is to be mapped lies where a page of it may never come.
var ErrFileSystem = errors.New("memory must be a memfd, or a file on tmpfs, hugetlbfs, ext4, XFS, Btrfs or ZFS")

// zfsMagic is ZFS's f_type, which the kernel's headers do not have.
const zfsMagic = 0x2fc12fc1

// checkFile fails with ErrFileSystem unless fd, which a peer may have sent, is a file
// whose pages come without the peer's help. A fault on a page of a FUSE file waits for
// a process of the peer's choice, on a network file system for another host, and on a
// device for its driver; whoever touches the page, a worker of all volumes, waits along
// and can't be interrupted. Overlays are refused since they hide what is below. Local
// file systems are trusted to answer: QEMU's memory-backend-file may lie on a disk.
func checkFile(fd int) error {
	// Only shared memory and huge pages know seals; no file system is asked.
	if _, err := unix.FcntlInt(uintptr(fd), unix.F_GET_SEALS, 0); err == nil {
		return nil
	}
	var fs unix.Statfs_t
	if err := unix.Fstatfs(fd, &fs); err != nil {
		return os.NewSyscallError("fstatfs", err)
	}
	if !trusted(fs.Type) {
		return fmt.Errorf("the file system is %s: %w", fileSystemName(fs.Type), ErrFileSystem)
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return os.NewSyscallError("fstat", err)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return fmt.Errorf("file of type %#o is no regular file: %w", st.Mode&unix.S_IFMT, ErrFileSystem)
	}
	return nil
}

// trusted is about a file system's f_type (statfs(2)).
func trusted(magic int64) bool {
	switch magic {
	case unix.TMPFS_MAGIC, unix.HUGETLBFS_MAGIC, // in kernels where memfd_create is left out
		unix.EXT4_SUPER_MAGIC, unix.XFS_SUPER_MAGIC, unix.BTRFS_SUPER_MAGIC, zfsMagic:
		return true
	}
	return false
}

func fileSystemName(magic int64) string {
	switch magic {
	case unix.FUSE_SUPER_MAGIC:
		return "FUSE"
	case unix.NFS_SUPER_MAGIC:
		return "NFS"
	case unix.OVERLAYFS_SUPER_MAGIC:
		return "an overlay"
	}
	return fmt.Sprintf("of type %#x", magic)
}
