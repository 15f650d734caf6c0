package host

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/google/uuid"

	"scoria/driver"
	"scoria/driver/block"
	"scoria/driver/registry"
)

// fakeDisk is what outlives the daemon of a fake volume: a number stands for its
// contents.
type fakeDisk struct {
	content   int
	size      uint64
	snaps     []fakeSnap
	ancestors []driver.Ancestor
}

type fakeSnap struct {
	driver.Snapshot
	content int
}

func (d *fakeDisk) find(id uuid.UUID) int {
	return slices.IndexFunc(d.snaps, func(s fakeSnap) bool { return s.ID == id })
}

var errCrashed = errors.New("crashed")

// crasher lets everything fail from a certain step on, as if the daemon had died
// there.
type crasher struct {
	mu    sync.Mutex
	left  int // steps until then; negative: never
	steps int // taken so far
}

func (c *crasher) step() error {
	if c == nil {
		return nil
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.steps++
	if c.left >= 0 && c.steps > c.left {
		return errCrashed
	}
	return nil
}

// crashStore takes two steps for each commit: it may happen and not be heard of.
type crashStore struct {
	registry.Store
	crash *crasher
}

func (s crashStore) Commit(ctx context.Context, compares []registry.Compare, writes []registry.Write) (int64, error) {
	if err := s.crash.step(); err != nil {
		return 0, err
	}
	rev, err := s.Store.Commit(ctx, compares, writes)
	return rev, errors.Join(err, s.crash.step())
}

// do is a change of the engine's, with a step before and one after.
func (e *fakeEngine) do(ctx context.Context, method string, c driver.VolumeConfig, fn func(d *fakeDisk) error) error {
	if err := e.crash.step(); err != nil {
		return err
	}
	if err := e.call(ctx, method, c); err != nil {
		return err
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	if err := fn(e.disks[c.ID]); err != nil {
		return err
	}
	return e.crash.step()
}

func (e *fakeEngine) CreateClone(ctx context.Context, c driver.VolumeConfig, parent Volume, snapshot uuid.UUID) error {
	p := fakeOf(parent)
	return e.do(ctx, "clone", c, func(*fakeDisk) error {
		from := e.disks[p.config.ID]
		i := from.find(snapshot)
		if i < 0 {
			return driver.ErrNoSnapshot
		}
		ancestors := append(slices.Clone(from.ancestors), driver.Ancestor{Volume: p.config.ID, Snapshot: snapshot})
		e.disks[c.ID] = &fakeDisk{content: from.snaps[i].content, size: c.Size, ancestors: ancestors}
		e.made[c.ID] = true
		return nil
	})
}

func fakeOf(v Volume) *fakeVolume {
	if l, ok := v.(*limited); ok {
		v = l.Volume
	}
	return v.(*fakeVolume)
}

func (e *fakeEngine) OpenSnapshot(_ context.Context, v Volume, snapshot uuid.UUID) (View, error) {
	f := fakeOf(v)
	e.mu.Lock()
	defer e.mu.Unlock()
	d := e.disks[f.config.ID]
	i := d.find(snapshot)
	if i < 0 {
		return nil, driver.ErrNoSnapshot
	}
	e.views[snapshot]++
	return &fakeView{engine: e, snap: d.snaps[i].Snapshot, name: f.config.Name}, nil
}

type fakeView struct {
	block.Device
	engine *fakeEngine
	snap   driver.Snapshot
	name   string
}

func (v *fakeView) Snapshot() driver.Snapshot { return v.snap }

func (v *fakeView) Info() block.Info {
	return block.Info{Name: v.name + "@" + v.snap.Name, Size: v.snap.Size, ReadOnly: true}
}

// Submit answers everything at once.
func (v *fakeView) Submit(batch []*block.Request) {
	for _, r := range batch {
		r.Err, r.Ended = nil, true
	}
}

func (v *fakeView) Cancel(any) {}

func (v *fakeView) Close() error {
	v.engine.mu.Lock()
	defer v.engine.mu.Unlock()
	v.engine.views[v.snap.ID]--
	return nil
}

func (v *fakeVolume) CreateSnapshot(ctx context.Context, id uuid.UUID, name string, metadata map[string]string) (s driver.Snapshot, err error) {
	err = v.engine.do(ctx, "snapshot", v.config, func(d *fakeDisk) error {
		v.engine.sequence++
		s = driver.Snapshot{ID: id, Name: name, Metadata: metadata, Size: d.size, Created: time.Unix(1, 0).UTC(), Sequence: v.engine.sequence}
		d.snaps = append(d.snaps, fakeSnap{s, d.content})
		return nil
	})
	return s, err
}

func (v *fakeVolume) DeleteSnapshot(ctx context.Context, id uuid.UUID) error {
	return v.engine.do(ctx, "delete-snapshot", v.config, func(d *fakeDisk) error {
		if v.engine.views[id] > 0 {
			return fmt.Errorf("fake: %w", driver.ErrSnapshotInUse)
		}
		d.snaps = slices.DeleteFunc(d.snaps, func(s fakeSnap) bool { return s.ID == id })
		return v.engine.late
	})
}

func (v *fakeVolume) Snapshots() []driver.Snapshot {
	v.engine.mu.Lock()
	defer v.engine.mu.Unlock()
	var list []driver.Snapshot
	for _, s := range v.engine.disks[v.config.ID].snaps {
		list = append(list, s.Snapshot)
	}
	return list
}

func (v *fakeVolume) SnapshotSpace(context.Context) (map[uuid.UUID]uint64, error) {
	space := map[uuid.UUID]uint64{}
	for _, s := range v.Snapshots() {
		space[s.ID] = 4096
	}
	return space, nil
}

func (v *fakeVolume) Changes(_ context.Context, since, _ uuid.UUID, off, length uint64, fn func(block.Extent) bool) error {
	v.engine.mu.Lock()
	d := v.engine.disks[v.config.ID]
	i := d.find(since)
	changed := i >= 0 && d.snaps[i].content != d.content
	v.engine.mu.Unlock()
	if i < 0 {
		return driver.ErrNoSnapshot
	}
	fn(block.Extent{Offset: off, Length: length, Mapped: changed})
	return nil
}

func (v *fakeVolume) Rollback(ctx context.Context, id uuid.UUID, _ bool) error {
	err := v.engine.do(ctx, "rollback", v.config, func(d *fakeDisk) error {
		i := d.find(id)
		if i < 0 {
			return driver.ErrNoSnapshot
		}
		for _, s := range d.snaps[i+1:] {
			if v.engine.views[s.ID] > 0 {
				return driver.ErrSnapshotInUse
			}
		}
		d.content, d.size, d.snaps = d.snaps[i].content, d.snaps[i].Size, d.snaps[:i+1]
		return nil
	})
	v.resized()
	return err
}

// resized makes the volume show its disk's size.
func (v *fakeVolume) resized() {
	v.engine.mu.Lock()
	size := v.engine.disks[v.config.ID].size
	v.engine.mu.Unlock()
	v.mu.Lock()
	defer v.mu.Unlock()
	v.size = size
}

func (v *fakeVolume) Shrink(ctx context.Context, size uint64, _ bool) error {
	err := v.engine.do(ctx, "shrink", v.config, func(d *fakeDisk) error {
		d.size = size
		return nil
	})
	v.resized()
	return err
}

func (v *fakeVolume) Flatten(ctx context.Context, progress func(done, total uint64)) error {
	progress(1, 2)
	return v.engine.do(ctx, "flatten", v.config, func(d *fakeDisk) error {
		d.ancestors = nil
		return nil
	})
}

func (v *fakeVolume) Ancestors() []driver.Ancestor {
	v.engine.mu.Lock()
	defer v.engine.mu.Unlock()
	return slices.Clone(v.engine.disks[v.config.ID].ancestors)
}

// BlockStatus: the last cluster before 1 GiB is mapped.
func (v *fakeVolume) BlockStatus(_ context.Context, off, length uint64, fn func(block.Extent) bool) error {
	const at = 1<<30 - 4096
	if off <= at && at < off+length {
		fn(block.Extent{Offset: at, Length: 4096, Mapped: true})
	}
	return nil
}

func (v *fakeVolume) Watch(func(block.Info)) func() { return func() {} }

func (v *fakeVolume) Cancel(any) {}

// put changes a fake volume's contents.
func (b *bench) put(name string, content int) {
	dev := fakeOf(b.device(name))
	b.engine.mu.Lock()
	defer b.engine.mu.Unlock()
	b.engine.disks[dev.config.ID].content = content
}
