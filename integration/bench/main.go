// Command bench is `make bench`: it drives Scoria and qemu-storage-daemon with
// the same client in alternating rounds, and prints the figures and ratios of
// DESIGN.md §13 with their targets.
//
// Placement decides most of what is measured (the cost of waking a thread on
// another CPU): A pins the client to one CPU and the server to another, and both
// poll; D pins both to one CPU, and both sleep. Each ratio is formed within a
// round; what is printed is the median over the rounds, with minimum and maximum.
//
// The peer serves a raw file on tmpfs: no durability, no checksum. Scoria runs
// its whole engine: log, CRC, map. Rows that need a disk (write and flush,
// sustained writes) are compared with what the disk under the data directory does
// for a bare loop in the same minutes. The tail rows, p99.9 at half load in an open
// loop, stand beside an ideal server's on the same CPUs, and say who had the CPU
// (tail.go): a stall of a millisecond, whoever causes it, makes a thousand requests
// late.
//
// Every process that it starts is ended by its pid, on Ctrl-C too, and dies with
// the benchmark; its directories are removed.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"runtime"
	"runtime/debug"
	"syscall"

	"scoria/vhost/client/load"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, os.Args[1:]); err != nil {
		if errors.Is(err, errUsage) {
			os.Exit(2)
		}
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string) (err error) {
	cfg, err := parseFlags(args)
	if err != nil {
		return err
	}
	// The number of CPUs of this process is about to become one, and a polling
	// worker would take the only place to run.
	runtime.GOMAXPROCS(4)
	debug.SetGCPercent(-1)
	if err := load.PinProcess(os.Getpid(), cfg.clientCPU); err != nil {
		return err
	}
	b := &bench{cfg: cfg, results: results{}}
	defer b.cleanup()
	if err := b.prepare(ctx); err != nil {
		return err
	}
	b.measure(ctx)
	if err := ctx.Err(); err != nil {
		return fmt.Errorf("interrupted: %w", err)
	}
	return b.report(os.Stdout)
}
