package guest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"scoria/integration/bed"
)

// A guest with systemd boots the usual initramfs, whose init goes on to a disk when the
// kernel's command line has SystemdArg. There the same script takes jobs again, as a
// service.
const (
	// RootDisk is where that guest looks for the disk that WriteSystemdDisk made.
	RootDisk = "/dev/vda"
	// SystemdArg on the kernel's command line.
	SystemdArg = "root_disk=" + RootDisk + " systemd.show_status=0"
)

// rootBytes is the size of the root disk, most of it free.
const rootBytes = 1 << 30

// systemdPrograms are what is run of systemd; those in optional not in all releases.
var (
	systemdPrograms = []string{
		"/usr/lib/systemd/systemd", "/usr/lib/systemd/systemd-journald", "/usr/lib/systemd/systemd-shutdown",
		"/usr/bin/systemctl", "/usr/bin/journalctl",
	}
	systemdOptional = []string{"/usr/lib/systemd/systemd-executor"}
	// systemdUnits are what a machine needs that only runs services.
	systemdUnits = []string{
		"*.target", "-.slice", "system.slice", "systemd-journald.service", "systemd-journald*.socket",
		"systemd-poweroff.service",
	}
)

// jobsUnit takes jobs, as init does in other guests, from early on until late.
const jobsUnit = `[Unit]
Description=Jobs for the test
DefaultDependencies=no
After=systemd-journald.socket
[Service]
Environment=SYSTEMD_PAGER= SYSTEMD_COLORS=0
ExecStart=/bin/sh /init
StandardOutput=null
StandardError=journal+console
`

// systemdEtc are files of the root disk, by path.
var systemdEtc = map[string]string{
	"/etc/passwd":                      "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n",
	"/etc/group":                       "root:x:0:\nsystemd-journal:x:101:\nnogroup:x:65534:\n",
	"/etc/nsswitch.conf":               "passwd: files\ngroup: files\nhosts: files\n",
	"/etc/hosts":                       "127.0.0.1 localhost\n",
	"/etc/machine-id":                  "5c0411a05c0411a05c0411a05c0411a0\n",
	"/etc/os-release":                  "ID=scoria-test\nNAME=\"Scoria's test guest\"\n",
	"/etc/systemd/journald.conf":       "[Journal]\nStorage=volatile\nForwardToConsole=yes\nMaxLevelConsole=info\n",
	"/etc/systemd/system/jobs.service": jobsUnit,
}

// HasSystemd returns an error unless this machine has systemd's programs; they need not run.
func HasSystemd() error {
	for _, p := range systemdPrograms {
		if _, err := os.Stat(p); err != nil {
			return fmt.Errorf("systemd is not installed (make deps installs it): %w", err)
		}
	}
	return nil
}

// SystemdDisk says what a root disk has besides systemd and busybox.
type SystemdDisk struct {
	Programs []string          // static ones, which come to /usr/bin
	Tools    []string          // this machine's, with their libraries
	Files    map[string][]byte // by their paths in the guest
}

// WriteSystemdDisk makes a root disk with this machine's systemd.
func WriteSystemdDisk(ctx context.Context, file string, d SystemdDisk) (err error) {
	if err := HasSystemd(); err != nil {
		return err
	}
	tree, err := os.MkdirTemp(filepath.Dir(file), "root-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(tree)) }()
	r := rootTree(tree)
	if err := r.skeleton(ctx); err != nil {
		return err
	}
	if err := r.systemd(ctx, d.Tools); err != nil {
		return err
	}
	for _, p := range d.Programs {
		if err := r.copy("/usr/bin/"+filepath.Base(p), p); err != nil {
			return err
		}
	}
	for name, data := range d.Files {
		if err := r.write(name, data, 0o644); err != nil {
			return err
		}
	}
	mke2fs, err := lookPath("mke2fs")
	if err != nil {
		return err
	}
	if err := os.WriteFile(file, nil, 0o644); err != nil {
		return err
	}
	if err := os.Truncate(file, rootBytes); err != nil {
		return err
	}
	_, err = bed.Run(ctx, mke2fs, "-q", "-F", "-t", "ext4", "-d", tree, file)
	return err
}

// rootTree is the directory from which a root disk is made.
type rootTree string

// path is where a file of the guest lies; the guest has /bin, /sbin and /lib in /usr.
func (r rootTree) path(name string) string {
	for _, d := range []string{"/bin/", "/sbin/", "/lib/", "/lib64/"} {
		if strings.HasPrefix(name, d) {
			name = "/usr" + name
		}
	}
	return filepath.Join(string(r), strings.Replace(name, "/usr/sbin/", "/usr/bin/", 1))
}

func (r rootTree) write(name string, data []byte, perm os.FileMode) error {
	p := r.path(name)
	if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
		return err
	}
	return os.WriteFile(p, data, perm)
}

