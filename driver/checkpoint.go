package driver

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"iter"
	"maps"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"scoria/driver/block"
	"scoria/driver/lba"
)

// position is a point in the log, always the end of a SCO: everything up to it
// is in the checkpoint, recovery begins behind it.
type position struct {
	sco     uint64
	records uint32
}

// checkpoints writes and reads the map's checkpoints. A checkpoint is page
// objects, each with the pages that had changed, and a root that names all pages
// of the map. It exists first on the local disk, later also in the store.
//
// Order on the local disk: page objects and the log up to the position are
// durable before the root is. Order in the store: all SCOs up to the position,
// then page objects, then the root. Only then do SCOs go away to which the root
// does not refer.
type checkpoints struct {
	v      *Volume
	reader *lba.ObjectReader // local copies first
	stored *lba.ObjectReader // the store's only, for when a local one is damaged

	// work is for what is done with the store in the background; it ends when the
	// volume begins to close.
	work context.Context
	stop context.CancelFunc

	mu         sync.Mutex // one checkpoint or publication at a time; before gate
	rootStored bool       // the root that was restored is in the store
	sequence   uint64
	object     uint32 // last page object number, never used again even if it failed
	pos        position
	inStore    map[uint32]bool
	// pending is the root that goes to the store next, newest the latest one if
	// that is another: a pending root is never replaced, or a log that grows faster
	// than it is uploaded would never get a root into the store.
	pending *publication
	newest  *publication
	doomed  []uint64 // SCOs that no published root needs, to be deleted
	// unsure are such SCOs of which a map that can't be read may say something else;
	// they are looked at again at unsureUntil.
	unsure      []uint64
	unsureUntil time.Time

	// published is the sequence of the newest root in the store since which no root
	// of a deleted snapshot is there.
	published uint64

	// overdue: the newest root says of snapshots what is no longer true.
	overdue bool
	pinned  map[uint32]bool   // own page objects that snapshots refer to
	queue   []*publication    // roots of snapshots that go to the store, oldest first
	gone    map[uint64]uint64 // sequence of a snapshot that is no more → of the first root without it
	dropped []seqRange        // snapshots that are gone for good; see dropped.go
	unclear map[uint64]bool   // snapshots whose roots are missing or can't be read: neither dropped nor known
	owes    atomic.Bool       // something still has to be done in the store
}

// publication is what still has to be done to get a local root into the store.
type publication struct {
	sequence uint64
	pos      position
	objects  []uint32
	dead     []uint64 // SCOs that nothing referred to at the position
	alone    bool     // neither it nor any snapshot refers to ancestors
}

func newCheckpoints(v *Volume) *checkpoints {
	c := &checkpoints{v: v, inStore: map[uint32]bool{}, pinned: map[uint32]bool{}, gone: map[uint64]uint64{}, unclear: map[uint64]bool{}}
	c.work, c.stop = context.WithCancel(v.ctx)
	c.reader = lba.NewObjectReader(v.cfg.ID, c.openPages)
	c.stored = lba.NewObjectReader(v.cfg.ID, c.openStoredPages)
	return c
}

// ReadPage implements lba.PageReader. A damaged page is counted, and read from
// the store's copy if there is one.
func (c *checkpoints) ReadPage(ctx context.Context, addr lba.PageAddr, page []byte) error {
	if owner := c.v.pageOwner(addr.Object()); owner != c.v {
		return owner.ckpt.ReadPage(ctx, addr, page)
	}
	err := c.reader.ReadPage(ctx, addr, page)
	if err == nil || !errors.Is(err, lba.ErrFormat) {
		return err
	}
	c.v.stats.checksumErrors.Add(1)
	if serr := c.stored.ReadPage(ctx, addr, page); serr != nil {
		if failed := (*storeError)(nil); errors.As(serr, &failed) || ctx.Err() != nil {
			return serr // it may be sound there
		}
		c.v.raise("corrupt-data", "a page of the map fails its checksum (%v): what it maps can't be read; run scoria volume check %s", err, c.v.cfg.Name)
		return err
	}
	c.v.log.Warn().Err(err).Msg("page of the map is damaged on the local disk; using the store's")
	return nil
}

func (c *checkpoints) close() { c.stop() }

// idle reports whether no root waits for its publication.
func (c *checkpoints) idle() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.pending == nil
}

// isOverdue reports whether the newest root is wrong about snapshots.
func (c *checkpoints) isOverdue() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.overdue
}

// checkpoint writes the map as of now, if anything was logged since the last one.
func (v *Volume) checkpoint(ctx context.Context) error {
	c := v.ckpt
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.take(ctx, nil, false)
}

