package driver

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"time"

	"scoria/driver/block"
	"scoria/driver/lba"
	"scoria/driver/sco"
)

// OpenStillEngine opens an engine whose housekeeper never ticks: what its volumes do
// beside their requests a test has them do, when it wants that.
func OpenStillEngine(cfg Config) (*Engine, error) { return openEngine(cfg, nil) }

func (v *Volume) Checkpoint(ctx context.Context) error { return v.checkpoint(ctx) }

// OpenMapPages opens a page object as readers of the map do.
func (v *Volume) OpenMapPages(ctx context.Context, object uint32) (io.ReaderAt, int64, error) {
	return v.ckpt.openPages(ctx, object)
}

func (v *Volume) Publish(ctx context.Context) (bool, error) { return v.publish(ctx) }

// WaitSealed spills and seals whatever is closed and uploads it. It reports whether
// that could be done; it gives up when the volume has failed or is another's.
func (v *Volume) WaitSealed() bool {
	for end := time.Now().Add(2 * time.Minute); time.Now().Before(end); time.Sleep(time.Millisecond) {
		if v.ctx.Err() != nil || v.failed.Load() || v.fenced.Load() {
			return false
		}
		v.kickIO()
		v.kickUpload()
		v.metaMu.Lock()
		done := true
		for _, l := range v.unsealed {
			done = done && (!l.closed.Load() || l.sealed.Load())
		}
		for _, m := range v.scos {
			done = done && (m.uploaded || m.unwanted)
		}
		v.metaMu.Unlock()
		if done {
			return true
		}
	}
	return false
}

// ScrubAll rewrites every SCO that has any garbage, but leaves alone, as the scrubber does, what a
// snapshot that is made meanwhile may reach.
func (v *Volume) ScrubAll(ctx context.Context) error {
	v.house.Lock()
	defer v.house.Unlock()
	v.metaMu.Lock()
	var list []*scoMeta
	for _, m := range v.scos {
		if n := v.live.at(m.number).Load(); n > 0 && uint32(n) < m.clusters && m.uploaded {
			list = append(list, m)
		}
	}
	v.metaMu.Unlock()
	for _, m := range list {
		if err := v.rewrite(ctx, m, v.snapping.Load()); err != nil && !errors.Is(err, errSnapped) {
			return err
		}
	}
	return nil
}

// CompactAll compacts every SCO that snapshots reach and that has any garbage.
func (v *Volume) CompactAll(ctx context.Context) error {
	v.house.Lock()
	defer v.house.Unlock()
	v.metaMu.Lock()
	var list []*scoMeta
	for _, m := range v.scos {
		if pin := v.pins[m.number]; pin > 0 && pin < m.clusters && m.uploaded {
			list = append(list, m)
		}
	}
	v.metaMu.Unlock()
	for _, m := range list {
		if err := v.compact(ctx, m); err != nil {
			return err
		}
	}
	return nil
}

// CompactWrongly compacts a SCO without one cluster that only a snapshot reaches, as a
// program that counts wrong would, and returns where it was.
func (v *Volume) CompactWrongly(ctx context.Context) (lost lba.Location, err error) {
	v.house.Lock()
	defer v.house.Unlock()
	v.metaMu.Lock()
	list := slices.SortedFunc(maps.Values(v.scos), func(a, b *scoMeta) int { return cmp.Compare(a.number, b.number) })
	v.metaMu.Unlock()
	for _, m := range list {
		s, before, pin, err := v.firstReaching(m.number)
		if err != nil {
			return 0, err
		}
		if pin == 0 || !m.uploaded {
			continue
		}
		if v.reach, err = v.findReached(ctx, m, s, before); err != nil {
			return 0, err
		}
		wrong, lost, err := v.allButOne(ctx, m, v.reach.kept[m.number])
		if err != nil {
			return 0, err
		}
		if lost == 0 {
			continue // the volume reaches all of it, too
		}
		v.reach.kept[m.number] = wrong
		v.addPin(m.number, ^uint32(0))
		defer v.addPin(m.number, 1)
		return lost, v.compact(ctx, m)
	}
	return 0, errors.New("no SCO has a cluster that only a snapshot reaches")
}

