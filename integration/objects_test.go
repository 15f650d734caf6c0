package integration

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"scoria/driver/control"
	"scoria/integration/bed"
)

// asdProcess is a scoria-asd on loopback.
type asdProcess struct {
	*bed.Process
	dir, address string
}

// startASD runs a scoria-asd on a fresh directory and waits until it listens. Extra
// arguments go to it.
func (e *env) startASD(name string, args ...string) *asdProcess {
	e.Helper()
	// A port that is free now; nobody else on loopback asks for this one.
	l, err := net.Listen("tcp", "127.0.0.1:0")
	e.must(err)
	a := &asdProcess{dir: filepath.Join(scratch(e.T, false), name), address: l.Addr().String()}
	e.must(l.Close())
	e.runASD(a, args...)
	return a
}

// runASD starts a scoria-asd, for the first time or again, and waits until it listens.
func (e *env) runASD(a *asdProcess, args ...string) {
	e.Helper()
	e.spawnASD(a, args...)
	e.poll(filepath.Base(a.dir)+" to listen", func() (bool, error) {
		if err := a.Dead(); err != nil {
			return false, err
		}
		c, err := net.Dial("tcp", a.address)
		if err != nil {
			return false, nil
		}
		return true, c.Close()
	})
}

// spawnASD starts a scoria-asd that need not come up.
func (e *env) spawnASD(a *asdProcess, args ...string) {
	e.Helper()
	name := filepath.Base(a.dir)
	log := filepath.Join(e.DataDir, name+".log")
	p, err := bed.Start(bed.Spec{Path: filepath.Join(filepath.Dir(e.Scoriad), "scoria-asd"), Args: append([]string{"--data-dir", a.dir, "--listen", a.address}, args...), Log: log})
	e.must(err)
	a.Process = p
	e.Cleanup(func() {
		if err := p.Kill(); err != nil {
			e.Error(err)
		}
		if e.Failed() {
			e.Logf("the log of %s ends:\n%s", name, bed.Tail(log, 20))
		}
	})
}

// addASD takes it into the store and returns its ID.
func (e *env) addASD(a *asdProcess) string {
	e.Helper()
	var added control.ASD
	e.must(e.CLIJSON(e.ctx, &added, "asd", "add", a.address))
	if !added.Up || added.State != "active" {
		e.Fatalf("added %+v", added)
	}
	return added.ID
}

// safety is how many more disks may die for the least safe object, and how many
// objects there are.
func (e *env) safety() (disks int, objects int64) {
	e.Helper()
	var st control.BackendStatus
	e.must(e.CLIJSON(e.ctx, &st, "backend", "status"))
	for _, c := range st.Classes {
		for _, s := range c.Safety {
			if objects == 0 || s.Disks < disks {
				disks = s.Disks
			}
			objects += s.Objects
		}
	}
	return disks, objects
}

// TestP5ObjectStoreLosesADiskUnderLoad: a volume over three storage daemons with 2+1
// is written while one of them is killed: no error, no wrong byte, then and after a
// restart of scoriad; replaced by another one and repaired it is as safe as before,
// so that yet another one may die.
func TestP5ObjectStoreLosesADiskUnderLoad(t *testing.T) {
	e := prepare(t)
	// Without local copies every read is one of the object store.
	e.Config = filepath.Join(e.DataDir, "scoria.toml")
	e.must(os.WriteFile(e.Config, fmt.Appendf(nil, "data_dir = %q\nrun_dir = %q\n[cache]\nlocal = \"0\"\nread = \"0\"\n", e.DataDir, e.RunDir), 0o600))
	e.must(e.Start(e.ctx))
	var asds []*asdProcess
	var ids []string
	for i := range 3 {
		asds = append(asds, e.startASD(fmt.Sprintf("asd%d", i)))
		ids = append(ids, e.addASD(asds[i]))
	}
	e.ok(e.CLI(e.ctx, "preset", "create", "safe", "--policy", "2,1,2,1", "--fragment-size", "256K"))
	e.ok(e.CLI(e.ctx, "pool", "create", "safe", "--preset", "safe", "--sco-size", "1M"))
	e.ok(e.CLI(e.ctx, "volume", "create", "safe/v", "--size", "256M"))
	uri := "nbd+unix:///safe/v?socket=" + e.NBDSocket()
	first, second := e.randomFile(96), e.randomFile(192)
	e.run("nbdcopy", "--flush", first, uri)
	e.poll("objects to be stored", func() (bool, error) { n, objects := e.safety(); return objects > 30 && n == 1, nil })
	_, err := e.CLI(e.ctx, "asd", "remove", ids[0])
	e.refused(err, "--force", "drain")

	copied := make(chan error, 1)
	go func() {
		_, err := bed.Run(e.ctx, "nbdcopy", "--flush", second, uri)
		copied <- err
	}()
	_, before := e.safety()
	e.poll("the writing to reach the store", func() (bool, error) { _, objects := e.safety(); return objects > before+10, nil })
	e.must(asds[0].Kill())
	select {
	case err := <-copied:
		e.must(err)
	case <-e.ctx.Done():
		e.Fatal("writing did not end after a storage daemon was killed")
	}
	e.same(second, uri)
	e.must(e.Daemon.Kill())
	e.restart()
	e.same(second, uri)
	if strings.Contains(e.metrics(), "scoria_objects_total{name=\"reads\"} 0\n") {
		e.Error("nothing was read from the object store: the test reads elsewhere")
	}

	e.addASD(e.startASD("asd3"))
	e.ok(e.CLI(e.ctx, "asd", "remove", "--force", ids[0]))
	e.ok(e.CLI(e.ctx, "backend", "repair", "start"))
	e.poll("safety to be full again", func() (bool, error) { n, _ := e.safety(); return n == 1, nil })
	e.must(asds[1].Kill())
	e.same(second, uri)
	e.must(e.Stop(e.ctx))
	e.restart()
	e.same(second, uri)
}