// take writes a checkpoint, which becomes the snapshot snap if that is not nil.
// Without force it does nothing if nothing was logged since the last one. Caller
// holds mu.
//
// Guests wait during the exclusive section only, which no disk takes part in.
func (c *checkpoints) take(ctx context.Context, snap *Snapshot, force bool) error {
	v := c.v
	v.gate.Lock()
	if records, _ := unpack(v.cur.head.Load()); records > 0 && !v.roll() {
		v.gate.Unlock()
		return errNoRoom
	}
	pos := position{v.cur.prev, v.cur.prevRecords}
	if pos == c.pos && (c.sequence > 0 || pos == position{}) && !force && !c.overdue && !c.namesReplaced() {
		v.gate.Unlock()
		return nil
	}
	ck := v.m.BeginCheckpoint()
	pinFrom := uint64(noPins)
	if snap != nil {
		pinFrom = c.newestSnapshot().SCO
		v.snapping.Add(1)
		defer v.snapping.Add(1)
		snap.SCO, snap.Size, snap.Sequence = pos.sco, v.cfg.Size, c.sequence+1
	}
	live := v.live.copy()
	inherited := v.inherited()
	clusters := v.m.Clusters()
	since := v.logSince.Load()
	v.gate.Unlock()

	table, dead := v.table(pos.sco, pinFrom, live)
	n := &newRoot{
		pos: pos, clusters: clusters, mapped: ck.Mapped(), directory: ck.Directory, snapshot: snap,
		blob: rootBlob{scos: table, dropped: c.dropped, snapshot: snap},
	}
	alone := inherited == 0 && c.snapshotsAlone(ctx)
	if !alone {
		n.blob.ancestry = v.Ancestors()
	}
	if err := c.write(ctx, ck, n); err != nil {
		ck.Abort()
		return fmt.Errorf("checkpoint: %w", err)
	}
	c.sequence++
	ck.Commit()
	v.eng.room.look()
	v.adjustRoom()
	c.pos, c.overdue = pos, false
	objects := c.own(v.m.Objects())
	if snap != nil {
		c.addSnapshot(snap, n, pinFrom, &publication{sequence: c.sequence, pos: pos, objects: objects, dead: dead})
	}
	c.enqueue(&publication{sequence: c.sequence, pos: pos, objects: objects, dead: dead, alone: alone})
	v.logSince.Add(-since)
	v.stats.checkpointed.Add(1)
	c.removeStale()
	return nil
}

// enqueue lets p go to the store after what goes there already.
func (c *checkpoints) enqueue(p *publication) {
	if c.pending == nil {
		c.await(p)
	} else {
		c.newest = p
	}
	c.owes.Store(true)
}

// newRoot is a root that is being written.
type newRoot struct {
	pos              position
	clusters, mapped uint64
	directory        func() iter.Seq2[uint64, lba.PageAddr] // once the pages are written
	blob             rootBlob
	snapshot         *Snapshot
	fresh            []uint32 // page objects that no snapshot before this one refers to
}

// write makes the checkpoint durable on the local disk. Caller holds mu.
//
// Page objects of an attempt that fails before its root can exist are removed:
// a full disk would otherwise lose its reserve to one attempt after the other.
func (c *checkpoints) write(ctx context.Context, ck *lba.Checkpoint, n *newRoot) (err error) {
	first := c.object + 1
	tried := false // to give the root its name
	defer func() {
		if err != nil && !tried {
			c.removeObjects(first, c.object)
		}
	}()
	if err := c.syncLog(n.snapshot != nil); err != nil {
		return err
	}
	if err := c.writePages(ctx, ck); err != nil {
		return err
	}
	buf, err := c.encodeRoot(n)
	if err != nil {
		return err
	}
	if n.snapshot == nil {
		return c.writeRoot(rootName(c.sequence+1), buf, &tried)
	}
	begun := false
	err = c.writeRoot(snapName(c.sequence+1), buf, &begun)
	if err == nil {
		err = c.writeRoot(rootName(c.sequence+1), buf, &tried)
	}
	if err != nil && begun && !c.unmake() {
		tried = true // it may still be there, and need its pages
	}
	return err
}

// unmake removes the root of a snapshot whose making has failed, and reports whether
// it is gone for sure. The next root calls it dropped, in case it is not, and nothing
// else gets its number.
func (c *checkpoints) unmake() bool {
	c.sequence++
	fsys, name := c.v.eng.cfg.FS, snapName(c.sequence)
	err := fsys.Remove(c.v.mapPath(name))
	if err == nil || errors.Is(err, fs.ErrNotExist) {
		err = fsys.SyncDir(c.v.mapDir())
	}
	if err != nil {
		c.v.log.Warn().Err(err).Str("file", name).Msg("root of a snapshot that could not be made is not removed yet")
	}
	c.dropped = c.withDropped(seqRange{c.sequence - 1, c.sequence + 1}, len(c.v.snaps))
	c.overdue = true
	c.owes.Store(true)
	return err == nil
}

// errLogBehind: the log can't be written to the disk now, which may pass.
var errLogBehind = errors.New("the log can't be written out")

