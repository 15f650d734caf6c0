package integration

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"scoria/integration/bed"
	"scoria/integration/guest"
	"scoria/integration/qemu"
)

// systemdGuest boots a guest whose systemd has the packaged units, configuration and
// programs, and a second disk for a storage daemon.
func (e *env) systemdGuest() *qemu.VM {
	e.Helper()
	root, err := bed.Root()
	e.must(err)
	packaged := func(name string) []byte {
		b, err := os.ReadFile(filepath.Join(root, "packaging", name))
		e.must(err)
		return b
	}
	const noKeys = "\nmaster_keys = ''\n"
	config := string(packaged("scoria.toml"))
	if !strings.Contains(config, noKeys) {
		e.Fatalf("the packaged configuration lacks %q", noKeys)
	}
	config = strings.Replace(config, noKeys, "\nmaster_keys = 'credential:master-keys'\n", 1)
	dir := scratch(e.T, false)
	disk := filepath.Join(dir, "root.img")
	bin := filepath.Dir(e.Scoriad)
	d := guest.SystemdDisk{
		Programs: []string{e.Scoriad, e.Scoria, filepath.Join(bin, "scoria-asd")},
		Tools:    []string{"mkfs.ext4", "nbdcopy"},
	}
	d.Files = map[string][]byte{
		"/usr/lib/systemd/system/scoriad.service":         packaged("systemd/scoriad.service"),
		"/usr/lib/systemd/system/scoria-asd@.service":     packaged("systemd/scoria-asd@.service"),
		"/etc/scoria/scoria.toml":                         []byte(config),
		"/etc/scoria/asd/disk1.env":                       []byte("DATA_DIR=/srv/disk1\nLISTEN=127.0.0.1:9711\n"),
		"/etc/scoria/master-keys":                         []byte(strings.Repeat("5c", 32) + "\n"),
		"/etc/systemd/system/scoriad.service.d/keys.conf": []byte("[Service]\nLoadCredential=master-keys:/etc/scoria/master-keys\n"),
	}
	e.must(guest.WriteSystemdDisk(e.ctx, disk, d))
	empty := filepath.Join(dir, "disk1.img")
	e.must(errors.Join(os.WriteFile(empty, nil, 0o644), os.Truncate(empty, 512<<20)))
	var args []string
	for i, file := range []string{disk, empty} {
		args = append(args, "-drive", fmt.Sprintf("file=%s,format=raw,if=none,id=d%d,cache=unsafe", file, i),
			"-device", fmt.Sprintf("virtio-blk-pci,drive=d%d", i))
	}
	return e.boot(qemu.Options{MemoryMiB: 1024, ExtraArgs: args, ExtraKArgs: guest.SystemdArg})
}

// TestSystemdUnits: a real systemd starts both daemons from the packaged units with the
// packaged configuration, and gives scoriad its master keys as a credential. What was
// written is there when systemd has restarted them after a SIGKILL, and after a stop,
// which is clean.
func TestSystemdUnits(t *testing.T) {
	e := prepare(t)
	vm := e.systemdGuest()
	const units = "scoriad.service scoria-asd@disk1.service"
	show := func(property string) string {
		return strings.Join(strings.Fields(e.guest(vm, "systemctl show -P "+property+" "+units)), " ")
	}
	// Type=notify: they are active when they say that they are ready.
	active := func() {
		e.Helper()
		// Each look costs the guest as much as a daemon's start.
		e.must(bed.Poll(e.ctx, time.Second, "both daemons to be active", func() (bool, error) { return show("ActiveState") == "active active", nil }))
	}
	e.guest(vm, `set -e
mkfs.ext4 -q /dev/vdb
mkdir -p /srv/disk1
mount /dev/vdb /srv/disk1
systemctl enable -q `+units+`
systemctl start --no-block `+units)
	active()
	e.guest(vm, `set -e
scoria asd add 127.0.0.1:9711
scoria preset create locked --policy 1,0,1,1 --encryption aes-256-gcm
scoria pool create locked --preset locked --sco-size 1M
dd if=/dev/urandom of=/root/data bs=1M count=16 2>/dev/null
scoria volume create locked/a --size 16M
nbdcopy --flush /root/data 'nbd+unix:///locked/a?socket=/run/scoria/nbd.sock'`)
	same := `
nbdcopy 'nbd+unix:///locked/a?socket=/run/scoria/nbd.sock' /root/back
cmp /root/data /root/back
rm /root/back
test -S /run/scoria/vhost/locked/a.sock`

	var was, is [2]int
	pids := func(p *[2]int) {
		e.Helper()
		_, err := fmt.Sscan(show("MainPID"), &p[0], &p[1])
		e.must(err)
	}
	pids(&was)
	e.guest(vm, "systemctl kill --kill-whom=main -s KILL "+units)
	e.must(bed.Poll(e.ctx, time.Second, "systemd to see that both daemons died", func() (bool, error) {
		pids(&is)
		return is[0] != was[0] && is[1] != was[1], nil
	}))
	active()
	e.guest(vm, "set -e"+same)

	e.guest(vm, "systemctl stop "+units)
	if state, result := show("ActiveState"), show("Result"); state != "inactive inactive" || result != "success success" {
		t.Fatalf("after the stop they are %s, with %s", state, result)
	}
	e.guest(vm, `set -e
test -d /run/scoria
systemctl start `+units+same)
	e.content(vm)
	// The guest's end stops them, too.
	_, err := vm.Run(e.ctx, "systemctl --no-block poweroff")
	e.must(err)
	e.must(vm.Wait(e.ctx))
}
