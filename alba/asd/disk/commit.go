package disk

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"strconv"
	"time"

	"scoria/alba/asd"

	"github.com/cockroachdb/pebble/v2"
)

const (
	// maxGroup and maxGroupBytes bound what shares one sync.
	maxGroup      = 256
	maxGroupBytes = 8 << 20
	// settleAfter without a commit the last one is followed by another; see settle.
	settleAfter = time.Second
	// sampleEvery is how many commits pass between looks at what the key-value
	// store takes.
	sampleEvery = 64
)

// commitLoop is the only writer of the key-value store, so that asserts and the
// updates that they guard are one step.
func (d *Disk) commitLoop() {
	var held []*applyReq // repair requests that wait while guests commit
	unsettled := time.NewTimer(settleAfter)
	defer unsettled.Stop()
	for n := 1; ; n++ {
		var first *applyReq
		if len(held) > 0 {
			select {
			case first = <-d.queue:
			default:
				first, held = held[0], held[1:]
			}
		} else {
			select {
			case first = <-d.queue:
			case <-unsettled.C:
				d.settle()
				continue
			case <-d.stop:
				d.settle()
				return
			}
		}
		var group []*applyReq
		group, held = d.gather(first, held)
		d.commitGroup(group)
		unsettled.Reset(settleAfter)
		if n%sampleEvery == 0 {
			d.sampleKV()
		}
	}
}

// settle writes a record behind the last one that counts: damage to the last record of
// a log can't be told from a write that was cut short, to those before it can.
func (d *Disk) settle() {
	if d.failErr() != nil {
		return
	}
	if err := d.db.Set(metaKey, d.state.Load().encode(), pebble.Sync); err != nil {
		d.fail(fmt.Errorf("key-value store: %w", kvError(err)))
	}
}

// gather takes what waits: guests first, and repair's requests whole groups at a
// time when no guest's is there, else one per group.
func (d *Disk) gather(first *applyReq, held []*applyReq) (group, stillHeld []*applyReq) {
	size := 0
	guests := false
	take := func(req *applyReq) {
		if req.pri == asd.PriorityRepair {
			held = append(held, req)
			return
		}
		guests = true
		if req.state.CompareAndSwap(reqQueued, reqTaken) {
			group = append(group, req)
			size += req.bytes()
		}
	}
	take(first)
	for len(group) < maxGroup && size < maxGroupBytes && len(held) < maxGroup {
		select {
		case req := <-d.queue:
			take(req)
			continue
		default:
		}
		break
	}
	for len(held) > 0 && len(group) < maxGroup && size < maxGroupBytes {
		req := held[0]
		held = held[1:]
		if req.state.CompareAndSwap(reqQueued, reqTaken) {
			group = append(group, req)
			size += req.bytes()
			if guests {
				break
			}
		}
	}
	return group, held
}

func (r *applyReq) bytes() (n int) {
	for i := range r.ops {
		n += len(r.ops[i].record)
	}
	return n
}

// group is a commit under construction: what its requests so far have done on
// top of the key-value store.
type group struct {
	d       *Disk
	batch   *pebble.Batch
	records map[string]*record // nil: deleted
	epochs  map[string]uint64
	state   meta
	dead    []uint64 // files that the commit makes garbage
}

// commitGroup does the requests in order, makes them durable with one sync and
// answers them.
func (d *Disk) commitGroup(reqs []*applyReq) {
	if len(reqs) == 0 {
		return
	}
	if err := d.syncDirs(reqs); err != nil {
		d.fail(err)
	}
	if err := d.failErr(); err != nil {
		for _, req := range reqs {
			req.done <- err
		}
		return
	}
	g := &group{
		d: d, batch: d.db.NewBatch(),
		records: make(map[string]*record), epochs: make(map[string]uint64),
		state: *d.state.Load(),
	}
	defer g.batch.Close()
	done := reqs[:0:len(reqs)]
	for _, req := range reqs {
		if err := g.check(req); err != nil {
			req.done <- err
			d.discard(req)
			continue
		}
		g.apply(req)
		done = append(done, req)
	}
	if len(done) == 0 {
		return
	}
	err := g.commit()
	for _, req := range done {
		if err == nil {
			d.n.applies.Add(1)
		}
		req.done <- err
	}
	if err != nil {
		return
	}
	for _, id := range g.dead {
		d.bury(id)
	}
}

