package driver

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"runtime/debug"
	"sync"
	"time"

	"scoria/driver/block"
	"scoria/driver/lba"
	"scoria/driver/tlog"
)

// readBatch is how many requests are looked up before the first one is copied,
// so that the memory they need is on its way meanwhile.
const readBatch = 16

// submitReads is the path of a read. What lies in RAM is copied on the caller's
// goroutine; a request with any cluster elsewhere, or so large that others would
// wait for it, goes to another goroutine.
func (v *Volume) submitReads(batch []*block.Request) {
	info := v.info.Load()
	unusable := v.usable()
	var bytes uint64
	v.stats.ops[block.OpRead].count.Add(uint64(len(batch)))
	for len(batch) > 0 {
		n := min(len(batch), readBatch)
		var locs [readBatch]lba.Location
		for i, r := range batch[:n] {
			if r.Offset < info.Size {
				locs[i], _ = v.m.Get(r.Offset / block.ClusterSize)
				v.prefetchLocation(locs[i])
			}
		}
		for i, r := range batch[:n] {
			if err := refusal(info, r, unusable); err != nil {
				v.answer(r, err)
				continue
			}
			bytes += r.Length
			var ok bool
			var err error
			if r.Length <= maxInlineClusters*block.ClusterSize {
				ok, err = v.readInline(r, locs[i])
			}
			switch {
			case err != nil:
				v.answer(r, err)
			case ok:
				v.answer(r, nil)
			default:
				v.takeOver(r)
				go v.readSlow(r)
			}
		}
		batch = batch[n:]
	}
	v.stats.ops[block.OpRead].bytes.Add(bytes)
}

// prefetchLocation brings the memory of a cluster closer if it is in RAM.
func (v *Volume) prefetchLocation(loc lba.Location) {
	if loc == 0 {
		return
	}
	l := v.ramSCO(loc.SCO())
	if l == nil {
		return
	}
	slot, off := l.cluster(loc.Cluster())
	if id := l.data[slot].Load(); id != 0 {
		prefetch(v.eng.pool.chunk(id)[off : off+block.ClusterSize])
	}
}

// ramSCO returns SCO n if it is (also) in the pool or not sealed yet.
func (v *Volume) ramSCO(n uint64) *logSCO {
	l := v.ram[n&uint64(len(v.ram)-1)].Load()
	if l == nil || l.hdr.Number != n {
		return nil
	}
	return l
}

// readInline answers a read whose clusters all are in RAM or unmapped. loc is
// where its first cluster was just before.
func (v *Volume) readInline(r *block.Request, loc lba.Location) (ok bool, err error) {
	defer func() {
		if e := recover(); e != nil {
			err = faultError(e)
		}
	}()
	dst := segments{list: r.Segments}
	for pos, end := r.Offset, r.Offset+r.Length; pos < end; {
		cluster := pos / block.ClusterSize
		off := int(pos % block.ClusterSize)
		n := int(min(end-pos, uint64(block.ClusterSize-off)))
		if pos != r.Offset || loc == 0 {
			var resident bool
			if loc, resident = v.m.Get(cluster); !resident {
				return false, nil
			}
		}
		if loc == 0 {
			dst.zero(n)
			pos += uint64(n)
			continue
		}
		l := v.ramSCO(loc.SCO())
		if l == nil {
			// A clone's own numbers and its ancestors' don't overlap.
			if l = v.owner(loc.SCO()).ramSCO(loc.SCO()); l == nil {
				return false, nil
			}
		}
		if p := dst.contiguous(n); p != nil {
			if !l.readRAM(p, loc.Cluster(), off) {
				return false, nil
			}
			dst.advance(n)
		} else {
			var buf [block.ClusterSize]byte
			if !l.readRAM(buf[:n], loc.Cluster(), off) {
				return false, nil
			}
			dst.write(buf[:n])
		}
		pos += uint64(n)
	}
	return true, nil
}

// locateOn looks a cluster up in the volume's map or in a snapshot's.
func (v *Volume) locateOn(ctx context.Context, m *lba.Map, cluster uint64) (lba.Location, error) {
	for {
		if loc, ok := m.Get(cluster); ok {
			return loc, nil
		}
		if err := v.load(ctx, m, cluster, 1); err != nil {
			return 0, err
		}
	}
}

