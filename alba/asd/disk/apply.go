package disk

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"syscall"

	"scoria/alba/asd"
)

// The life of an applyReq: whoever moves it out of reqQueued owns its outcome.
const (
	reqQueued int32 = iota
	reqTaken        // the committer works on it
	reqCanceled
)

// applyReq is an Apply on its way to the committer. It refers to none of the
// caller's memory.
type applyReq struct {
	asserts []asd.Assert
	ops     []op
	pri     asd.Priority
	state   atomic.Int32
	done    chan error // of capacity 1
}

// op is one update, ready for the key-value store.
type op struct {
	kind  asd.UpdateKind
	key   string
	epoch uint64
	// of a put:
	record []byte
	rec    record // decoded
}

// Apply implements asd.Client. The caller's goroutine writes and syncs the value
// files; the committer does the rest.
func (d *Disk) Apply(ctx context.Context, asserts []asd.Assert, updates []asd.Update, pri asd.Priority) error {
	if err := d.enter(); err != nil {
		return err
	}
	defer d.leave()
	err := d.apply(ctx, asserts, updates, pri)
	if err != nil {
		d.n.refused.Add(1)
	}
	return err
}

func (d *Disk) apply(ctx context.Context, asserts []asd.Assert, updates []asd.Update, pri asd.Priority) error {
	req, done, err := d.admit(asserts, updates, pri, 0)
	if err != nil {
		return err
	}
	defer done()
	if err := d.prepare(ctx, req, updates); err != nil {
		d.discard(req)
		return err
	}
	return d.commit(ctx, req)
}

// admit refuses what can't be done, before anything is written; room is what is
// needed besides the updates' values. done gives that back when the outcome is
// known.
func (d *Disk) admit(asserts []asd.Assert, updates []asd.Update, pri asd.Priority, room int64) (req *applyReq, done func(), err error) {
	if err := asd.CheckApply(asserts, updates); err != nil {
		return nil, nil, err
	}
	for i := range updates {
		if u := &updates[i]; u.Kind == asd.KindPut {
			if err := u.Value.Check(u.Key); err != nil {
				return nil, nil, fmt.Errorf("update %d: %w", i, err)
			}
			room += fileBytes(u.Key, int64(len(u.Value.Data)), u.Value.BlockSize)
		}
	}
	if err := d.failErr(); err != nil {
		return nil, nil, err
	}
	if err := d.checkEarly(asserts); err != nil {
		return nil, nil, err
	}
	d.inFlight.Add(room)
	done = func() { d.inFlight.Add(-room) }
	if room > 0 {
		if err := d.checkRoom(room); err != nil {
			done()
			return nil, nil, err
		}
	}
	req = &applyReq{pri: pri, done: make(chan error, 1)}
	req.asserts = append(req.asserts, asserts...)
	for i := range req.asserts {
		req.asserts[i].Data = bytes.Clone(req.asserts[i].Data)
	}
	return req, done, nil
}

// commit hands a request to the committer and waits for its outcome.
func (d *Disk) commit(ctx context.Context, req *applyReq) error {
	select {
	case d.queue <- req:
	case <-ctx.Done():
		d.discard(req)
		return ctx.Err()
	case <-d.failed:
		d.discard(req)
		return d.failErr()
	}
	select {
	case err := <-req.done:
		return err
	case <-ctx.Done():
		if req.state.CompareAndSwap(reqQueued, reqCanceled) {
			d.discard(req)
			return ctx.Err()
		}
		return fmt.Errorf("%w: %w", asd.ErrUnknownOutcome, ctx.Err())
	case <-d.failed:
		// The committer may be stuck. What it did finish stands.
		select {
		case err := <-req.done:
			return err
		default:
			return d.failErr()
		}
	}
}

// checkEarly refuses a stale owner before its data is written. The check that
// counts is the committer's.
func (d *Disk) checkEarly(asserts []asd.Assert) error {
	for i := range asserts {
		if a := &asserts[i]; a.Kind == asd.KindAssertEpoch {
			known, err := d.epoch(a.Key)
			if err != nil {
				return err
			}
			if known > a.Epoch {
				return &asd.StaleEpochError{Namespace: a.Key, Epoch: a.Epoch, Known: known}
			}
		}
	}
	return nil
}

