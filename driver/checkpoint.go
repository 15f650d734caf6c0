package driver

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"strings"
	"sync"

	"scoria/alba/vfs"
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

	mu       sync.Mutex // one checkpoint or publication at a time; before gate
	sequence uint64
	object   uint32 // last page object number, never used again even if it failed
	pos      position
	inStore  map[uint32]bool
	// pending is the root that goes to the store next, newest the latest one if
	// that is another: a pending root is never replaced, or a log that grows faster
	// than it is uploaded would never get a root into the store.
	pending *publication
	newest  *publication
	doomed  []uint64 // SCOs that no published root needs, to be deleted
}

// publication is what still has to be done to get a local root into the store.
type publication struct {
	sequence uint64
	pos      position
	objects  []uint32
	dead     []uint64 // SCOs that nothing referred to at the position
}

const (
	rootPrefix  = "root-"
	pagesPrefix = "pages-"
	scoPrefix   = "sco-"
)

func rootName(seq uint64) string          { return fmt.Sprintf("%s%016x", rootPrefix, seq) }
func pagesName(object uint32) string      { return fmt.Sprintf("%s%08x", pagesPrefix, object) }
func (v *Volume) mapDir() string          { return v.dir + "/map" }
func (v *Volume) mapPath(n string) string { return v.mapDir() + "/" + n }

func newCheckpoints(v *Volume) *checkpoints {
	c := &checkpoints{v: v, inStore: map[uint32]bool{}}
	c.work, c.stop = context.WithCancel(v.ctx)
	c.reader = lba.NewObjectReader(v.cfg.ID, c.openPages)
	c.stored = lba.NewObjectReader(v.cfg.ID, c.openStoredPages)
	return c
}

