// Package qemu runs test guests: QEMU with vhost-user-blk disks, and the other
// end of the serial port on which the guest's init (package guest) takes jobs.
//
// Goroutines: one per machine reads the job port. Locks: VM.mu only.
package qemu

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"scoria/integration/bed"
	"scoria/integration/guest"
)

// Disk is one vhost-user-blk device.
type Disk struct {
	Socket    string // of the vhost-user server
	Queues    int    // 0: 1
	QueueSize int    // descriptors per queue; 0: QEMU's default, 128
	Boot      bool   // the BIOS boots from it
	Options   string // further properties, "key=value,key=value"
}

// Options describe a machine.
type Options struct {
	Dir        string // existing, with a short name; logs and sockets go there
	Disks      []Disk
	Image      guest.Image // kernel and initramfs; empty: the BIOS boots from a disk
	CPUs       int         // 0: 2
	MemoryMiB  int         // 0: 512
	MaxMiB     int         // of memory, with what is plugged in later; 0: none can be
	Incoming   string      // a migration's address; the machine waits for one. Empty: it boots
	ExtraArgs  []string
	ExtraKArgs string // appended to the kernel's command line
}

// VM is a running machine.
type VM struct {
	*bed.Process
	Monitor *QMP
	dir     string
	port    *port
}

// bootWait bounds everything from the start of QEMU to the guest's readiness:
// under TCG on a busy machine this is some seconds.
const bootWait = 90 * time.Second

// Launch starts QEMU and connects to its monitor, without waiting for the guest.
func Launch(ctx context.Context, o Options) (*VM, error) {
	accel, err := Accel(ctx)
	if err != nil {
		return nil, err
	}
	return launch(ctx, o, accel)
}

func launch(ctx context.Context, o Options, accel string) (*VM, error) {
	p, err := bed.Start(bed.Spec{
		Path: Binary,
		Args: arguments(o, accel),
		Log:  filepath.Join(o.Dir, "qemu.log"),
	})
	if err != nil {
		return nil, fmt.Errorf("%w (make deps installs QEMU)", err)
	}
	vm := &VM{Process: p, dir: o.Dir}
	if err := vm.connect(ctx); err != nil {
		return nil, errors.Join(err, vm.Kill())
	}
	return vm, nil
}

// Boot is Launch, then waits until the guest's init takes jobs.
func Boot(ctx context.Context, o Options) (*VM, error) {
	vm, err := Launch(ctx, o)
	if err != nil {
		return nil, err
	}
	if err := vm.ready(ctx); err != nil {
		return nil, errors.Join(err, vm.Kill())
	}
	return vm, nil
}

// memoryRestKiB is added to a machine's memory. QEMU before 9.0 under TCG loses
// writes of the guest during a migration, to whatever disk it has, or none: where it
// collects the pages that were written to 64 at a time, it does not tell the
// processors' TLBs (mended by "physmem: Fix migration dirty bitmap coherency with TCG
// memory access"). Memory that is no multiple of 64 pages is looked at page by page.
const memoryRestKiB = 8

// Binary is the emulator's program name.
const Binary = "qemu-system-x86_64"

func arguments(o Options, accel string) []string {
	if o.CPUs == 0 {
		o.CPUs = 2
	}
	if o.MemoryMiB == 0 {
		o.MemoryMiB = 512
	}
	memory := fmt.Sprintf("%dK", o.MemoryMiB<<10+memoryRestKiB)
	backend := "memory-backend-memfd,id=mem,share=on,size=" + memory
	if o.MaxMiB > 0 {
		memory += fmt.Sprintf(",slots=4,maxmem=%dM", o.MaxMiB)
	}
	args := []string{
		"-nodefaults", "-no-user-config", "-display", "none",
		"-accel", accel, "-smp", strconv.Itoa(o.CPUs),
		"-object", backend,
		"-machine", "q35,memory-backend=mem", "-m", memory,
		"-qmp", "unix:" + filepath.Join(o.Dir, "qmp.sock") + ",server=on,wait=off",
		"-serial", "file:" + filepath.Join(o.Dir, "console.log"),
		"-chardev", "socket,id=jobs,server=on,wait=off,path=" + filepath.Join(o.Dir, "jobs.sock"),
		"-serial", "chardev:jobs",
	}
	if accel == KVM {
		args = append(args, "-cpu", "host")
	}
	for i, d := range o.Disks {
		dev := fmt.Sprintf("vhost-user-blk-pci,chardev=disk%d,num-queues=%d", i, max(d.Queues, 1))
		if d.QueueSize > 0 {
			dev += fmt.Sprintf(",queue-size=%d", d.QueueSize)
		}
		if d.Boot {
			dev += ",bootindex=0"
		}
		if d.Options != "" {
			dev += "," + d.Options
		}
		args = append(args,
			"-chardev", fmt.Sprintf("socket,id=disk%d,path=%s,reconnect=1", i, d.Socket),
			"-device", dev)
	}
	if o.Image.Kernel != "" {
		args = append(args, "-kernel", o.Image.Kernel, "-initrd", o.Image.Initrd,
			"-append", strings.TrimSpace("console=ttyS0 quiet panic=-1 mitigations=off "+o.ExtraKArgs))
	}
	if o.Incoming != "" {
		args = append(args, "-incoming", o.Incoming)
	}
	return append(args, o.ExtraArgs...)
}

