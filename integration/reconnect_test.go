package integration

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"scoria/integration/qemu"
	"scoria/vhost/wire"
)

const (
	// disksPerGuest is how many disks fit on QEMU's root bus.
	disksPerGuest = 24
	// silence is how long a guest's disk may hang on a connection without a word
	// until QEMU is said to have lost it. QEMU speaks at once or never.
	silence = 5 * time.Second
)

// TestP3DaemonDiesWhileQEMUConnects ends QEMU's connection at every message of
// its negotiation, before and after the daemon's answer, each on a disk of its own.
// From SET_FEATURES on, where QEMU starts the device, every disk must come back.
// Before, in QEMU's vhost_dev_init, releases from 7.2 to 9.0 lose it for good (see
// package vhost): only a disk whose QEMU never says a word again may hang.
func TestP3DaemonDiesWhileQEMUConnects(t *testing.T) {
	e := start(t)
	sequence := e.negotiation()
	t.Logf("QEMU negotiates: %v", sequence)
	starts := slices.Index(sequence, wire.SetFeatures) // counted from 0
	if starts < 0 {
		t.Fatal("no SET_FEATURES")
	}
	var cuts []cut
	for n := range sequence {
		cuts = append(cuts, cut{message: n + 1}, cut{message: n + 1, answered: true})
	}
	var lost []string
	for batch := range slices.Chunk(cuts, disksPerGuest) {
		lost = append(lost, e.cutAll(batch, starts)...)
	}
	t.Logf("%d of %d connections were lost by QEMU: %s", len(lost), len(cuts), strings.Join(lost, "; "))
}

// negotiation returns what QEMU says when it connects again.
func (e *env) negotiation() []wire.Request {
	e.Helper()
	e.must(e.Create(e.ctx, "plain", "64M"))
	m := between(e.T, e.VhostSocket("plain"))
	vm := e.boot(qemu.Options{Disks: []qemu.Disk{{Socket: m.path, Queues: 2}}})
	n := m.drop(cut{})
	e.guest(vm, writeSome("/dev/vda"))
	said, _ := m.connection(n).messages()
	e.powerOff(vm)
	return said
}

func writeSome(dev string) string {
	return "dd if=/dev/zero of=" + dev + " bs=4k count=64 oflag=direct 2>&1"
}

// cutAll makes the cuts under one guest and returns the lost ones.
func (e *env) cutAll(cuts []cut, starts int) (lost []string) {
	e.Helper()
	var disks []qemu.Disk
	var men []*middleman
	for _, c := range cuts {
		name := fmt.Sprintf("v%d-%v", c.message, c.answered)
		e.must(e.Create(e.ctx, name, "64M"))
		m := between(e.T, e.VhostSocket(name))
		men = append(men, m)
		disks = append(disks, qemu.Disk{Socket: m.path, Queues: 2})
	}
	vm := e.boot(qemu.Options{Disks: disks})
	after := make([]int, len(cuts)) // the connection that comes back
	for i, c := range cuts {
		after[i] = men[i].drop(c) + 1
	}
	for i := range cuts {
		e.must(vm.Background(e.ctx, fmt.Sprint("io", i), writeSome(fmt.Sprintf("/dev/vd%c", 'a'+i))))
	}
	for i, c := range cuts {
		e.poll(fmt.Sprintf("the disk that was cut %v", c), func() (bool, error) {
			done, err := vm.Finished(e.ctx, fmt.Sprint("io", i))
			if done || err != nil {
				return done, err
			}
			r := men[i].connection(after[i])
			if r == nil || c.message > starts {
				return false, nil
			}
			if said, ended := r.messages(); len(said) > 0 || ended || time.Since(r.born) < silence {
				return false, nil
			}
			lost = append(lost, c.String())
			return true, nil
		})
	}
	e.must(vm.Kill())
	return lost
}

// TestP3KillWhileQEMUConnects is the same with a daemon that really dies, under a
// guest that goes on using the disk, at every second message from SET_FEATURES on:
// rings may have been started, requests resubmitted.
func TestP3KillWhileQEMUConnects(t *testing.T) {
	e := start(t)
	sequence := e.negotiation()
	starts := slices.Index(sequence, wire.SetFeatures)
	e.must(e.Create(e.ctx, "a", "256M"))
	m := between(t, e.VhostSocket("a"))
	vm := e.boot(qemu.Options{Disks: []qemu.Disk{{Socket: m.path, Queues: 2}}})
	e.must(vm.Background(e.ctx, "torture", "torture -workers 16 -stop /tmp/stop -run 4m"))
	for n := starts; n < len(sequence); n += 2 {
		e.attached("a")
		time.Sleep(100 * time.Millisecond) // some work
		died := make(chan error, 1)
		m.drop(cut{message: n + 1, answered: true, reached: func() { died <- e.Daemon.Kill() }})
		select {
		case err := <-died:
			e.must(err)
		case <-e.ctx.Done():
			t.Fatalf("QEMU did not come to message %d: %v", n+1, errors.Join(e.ctx.Err(), vm.Dead()))
		}
		e.restart()
	}
	e.guest(vm, "touch /tmp/stop")
	e.tortureEnd(vm, "torture")
	e.powerOff(vm)
}

// TestP3DaemonRestartsBeforeTheGuestHasADriver: the daemon is gone for a moment
// while the guest does not use its disk yet. QEMU before 9.1 uses the new
// connection without negotiating; the guest must not notice, and the operator is
// told what comes of it.
func TestP3DaemonRestartsBeforeTheGuestHasADriver(t *testing.T) {
	e := start(t)
	e.must(e.Create(e.ctx, "a", "64M"))
	img, err := image()
	e.must(err)
	vm := e.launch(qemu.Options{Image: img, Disks: []qemu.Disk{e.disk("a", 2)}, ExtraArgs: []string{"-S"}})
	e.must(e.Daemon.Kill())
	e.restart()
	e.poll("QEMU to connect again", func() (bool, error) {
		out, err := e.CLI(e.ctx, "volume", "show", "a", "-o", "json")
		return strings.Contains(out, "1 connections"), err
	})
	must(e, vm, "cont")
	e.must(vm.Reattach(e.ctx))
	e.guest(vm, writeSome("/dev/vda"))
	if out := e.ok(e.CLI(e.ctx, "volume", "show", "a")); strings.Contains(out, "front-end-deaf") {
		t.Logf("QEMU went on without negotiating:\n%s", out)
	} else {
		// It negotiated, so it comes back.
		e.must(e.Daemon.Kill())
		e.restart()
		e.guest(vm, writeSome("/dev/vda"))
	}
	e.powerOff(vm)
}