// load makes the map know about clusters.
func (v *Volume) load(ctx context.Context, m *lba.Map, first, n uint64) error {
	ctx, leave := interruptible(ctx)
	defer leave()
	err := m.Load(ctx, v.ckpt, first, n)
	if err == nil && m == v.m && requestOf(ctx) != nil {
		v.readMapAhead(first)
	}
	return interrupted(ctx, err)
}

// mapAhead is how many clusters' map pages come in when a request has met one that
// was missing: 32 pages, for 64 MiB of the volume. A clone begins with none.
const mapAhead = 32 * lba.LeafClusters

// readMapAhead loads the pages around that of a cluster in the background, for one
// request at a time. If that fails, whoever needs a page finds out.
func (v *Volume) readMapAhead(cluster uint64) {
	if !v.aheadBusy.CompareAndSwap(false, true) {
		return
	}
	if !v.spawn(func() {
		defer v.aheadBusy.Store(false)
		if err := v.m.Load(v.ckpt.work, v.ckpt, cluster/mapAhead*mapAhead, mapAhead); err != nil {
			v.log.Debug().Err(err).Msg("map pages can't be read ahead")
		}
	}) {
		v.aheadBusy.Store(false)
	}
}

var bufferPool = sync.Pool{New: func() any { return new([maxRunClusters * block.ClusterSize]byte) }}

// readSlow answers a read that has to wait for a disk or the store. Data is read
// into private memory, verified, and only then copied to the peer.
func (v *Volume) readSlow(r *block.Request) {
	debug.SetPanicOnFault(true)
	start := time.Now()
	err := v.readSlowly(v.m, &v.seq, r)
	v.stats.stages[StageRead].since(start)
	v.end(r, err)
}

// readSlowly fills r by way of m, the volume's map or a snapshot's.
func (v *Volume) readSlowly(m *lba.Map, seq *seqReader, r *block.Request) (err error) {
	defer func() {
		if e := recover(); e != nil {
			err = faultError(e)
		}
	}()
	buf := bufferPool.Get().(*[maxRunClusters * block.ClusterSize]byte)
	defer bufferPool.Put(buf)
	dst := segments{list: r.Segments}
	ctx := v.forRequest(r.Owner)
	sequential := seq.saw(r.Offset, r.Length)
	for pos, end := r.Offset, r.Offset+r.Length; pos < end; {
		cluster := pos / block.ClusterSize
		off := pos % block.ClusterSize
		want := (min(end-pos+off, maxRunClusters*block.ClusterSize) + block.ClusterSize - 1) / block.ClusterSize
		if sequential {
			want = maxRunClusters // what comes along stays in the read cache
		}
		got, err := v.readPatiently(ctx, m, cluster, uint32(want), buf[:])
		if errors.Is(err, block.ErrCorrupt) {
			// It may be a neighbour that is damaged.
			got, err = v.readPatiently(ctx, m, cluster, 1, buf[:])
		}
		if err != nil {
			return fmt.Errorf("read %d bytes at %d: %w", r.Length, r.Offset, err)
		}
		n := min(end-pos, uint64(got)*block.ClusterSize-off)
		dst.write(buf[off : off+n])
		pos += n
	}
	return nil
}

// readPatiently is readRun, waiting for the store.
func (v *Volume) readPatiently(ctx context.Context, m *lba.Map, cluster uint64, n uint32, buf []byte) (got uint32, err error) {
	err = v.patiently(ctx, func(ctx context.Context) (err error) {
		got, err = v.readRun(ctx, m, cluster, n, buf)
		return err
	})
	return got, err
}

// readRun reads up to n consecutive clusters from cluster on that can be read
// with one access, and returns how many.
func (v *Volume) readRun(ctx context.Context, m *lba.Map, cluster uint64, n uint32, buf []byte) (got uint32, err error) {
	for try := 0; ; try++ {
		loc, err := v.locateOn(ctx, m, cluster)
		if err != nil {
			return 0, err
		}
		if loc == 0 {
			clear(buf[:block.ClusterSize])
			return 1, nil
		}
		got, err = v.readAt(ctx, loc, runLength(m, cluster, loc, n), buf)
		if err == nil {
			return got, nil
		}
		// The cluster may have moved and its SCO gone since we looked.
		if now, lerr := v.locateOn(ctx, m, cluster); lerr != nil || now == loc || try > 100 {
			return 0, err
		}
	}
}

