// Command scoria is the operator's command line: it speaks to the daemon of its
// host through RUN/control.sock.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"scoria/driver/control"
	"scoria/driver/host"
)

// version is set by the linker.
var version = "devel"

// Exit codes, as the manual page states them.
const (
	exitOK       = 0
	exitFailure  = 1
	exitUsage    = 2
	exitNotFound = 3
	exitInUse    = 4
	exitProblems = 5
	exitForce    = 6
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	a := &app{out: os.Stdout, errOut: os.Stderr, rebuild: host.RebuildRegistry}
	err := a.command().ExecuteContext(ctx)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "scoria:", err)
	}
	os.Exit(exitCode(err))
}

// usageError is a command line that can't be understood.
type usageError struct{ error }

// errProblems: a check ended and found problems, which are on the output.
var errProblems = errors.New("check found problems")

func exitCode(err error) int {
	var usage usageError
	switch {
	case err == nil:
		return exitOK
	case errors.As(err, &usage):
		return exitUsage
	case errors.Is(err, errProblems):
		return exitProblems
	}
	switch control.CodeOf(err) {
	case control.CodeInvalid:
		return exitUsage
	case control.CodeNotFound:
		return exitNotFound
	case control.CodeInUse:
		return exitInUse
	case control.CodeNeedsForce:
		return exitForce
	}
	return exitFailure
}
