package integration

import (
	"fmt"
	"math/bits"
	"net"
	"os"
	"path/filepath"
	"syscall"
	"testing"

	"scoria/integration/bed"
)

// TestP5EveryCombinationOfDaemons: storage daemons, real processes, are killed and
// stopped (SIGSTOP), up to m of them in every combination, while a volume is written
// and verified over them: no error, no wrong byte, and when they are back all objects
// are as safe as before.
func TestP5EveryCombinationOfDaemons(t *testing.T) {
	for _, km := range [][2]int{{1, 1}, {2, 1}, {2, 2}} {
		t.Run(fmt.Sprintf("%d+%d", km[0], km[1]), func(t *testing.T) { combinations(t, km[0], km[1]) })
	}
}

// combined is a volume over k+m storage daemons and what was written to it last.
type combined struct {
	*env
	asds    []*asdProcess
	spare   int
	uri     string
	content string
}

func combinations(t *testing.T, k, m int) {
	e := prepare(t)
	// Without local copies every read is one of the object store, and without a pool
	// there no storage daemon is within scoriad.
	e.Config = filepath.Join(e.DataDir, "scoria.toml")
	e.must(os.WriteFile(e.Config, fmt.Appendf(nil, "data_dir = %q\nrun_dir = %q\n[cache]\nlocal = \"0\"\nread = \"0\"\n[pool]\nstore = \"directory\"\n", e.DataDir, e.RunDir), 0o600))
	e.must(e.Start(e.ctx))
	c := &combined{env: e, spare: m, uri: "nbd+unix:///safe/v?socket=" + e.NBDSocket()}
	for i := range k + m {
		c.asds = append(c.asds, e.startASD(fmt.Sprintf("asd%d", i)))
		e.addASD(c.asds[i])
	}
	e.ok(e.CLI(e.ctx, "preset", "create", "safe", "--policy", fmt.Sprintf("%d,%d,%d,1", k, m, k), "--fragment-size", "256K"))
	e.ok(e.CLI(e.ctx, "pool", "create", "safe", "--preset", "safe", "--sco-size", "1M"))
	e.ok(e.CLI(e.ctx, "volume", "create", "safe/v", "--size", "64M"))
	c.write()
	c.safe()
	for mask := 1; mask < 1<<(k+m); mask++ {
		n := bits.OnesCount(uint(mask))
		switch {
		case n == 1 && m == 1:
			c.hit(mask, func(int) bool { return true })
			c.hit(mask, func(int) bool { return false })
		case n == 2 && m == 2: // one of them killed, the other stopped
			first := bits.TrailingZeros(uint(mask))
			c.hit(mask, func(i int) bool { return i == first })
		}
	}
}

// write replaces the volume's content by other.
func (c *combined) write() {
	c.Helper()
	c.content = c.randomFile(12)
	c.run("nbdcopy", "--flush", c.content, c.uri)
}

// safe waits until every object may lose as many disks as the first policy says.
func (c *combined) safe() {
	c.Helper()
	c.ok(c.CLI(c.ctx, "backend", "repair", "start"))
	c.poll("all objects to be safe", func() (bool, error) { n, objects := c.safety(); return objects > 5 && n == c.spare, nil })
}

// hit takes the storage daemons of mask away, those that killed names by SIGKILL, the
// others by SIGSTOP, writes and reads, and brings them back.
func (c *combined) hit(mask int, killed func(i int) bool) {
	c.Helper()
	for i, a := range c.asds {
		switch {
		case mask>>i&1 == 0:
		case killed(i):
			c.must(a.Kill())
		default:
			c.must(syscall.Kill(a.PID(), syscall.SIGSTOP))
		}
	}
	c.same(c.content, c.uri)
	c.write()
	c.same(c.content, c.uri)
	for i, a := range c.asds {
		switch {
		case mask>>i&1 == 0:
		case killed(i):
			c.startAgain(a)
		default:
			c.must(syscall.Kill(a.PID(), syscall.SIGCONT))
		}
	}
	c.safe()
	c.same(c.content, c.uri)
}

// startAgain starts a storage daemon that was killed, where it was.
func (e *env) startAgain(a *asdProcess) {
	e.Helper()
	p, err := bed.Start(bed.Spec{Path: filepath.Join(filepath.Dir(e.Scoriad), "scoria-asd"), Args: []string{"--data-dir", a.dir, "--listen", a.address},
		Log: filepath.Join(e.DataDir, filepath.Base(a.dir)+".again.log")})
	e.must(err)
	a.Process = p // which startASD's cleanup kills
	e.poll("the storage daemon to listen again", func() (bool, error) {
		if err := a.Dead(); err != nil {
			return false, err
		}
		conn, err := net.Dial("tcp", a.address)
		if err != nil {
			return false, nil
		}
		return true, conn.Close()
	})
}