// allButOne is what is to be kept of a SCO, less one cluster that the volume does not
// reach: where that is, 0 if there is none.
func (v *Volume) allButOne(ctx context.Context, m *scoMeta, right *sco.Kept) (wrong *sco.Kept, lost lba.Location, err error) {
	records, err := v.sealedRecords(ctx, m)
	if err != nil {
		return nil, 0, err
	}
	wrong = sco.NewKept(m.span())
	for i := range records {
		r := &records[i]
		if !r.HasData() || !right.Has(r.Cluster) {
			continue
		}
		loc := lba.MakeLocation(m.number, r.Cluster)
		if now, err := v.locateIn(ctx, r.LBA); err != nil {
			return nil, 0, err
		} else if lost == 0 && now != loc {
			lost = loc
			continue
		}
		wrong.Add(r.Cluster)
	}
	return wrong.Seal(), lost, nil
}

// EmptyLater picks a SCO that the scrubber would empty and that no snapshot reaches, and
// returns a function that goes on from there.
func (v *Volume) EmptyLater() (goOn func(ctx context.Context) error, ok bool) {
	v.house.Lock()
	defer v.house.Unlock()
	m, asOf := v.emptiest(), v.snapping.Load()
	if m == nil || v.pins[m.number] > 0 {
		return nil, false
	}
	return func(ctx context.Context) error {
		v.house.Lock()
		defer v.house.Unlock()
		return v.empty(ctx, m, asOf)
	}, true
}

// ErrSnapped is errSnapped.
var ErrSnapped = errSnapped

func (v *Volume) addPin(n uint64, delta uint32) {
	v.metaMu.Lock()
	defer v.metaMu.Unlock()
	v.pins[n] += delta
}

// CountAsEmpty dooms every SCO that is in the store, as a program that counts wrong would.
func (v *Volume) CountAsEmpty() {
	c := v.ckpt
	c.mu.Lock()
	defer c.mu.Unlock()
	v.metaMu.Lock()
	var all []uint64
	for n, m := range v.scos {
		if m.uploaded {
			v.live.at(n).Store(0)
			delete(v.pins, n)
			all = append(all, n)
		}
	}
	v.metaMu.Unlock()
	c.doomed = append(c.doomed, v.doom(all)...)
}

// LookAgain has the next publication look at SCOs of which nothing was known.
func (v *Volume) LookAgain() {
	v.ckpt.mu.Lock()
	defer v.ckpt.mu.Unlock()
	v.ckpt.unsureUntil = time.Time{}
}

// ForgetClusters empties the read cache of clusters.
func (e *Engine) ForgetClusters() {
	for _, v := range e.list() {
		e.cache.DropVolume(v.tag)
	}
}

// Generation returns that of a SCO, how many clusters it has and how many snapshots
// reach.
func (v *Volume) Generation(n uint64) (generation, clusters, pinned uint32) {
	v.metaMu.Lock()
	defer v.metaMu.Unlock()
	m := v.scos[n]
	return m.generation(), m.clusters, v.pins[n]
}

// ObjectName is the name of a SCO in the store.
func ObjectName(n uint64, generation uint32) string { return scoObject(n, generation) }

// DropLocalCopies evicts everything that is in the store.
func (v *Volume) DropLocalCopies() {
	for {
		m, _ := v.coldest()
		if m == nil {
			return
		}
		v.dropSpare(m)
	}
}

// EvictAfter evicts what is next, once meanwhile has run.
func (v *Volume) EvictAfter(meanwhile func()) {
	m, _ := v.coldest()
	meanwhile()
	v.dropSpare(m)
}

// PuttingLost says that the volume is not done with what the store was said to have lost.
func (v *Volume) PuttingLost() bool {
	v.again.mu.Lock()
	defer v.again.mu.Unlock()
	return v.again.busy
}

func (v *Volume) SpillNow() { v.kickSpill() }

// MapEverything makes the map say that every cluster is mapped, to SCOs that do
// not exist: what the opening of a large volume costs can then be measured
// without writing its data.
func (v *Volume) MapEverything() {
	clusters := v.cfg.Size / block.ClusterSize
	per := uint64(v.cfg.SCOBytes / block.ClusterSize)
	v.gate.Lock()
	defer v.gate.Unlock()
	for c := uint64(0); c < clusters; c++ {
		if _, ok := v.m.Set(c, lba.MakeLocation(1+c/per, uint32(c%per))); !ok {
			panic("map page is not resident")
		}
	}
	v.metaMu.Lock()
	defer v.metaMu.Unlock()
	last := (clusters-1)/per + 1
	for n := uint64(1); n <= last; n++ {
		v.live.ensure(n)
		v.live.at(n).Store(int32(per))
		v.scos[n] = &scoMeta{number: n, clusters: uint32(per), records: uint32(per) + 1, uploaded: true}
	}
	// The head follows behind them.
	l := newLogSCO(v, last+1, last, uint32(per)+1)
	v.unsealed = nil
	v.ram[v.cur.hdr.Number&uint64(len(v.ram)-1)].Store(nil)
	v.live.ensure(l.hdr.Number)
	v.ram[l.hdr.Number&uint64(len(v.ram)-1)].Store(l)
	v.unsealed = append(v.unsealed, l)
	v.cur = l
}

