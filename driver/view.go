package driver

import (
	"context"
	"errors"
	"fmt"
	"runtime/debug"

	"github.com/google/uuid"

	"scoria/driver/block"
	"scoria/driver/lba"
)

// holdSnapshot keeps a snapshot from being deleted and its map loaded until release.
func (v *Volume) holdSnapshot(ctx context.Context, id uuid.UUID) (s *snapshotState, release func(), err error) {
	return v.keepMap(ctx, id, func(s *snapshotState) *int { return &s.refs })
}

// lookAtSnapshot keeps a snapshot's map loaded until release, and lets it be deleted:
// pages may then be gone. The daemon's own work must not stand in an operator's way.
func (v *Volume) lookAtSnapshot(ctx context.Context, id uuid.UUID) (s *snapshotState, release func(), err error) {
	return v.keepMap(ctx, id, func(s *snapshotState) *int { return &s.looks })
}

func (v *Volume) keepMap(ctx context.Context, id uuid.UUID, users func(*snapshotState) *int) (s *snapshotState, release func(), err error) {
	v.metaMu.Lock()
	i := v.findSnapshot(id)
	if i < 0 {
		v.metaMu.Unlock()
		return nil, nil, fmt.Errorf("volume %s: snapshot %s: %w", v.cfg.Name, id, ErrNoSnapshot)
	}
	s = v.snaps[i]
	*users(s)++
	v.metaMu.Unlock()
	s.mu.Lock()
	if s.m == nil {
		s.m, err = v.loadSnapshotMap(ctx, &s.Snapshot)
	}
	s.mu.Unlock()
	release = func() { v.releaseSnapshot(s, users(s)) }
	if err != nil {
		release()
		return nil, nil, err
	}
	return s, release, nil
}

func (v *Volume) releaseSnapshot(s *snapshotState, users *int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	v.metaMu.Lock()
	*users--
	last := s.refs+s.looks == 0
	v.metaMu.Unlock()
	if last && s.m != nil {
		s.m.Close()
		s.m = nil
	}
}

// loadSnapshotMap makes the map of a snapshot; its pages come when they are asked
// for.
func (v *Volume) loadSnapshotMap(ctx context.Context, s *Snapshot) (*lba.Map, error) {
	root, _, err := v.readSnapshotRoot(ctx, s)
	if err != nil {
		return nil, fmt.Errorf("volume %s: %w", v.cfg.Name, err)
	}
	m, err := lba.New(root.Clusters)
	if err != nil {
		return nil, fmt.Errorf("volume %s: snapshot %s: %w", v.cfg.Name, s.Name, err)
	}
	if err := m.RestoreDirectory(root.Directory, root.Mapped); err != nil {
		m.Close()
		return nil, fmt.Errorf("volume %s: snapshot %s: %w", v.cfg.Name, s.Name, err)
	}
	return m, nil
}

// View is a snapshot as a read-only device. As long as it is open the snapshot
// can't be deleted. All views of a snapshot share one map.
type View struct {
	v       *Volume
	s       *snapshotState
	m       *lba.Map
	info    block.Info
	seq     seqReader
	users   users // requests, and who asks for the block status
	release func()
}

var _ block.Device = (*View)(nil)

// OpenSnapshot makes a snapshot readable until Close. From any goroutine.
func (v *Volume) OpenSnapshot(ctx context.Context, id uuid.UUID) (*View, error) {
	ctx, leave, err := v.enter(ctx)
	if err != nil {
		return nil, err
	}
	defer leave()
	s, release, err := v.holdSnapshot(ctx, id)
	if err != nil {
		return nil, err
	}
	info := v.Info()
	info.Name, info.Size, info.ReadOnly = v.cfg.Name+"@"+s.Name, s.Size, true
	return &View{v: v, s: s, m: s.m, info: info, release: release}, nil
}

// Snapshot returns what the view shows.
func (w *View) Snapshot() Snapshot { return w.s.Snapshot }

// Close waits for the requests under way and lets go of the snapshot. Nothing may
// be submitted afterwards.
func (w *View) Close() error {
	w.users.shut()
	w.release()
	return nil
}

