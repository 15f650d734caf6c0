// Command demo is `make run`: Scoria's promise shown in a minute, for real. It
// starts scoriad with embedded everything in a scratch directory, creates a
// volume, boots a Linux guest in QEMU on it, kills the daemon with SIGKILL while
// the guest's fio verifies what it writes, starts it again, ends the guest, and
// checks the file system from outside through the helper socket. It says what it
// does while it does it, prints figures at the end, and exits with 1 at the
// first thing that isn't as it must be.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"scoria/integration/bed"
	"scoria/integration/daemon"
	"scoria/integration/guest"
	"scoria/integration/qemu"
)

// demoWait bounds the whole demonstration.
const demoWait = 10 * time.Minute

const volume = "demo"

func main() {
	keep := flag.Bool("keep", false, "leave the daemon running in the end and say how to use it")
	size := flag.String("size", "2G", "size of the volume")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	ctx, cancel := context.WithTimeout(ctx, demoWait)
	defer cancel()
	if err := demo(ctx, *keep, *size); err != nil {
		fmt.Fprintf(os.Stderr, "\nFAILED: %v\n", err)
		os.Exit(1)
	}
}

// say prints a step as it begins, with the time since the start.
func (s *show) say(format string, args ...any) {
	fmt.Printf("[%5.1fs] %s\n", time.Since(s.begin).Seconds(), fmt.Sprintf(format, args...))
}

// show is one run of the demonstration.
type show struct {
	begin   time.Time
	scratch string
	d       *daemon.Daemon
	img     guest.Image
	figures []string
}

func (s *show) figure(name, format string, args ...any) {
	s.figures = append(s.figures, fmt.Sprintf("  %-34s %s", name, fmt.Sprintf(format, args...)))
}

func demo(ctx context.Context, keep bool, size string) (err error) {
	s := &show{begin: time.Now()}
	if err := s.prepare(keep); err != nil {
		return err
	}
	defer func() {
		if keep && err == nil {
			s.explain()
			return
		}
		err = errors.Join(err, s.d.Kill(), os.RemoveAll(s.d.RunDir), s.cleanup(err))
	}()
	if err := s.volume(ctx, size); err != nil {
		return err
	}
	if err := s.guest(ctx); err != nil {
		return err
	}
	if err := s.outside(ctx); err != nil {
		return err
	}
	if err := s.stats(ctx); err != nil {
		return err
	}
	if !keep {
		s.say("stopping scoriad (SIGTERM)")
		if err := s.d.Stop(ctx); err != nil {
			return err
		}
	}
	fmt.Printf("\nEverything as promised. Figures of this run, on this machine:\n%s\n", strings.Join(s.figures, "\n"))
	return nil
}

// prepare makes the directories.
func (s *show) prepare(keep bool) error {
	root, err := bed.Root()
	if err != nil {
		return err
	}
	s.scratch, err = os.MkdirTemp("/var/tmp", "scoria-demo-")
	if err != nil {
		return err
	}
	run, err := os.MkdirTemp(bed.RAMDir(), "scoria-demo-")
	if err != nil {
		return err
	}
	s.d = &daemon.Daemon{
		Programs: daemon.Programs{Scoriad: filepath.Join(root, "bin", "scoriad"), Scoria: filepath.Join(root, "bin", "scoria")},
		DataDir:  filepath.Join(s.scratch, "data"),
		RunDir:   run,
		Detached: keep,
	}
	return os.Mkdir(s.d.DataDir, 0o700)
}

// cleanup removes the scratch directory, unless a failure makes it worth a look.
func (s *show) cleanup(failure error) error {
	if failure != nil {
		fmt.Fprintf(os.Stderr, "\nlogs and data are left in %s\n", s.scratch)
		return nil
	}
	return os.RemoveAll(s.scratch)
}

// volume starts the daemon and creates the volume.
func (s *show) volume(ctx context.Context, size string) error {
	s.say("starting scoriad: data in %s, sockets in %s", s.d.DataDir, s.d.RunDir)
	if err := s.d.Start(ctx); err != nil {
		return err
	}
	s.say("creating the volume default/%s of %s", volume, size)
	return s.d.Create(ctx, volume, size)
}

// guest boots the guest, loads the volume, and kills the daemon meanwhile.
func (s *show) guest(ctx context.Context) (err error) {
	if s.img, err = guest.Build(ctx); err != nil {
		return err
	}
	accel, err := qemu.Accel(ctx)
	if err != nil {
		return err
	}
	name := map[string]string{qemu.KVM: "KVM", qemu.TCG: "TCG (no guest boots under KVM here)"}[accel]
	s.say("booting a Linux guest in QEMU under %s, its disk on %s", name, s.d.VhostSocket(volume))
	vm, err := qemu.Boot(ctx, qemu.Options{Dir: s.d.RunDir, Image: s.img,
		Disks: []qemu.Disk{{Socket: s.d.VhostSocket(volume), Queues: 2}}})
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, vm.Kill())
		}
	}()
	uname, err := vm.Run(ctx, "uname -r")
	if err != nil {
		return err
	}
	s.say("guest is up: Linux %s; it makes ext4 on /dev/vda and writes files", strings.TrimSpace(uname))
	if _, err := vm.Run(ctx, makeFiles); err != nil {
		return err
	}
	if err := s.killUnderLoad(ctx, vm); err != nil {
		return err
	}
	s.say("guest compares its files with their checksums and looks for kernel complaints")
	if _, err := vm.Run(ctx, checkFiles); err != nil {
		return err
	}
	bad, err := vm.Complaints(ctx)
	if err != nil {
		return err
	}
	if len(bad) > 0 {
		return fmt.Errorf("the guest's kernel complains:\n%s", strings.Join(bad, "\n"))
	}
	s.say("guest unmounts and powers off")
	return vm.PowerOff(ctx)
}

