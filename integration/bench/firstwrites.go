package main

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"

	"scoria/driver/control"
	"scoria/vhost/client"
	"scoria/vhost/client/load"
)

// The rows of first writes: 4 KiB random writes over data that is there already,
// right after a snapshot and on a fresh clone, beside the same writes to the plain
// volume and to a qcow2 image that got an overlay right before. As many writes are
// measured as half of the units that a snapshot shares with its volume (4 KiB
// clusters of Scoria's, 64 KiB clusters of qcow2's): later ones go where a first
// one has been, and would measure a plain volume.
const (
	rowSnapWrite  = "A-write-snap-d32"
	rowCloneWrite = "A-write-clone-d32"

	plainName      = "plain"       // Scoria, neither snapshot nor clone
	qcowName       = "qcow2"       // qemu-storage-daemon, right after an external snapshot
	qcowPlainName  = "qcow2-plain" // the same image without one
	qcowCluster    = 64 << 10      // qemu-img's default
	scoriaCluster  = 4 << 10
	firstVolume    = "default/bench"
	firstSnapshot  = "first"
	firstCloneName = "first-clone"

	// As much as the half of a client's memory that holds data to be written. A new
	// client writes it to the begin of the disk, which is not measured: the server's
	// first sight of each of its pages is no matter of snapshots.
	warmBytes = 16 << 20
)

// firstWriteOps is how many writes to a region that consists of units are measured.
func firstWriteOps(region, unit uint64) uint64 { return max(1, region/unit/2) }

// firstSpec is the load of these rows on one server.
func (b *bench) firstSpec(s *server, round int, unit uint64) load.Spec {
	spec := load.Spec{
		Random: true, Depth: 32, Duration: b.cfg.seconds, Seed: uint64(round) + 1, MaxOps: firstWriteOps(b.volumeBytes()-warmBytes, unit),
		RegionOffset: warmBytes, ServerPID: s.proc.pid(),
	}
	b.place(&spec, placementA)
	return spec
}

// measureFirstWrites goes through the rounds of both rows.
func (b *bench) measureFirstWrites(ctx context.Context) error {
	d, err := b.newScoriad("first-writes", b.cfg.poll, b.cfg.buffer)
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
	var image string
	if b.cfg.servers[peerName] && b.wants(rowSnapWrite) {
		if image, err = b.qcowImage(ctx); err != nil {
			return err
		}
		defer os.Remove(image)
	}
	api := control.NewClient(d.control())
	defer api.Close()
	for round := range b.cfg.rounds {
		b.say("first writes: round %d of %d", round+1, b.cfg.rounds)
		steps := []func() error{
			func() error { return b.plainWrites(ctx, s, round) },
			func() error { return b.snapWrites(ctx, api, s, round) },
			func() error { return b.cloneWrites(ctx, api, d, round) },
			func() error { return b.qcowWrites(ctx, image, round) },
		}
		if round%2 == 1 {
			slices.Reverse(steps)
		}
		for _, step := range steps {
			if err := step(); err != nil {
				return err
			}
		}
	}
	return nil
}

// fill connects and writes the whole disk once.
func (s *server) fill(ctx context.Context) error {
	if err := s.warm(ctx); err != nil {
		return err
	}
	if err := load.Fill(ctx, s.client, warmBytes, s.client.Size()-warmBytes); err != nil {
		return fmt.Errorf("%s: fill: %w", s.name, err)
	}
	return s.proc.settle(ctx, settleLimit)
}

// warm connects and writes the begin of the disk.
func (s *server) warm(ctx context.Context) error {
	if err := s.connect(client.Options{QueueSize: 256, MemoryBytes: 2 * warmBytes}); err != nil {
		return err
	}
	if err := load.Fill(ctx, s.client, 0, warmBytes); err != nil {
		s.client.Close()
		return fmt.Errorf("%s: first writes: %w", s.name, err)
	}
	return nil
}

// plainWrites measures what both rows are compared with.
func (b *bench) plainWrites(ctx context.Context, s *server, round int) error {
	res, err := s.measure(ctx, b.firstSpec(s, round, scoriaCluster))
	if err != nil {
		return fmt.Errorf("writes to a plain volume: %w", err)
	}
	for _, row := range []string{rowSnapWrite, rowCloneWrite} {
		if b.wants(row) {
			b.results.put(row, plainName, round, res)
		}
	}
	return nil
}

// snapWrites measures right after a snapshot, which it deletes.
func (b *bench) snapWrites(ctx context.Context, api *control.Client, s *server, round int) error {
	if !b.wants(rowSnapWrite) {
		return nil
	}
	if _, err := api.CreateSnapshot(ctx, firstVolume, control.CreateSnapshot{Name: firstSnapshot}); err != nil {
		return fmt.Errorf("snapshot: %w", err)
	}
	res, err := s.measure(ctx, b.firstSpec(s, round, scoriaCluster))
	if err != nil {
		return fmt.Errorf("writes after a snapshot: %w", err)
	}
	b.results.put(rowSnapWrite, scoriaName, round, res)
	if err := api.DeleteSnapshot(ctx, firstVolume, firstSnapshot); err != nil {
		return fmt.Errorf("delete the snapshot: %w", err)
	}
	return s.proc.settle(ctx, settleLimit)
}

