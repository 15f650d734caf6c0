package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"scoria/vhost/client"
	"scoria/vhost/client/load"
)

const (
	quietRate  = 100 // requests per second of the volume that is looked at
	quietBytes = 4 << 20
	busyBytes  = 256 << 20
)

// A neighbour is what the other volume does meanwhile.
type neighbour struct {
	title string
	spec  load.Spec
}

func neighbours() []neighbour {
	return []neighbour{
		{"reads 4 KiB at depth 32", load.Spec{Random: true, Depth: 32, ReadPercent: 100}},
		{"reads 1 MiB at depth 32", load.Spec{BlockBytes: 1 << 20, Depth: 32, ReadPercent: 100}},
		{"writes 4 KiB at depth 32, write buffer full", load.Spec{Random: true, Depth: 32}},
		{"writes 1 MiB at depth 32, write buffer full", load.Spec{BlockBytes: 1 << 20, Depth: 32}},
	}
}

// measureNeighbour looks at the latency of a volume at 100 requests per second,
// half of them reads, alone and while another volume on the same worker is at
// full load. The busy client has the same CPU as the quiet one and yields it at
// once, so that what is measured is the daemon.
func (b *bench) measureNeighbour(ctx context.Context) error {
	d, err := b.newScoriad(rowNeighbour, b.cfg.poll, 1<<30)
	if err != nil {
		return err
	}
	defer os.RemoveAll(d.data)
	if err := d.start(ctx, b.cfg.serverCPU); err != nil {
		return err
	}
	defer d.proc.stop()
	var clients []*client.Client
	for _, v := range []struct {
		name  string
		bytes uint64
	}{{"quiet", quietBytes}, {"busy", busyBytes}} {
		socket, err := d.create(ctx, v.name, 1<<30)
		if err != nil {
			return err
		}
		c, err := client.Connect(socket, client.Options{QueueSize: 256, MemoryBytes: 128 << 20})
		if err != nil {
			return err
		}
		defer c.Close()
		c.FillArena(1)
		if err := load.Fill(ctx, c, 0, v.bytes); err != nil {
			return fmt.Errorf("volume %s: fill: %w", v.name, err)
		}
		clients = append(clients, c)
	}
	alone, err := b.beside(ctx, d, clients, nil)
	if err != nil {
		return err
	}
	b.figure(rowNeighbour, fmt.Sprintf("p99 at %d IOPS, alone", quietRate), alone, "µs", 0)
	for _, n := range neighbours() {
		p99, err := b.beside(ctx, d, clients, &n)
		if err != nil {
			return fmt.Errorf("neighbour %s: %w", n.title, err)
		}
		b.figure(rowNeighbour, "the same, neighbour "+n.title, p99, "µs", 0)
		b.figure(rowNeighbour, "that is so many times what it is alone", p99/alone, "×", 0)
	}
	return nil
}

// beside measures the quiet volume's p99 in µs beside a neighbour, nil for none:
// the median over the rounds.
func (b *bench) beside(ctx context.Context, d *scoriad, clients []*client.Client, n *neighbour) (float64, error) {
	var values []float64
	for round := range b.cfg.rounds {
		if err := d.proc.settle(ctx, settleLimit); err != nil {
			return 0, err
		}
		v, err := b.besideOnce(ctx, clients, n, round)
		if err != nil {
			return 0, err
		}
		values = append(values, v)
	}
	return spreadOf(values).Median, nil
}

func (b *bench) besideOnce(ctx context.Context, clients []*client.Client, n *neighbour, round int) (float64, error) {
	what := "alone"
	busyCtx, stop := context.WithCancel(ctx)
	defer stop()
	ended := make(chan error, 1)
	if n == nil {
		ended <- nil
	} else {
		what = n.title
		spec := n.spec
		spec.RegionBytes, spec.Duration, spec.Poll, spec.Background = busyBytes, time.Hour, true, true
		spec.CPUs, spec.Seed = []int{b.cfg.clientCPU}, uint64(round)+1
		go func() {
			_, err := load.Run(busyCtx, clients[1], spec)
			if errors.Is(err, context.Canceled) && ctx.Err() == nil {
				err = nil
			}
			ended <- err
		}()
	}
	b.say("neighbour %s: round %d of %d", what, round+1, b.cfg.rounds)
	res, err := load.Run(ctx, clients[0], load.Spec{
		Random: true, Depth: 8, ReadPercent: 50, Rate: quietRate, RegionBytes: quietBytes, Seed: uint64(round) + 1,
		Duration: max(4*b.cfg.seconds, time.Second), Warmup: max(b.cfg.seconds, time.Second/2), CPUs: []int{b.cfg.clientCPU},
	})
	stop()
	if busyErr := <-ended; err == nil {
		err = busyErr
	}
	return float64(res.P99) / 1e3, err
}