func (r rootTree) copy(name, from string) (err error) {
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer in.Close()
	info, err := in.Stat()
	if err != nil {
		return err
	}
	if err := r.write(name, nil, info.Mode().Perm()); err != nil {
		return err
	}
	out, err := os.OpenFile(r.path(name), os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, out.Close()) }()
	_, err = io.Copy(out, in)
	return err
}

// skeleton makes directories, busybox with its names, and what init needs.
func (r rootTree) skeleton(ctx context.Context) error {
	for _, d := range []string{"proc", "sys", "dev", "run", "tmp", "var/lib", "var/tmp", "var/log/journal", "root", "srv", "mnt", "usr/bin", "usr/lib64"} {
		if err := os.MkdirAll(filepath.Join(string(r), d), 0o755); err != nil {
			return err
		}
	}
	for name, target := range map[string]string{"bin": "usr/bin", "sbin": "usr/bin", "usr/sbin": "bin", "lib": "usr/lib", "lib64": "usr/lib64", "var/run": "/run"} {
		if err := os.Symlink(target, filepath.Join(string(r), name)); err != nil {
			return err
		}
	}
	a := newArchive()
	busybox, err := addApplets(ctx, a)
	if err != nil {
		return err
	}
	for name := range a.files {
		if filepath.Dir(name) != "bin" || name == "bin/busybox" {
			continue
		}
		if err := os.Symlink("busybox", r.path("/"+name)); err != nil {
			return err
		}
	}
	if err := r.copy("/usr/bin/busybox", busybox); err != nil {
		return err
	}
	for name, text := range systemdEtc {
		if err := r.write(name, []byte(text), 0o644); err != nil {
			return err
		}
	}
	return r.write("/init", initScript, 0o755)
}

// systemd copies systemd and the tools, with their libraries, and the units.
func (r rootTree) systemd(ctx context.Context, tools []string) error {
	programs := append(slices.Clone(tools), systemdPrograms...)
	for _, p := range systemdOptional {
		if _, err := os.Stat(p); err == nil {
			programs = append(programs, p)
		}
	}
	files, err := hostFiles(ctx, programs)
	if err != nil {
		return err
	}
	for _, f := range files {
		if filepath.Base(f.path) == "busybox" {
			continue
		}
		if err := os.Remove(r.path(f.path)); err != nil && !errors.Is(err, os.ErrNotExist) { // busybox's
			return err
		}
		if err := r.copy(f.path, f.path); err != nil {
			return err
		}
	}
	const dir = "/usr/lib/systemd/system"
	for _, pattern := range systemdUnits {
		units, err := filepath.Glob(filepath.Join(dir, pattern))
		if err != nil {
			return err
		}
		for _, u := range units {
			if info, err := os.Stat(u); err != nil || !info.Mode().IsRegular() {
				continue // masked
			}
			if err := r.copy(u, u); err != nil {
				return err
			}
		}
	}
	for target, unit := range map[string]string{
		"sysinit.target.wants/jobs.service":                    "/etc/systemd/system/jobs.service",
		"sysinit.target.wants/systemd-journald.service":        dir + "/systemd-journald.service",
		"sockets.target.wants/systemd-journald.socket":         dir + "/systemd-journald.socket",
		"sockets.target.wants/systemd-journald-dev-log.socket": dir + "/systemd-journald-dev-log.socket",
		"default.target": dir + "/multi-user.target",
	} {
		name := filepath.Join(string(r), "etc/systemd/system", target)
		if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
			return err
		}
		if err := os.Symlink(unit, name); err != nil {
			return err
		}
	}
	return nil
}
