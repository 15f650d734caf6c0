package driver

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/google/uuid"

	"scoria/driver/block"
	"scoria/driver/lba"
)

// A snapshot is a checkpoint whose root is kept: under the name snap-SEQUENCE it
// outlives the ordinary roots, on the local disk until it is in the store.
//
// What snapshots need is known without reading their roots. A cluster that was
// overwritten never comes back, so a cluster of SCO n is reached by any snapshot if
// and only if it is reached by the first one, s(n), whose position is not before n;
// and the live clusters are among those. How many clusters of SCO n that is, its
// pin, is the live count of n in the root of s(n). Likewise for page objects. So a
// new snapshot pins what lies behind the one before it, and deleting a snapshot
// concerns what lies between its two neighbours only.
//
// Order: creating writes the root, which makes the snapshot exist; then comes the
// caller's record. Deleting begins with the caller's record; then comes a checkpoint
// that calls the snapshot dropped and whose pins do without it, then its local root
// goes, and its root in the store when that checkpoint has been published, before any
// SCO. Whatever a crash leaves undone of that the next opening does. What it finds
// beyond what the caller names it adopts (snapshot_recover.go): nothing is deleted
// because a record is missing.

// Snapshot describes a snapshot. The registry keeps what CreateSnapshot returned.
type Snapshot struct {
	ID         uuid.UUID         `json:"id"`
	Name       string            `json:"name"`
	Created    time.Time         `json:"created"`
	Metadata   map[string]string `json:"metadata,omitempty"`
	Size       uint64            `json:"size"`        // of the volume at that time, bytes
	SCO        uint64            `json:"sco"`         // the last SCO that it contains
	Sequence   uint64            `json:"sequence"`    // of its root; orders a volume's snapshots
	LastObject uint32            `json:"last_object"` // the last page object at that time
}

// Errors of snapshots.
var (
	ErrNoSnapshot     = errors.New("no such snapshot")
	ErrSnapshotExists = errors.New("the snapshot exists already")
	ErrSnapshotInUse  = errors.New("the snapshot is in use")
)

// snapshotState is a snapshot of an open volume. refs and clones
// belong to Volume.metaMu, alone to checkpoints.mu.
type snapshotState struct {
	Snapshot
	refs   int // views
	looks  int // of the housekeeper, which may be deleted under it
	clones int // open ones that build on it

	// alone is how many clusters only this snapshot reaches, if known.
	alone      uint64
	aloneKnown bool

	mu sync.Mutex // before metaMu
	m  *lba.Map   // while refs or looks > 0
}

// newestSnapshot is the last snapshot, or what stands before the first one.
// Caller holds mu.
func (c *checkpoints) newestSnapshot() Snapshot {
	if n := len(c.v.snaps); n > 0 {
		return c.v.snaps[n-1].Snapshot
	}
	return c.beginning()
}

// beginning stands before the first snapshot: SCOs and page objects up to there
// are not the volume's own.
func (c *checkpoints) beginning() Snapshot { return c.v.origin }

// own leaves out page objects of ancestors.
func (c *checkpoints) own(objects []uint32) []uint32 {
	first := c.beginning().LastObject
	return slices.DeleteFunc(objects, func(o uint32) bool { return o <= first })
}

// addSnapshot makes a snapshot whose root is durable known. Caller holds mu.
func (c *checkpoints) addSnapshot(snap *Snapshot, n *newRoot, pinFrom uint64, p *publication) {
	v := c.v
	v.metaMu.Lock()
	if k := len(v.snaps); k > 0 {
		last := v.snaps[k-1]
		last.alone, last.aloneKnown = 0, true
		live := liveCounts(n.blob.scos)
		for s := c.before(k-1).SCO + 1; s <= last.SCO; s++ {
			last.alone += uint64(v.pins[s] - min(v.pins[s], live[s]))
		}
	}
	for i := range n.blob.scos {
		if e := &n.blob.scos[i]; e.number > pinFrom && e.live > 0 {
			v.pins[e.number] = e.live
		}
	}
	v.snaps = append(v.snaps, &snapshotState{Snapshot: *snap})
	v.metaMu.Unlock()
	for _, o := range n.fresh {
		c.pinned[o] = true
	}
	c.queue = append(c.queue, p)
	c.owes.Store(true)
	v.rest.Store(nil)
}