// randomFile returns a file of so many MiB.
func (e *env) randomFile(mib int) string {
	e.Helper()
	name := filepath.Join(scratch(e.T, false), "random")
	e.run("dd", "if=/dev/urandom", "of="+name, "bs=1M", fmt.Sprintf("count=%d", mib), "status=none")
	return name
}

// same compares the begin of a volume, read over NBD, with a file.
func (e *env) same(file, uri string) {
	e.Helper()
	info, err := os.Stat(file)
	e.must(err)
	out := filepath.Join(scratch(e.T, false), "read")
	e.run("nbdcopy", uri, out)
	e.run("cmp", "-n", fmt.Sprint(info.Size()), file, out)
}

// TestP10LostRegistry: with the registry lost the daemon says what to do, and that
// brings a volume, its snapshot and its clone back as they were.
func TestP10LostRegistry(t *testing.T) {
	e := start(t)
	e.must(e.Create(e.ctx, "v", "64M"))
	raw := filepath.Join(scratch(t, false), "content")
	content := make([]byte, 64<<20)
	rng := rand.NewChaCha8([32]byte{4})
	rng.Read(content[:24<<20])
	e.must(os.WriteFile(raw, content, 0o600))
	e.run("nbdcopy", "--flush", raw, e.NBD("v"))
	e.ok(e.CLI(e.ctx, "snapshot", "create", "v@s"))
	e.ok(e.CLI(e.ctx, "volume", "clone", "v@s", "c"))
	e.ok(e.CLI(e.ctx, "volume", "limit", "v", "--write-iops", "100000"))
	var before control.Volume
	e.must(e.CLIJSON(e.ctx, &before, "volume", "show", "v"))
	rebuild := []string{"backend", "rebuild-registry", "--data-dir", e.DataDir}
	_, err := e.CLI(e.ctx, rebuild...)
	e.refused(err, "another scoriad uses it")
	e.must(e.Stop(e.ctx))
	_, err = e.CLI(e.ctx, rebuild...)
	e.refused(err, "--force")

	e.must(os.Remove(filepath.Join(e.DataDir, "registry.db")))
	if err := e.Start(e.ctx); err == nil {
		t.Fatal("the daemon starts without its registry")
	}
	if log := bed.Tail(e.LogFile(), 20); !strings.Contains(log, "scoria backend rebuild-registry --data-dir "+e.DataDir) {
		t.Fatalf("the log does not say what to do:\n%s", log)
	}
	e.ok(e.CLI(e.ctx, rebuild...))
	e.restart()
	var after control.Volume
	e.must(e.CLIJSON(e.ctx, &after, "volume", "show", "v"))
	if after.ID != before.ID || after.Size != before.Size || after.Serial != before.Serial {
		t.Fatalf("volume %+v, was %+v", after, before)
	}
	for _, name := range []string{"v", "c", "v@s"} {
		got, err := os.ReadFile(e.export(name))
		e.must(err)
		if !bytes.Equal(got, content) {
			t.Fatalf("%s differs", name)
		}
	}
	var limits control.Limits
	e.must(e.CLIJSON(e.ctx, &limits, "volume", "limit", "v"))
	if limits.Own.WriteIOPS == nil || *limits.Own.WriteIOPS != 100_000 {
		t.Fatalf("limits %+v", limits)
	}
}
