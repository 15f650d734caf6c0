package bed

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"time"
)

// Spec says what to run.
type Spec struct {
	Path string   // program
	Args []string // without the program's name
	Env  []string // added to this process's environment
	Log  string   // file to which stdout and stderr are appended
	// Detached processes get a session of their own and live on when this one
	// ends; for what a user asked to keep.
	Detached bool
}

// Process is a running program.
type Process struct {
	name string
	log  string
	cmd  *exec.Cmd
	done chan struct{} // closed when it has been waited for
	err  error         // of Wait; valid once done is closed
}

// killWait bounds the wait for a process that was sent SIGKILL. The kernel
// needs milliseconds, or much longer if it has gigabytes of memory to free.
const killWait = 30 * time.Second

// Start runs a program.
func Start(s Spec) (*Process, error) {
	log, err := os.OpenFile(s.Log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return nil, err
	}
	defer log.Close()
	p := &Process{name: filepath.Base(s.Path), log: s.Log, cmd: exec.Command(s.Path, s.Args...), done: make(chan struct{})}
	p.cmd.Env = append(os.Environ(), s.Env...)
	p.cmd.Stdout, p.cmd.Stderr = log, log
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if s.Detached {
		if err := p.cmd.Start(); err != nil {
			return nil, err
		}
		go p.wait()
		return p, nil
	}
	p.cmd.SysProcAttr.Pdeathsig = syscall.SIGKILL
	started := make(chan error)
	go func() {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err := p.cmd.Start()
		started <- err
		if err == nil {
			p.wait()
		}
	}()
	if err := <-started; err != nil {
		return nil, err
	}
	return p, nil
}

func (p *Process) wait() {
	p.err = p.cmd.Wait()
	close(p.done)
}

// PID returns the process id.
func (p *Process) PID() int { return p.cmd.Process.Pid }

// Exited is closed when the process has ended.
func (p *Process) Exited() <-chan struct{} { return p.done }

// Running says whether the process has not ended yet.
func (p *Process) Running() bool {
	select {
	case <-p.done:
		return false
	default:
		return true
	}
}

// Kill sends SIGKILL and waits until the process is gone. Killing one that has
// ended is fine.
func (p *Process) Kill() error {
	if err := p.cmd.Process.Signal(syscall.SIGKILL); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return fmt.Errorf("kill %s: %w", p.name, err)
	}
	select {
	case <-p.done:
		return nil
	case <-time.After(killWait):
		return fmt.Errorf("%s (pid %d) still exists %v after SIGKILL", p.name, p.PID(), killWait)
	}
}

// Terminate sends SIGTERM and waits for the exit; anything but exit code 0 is
// an error.
func (p *Process) Terminate(ctx context.Context) error {
	if err := p.cmd.Process.Signal(syscall.SIGTERM); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return fmt.Errorf("terminate %s: %w", p.name, err)
	}
	return p.Wait(ctx)
}

// Wait waits for the exit; anything but exit code 0 is an error that carries
// the end of the log.
func (p *Process) Wait(ctx context.Context) error {
	select {
	case <-p.done:
		if p.err != nil {
			return fmt.Errorf("%s: %w; its log ends:\n%s", p.name, p.err, Tail(p.log, 30))
		}
		return nil
	case <-ctx.Done():
		return fmt.Errorf("%s (pid %d) does not end: %w; its log ends:\n%s", p.name, p.PID(), ctx.Err(), Tail(p.log, 30))
	}
}

// Dead returns nil while the process runs, else how it ended and the end of its log.
func (p *Process) Dead() error {
	if p.Running() {
		return nil
	}
	return fmt.Errorf("%s has ended (%v); its log ends:\n%s", p.name, p.cmd.ProcessState, Tail(p.log, 30))
}

// Run runs a program to its end and returns its standard output. A failure
// carries the command and what it wrote to standard error.
func Run(ctx context.Context, name string, args ...string) (string, error) {
	return RunInput(ctx, nil, name, args...)
}

// RunInput is Run with a standard input.
func RunInput(ctx context.Context, stdin io.Reader, name string, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.WaitDelay = 5 * time.Second
	var out, errOut strings.Builder
	cmd.Stdin, cmd.Stdout, cmd.Stderr = stdin, &out, &errOut
	if err := cmd.Run(); err != nil {
		if ctx.Err() != nil {
			err = ctx.Err()
		}
		return out.String(), fmt.Errorf("%s %s: %w: %s", filepath.Base(name), strings.Join(args, " "), err,
			strings.TrimSpace(errOut.String()+"\n"+out.String()))
	}
	return out.String(), nil
}

// Poll calls cond every interval until it returns true, fails, or ctx ends.
// what completes "waiting for" in the error.
func Poll(ctx context.Context, interval time.Duration, what string, cond func() (bool, error)) error {
	t := time.NewTicker(interval)
	defer t.Stop()
	for {
		ok, err := cond()
		if err != nil {
			return fmt.Errorf("waiting for %s: %w", what, err)
		}
		if ok {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("waiting for %s: %w", what, ctx.Err())
		case <-t.C:
		}
	}
}