// cloneWrites measures on a fresh clone, which it deletes.
func (b *bench) cloneWrites(ctx context.Context, api *control.Client, d *scoriad, round int) error {
	if !b.wants(rowCloneWrite) {
		return nil
	}
	if _, err := api.CreateSnapshot(ctx, firstVolume, control.CreateSnapshot{Name: firstSnapshot}); err != nil {
		return fmt.Errorf("snapshot: %w", err)
	}
	clone := control.CloneVolume{From: firstVolume + "@" + firstSnapshot, Name: "default/" + firstCloneName}
	if _, err := api.CloneVolume(ctx, clone); err != nil {
		return fmt.Errorf("clone: %w", err)
	}
	res, err := b.measureClone(ctx, d, round)
	if err != nil {
		return fmt.Errorf("writes to a fresh clone: %w", err)
	}
	b.results.put(rowCloneWrite, scoriaName, round, res)
	job, err := api.StartDelete(ctx, clone.Name, true)
	if err == nil {
		_, err = api.Await(ctx, job, nil)
	}
	if err != nil {
		return fmt.Errorf("delete the clone: %w", err)
	}
	if err := api.DeleteSnapshot(ctx, firstVolume, firstSnapshot); err != nil {
		return fmt.Errorf("delete the clone's snapshot: %w", err)
	}
	return d.proc.settle(ctx, settleLimit)
}

func (b *bench) measureClone(ctx context.Context, d *scoriad, round int) (sample, error) {
	s := &server{name: scoriaName, proc: d.proc, socket: d.socket(firstCloneName)}
	if err := d.proc.waitFor(ctx, "socket of the clone", exists(s.socket)); err != nil {
		return sample{}, err
	}
	if err := s.warm(ctx); err != nil {
		return sample{}, err
	}
	defer s.client.Close()
	return s.measure(ctx, b.firstSpec(s, round, scoriaCluster))
}

// qcowImage makes a qcow2 image on tmpfs whose clusters have all been written.
func (b *bench) qcowImage(ctx context.Context) (string, error) {
	image := filepath.Join(b.shmDir, "peer.qcow2")
	if err := qemuImg(ctx, "create", "-q", "-f", "qcow2", image, strconv.FormatUint(b.volumeBytes(), 10)); err != nil {
		return "", err
	}
	s, err := b.startQcow(ctx, image)
	if err != nil {
		return "", err
	}
	defer s.close()
	return image, s.fill(ctx)
}

// startQcow starts the peer as startPeer does, on a qcow2 image.
func (b *bench) startQcow(ctx context.Context, image string) (*server, error) {
	return startQSD(ctx, filepath.Join(b.shmDir, "qcow2.sock"), b.cfg.serverCPU, int(b.cfg.peerPoll),
		"--blockdev", "driver=qcow2,node-name=f,file.driver=file,file.aio=io_uring,file.cache.direct=off,file.filename="+image)
}

// qcowWrites measures the image and then a fresh overlay of it, which is what an
// external snapshot makes. The peer is started on the overlay rather than told to
// switch to it: what it has to read anew are two tables.
func (b *bench) qcowWrites(ctx context.Context, image string, round int) error {
	if image == "" {
		return nil
	}
	if err := b.qcowOnce(ctx, image, qcowPlainName, round); err != nil {
		return err
	}
	overlay := filepath.Join(b.shmDir, "overlay.qcow2")
	defer os.Remove(overlay)
	if err := qemuImg(ctx, "create", "-q", "-f", "qcow2", "-b", image, "-F", "qcow2", overlay); err != nil {
		return err
	}
	return b.qcowOnce(ctx, overlay, qcowName, round)
}

func (b *bench) qcowOnce(ctx context.Context, image, name string, round int) error {
	s, err := b.startQcow(ctx, image)
	if err != nil {
		return err
	}
	defer s.close()
	if err := s.warm(ctx); err != nil {
		return err
	}
	res, err := s.measure(ctx, b.firstSpec(s, round, qcowCluster))
	if err != nil {
		return fmt.Errorf("writes to %s: %w", name, err)
	}
	b.results.put(rowSnapWrite, name, round, res)
	return nil
}

func qemuImg(ctx context.Context, args ...string) error {
	out, err := exec.CommandContext(ctx, "qemu-img", args...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("qemu-img %v: %w: %s (Debian and Ubuntu: apt install qemu-utils)", args, err, out)
	}
	return nil
}