// syncLog makes the log durable. It does not wait until the disk takes it, as what
// gives room back needs the checkpoints' lock: it fails, with errLogBehind unless it is
// for a snapshot or a rollback, which a full disk refuses. It comes before the pages,
// which an attempt that fails has then not written in vain.
func (c *checkpoints) syncLog(once bool) error {
	v := c.v
	if v.failed.Load() {
		return fmt.Errorf("%w: an earlier sync failed", block.ErrFailed)
	}
	v.gate.RLock()
	target := v.cur
	records, _ := unpack(target.head.Load())
	v.gate.RUnlock()
	err := v.trySync(target, records, v.gently())
	if err != nil && !v.failed.Load() {
		v.ioFailed(err)
		if once {
			return err
		}
		return fmt.Errorf("%w: %w", errLogBehind, err)
	}
	return err
}

// encodeRoot is done when the pages are written: a snapshot then knows which page
// objects it needs.
func (c *checkpoints) encodeRoot(n *newRoot) ([]byte, error) {
	pinned := maps.Clone(c.pinned)
	if s := n.snapshot; s != nil {
		s.LastObject = c.object
		after := c.newestSnapshot().LastObject
		for _, addr := range n.directory() {
			if o := addr.Object(); o > after && !pinned[o] {
				pinned[o] = true
				n.fresh = append(n.fresh, o)
			}
		}
	}
	n.blob.objects = sortedObjects(pinned)
	blob, err := n.blob.encode()
	if err != nil {
		return nil, err
	}
	return encodeRoot(&lba.Root{
		Volume: c.v.cfg.ID, Sequence: c.sequence + 1, LogSCO: n.pos.sco, LogRecord: uint64(n.pos.records),
		Clusters: n.clusters, Mapped: n.mapped, Blob: blob, Directory: n.directory(),
	})
}

func encodeRoot(root *lba.Root) ([]byte, error) {
	var buf bytes.Buffer
	if err := root.Encode(&buf); err != nil {
		return nil, err
	}
	return buf.Bytes(), nil
}

// writeRoot stores a root under a name; tried is set before that can exist.
func (c *checkpoints) writeRoot(name string, root []byte, tried *bool) error {
	c.v.rootBytes.Store(int64(len(root)))
	if err := c.v.stageMapFile(name, bytes.NewReader(root), int64(len(root))); err != nil {
		return err
	}
	if tried != nil {
		*tried = true
	}
	return c.v.nameMapFile(name)
}

// writePages writes the pages that have changed to new page objects.
func (c *checkpoints) writePages(ctx context.Context, ck *lba.Checkpoint) error {
	v := c.v
	b := lba.NewPageObjectBuilder(v.cfg.ID)
	flush := func() error {
		if b.Len() == 0 {
			return nil
		}
		name := pagesName(c.object)
		if err := v.stageMapFile(name, b, b.Size()); err != nil {
			return err
		}
		return v.nameMapFile(name)
	}
	c.object++
	b.Reset(c.object)
	err := ck.WritePages(func(leaf uint64, page []byte) (lba.PageAddr, error) {
		if b.Full() {
			if err := flush(); err != nil {
				return 0, err
			}
			c.object++
			b.Reset(c.object)
		}
		if err := ctx.Err(); err != nil {
			return 0, err
		}
		return b.Add(leaf, page)
	})
	if err != nil {
		return err
	}
	return flush()
}

// removeObjects removes local page objects that no root can refer to.
func (c *checkpoints) removeObjects(first, last uint32) {
	for o := first; o <= last; o++ {
		c.removeMapFile(pagesName(o))
	}
}

// removeStale removes local roots but the newest and those that are to be
// published, and page objects that none of them needs. What only snapshots need
// stays until it is in the store. Caller holds mu.
func (c *checkpoints) removeStale() {
	v := c.v
	names, err := v.eng.cfg.FS.List(v.mapDir())
	if err != nil {
		v.log.Warn().Err(err).Msg("map directory can't be listed")
		return
	}
	keep := map[string]bool{rootName(c.sequence): true}
	for _, o := range v.m.Objects() {
		keep[pagesName(o)] = true
	}
	for o := range c.pinned {
		if !c.inStore[o] {
			keep[pagesName(o)] = true
		}
	}
	for _, p := range c.queue {
		keep[snapName(p.sequence)] = true
	}
	for seq := range c.unclear {
		keep[snapName(seq)] = true
	}
	for _, p := range []*publication{c.pending, c.newest} {
		if p == nil {
			continue
		}
		keep[rootName(p.sequence)] = true
		for _, o := range p.objects {
			keep[pagesName(o)] = true
		}
	}
	for _, n := range names {
		if keep[n] || !(strings.HasPrefix(n, rootPrefix) || strings.HasPrefix(n, pagesPrefix) || strings.HasPrefix(n, snapPrefix)) {
			continue
		}
		if object, ok := parsePages(n); ok {
			c.reader.Forget(object)
			c.stored.Forget(object)
		}
		c.removeMapFile(n)
	}
}
