// Package shmtools builds what stands on the C client of the shared-memory rings,
// for the integration tests and the benchmark: the nbdkit plugin and the fio
// engine, and a self-test of the client.
//
// A fio engine sees fio's own structures and is compiled against the headers of
// the very version that loads it. Debian and Ubuntu have no package of them, so
// that the source package is fetched into the source tree's cache, unpacked and
// configured; nothing of it is built or installed.
package shmtools

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"scoria/integration/bed"
)

// Tools are what was built.
type Tools struct {
	Plugin   string // of nbdkit
	Engine   string // of fio
	SelfTest string // of the C client
}

// Build builds into dir. It fails with fs.ErrNotExist if fio's headers have not
// been fetched.
func Build(ctx context.Context, dir string) (Tools, error) {
	root, err := bed.Root()
	if err != nil {
		return Tools{}, err
	}
	fio, err := FindFioSource(ctx)
	if err != nil {
		return Tools{}, err
	}
	source := filepath.Join(root, "shm", "client", "c")
	if _, err := bed.Run(ctx, "make", "-s", "-C", source, "BUILD="+dir, "FIO_SRC="+fio, "lib", "nbdkit", "fio"); err != nil {
		return Tools{}, err
	}
	t := Tools{
		Plugin: filepath.Join(dir, "nbdkit-scoria-plugin.so"), Engine: filepath.Join(dir, "scoria-fio.so"),
		SelfTest: filepath.Join(dir, "selftest"),
	}
	_, err = bed.Run(ctx, "cc", "-O2", "-pthread", "-I"+source, filepath.Join(source, "test", "selftest.c"), filepath.Join(dir, "libscoria_shm.a"), "-o", t.SelfTest)
	return t, err
}

// fioVersion returns the version of the installed package, such as 3.33-3.
func fioVersion(ctx context.Context) (string, error) {
	out, err := bed.Run(ctx, "dpkg-query", "-W", "-f", "${Version}", "fio")
	return strings.TrimSpace(out), err
}

func fioDir(version string) (string, error) {
	cache, err := bed.CacheDir()
	return filepath.Join(cache, "fio-"+version), err
}

// FindFioSource returns the folder with the configured source of the installed
// fio, or fs.ErrNotExist if it has not been fetched.
func FindFioSource(ctx context.Context) (string, error) {
	version, err := fioVersion(ctx)
	if err != nil {
		return "", fmt.Errorf("fio is not installed: %w: %w", fs.ErrNotExist, err)
	}
	dir, err := fioDir(version)
	if err != nil {
		return "", err
	}
	if _, err := os.Stat(filepath.Join(dir, "config-host.h")); err != nil {
		return "", fmt.Errorf("source of fio %s: %w", version, err)
	}
	return dir, nil
}

// FetchFioSource downloads the source package of the installed fio with apt, from
// where the package came, and configures it in the cache. The machine's own apt
// sources stay as they are.
func FetchFioSource(ctx context.Context) (err error) {
	version, err := fioVersion(ctx)
	if err != nil {
		return err
	}
	dir, err := fioDir(version)
	if err != nil {
		return err
	}
	tmp, err := os.MkdirTemp(filepath.Dir(dir), "fio-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(tmp)) }()
	origin, err := originOf(ctx, "fio")
	if err != nil {
		return err
	}
	script := `set -e
cd "$1"
version=$3
mkdir -p lists/partial src
echo "deb-src $2" > sources.list
set -- -q -o Dir::Etc::sourcelist="$1/sources.list" -o Dir::Etc::sourceparts=/dev/null -o Dir::State::lists="$1/lists" -o APT::Sandbox::User=root
apt-get "$@" update
apt-get "$@" source --download-only "fio=$version"
for archive in fio_*.orig.tar.?z; do tar xf "$archive" --strip-components=1 -C src; done
cd src
./configure`
	if _, err := bed.Run(ctx, "sh", "-c", script, "sh", tmp, origin, version); err != nil {
		return fmt.Errorf("source of fio %s: %w", version, err)
	}
	if err := os.RemoveAll(dir); err != nil {
		return err
	}
	return os.Rename(filepath.Join(tmp, "src"), dir)
}

// originOf returns the "URL suite component" that an installed package came from.
func originOf(ctx context.Context, pkg string) (string, error) {
	out, err := bed.Run(ctx, "apt-cache", "policy", pkg)
	if err != nil {
		return "", err
	}
	return parseOrigin(out)
}

// parseOrigin reads `apt-cache policy`: behind the installed version, marked by
// ***, come lines such as "500 http://deb.debian.org/debian bookworm/main amd64 Packages".
func parseOrigin(policy string) (string, error) {
	installed := false
	for line := range strings.Lines(policy) {
		f := strings.Fields(line)
		if len(f) > 0 && f[0] == "***" {
			installed = true
		}
		if !installed || len(f) != 5 || f[4] != "Packages" || !strings.Contains(f[1], "://") {
			continue
		}
		if suite, component, ok := strings.Cut(f[2], "/"); ok {
			return f[1] + " " + suite + " " + component, nil
		}
	}
	return "", fmt.Errorf("where fio came from is not known to apt: its source can't be fetched from there")
}