// ReadPage implements lba.PageReader. A damaged page is counted, and read from
// the store's copy if there is one.
func (c *checkpoints) ReadPage(ctx context.Context, addr lba.PageAddr, page []byte) error {
	err := c.reader.ReadPage(ctx, addr, page)
	if err == nil || !errors.Is(err, lba.ErrFormat) {
		return err
	}
	c.v.stats.checksumErrors.Add(1)
	if c.stored.ReadPage(ctx, addr, page) != nil {
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

// localFile reads a file that is opened for each access: map pages are read
// once and then stay in RAM.
type localFile struct {
	fs   vfs.FS
	name string
}

func (l localFile) ReadAt(p []byte, off int64) (int, error) {
	f, err := l.fs.Open(l.name, vfs.ReadOnly)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	return f.ReadAt(p, off)
}

// storeObject reads an object through the store.
type storeObject struct {
	ctx context.Context
	v   *Volume
	n   string
}

func (s storeObject) ReadAt(p []byte, off int64) (int, error) {
	s.v.stats.storeRead.Add(uint64(len(p)))
	if err := s.v.cfg.Store.ReadAt(s.ctx, s.v.namespace(), s.n, p, off); err != nil {
		return 0, err
	}
	return len(p), nil
}

func (c *checkpoints) openStoredPages(ctx context.Context, object uint32) (io.ReaderAt, int64, error) {
	size, err := c.v.cfg.Store.Size(ctx, c.v.namespace(), pagesName(object))
	if err != nil {
		return nil, 0, err
	}
	return storeObject{c.v.ctx, c.v, pagesName(object)}, size, nil
}

func (c *checkpoints) openPages(_ context.Context, object uint32) (io.ReaderAt, int64, error) {
	return c.v.openMapObject(pagesName(object))
}

// openMapObject finds a root or page object, on the local disk if it is there.
func (v *Volume) openMapObject(name string) (io.ReaderAt, int64, error) {
	info, err := v.eng.cfg.FS.Stat(v.mapPath(name))
	if err == nil {
		return localFile{v.eng.cfg.FS, v.mapPath(name)}, info.Size(), nil
	}
	if !errors.Is(err, fs.ErrNotExist) {
		return nil, 0, err
	}
	size, err := v.cfg.Store.Size(v.ctx, v.namespace(), name)
	if err != nil {
		return nil, 0, fmt.Errorf("%s: %w", name, err)
	}
	return storeObject{v.ctx, v, name}, size, nil
}

// checkpoint writes the map as of now. With final it also forgets the empty
// head, so that the next opening finds nothing to replay.
func (v *Volume) checkpoint(ctx context.Context, final bool) error {
	c := v.ckpt
	c.mu.Lock()
	defer c.mu.Unlock()

	v.gate.Lock()
	if records, _ := unpack(v.cur.head.Load()); records > 0 && !v.roll() {
		v.gate.Unlock()
		return errNoRoom
	}
	pos := position{v.cur.prev, v.cur.prevRecords}
	if pos == c.pos && c.sequence > 0 && !final {
		v.gate.Unlock()
		return nil
	}
	ck := v.m.BeginCheckpoint()
	table, dead := v.snapshotSCOs()
	clusters := v.cfg.Size / block.ClusterSize
	since := v.logSince.Load()
	v.gate.Unlock()

	if err := c.write(ctx, ck, pos, table, clusters); err != nil {
		ck.Abort()
		return fmt.Errorf("checkpoint: %w", err)
	}
	c.pos = pos
	p := &publication{sequence: c.sequence, pos: pos, objects: v.m.Objects(), dead: dead}
	if c.pending == nil {
		c.await(p)
	} else {
		c.newest = p
	}
	v.logSince.Add(-since)
	v.stats.checkpointed.Add(1)
	c.removeStale()
	return nil
}

// write makes the checkpoint durable on the local disk. Caller holds mu.
//
// Page objects of an attempt that fails before its root can exist are removed:
// a full disk would otherwise lose its reserve to one attempt after the other.
func (c *checkpoints) write(ctx context.Context, ck *lba.Checkpoint, pos position, table []byte, clusters uint64) (err error) {
	v := c.v
	first := c.object + 1
	tried := false // to give the root its name
	defer func() {
		if err != nil && !tried {
			c.removeObjects(first, c.object)
		}
	}()
	if err := c.writePages(ctx, ck); err != nil {
		return err
	}
	if err := v.syncAll(); err != nil {
		return err
	}
	root := lba.Root{
		Volume: v.cfg.ID, Sequence: c.sequence + 1, LogSCO: pos.sco, LogRecord: uint64(pos.records),
		Clusters: clusters, Mapped: ck.Mapped(), Blob: table, Directory: ck.Directory(),
	}
	var buf bytes.Buffer
	if err := root.Encode(&buf); err != nil {
		return err
	}
	name := rootName(root.Sequence)
	if err := v.stageMapFile(name, bytes.NewReader(buf.Bytes()), int64(buf.Len())); err != nil {
		return err
	}
	tried = true
	if err := v.nameMapFile(name); err != nil {
		return err
	}
	c.sequence++
	ck.Commit()
	return nil
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
		if err := c.v.eng.cfg.FS.Remove(c.v.mapPath(pagesName(o))); err != nil && !errors.Is(err, fs.ErrNotExist) {
			c.v.log.Warn().Err(err).Uint32("object", o).Msg("page object of a failed checkpoint can't be removed")
		}
	}
}

// stageMapFile makes the contents of a map file durable under a temporary name,
// which nameMapFile changes. It leaves nothing behind if it fails.
func (v *Volume) stageMapFile(name string, r io.ReaderAt, size int64) error {
	fsys := v.eng.cfg.FS
	tmp := v.mapPath(name) + ".tmp"
	f, err := fsys.Open(tmp, vfs.Create)
	if err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	err = f.Truncate(0)
	buf := make([]byte, 1<<20)
	for off := int64(0); off < size && err == nil; {
		p := buf[:min(int64(len(buf)), size-off)]
		if _, err = r.ReadAt(p, off); err == nil || errors.Is(err, io.EOF) {
			_, err = f.WriteAt(p, off)
		}
		off += int64(len(p))
	}
	if err == nil {
		err = f.Sync()
	}
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err != nil {
		v.removeStaged(name)
		return fmt.Errorf("%s: %w", name, err)
	}
	return nil
}

func (v *Volume) removeStaged(name string) {
	if err := v.eng.cfg.FS.Remove(v.mapPath(name) + ".tmp"); err != nil && !errors.Is(err, fs.ErrNotExist) {
		v.log.Warn().Err(err).Str("file", name).Msg("temporary checkpoint file can't be removed")
	}
}

// nameMapFile gives a staged file its name, durably. After an error the file may
// be under either name.
func (v *Volume) nameMapFile(name string) error {
	err := v.eng.cfg.FS.Rename(v.mapPath(name)+".tmp", v.mapPath(name))
	if err != nil {
		v.removeStaged(name)
	} else {
		err = v.eng.cfg.FS.SyncDir(v.mapDir())
	}
	if err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	return nil
}

// removeStale removes local roots but the newest and those that are to be
// published, and page objects that none of them needs. Caller holds mu.
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
		if keep[n] || !(strings.HasPrefix(n, rootPrefix) || strings.HasPrefix(n, pagesPrefix)) {
			continue
		}
		var object uint32
		if _, err := fmt.Sscanf(n, pagesPrefix+"%08x", &object); err == nil {
			c.reader.Forget(object)
			c.stored.Forget(object)
		}
		if err := v.eng.cfg.FS.Remove(v.mapPath(n)); err != nil {
			v.log.Warn().Err(err).Str("file", n).Msg("old checkpoint file can't be removed")
		}
	}
}

