package guest

import (
	"bytes"
	"context"
	"debug/elf"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"

	"scoria/integration/bed"
)

// Kernel is an unpacked kernel package.
type Kernel struct {
	Image   string // vmlinuz
	Modules string // lib/modules/VERSION
	Version string
}

// metaPackages are, in order of preference, the packages that depend on the
// newest kernel for virtual machines: Debian's, then Ubuntu's.
var metaPackages = []string{"linux-image-cloud-amd64", "linux-image-virtual", "linux-image-kvm", "linux-image-generic"}

// kernelDir is where in the cache the kernel lies.
func kernelDir() (string, error) {
	cache, err := bed.CacheDir()
	return filepath.Join(cache, "kernel"), err
}

// FindKernel returns the cached kernel; fs.ErrNotExist if there is none.
func FindKernel() (Kernel, error) {
	dir, err := kernelDir()
	if err != nil {
		return Kernel{}, err
	}
	images, err := filepath.Glob(filepath.Join(dir, "boot", "vmlinuz-*"))
	if err != nil {
		return Kernel{}, err
	}
	if len(images) == 0 {
		return Kernel{}, fmt.Errorf("no guest kernel in %s (make deps fetches one): %w", dir, fs.ErrNotExist)
	}
	k := Kernel{Image: images[0], Version: strings.TrimPrefix(filepath.Base(images[0]), "vmlinuz-")}
	for _, prefix := range []string{"lib", "usr/lib"} {
		k.Modules = filepath.Join(dir, prefix, "modules", k.Version)
		if _, err := os.Stat(k.Modules); err == nil {
			return k, nil
		}
	}
	return Kernel{}, fmt.Errorf("guest kernel %s without its modules in %s: %w", k.Version, dir, fs.ErrNotExist)
}

// FetchKernel downloads the distribution's kernel package and unpacks it into
// the cache. It isn't installed: a package's scripts would touch the host's boot.
func FetchKernel(ctx context.Context) (Kernel, error) {
	dir, err := kernelDir()
	if err != nil {
		return Kernel{}, err
	}
	packages, err := kernelPackages(ctx)
	if err != nil {
		return Kernel{}, err
	}
	if err := fetchPackages(ctx, dir, packages); err != nil {
		return Kernel{}, err
	}
	return FindKernel()
}

// fetchPackages downloads packages and unpacks them into dir, replacing it. They
// are not installed. The directory is built aside and renamed, so that an
// interrupted download leaves nothing that looks complete.
func fetchPackages(ctx context.Context, dir string, packages []string) error {
	tmp := dir + ".new"
	if err := errors.Join(os.RemoveAll(tmp), os.MkdirAll(tmp, 0o755)); err != nil {
		return err
	}
	for _, p := range packages {
		if _, err := bed.Run(ctx, "sh", "-c", `cd "$1" && apt-get download -q "$2"`, "sh", tmp, p); err != nil {
			return err
		}
	}
	debs, err := filepath.Glob(filepath.Join(tmp, "*.deb"))
	if err != nil {
		return err
	}
	for _, deb := range debs {
		if _, err := bed.Run(ctx, "dpkg-deb", "-x", deb, tmp); err != nil {
			return err
		}
		if err := os.Remove(deb); err != nil {
			return err
		}
	}
	return errors.Join(os.RemoveAll(dir), os.Rename(tmp, dir))
}

var kernelDepend = regexp.MustCompile(`(?m)^\s*(?:Pre)?Depends: (linux-(?:image|modules)-\S*\d\S*)$`)

// kernelPackages resolves the first meta package that exists to the concrete
// package with the image and, where they are apart (Ubuntu), the modules.
func kernelPackages(ctx context.Context) ([]string, error) {
	for _, meta := range metaPackages {
		out, err := bed.Run(ctx, "apt-cache", "depends", meta)
		if err != nil {
			continue // not in this distribution
		}
		var packages []string
		for _, m := range kernelDepend.FindAllStringSubmatch(out, -1) {
			packages = append(packages, m[1])
			more, err := bed.Run(ctx, "apt-cache", "depends", m[1])
			if err != nil {
				return nil, err
			}
			for _, mm := range kernelDepend.FindAllStringSubmatch(more, -1) {
				packages = append(packages, mm[1])
			}
		}
		if len(packages) > 0 {
			return packages, nil
		}
	}
	return nil, fmt.Errorf("apt knows none of %s: a guest kernel is needed (is `apt-get update` possible?)",
		strings.Join(metaPackages, ", "))
}

// module is a kernel module, uncompressed.
type module struct {
	name string
	data []byte
}

// modulesFor returns the modules that are not built in, dependencies first.
// The packages carry no modules.dep (depmod writes it at installation), so the
// dependencies come from each module's own .modinfo section.
func (k Kernel) modulesFor(ctx context.Context, want ...string) ([]module, error) {
	files := make(map[string]string) // module name → path
	err := filepath.WalkDir(k.Modules, func(p string, d fs.DirEntry, err error) error {
		if base, _, ok := strings.Cut(filepath.Base(p), ".ko"); ok && err == nil {
			files[strings.ReplaceAll(base, "-", "_")] = p
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	builtin, err := os.ReadFile(filepath.Join(k.Modules, "modules.builtin"))
	if err != nil {
		return nil, err
	}
	var out []module
	done := make(map[string]bool)
	var visit func(name string) error
	visit = func(name string) error {
		if done[name] {
			return nil
		}
		done[name] = true
		p, ok := files[name]
		if !ok {
			if bytes.Contains(bytes.ReplaceAll(builtin, []byte("-"), []byte("_")), []byte("/"+name+".ko")) {
				return nil
			}
			return fmt.Errorf("kernel %s has no module %s", k.Version, name)
		}
		data, err := readModule(ctx, p)
		if err != nil {
			return err
		}
		deps, err := moduleDepends(data)
		if err != nil {
			return fmt.Errorf("%s: %w", p, err)
		}
		for _, d := range deps {
			if err := visit(d); err != nil {
				return err
			}
		}
		out = append(out, module{name, data})
		return nil
	}
	for _, name := range want {
		if err := visit(name); err != nil {
			return nil, err
		}
	}
	return out, nil
}

// readModule reads a module, decompressed: not every insmod can do that.
func readModule(ctx context.Context, p string) ([]byte, error) {
	tool := map[string]string{".zst": "zstd", ".xz": "xz", ".gz": "gzip"}[filepath.Ext(p)]
	if tool == "" {
		return os.ReadFile(p)
	}
	out, err := bed.Run(ctx, tool, "-dc", p)
	return []byte(out), err
}

// moduleDepends reads "depends=a,b" from a module's .modinfo section: strings
// "key=value", each ended by a zero byte.
func moduleDepends(data []byte) ([]string, error) {
	f, err := elf.NewFile(bytes.NewReader(data))
	if err != nil {
		return nil, err
	}
	sec := f.Section(".modinfo")
	if sec == nil {
		return nil, errors.New("no .modinfo section: not a kernel module")
	}
	info, err := sec.Data()
	if err != nil {
		return nil, err
	}
	for _, kv := range strings.Split(string(info), "\x00") {
		if list, ok := strings.CutPrefix(kv, "depends="); ok && list != "" {
			return strings.Split(strings.ReplaceAll(list, "-", "_"), ","), nil
		}
	}
	return nil, nil
}