// syncDirs makes the names of the requests' files durable.
func (d *Disk) syncDirs(reqs []*applyReq) error {
	synced := make(map[uint64]struct{}, 1)
	for _, req := range reqs {
		for i := range req.ops {
			id := req.ops[i].rec.fileID
			if _, ok := synced[id/idsPerDir]; id == 0 || ok {
				continue
			}
			if err := d.fs.SyncDir(d.valueDir(id)); err != nil {
				return fmt.Errorf("sync %s: %w", d.valueDir(id), err)
			}
			synced[id/idsPerDir] = struct{}{}
		}
	}
	return nil
}

// check evaluates the asserts, and the raises, which are asserts as well. Epochs
// come first: a stale owner learns that it is, whatever else does not hold.
func (g *group) check(req *applyReq) error {
	for i := range req.asserts {
		if a := &req.asserts[i]; a.Kind == asd.KindAssertEpoch {
			known, err := g.epoch(a.Key)
			if err != nil {
				return err
			}
			if known > a.Epoch {
				return &asd.StaleEpochError{Namespace: a.Key, Epoch: a.Epoch, Known: known}
			}
		}
	}
	if err := g.checkRaises(req); err != nil {
		return err
	}
	for i := range req.asserts {
		if a := &req.asserts[i]; a.Kind != asd.KindAssertEpoch {
			if err := g.assert(i, a); err != nil {
				return err
			}
		}
	}
	return nil
}

// checkRaises: each raise must hold after the ones before it.
func (g *group) checkRaises(req *applyReq) error {
	var raised map[string]uint64
	for i := range req.ops {
		o := &req.ops[i]
		if o.kind != asd.KindRaiseEpoch {
			continue
		}
		known, ok := raised[o.key]
		if !ok {
			var err error
			if known, err = g.epoch(o.key); err != nil {
				return err
			}
		}
		if known > o.epoch {
			return &asd.StaleEpochError{Namespace: o.key, Epoch: o.epoch, Known: known}
		}
		if raised == nil {
			raised = make(map[string]uint64)
		}
		raised[o.key] = o.epoch
	}
	return nil
}

// assert evaluates an assert about a key.
func (g *group) assert(i int, a *asd.Assert) error {
	rec, err := g.record(a.Key)
	if err != nil {
		return err
	}
	reason := ""
	switch {
	case a.Kind == asd.KindAssertAbsent:
		if rec != nil {
			reason = "it exists"
		}
	case rec == nil:
		reason = "it does not exist"
	case a.Kind == asd.KindAssertSum:
		if rec.size != a.Size || rec.sum != a.Sum {
			reason = fmt.Sprintf("it has %d bytes of sum %#x, want %d of %#x", rec.size, rec.sum, a.Size, a.Sum)
		}
	case rec.size != int64(len(a.Data)):
		reason = fmt.Sprintf("it has %d bytes, want %d", rec.size, len(a.Data))
	default:
		data, _, err := g.d.readSpan(a.Key, rec, nil, 0, 0, rec.size)
		if err != nil {
			return err
		}
		if !bytes.Equal(data, a.Data) {
			reason = "it has another value"
		}
	}
	if reason == "" {
		return nil
	}
	return &asd.AssertError{Index: i, Assert: asd.Assert{Kind: a.Kind, Key: a.Key, Size: a.Size, Sum: a.Sum}, Reason: reason}
}