const makeFiles = `set -e
mkfs.ext4 -q /dev/vda
mount /dev/vda /mnt
mkdir /mnt/files
cp -r /bin/busybox /modules /mnt/files
for i in 1 2 3 4 5 6 7 8; do dd if=/dev/urandom of=/mnt/files/random.$i bs=64k count=32 2>/dev/null; done
sync
cd /mnt/files
find . -type f | xargs sha256sum >/tmp/sums`

const checkFiles = `set -e
cd /mnt/files
sha256sum -c /tmp/sums >/tmp/sums.out 2>&1 || { grep -v OK /tmp/sums.out; exit 1; }
cd /
umount /mnt`

// killUnderLoad runs fio in the guest and kills the daemon in the middle.
func (s *show) killUnderLoad(ctx context.Context, vm *qemu.VM) error {
	s.say("guest runs fio: 4 KiB random writes with verify, two jobs of depth 16")
	if err := vm.Background(ctx, "fio", fioScript); err != nil {
		return err
	}
	select {
	case <-time.After(2 * time.Second):
	case <-ctx.Done():
		return ctx.Err()
	}
	if done, err := vm.Finished(ctx, "fio"); err != nil {
		return err
	} else if done {
		out, err := vm.Join(ctx, "fio")
		return errors.Join(fmt.Errorf("fio ended before the daemon could be killed: %s", out), err)
	}
	s.say("kill -9 %d: scoriad is gone in the middle of it", s.d.Process().PID())
	killed := time.Now()
	if err := s.d.Kill(); err != nil {
		return err
	}
	s.say("starting scoriad again on the same directories")
	if err := s.d.Start(ctx); err != nil {
		return err
	}
	back := time.Since(killed)
	s.say("scoriad answers again %v after the kill; the guest goes on", back.Round(time.Millisecond))
	s.figure("daemon away, kill to answering", "%v", back.Round(time.Millisecond))
	out, err := vm.Join(ctx, "fio")
	if err != nil {
		return err
	}
	r, err := parseFio(out)
	if err != nil {
		return err
	}
	s.say("fio has ended: every byte was verified, no error")
	s.figure("guest: longest wait for a write", "%v (the pause it saw)", r.longestWrite.Round(time.Millisecond))
	s.figure("guest: fio writes", "%d, %.0f/s on average, pause included", r.writes, r.writeIOPS)
	s.figure("guest: fio reads, verifying", "%d, %.0f/s", r.reads, r.readIOPS)
	return nil
}

// outside checks the volume from the host, through the helper socket.
func (s *show) outside(ctx context.Context) error {
	raw := filepath.Join(s.scratch, "demo.raw")
	s.say("copying the volume out: nbdcopy '%s'", s.d.NBD(volume))
	begin := time.Now()
	if _, err := bed.Run(ctx, "nbdcopy", s.d.NBD(volume), raw); err != nil {
		return err
	}
	s.figure("helper socket: volume copied in", "%v", time.Since(begin).Round(time.Millisecond))
	s.say("checking the file system from outside: e2fsck -fn")
	out, err := bed.Run(ctx, "e2fsck", "-fn", raw)
	if err != nil {
		return err
	}
	lines := strings.Split(strings.TrimSpace(out), "\n")
	s.figure("e2fsck", "clean: %s", lines[len(lines)-1])
	s.say("checking the volume: scoria volume check %s", volume)
	if out, err = s.d.CLI(ctx, "volume", "check", volume); err != nil {
		return err
	}
	s.figure("scoria volume check", "%s", strings.Join(strings.Fields(out), " "))
	return os.Remove(raw)
}

// stats adds the volume's own statistics to the figures.
func (s *show) stats(ctx context.Context) error {
	out, err := s.d.CLI(ctx, "volume", "stats", volume)
	if err != nil {
		return err
	}
	s.figures = append(s.figures, "  scoria volume stats "+volume+":")
	for _, l := range strings.Split(strings.TrimRight(out, "\n"), "\n") {
		s.figures = append(s.figures, "    "+l)
	}
	return nil
}

// explain says how to use the daemon that was kept.
func (s *show) explain() {
	cli := fmt.Sprintf("%s --socket %s", s.d.Scoria, s.d.ControlSocket())
	fmt.Printf(`
scoriad (pid %d) goes on running. Try:
  %[2]s volume list
  %[2]s volume create mine --size 10G
  %[2]s volume stats %[3]s
  qemu-img info -f raw '%[4]s'
  nbdinfo --list 'nbd+unix://?socket=%[5]s'
A guest uses the volume with these options of QEMU:
  -object memory-backend-memfd,id=mem,size=1G,share=on -machine q35,memory-backend=mem -m 1G \
  -chardev socket,id=c0,path=%[6]s,reconnect=1 \
  -device vhost-user-blk-pci,chardev=c0
Log: %[7]s
To end it and remove everything:
  kill %[1]d; rm -rf %[8]s %[9]s
`, s.d.Process().PID(), cli, volume, s.d.NBD(volume), s.d.NBDSocket(), s.d.VhostSocket(volume), s.d.LogFile(), s.scratch, s.d.RunDir)
}
