package driver

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/google/uuid"

	"scoria/driver/block"
	"scoria/driver/lba"
)

// LaterSnapshotsError refuses a rollback that would drop snapshots.
type LaterSnapshotsError struct {
	Names []string // oldest first
}

func (e *LaterSnapshotsError) Error() string {
	return fmt.Sprintf("the rollback would drop %d later snapshots: %s", len(e.Names), strings.Join(e.Names, ", "))
}

// Rollback makes the volume what it was at a snapshot, size included. It fails with
// *block.InUseError while a front end has it, and without force with
// *LaterSnapshotsError if there are later snapshots. With force those are gone
// afterwards; the caller forgets what Snapshots does not list any more. A crash
// leaves the volume, with its snapshots, as it was before or as it is afterwards.
//
// It is a checkpoint at the log's end with the snapshot's directory and live
// counts. The log goes on behind it. From any goroutine.
func (v *Volume) Rollback(ctx context.Context, id uuid.UUID, force bool) error {
	fail := func(err error) error { return fmt.Errorf("volume %s: rollback: %w", v.cfg.Name, err) }
	ctx, leave, err := v.enter(ctx)
	if err != nil {
		return fail(err)
	}
	defer leave()
	release, err := v.claims.take(v.cfg.Name, block.Claimant{Kind: "rollback", ID: id.String()})
	if err != nil {
		return fail(err)
	}
	defer release()
	v.resizeMu.Lock()
	defer v.resizeMu.Unlock()
	v.house.Lock() // the scrubber and the publisher rest
	defer v.house.Unlock()
	if err := v.takeSoon(ctx, func(c *checkpoints) error { return c.rollback(ctx, id, force) }); err != nil {
		return fail(err)
	}
	v.watches.notify(v.Info())
	return nil
}

// rollback: caller holds mu and house, and the volume's claim.
func (c *checkpoints) rollback(ctx context.Context, id uuid.UUID, force bool) error {
	v := c.v
	if err := v.writable(); err != nil {
		return err
	}
	i := v.findSnapshot(id)
	if i < 0 {
		return ErrNoSnapshot
	}
	if err := c.mayDrop(v.snaps[i+1:], force); err != nil {
		return err
	}
	s := v.snaps[i].Snapshot
	root, blob, err := v.readSnapshotRoot(ctx, &s)
	if err != nil {
		return err
	}
	pos, err := v.closeLog(root.Clusters)
	if err != nil {
		return err
	}
	if err := c.syncLog(true); err != nil {
		return err
	}
	table, dead := v.tableAt(pos.sco, &s, blob)
	objects := make([]uint32, 0, len(c.pinned))
	for _, o := range sortedObjects(c.pinned) {
		if o <= s.LastObject {
			objects = append(objects, o)
		}
	}
	dropped := c.withDropped(seqRange{s.Sequence, c.sequence + 1}, i+1)
	encoded, err := (&rootBlob{scos: table, ancestry: v.Ancestors(), objects: objects, dropped: dropped}).encode()
	if err != nil {
		return err
	}
	buf, err := encodeRoot(&lba.Root{
		Volume: v.cfg.ID, Sequence: c.sequence + 1, LogSCO: pos.sco, LogRecord: uint64(pos.records),
		Clusters: root.Clusters, Mapped: root.Mapped, Blob: encoded, Directory: root.Directory,
	})
	if err != nil {
		return err
	}
	if err := c.revert(ctx, &s, root, table, buf); err != nil {
		return err
	}
	c.pos, c.overdue, c.dropped = pos, false, dropped
	c.forgetBehind(i)
	c.enqueue(&publication{sequence: c.sequence, pos: pos, objects: c.own(v.m.Objects()), dead: dead})
	v.logSince.Store(0)
	v.stats.checkpointed.Add(1)
	v.rest.Store(nil)
	c.removeStale()
	return nil
}

// mayDrop says why later snapshots are not dropped.
func (c *checkpoints) mayDrop(later []*snapshotState, force bool) error {
	c.v.metaMu.Lock()
	defer c.v.metaMu.Unlock()
	e := &LaterSnapshotsError{}
	for _, s := range later {
		if s.refs > 0 || s.clones > 0 {
			return fmt.Errorf("%w: %s", ErrSnapshotInUse, s.Name)
		}
		e.Names = append(e.Names, s.Name)
	}
	if len(later) > 0 && !force {
		return e
	}
	return nil
}

