package disk

import (
	"context"
	"fmt"
	"path"
	"strconv"
	"sync/atomic"
	"time"

	"scoria/alba/asd"

	"github.com/cockroachdb/pebble/v2"
)

// counters since the disk was opened; see asd.Stats.
type counters struct {
	gets, applies, refused   atomic.Uint64
	readBytes, diskReadBytes atomic.Uint64
	writtenBytes             atomic.Uint64
	corruptBlocks, commits   atomic.Uint64
}

const (
	minReserve = 64 << 20
	maxReserve = 4 << 30
)

// sampleKV notes what the key-value store takes.
func (d *Disk) sampleKV() { d.kvBytes.Store(int64(d.db.Metrics().DiskSpaceUsage())) }

// room returns the capacity, what is used of it, and what puts may still take.
func (d *Disk) room() (capacity, used, left int64, err error) {
	free, err := d.fs.Free(d.dir)
	if err != nil {
		return 0, 0, 0, fmt.Errorf("free room of the disk: %w", err)
	}
	used = d.state.Load().fileBytes + d.kvBytes.Load()
	capacity = used + int64(free)
	if d.opts.CapacityBytes > 0 {
		capacity = min(capacity, d.opts.CapacityBytes)
	}
	reserve := d.opts.ReserveBytes
	if reserve == 0 {
		reserve = min(max(capacity/64, minReserve), maxReserve)
	}
	left = min(capacity-used, int64(free)) - reserve - d.inFlight.Load()
	return capacity, used, left, nil
}

// checkRoom refuses puts that would eat into the reserve. Their own bytes are
// in flight already.
func (d *Disk) checkRoom(need int64) error {
	capacity, used, left, err := d.room()
	if err != nil {
		return err
	}
	if left < 0 {
		return fmt.Errorf("%w: %d of %d bytes are used, %d more are %d more than fit", asd.ErrFull, used, capacity, need, -left)
	}
	return nil
}

// Stats implements asd.Client.
func (d *Disk) Stats(context.Context) (asd.Stats, error) {
	if err := d.enter(); err != nil {
		return asd.Stats{}, err
	}
	defer d.leave()
	capacity, used, left, err := d.room()
	if err != nil {
		return asd.Stats{}, err
	}
	state := d.state.Load()
	s := asd.Stats{
		ID: d.id.String(), Version: d.opts.Version,
		Capacity: capacity, Used: used, Full: left < filePage,
		Keys: state.keys, Bytes: state.bytes, Uptime: time.Since(d.opened),
		Gets: d.n.gets.Load(), Applies: d.n.applies.Load(), Refused: d.n.refused.Load(),
		ReadBytes: d.n.readBytes.Load(), DiskReadBytes: d.n.diskReadBytes.Load(), WrittenBytes: d.n.writtenBytes.Load(),
		CorruptBlocks: d.n.corruptBlocks.Load(), Commits: d.n.commits.Load(),
	}
	s.QueuedGuest, s.QueuedRepair = d.gate.waiting(d.opts.Slots)
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.failure != nil {
		s.Failed = d.failure.Error()
	}
	s.Damaged = d.damaged
	return s, nil
}

// sweep removes the value files of earlier runs, which all have ids below
// firstID, that no record refers to: those of Applies that a crash cut off, and
// those whose removal it undid. Since ids aren't reused, what is garbage in the
// snapshot of the start stays garbage.
func (d *Disk) sweep(snapshot *pebble.Snapshot, firstID uint64) {
	root := path.Join(d.dir, "values")
	dirs, err := d.fs.List(root)
	if err != nil {
		if !isNotExist(err) {
			d.log.Warn().Err(err).Msg("sweep: the directory of values can't be listed")
		}
		return
	}
	removed := 0
	for _, name := range dirs {
		n, err := strconv.ParseUint(name, 16, 64)
		if err != nil || n >= firstID/idsPerDir || d.stopping() {
			continue
		}
		left, gone := d.sweepDir(snapshot, path.Join(root, name))
		if removed += gone; left == 0 {
			_ = d.fs.Remove(path.Join(root, name)) // fails if something is left after all
		}
	}
	if removed > 0 {
		d.log.Info().Int("files", removed).Msg("removed the files of unfinished writes")
	}
}

func (d *Disk) stopping() bool {
	select {
	case <-d.stop:
		return true
	default:
		return false
	}
}

func (d *Disk) sweepDir(snapshot *pebble.Snapshot, dir string) (left, removed int) {
	names, err := d.fs.List(dir)
	if err != nil {
		d.log.Warn().Err(err).Msg("sweep: a directory of values can't be listed")
		return 1, 0
	}
	for _, name := range names {
		id, err := strconv.ParseUint(name, 16, 64)
		if err != nil || d.stopping() || d.live(snapshot, id) {
			left++
			continue
		}
		if err := d.fs.Remove(path.Join(dir, name)); err != nil && !isNotExist(err) {
			d.log.Warn().Err(err).Msg("sweep: a file of an unfinished write can't be removed")
			left++
			continue
		}
		removed++
	}
	return left, removed
}

// live says whether a record refers to a value file; when in doubt it does.
func (d *Disk) live(snapshot *pebble.Snapshot, id uint64) bool {
	b, closer, err := snapshot.Get(kvFileKey(id))
	if err != nil {
		return err != pebble.ErrNotFound
	}
	key := string(b)
	_ = closer.Close()
	b, closer, err = snapshot.Get(kvKey(prefixKey, key))
	if err != nil {
		return err != pebble.ErrNotFound
	}
	defer closer.Close()
	rec, err := decodeRecord(b)
	if err != nil || rec.fileID == id {
		return true
	}
	// The key was put again over a record that could not be read.
	_ = d.db.Delete(kvFileKey(id), pebble.NoSync)
	return false
}