// record returns a key's record as of now, with memory of its own; nil if there
// is none.
func (g *group) record(key string) (*record, error) {
	if rec, ok := g.records[key]; ok {
		return rec, nil
	}
	rec, closer, err := g.d.lookup(key)
	if errors.Is(err, asd.ErrNoKey) {
		g.records[key] = nil
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	rec.crcs, rec.data = bytes.Clone(rec.crcs), bytes.Clone(rec.data)
	_ = closer.Close()
	g.records[key] = &rec
	return &rec, nil
}

// epoch returns a namespace's epoch as of now.
func (g *group) epoch(ns string) (uint64, error) {
	if e, ok := g.epochs[ns]; ok {
		return e, nil
	}
	e, err := g.d.epoch(ns)
	if err == nil {
		g.epochs[ns] = e
	}
	return e, err
}

// epoch returns a namespace's epoch, 0 if none was raised.
func (d *Disk) epoch(ns string) (uint64, error) {
	b, closer, err := d.db.Get(kvKey(prefixEpoch, ns))
	if errors.Is(err, pebble.ErrNotFound) {
		return 0, nil
	}
	if err != nil {
		return 0, d.kvReadError("epoch of "+strconv.Quote(ns), err)
	}
	defer closer.Close()
	if len(b) != 8 {
		return 0, fmt.Errorf("epoch of namespace %q: %w", ns, errRecord)
	}
	return binary.LittleEndian.Uint64(b), nil
}

// apply adds a request that passed check to the batch.
func (g *group) apply(req *applyReq) {
	for i := range req.ops {
		o := &req.ops[i]
		switch o.kind {
		case asd.KindPut:
			g.remove(o.key, true)
			g.set(kvKey(prefixKey, o.key), o.record)
			if o.rec.fileID != 0 {
				g.set(kvFileKey(o.rec.fileID), []byte(o.key))
			}
			g.state.keys++
			g.state.bytes += o.rec.size
			g.state.fileBytes += o.rec.room(o.key)
			g.records[o.key] = &o.rec
			g.d.n.writtenBytes.Add(uint64(o.rec.size))
		case asd.KindDelete:
			g.remove(o.key, false)
		case asd.KindRaiseEpoch:
			if known, ok := g.epochs[o.key]; !ok || known != o.epoch {
				g.set(kvKey(prefixEpoch, o.key), binary.LittleEndian.AppendUint64(nil, o.epoch))
				g.epochs[o.key] = o.epoch
			}
		}
	}
}

// remove takes what is stored under a key out of the books, and out of the store
// unless it will be overwritten. A record that can't be read any more is
// replaced or deleted all the same: that is how it gets repaired. Its file, if
// it had one, is found by Verify.
func (g *group) remove(key string, overwrite bool) {
	rec, err := g.record(key)
	if err == nil && rec == nil {
		return
	}
	if rec != nil {
		g.state.keys--
		g.state.bytes -= rec.size
		if rec.fileID != 0 {
			g.state.fileBytes -= rec.room(key)
			g.dead = append(g.dead, rec.fileID)
			g.must(g.batch.Delete(kvFileKey(rec.fileID), nil))
		}
	}
	if !overwrite {
		g.must(g.batch.Delete(kvKey(prefixKey, key), nil))
	}
	g.records[key] = nil
}

func (g *group) set(key, value []byte) { g.must(g.batch.Set(key, value, nil)) }

// must is for what can't fail: a batch is memory.
func (g *group) must(err error) {
	if err != nil {
		panic("scoria: a batch in memory failed: " + err.Error())
	}
}

// commit makes the batch durable and publishes the state.
func (g *group) commit() error {
	d := g.d
	if d.nextID.Load()+reserveIDs/2 > g.state.reserved {
		g.state.reserved += reserveIDs
	}
	if g.batch.Empty() && g.state == *d.state.Load() {
		return nil // raises to what is there already, deletes of what isn't
	}
	g.set(metaKey, g.state.encode())
	if err := d.db.Apply(g.batch, pebble.Sync); err != nil {
		d.fail(fmt.Errorf("key-value store: %w", kvError(err)))
	}
	if err := d.failErr(); err != nil {
		return err
	}
	d.n.commits.Add(1)
	state := g.state
	d.state.Store(&state)
	d.reserved.Store(state.reserved)
	return nil
}
