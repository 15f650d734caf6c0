package guest

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"

	"scoria/integration/bed"
)

// grubPackages hold GRUB for BIOSes and the tool that makes its image.
var grubPackages = []string{"grub-pc-bin", "grub-common"}

func grubDir() (string, error) {
	cache, err := bed.CacheDir()
	return filepath.Join(cache, "grub"), err
}

// FindGrub returns fs.ErrNotExist unless GRUB has been fetched.
func FindGrub() error {
	dir, err := grubDir()
	if err != nil {
		return err
	}
	_, err = os.Stat(filepath.Join(dir, "usr", "bin", "grub-mkimage"))
	return err
}

// FetchGrub downloads GRUB's packages and unpacks them into the cache.
func FetchGrub(ctx context.Context) error {
	dir, err := grubDir()
	if err != nil {
		return err
	}
	return fetchPackages(ctx, dir, grubPackages)
}

// GrubGreeting is what GRUB writes to the console of a boot disk's guest.
const GrubGreeting = "grub: loaded from the volume"

// grubConfig is built into GRUB's image.
const grubConfig = `serial --unit=0 --speed=115200
terminal_output serial
echo ` + GrubGreeting + `
linux (hd0,msdos1)/vmlinuz console=ttyS0 quiet panic=-1 mitigations=off
initrd (hd0,msdos1)/initrd
boot
`

// A boot disk, in sectors of 512 bytes:
//
//	0            GRUB's boot.img, which loads sector 1, and the partition table
//	1 …          GRUB's core.img, whose first sector loads the rest from sector 2 on
//	2048 …       one partition with an ext2 file system: /vmlinuz, /initrd
const (
	sectorBytes      = 512
	partitionSector  = 2048
	bootCodeBytes    = 440 // of sector 0; the partition table begins at 446
	partitionTable   = 446
	partitionLinux   = 0x83
	partitionActive  = 0x80
	bootSignatureAt  = 510
	bootDiskMinBytes = 32 << 20
)

// WriteBootDisk makes a raw disk image from which a BIOS boots GRUB, GRUB the
// kernel, and the kernel the small guest image.
func WriteBootDisk(ctx context.Context, file string, size int64) (err error) {
	if size < bootDiskMinBytes {
		return fmt.Errorf("boot disk of %d bytes: kernel and initramfs need at least %d", size, bootDiskMinBytes)
	}
	img, err := BuildSmall(ctx)
	if err != nil {
		return err
	}
	tmp, err := os.MkdirTemp(filepath.Dir(file), "boot-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(tmp)) }()
	tree := filepath.Join(tmp, "tree")
	if err := os.Mkdir(tree, 0o755); err != nil {
		return err
	}
	for name, from := range map[string]string{"vmlinuz": img.Kernel, "initrd": img.Initrd} {
		data, err := os.ReadFile(from)
		if err != nil {
			return err
		}
		if err := os.WriteFile(filepath.Join(tree, name), data, 0o644); err != nil {
			return err
		}
	}
	head, err := grubSectors(ctx, tmp, size)
	if err != nil {
		return err
	}
	if err := os.WriteFile(file, head, 0o644); err != nil {
		return err
	}
	if err := os.Truncate(file, size); err != nil {
		return err
	}
	mke2fs, err := lookPath("mke2fs")
	if err != nil {
		return err
	}
	_, err = bed.Run(ctx, mke2fs, "-q", "-F", "-t", "ext2", "-b", "4096", "-d", tree,
		"-E", "offset="+strconv.Itoa(partitionSector*sectorBytes),
		file, strconv.FormatInt((size-partitionSector*sectorBytes)/4096, 10))
	return err
}

// grubSectors returns what stands before the partition.
func grubSectors(ctx context.Context, tmp string, size int64) ([]byte, error) {
	dir, err := grubDir()
	if err != nil {
		return nil, err
	}
	modules := filepath.Join(dir, "usr", "lib", "grub", "i386-pc")
	config, coreFile := filepath.Join(tmp, "grub.cfg"), filepath.Join(tmp, "core.img")
	if err := os.WriteFile(config, []byte(grubConfig), 0o644); err != nil {
		return nil, err
	}
	if _, err := bed.Run(ctx, filepath.Join(dir, "usr", "bin", "grub-mkimage"), "-d", modules, "-O", "i386-pc", "-o", coreFile,
		"-p", "(hd0,msdos1)/", "-c", config, "biosdisk", "part_msdos", "ext2", "linux", "serial", "terminal", "echo", "boot"); err != nil {
		return nil, err
	}
	boot, err := os.ReadFile(filepath.Join(modules, "boot.img"))
	if err != nil {
		return nil, err
	}
	core, err := os.ReadFile(coreFile)
	if err != nil {
		return nil, err
	}
	if len(boot) != sectorBytes || sectorBytes+len(core) > partitionSector*sectorBytes {
		return nil, fmt.Errorf("GRUB's boot.img has %d bytes and core.img %d: they don't fit before the partition", len(boot), len(core))
	}
	head := make([]byte, sectorBytes+len(core))
	copy(head, boot[:bootCodeBytes])
	copy(head[sectorBytes:], core)
	p := head[partitionTable:]
	p[0], p[4] = partitionActive, partitionLinux
	binary.LittleEndian.PutUint32(p[8:], partitionSector)
	binary.LittleEndian.PutUint32(p[12:], uint32(size/sectorBytes-partitionSector))
	head[bootSignatureAt], head[bootSignatureAt+1] = 0x55, 0xaa
	return head, nil
}