// snapshotsAlone reports whether no snapshot of a clone refers to ancestors: if the
// oldest one does not, none does. Caller holds mu.
func (c *checkpoints) snapshotsAlone(ctx context.Context) bool {
	v := c.v
	if v.kin.Load() == nil || len(v.snaps) == 0 {
		return true
	}
	root, blob, err := v.readSnapshotRoot(ctx, &v.snaps[0].Snapshot)
	return err == nil && root.Mapped == sumLive(blob.scos)
}

func sumLive(scos []tableEntry) (n uint64) {
	for i := range scos {
		n += uint64(scos[i].live)
	}
	return n
}

// before is the snapshot in front of the i-th. Caller holds mu.
func (c *checkpoints) before(i int) Snapshot {
	if i > 0 {
		return c.v.snaps[i-1].Snapshot
	}
	return c.beginning()
}

func liveCounts(scos []tableEntry) map[uint64]uint32 {
	out := make(map[uint64]uint32, len(scos))
	for i := range scos {
		out[scos[i].number] = scos[i].live
	}
	return out
}

// CreateSnapshot makes a snapshot of the volume as it is now, with all writes that
// have completed. It exists and is durable on return; if the caller dies before it
// has recorded it, the next opening finds it. Guests wait for microseconds.
// It fails, with nothing left behind, if the disk is full. From any goroutine.
func (v *Volume) CreateSnapshot(ctx context.Context, id uuid.UUID, name string, metadata map[string]string) (Snapshot, error) {
	fail := func(err error) (Snapshot, error) {
		return Snapshot{}, fmt.Errorf("volume %s: snapshot %s: %w", v.cfg.Name, name, err)
	}
	ctx, leave, err := v.enter(ctx)
	if err != nil {
		return fail(err)
	}
	defer leave()
	snap := Snapshot{ID: id, Name: name, Metadata: metadata}
	if id == uuid.Nil {
		return fail(errors.New("its id is empty"))
	}
	err = v.takeSoon(ctx, func(c *checkpoints) error {
		if err := v.writable(); err != nil {
			return err
		}
		if v.findSnapshot(id) >= 0 {
			return ErrSnapshotExists
		}
		snap.Created = time.Now().UTC()
		return c.take(ctx, &snap, true)
	})
	if err != nil {
		return fail(err)
	}
	return snap, nil
}

// behindPause is between two attempts to write the log out for a checkpoint.
const behindPause = 200 * time.Millisecond

// takeSoon calls take with the checkpoints locked, again as long as the oldest SCOs
// have to be sealed first or the disk does not take the log.
func (v *Volume) takeSoon(ctx context.Context, take func(*checkpoints) error) error {
	for {
		c := v.ckpt
		c.mu.Lock()
		err := take(c)
		c.mu.Unlock()
		pause := 10 * time.Millisecond
		switch {
		case errors.Is(err, errNoRoom):
		case errors.Is(err, errLogBehind):
			pause = behindPause
		default:
			return err
		}
		v.kickIO()
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return ctx.Err()
		case <-v.ctx.Done():
			return block.ErrClosed
		}
	}
}

// findSnapshot returns the snapshot's index, -1 if there is none. Caller holds
// checkpoints.mu or metaMu.
func (v *Volume) findSnapshot(id uuid.UUID) int {
	return slices.IndexFunc(v.snaps, func(s *snapshotState) bool { return s.ID == id })
}

// Snapshots lists the volume's snapshots, oldest first. From any goroutine.
func (v *Volume) Snapshots() []Snapshot {
	v.metaMu.Lock()
	defer v.metaMu.Unlock()
	out := make([]Snapshot, len(v.snaps))
	for i, s := range v.snaps {
		out[i] = s.Snapshot
	}
	return out
}