// runLength is how many clusters from cluster on lie one behind the other.
func runLength(m *lba.Map, cluster uint64, loc lba.Location, n uint32) uint32 {
	k := uint32(1)
	for k < n {
		next, ok := m.Get(cluster + uint64(k))
		if !ok || next != lba.MakeLocation(loc.SCO(), loc.Cluster()+k) {
			break
		}
		k++
	}
	return k
}

// readCluster reads and verifies one cluster at a location.
func (v *Volume) readCluster(ctx context.Context, loc lba.Location, buf []byte) error {
	_, err := v.readAt(ctx, loc, 1, buf)
	return err
}

// readAt reads and verifies n clusters from a location on: from RAM, the read
// cache, the local file or the store. It may return fewer than n.
func (v *Volume) readAt(ctx context.Context, loc lba.Location, n uint32, buf []byte) (uint32, error) {
	if owner := v.owner(loc.SCO()); owner != v {
		return owner.readAt(ctx, loc, n, buf)
	}
	first := loc.Cluster()
	if l := v.ramSCO(loc.SCO()); l != nil {
		for i := uint32(0); i < n; i++ {
			if !l.readRAM(buf[i*block.ClusterSize:(i+1)*block.ClusterSize], first+i, 0) {
				if i > 0 {
					return i, nil
				}
				break
			}
			if i == n-1 {
				return n, nil
			}
		}
		if !l.sealed.Load() {
			if k, err := l.readFile(first, n, buf); err == nil || !errors.Is(err, fs.ErrClosed) {
				return k, err
			}
		}
	}
	cached := uint32(0)
	for cached < n && v.eng.cache.Load(v.cacheKey(loc, cached), buf[cached*block.ClusterSize:(cached+1)*block.ClusterSize]) {
		cached++
	}
	if cached > 0 {
		v.stats.cacheHits.Add(uint64(cached))
		return cached, nil
	}
	v.stats.cacheMisses.Add(uint64(n))
	return n, v.readSealed(ctx, loc, n, buf)
}

// readFile reads clusters of a SCO that is not sealed from its file.
func (l *logSCO) readFile(first, n uint32, buf []byte) (uint32, error) {
	v := l.vol
	box := l.reader.Load()
	if box == nil {
		return 0, fs.ErrClosed // sealed meanwhile
	}
	f := *box
	// What still has its chunk may not be in the file yet. A chunk that was taken
	// away never comes back.
	k := uint32(1)
	for k < n && l.data[(first+k)/chunkClusters].Load() == 0 {
		k++
	}
	n = k
	p := buf[:n*block.ClusterSize]
	if _, err := f.ReadAt(p, dataOff(first)); err != nil {
		return 0, fmt.Errorf("SCO %d: cluster %d: %w", l.hdr.Number, first, err)
	}
	for i := uint32(0); i < n; i++ {
		slot, _ := l.cluster(first + i)
		crcs := l.crcs[slot].Load()
		if crcs == nil {
			return 0, fs.ErrClosed // sealed meanwhile
		}
		want := crcs[(first+i)%chunkClusters].Load()
		if tlog.CRC(p[i*block.ClusterSize:(i+1)*block.ClusterSize]) != want {
			v.corrupt(l.hdr.Number, first+i)
			return 0, fmt.Errorf("SCO %d: cluster %d: %w", l.hdr.Number, first+i, block.ErrCorrupt)
		}
	}
	return n, nil
}

// corrupt counts and logs a checksum that failed.
func (v *Volume) corrupt(sco uint64, cluster uint32) {
	v.stats.checksumErrors.Add(1)
	v.raise("corrupt-data", "stored data fails its checksum (first seen in SCO %d, cluster %d): reads of it fail; run scoria volume check %s", sco, cluster, v.cfg.Name)
}