// closeLog ends the current SCO and makes the map large enough.
func (v *Volume) closeLog(clusters uint64) (position, error) {
	v.gate.Lock()
	defer v.gate.Unlock()
	if records, _ := unpack(v.cur.head.Load()); records > 0 && !v.roll() {
		return position{}, errNoRoom
	}
	return position{v.cur.prev, v.cur.prevRecords}, v.m.Resize(max(clusters, v.m.Clusters()))
}

// tableAt is the SCO table with the live counts of a snapshot and without the pins
// of later ones.
func (v *Volume) tableAt(upTo uint64, s *Snapshot, blob *rootBlob) (table []tableEntry, dead []uint64) {
	live := liveCounts(blob.scos)
	table, _ = v.table(upTo, noPins, nil)
	for i := range table {
		e := &table[i]
		e.live = live[e.number] // none if it is younger
		if e.number > s.SCO {
			e.pinned = 0
		}
		if e.sealed && e.live == 0 && e.pinned == 0 {
			dead = append(dead, e.number)
		}
	}
	return table, dead
}

var errWritten = errors.New("it was written to meanwhile")

// revert gives the root its name and changes the map, the counts and the size
// between all other changes. This is the one time that the gate is closed while the
// disk works: what was written in between would belong to neither state. Nobody
// waits: no front end has the volume.
func (c *checkpoints) revert(ctx context.Context, s *Snapshot, root *lba.Root, table []tableEntry, buf []byte) error {
	v := c.v
	name := rootName(c.sequence + 1)
	if err := v.stageMapFile(name, bytes.NewReader(buf), int64(len(buf))); err != nil {
		return err
	}
	v.gate.Lock()
	if records, _ := unpack(v.cur.head.Load()); records > 0 {
		v.gate.Unlock()
		v.removeStaged(name)
		return errWritten
	}
	c.sequence++
	if err := v.nameMapFile(name); err != nil {
		v.gate.Unlock()
		return c.supersede(ctx, err)
	}
	v.m.Revert(root.Directory, root.Mapped)
	for i := range table {
		v.live.at(table[i].number).Store(int32(table[i].live))
	}
	if v.kin.Load() != nil {
		v.inheritedAtStart = int64(root.Mapped) - int64(sumLive(table)) - v.live.lost(v.origin.SCO)
	}
	v.cfg.Size = s.Size
	v.setInfo()
	v.gate.Unlock()
	return nil
}

// supersede writes a root of the volume as it is over one that may exist or not:
// what the guest does next must not meet the other state after a crash.
func (c *checkpoints) supersede(ctx context.Context, cause error) error {
	err := c.take(ctx, nil, true)
	for errors.Is(err, errLogBehind) && ctx.Err() == nil && c.v.ctx.Err() == nil {
		select {
		case <-time.After(behindPause):
		case <-ctx.Done():
		case <-c.v.ctx.Done():
		}
		err = c.take(ctx, nil, true)
	}
	if err != nil {
		c.v.failed.Store(true)
		c.v.raise("rollback-failed", "a rollback failed half way (%v) and can't be undone (%v): writes and flushes fail until the daemon is restarted; the volume then is as before or as at the snapshot", cause, err)
		return fmt.Errorf("%w: %w", block.ErrFailed, cause)
	}
	return cause
}

// forgetBehind forgets the snapshots behind the i-th. Caller holds mu.
func (c *checkpoints) forgetBehind(i int) {
	v := c.v
	s := v.snaps[i]
	v.metaMu.Lock()
	for _, later := range v.snaps[i+1:] {
		c.gone[later.Sequence] = c.sequence
		c.queue = slices.DeleteFunc(c.queue, func(p *publication) bool { return p.sequence == later.Sequence })
	}
	v.snaps = slices.Delete(v.snaps, i+1, len(v.snaps))
	s.aloneKnown = false
	for n := range v.pins {
		if n > s.SCO {
			delete(v.pins, n)
		}
	}
	v.metaMu.Unlock()
	for o := range c.pinned {
		if o > s.LastObject {
			delete(c.pinned, o)
		}
	}
}
