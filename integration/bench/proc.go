package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"scoria/vhost/client/load"
)

// process is a server that the benchmark started. It is ended by its pid, and
// dies with the benchmark whatever happens to that.
type process struct {
	name string
	cmd  *exec.Cmd
	out  lockedBuffer
	dead chan struct{}
	calm int // steps of settle that have to be quiet one after the other; 0 is 1
}

// lockedBuffer keeps the last part of what a process printed.
type lockedBuffer struct {
	mu sync.Mutex
	b  []byte
}

const outputBytes = 8 << 10

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.b = append(l.b, p...)
	if len(l.b) > outputBytes {
		l.b = bytes.Clone(l.b[len(l.b)-outputBytes:])
	}
	return len(p), nil
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return strings.TrimSpace(string(l.b))
}

// startPinned starts a program whose threads all run on one CPU (negative: any).
// It is born there, so that a runtime which counts its CPUs counts one.
func startPinned(cpu int, name string, args ...string) (*process, error) {
	path, err := exec.LookPath(name)
	if err != nil {
		return nil, fmt.Errorf("%s is missing: %w", name, err)
	}
	p := &process{name: name, cmd: exec.Command(path, args...), dead: make(chan struct{})}
	p.cmd.Stdout, p.cmd.Stderr = &p.out, &p.out
	started := make(chan error)
	// The thread that forks must outlive the child, or Pdeathsig ends it; and it
	// keeps the affinity, so no goroutine may use it later.
	go func() {
		runtime.LockOSThread()
		p.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Setpgid: true}
		if err := setAffinity(cpu); err != nil {
			started <- err
			return
		}
		err := p.cmd.Start()
		started <- err
		if err == nil {
			p.cmd.Wait()
			close(p.dead)
		}
	}()
	if err := <-started; err != nil {
		return nil, fmt.Errorf("start %s: %w", name, err)
	}
	return p, nil
}

// runPinned runs a program on one CPU and waits for it.
func runPinned(cpu int, cmd *exec.Cmd) error {
	ended := make(chan error)
	go func() { // its thread keeps the affinity, and ends with the goroutine
		runtime.LockOSThread()
		err := setAffinity(cpu)
		if err == nil {
			err = cmd.Run()
		}
		ended <- err
	}()
	return <-ended
}

// setAffinity binds the calling thread to cpu, or to all CPUs if negative.
func setAffinity(cpu int) error {
	if cpu >= 0 {
		return load.PinThread(cpu)
	}
	var all unix.CPUSet
	for i := range 1024 {
		all.Set(i)
	}
	return unix.SchedSetaffinity(0, &all)
}

func (p *process) pid() int { return p.cmd.Process.Pid }

// stop asks the process to end and kills it if it doesn't within a while.
func (p *process) stop() {
	if p == nil {
		return
	}
	p.cmd.Process.Signal(syscall.SIGTERM)
	select {
	case <-p.dead:
	case <-time.After(20 * time.Second):
		p.kill()
	}
}

func (p *process) kill() {
	p.cmd.Process.Kill()
	<-p.dead
}

// waitFor polls until ready says so, the process dies, or it takes too long.
func (p *process) waitFor(ctx context.Context, what string, ready func() bool) error {
	limit := time.After(30 * time.Second)
	for !ready() {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-p.dead:
			return fmt.Errorf("%s ended before %s: %s", p.name, what, p.out.String())
		case <-limit:
			return fmt.Errorf("%s: no %s within 30 s: %s", p.name, what, p.out.String())
		case <-time.After(5 * time.Millisecond):
		}
	}
	return nil
}

// settle waits until the process has nearly stopped using the CPU and writing to
// disks, for as many steps as calm says: what it does in the background must not
// weigh on the next measurement. At most limit.
func (p *process) settle(ctx context.Context, limit time.Duration) error {
	const (
		step       = 100 * time.Millisecond
		quietCPU   = step / 10
		quietBytes = 1 << 20
	)
	end := time.Now().Add(limit)
	last, err := p.activity()
	for quiet := 0; err == nil && time.Now().Before(end); {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-p.dead:
			return fmt.Errorf("%s died: %s", p.name, p.out.String())
		case <-time.After(step):
		}
		var now activity
		if now, err = p.activity(); err == nil && now.cpu-last.cpu <= quietCPU && now.written-last.written <= quietBytes {
			if quiet++; quiet >= max(p.calm, 1) {
				return nil
			}
		} else {
			quiet = 0
		}
		last = now
	}
	return err
}

// activity is what settle looks at.
type activity struct {
	cpu     time.Duration
	written uint64 // bytes, to block devices
}

func (p *process) activity() (activity, error) {
	u, err := load.ReadUsage(p.pid())
	if err != nil {
		return activity{}, err
	}
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/io", p.pid()))
	if err != nil {
		return activity{}, err
	}
	a := activity{cpu: u.CPU}
	for line := range strings.Lines(string(b)) {
		if v, ok := strings.CutPrefix(line, "write_bytes: "); ok {
			a.written, err = strconv.ParseUint(strings.TrimSpace(v), 10, 64)
		}
	}
	return a, err
}

func exists(path string) func() bool {
	return func() bool {
		_, err := os.Stat(path)
		return !errors.Is(err, os.ErrNotExist)
	}
}
