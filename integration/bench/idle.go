package main

import (
	"context"
	"fmt"
	"os"
	"time"

	"golang.org/x/sync/errgroup"

	"scoria/vhost/client"
	"scoria/vhost/client/load"
)

// A figure is a row that is no ratio of workloads.
type figure struct {
	Row     string  `json:"row"`
	Title   string  `json:"title"`
	Value   float64 `json:"value"`
	Unit    string  `json:"unit"`
	Limit   float64 `json:"target"` // at most; 0: none
	Reached bool    `json:"reached"`
}

func (b *bench) figure(row, title string, value float64, unit string, limit float64) {
	b.figures = append(b.figures, figure{Row: row, Title: title, Value: value, Unit: unit, Limit: limit, Reached: limit == 0 || value <= limit})
}

// idleTime is how long the CPU time of idle volumes is watched.
const idleTime = 10 * time.Second

// measureIdle attaches a client to each of many volumes, lets each write and read
// one block, and looks at what the daemon uses while nothing happens.
func (b *bench) measureIdle(ctx context.Context) error {
	n := b.cfg.idleVolumes
	d, err := b.newScoriad(rowIdle, 50*time.Microsecond, 256<<20)
	if err != nil {
		return err
	}
	defer os.RemoveAll(d.data)
	if err := d.start(ctx, b.cfg.serverCPU); err != nil {
		return err
	}
	defer d.proc.stop()
	empty, err := d.usage(ctx)
	if err != nil {
		return err
	}
	b.say("idle: creating %d volumes", n)
	err = several(ctx, n, func(i int) error {
		_, err := d.create(ctx, idleName(i), 1<<30)
		return err
	})
	if err != nil {
		return err
	}
	created, err := d.usage(ctx)
	if err != nil {
		return err
	}
	b.say("idle: attaching %d clients", n)
	clients := make([]*client.Client, n)
	defer func() {
		for _, c := range clients {
			if c != nil {
				c.Close()
			}
		}
	}()
	err = several(ctx, n, func(i int) (err error) {
		clients[i], err = attachIdle(ctx, d.socket(idleName(i)))
		return err
	})
	if err != nil {
		return err
	}
	attached, err := d.usage(ctx)
	if err != nil {
		return err
	}
	b.say("idle: watching for %v", idleTime)
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(idleTime):
	}
	after, err := load.ReadUsage(d.proc.pid())
	if err != nil {
		return err
	}
	each := func(bytes int64) float64 { return float64(bytes) / float64(n) / 1024 }
	b.figure(rowIdle, fmt.Sprintf("%d idle attached volumes: CPU of the daemon", n), 100*(after.CPU-attached.CPU).Seconds()/idleTime.Seconds(), "% of a core", 1)
	b.figure(rowIdle, "memory per attached volume (RSS)", each(attached.RSS-empty.RSS), "KiB", 256)
	b.figure(rowIdle, "of that, its own (anonymous)", each(attached.Anon-empty.Anon), "KiB", 0)
	b.figure(rowIdle, "of that, before a client attached (RSS)", each(created.RSS-empty.RSS), "KiB", 0)
	return nil
}

// usage waits until the daemon is quiet and reads what it uses.
func (d *scoriad) usage(ctx context.Context) (load.Usage, error) {
	if err := d.proc.settle(ctx, settleLimit); err != nil {
		return load.Usage{}, err
	}
	return load.ReadUsage(d.proc.pid())
}

func idleName(i int) string { return fmt.Sprintf("idle%04d", i) }

// attachIdle connects to a volume, writes one block and reads it.
func attachIdle(ctx context.Context, socket string) (*client.Client, error) {
	c, err := client.Connect(socket, client.Options{QueueSize: 128, MaxSegments: 2, MemoryBytes: 16 << 10})
	if err != nil {
		return nil, err
	}
	for _, percent := range []int{0, 100} {
		_, err := load.Run(ctx, c, load.Spec{MaxOps: 1, Duration: time.Minute, RegionBytes: 4096, ReadPercent: percent})
		if err != nil {
			return c, fmt.Errorf("%s: %w", socket, err)
		}
	}
	return c, nil
}

// several calls do for 0 to n-1, a few at a time, until one fails.
func several(ctx context.Context, n int, do func(i int) error) error {
	g, running := errgroup.WithContext(ctx)
	g.SetLimit(8)
	for i := range n {
		if running.Err() != nil {
			break
		}
		g.Go(func() error { return do(i) })
	}
	if err := g.Wait(); err != nil {
		return err
	}
	return ctx.Err()
}
