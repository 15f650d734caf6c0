package qemu

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"scoria/integration/bed"
	"scoria/integration/guest"
)

// Accelerators.
const (
	KVM = "kvm"
	TCG = "tcg,thread=multi"
)

// kvmWait bounds the trial boot. A guest under a working KVM is up in a second;
// where KVM only seems to be there (some nested set-ups) it never is.
const kvmWait = 12 * time.Second

var (
	accelOnce sync.Mutex
	accelName string
)

// Accel returns KVM if a guest really boots under it here, else TCG. That
// /dev/kvm opens proves little, so it is tried, once per boot of this machine:
// the cache keeps the answer.
func Accel(ctx context.Context) (string, error) {
	accelOnce.Lock()
	defer accelOnce.Unlock()
	if accelName != "" {
		return accelName, nil
	}
	cache, err := bed.CacheDir()
	if err != nil {
		return "", err
	}
	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return "", err
	}
	file := filepath.Join(cache, "accel")
	if b, err := os.ReadFile(file); err == nil {
		id, name, _ := strings.Cut(strings.TrimSpace(string(b)), " ")
		if id == strings.TrimSpace(string(boot)) && (name == KVM || name == TCG) {
			accelName = name
			return name, nil
		}
	}
	name, err := tryAccel(ctx)
	if err != nil {
		return "", err
	}
	accelName = name
	return name, os.WriteFile(file, fmt.Appendf(nil, "%s %s\n", strings.TrimSpace(string(boot)), name), 0o644)
}

// tryAccel boots a small guest under KVM.
func tryAccel(ctx context.Context) (_ string, err error) {
	f, err := os.OpenFile("/dev/kvm", os.O_RDWR, 0)
	if err != nil {
		return TCG, nil
	}
	if err := f.Close(); err != nil {
		return "", err
	}
	img, err := guest.BuildSmall(ctx)
	if err != nil {
		return "", err
	}
	dir, err := bed.ScratchDir(false)
	if err != nil {
		return "", err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	ctx, cancel := context.WithTimeout(ctx, kvmWait)
	defer cancel()
	vm, err := launch(ctx, Options{Dir: dir, Image: img, CPUs: 1, MemoryMiB: 256}, KVM)
	if err != nil {
		return TCG, nil // QEMU itself refuses KVM
	}
	name := KVM
	if vm.ready(ctx) != nil {
		name = TCG
	}
	return name, vm.Kill()
}