// connect waits for QEMU's sockets.
func (vm *VM) connect(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, bootWait)
	defer cancel()
	return bed.Poll(ctx, 10*time.Millisecond, "QEMU's monitor", func() (bool, error) {
		if err := vm.Dead(); err != nil {
			return false, err
		}
		q, err := DialQMP(ctx, filepath.Join(vm.dir, "qmp.sock"))
		if err != nil {
			return false, nil // not there yet
		}
		p, err := dialPort(ctx, filepath.Join(vm.dir, "jobs.sock"))
		if err != nil {
			return false, errors.Join(err, q.Close())
		}
		vm.Monitor, vm.port = q, p
		return true, nil
	})
}

// ready waits for job 0, which the guest's init reports without being asked.
func (vm *VM) ready(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, bootWait)
	defer cancel()
	if _, err := vm.port.wait(ctx, vm, 0); err != nil {
		return fmt.Errorf("guest does not boot: %w; its console ends:\n%s", err, vm.Console(30))
	}
	return nil
}

// Reattach waits for the guest's init after the guest has restarted.
func (vm *VM) Reattach(ctx context.Context) error { return vm.ready(ctx) }

// Run carries out a shell script in the guest and returns what it wrote. A
// non-zero exit code is an error that carries the output.
func (vm *VM) Run(ctx context.Context, script string) (string, error) {
	n, err := vm.port.send(ctx, script)
	if err != nil {
		return "", fmt.Errorf("guest job %q: %w", script, err)
	}
	out, err := vm.port.wait(ctx, vm, n)
	if err != nil {
		return out, fmt.Errorf("guest job %q: %w; it wrote:\n%s\nthe console ends:\n%s", script, err, out, vm.Console(20))
	}
	return out, nil
}

// Background starts a shell script in the guest that goes on while other jobs run.
func (vm *VM) Background(ctx context.Context, name, script string) error {
	_, err := vm.Run(ctx, fmt.Sprintf("rm -f /tmp/%[1]s.rc\ncat >/tmp/%[1]s.sh <<'END_OF_JOB'\n%[2]s\nEND_OF_JOB\n"+
		"(sh /tmp/%[1]s.sh >/tmp/%[1]s.out 2>&1 </dev/null; echo $? >/tmp/%[1]s.rc.new; mv /tmp/%[1]s.rc.new /tmp/%[1]s.rc) 3>&- &", name, script))
	return err
}

// Finished says whether a background script has ended.
func (vm *VM) Finished(ctx context.Context, name string) (bool, error) {
	out, err := vm.Run(ctx, fmt.Sprintf("[ -e /tmp/%s.rc ] && echo yes; true", name))
	return strings.TrimSpace(out) == "yes", err
}

// Join waits for a background script and returns what it wrote. A non-zero exit
// code is an error that carries the output.
func (vm *VM) Join(ctx context.Context, name string) (string, error) {
	err := bed.Poll(ctx, 200*time.Millisecond, "guest job "+name, func() (bool, error) { return vm.Finished(ctx, name) })
	if err != nil {
		return "", err
	}
	return vm.Run(ctx, fmt.Sprintf("cat /tmp/%[1]s.out; exit $(cat /tmp/%[1]s.rc)", name))
}

// Console returns the last lines of the guest's console: the kernel's messages.
func (vm *VM) Console(lines int) string {
	return bed.Tail(filepath.Join(vm.dir, "console.log"), lines)
}

// Output returns the last lines of what QEMU itself has printed.
func (vm *VM) Output(lines int) string { return bed.Tail(filepath.Join(vm.dir, "qemu.log"), lines) }

// Complaints returns the lines of the kernel's log that tell of disk trouble.
func (vm *VM) Complaints(ctx context.Context) ([]string, error) {
	out, err := vm.Run(ctx, "dmesg")
	if err != nil {
		return nil, err
	}
	var bad []string
	for _, l := range strings.Split(out, "\n") {
		for _, sign := range []string{"I/O error", "EXT4-fs error", "EXT4-fs warning", "blocked for more than", "Buffer I/O", "BUG:", "Call Trace"} {
			if strings.Contains(l, sign) {
				bad = append(bad, l)
				break
			}
		}
	}
	return bad, nil
}

// PowerOff ends the guest in good order and waits for QEMU's exit.
func (vm *VM) PowerOff(ctx context.Context) error {
	if _, err := vm.port.send(ctx, "sync; poweroff -f"); err != nil {
		return err
	}
	return errors.Join(vm.Wait(ctx), vm.disconnect())
}

// Kill ends QEMU at once, as a crash would.
func (vm *VM) Kill() error {
	return errors.Join(vm.Process.Kill(), vm.disconnect())
}

func (vm *VM) disconnect() error {
	if vm.Monitor == nil {
		return nil
	}
	return errors.Join(vm.Monitor.Close(), vm.port.close())
}

// Status returns QEMU's run state, "running" for a healthy guest.
func (vm *VM) Status(ctx context.Context) (string, error) {
	raw, err := vm.Monitor.Execute(ctx, "query-status", nil)
	if err != nil {
		return "", err
	}
	var s struct {
		Status string `json:"status"`
	}
	return s.Status, json.Unmarshal(raw, &s)
}

// ConsoleHas waits until the console shows a text; for guests without our init.
func (vm *VM) ConsoleHas(ctx context.Context, text string) error {
	err := bed.Poll(ctx, 50*time.Millisecond, fmt.Sprintf("%q on the console", text), func() (bool, error) {
		b, err := os.ReadFile(filepath.Join(vm.dir, "console.log"))
		if err == nil && strings.Contains(string(b), text) {
			return true, nil
		}
		return false, vm.Dead()
	})
	if err != nil {
		return fmt.Errorf("%w; it shows:\n%s", err, vm.Console(30))
	}
	return nil
}