// DeleteSnapshot removes a snapshot; no error if there is none. The caller has
// recorded before that it is being deleted, and forgets it afterwards: on success a
// durable root says that it is gone. It fails
// with ErrSnapshotInUse while somebody reads it or an open clone builds on it.
// The space comes back in the background. From any goroutine.
func (v *Volume) DeleteSnapshot(ctx context.Context, id uuid.UUID) error {
	ctx, leave, err := v.enter(ctx)
	if err == nil {
		defer leave()
		err = v.takeSoon(ctx, func(c *checkpoints) error { return c.deleteSnapshot(ctx, id) })
	}
	if err != nil {
		return fmt.Errorf("volume %s: delete snapshot %s: %w", v.cfg.Name, id, err)
	}
	return nil
}

// deleteSnapshot may be repeated after an error. Caller holds mu.
func (c *checkpoints) deleteSnapshot(ctx context.Context, id uuid.UUID) error {
	v := c.v
	if err := v.writable(); err != nil {
		return err
	}
	i := v.findSnapshot(id)
	switch {
	case i >= 0:
		if err := c.dropSnapshots(ctx, i, i+1); err != nil {
			return err
		}
	case !c.overdue:
		return nil
	}
	return c.take(ctx, nil, true)
}

// dropSnapshots forgets the snapshots [from, to) and what they pin. Their roots go
// once a checkpoint without them is where the roots are. Caller holds mu.
func (c *checkpoints) dropSnapshots(ctx context.Context, from, to int) error {
	v := c.v
	r, err := c.reachBetween(ctx, from, to)
	if err != nil {
		return err
	}
	v.metaMu.Lock()
	for _, s := range v.snaps[from:to] {
		if s.refs > 0 || s.clones > 0 {
			v.metaMu.Unlock()
			return fmt.Errorf("%w: %s", ErrSnapshotInUse, s.Name)
		}
	}
	for _, s := range v.snaps[from:to] {
		c.gone[s.Sequence] = c.sequence + 1
		c.queue = slices.DeleteFunc(c.queue, func(p *publication) bool { return p.sequence == s.Sequence })
	}
	c.repin(r)
	gone := seqRange{v.snaps[from].Sequence - 1, v.snaps[to-1].Sequence + 1}
	v.snaps = slices.Delete(v.snaps, from, to)
	c.dropped = c.withDropped(gone, len(v.snaps))
	for i := max(from-1, 0); i < min(from+1, len(v.snaps)); i++ {
		v.snaps[i].aloneKnown = false // it has another neighbour
	}
	v.metaMu.Unlock()
	c.overdue = true
	c.owes.Store(true)
	v.rest.Store(nil)
	return nil
}

// reach is what the snapshots between two positions reach: all SCOs and page
// objects that are not named here are not reached by any.
type reach struct {
	after, upTo Snapshot // upTo.SCO is noPins if there is no snapshot behind
	pins        map[uint64]uint32
	objects     map[uint32]bool
}

// reachBetween looks at the root of the snapshot with index to, which is the first
// behind those from from on: without them it is what pins what lies behind from-1.
// Caller holds mu.
func (c *checkpoints) reachBetween(ctx context.Context, from, to int) (reach, error) {
	r := reach{after: c.before(from), pins: map[uint64]uint32{}, objects: map[uint32]bool{}}
	if to >= len(c.v.snaps) {
		r.upTo = Snapshot{SCO: noPins, LastObject: ^uint32(0)}
		return r, nil
	}
	next := c.v.snaps[to]
	r.upTo = next.Snapshot
	root, blob, err := c.v.readSnapshotRoot(ctx, &next.Snapshot)
	if err != nil {
		return r, err
	}
	for i := range blob.scos {
		if e := &blob.scos[i]; e.number > r.after.SCO && e.number <= r.upTo.SCO && e.live > 0 {
			r.pins[e.number] = e.live
		}
	}
	for _, addr := range root.Directory {
		if o := addr.Object(); o > r.after.LastObject {
			r.objects[o] = true
		}
	}
	return r, nil
}

