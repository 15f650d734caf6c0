// Package guest makes the Linux guest of the integration tests and the demo: the
// distribution's kernel, unpacked into the cache, and an initramfs with busybox,
// the virtio drivers, fio and e2fsprogs, whose init carries out scripts that the
// host sends over a serial port (package qemu speaks the other end).
//
// The image is rebuilt when the kernel or a file in it has changed; the cache
// holds the result under a name that is a digest of its recipe.
package guest

import (
	"bufio"
	"context"
	"crypto/sha256"
	_ "embed"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"sort"
	"strings"
	"time"

	"scoria/integration/bed"
)

//go:embed init.sh
var initScript []byte

// drivers are the modules the guest needs, dependencies apart.
var drivers = []string{"virtio_pci", "virtio_blk"}

// tools are the programs in the guest besides busybox. Its shell prefers its own
// applets, so scripts call blkdiscard as /bin/blkdiscard to get -z and -o.
var tools = []string{"fio", "mkfs.ext4", "e2fsck", "resize2fs", "blkdiscard"}

// Image is what QEMU boots.
type Image struct {
	Kernel string // path of the kernel
	Initrd string // path of the initramfs
}

// Build returns the guest's image, from the cache if nothing has changed. The
// kernel must have been fetched.
func Build(ctx context.Context) (Image, error) {
	torture, err := buildTorture(ctx)
	if err != nil {
		return Image{}, err
	}
	return build(ctx, tools, torture)
}

// BuildSmall returns an image with busybox and drivers alone, for guests that
// are read from the volume under test by its BIOS.
func BuildSmall(ctx context.Context) (Image, error) {
	return build(ctx, nil, nil)
}

