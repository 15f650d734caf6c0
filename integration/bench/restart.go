package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"time"

	"scoria/vhost/client"
	"scoria/vhost/client/load"
)

// measureRestart measures the pause that a guest sees when the daemon is
// restarted, with the region's data written.
func (b *bench) measureRestart(ctx context.Context) error {
	d, err := b.newScoriad(rowRestart, b.cfg.poll, 1<<30)
	if err != nil {
		return err
	}
	defer os.RemoveAll(d.data)
	s, err := d.startVolume(ctx, b.volumeBytes(), b.cfg.serverCPU)
	if err != nil {
		return err
	}
	defer func() { d.proc.stop() }()
	title := fmt.Sprintf("%d MiB written", b.cfg.region>>20)
	return b.restarts(ctx, rowRestart, title, d, s.socket, uint64(b.cfg.region))
}

// measureRestartTiB does the same with 1 TiB mapped. Nobody can write that much
// here: the command of -synthetic-map makes the map.
func (b *bench) measureRestartTiB(ctx context.Context) error {
	if b.cfg.syntheticMap == "" {
		return errors.New("not measured: -synthetic-map is not given")
	}
	d, err := b.newScoriad(rowRestartTiB, b.cfg.poll, 1<<30)
	if err != nil {
		return err
	}
	defer os.RemoveAll(d.data)
	s, err := d.startVolume(ctx, 1<<40, b.cfg.serverCPU)
	if err != nil {
		return err
	}
	defer func() { d.proc.stop() }()
	d.proc.stop()
	b.say("mapping 1 TiB")
	cmd := exec.CommandContext(ctx, "sh", "-c", b.cfg.syntheticMap)
	cmd.Env = append(os.Environ(), "VOLUME=default/bench", "DATA="+d.data, "RUN="+d.run, "CONFIG="+d.config)
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("-synthetic-map: %w: %s", err, out)
	}
	begin := time.Now()
	if err := d.start(ctx, b.cfg.serverCPU); err != nil {
		return err
	}
	if err := d.proc.waitFor(ctx, "socket of the volume", exists(s.socket)); err != nil {
		return err
	}
	b.figure(rowRestartTiB, "first start with 1 TiB mapped, until the socket listens", ms(time.Since(begin)), "ms", 0)
	if u, err := d.usage(ctx); err == nil {
		b.figure(rowRestartTiB, "memory of the daemon with 1 TiB mapped (RSS)", float64(u.RSS)/(1<<20), "MiB", 0)
	}
	return b.restarts(ctx, rowRestartTiB, "1 TiB mapped", d, s.socket, 0)
}

func ms(d time.Duration) float64 { return float64(d.Microseconds()) / 1e3 }

// pauseLimit is §13's row "daemon restart, guest running", in milliseconds.
const pauseLimit = 1000

// restarts attaches a client, which comes back as QEMU does but without its wait
// of a second, and ends the daemon in both ways.
func (b *bench) restarts(ctx context.Context, row, title string, d *scoriad, socket string, fillBytes uint64) error {
	c, err := client.Connect(socket, client.Options{Reconnect: time.Millisecond})
	if err != nil {
		return err
	}
	defer c.Close()
	if fillBytes > 0 {
		if err := load.Fill(ctx, c, 0, fillBytes); err != nil {
			return err
		}
	}
	disk, err := c.Disk()
	if err != nil {
		return err
	}
	for _, how := range []struct {
		name string
		end  func()
	}{{"kill -9", func() { d.proc.kill() }}, {"a clean stop", func() { d.proc.stop() }}} {
		b.say("restart after %s, %s", how.name, title)
		if err := d.proc.settle(ctx, settleLimit); err != nil {
			return err
		}
		pause, err := restartPause(ctx, d, disk, how.end, b.cfg.serverCPU)
		if err != nil {
			return fmt.Errorf("after %s: %w", how.name, err)
		}
		b.figure(row, fmt.Sprintf("pause of the guest after %s, %s", how.name, title), ms(pause), "ms", pauseLimit)
	}
	return nil
}

// restartPause is the longest time that a write took while the daemon was ended
// and started again.
func restartPause(ctx context.Context, d *scoriad, disk *client.Disk, end func(), cpu int) (time.Duration, error) {
	stop, done := make(chan struct{}), make(chan error, 1)
	var longest time.Duration
	go func() {
		buf := make([]byte, 4096)
		fill(buf)
		for {
			begin := time.Now()
			if _, err := disk.WriteAt(buf, 0); err != nil {
				done <- err
				return
			}
			longest = max(longest, time.Since(begin))
			select {
			case <-stop:
				done <- nil
				return
			default:
			}
		}
	}()
	time.Sleep(50 * time.Millisecond)
	end()
	if err := d.start(ctx, cpu); err != nil {
		return 0, err // the client's Close ends the writer
	}
	close(stop)
	select {
	case err := <-done:
		return longest, err
	case <-ctx.Done():
		return 0, ctx.Err()
	case <-time.After(2 * time.Minute):
		return 0, errors.New("no write was completed within two minutes of the restart")
	}
}
