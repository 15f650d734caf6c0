package integration

import (
	"fmt"
	"path/filepath"
	"strings"
	"testing"

	"scoria/integration/qemu"
)

// migrant is a guest that moves between QEMUs of one host: each of them is connected
// to the volume's socket, and one at a time has started its rings.
type migrant struct {
	*env
	vm   *qemu.VM
	opts qemu.Options
}

// migrantLoad writes and checks what it reads, and has the disk write to memory that
// only the dirty log tells QEMU of: see keeper in guest/torture. What it finds wrong
// is on the console, which can be read while the guest is on its way.
const migrantLoad = `torture -workers 6 -keep-mib 24 -dirty-mib 16 -stop /tmp/stop -run 10m 2>/tmp/wrong || { cat /tmp/wrong >/dev/console; exit 1; }`

// migrant boots a guest that is busy with volume "a".
func (e *env) migrant() *migrant {
	e.Helper()
	e.must(e.Create(e.ctx, "a", "128M"))
	m := &migrant{env: e, opts: qemu.Options{Disks: []qemu.Disk{e.disk("a", 2)}}}
	m.vm = e.boot(m.opts)
	e.must(m.vm.Background(e.ctx, "torture", migrantLoad))
	m.works()
	return m
}

// expect starts a QEMU that waits for the guest, and returns it with its address.
func (m *migrant) expect() (*qemu.VM, string) {
	m.Helper()
	img, err := image()
	m.must(err)
	o := m.opts
	o.Image, o.Dir = img, scratch(m.T, true)
	address := "unix:" + filepath.Join(o.Dir, "migrate.sock")
	o.Incoming = address
	return m.launch(o), address
}

// moved waits until the migration to b has ended, now that it may, and goes on there.
func (m *migrant) moved(b *qemu.VM) {
	m.Helper()
	m.must(m.vm.SetPace(m.ctx, qemu.Ending))
	s, err := m.vm.Migrated(m.ctx, "completed")
	m.must(err)
	m.must(b.TakeOver(m.ctx, m.vm))
	m.Logf("moved in %d passes, %d MiB; the guest stood still for %d ms", s.RAM.Passes, s.RAM.Transferred>>20, s.Down)
	m.must(m.vm.Kill())
	m.vm = b
	m.poll("the volume to be used by the QEMU that has the guest", func() (bool, error) {
		var show struct {
			UsedBy string `json:"used_by"`
		}
		err := m.CLIJSON(m.ctx, &show, "volume", "show", "a")
		return strings.HasSuffix(show.UsedBy, fmt.Sprintf("of pid %d", b.PID())), err
	})
	m.works()
}

// served is the number of signals to the guest, which come with what was answered.
func (m *migrant) served() int {
	m.Helper()
	return m.metric(`scoria_vhost_notifications_total{kind="call",volume="default/a"}`)
}

// works waits until the guest's load has got on.
func (m *migrant) works() {
	m.Helper()
	begin := m.served()
	m.poll("the guest to work", func() (bool, error) {
		if c := m.vm.Console(20); strings.Contains(c, "torture:") || strings.Contains(c, "Oops") {
			return false, fmt.Errorf("it says:\n%s", c)
		}
		return m.served() > begin+500, m.vm.Dead()
	})
}

// logged is how many pages were marked in dirty logs.
func (m *migrant) logged() int {
	m.Helper()
	return m.metric(`scoria_vhost_dirty_log_pages_total{volume="default/a"}`)
}

// end lets the load check all that it knows, and the guest go.
func (m *migrant) end() {
	m.Helper()
	m.guest(m.vm, "touch /tmp/stop")
	r := m.tortureEnd(m.vm, "torture")
	m.Logf("clusters checked in memory long after they were read: %d", r.Kept)
	m.powerOff(m.vm)
	m.ok(m.CLI(m.ctx, "volume", "check", "a"))
}

// TestLiveMigration: a busy guest moves to another QEMU, after several passes over
// its memory, and back to a third one.
func TestLiveMigration(t *testing.T) {
	e := start(t)
	m := e.migrant()
	for range 2 {
		before := m.logged()
		b, address := m.expect()
		m.must(m.vm.Migrate(m.ctx, address, qemu.Endless))
		m.must(m.vm.Passes(m.ctx, 4))
		m.works()
		if m.logged() <= before {
			t.Fatal("nothing was marked in the dirty log: was LOG_ALL not negotiated?")
		}
		m.moved(b)
	}
	m.end()
}

// TestMigrationCanceled: a migration that is given up leaves the guest where it is,
// with its memory no longer logged; the next one succeeds.
func TestMigrationCanceled(t *testing.T) {
	e := start(t)
	m := e.migrant()
	b, address := m.expect()
	m.must(m.vm.Migrate(m.ctx, address, qemu.Endless))
	m.must(m.vm.Passes(m.ctx, 2))
	m.must(m.vm.CancelMigration(m.ctx))
	_, err := m.vm.Migrated(m.ctx, "cancelled")
	m.must(err)
	m.must(b.Kill())
	m.poll("logging to end", func() (bool, error) {
		before := m.logged()
		m.works()
		return m.logged() == before, nil
	})
	b, address = m.expect()
	m.must(m.vm.Migrate(m.ctx, address, qemu.Endless))
	m.must(m.vm.Passes(m.ctx, 2))
	m.moved(b)
	m.end()
}

// The source goes on, with a daemon that knows that it has to log, and the guest moves.
func TestP3KillDuringMigration(t *testing.T) {
	e := start(t)
	m := e.migrant()
	b, address := m.expect()
	m.must(m.vm.Migrate(m.ctx, address, qemu.Endless))
	m.must(m.vm.Passes(m.ctx, 2))
	for range 2 {
		e.must(e.Daemon.Kill())
		e.restart()
		e.attached("a")
		m.works()
		if m.logged() == 0 {
			t.Fatal("the new daemon marks nothing in the dirty log")
		}
		s, err := m.vm.Migration(m.ctx)
		m.must(err)
		m.must(m.vm.Passes(m.ctx, s.RAM.Passes+2))
	}
	// QEMU before 9.1 does not look at a connection that comes back before the guest
	// does, and fails to start the device if there is none then.
	m.poll("the waiting QEMU to be connected again", func() (bool, error) {
		return m.metric(`scoria_vhost_sessions{volume="default/a"}`) == 2, b.Dead()
	})
	m.moved(b)
	m.end()
}
