package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	"scoria/driver/control"
	"scoria/vhost/client"
	"scoria/vhost/client/load"
)

// The rows of snapshots, clones and streams that are no ratios to the peer.
const (
	rowSnapshot = "snapshot" // how long one takes under load, and what the load sees of it
	rowChain    = "chain"    // reads through many clones
	rowCopy     = "copy"     // export and receive

	snapshotRate  = 20_000 // writes per second meanwhile: leaves the client's CPU time for the control API
	snapshotPause = 50 * time.Millisecond

	chainDepth = 100
	chainOps   = 128 // writes to each clone of the chain
	chainBytes = 64 << 20

	copyBytes = 1 << 30
)

// measureSnapshot makes snapshots and clones under a steady load of writes, and
// looks for the longest write; then at the same load without them.
func (b *bench) measureSnapshot(ctx context.Context) error {
	d, err := b.newScoriad(rowSnapshot, b.cfg.poll, b.cfg.buffer)
	if err != nil {
		return err
	}
	defer os.RemoveAll(d.data)
	s, err := d.startVolume(ctx, b.volumeBytes(), b.cfg.serverCPU)
	if err != nil {
		return err
	}
	defer s.close()
	if err := s.fill(ctx); err != nil {
		return err
	}
	api := control.NewClient(d.control())
	defer api.Close()
	var took snapshotTimes
	for round := range b.cfg.rounds {
		for i := range 2 {
			with := (i+round)%2 == 1
			b.say("snapshots under load: round %d of %d, snapshots %s", round+1, b.cfg.rounds, yesNo(with))
			if err := b.snapshotLoad(ctx, api, s, round, with, &took); err != nil {
				return err
			}
		}
	}
	for _, f := range took.figures() {
		b.figure(rowSnapshot, f.Title, f.Value, f.Unit, 0)
	}
	return nil
}

// snapshotTimes is what measureSnapshot collects, in milliseconds.
type snapshotTimes struct {
	snapshots, clones   []float64 // of each
	withMax, withoutMax []float64 // the longest write of each round
}

// figures are the lines of the report, without row and target.
func (t *snapshotTimes) figures() []figure {
	snapshots, clones := spreadOf(t.snapshots), spreadOf(t.clones)
	with, without := spreadOf(t.withMax), spreadOf(t.withoutMax)
	load := fmt.Sprintf("%d writes/s", snapshotRate)
	return []figure{
		{Title: fmt.Sprintf("snapshot under %s, median of %d", load, snapshots.Rounds), Value: snapshots.Median, Unit: "ms"},
		{Title: "the slowest of them", Value: snapshots.Max, Unit: "ms"},
		{Title: fmt.Sprintf("clone under %s, median of %d", load, clones.Rounds), Value: clones.Median, Unit: "ms"},
		{Title: "the slowest of them", Value: clones.Max, Unit: "ms"},
		{Title: "longest write meanwhile, median of the rounds", Value: with.Median, Unit: "ms"},
		{Title: "of all rounds", Value: with.Max, Unit: "ms"},
		{Title: "the same without snapshots and clones, median of the rounds", Value: without.Median, Unit: "ms"},
		{Title: "of all rounds", Value: without.Max, Unit: "ms"},
	}
}

// snapshotLoad is one round of the load, with snapshots and clones or without.
func (b *bench) snapshotLoad(ctx context.Context, api *control.Client, s *server, round int, with bool, took *snapshotTimes) error {
	if err := s.proc.settle(ctx, settleLimit); err != nil {
		return err
	}
	type outcome struct {
		res load.Result
		err error
	}
	ended := make(chan outcome, 1)
	go func() {
		res, err := load.Run(ctx, s.client, load.Spec{
			Random: true, Depth: 32, Rate: snapshotRate, Seed: uint64(round) + 1, CPUs: []int{b.cfg.clientCPU},
			Warmup: b.cfg.seconds / 10, Duration: b.cfg.seconds,
		})
		ended <- outcome{res, err}
	}()
	tick := time.NewTicker(snapshotPause)
	defer tick.Stop()
	var failed error
	for i := 0; ; i++ {
		select {
		case o := <-ended:
			longest := ms(o.res.Max)
			if with {
				took.withMax = append(took.withMax, longest)
			} else {
				took.withoutMax = append(took.withoutMax, longest)
			}
			return errors.Join(failed, o.err)
		case <-tick.C:
			if with && failed == nil {
				failed = took.one(ctx, api, fmt.Sprintf("s%d-%d", round, i))
			}
		}
	}
}

// one makes a snapshot and a clone of it.
func (t *snapshotTimes) one(ctx context.Context, api *control.Client, name string) error {
	begin := time.Now()
	if _, err := api.CreateSnapshot(ctx, firstVolume, control.CreateSnapshot{Name: name}); err != nil {
		return fmt.Errorf("snapshot: %w", err)
	}
	t.snapshots = append(t.snapshots, ms(time.Since(begin)))
	begin = time.Now()
	if _, err := api.CloneVolume(ctx, control.CloneVolume{From: firstVolume + "@" + name, Name: "default/" + name}); err != nil {
		return fmt.Errorf("clone: %w", err)
	}
	t.clones = append(t.clones, ms(time.Since(begin)))
	return nil
}