// The SCO table is the driver's part of a root: version u32, count u32, then
// for each SCO number u64, size i64, CRC table offset i64, clusters u32, records
// u32, live u32, flags u32 (1: it was sealed, the other fields count).
const (
	tableVersion  = 1
	tableEntryLen = 40
	tableSealed   = 1
)

// snapshotSCOs encodes the table and lists the SCOs that nothing refers to.
// Caller holds the gate exclusively, so the counts are those of the map.
func (v *Volume) snapshotSCOs() (table []byte, dead []uint64) {
	v.metaMu.Lock()
	defer v.metaMu.Unlock()
	le := binary.LittleEndian
	table = make([]byte, 8, 8+tableEntryLen*(len(v.scos)+len(v.unsealed)))
	le.PutUint32(table, tableVersion)
	n := uint32(0)
	add := func(m scoMeta, flags uint32) {
		table = le.AppendUint64(table, m.number)
		table = le.AppendUint64(table, uint64(m.size))
		table = le.AppendUint64(table, uint64(m.crcOff))
		table = le.AppendUint32(table, m.clusters)
		table = le.AppendUint32(table, m.records)
		table = le.AppendUint32(table, uint32(v.live.at(m.number).Load()))
		table = le.AppendUint32(table, flags)
		n++
	}
	for _, m := range v.scos {
		if m.dropping {
			continue
		}
		add(*m, tableSealed)
		if v.live.at(m.number).Load() == 0 {
			dead = append(dead, m.number)
		}
	}
	for _, l := range v.unsealed {
		if r, c := unpack(l.head.Load()); r > 0 {
			add(scoMeta{number: l.hdr.Number, clusters: c, records: r}, 0)
		}
	}
	le.PutUint32(table[4:], n)
	return table, dead
}

type tableEntry struct {
	scoMeta
	live   uint32
	sealed bool
}

func decodeTable(b []byte) ([]tableEntry, error) {
	le := binary.LittleEndian
	if len(b) < 8 || le.Uint32(b) != tableVersion || uint64(len(b)-8) != uint64(le.Uint32(b[4:]))*tableEntryLen {
		return nil, fmt.Errorf("SCO table of %d bytes: %w", len(b), lba.ErrFormat)
	}
	out := make([]tableEntry, le.Uint32(b[4:]))
	for i := range out {
		e := b[8+i*tableEntryLen:]
		out[i] = tableEntry{
			scoMeta: scoMeta{
				number: le.Uint64(e), size: int64(le.Uint64(e[8:])), crcOff: int64(le.Uint64(e[16:])),
				clusters: le.Uint32(e[24:]), records: le.Uint32(e[28:]),
			},
			live: le.Uint32(e[32:]), sealed: le.Uint32(e[36:])&tableSealed != 0,
		}
	}
	return out, nil
}