// buildTorture builds the guest's own load program; see torture/main.go.
func buildTorture(ctx context.Context) ([]byte, error) {
	root, err := bed.Root()
	if err != nil {
		return nil, err
	}
	cache, err := bed.CacheDir()
	if err != nil {
		return nil, err
	}
	dir, err := os.MkdirTemp(cache, "torture-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	bin := filepath.Join(dir, "torture")
	if _, err := bed.Run(ctx, "sh", "-c", `cd "$1" && CGO_ENABLED=0 exec go build -trimpath -buildvcs=false -o "$2" ./integration/guest/torture`,
		"sh", root, bin); err != nil {
		return nil, err
	}
	return os.ReadFile(bin)
}

// build makes an image with host tools and, if not nil, the torture program.
func build(ctx context.Context, tools []string, torture []byte) (Image, error) {
	k, err := FindKernel()
	if err != nil {
		return Image{}, err
	}
	files, err := hostFiles(ctx, tools)
	if err != nil {
		return Image{}, err
	}
	cache, err := bed.CacheDir()
	if err != nil {
		return Image{}, err
	}
	img := Image{Kernel: k.Image, Initrd: filepath.Join(cache, "initrd-"+recipe(k, files, torture)+".cpio")}
	if _, err := os.Stat(img.Initrd); err == nil {
		return img, nil
	}
	if err := prune(cache); err != nil {
		return Image{}, err
	}
	a := newArchive()
	if err := fill(ctx, a, k, files); err != nil {
		return Image{}, err
	}
	if torture != nil {
		a.file("/bin/torture", 0o755, torture)
	}
	return img, replaceFile(img.Initrd, a.writeTo)
}

// prune removes images that an earlier state of the tree left behind. Others may
// be using recent ones.
func prune(cache string) error {
	old, err := filepath.Glob(filepath.Join(cache, "initrd-*.cpio"))
	if err != nil {
		return err
	}
	for _, f := range old {
		if info, err := os.Stat(f); err == nil && time.Since(info.ModTime()) > 24*time.Hour {
			if err := os.Remove(f); err != nil {
				return err
			}
		}
	}
	return nil
}

// replaceFile writes a file aside and renames it, so that nobody sees half of it.
func replaceFile(name string, write func(io.Writer) error) error {
	f, err := os.CreateTemp(filepath.Dir(name), ".new-")
	if err != nil {
		return err
	}
	defer os.Remove(f.Name())
	w := bufio.NewWriterSize(f, 1<<20)
	if err := errors.Join(write(w), w.Flush(), f.Close()); err != nil {
		return err
	}
	return os.Rename(f.Name(), name)
}

// hostFile is a file of this machine that goes into the guest under the same path.
type hostFile struct {
	path string // as the guest's programs look for it
	info os.FileInfo
}

var libraryPath = regexp.MustCompile(`(?m)(/\S+) \(0x[0-9a-f]+\)$`)

// hostFiles lists busybox, the tools, and the libraries that ldd names for them.
func hostFiles(ctx context.Context, tools []string) ([]hostFile, error) {
	paths := make(map[string]bool)
	for _, t := range append([]string{"busybox"}, tools...) {
		p, err := lookPath(t)
		if err != nil {
			return nil, fmt.Errorf("%s is not installed (make deps installs it): %w", t, err)
		}
		paths[p] = true
		out, err := bed.Run(ctx, "ldd", p)
		if err != nil && t != "busybox" { // which usually is static
			return nil, err
		}
		for _, m := range libraryPath.FindAllStringSubmatch(out, -1) {
			paths[m[1]] = true
		}
	}
	files := make([]hostFile, 0, len(paths))
	for p := range paths {
		info, err := os.Stat(p)
		if err != nil {
			return nil, err
		}
		files = append(files, hostFile{p, info})
	}
	sort.Slice(files, func(i, j int) bool { return files[i].path < files[j].path })
	return files, nil
}

// lookPath finds a program in PATH or where a system administrator's programs lie.
func lookPath(name string) (string, error) {
	if p, err := exec.LookPath(name); err == nil {
		return p, nil
	}
	for _, dir := range []string{"/usr/sbin", "/sbin"} {
		if p, err := exec.LookPath(filepath.Join(dir, name)); err == nil {
			return p, nil
		}
	}
	return "", fmt.Errorf("%s: %w", name, exec.ErrNotFound)
}

// recipe is a digest of everything the image is made from; files by size and time.
func recipe(k Kernel, files []hostFile, torture []byte) string {
	h := sha256.New()
	fmt.Fprintf(h, "layout 1\n%s\n%s\n%v\n", k.Version, initScript, drivers)
	for _, f := range files {
		fmt.Fprintf(h, "%s %d %d\n", f.path, f.info.Size(), f.info.ModTime().UnixNano())
	}
	h.Write(torture)
	return fmt.Sprintf("%x", h.Sum(nil)[:8])
}

func fill(ctx context.Context, a *archive, k Kernel, files []hostFile) error {
	for _, d := range []string{"/proc", "/sys", "/dev", "/tmp", "/mnt"} {
		a.dir(d)
	}
	a.file("/init", 0o755, initScript)
	modules, err := k.modulesFor(ctx, drivers...)
	if err != nil {
		return err
	}
	var order strings.Builder
	for _, m := range modules {
		a.file("/modules/"+m.name+".ko", 0o644, m.data)
		fmt.Fprintln(&order, m.name)
	}
	a.file("/modules/order", 0o644, []byte(order.String()))
	busybox, err := addApplets(ctx, a)
	if err != nil {
		return err
	}
	for _, f := range files {
		data, err := os.ReadFile(f.path)
		if err != nil {
			return err
		}
		switch {
		case f.path == busybox:
			a.file("/bin/busybox", 0o755, data)
		case strings.Contains(filepath.Base(f.path), ".so"):
			a.file(f.path, 0o755, data)
		default:
			a.file("/bin/"+filepath.Base(f.path), 0o755, data)
		}
	}
	return nil
}

// addApplets links every name that busybox answers to, and returns busybox's path.
func addApplets(ctx context.Context, a *archive) (string, error) {
	busybox, err := lookPath("busybox")
	if err != nil {
		return "", err
	}
	list, err := bed.Run(ctx, busybox, "--list")
	if err != nil {
		return "", err
	}
	for _, applet := range strings.Fields(list) {
		a.link("/bin/"+applet, "busybox")
	}
	return busybox, nil
}