// Info implements block.Device.
func (w *View) Info() block.Info { return w.info }

// Cancel implements block.Device: reads wait for nothing but the store.
func (w *View) Cancel(owner any) { w.v.storeWaits.cancel(owner) }

// Claim implements block.Device: nobody can write.
func (w *View) Claim(block.Claimant) (func(), error) { return nil, block.ErrReadOnly }

// Watch implements block.Device: a snapshot never changes.
func (w *View) Watch(func(block.Info)) func() { return func() {} }

// BlockStatus implements block.Device.
func (w *View) BlockStatus(ctx context.Context, off, length uint64, fn func(block.Extent) bool) error {
	ctx, leave, err := w.enter(ctx)
	if err != nil {
		return err
	}
	defer leave()
	return w.v.blockStatus(ctx, w.m, w.info.Size, off, length, fn)
}

// enter is Volume.enter for work that a view does, too.
func (w *View) enter(ctx context.Context) (context.Context, func(), error) {
	if !w.users.add() {
		return nil, nil, fmt.Errorf("%s: %w", w.info.Name, block.ErrClosed)
	}
	ctx, leave, err := w.v.enter(ctx)
	if err != nil {
		w.users.done()
		return nil, nil, err
	}
	return ctx, func() { leave(); w.users.done() }, nil
}

// Submit implements block.Device.
func (w *View) Submit(batch []*block.Request) {
	for _, r := range batch {
		err := block.CheckRange(&w.info, r)
		if err == nil && r.Op == block.OpRead && total(r.Segments) != r.Length {
			err = block.ErrRange
		}
		if err != nil || r.Op != block.OpRead || r.Length == 0 {
			r.Err, r.Ended = err, true
			continue
		}
		r.Ended = false
		_, leave, err := w.enter(context.Background())
		if err != nil {
			r.Err, r.Ended = block.ErrClosed, true
			continue
		}
		go func() {
			debug.SetPanicOnFault(true)
			r.Err = w.v.readSlowly(w.m, &w.seq, r)
			r.Complete(r)
			leave()
		}()
	}
}

// anyInSnapshot is the last look at a SCO from the side of the snapshots: only the
// first one that is not older than it can reach it. If that is deleted meanwhile, the
// next one counts.
func (v *Volume) anyInSnapshot(ctx context.Context, m *scoMeta, looks *lastLooks) (bool, error) {
	for {
		v.metaMu.Lock()
		pin := v.pins[m.number]
		var id uuid.UUID
		for _, s := range v.snaps {
			if s.SCO >= m.number {
				id = s.ID
				break
			}
		}
		v.metaMu.Unlock()
		if pin > 0 || id == uuid.Nil {
			return pin > 0, nil
		}
		found, err := v.inSnapshot(ctx, m, id, looks)
		v.metaMu.Lock()
		still := v.findSnapshot(id) >= 0
		v.metaMu.Unlock()
		if still || ctx.Err() != nil {
			return found, err
		}
	}
}

// inSnapshot reports whether a snapshot refers to a SCO that counts as empty, and
// corrects what pins it.
func (v *Volume) inSnapshot(ctx context.Context, m *scoMeta, id uuid.UUID, looks *lastLooks) (bool, error) {
	s, release, err := v.lookAtSnapshot(ctx, id)
	if err != nil {
		return false, err
	}
	defer release()
	records, err := v.sealedRecords(ctx, m)
	if errors.Is(err, ErrLost) {
		cluster, found, err := v.clusterIn(ctx, looks, m.number, id, s.m)
		return found && v.keepPinned(m, s, cluster), err
	}
	if err != nil {
		return false, err
	}
	for i := range records {
		r := &records[i]
		if !r.HasData() || r.LBA >= s.m.Clusters() {
			continue
		}
		loc, err := v.locateOn(ctx, s.m, r.LBA)
		if err != nil {
			return false, err
		}
		if loc == lba.MakeLocation(m.number, r.Cluster) {
			return v.keepPinned(m, s, r.LBA), nil
		}
	}
	return false, nil
}