// Housekeep does at once what the engine has a volume do once a second, as if
// the last write were idle ago.
func (v *Volume) Housekeep(ctx context.Context, idle time.Duration) {
	for !v.scrubbing.CompareAndSwap(false, true) {
		time.Sleep(time.Millisecond)
	}
	v.housekeep(ctx, idle)
	v.scrubbing.Store(false)
	v.eng.evict()
}

// LeaveAlone has the scrubber leave a SCO alone for a while, as after a failure.
func (v *Volume) LeaveAlone(sco uint64, wait time.Duration) {
	v.house.Lock()
	defer v.house.Unlock()
	v.leaveAlone(&scoMeta{number: sco}, errors.New("the store does not answer"))
	v.unscrubbed[sco] = time.Now().Add(wait)
	v.rest.Store(nil)
}

// Tick is what the engine's housekeeper calls once a second.
func (v *Volume) Tick(now time.Time) { v.tick(now) }

// IsNoRoom reports whether background work gave way because the pool is full.
func IsNoRoom(err error) bool { return errors.Is(err, errNoRoom) }

// MapResident reports whether the map pages of clusters are in memory.
func (v *Volume) MapResident(first, n uint64) bool { return v.m.Resident(first, n) }

// SumsHeld is how many checksums of pages wait for an upload.
func (e *Engine) SumsHeld() int {
	e.sums.mu.Lock()
	defer e.sums.mu.Unlock()
	return e.sums.held
}

// SpaceBound returns what the volume's log takes and what it may, in bytes.
func (v *Volume) SpaceBound() (used, allowed int64) {
	used = v.spaceUsed()
	return used, v.spaceBudget().allowed
}

// SpaceState describes where a volume is within its bound, for a test that failed.
func (v *Volume) SpaceState() string {
	s := &v.space
	b := v.spaceBudget()
	s.mu.Lock()
	defer s.mu.Unlock()
	return fmt.Sprintf("%+v: sealed %d, unsealed %d, dead %d, held %v, tight %v, stuck %q, ceiling %d, steps %d",
		b, s.sealed.Load(), s.unsealed.Load(), s.dead.Load(), s.held.Load(), s.tight.Load(), s.stuck, s.ceiling, s.steps)
}

// Tighten has the scrubber of a volume whose housekeeping stands still work as if guests
// were slow for want of space.
func (v *Volume) Tighten() { v.space.tight.Store(true) }

// ScrubTurn lets the scrubber have one turn, and reports whether nothing is left for it.
func (v *Volume) ScrubTurn(ctx context.Context) bool {
	v.house.Lock()
	defer v.house.Unlock()
	return v.scrub(ctx)
}

// GiveBackTurns has a turn of the scrubber come round n times, and returns how many attempts
// it makes to give space back.
func (v *Volume) GiveBackTurns(ctx context.Context, n int) (attempts int) {
	v.house.Lock()
	defer v.house.Unlock()
	back := v.newGiveBack(ctx)
	for range n {
		back.begin(v.usage())
		if back.running {
			attempts++
			back.await()
		}
	}
	return attempts
}

// MoveWhatComesBack moves a cluster from where it is not and where it can't be read, and lets
// the map say that it is there between the reading and the moving, as a rollback may. It
// returns whether it was moved.
func (v *Volume) MoveWhatComesBack(ctx context.Context, cluster uint64) (moved bool, err error) {
	gone := lba.MakeLocation(1<<20, 0)
	v.live.ensure(gone.SCO())
	now, _ := v.m.Get(cluster)
	v.gate.RLock()
	done := make(chan error, 1)
	go func() { done <- v.move(ctx, []moving{{lba: cluster, from: gone, asOf: whenever}}) }()
	for waits := false; !waits && len(done) == 0; time.Sleep(time.Millisecond) { // for the gate
		if waits = !v.gate.TryRLock(); !waits {
			v.gate.RUnlock()
		}
	}
	v.m.Replace(cluster, now, gone)
	v.gate.RUnlock()
	err = <-done
	at, _ := v.m.Get(cluster)
	v.gate.Lock()
	defer v.gate.Unlock()
	v.m.Replace(cluster, at, now)
	return at != gone, err
}