// measureChain makes a clone of a clone of a clone …, each written to a little, and
// compares reads of the last with reads of the first volume.
func (b *bench) measureChain(ctx context.Context) error {
	d, err := b.newScoriad(rowChain, b.cfg.poll, b.cfg.buffer)
	if err != nil {
		return err
	}
	defer os.RemoveAll(d.data)
	s, err := d.startVolume(ctx, chainBytes, b.cfg.serverCPU)
	if err != nil {
		return err
	}
	defer s.close()
	if err := s.fill(ctx); err != nil {
		return err
	}
	b.say("chain of %d clones", chainDepth)
	deep, err := b.makeChain(ctx, d)
	if err != nil {
		return err
	}
	defer deep.client.Close()
	var top, bottom []float64
	for round := range b.cfg.rounds {
		for i := range 2 {
			of, values := s, &top
			if (i+round)%2 == 1 {
				of, values = deep, &bottom
			}
			res, err := of.measure(ctx, load.Spec{
				Random: true, Depth: 1, ReadPercent: 100, Seed: uint64(round) + 1, CPUs: []int{b.cfg.clientCPU}, Poll: true,
				Warmup: b.cfg.seconds / 10, Duration: b.cfg.seconds,
			})
			if err != nil {
				return err
			}
			*values = append(*values, float64(res.P50)/1e3)
		}
	}
	shallow, through := spreadOf(top).Median, spreadOf(bottom).Median
	b.figure(rowChain, "4 KiB read, depth 1, p50, clone depth 0", shallow, "µs", 0)
	b.figure(rowChain, fmt.Sprintf("the same, clone depth %d", chainDepth), through, "µs", 0)
	b.figure(rowChain, "that is so many times the former", through/shallow, "×", 0)
	return nil
}

// makeChain returns the last of the clones, connected.
func (b *bench) makeChain(ctx context.Context, d *scoriad) (*server, error) {
	api := control.NewClient(d.control())
	defer api.Close()
	below := "bench"
	for level := 1; ; level++ {
		name := fmt.Sprintf("clone%03d", level)
		if _, err := api.CreateSnapshot(ctx, "default/"+below, control.CreateSnapshot{Name: "s"}); err != nil {
			return nil, fmt.Errorf("snapshot of %s: %w", below, err)
		}
		if _, err := api.CloneVolume(ctx, control.CloneVolume{From: "default/" + below + "@s", Name: "default/" + name}); err != nil {
			return nil, fmt.Errorf("clone %s: %w", name, err)
		}
		s := &server{name: scoriaName, proc: d.proc, socket: d.socket(name)}
		if err := d.proc.waitFor(ctx, "socket of volume "+name, exists(s.socket)); err != nil {
			return nil, err
		}
		if err := s.connect(client.Options{QueueSize: 256, MemoryBytes: 2 * warmBytes}); err != nil {
			return nil, err
		}
		_, err := load.Run(ctx, s.client, load.Spec{
			Random: true, Depth: 32, Seed: uint64(level), MaxOps: chainOps, Duration: time.Minute, CPUs: []int{b.cfg.clientCPU},
		})
		if err == nil && level == chainDepth {
			return s, s.proc.settle(ctx, settleLimit)
		}
		s.client.Close()
		if err != nil {
			return nil, fmt.Errorf("writes to %s: %w", name, err)
		}
		below = name
	}
}

// measureCopy times the operator's program: a whole volume to a stream in a file on
// tmpfs, and from there into a new volume.
func (b *bench) measureCopy(ctx context.Context) error {
	d, err := b.newScoriad(rowCopy, b.cfg.poll, b.cfg.buffer)
	if err != nil {
		return err
	}
	defer os.RemoveAll(d.data)
	s, err := d.startVolume(ctx, copyBytes, b.cfg.serverCPU)
	if err != nil {
		return err
	}
	defer s.close()
	if err := s.fill(ctx); err != nil {
		return err
	}
	if err := d.cli(ctx, "snapshot", "create", "bench@copy"); err != nil {
		return err
	}
	stream := filepath.Join(b.shmDir, "copy.stream")
	defer os.Remove(stream)
	var exported, received []float64
	for round := range b.cfg.rounds {
		b.say("export and receive of %d MiB: round %d of %d", copyBytes>>20, round+1, b.cfg.rounds)
		rate, err := b.copied(ctx, d, stream, os.O_CREATE|os.O_WRONLY|os.O_TRUNC, "volume", "export", "bench@copy", "-", "--format", "stream")
		if err != nil {
			return err
		}
		exported = append(exported, rate)
		name := fmt.Sprintf("copy%d", round)
		if rate, err = b.copied(ctx, d, stream, os.O_RDONLY, "volume", "receive", name, "-"); err != nil {
			return err
		}
		received = append(received, rate)
		if err := d.cli(ctx, "volume", "delete", name, "--force"); err != nil {
			return err
		}
	}
	b.figure(rowCopy, "export to a stream", spreadOf(exported).Median, "MB/s", 0)
	b.figure(rowCopy, "receive of that stream", spreadOf(received).Median, "MB/s", 0)
	return nil
}

// copied runs the operator's program with the stream as its standard input or
// output, and returns MB/s of the volume.
func (b *bench) copied(ctx context.Context, d *scoriad, stream string, flags int, args ...string) (float64, error) {
	if err := d.proc.settle(ctx, settleLimit); err != nil {
		return 0, err
	}
	f, err := os.OpenFile(stream, flags, 0o600)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	cmd := exec.CommandContext(ctx, filepath.Join(d.bin, "scoria"), append([]string{"--socket", d.control()}, args...)...)
	var problems lockedBuffer
	cmd.Stderr = &problems
	if flags&os.O_WRONLY != 0 {
		cmd.Stdout = f
	} else {
		cmd.Stdin = f
	}
	begin := time.Now()
	if err := cmd.Run(); err != nil {
		return 0, fmt.Errorf("scoria %v: %w: %s", args, err, problems.String())
	}
	return copyBytes / time.Since(begin).Seconds() / 1e6, nil
}
