// Package daemon runs scoriad for the integration tests and the demo: builds the
// programs, starts, kills and restarts the daemon on the same directories, and
// calls the operator's command line.
package daemon

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"time"

	"scoria/integration/bed"
)

// Programs are a build of the programs under test.
type Programs struct {
	Scoriad string // the daemon
	Scoria  string // the operator's command line
}

// Build builds the programs into dir with a version string. Unchanged packages
// come from Go's build cache.
func Build(ctx context.Context, dir, version string) (Programs, error) {
	root, err := bed.Root()
	if err != nil {
		return Programs{}, err
	}
	cmd := `cd "$1" && CGO_ENABLED=0 exec go build -ldflags "-X main.version=$3" -o "$2/" ./cmd/scoriad ./cmd/scoria ./cmd/scoria-asd`
	if _, err := bed.Run(ctx, "sh", "-c", cmd, "sh", root, dir, version); err != nil {
		return Programs{}, err
	}
	return Programs{Scoriad: filepath.Join(dir, "scoriad"), Scoria: filepath.Join(dir, "scoria")}, nil
}

// Daemon is a scoriad, running or not, with its directories.
type Daemon struct {
	Programs
	DataDir  string // on a disk
	RunDir   string // on tmpfs: sockets, and the log's head
	Config   string // configuration file that names both; empty: they are given as arguments
	LogTo    string // what the daemon prints; empty: scoriad.log in DataDir
	Args     []string
	Detached bool // lives on when this process ends

	proc *bed.Process
}

// readyWait bounds a start, recovery included.
const readyWait = 60 * time.Second

// stopWait bounds a clean stop: the log's head is written out.
const stopWait = 60 * time.Second

// Start starts the daemon and waits until its control socket answers.
func (d *Daemon) Start(ctx context.Context) error {
	if d.proc != nil && d.proc.Running() {
		return errors.New("scoriad runs already")
	}
	args := []string{"--data-dir", d.DataDir, "--run-dir", d.RunDir}
	if d.Config != "" {
		args = []string{"--config", d.Config}
	}
	p, err := bed.Start(bed.Spec{
		Path:     d.Scoriad,
		Args:     append(args, d.Args...),
		Log:      d.LogFile(),
		Detached: d.Detached,
	})
	if err != nil {
		return err
	}
	d.proc = p
	ctx, cancel := context.WithTimeout(ctx, readyWait)
	defer cancel()
	err = bed.Poll(ctx, 5*time.Millisecond, "scoriad's control socket", func() (bool, error) {
		if err := p.Dead(); err != nil {
			return false, err
		}
		_, err := bed.Run(ctx, d.Scoria, "--socket", d.ControlSocket(), "status")
		return err == nil, nil
	})
	if err != nil {
		err = fmt.Errorf("%w; its log ends:\n%s", err, bed.Tail(d.LogFile(), 20))
		return errors.Join(err, p.Kill())
	}
	return nil
}

// Kill sends SIGKILL and returns once the process is gone.
func (d *Daemon) Kill() error {
	if d.proc == nil {
		return nil
	}
	return d.proc.Kill()
}

// Stop sends SIGTERM and waits for a clean exit.
func (d *Daemon) Stop(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, stopWait)
	defer cancel()
	return d.proc.Terminate(ctx)
}

// Process returns the running process.
func (d *Daemon) Process() *bed.Process { return d.proc }

// LogFile is where the daemon's log goes, over all its starts.
func (d *Daemon) LogFile() string {
	if d.LogTo != "" {
		return d.LogTo
	}
	return filepath.Join(d.DataDir, "scoriad.log")
}

// ControlSocket is where the command line connects.
func (d *Daemon) ControlSocket() string { return filepath.Join(d.RunDir, "control.sock") }

// VhostSocket is where QEMU connects for a volume of the default pool.
func (d *Daemon) VhostSocket(volume string) string {
	return filepath.Join(d.RunDir, "vhost", "default", volume+".sock")
}

// ShmSocket is where shared-memory clients connect.
func (d *Daemon) ShmSocket() string { return filepath.Join(d.RunDir, "shm.sock") }

// NBDSocket is the helper socket.
func (d *Daemon) NBDSocket() string { return filepath.Join(d.RunDir, "nbd.sock") }

// NBD returns the address of a volume of the default pool for NBD clients.
func (d *Daemon) NBD(volume string) string {
	return "nbd+unix:///default/" + volume + "?socket=" + d.NBDSocket()
}

// CLI calls the operator's command line and returns what it printed.
func (d *Daemon) CLI(ctx context.Context, args ...string) (string, error) {
	return bed.Run(ctx, d.Scoria, append([]string{"--socket", d.ControlSocket()}, args...)...)
}

// CLIJSON calls the command line with -o json and decodes what it printed. What into
// points to is emptied first: who calls it again and again must not see again what was
// printed before and is left out now.
func (d *Daemon) CLIJSON(ctx context.Context, into any, args ...string) error {
	out, err := d.CLI(ctx, append(args, "-o", "json")...)
	if err != nil {
		return err
	}
	reflect.ValueOf(into).Elem().SetZero()
	if err := json.Unmarshal([]byte(out), into); err != nil {
		return fmt.Errorf("scoria %s -o json: %w in %q", strings.Join(args, " "), err, out)
	}
	return nil
}

// Create makes a volume of the default pool and waits for its socket.
func (d *Daemon) Create(ctx context.Context, volume, size string, args ...string) error {
	if _, err := d.CLI(ctx, append([]string{"volume", "create", volume, "--size", size}, args...)...); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, readyWait)
	defer cancel()
	return bed.Poll(ctx, 5*time.Millisecond, "the volume's socket", func() (bool, error) {
		_, err := os.Stat(d.VhostSocket(volume))
		return err == nil, d.proc.Dead()
	})
}
