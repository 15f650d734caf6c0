package integration

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"scoria/driver/control"
)

// showsNoLoss makes sure that no loss shows, of the volume or of the daemon.
func (e *env) showsNoLoss(volume string) {
	e.Helper()
	var v control.Volume
	e.must(e.CLIJSON(e.ctx, &v, "volume", "show", volume))
	var st control.Status
	e.must(e.CLIJSON(e.ctx, &st, "status"))
	for _, c := range append(v.Conditions, st.Conditions...) {
		if slices.Contains([]string{"data-lost", "corrupt-data", "store-unreadable"}, c.Code) {
			e.Fatalf("shows %s: %s", c.Code, c.Message)
		}
	}
}

// TestP5OnlyCopyRemoved: the one storage daemon that has a volume, with one copy, is removed by force
// while another is not there yet, and goes on running: all that the local disk has is read as
// before, with what is written meanwhile, and stored anew as soon as there is another one; then
// that alone is enough. No loss shows at any time.
func TestP5OnlyCopyRemoved(t *testing.T) {
	e := prepare(t)
	e.Config = filepath.Join(e.DataDir, "scoria.toml")
	config := func(local string) {
		e.must(os.WriteFile(e.Config, fmt.Appendf(nil, "data_dir = %q\nrun_dir = %q\n[cache]\nlocal = %q\nread = \"0\"\n[pool]\nstore = \"directory\"\n",
			e.DataDir, e.RunDir, local), 0o600))
	}
	config("1G")
	e.must(e.Start(e.ctx))
	first := e.startASD("first")
	id := e.addASD(first)
	e.ok(e.CLI(e.ctx, "preset", "create", "one", "--policy", "1,0,1,1"))
	e.ok(e.CLI(e.ctx, "pool", "create", "one", "--preset", "one", "--sco-size", "1M"))
	e.ok(e.CLI(e.ctx, "volume", "create", "one/v", "--size", "64M"))
	uri := "nbd+unix:///one/v?socket=" + e.NBDSocket()
	content := e.randomFile(48)
	e.run("nbdcopy", "--flush", content, uri)
	e.ok(e.CLI(e.ctx, "snapshot", "create", "one/v@s"))
	e.poll("objects to be stored", func() (bool, error) { n, objects := e.safety(); return objects > 45 && n == 0, nil })
	_, err := e.CLI(e.ctx, "asd", "remove", id)
	e.refused(err, "--force", "drain")
	e.ok(e.CLI(e.ctx, "asd", "remove", "--force", id))

	e.same(content, uri)
	e.run("qemu-io", "-f", "raw", uri, "-c", "write -P 7 1M 3M", "-c", "flush", "-c", "read -P 7 1M 3M")
	e.run("nbdcopy", uri, content)
	e.must(os.Truncate(content, 48<<20))
	e.showsNoLoss("one/v")
	second := e.addASD(e.startASD("second"))
	e.poll("everything to be stored anew", func() (bool, error) {
		e.showsNoLoss("one/v")
		n, objects := e.safety()
		return objects > 45 && n == 0, nil
	})
	e.poll("the removed storage daemon to be forgotten", func() (bool, error) {
		var asds []control.ASD
		err := e.CLIJSON(e.ctx, &asds, "asd", "list")
		return len(asds) == 1 && asds[0].ID == second, err
	})
	e.same(content, uri)
	e.must(first.Kill())
	e.must(e.Stop(e.ctx))
	config("0")
	e.restart()
	e.poll("local copies to be given up", func() (bool, error) {
		var st control.VolumeStats
		err := e.CLIJSON(e.ctx, &st, "volume", "stats", "one/v")
		return st.Space.Local == 0, err
	})
	before := e.metric(`scoria_objects_total{name="fetched_bytes"}`)
	e.same(content, uri)
	e.showsNoLoss("one/v")
	if n := e.metric(`scoria_objects_total{name="fetched_bytes"}`) - before; n < 48<<20 {
		t.Errorf("%d bytes were read from the storage daemon: the rest from elsewhere", n)
	}
	e.ok(e.CLI(e.ctx, "volume", "check", "one/v"))
}