// repin enters what reachBetween found. Caller holds mu and metaMu.
func (c *checkpoints) repin(r reach) {
	for n := range c.v.pins {
		if n > r.after.SCO && n <= r.upTo.SCO {
			delete(c.v.pins, n)
		}
	}
	for n, pin := range r.pins {
		c.v.pins[n] = pin
	}
	for o := range c.pinned {
		if o > r.after.LastObject && o <= r.upTo.LastObject && !r.objects[o] {
			delete(c.pinned, o)
		}
	}
	for o := range r.objects {
		c.pinned[o] = true
	}
}

// readSnapshotRoot reads the root of a snapshot and sees that it is that one's.
func (v *Volume) readSnapshotRoot(ctx context.Context, s *Snapshot) (*lba.Root, *rootBlob, error) {
	if err := ctx.Err(); err != nil {
		return nil, nil, err
	}
	name := snapName(s.Sequence)
	root, err := v.readRoot(ctx, name)
	if err != nil {
		v.checksumTrouble(err)
		return nil, nil, fmt.Errorf("snapshot %s: %w", s.Name, err)
	}
	blob, err := decodeBlob(root.Blob)
	switch {
	case err != nil:
	case root.Volume != v.cfg.ID || root.Sequence != s.Sequence || blob.snapshot == nil || blob.snapshot.ID != s.ID:
		err = fmt.Errorf("%s is the root of another: %w", name, lba.ErrFormat)
	}
	if err != nil {
		return nil, nil, fmt.Errorf("snapshot %s: %w", s.Name, err)
	}
	return root, blob, nil
}

// SnapshotSpace returns how many bytes each snapshot holds alone: what would be
// given back if it were deleted. It reads roots that were not looked at since the
// volume was opened. From any goroutine.
func (v *Volume) SnapshotSpace(ctx context.Context) (map[uuid.UUID]uint64, error) {
	ctx, leave, err := v.enter(ctx)
	if err != nil {
		return nil, err
	}
	defer leave()
	out := map[uuid.UUID]uint64{}
	for _, s := range v.Snapshots() {
		n, ok, err := v.ckpt.aloneIn(ctx, s.ID)
		if err != nil {
			return nil, fmt.Errorf("volume %s: space of snapshot %s: %w", v.cfg.Name, s.Name, err)
		}
		if ok {
			out[s.ID] = n * block.ClusterSize
		}
	}
	return out, nil
}

// aloneIn counts the clusters that only one snapshot reaches. Each look holds mu by
// itself, so that checkpoints don't wait for ten thousand.
func (c *checkpoints) aloneIn(ctx context.Context, id uuid.UUID) (n uint64, ok bool, err error) {
	v := c.v
	c.mu.Lock()
	defer c.mu.Unlock()
	i := v.findSnapshot(id)
	if i < 0 {
		return 0, false, nil
	}
	s := v.snaps[i]
	if s.aloneKnown && i+1 < len(v.snaps) {
		return s.alone, true, nil
	}
	var live map[uint64]uint32
	if i+1 < len(v.snaps) {
		_, blob, err := v.readSnapshotRoot(ctx, &v.snaps[i+1].Snapshot)
		if err != nil {
			return 0, false, err
		}
		live = liveCounts(blob.scos)
	}
	v.metaMu.Lock()
	defer v.metaMu.Unlock()
	for number := c.before(i).SCO + 1; number <= s.SCO; number++ {
		pin := v.pins[number]
		now := live[number]
		if live == nil && pin > 0 {
			now = uint32(max(v.live.at(number).Load(), 0))
		}
		n += uint64(pin - min(pin, now))
	}
	s.alone, s.aloneKnown = n, true
	return n, true, nil
}