// prepare writes the value files of the updates and makes everything durable
// but their names.
func (d *Disk) prepare(ctx context.Context, req *applyReq, updates []asd.Update) error {
	files := 0
	for i := range updates {
		u := &updates[i]
		o := op{kind: u.Kind, key: u.Key, epoch: u.Epoch}
		if u.Kind == asd.KindPut {
			sum := u.Value.Sum()
			if len(u.Value.Data) <= d.opts.InlineBytes {
				o.record = encodeInline(&u.Value, sum)
			} else {
				files++
			}
		}
		req.ops = append(req.ops, o)
	}
	if files > 0 {
		if err := d.prepareFiles(ctx, req, updates); err != nil {
			return err
		}
	}
	for i := range req.ops {
		if o := &req.ops[i]; o.kind == asd.KindPut {
			o.rec = mustDecode(o.record)
		}
	}
	return nil
}

// mustDecode decodes what this process has encoded.
func mustDecode(b []byte) record {
	rec, err := decodeRecord(b)
	if err != nil {
		panic("scoria: an encoded record can't be decoded: " + err.Error())
	}
	return rec
}

func (d *Disk) prepareFiles(ctx context.Context, req *applyReq, updates []asd.Update) error {
	if err := d.gate.acquire(ctx, req.pri); err != nil {
		return err
	}
	defer d.gate.release(req.pri)
	for i := range req.ops {
		o := &req.ops[i]
		if o.kind != asd.KindPut || o.record != nil {
			continue
		}
		if err := ctx.Err(); err != nil {
			return err
		}
		id, err := d.allocID(ctx)
		if err != nil {
			return err
		}
		v := &updates[i].Value
		sum := v.Sum()
		if err := d.writeValueFile(id, o.key, v, sum); err != nil {
			return err
		}
		o.record = encodeFile(v, sum, id)
	}
	return nil
}

// allocID returns an id below the durable reservation, so that after a crash no
// file of an earlier run has it.
func (d *Disk) allocID(ctx context.Context) (uint64, error) {
	for {
		id := d.nextID.Load()
		if id < d.reserved.Load() {
			if d.nextID.CompareAndSwap(id, id+1) {
				return id, nil
			}
			continue
		}
		// Only when very many files were written and none committed: every
		// commit extends the reservation.
		if err := d.commit(ctx, &applyReq{done: make(chan error, 1)}); err != nil {
			return 0, err
		}
	}
}

// writeError is the error of a write: a disk that is full after all refuses
// this Apply only.
func (d *Disk) writeError(key string, err error) error {
	if errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) {
		return fmt.Errorf("key %q: %w: %w", key, asd.ErrFull, err)
	}
	return fmt.Errorf("key %q: write its file: %w", key, err)
}

// ensureDir makes the directory of a value file, durably.
func (d *Disk) ensureDir(id uint64) error {
	d.mu.Lock()
	_, ok := d.dirs[id/idsPerDir]
	d.mu.Unlock()
	if ok {
		return nil
	}
	if err := d.fs.MkdirAll(d.valueDir(id)); err != nil {
		return fmt.Errorf("directory of values: %w", d.writeError("", err))
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if len(d.dirs) > 1024 {
		clear(d.dirs) // those long past
	}
	d.dirs[id/idsPerDir] = struct{}{}
	return nil
}

// discard removes the files of a request that won't be committed.
func (d *Disk) discard(req *applyReq) {
	for i := range req.ops {
		if o := &req.ops[i]; o.kind == asd.KindPut && o.record != nil {
			if rec, err := decodeRecord(o.record); err == nil && rec.fileID != 0 {
				d.bury(rec.fileID)
			}
		}
	}
}

// bury gives a file that nothing refers to any more to the remover.
func (d *Disk) bury(id uint64) {
	select {
	case d.dead <- id:
	case <-d.failed: // the next start's sweep removes it
	case <-d.stop:
	}
}

// removeLoop removes value files. Their names need not be gone durably: the
// sweep at the next start removes what comes back.
func (d *Disk) removeLoop() {
	for {
		select {
		case id := <-d.dead:
			d.handles.drop(id)
			if err := d.fs.Remove(d.valueName(id)); err != nil && !isNotExist(err) {
				d.log.Warn().Err(err).Msg("a value's file could not be removed; the next start tries again")
			}
		case <-d.stop:
			return
		}
	}
}
